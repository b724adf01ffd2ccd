"""Evaluate a model on a split: the loss of every row, captions, ROUGE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from repro.data.pipeline import CaptionedImages, prefetch
from repro.evaluation.rouge import rouge_scores
from repro.protocol import LossReduction, Protocol

HostBatch = dict[str, np.ndarray]
RowLosses = Callable[[Any, HostBatch], tuple[Any, Any]]
Generate = Callable[[Any, np.ndarray], Any]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: `loss`, and if captions were generated `gen_len` (tokens) and ROUGE F x 100 as plain means; a loss only
            where there are reference captions.
        details: how the metrics came about: rows, bootstrap intervals, sentence splitter.
        generations: {"label", "pred"} of each evaluated row, in order.
        image_paths: of the same rows.
    """

    metrics: dict[str, float]
    details: dict[str, Any]
    generations: list[dict[str, str]]
    image_paths: list[str]


@dataclass(frozen=True)
class Evaluator:
    """How to evaluate, whatever the split and the parameters.

    Attributes:
        row_losses: (params, batch [B,...]) to the rows' loss (sums, counts), float32[B].
        generate: (params, pixels uint8[B,S,S,3]) to captions int32[B,L]; None to compute the loss alone.
        num_replicas, replica_batch: their product is B; under the example's protocols a batch's loss depends on both.
        progress: whether to draw progress bars.
    """

    row_losses: RowLosses
    generate: Generate | None
    tokenizer: Any
    protocol: Protocol
    num_replicas: int
    replica_batch: int
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
        has_captions = all(caption is not None for caption in data.captions[:num_rows])
        metrics: dict[str, float] = {}
        details: dict[str, Any] = {"rows": num_rows}
        if has_captions:
            metrics["loss"] = self._loss(params, data, rows, name)
        generations: list[dict[str, str]] = []
        if self.generate is not None:
            tokens = self._captions(params, data, rows, name)
            metrics["gen_len"] = float((tokens != self.tokenizer.pad_token_id).sum(axis=1).mean())
            generations = self._texts(tokens, data.labels[rows])
        if generations and has_captions:
            scores = rouge_scores([row["pred"] for row in generations], [row["label"] for row in generations])
            metrics.update(scores.means)
            details["rouge_intervals"] = scores.intervals
            details["sentence_splitter"] = scores.sentence_splitter
        return Evaluation(
            metrics=metrics,
            details=details,
            generations=generations,
            image_paths=list(data.image_paths[:num_rows]),
        )

    def _loss(self, params: Any, data: CaptionedImages, rows: np.ndarray, name: str) -> float:
        sums, counts = [], []
        for batch, is_real in self._batches(rows, data.batch, f"{name} loss"):
            batch_sums, batch_counts = self.row_losses(params, batch)
            sums.append(np.asarray(batch_sums, np.float64) * is_real)
            counts.append(np.asarray(batch_counts, np.float64) * is_real)
        total, count = np.stack(sums), np.stack(counts)
        if self.protocol.token_eval_loss:
            return float(total.sum() / count.sum())
        return mean_of_batch_losses(total, count, self.protocol.loss_reduction, num_replicas=self.num_replicas)

    def _captions(self, params: Any, data: CaptionedImages, rows: np.ndarray, name: str) -> np.ndarray:
        """int32[N,L], one caption a row, generated once for each distinct image where the protocol says so."""
        assert self.generate is not None
        images, of_row = data.image_index[rows], np.arange(len(rows))
        if self.protocol.generate_per_image:
            images, of_row = np.unique(images, return_inverse=True)
        tokens = []
        pixels_of = lambda batch: {"pixels": data.pixels[batch]}  # noqa: E731
        for batch, is_real in self._batches(images, pixels_of, f"{name} captions"):
            tokens.append(np.asarray(self.generate(params, batch["pixels"]))[is_real])
        return np.concatenate(tokens)[of_row]

    def _batches(
        self, items: np.ndarray, load: Callable[[np.ndarray], HostBatch], description: str
    ) -> Iterator[tuple[HostBatch, np.ndarray]]:
        """Yield whole batches and a bool[B] that tells items from the padding of the last one."""

        def loaded() -> Iterator[tuple[HostBatch, np.ndarray]]:
            for start in range(0, len(items), self.batch_size):
                batch = items[start : start + self.batch_size]
                is_real = np.arange(self.batch_size) < len(batch)
                yield load(np.resize(batch, self.batch_size)), is_real

        count = -(-len(items) // self.batch_size)
        yield from tqdm(
            prefetch(loaded()),
            total=count,
            desc=description,
            unit="batch",
            leave=False,
            disable=None if self.progress else True,
        )

    def _texts(self, tokens: np.ndarray, labels: np.ndarray) -> list[dict[str, str]]:
        def decode(ids: np.ndarray) -> list[str]:
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            return [text.strip() for text in texts]

        return [
            {"label": label, "pred": prediction}
            for label, prediction in zip(decode(labels), decode(tokens), strict=True)
        ]


def mean_of_batch_losses(sums: np.ndarray, counts: np.ndarray, reduction: LossReduction, *, num_replicas: int) -> float:
    """Average the batches' losses without weights, as the example reports them.

    Args:
        sums, counts: float64[batches,B], the rows' losses.
        reduction: how the loss of one batch comes from its rows, as in training.
    """
    by_replica = (len(sums), num_replicas, -1)
    total = sums.reshape(by_replica).sum(axis=2)
    count = counts.reshape(by_replica).sum(axis=2)
    if reduction == "replica_means":
        return float((total / count).mean())
    return float((total.sum(axis=1) / count.sum(axis=1)).mean())
