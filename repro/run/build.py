"""The compiled parts of a run, put together from its flags: training from a state on, and the evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from repro.data.batches import RowOrder
from repro.errors import InputError
from repro.evaluation.evaluator import Evaluator, Programs, compile_programs
from repro.record.writer import log
from repro.run.prepare import PreparedRun
from repro.training.checkpoint import abstract
from repro.training.interrupt import StopSignals
from repro.training.loop import StepResult, after_step, take_steps
from repro.training.memory import SHARE, choices, compile_step, compile_what_fits, device_bytes, step_bytes, tree_bytes
from repro.training.optimizer import create_learning_rate_fn, create_optimizer
from repro.training.sharding import put, state_sharding, train_batch_sharding
from repro.training.steps import TrainState, TrainStep, create_train_state, make_eval_step, make_train_step

SHRINKS_FROM = 32  # rows of an evaluation batch from which on captions that have ended leave it
GIBIBYTE = 2**30


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

    def from_state(self, state: TrainState, step: int) -> Iterator[StepResult]:
        """Give the step that the state comes from, if it comes from one, and then take the others."""
        if step:
            yield after_step(state, step, self.prepared.steps_per_epoch, {})
        data = self.prepared.splits["train"]
        yield from take_steps(self.step, state, data, self.row_order, self.batch_sharding, first_step=step)


def build_training(prepared: PreparedRun) -> Training:
    """Compile the training step for as many replicas at once as the flags say or the memory holds."""
    args, mesh, num_replicas = prepared.args, prepared.mesh, prepared.num_replicas
    learning_rate = create_learning_rate_fn(
        args.learning_rate, num_steps=prepared.num_steps, warmup_steps=args.warmup_steps
    )
    optimizer = create_optimizer(
        learning_rate,
        rule=prepared.protocol.decay_mask,
        weight_decay=args.weight_decay,
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
    )
    create = partial(create_train_state, optimizer=optimizer, seed=args.seed, num_replicas=num_replicas)
    shapes = jax.eval_shape(create, prepared.pretrained.params)
    shardings = state_sharding(mesh, shapes)
    like = abstract(shapes, shardings)
    row = prepared.splits["train"].batch(np.zeros(1, np.int64))
    make_step = partial(
        make_train_step,
        prepared.pretrained.captioner.logits,
        optimizer,
        learning_rate,
        reduction=prepared.protocol.loss_reduction,
        label_smoothing=args.label_smoothing_factor,
    )
    sizes = {"num_replicas": num_replicas, "replica_batch": args.per_device_train_batch_size}
    if prepared.progress:
        log.info("compiling the training step")
    at_once, step = compile_what_fits(
        lambda number: compile_step(make_step, like, row, mesh, replicas_at_once=number, **sizes),
        _at_once(prepared),
        limit=SHARE * device_bytes(mesh.local_devices[0]),
        bytes_of=step_bytes,
    )
    facts = {"replicas_at_once": at_once, "step_bytes": step_bytes(step), "state_bytes": tree_bytes(like)}
    if at_once < num_replicas:
        size = facts["step_bytes"] / GIBIBYTE
        log.info("%d of %d replicas at once: a step takes %.1f GiB", at_once, num_replicas, size)

    def start() -> TrainState:
        params = put(prepared.pretrained.params, shardings.params)
        return jax.jit(create, out_shardings=shardings)(params)

    row_order = RowOrder(seed=args.seed, num_epochs=prepared.num_epochs, shuffle=prepared.shuffle, **sizes)
    batch_sharding = train_batch_sharding(mesh, num_replicas=num_replicas, replicas_at_once=at_once)
    return Training(prepared, step, start, like, row_order, batch_sharding, facts)


def _at_once(prepared: PreparedRun) -> list[int]:
    args = prepared.args
    num_replicas, replica_batch = prepared.num_replicas, args.per_device_train_batch_size
    possible = choices(prepared.mesh, num_replicas=num_replicas, replica_batch=replica_batch)
    if args.replicas_at_once is None:
        return possible
    if args.replicas_at_once not in possible:
        raise InputError(
            f"--replicas_at_once {args.replicas_at_once}: with {num_replicas} replicas of {replica_batch} rows on"
            f" {prepared.mesh.size} devices it can be {', '.join(map(str, possible))}."
        )
    return [args.replicas_at_once]


def build_evaluator(
    prepared: PreparedRun, signals: StopSignals | None = None, *, held_bytes: int = 0, limit: float | None = None
) -> Evaluator:
    """Put together what evaluates, as many device batches at once as the memory holds; a signal ends it between turns.

    Args:
        held_bytes: what else is on a device: the state, where it is evaluated in the middle of training.
        limit: bytes that a device has to give; None to ask it.
    """
    args, data_args, captioner, mesh = prepared.args, prepared.data_args, prepared.pretrained.captioner, prepared.mesh
    num_replicas, replica_batch = prepared.num_replicas, args.per_device_eval_batch_size
    possible = choices(mesh, num_replicas=num_replicas, replica_batch=replica_batch) or [num_replicas]
    asked = [number for number in possible if number <= (args.replicas_at_once or num_replicas)]
    if limit is None:
        limit = SHARE * device_bytes(mesh.local_devices[0]) - held_bytes

    def generate(params: Any, memory: Any, *, num_rows: int) -> Any:
        return captioner.generate(
            params,
            memory,
            max_length=data_args.val_max_target_length or data_args.max_target_length,
            num_beams=data_args.num_beams or captioner.generation_config.num_beams or 1,
            stop_rule=prepared.protocol.stop_rule,
            group_size=replica_batch,
            # On one device down to a quarter: the pocket model's captions take 10 to 40 % less time on a CPU. A small
            # batch does not repay compiling the search for each size; over several devices rows would have to move.
            smallest_batch=num_rows // 4 if mesh.size == 1 and num_rows >= SHRINKS_FROM else None,
        ).tokens[:, 0]

    def compile_batches(number: int) -> Programs:
        num_rows = number * replica_batch
        return compile_programs(
            captioner.encode,
            make_eval_step(captioner.decode, label_smoothing=args.label_smoothing_factor),
            partial(generate, num_rows=num_rows) if data_args.predict_with_generate else None,
            prepared.pretrained.params,
            prepared.evaluated.batch(np.zeros(1, np.int64)),
            mesh,
            num_rows=num_rows,
        )

    @cache
    def programs() -> Programs:
        if prepared.progress:
            log.info("compiling the evaluation")
        at_once, found = compile_what_fits(
            compile_batches, asked or possible[-1:], limit=limit, bytes_of=lambda found: found.num_bytes
        )
        if at_once < num_replicas:
            size = found.num_bytes / GIBIBYTE
            log.info("%d of %d device batches are evaluated at once: %.1f GiB", at_once, num_replicas, size)

        def encode(params: Any, pixels: Any) -> Any:
            if signals:
                signals.raise_if_received()
            return found.encode(params, pixels)

        return replace(found, encode=encode)

    return Evaluator(
        programs=programs,
        tokenizer=prepared.pretrained.tokenizer,
        protocol=prepared.protocol,
        num_replicas=num_replicas,
        replica_batch=replica_batch,
        caption_metrics=data_args.caption_metrics,
        progress=prepared.progress,
    )
