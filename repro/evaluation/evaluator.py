"""Evaluate a model on a split: the loss of every row, captions, ROUGE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repro.data.pipeline import CaptionedImages, prefetch
from repro.evaluation.caption_metrics import caption_scores
from repro.evaluation.programs import Generate, Programs
from repro.evaluation.rouge import rouge_scores
from repro.progress_bar import progress_bar
from repro.protocol import LossReduction, Protocol


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: `loss`, and if captions were generated `gen_len` (tokens) and ROUGE F x 100 as plain means; loss and
            scores are of the rows that have a reference caption.
        details: how the metrics came about: rows, bootstrap intervals, sentence splitter.
        generations: {"label", "pred"} of each evaluated row, in order.
        image_paths, image_ids: of the same rows.
    """

    metrics: dict[str, float]
    details: dict[str, Any]
    generations: list[dict[str, str]]
    image_paths: list[str]
    image_ids: list[str]


@dataclass(frozen=True)
class Evaluator:
    """How to evaluate, whatever the split and the parameters.

    Attributes:
        programs: gives, compiled once it is asked for, what computes a number of device batches [replica_batch]
            together; how many changes time and memory alone.
        num_replicas, replica_batch: the rows of a global batch; under the example's protocols, losses depend on both.
        caption_metrics: compute BLEU and CIDEr-D too.
        progress: whether to draw progress bars.
    """

    programs: Callable[[], Programs]
    tokenizer: Any
    protocol: Protocol
    num_replicas: int
    replica_batch: int
    caption_metrics: bool = False
    progress: bool = True

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
        sums, counts, tokens = self._by_image(params, data, rows, name, given=given, generate=per_image)
        if programs.generate is not None and per_image is None:
            tokens = self._by_row(params, data, rows, f"{name} captions", generate=programs.generate)
        metrics: dict[str, float] = {}
        details: dict[str, Any] = {"rows": num_rows}
        if given.any():
            metrics["loss"] = self._mean_loss(sums, counts)
        if given.any() and not given.all():
            details["rows_scored"] = int(given.sum())
        generations: list[dict[str, str]] = []
        if tokens is not None:
            metrics["gen_len"] = float((tokens != self.tokenizer.pad_token_id).sum(axis=1).mean())
            generations = self._texts(tokens, data.tokens(rows)["labels"])
        scored = [row for row, is_given in zip(generations, given, strict=False) if is_given]
        if scored:
            texts = ([row[name] for row in scored] for name in ("pred", "label"))
            scores = rouge_scores(*texts, images=data.image_paths(rows[given]))
            metrics.update(scores.means)
            details["rouge_intervals"] = scores.intervals
            details["sentence_splitter"] = scores.sentence_splitter
        if scored and self.caption_metrics:
            captions = caption_of_each_image(data.image_paths(rows[given]), scored)
            found = caption_scores(captions, data.captions_of_images(rows[given]))
            metrics.update(found.means)
            details["caption_tokenizer"] = found.tokenizer
        return Evaluation(
            metrics=metrics,
            details=details,
            generations=generations,
            image_paths=data.image_paths(rows),
            image_ids=data.image_ids(rows),
        )

    def _mean_loss(self, sums: np.ndarray, counts: np.ndarray) -> float:
        if self.protocol.token_eval_loss:
            return float(sums.sum() / counts.sum())
        missing = -len(sums) % self.batch_size
        sums, counts = (np.pad(values, (0, missing)).reshape(-1, self.batch_size) for values in (sums, counts))
        return mean_of_batch_losses(sums, counts, self.protocol.loss_reduction, num_replicas=self.num_replicas)

    def _by_image(
        self,
        params: Any,
        data: CaptionedImages,
        rows: np.ndarray,
        name: str,
        *,
        given: np.ndarray,
        generate: Generate | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Encode each distinct image once for the losses of its rows, float64[N] twice, and a caption, int32[N,L].

        The losses are 0 but for the rows whose caption is given, bool[N].
        """
        sums, counts = np.zeros((2, len(rows)))
        programs = self.programs()
        if not given.any() and generate is None:
            return sums, counts, None
        images, of_row, num_rows = np.unique(data.image_index[rows], return_inverse=True, return_counts=True)
        num_captions = np.bincount(of_row[given], minlength=len(images))
        # Images with as many captions share batches, in which all have their first, then all their second.
        order = np.argsort(-num_captions, kind="stable")
        rows_by_image, first = np.lexsort((~given, of_row)), np.cumsum(num_rows) - num_rows
        tokens: list[np.ndarray] = []
        for places, memory in self._encoded(params, data, images[order], name):
            batch = np.resize(order[places], programs.num_rows)
            for turn in range(num_captions[batch].max()):
                has_turn = (num_captions[batch] > turn) & (np.arange(programs.num_rows) < len(places))
                turns = rows_by_image[first[batch] + turn * has_turn]
                values = programs.row_losses(params, memory, programs.place(data.tokens, rows[turns]))
                sums[turns[has_turn]], counts[turns[has_turn]] = (np.asarray(value)[has_turn] for value in values)
            if generate is not None:
                tokens.append(np.asarray(generate(params, memory))[: len(places)])
        return sums, counts, np.concatenate(tokens)[np.argsort(order)[of_row]] if tokens else None

    def _by_row(
        self, params: Any, data: CaptionedImages, rows: np.ndarray, description: str, *, generate: Generate
    ) -> np.ndarray:
        """int32[N,L], generated in batches of rows as they come: a caption may depend on its neighbours."""
        encoded = self._encoded(params, data, data.image_index[rows], description)
        return np.concatenate([np.asarray(generate(params, memory))[: len(places)] for places, memory in encoded])

    def _encoded(
        self, params: Any, data: CaptionedImages, images: np.ndarray, description: str
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield places in `images`, in order, with these images encoded; the last batch is padded to B with others."""
        programs = self.programs()
        starts = range(0, len(images), programs.num_rows)

        def load(numbers: np.ndarray) -> dict[str, np.ndarray]:
            return {"pixels": data.images[numbers]}

        def loaded() -> Iterator[tuple[np.ndarray, Any]]:
            for start in starts:
                places = np.arange(start, min(start + programs.num_rows, len(images)))
                yield places, programs.place(load, images[np.resize(places, programs.num_rows)])["pixels"]

        with progress_bar(
            progress=self.progress, total=len(images), desc=description, unit="image", leave=False
        ) as bar:
            for places, pixels in prefetch(loaded()):
                yield places, programs.encode(params, pixels)
                bar.update(len(places))

    def _texts(self, tokens: np.ndarray, labels: np.ndarray) -> list[dict[str, str]]:
        def decode(ids: np.ndarray) -> list[str]:
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            return [text.strip() for text in texts]

        return [
            {"label": label, "pred": prediction}
            for label, prediction in zip(decode(labels), decode(tokens), strict=True)
        ]


def caption_of_each_image(images: Sequence[str], generations: Sequence[dict[str, str]]) -> dict[str, str]:
    """Pair each image that was evaluated with the first caption that was generated for it; empty if there is none.

    Args:
        images: what names the image of each row, its path or its id.
    """
    found: dict[str, str] = {}
    for image, row in zip(images, generations, strict=False):
        found.setdefault(image, row["pred"])
    return found


def coco_results(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Give the first caption of each image as COCO's evaluation servers take it: {"image_id": number, "caption"}.

    Returns:
        Nothing where captions were not generated, or where the data do not name their images by numbers.
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
