"""The compiled parts of a run, put together: training from a state on, and the evaluator."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import jax
import numpy as np
from datasets import Dataset
from jax.sharding import NamedSharding

from repro.data.batches import RowOrder, prefetch
from repro.evaluation.evaluator import Evaluator, Programs, compile_programs
from repro.models.generation import search_settings
from repro.progress import waiting
from repro.record.writer import log
from repro.run.prepare import PreparedRun, at_once_choices, num_beams
from repro.training import steps
from repro.training.memory import SHARE, batch_shapes, choices, compile_what_fits, device_bytes, step_bytes, tree_bytes
from repro.training.sharding import gather_on, put, put_rows, replicated, state_sharding, train_batch_sharding
from repro.training.steps import Batch, TrainState, TrainStep


@dataclass(frozen=True)
class Training:
    """What trains."""

    prepared: PreparedRun
    step: TrainStep  # compiled; takes the buffers of the state that it is given
    create: Callable[[], TrainState]  # makes the state before the first step
    like: TrainState  # the state's shapes, dtypes and shardings
    row_order: RowOrder  # which rows a step takes
    batch_sharding: NamedSharding  # of a batch [R,b,...]
    facts: dict[str, Any]  # how it was compiled, for `run.json`

    def batches(self, first_step: int = 0) -> Generator[tuple[int, Batch | None, float]]:
        """Load the batches of all steps after `first_step` ahead of them.

        Yields:
            The step, counted from 1 over the whole run; its batch, on the device; the seconds until that was there.
            First, without a batch, a step that was taken already: what was due after it may not have been done.
        """
        if first_step:
            yield first_step, None, 0.0
        data = self.prepared.splits["train"]
        steps_per_epoch = self.row_order.steps_per_epoch(len(data))
        load = partial(put_rows, data.batch, self.batch_sharding)
        for epoch in range(first_step // steps_per_epoch, self.row_order.num_epochs):
            # Drawn in this thread: which random stream JAX uses is thread-local.
            rows = self.row_order.epoch_rows(epoch, len(data))
            taken = max(first_step - epoch * steps_per_epoch, 0)
            with closing(prefetch(map(load, rows[taken:]))) as batches:
                for step in range(epoch * steps_per_epoch + taken + 1, (epoch + 1) * steps_per_epoch + 1):
                    asked = time.perf_counter()
                    batch = next(batches)
                    yield step, batch, time.perf_counter() - asked

    def rows_of(self, step: int) -> Dataset:
        """The rows that a step takes."""
        data = self.prepared.splits["train"]
        epoch, index = divmod(step - 1, self.row_order.steps_per_epoch(len(data)))
        return data.dataset.select(data.kept[self.row_order.epoch_rows(epoch, len(data))[index].reshape(-1)])


@lru_cache(maxsize=4)
def _eval_functions(captioner: Any, smoothing: float, generates: bool, **search: Any) -> tuple[Any, Any, Any]:
    """Give what encodes, computes rows' losses and captions images, for `compile_programs`."""

    def generate(params: Any, memory: Any) -> Any:
        return captioner.generate(params, memory, **search).tokens[:, 0]

    row_losses = steps.make_eval_step(captioner.decode, label_smoothing=smoothing)
    return captioner.encode, row_losses, generate if generates else None


def build_training(prepared: PreparedRun) -> Training:
    """Compile the training step for as many replicas at once as are asked for, or as the memory holds."""
    settings, mesh = prepared.settings, prepared.mesh
    learning_rate = steps.create_learning_rate_fn(
        settings.learning_rate, num_steps=settings.num_steps, warmup_steps=settings.warmup_steps
    )
    optimizer = steps.create_optimizer(
        learning_rate,
        rule=settings.rules.decay_mask,
        weight_decay=settings.weight_decay,
        beta1=settings.adam_beta1,
        beta2=settings.adam_beta2,
        epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
    )
    create = partial(steps.create_train_state, optimizer=optimizer, seed=settings.seed, num_replicas=settings.replicas)
    shardings = state_sharding(mesh, jax.eval_shape(create, prepared.pretrained.params))
    start = jax.jit(create, out_shardings=shardings)
    like = start.eval_shape(prepared.pretrained.params)
    row = prepared.splits["train"].batch(np.zeros(1, np.int64))
    sizes = {"num_replicas": settings.replicas, "replica_batch": settings.per_device_train_batch_size}

    def compile_step(number: int) -> jax.stages.Compiled:
        """Compile a step that takes the buffers of its state and gives the next one the same place."""
        step = steps.make_train_step(
            prepared.pretrained.captioner.logits,
            optimizer,
            learning_rate,
            reduction=settings.rules.loss_reduction,
            label_smoothing=settings.label_smoothing_factor,
            replicas_at_once=number,
            gather=gather_on(mesh),
        )
        sharding = train_batch_sharding(mesh, num_replicas=settings.replicas, replicas_at_once=number)
        batch = batch_shapes(row, tuple(sizes.values()), sharding)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        return jitted.lower(like, batch).compile()

    with waiting("compiling the training step", progress=prepared.progress):
        at_once, step = compile_what_fits(
            compile_step,
            at_once_choices(settings, mesh),
            limit=SHARE * device_bytes(mesh.local_devices[0]),
            bytes_of=step_bytes,
        )
    facts = {"replicas_at_once": at_once, "step_bytes": step_bytes(step), "state_bytes": tree_bytes(like)}
    if at_once < settings.replicas:
        size = facts["step_bytes"] / 2**30
        log.info("%d of %d replicas at once: a step takes %.1f GiB", at_once, settings.replicas, size)
    row_order = RowOrder(seed=settings.seed, num_epochs=settings.num_epochs, shuffle=settings.shuffle, **sizes)
    batch_sharding = train_batch_sharding(mesh, num_replicas=settings.replicas, replicas_at_once=at_once)
    make = lambda: start(put(prepared.pretrained.params, shardings.params))  # noqa: E731
    return Training(prepared, step, make, like, row_order, batch_sharding, facts)


def build_evaluator(prepared: PreparedRun, *, held_bytes: int = 0) -> Evaluator:
    """Put together what evaluates, as many device batches at once as the memory holds.

    Args:
        held_bytes: what else is on a device: the state, where it is evaluated in the middle of training.
    """
    settings, captioner, mesh = prepared.settings, prepared.pretrained.captioner, prepared.mesh
    num_replicas, replica_batch = settings.replicas, settings.per_device_eval_batch_size
    possible = choices(mesh, num_replicas=num_replicas, replica_batch=replica_batch) or [num_replicas]
    asked = [number for number in possible if number <= (settings.replicas_at_once or num_replicas)]
    limit = SHARE * device_bytes(mesh.local_devices[0]) - held_bytes
    search: dict[str, Any] = {"max_length": settings.max_length("validation"), "stop_rule": settings.rules.stop_rule}
    search["num_beams"] = num_beams(settings, prepared.pretrained)

    def compile_batches(number: int) -> Programs:
        # Of a split that is evaluated; both have rows of one shape.
        data = next(split for name, split in prepared.splits.items() if name != "train")
        wanted = (captioner, settings.label_smoothing_factor, settings.predict_with_generate)
        return compile_programs(
            *_eval_functions(*wanted, **search, group_size=replica_batch),
            prepared.pretrained.params,
            data.batch(np.zeros(1, np.int64)),
            mesh,
            num_rows=number * replica_batch,
        )

    @cache
    def programs() -> Programs:
        with waiting("compiling the evaluation", progress=prepared.progress):
            at_once, found = compile_what_fits(
                compile_batches, asked or possible[-1:], limit=limit, bytes_of=lambda found: found.num_bytes
            )
        if at_once < num_replicas:
            size = found.num_bytes / 2**30
            log.info("%d of %d device batches are evaluated at once: %.1f GiB", at_once, num_replicas, size)
        return found

    return Evaluator(
        programs=programs,
        tokenizer=prepared.pretrained.tokenizer,
        protocol=settings.rules,
        num_replicas=num_replicas,
        replica_batch=replica_batch,
        caption_metrics=settings.caption_metrics,
        search=search | search_settings(captioner),
        progress=prepared.progress,
    )
