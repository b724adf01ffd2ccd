"""One run, read downwards: load, prepare, compile; step, log, save, evaluate; predict; close."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.errors import Interrupted, RunStopped, stopping_on_full_disk
from repro.evaluation.evaluator import Evaluation, Evaluator
from repro.json_files import PARTIAL
from repro.models.pretrained import save_model
from repro.record.hub import HubUploader
from repro.record.model_card import Trained, write_card
from repro.record.writer import NON_FINITE, STATE, RunWriter, log, prefixed
from repro.run.build import Training, build_evaluator, build_training
from repro.run.prepare import PreparedRun, data_in_words, prepare
from repro.run.resume import Start, check_same, enter_folders, what_stays
from repro.run.settings import FLAGS, Settings
from repro.run.step_log import NonFinite, StepLog
from repro.training.checkpoint import CORRUPT, Checkpoints, set_aside
from repro.training.interrupt import StopSignals
from repro.training.processes import is_first, wait_for_all
from repro.training.sharding import put, replicated
from repro.training.steps import TrainState

Score = Callable[[Evaluation], dict[str, float]]
Watch = Callable[[dict[str, Any], list[dict[str, Any]]], None]
SPLIT_OF = {"eval": "validation", "test": "test"}
PART = ("started", "devices", "mesh", "processes", "platform", "versions")  # what may differ after resuming


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        folder: the run's.
        evaluations: the last evaluation, `eval`, and the prediction, `test`.
        facts: the content of `run.json`.
    """

    folder: Path
    evaluations: dict[str, Evaluation]
    facts: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """The evaluations' metrics, named and rounded as in the result files."""
        found = (prefixed(prefix, evaluation.metrics) for prefix, evaluation in self.evaluations.items())
        return {name: value for metrics in found for name, value in metrics.items()}


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    *,
    devices: Sequence[jax.Device] | None = None,
    score: Score | None = None,
    watch: Watch | None = None,
    progress: bool = True,
) -> RunResult:
    """Do what the flags ask for.

    Args:
        devices: that compute; None for all that JAX sees. They change the time, not the numbers.
        score: further metrics of an evaluation of the validation rows.
        watch: sees `run.json` and the recorded rows before training and whenever steps are logged, and may raise
            RunStopped.

    Raises:
        InputError: a flag or the data cannot be used; nothing was trained, written or removed.
        RunStopped: a loss or gradient is not finite, or the disk is full.
        Interrupted: by SIGTERM or SIGINT; once training has begun, its state is saved.
    """
    began, devices = time.perf_counter(), devices or jax.devices()
    settings = Settings.of(model_args, data_args, args, num_devices=len(devices))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.threefry_partitionable(settings.rules.threefry_partitionable))
        signals = stack.enter_context(StopSignals())
        start = enter_folders(stack, settings)
        settings = dataclasses.replace(settings, num_replicas=settings.num_replicas or start.num_replicas)
        prepared = prepare(settings, devices, progress=progress and is_first())
        settings, facts = prepared.settings, dict(prepared.facts)
        if start.found:
            check_same(start.found.record["settings"], what_stays(prepared))
        training = build_training(prepared) if settings.do_train else None

        stack.enter_context(stopping_on_full_disk("a file of the run"))
        if start.found and is_first() and not start.branches_off:
            set_aside(settings.folder / STATE, start.found)
        # The other processes' files are thrown away: what a run writes is the same in all.
        own = settings.folder if is_first() else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        recorded = start.recorded if start.found else None
        clock = lambda: start.seconds + time.perf_counter() - began  # noqa: E731
        writer = stack.enter_context(RunWriter(own, recorded, branches_off=start.branches_off, clock=clock))
        uploader = None
        if settings.push_to_hub and is_first():
            found = HubUploader(settings.folder, repository=settings.hub_model_id, token=settings.hub_token)
            uploader = stack.enter_context(found)
        wait_for_all("folder")
        stack.enter_context(_writing_why_it_ends(writer, facts, prepared))
        if training is not None:
            facts |= training.facts
        facts["shuffle"] = settings.shuffle
        facts["startup_seconds"] = round(time.perf_counter() - began, 1)
        facts["parts"] = [*start.parts, {"first_step": start.step + 1, **{name: facts[name] for name in PART}}]
        writer.describe(facts, prepared.dropped)
        _say_what_begins(prepared, start)
        if watch:
            watch(facts, writer.recorded.rows)

        evaluator = build_evaluator(prepared, signals, held_bytes=facts.get("state_bytes", 0))
        evaluate = partial(_evaluate, prepared, evaluator, writer, score)
        if training is not None:
            params, evaluations = _train(training, writer, start, signals, facts, evaluate, watch, uploader)
        else:
            params, evaluations = put(prepared.pretrained.params, replicated(prepared.mesh)), {}
            if settings.do_eval:
                evaluations["eval"] = evaluate(params, "eval", step=0, folder=own)
        if settings.do_predict:
            evaluations["test"] = evaluate(params, "test", step=settings.num_steps, folder=own)
        facts["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        facts["seconds"] = round(writer.seconds(), 1)
        facts["checksums"] = writer.checksums()
        writer.describe(facts, prepared.dropped)
        writer.close_tensorboard()
        if uploader:
            uploader.finish("end of the run", stopped=lambda: signals.received is not None)
        return RunResult(settings.folder, evaluations, facts)


def _train(
    training: Training,
    writer: RunWriter,
    start: Start,
    signals: StopSignals,
    facts: dict[str, Any],
    evaluate: Callable[..., Evaluation],
    watch: Watch | None,
    uploader: HubUploader | None,
) -> tuple[Any, dict[str, Evaluation]]:
    """Train to the end; returns the parameters, whole on every device, and the last evaluation if there was one."""
    prepared, settings, recorded = training.prepared, training.prepared.settings, writer.recorded
    metric, evaluations = settings.metric_for_best_model, dict[str, Evaluation]()
    best = lambda: recorded.best_step(metric) if metric else None  # noqa: E731
    whole = jax.jit(lambda params: params, out_shardings=replicated(prepared.mesh))
    with contextlib.closing(Checkpoints(settings.folder / STATE, keep=settings.save_total_limit, best=best)) as states:
        state = states.restore(start.found, training.like) if start.found else training.create()
        jax.block_until_ready(state)  # making it is no training
        signals.defer()
        steps = StepLog(
            writer,
            num_steps=settings.num_steps,
            batch_size=settings.train_batch,
            logging_steps=settings.logging_steps,
            progress=prepared.progress,
            first_step=start.step,
            seconds_before=start.clock("training_seconds"),
            waited_before=start.clock("waiting_for_input_seconds"),
            log_grad_norm=settings.log_grad_norm,
        )
        try:
            with steps.bar:  # closed, so that what is said next has a line of its own
                for step, batch, waited in training.batches(start.step):
                    if batch is not None:
                        state, metrics = training.step(state, batch)
                        steps.add(step, metrics, waited=waited)
                    if settings.saves_at(step):
                        _save_state(states, state, step, steps, writer, prepared)
                    evaluates = settings.evaluates_at(step)
                    # The example saves its models when it evaluates, which may be never; here no training ends without.
                    if evaluates or (step == settings.num_steps and not recorded.evaluations("eval")):
                        steps.pause()
                        params = whole(state.params)
                        folder = writer.folder / f"ckpt_epoch_{settings.epoch_of(step)}_step_{step}"
                        seconds = _save_model(prepared, params, folder, again=batch is not None)
                        evaluation = None
                        if evaluates:
                            evaluation = evaluate(params, "eval", step, folder, saving_seconds=seconds)
                            evaluations["eval"] = evaluation
                        if is_first():
                            write_card(folder, _trained(prepared, step, evaluation))
                        if uploader:
                            uploader.push(f"epoch {settings.epoch_of(step)}, step {step}")
                        steps.resume()
                    if watch and steps.logs(step):
                        watch(facts, recorded.rows)
                    if signals.requested(step) and step < settings.num_steps:
                        _save_state(states, state, step, steps, writer, prepared)
                        assert signals.received is not None
                        raise Interrupted(signals.received, "between two steps.")
        except NonFinite as error:
            _write_non_finite(error, training, writer)
            states.wait()
            values = ", ".join(f"{name} {value:g}" for name, value in error.metrics.items())
            raise RunStopped(
                f"step {error.step} is not finite ({values}). Its rows are in {settings.folder / NON_FINITE};"
                f" {_how_to_go_on(states, settings)} Look at the rows, lower --learning_rate, or add --max_grad_norm 1."
            ) from error
        except Interrupted as error:
            states.wait()
            raise Interrupted(error.signum, _how_to_go_on(states, settings)) from error
        facts |= steps.close()
    return whole(state.params), evaluations


def _save_state(
    states: Checkpoints, state: TrainState, step: int, steps: StepLog, writer: RunWriter, prepared: PreparedRun
) -> None:
    """Save a state to go on from, once it is known to be finite and everything before it is written."""
    settings = prepared.settings
    if settings.save_steps == 0 or step in states.steps():
        return
    steps.flush()
    writer.sync()
    record = {
        "step": step,
        "epoch": settings.epoch_of(step),
        "step_in_epoch": (step - 1) % settings.steps_per_epoch + 1,
        "training_seconds": steps.training_seconds,
        "waiting_for_input_seconds": steps.waited,
        "seconds": round(writer.seconds(), 3),
        "settings": what_stays(prepared),
        "versions": prepared.facts["versions"],
    }
    states.save(state, step, record)


def _save_model(prepared: PreparedRun, params: Any, folder: Path, *, again: bool) -> float:
    """Write a model's folder whole or not at all; returns the seconds that this took.

    Args:
        again: also where it is there already.
    """
    if not is_first() or (folder.exists() and not again):
        return 0.0
    started = time.perf_counter()
    partial_folder = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial_folder, ignore_errors=True)
    save_model(prepared.pretrained, jax.device_get(params), partial_folder)
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)
    seconds = time.perf_counter() - started
    log.info("%s: saved in %.1f s", folder.name, seconds)
    return seconds


def _evaluate(
    prepared: PreparedRun,
    evaluator: Evaluator,
    writer: RunWriter,
    score: Score | None,
    params: Any,
    prefix: str,
    step: int,
    folder: Path,
    **more: float,
) -> Evaluation:
    """Evaluate the rows of `eval` or `test`, or read back what was recorded; the writer is told `more` too."""
    data = prepared.splits[SPLIT_OF[prefix]]
    rows = np.arange(len(data))
    paths, ids = data.image_paths(rows), data.image_ids(rows)
    writer.images(prefix, paths, ids)
    if step in writer.recorded.evaluations(prefix):
        return writer.read_evaluation(prefix, step, folder, image_paths=paths, image_ids=ids)
    started = time.perf_counter()
    evaluation = evaluator.evaluate(params, data, name=prefix)
    if score is not None and prefix == "eval":
        evaluation = dataclasses.replace(evaluation, metrics={**evaluation.metrics, **score(evaluation)})
    seconds = time.perf_counter() - started
    writer.evaluation(prefix, evaluation, step=step, folder=folder, seconds=seconds, **more)
    figures = (f"{prefix}_{name} {value:.4f}" for name, value in evaluation.metrics.items())
    log.info("step %d: %s", step, ", ".join(figures))
    return evaluation


def _trained(prepared: PreparedRun, step: int, evaluation: Evaluation | None) -> Trained:
    devices, flags = list(prepared.mesh.devices.flat), what_stays(prepared)["flags"]
    return Trained(
        epoch=prepared.settings.epoch_of(step),
        step=step,
        facts=prepared.facts,
        flags={name: value for name, value in flags.items() if value != FLAGS[name].default},
        device=f"{len(devices)} x {devices[0].device_kind}",
        evaluation=evaluation,
    )


def _write_non_finite(error: NonFinite, training: Training, writer: RunWriter) -> None:
    data = training.prepared.splits["train"]
    epoch, index = divmod(error.step - 1, training.prepared.settings.steps_per_epoch)
    rows = data.kept[training.row_order.epoch_rows(epoch, len(data))[index].reshape(-1)]
    told = ("row", "image_path", "caption")
    writer.non_finite(
        step=error.step,
        metrics={name: str(value) for name, value in error.metrics.items()},
        rows=[{name: row[name] for name in told} for row in data.dataset.select(rows)],
    )


def _how_to_go_on(states: Checkpoints, settings: Settings) -> str:
    how, steps = "the same command" if settings.resume == "auto" else "--resume auto", states.steps()
    return f"the state of step {steps[-1]} is saved, {how} goes on from it." if steps else "no state is saved."


def _say_what_begins(prepared: PreparedRun, start: Start) -> None:
    if start.found:
        for step in start.found.corrupt:
            log.warning("the state of step %d is corrupt: set aside as %d%s", step, step, CORRUPT)
        log.info("goes on after step %d of %s", start.step, start.found.folder)
    for level, line in data_in_words(prepared.facts["data"]):
        log.log(level, line)
    for note in prepared.pretrained.notes:
        log.info("model: %s", note)


@contextlib.contextmanager
def _writing_why_it_ends(writer: RunWriter, facts: dict[str, Any], prepared: PreparedRun) -> Iterator[None]:
    """Where a run ends before its end, have its log and `run.json` say why."""
    try:
        yield
    except BaseException as error:
        facts["stopped"] = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # the disk may be full
            writer.end(facts["stopped"])
            writer.describe(facts, prepared.dropped)
        raise
