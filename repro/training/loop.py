"""The loop over epochs and batches, as a generator: its consumer logs, evaluates and saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import NamedSharding

from repro.data.pipeline import CaptionedImages, Schedule, prefetch
from repro.training.sharding import put_rows
from repro.training.state import TrainState
from repro.training.steps import TrainStep


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


def take_steps(
    train_step: TrainStep,
    state: TrainState,
    data: CaptionedImages,
    schedule: Schedule,
    sharding: NamedSharding,
    *,
    first_step: int = 0,
) -> Iterator[StepResult]:
    """Train, yielding after each step without waiting for the device to finish it.

    Args:
        state: after `first_step` steps, which are not taken again.
    """
    steps_per_epoch = schedule.steps_per_epoch(len(data))
    load = partial(put_rows, data.batch, sharding)
    for epoch in range(first_step // steps_per_epoch, schedule.num_epochs):
        # Drawn in this thread: which random stream JAX uses is thread-local.
        rows = schedule.epoch_rows(epoch, len(data))
        taken = max(first_step - epoch * steps_per_epoch, 0)
        for index, batch in enumerate(prefetch(map(load, rows[taken:])), start=taken + 1):
            state, metrics = train_step(state, batch)
            yield after_step(state, epoch * steps_per_epoch + index, steps_per_epoch, metrics)


def after_step(state: TrainState, step: int, steps_per_epoch: int, metrics: dict[str, jax.Array]) -> StepResult:
    """Say where in its epoch a step is."""
    epoch, index = divmod(step - 1, steps_per_epoch)
    return StepResult(state, step, epoch + 1, is_epoch_end=index + 1 == steps_per_epoch, metrics=metrics)
