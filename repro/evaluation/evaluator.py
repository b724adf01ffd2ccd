"""Evaluate a model on a split, by programs compiled from shapes alone: losses, captions, ROUGE, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from repro.data.batches import CaptionedImages, prefetch
from repro.data.captions import shift_right
from repro.evaluation.caption_metrics import caption_scores
from repro.evaluation.rouge import rouge_scores
from repro.progress import progress_bar
from repro.protocol import LossReduction, Protocol
from repro.training.memory import batch_shapes, step_bytes, tree_bytes
from repro.training.sharding import put_rows, replicated, rows_sharding

# Batches of pixels on a device before their turn: two in the queue, one in the hand of the thread that fills it.
BATCHES_WAITING = 3
Load = Callable[[np.ndarray], dict[str, np.ndarray]]
Generate = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Programs:
    """What evaluates B rows at once."""

    num_rows: int  # B
    # (what loads rows int[n], rows int[B]) to their arrays on the devices; several processes each load some.
    place: Callable[[Load, np.ndarray], dict[str, Any]]
    encode: Callable[[Any, Any], Any]  # (params, pixels uint8[B,S,S,3]) to whatever the other two take for these images
    # (params, encoded images, a caption [B,T] of each) to the captions' loss (sums, counts), float32[B].
    row_losses: Callable[[Any, Any, dict[str, Any]], tuple[Any, Any]]
    generate: Generate | None  # (params, encoded images) to captions int32[B,L]; None to compute the loss alone
    num_bytes: int = 0  # the most that is held on one device at any time, parameters included


def compile_programs(
    encode: Callable[..., Any],
    row_losses: Callable[..., Any],
    generate: Callable[..., Any] | None,
    params: Any,
    row: Mapping[str, Any],
    mesh: Mesh,
    *,
    num_rows: int,
) -> Programs:
    """Compile the functions of `Programs` for parameters that are whole on every device.

    Args:
        params, row: what is evaluated and one row of a batch [1,...], or their shapes.
    """
    everywhere, sharding = replicated(mesh), rows_sharding(mesh, num_rows=num_rows)
    captions = batch_shapes(row, (num_rows,), sharding)
    pixels = captions.pop("pixels")
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), params)
    encoding = jax.jit(encode).lower(params, pixels).compile()
    memory = encoding.out_info
    scoring = jax.jit(row_losses, out_shardings=everywhere).lower(params, memory, captions).compile()
    searching = generate and jax.jit(generate, out_shardings=everywhere).lower(params, memory).compile()
    # While images are encoded, the encoded ones before them are there still.
    most = max(step_bytes(encoding) + tree_bytes(memory), *(step_bytes(done) for done in (scoring, searching) if done))
    return Programs(
        num_rows=num_rows,
        place=lambda load, rows: put_rows(load, sharding, rows),
        encode=encoding,
        row_losses=scoring,
        generate=searching,
        num_bytes=most + BATCHES_WAITING * tree_bytes(pixels),
    )


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    # `loss`, and if captions were generated `gen_len` (tokens) and ROUGE F x 100 as plain means; loss and scores are of
    # the rows that have a reference caption.
    metrics: dict[str, float]
    details: dict[str, Any]  # how the metrics came about: rows, bootstrap intervals, sentence splitter
    generations: list[dict[str, str]]  # {"label", "pred"} of each evaluated row, in order
    image_paths: list[str]  # of the same rows, as the next
    image_ids: list[str]


@dataclass(frozen=True)
class Evaluator:
    """How to evaluate, whatever the split and the parameters."""

    # Gives, compiled once it is asked for, what computes a number of device batches [replica_batch] together; how many
    # changes time and memory alone.
    programs: Callable[[], Programs]
    tokenizer: Any
    protocol: Protocol
    # The rows of a global batch are their product; under the example's protocols, losses depend on both.
    num_replicas: int
    replica_batch: int
    caption_metrics: bool = False  # compute BLEU and CIDEr-D too
    search: Mapping[str, Any] = field(default_factory=dict)  # how captions are made, to be told beside their scores
    before_turn: Callable[[], None] = lambda: None  # called before each batch; what it raises ends the evaluation
    progress: bool = True  # whether to draw progress bars

    @property
    def batch_size(self) -> int:
        return self.num_replicas * self.replica_batch

    def evaluate(self, params: Any, data: CaptionedImages, *, name: str = "eval") -> Evaluation:
        """Evaluate every row, or the rows of whole batches where the protocol drops the rest."""
        num_rows = len(data)
        if not self.protocol.keep_incomplete_batch:
            num_rows -= num_rows % self.batch_size
        assert num_rows, "the caller checks that there is a whole batch"
        rows = np.arange(num_rows)
        given = data.have_captions(rows)
        programs = self.programs()
        per_image = programs.generate if self.protocol.generate_per_image else None
        sums, counts, tokens = self._by_image(params, data, rows, name, per_image)
        if programs.generate is not None and per_image is None:
            # In batches of rows as they come: a caption may depend on its neighbours.
            encoded = self._encoded(params, data, data.image_index[rows], f"{name} captions")
            found = [np.asarray(programs.generate(params, memory))[: len(places)] for places, memory in encoded]
            tokens = np.concatenate(found)
        metrics: dict[str, float] = {}
        details: dict[str, Any] = {"rows": num_rows}
        if given.any():
            metrics["loss"] = self._mean_loss(sums, counts)
            if not given.all():
                details["rows_scored"] = int(given.sum())
        generations: list[dict[str, str]] = []
        if tokens is not None:
            metrics["gen_len"] = float((tokens != self.tokenizer.pad_token_id).sum(axis=1).mean())
            generations = self._texts(tokens, data.tokens(rows)["labels"])
            details["search"] = dict(self.search)
        scored = [row for row, is_given in zip(generations, given, strict=False) if is_given]
        if scored:
            images = data.read(rows[given])
            scores = rouge_scores(*([row[name] for row in scored] for name in ("pred", "label")), images=images)
            metrics |= scores.means
            details |= {"rouge_intervals": scores.intervals, "sentence_splitter": scores.sentence_splitter}
            if self.caption_metrics:
                references: dict[str, list[str]] = {}
                for image, caption in zip(images, data.read(rows[given], "caption"), strict=True):
                    references.setdefault(image, []).append(caption)
                captions = caption_of_each_image(images, scored)
                means, details["caption_tokenizer"] = caption_scores(captions, references)
                metrics |= means
        return Evaluation(metrics, details, generations, data.read(rows), data.read(rows, "image_id"))

    def _mean_loss(self, sums: np.ndarray, counts: np.ndarray) -> float:
        if self.protocol.token_eval_loss:
            return float(sums.sum() / counts.sum())
        missing = -len(sums) % self.batch_size
        sums, counts = (np.pad(values, (0, missing)).reshape(-1, self.batch_size) for values in (sums, counts))
        return mean_of_batch_losses(sums, counts, self.protocol.loss_reduction, num_replicas=self.num_replicas)

    def _by_image(
        self, params: Any, data: CaptionedImages, rows: np.ndarray, description: str, generate: Generate | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Encode each distinct image once for the losses of its rows, float64[N] twice, and a caption, int32[N,L].

        The losses are 0 but for the rows whose caption is given.
        """
        sums, counts = np.zeros((2, len(rows)))
        programs, given = self.programs(), data.have_captions(rows)
        if not given.any() and generate is None:
            return sums, counts, None
        images, of_row, num_rows = np.unique(data.image_index[rows], return_inverse=True, return_counts=True)
        num_captions = np.bincount(of_row[given], minlength=len(images))
        # Images with as many captions share batches, in which all have their first, then all their second.
        order = np.argsort(-num_captions, kind="stable")
        rows_by_image, first = np.lexsort((~given, of_row)), np.cumsum(num_rows) - num_rows
        tokens: list[np.ndarray] = []
        for places, memory in self._encoded(params, data, images[order], description):
            batch = np.resize(order[places], programs.num_rows)
            for turn in range(num_captions[batch].max()):
                has_turn = (num_captions[batch] > turn) & (np.arange(programs.num_rows) < len(places))
                turns = rows_by_image[first[batch] + turn * has_turn]
                values = programs.row_losses(params, memory, programs.place(data.tokens, rows[turns]))
                sums[turns[has_turn]], counts[turns[has_turn]] = (np.asarray(value)[has_turn] for value in values)
            if generate is not None:
                tokens.append(np.asarray(generate(params, memory))[: len(places)])
        return sums, counts, np.concatenate(tokens)[np.argsort(order)[of_row]] if tokens else None

    def _encoded(
        self, params: Any, data: CaptionedImages, images: np.ndarray, description: str
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield places in `images`, in order, with these images encoded; the last batch is padded to B with others."""
        programs = self.programs()

        def loaded() -> Iterator[tuple[np.ndarray, Any]]:
            for start in range(0, len(images), programs.num_rows):
                places = np.arange(len(images))[start : start + programs.num_rows]
                batch = images[np.resize(places, programs.num_rows)]
                yield places, programs.place(lambda numbers: {"pixels": data.images[numbers]}, batch)["pixels"]

        bar = progress_bar(progress=self.progress, total=len(images), desc=description, unit="image", leave=False)
        with bar:
            for places, pixels in prefetch(loaded()):
                self.before_turn()
                yield places, programs.encode(params, pixels)
                bar.update(len(places))

    def _texts(self, tokens: np.ndarray, labels: np.ndarray) -> list[dict[str, str]]:
        texts = (self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (labels, tokens))
        return [{"label": label.strip(), "pred": caption.strip()} for label, caption in zip(*texts, strict=True)]


def caption_of_each_image(images: Sequence[str], generations: Sequence[dict[str, str]]) -> dict[str, str]:
    """Pair each image, by the path or id that rows give it, with the first caption that was generated for it."""
    found: dict[str, str] = {}
    for image, row in zip(images, generations, strict=False):
        found.setdefault(image, row["pred"])
    return found


def some_captions(evaluation: Evaluation, number: int) -> dict[str, str]:
    """Choose images that lie evenly among those evaluated, the same every time, with their captions."""
    captions = list(caption_of_each_image(evaluation.image_paths, evaluation.generations).items())
    places = np.linspace(0, len(captions) - 1, min(number, len(captions)))
    return dict(captions[int(place)] for place in places)


def word_attention(
    pretrained: Any, params: Any, data: CaptionedImages, evaluation: Evaluation, number: int
) -> list[dict[str, Any]]:
    """Look at some captions of an evaluation, token by token.

    Returns:
        {"image_path", "tokens", "weights"} of each; of a token its attention to the image's patches, row by row, as two
        hexadecimal digits each, ff where it is strongest. Nothing without captions, or of a model that does not tell.
    """
    found, tokenizer, config = some_captions(evaluation, number), pretrained.tokenizer, pretrained.captioner.config
    ids = tokenizer([*found.values(), ""], padding=True, return_tensors="np").input_ids[:-1]
    if not ids.size or not hasattr(pretrained.captioner, "looks_at"):
        return []
    ids = ids[:, : config.decoder.max_position_embeddings]  # a caption may be cut into more tokens than it was made of
    rows = np.array([evaluation.image_paths.index(path) for path in found])
    inputs = shift_right(ids, config.decoder_start_token_id)
    looks = jax.jit(pretrained.captioner.looks_at)(params, data.images[data.image_index[rows]], inputs)
    pictures = []
    for path, row_ids, row_looks in zip(found, ids, np.asarray(looks, np.float32), strict=True):
        tokens = [tokenizer.decode([token], skip_special_tokens=True) for token in row_ids]
        weights = [np.rint(255 * look / look.max()).astype(np.uint8).tobytes().hex() for look in row_looks]
        pictures.append({"image_path": path, "tokens": tokens, "weights": weights})
    return pictures


def coco_results(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Give the first caption of each image as COCO's evaluation servers take it: {"image_id": number, "caption"}.

    There are none where captions were not generated, or where the data do not name their images by numbers.
    """
    if not all(image_id.isdecimal() for image_id in evaluation.image_ids):
        return []
    captions = caption_of_each_image(evaluation.image_ids, evaluation.generations)
    return [{"image_id": int(image_id), "caption": caption} for image_id, caption in captions.items()]


def mean_of_batch_losses(sums: np.ndarray, counts: np.ndarray, reduction: LossReduction, *, num_replicas: int) -> float:
    """Average the batches' losses without weights, as the example reports them.

    Args:
        sums, counts: float64[batches,B], the rows' losses; both 0 where the last batch has no row.
        reduction: how the loss of one batch comes from its rows, as in training.
    """
    by_replica = (len(sums), num_replicas, -1)
    scored = counts.any(axis=1)  # where captions are missing, a batch may have none at all
    total, count = (values.reshape(by_replica).sum(axis=2)[scored] for values in (sums, counts))
    if reduction == "replica_means":
        means = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
        return float((means.sum(axis=1) / (count > 0).sum(axis=1)).mean())
    return float((total.sum(axis=1) / count.sum(axis=1)).mean())
