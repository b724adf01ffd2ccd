"""One run from its flags to its files: training, evaluation, prediction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.data.pipeline import Schedule
from repro.evaluation.evaluator import Evaluation, Evaluator
from repro.models.pretrained import save_model
from repro.prepare import PreparedRun, check_flags, prepare
from repro.protocol import protocol_named
from repro.reporting.hub import HubUploader
from repro.reporting.progress import StepLog
from repro.reporting.writer import RunWriter, log, prefixed
from repro.training.loop import StepResult, take_steps
from repro.training.optimizer import create_learning_rate_fn, create_optimizer
from repro.training.sharding import put, replicated, rows_sharding, train_batch_sharding
from repro.training.state import create_train_state
from repro.training.steps import make_eval_step, make_train_step

SHRINKS_FROM = 32
"""Rows of an evaluation batch from which on captions that have ended leave it."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        folder: the run's.
        metrics: the last evaluation's and the prediction's, named and rounded as in the result files.
        evaluations: the last evaluation, `eval`, and the prediction, `test`.
        facts: the content of `run.json`.
        checkpoints: the model folders that were saved, in order.
    """

    folder: Path
    metrics: dict[str, float]
    evaluations: dict[str, Evaluation]
    facts: dict[str, Any]
    checkpoints: tuple[Path, ...]


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    *,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
) -> RunResult:
    """Do what the flags ask for.

    Args:
        devices: that compute; None for all that JAX sees. They change the time, not the numbers.

    Raises:
        InputError: a flag or the data cannot be used; nothing was trained, written or removed.
    """
    protocol = protocol_named(args.protocol)
    with jax.threefry_partitionable(protocol.threefry_partitionable):
        folder = check_flags(model_args, args)
        prepared = prepare(model_args, data_args, args, protocol, devices or jax.devices(), progress)
        with RunWriter(folder) as writer:
            return _execute(prepared, writer)


def _execute(prepared: PreparedRun, writer: RunWriter) -> RunResult:
    args, facts = prepared.args, dict(prepared.facts)
    writer.describe(facts, prepared.dropped)
    for name, counts in facts["data"].items():
        log.info("%s: %d rows read, %d kept, %d dropped, %d images", name, *list(counts.values())[:4])
    for note in prepared.pretrained.notes:
        log.info("model: %s", note)
    uploader = None
    if args.push_to_hub:
        uploader = HubUploader(writer.folder, repository=args.hub_model_id, token=args.hub_token)
    evaluator = _evaluator(prepared)
    params = put(prepared.pretrained.params, replicated(prepared.mesh))
    metrics: dict[str, float] = {}
    evaluations: dict[str, Evaluation] = {}
    checkpoints: list[Path] = []
    step = 0

    def evaluate(params: Any, split: str, prefix: str, folder: Path) -> None:
        started = time.perf_counter()
        evaluation = evaluator.evaluate(params, prepared.splits[split], name=prefix)
        seconds = time.perf_counter() - started
        writer.evaluation(prefix, evaluation, step=step, folder=folder, seconds=seconds)
        metrics.update(prefixed(prefix, evaluation.metrics))
        evaluations[prefix] = evaluation
        log.info("step %d: %s", step, describe(prefix, evaluation))

    if args.do_train:
        steps = StepLog(
            writer,
            num_steps=prepared.num_steps,
            batch_size=prepared.train_batch,
            logging_steps=args.logging_steps,
            progress=prepared.progress,
        )
        for result in _steps(prepared, params):
            params, step = result.state.params, result.step
            steps.add(result)
            evaluates = _evaluates_at(prepared, result)
            if not evaluates and not _saves_at(prepared, result, saved_before=bool(checkpoints)):
                continue
            steps.pause()
            folder = writer.folder / f"ckpt_epoch_{result.epoch}_step_{step}"
            if evaluates:
                evaluate(params, "validation", "eval", folder)
            save_model(prepared.pretrained, jax.device_get(params), folder)
            checkpoints.append(folder)
            if uploader:
                uploader.push(f"epoch {result.epoch}, step {step}")
            steps.resume()
        facts |= steps.close()
    elif args.do_eval:
        evaluate(params, "validation", "eval", writer.folder)
    if args.do_predict:
        evaluate(params, "test", "test", writer.folder)
    facts["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    writer.describe(facts, prepared.dropped)
    if uploader:
        uploader.push("end of the run")
        uploader.wait()
    return RunResult(writer.folder, metrics, evaluations, facts, tuple(checkpoints))


def describe(prefix: str, evaluation: Evaluation) -> str:
    """Put an evaluation's metrics on one line."""
    return ", ".join(f"{prefix}_{name} {value:.4f}" for name, value in evaluation.metrics.items())


def _evaluates_at(prepared: PreparedRun, result: StepResult) -> bool:
    """The example's rule: every `eval_steps`, or else at the end of each epoch; `exact` adds the end of training."""
    if not prepared.args.do_eval:
        return False
    if prepared.protocol.always_evaluate_at_end and result.step == prepared.num_steps:
        return True
    if prepared.args.eval_steps is not None and prepared.args.eval_steps > 0:
        return result.step % prepared.args.eval_steps == 0
    return result.is_epoch_end


def _saves_at(prepared: PreparedRun, result: StepResult, *, saved_before: bool) -> bool:
    """The example saves when it evaluates, which may be never; no training ends without a model here."""
    return result.step == prepared.num_steps and not saved_before


def _steps(prepared: PreparedRun, params: Any) -> Iterator[StepResult]:
    args = prepared.args
    schedule = create_learning_rate_fn(args.learning_rate, num_steps=prepared.num_steps, warmup_steps=args.warmup_steps)
    optimizer = create_optimizer(
        schedule,
        rule=prepared.protocol.decay_mask,
        weight_decay=args.weight_decay,
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        epsilon=args.adam_epsilon,
    )
    train_step = make_train_step(
        prepared.pretrained.captioner.logits,
        optimizer,
        schedule,
        reduction=prepared.protocol.loss_reduction,
        label_smoothing=args.label_smoothing_factor,
    )
    everywhere = replicated(prepared.mesh)
    state = create_train_state(params, optimizer, seed=args.seed, num_replicas=prepared.num_replicas)
    return take_steps(
        jax.jit(train_step, donate_argnums=0, out_shardings=everywhere),
        # A copy: the first step takes the buffers of the state that it is given.
        jax.tree.map(jax.numpy.copy, put(state, everywhere)),
        prepared.splits["train"],
        Schedule(
            seed=args.seed,
            num_epochs=prepared.num_epochs,
            shuffle=args.block_size > 0 or prepared.protocol.shuffle_without_blocks,
            num_replicas=prepared.num_replicas,
            replica_batch=args.per_device_train_batch_size,
        ),
        train_batch_sharding(prepared.mesh, num_replicas=prepared.num_replicas),
    )


def _smallest_batch(prepared: PreparedRun, batch_size: int) -> int | None:
    """A quarter of a large batch on one device: the pocket model's captions take 10 to 40 % less time on a CPU.

    A small batch does not repay compiling the search for each size; over several devices rows would have to move.
    """
    return batch_size // 4 if prepared.mesh.size == 1 and batch_size >= SHRINKS_FROM else None


def _evaluator(prepared: PreparedRun) -> Evaluator:
    args, data_args, captioner = prepared.args, prepared.data_args, prepared.pretrained.captioner
    batch_size = prepared.num_replicas * args.per_device_eval_batch_size
    sharding = rows_sharding(prepared.mesh, num_rows=batch_size)
    generate: Callable[[Any, Any], Any] | None = None
    if data_args.predict_with_generate:
        settings = captioner.generation_config
        generate = jax.jit(
            lambda params, memory: captioner.generate(
                params,
                memory,
                max_length=data_args.val_max_target_length or data_args.max_target_length,
                num_beams=data_args.num_beams or settings.num_beams or 1,
                stop_rule=prepared.protocol.stop_rule,
                group_size=args.per_device_eval_batch_size,
                smallest_batch=_smallest_batch(prepared, batch_size),
            ).tokens[:, 0]
        )
    encode = jax.jit(captioner.encode)
    eval_step = jax.jit(make_eval_step(captioner.decode, label_smoothing=args.label_smoothing_factor))
    return Evaluator(
        encode=lambda params, pixels: encode(params, put(pixels, sharding)),
        row_losses=lambda params, memory, captions: eval_step(params, memory, put(captions, sharding)),
        generate=generate,
        tokenizer=prepared.pretrained.tokenizer,
        protocol=prepared.protocol,
        num_replicas=prepared.num_replicas,
        replica_batch=args.per_device_eval_batch_size,
        progress=prepared.progress,
    )
