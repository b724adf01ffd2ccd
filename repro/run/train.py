"""One run, read downwards: load, prepare, compile; step, log, save, evaluate; predict; close."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices

from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.errors import Interrupted, RunStopped, stopping_on_full_disk
from repro.evaluation.evaluator import Evaluation, Evaluator, word_attention
from repro.json_files import write_json
from repro.models.weights import digest_of_weights
from repro.provenance import versions
from repro.record.hub import HubUploader
from repro.record.writer import ATTENTION, NON_FINITE, STATE, RunWriter, log, prefixed
from repro.run import resume
from repro.run.build import Training, build_evaluator, build_training
from repro.run.prepare import PreparedRun, log_preparation, prepare
from repro.run.settings import Settings
from repro.run.step_log import NonFinite, StepLog, in_short
from repro.training.checkpoint import Checkpoints, set_aside
from repro.training.interrupt import StopSignals
from repro.training.memory import keeping_programs
from repro.training.processes import check_alike, is_first
from repro.training.sharding import put, replicated

Score = Callable[[Evaluation], dict[str, float]]
Probe = Callable[[Training], dict[str, Any]]
Watch = Callable[[dict[str, Any], list[dict[str, Any]]], None]
SPLIT_OF = {"eval": "validation", "test": "test"}
OWN = ("process_id", "preprocessing_num_workers", "data_dir", "cache_dir")  # flags of each process for itself
PART = ("started", "devices", "mesh", "processes", "platform", "versions")  # what may differ after resuming


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    folder: Path
    evaluations: dict[str, Evaluation]  # the last evaluation, `eval`, and the prediction, `test`
    facts: dict[str, Any]  # the content of `run.json`

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
    probe: Probe | None = None,
    watch: Watch | None = None,
    progress: bool = True,
) -> RunResult:
    """Do what the flags ask for.

    Args:
        devices: that compute; None for all that JAX sees. They change the time, not the numbers.
        score: further metrics of an evaluation of the validation rows.
        probe: what `run.json` says of the compiled training, before its first step.
        watch: sees `run.json` and the recorded rows before training and whenever steps are logged, and may raise
            RunStopped.

    Raises:
        InputError: a flag or the data cannot be used; nothing was trained, written or removed.
        RunStopped: a loss or gradient is not finite, or the disk is full.
        Interrupted: by SIGTERM or SIGINT; once training has begun, its state is saved.
    """
    began, devices = time.perf_counter(), devices or jax.devices()
    settings = Settings.of(model_args, data_args, args, num_devices=len(devices))
    check_alike(lambda: {f"--{name}": flag for name, flag in settings.flags.items() if name not in OWN} | versions())
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.threefry_partitionable(settings.rules.threefry_partitionable))
        signals = stack.enter_context(StopSignals())
        start = resume.enter_folders(stack, settings)
        stack.enter_context(keeping_programs(settings.cache / "programs"))
        if start.found and not settings.num_replicas:
            settings = dataclasses.replace(settings, num_replicas=start.found.record["settings"]["num_replicas"])
        prepared = prepare(settings, devices, progress=progress and is_first())
        check_alike(lambda: resume.what_stays(prepared) | {"weights": digest_of_weights(prepared.pretrained.params)})
        settings, facts = prepared.settings, dict(prepared.facts)
        if start.found:
            resume.check_same(start.found.record["settings"], resume.what_stays(prepared))
        training = build_training(prepared) if settings.do_train else None

        stack.enter_context(stopping_on_full_disk("a file of the run"))
        if start.found and is_first() and not start.branches_off:
            set_aside(settings.folder / STATE, start.found)
        # The other processes' files are thrown away: what a run writes is the same in all.
        own = settings.folder if is_first() else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clock = lambda: start.seconds + time.perf_counter() - began  # noqa: E731
        recorded = start.recorded if start.found else None
        writer = stack.enter_context(RunWriter(own, recorded, branches_off=start.branches_off, clock=clock))
        uploader = None
        if settings.push_to_hub and is_first():
            uploader = HubUploader(settings.folder, repository=settings.hub_model_id, token=settings.hub_token)
            stack.enter_context(uploader)
        sync_global_devices("folder")
        facts["parts"] = [*start.parts, {"first_step": start.step + 1, **{name: facts[name] for name in PART}}]
        stack.enter_context(_writing_why_it_ends(writer, facts, prepared))
        if training:
            facts |= training.facts | ({"probe": probe(training)} if probe else {})
        facts |= {"shuffle": settings.shuffle, "startup_seconds": round(time.perf_counter() - began, 1)}
        writer.describe(facts, prepared.dropped)
        start.announce()
        log_preparation(prepared, start.step)
        if watch:
            watch(facts, writer.recorded.rows)

        evaluator = build_evaluator(prepared, held_bytes=facts.get("state_bytes", 0))
        evaluator = dataclasses.replace(evaluator, before_turn=signals.raise_if_received)
        evaluate = partial(_evaluate, prepared, evaluator, writer, score)
        if training is not None:
            params, evaluations = _train(training, writer, start, signals, facts, evaluate, watch, uploader)
        else:
            params, evaluations = put(prepared.pretrained.params, replicated(prepared.mesh)), {}
            if settings.do_eval:
                evaluations["eval"] = evaluate(params, "eval", step=0, folder=own)
        evaluated, shown = evaluations.get("eval"), settings.attention_pictures
        if evaluated and jax.process_count() == 1:
            looks = word_attention(prepared.pretrained, params, prepared.splits["validation"], evaluated, shown)
            write_json(own / ATTENTION, looks, indent=None)
        if settings.do_predict:
            evaluations["test"] = evaluate(params, "test", step=settings.num_steps, folder=own)
        facts |= {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": round(writer.seconds(), 1)}
        facts["checksums"] = writer.checksums()
        writer.describe(facts, prepared.dropped)
        writer.tensorboard.close()  # or the last of what it is to show is in a queue still
        if uploader:
            uploader.finish("end of the run", stopped=lambda: signals.received is not None)
        return RunResult(settings.folder, evaluations, facts)


def _train(
    training: Training,
    writer: RunWriter,
    start: resume.Start,
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
        before = start.found.record if start.found else {}
        steps = StepLog(writer, settings, progress=prepared.progress, before=before)
        try:
            with steps.bar:  # closed, so that what is said next has a line of its own
                for step, batch, waited in training.batches(start.step):
                    if batch is not None:
                        state, metrics = training.step(state, batch)
                        steps.add(step, metrics, waited=waited)
                    if settings.saves_at(step):
                        resume.save_state(states, state, step, steps, prepared)
                    evaluates = settings.evaluates_at(step)
                    # The example saves its models when it evaluates, which may be never; here no training ends without.
                    if evaluates or (step == settings.num_steps and not recorded.evaluations("eval")):
                        steps.pause()
                        params = whole(state.params)
                        folder = writer.folder / f"ckpt_epoch_{settings.epoch_of(step)}_step_{step}"
                        seconds = resume.save_whole_model(prepared, params, folder, again=batch is not None)
                        if evaluates:
                            evaluations["eval"] = evaluate(params, "eval", step, folder, saving_seconds=seconds)
                        resume.describe_model(prepared, step, evaluations.get("eval"), folder)
                        if uploader:
                            uploader.push(f"epoch {settings.epoch_of(step)}, step {step}")
                        steps.resume()
                    if watch and steps.logs(step):
                        watch(facts, recorded.rows)
                    if signals.requested(step) and step < settings.num_steps:
                        resume.save_state(states, state, step, steps, prepared)
                        assert signals.received is not None
                        raise Interrupted(signals.received, "between two steps.")
        except NonFinite as error:
            rows = training.rows_of(error.step).select_columns(["row", "image_path", "caption"])
            found = {name: str(value) for name, value in error.metrics.items()}
            write_json(writer.folder / NON_FINITE, {"step": error.step, "metrics": found, "rows": list(rows)})
            states.wait()
            values = ", ".join(f"{name} {value:g}" for name, value in error.metrics.items())
            raise RunStopped(
                f"step {error.step} is not finite ({values}). Its rows are in {settings.folder / NON_FINITE};"
                f" {resume.how_to_go_on(states, settings)} Look at the rows, lower --learning_rate, or add"
                " --max_grad_norm 1."
            ) from error
        except Interrupted as error:
            states.wait()
            raise Interrupted(error.signum, resume.how_to_go_on(states, settings)) from error
        facts |= steps.close()
    return whole(state.params), evaluations


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
    paths, ids = data.read(rows), data.read(rows, "image_id")
    writer.images(prefix, paths, ids)
    if step in writer.recorded.evaluations(prefix):
        return writer.read_evaluation(prefix, step, folder, image_paths=paths, image_ids=ids)
    log.info("step %d, %s: evaluating %d rows", step, SPLIT_OF[prefix], len(rows))
    started = time.perf_counter()
    evaluation = evaluator.evaluate(params, data, name=prefix)
    if score is not None and prefix == "eval":
        evaluation = dataclasses.replace(evaluation, metrics={**evaluation.metrics, **score(evaluation)})
    seconds = time.perf_counter() - started
    writer.evaluation(prefix, evaluation, step=step, folder=folder, seconds=seconds, **more)
    log.info("step %d, %s: %s", step, SPLIT_OF[prefix], in_short(evaluation.metrics))
    return evaluation


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
