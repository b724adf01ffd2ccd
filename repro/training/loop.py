"""The loop over epochs and batches, as a generator: its consumer logs, evaluates and saves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import NamedSharding

from repro.data.batches import CaptionedImages, RowOrder, prefetch
from repro.training.sharding import put_rows
from repro.training.steps import TrainState, TrainStep


@dataclass(frozen=True)
class StepResult:
    """One step that was taken."""

    state: TrainState  # the state after it; the next step takes its buffers away
    step: int  # counted from 1 over the whole run
    epoch: int  # counted from 1
    is_epoch_end: bool
    metrics: dict[str, jax.Array]  # the step's, still on the device
    waited: float = 0.0  # seconds until the step's batch was there


def take_steps(
    train_step: TrainStep,
    state: TrainState,
    data: CaptionedImages,
    row_order: RowOrder,
    sharding: NamedSharding,
    *,
    first_step: int = 0,
) -> Iterator[StepResult]:
    """Train on from a state after `first_step` steps, yielding after each without waiting for the device."""
    steps_per_epoch = row_order.steps_per_epoch(len(data))
    load = partial(put_rows, data.batch, sharding)
    for epoch in range(first_step // steps_per_epoch, row_order.num_epochs):
        # Drawn in this thread: which random stream JAX uses is thread-local.
        rows = row_order.epoch_rows(epoch, len(data))
        taken = max(first_step - epoch * steps_per_epoch, 0)
        with closing(prefetch(map(load, rows[taken:]))) as batches:
            for step in range(epoch * steps_per_epoch + taken + 1, (epoch + 1) * steps_per_epoch + 1):
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                state, metrics = train_step(state, batch)
                yield after_step(state, step, steps_per_epoch, metrics, waited=waited)


def after_step(
    state: TrainState, step: int, steps_per_epoch: int, metrics: dict[str, jax.Array], *, waited: float = 0.0
) -> StepResult:
    """Say where in its epoch a step is."""
    epoch, index = divmod(step - 1, steps_per_epoch)
    return StepResult(state, step, epoch + 1, index + 1 == steps_per_epoch, metrics, waited)
