"""The loop over epochs and batches, as a generator: its consumer logs, evaluates and saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding

from repro.data.pipeline import CaptionedImages, batches, blocks, epoch_order, prefetch
from repro.training.sharding import put
from repro.training.state import TrainState
from repro.training.steps import Batch, TrainStep


@dataclass(frozen=True)
class Schedule:
    """What is trained on and in which order.

    Attributes:
        shuffle: whether epochs are permuted; otherwise rows come in the order of the file.
        block_size: rows per block, 0 for one block.
        num_replicas, replica_batch: a global batch is their product, row r in replica r // replica_batch.
    """

    seed: int
    num_epochs: int
    shuffle: bool
    block_size: int
    num_replicas: int
    replica_batch: int

    @property
    def global_batch(self) -> int:
        return self.num_replicas * self.replica_batch


@dataclass(frozen=True)
class StepResult:
    """One step that was taken.

    Attributes:
        state: the state after it; the next step takes its buffers away.
        step: counted from 1 over the whole run.
        epoch: counted from 1.
        metrics: the step's, still on the device.
    """

    state: TrainState
    step: int
    epoch: int
    is_epoch_end: bool
    metrics: dict[str, jax.Array]


def epoch_batches(schedule: Schedule, num_rows: int, epoch: int) -> Iterator[np.ndarray]:
    """Give the rows int[R*b] of each batch of an epoch (counted from 0), without the incomplete last one.

    The order is drawn at the call, in the caller's thread: which random stream JAX uses is thread-local.
    """
    order = epoch_order(schedule.seed, epoch, num_rows) if schedule.shuffle else np.arange(num_rows)
    return (rows for block in blocks(order, schedule.block_size) for rows in batches(block, schedule.global_batch))


def take_steps(
    train_step: TrainStep,
    state: TrainState,
    data: CaptionedImages,
    schedule: Schedule,
    sharding: NamedSharding,
) -> Iterator[StepResult]:
    """Train, yielding after each step without waiting for the device to finish it."""
    steps_per_epoch = len(data) // schedule.global_batch
    to_replicas = _splitter(schedule.num_replicas)

    def load(rows: np.ndarray) -> Batch:
        return put(jax.tree.map(to_replicas, data.batch(rows)), sharding)

    for epoch in range(schedule.num_epochs):
        rows = epoch_batches(schedule, len(data), epoch)
        for index, batch in enumerate(prefetch(map(load, rows)), start=1):
            state, metrics = train_step(state, batch)
            yield StepResult(
                state=state,
                step=epoch * steps_per_epoch + index,
                epoch=epoch + 1,
                is_epoch_end=index == steps_per_epoch,
                metrics=metrics,
            )


def _splitter(num_replicas: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array.reshape(num_replicas, -1, *array.shape[1:])
