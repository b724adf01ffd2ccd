"""One run from its flags to its files: training, evaluation, prediction; from the start, or from where it was ended."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repro.config import ARGUMENTS, DataArguments, ModelArguments, TrainingArguments, make_arguments
from repro.errors import Interrupted, RunStopped, stopping_on_full_disk
from repro.evaluation.evaluator import Evaluation, Evaluator
from repro.json_files import PARTIAL
from repro.models.captioner import NativeCaptioner
from repro.models.pretrained import Pretrained, save_model
from repro.protocol import protocol_named
from repro.record.hub import HubUploader
from repro.record.model_card import Trained, write_card
from repro.record.writer import NON_FINITE, STATE, RunWriter, log, prefixed
from repro.run.build import Training, build_evaluator, build_training
from repro.run.flags import check_flags
from repro.run.prepare import PreparedRun, cache_folder, data_in_words, evaluates_at, prepare, target_length
from repro.run.resume import Start, check_same, enter_folders, settings
from repro.run.step_log import NonFinite, StepLog, header, in_short
from repro.training.checkpoint import CORRUPT, Checkpoints, set_aside
from repro.training.interrupt import StopSignals
from repro.training.loop import StepResult
from repro.training.processes import is_first, wait_for_all
from repro.training.sharding import put, replicated

DEFAULTS = {name: value for part in make_arguments(ARGUMENTS, {}) for name, value in vars(part).items()}  # of all flags
Score = Callable[[Evaluation], dict[str, float]]
Watch = Callable[[dict[str, Any], list[dict[str, Any]]], None]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        folder: the run's.
        metrics: the last evaluation's and the prediction's, named and rounded as in the result files.
        evaluations: the last evaluation, `eval`, and the prediction, `test`.
        facts: the content of `run.json`.
    """

    folder: Path
    metrics: dict[str, float]
    evaluations: dict[str, Evaluation]
    facts: dict[str, Any]


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
    began, protocol = time.perf_counter(), protocol_named(args.protocol)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.threefry_partitionable(protocol.threefry_partitionable))
        signals = stack.enter_context(StopSignals())
        folder = check_flags(model_args, data_args, args)
        start = enter_folders(stack, args, folder, cache_folder(model_args))
        args = dataclasses.replace(args, num_replicas=args.num_replicas or start.num_replicas)
        prepared = prepare(model_args, data_args, args, protocol, devices or jax.devices(), progress and is_first())
        same = json.loads(json.dumps(settings(prepared, model_args)))
        if start.found:
            check_same(start.found.record["settings"], same)
        training = build_training(prepared) if args.do_train else None
        stack.enter_context(stopping_on_full_disk("a file of the run"))
        if start.found and is_first() and not start.branches_off:
            set_aside(folder / STATE, start.found)
        # The other processes' files are thrown away: what a run writes is the same in all.
        own = folder if is_first() else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        recorded = start.recorded if start.found else None
        clock = lambda: start.seconds + time.perf_counter() - began  # noqa: E731
        writer = stack.enter_context(RunWriter(own, recorded, branches_off=start.branches_off, clock=clock))
        uploader = None
        if args.push_to_hub and is_first():
            uploader = stack.enter_context(HubUploader(folder, repository=args.hub_model_id, token=args.hub_token))
        wait_for_all("folder")
        watch = watch or (lambda facts, rows: None)
        return _Run(prepared, training, writer, uploader, folder, start, same, signals, score, watch, began).execute()


@dataclass
class _Run:
    """A run at work: where it is, and what it has written."""

    prepared: PreparedRun
    training: Training | None
    writer: RunWriter
    uploader: HubUploader | None
    folder: Path
    start: Start
    settings: dict[str, Any]
    signals: StopSignals
    score: Score | None
    watch: Watch
    began: float
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def execute(self) -> RunResult:
        """Do what is to be done; where it ends before its end, log and `run.json` say why."""
        facts = dict(self.prepared.facts)
        try:
            return self._execute(facts)
        except BaseException as error:
            facts["stopped"] = f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # the disk may be full
                self.writer.end(facts["stopped"])
                self.writer.describe(facts, self.prepared.dropped)
            raise

    def _execute(self, facts: dict[str, Any]) -> RunResult:
        """Train, evaluate and predict as far as that is not done already."""
        prepared, args = self.prepared, self.prepared.args
        if self.training is not None:
            facts |= self.training.facts
        part = {name: facts[name] for name in ("started", "devices", "mesh", "processes", "platform", "versions")}
        facts["shuffle"] = prepared.shuffle
        facts["startup_seconds"] = round(time.perf_counter() - self.began, 1)
        facts["parts"] = [*self.start.parts, {"first_step": self.start.step + 1, **part}]
        if self.start.found:
            for step in self.start.found.corrupt:
                log.warning("the state of step %d is corrupt: set aside as %d%s", step, step, CORRUPT)
            log.info("goes on after step %d of %s", self.start.step, self.start.found.folder)
        self.writer.describe(facts, prepared.dropped)
        for level, line in data_in_words(facts["data"]):
            log.log(level, line)
        for line in header(prepared, self.folder, self.start.step):
            log.info(line)
        for note in () if self.start.found else prepared.pretrained.notes:  # a state's weights are none of these
            log.info("model: %s", note)
        evaluator = build_evaluator(prepared, self.signals, held_bytes=facts.get("state_bytes", 0))
        self.watch(facts, self.writer.recorded.rows)
        if self.training is not None:
            params = self._train(self.training, evaluator, facts)
        else:
            params = put(prepared.pretrained.params, replicated(prepared.mesh))
            if args.do_eval:
                self._evaluate(evaluator, params, "validation", "eval", self.writer.folder)
        if args.do_predict:
            self._evaluate(evaluator, params, "test", "test", self.writer.folder)
        facts["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        facts["seconds"] = round(self.writer.seconds(), 1)
        facts["checksums"] = self.writer.checksums()
        self.writer.describe(facts, prepared.dropped)
        self.writer.close_tensorboard()
        if self.uploader:
            self.uploader.finish("end of the run", stopped=lambda: self.signals.received is not None)
        return RunResult(self.folder, self.metrics, self.evaluations, facts)

    def _train(self, training: Training, evaluator: Evaluator, facts: dict[str, Any]) -> Any:
        """Train to the end; returns the parameters, whole on every device."""
        args, recorded, metric = self.prepared.args, self.writer.recorded, self.prepared.args.metric_for_best_model
        best = lambda: recorded.best_step(metric) if metric else None  # noqa: E731
        with contextlib.closing(Checkpoints(self.folder / STATE, keep=args.save_total_limit, best=best)) as states:
            state = states.restore(self.start.found, training.like) if self.start.found else training.create()
            jax.block_until_ready(state)
            self.signals.defer()
            steps = StepLog(
                self.writer,
                num_steps=self.prepared.num_steps,
                batch_size=self.prepared.train_batch,
                logging_steps=args.logging_steps,
                progress=self.prepared.progress,
                first_step=self.start.step,
                seconds_before=self.start.clock("training_seconds"),
                waited_before=self.start.clock("waiting_for_input_seconds"),
                log_grad_norm=args.log_grad_norm,
            )
            try:
                with steps.bar:  # closed, so that what is said next has a line of its own
                    for result in training.from_state(state, self.start.step):
                        state, self.step = result.state, result.step
                        if result.metrics:
                            steps.add(result)
                        self._after(result, steps, states, evaluator)
                        if steps.logs(result.step):
                            self.watch(facts, self.writer.recorded.rows)
                        if self.signals.requested(self.step) and self.step < self.prepared.num_steps:
                            self._save_state(result, steps, states)
                            assert self.signals.received is not None
                            raise Interrupted(self.signals.received, "between two steps.")
            except NonFinite as error:
                raise RunStopped(self._describe_non_finite(error, training, states)) from error
            except Interrupted as error:
                states.wait()
                raise Interrupted(error.signum, self._how_to_go_on(states)) from error
            facts |= steps.close()
        return self._whole(state.params)

    def _after(self, result: StepResult, steps: StepLog, states: Checkpoints, evaluator: Evaluator) -> None:
        """Save and evaluate what is due after a step and was not done before the run was resumed."""
        prepared = self.prepared
        evaluates = evaluates_at(prepared.args, prepared.protocol, result.step, prepared.steps_per_epoch)
        every = prepared.args.save_steps
        if evaluates or result.is_epoch_end or (every and result.step % every == 0):
            self._save_state(result, steps, states)
        # The example saves its models when it evaluates, which may be never; no training ends without one here.
        at_end = result.step == prepared.num_steps
        if not evaluates and (not at_end or self.writer.recorded.evaluations("eval")):
            return
        steps.pause()
        params = self._whole(result.state.params)
        folder = self.writer.folder / f"ckpt_epoch_{result.epoch}_step_{result.step}"
        saving = 0.0
        if is_first() and (result.metrics or not folder.exists()):
            saving = save_whole_model(prepared, params, folder)
            log.info("step %d: model saved in %.1f s", result.step, saving)
        if evaluates:
            self._evaluate(evaluator, params, "validation", "eval", folder, saving_seconds=saving)
        if is_first():
            write_card(folder, self._trained(result, evaluated=evaluates))
        if self.uploader:
            self.uploader.push(f"epoch {result.epoch}, step {result.step}")
        steps.resume()

    def _trained(self, result: StepResult, *, evaluated: bool) -> Trained:
        devices = list(self.prepared.mesh.devices.flat)
        return Trained(
            epoch=result.epoch,
            step=result.step,
            facts=self.prepared.facts,
            flags={name: value for name, value in self.settings["flags"].items() if value != DEFAULTS[name]},
            device=f"{len(devices)} x {devices[0].device_kind}",
            evaluation=self.evaluations["eval"] if evaluated else None,
        )

    def _save_state(self, result: StepResult, steps: StepLog, states: Checkpoints) -> None:
        """Save a state to go on from, once it is known to be finite and everything before it is written."""
        if self.prepared.args.save_steps == 0 or result.step in states.steps():
            return
        steps.flush()
        self.writer.sync()
        record = {
            "step": result.step,
            "epoch": result.epoch,
            "step_in_epoch": result.step - (result.epoch - 1) * self.prepared.steps_per_epoch,
            "training_seconds": steps.training_seconds,
            "waiting_for_input_seconds": steps.waited,
            "seconds": round(self.writer.seconds(), 3),
            "settings": self.settings,
            "versions": self.prepared.facts["versions"],
        }
        states.save(result.state, result.step, record)

    def _whole(self, params: Any) -> Any:
        return jax.jit(lambda params: params, out_shardings=replicated(self.prepared.mesh))(params)

    def _evaluate(
        self, evaluator: Evaluator, params: Any, split: str, prefix: str, folder: Path, **more: float
    ) -> None:
        """Evaluate, or read back what was; the writer is told `more` too."""
        data = self.prepared.splits[split]
        rows = np.arange(len(data))
        paths, ids = data.image_paths(rows), data.image_ids(rows)
        self.writer.images(prefix, paths, ids)
        if self.step in self.writer.recorded.evaluations(prefix):
            evaluation = self.writer.read_evaluation(prefix, self.step, folder, image_paths=paths, image_ids=ids)
        else:
            started = time.perf_counter()
            evaluation = evaluator.evaluate(params, data, name=prefix)
            if self.score is not None and prefix == "eval":
                evaluation = dataclasses.replace(evaluation, metrics={**evaluation.metrics, **self.score(evaluation)})
            seconds = time.perf_counter() - started
            self.writer.evaluation(prefix, evaluation, step=self.step, folder=folder, seconds=seconds, **more)
            log.info("step %d, %s: %s", self.step, split, in_short(evaluation.metrics))
        self.metrics.update(prefixed(prefix, evaluation.metrics))
        self.evaluations[prefix] = evaluation

    def _describe_non_finite(self, error: NonFinite, training: Training, states: Checkpoints) -> str:
        data = self.prepared.splits["train"]
        epoch, index = divmod(error.step - 1, self.prepared.steps_per_epoch)
        rows = data.kept[training.row_order.epoch_rows(epoch, len(data))[index].reshape(-1)]
        told = ("row", "image_path", "caption")
        self.writer.non_finite(
            step=error.step,
            metrics={name: str(value) for name, value in error.metrics.items()},
            rows=[{name: row[name] for name in told} for row in data.dataset.select(rows)],
        )
        values = ", ".join(f"{name} {value:g}" for name, value in error.metrics.items())
        states.wait()
        return (
            f"step {error.step} is not finite ({values}). Its rows are in {self.folder / NON_FINITE};"
            f" {self._how_to_go_on(states)} Look at the rows, lower --learning_rate, or add --max_grad_norm 1."
        )

    def _how_to_go_on(self, states: Checkpoints) -> str:
        how, steps = "the same command" if self.prepared.args.resume == "auto" else "--resume auto", states.steps()
        return f"the state of step {steps[-1]} is saved, {how} goes on from it." if steps else "no state is saved."


def save_whole_model(prepared: PreparedRun, params: Any, folder: Path) -> float:
    """Write a model's folder whole or not at all; returns the seconds that this took."""
    started = time.perf_counter()
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    save_model(_as_evaluated(prepared), jax.device_get(params), partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return time.perf_counter() - started


def _as_evaluated(prepared: PreparedRun) -> Pretrained:
    """Have a model's generation configuration name the beams and the length that it is evaluated with."""
    pretrained, data_args = prepared.pretrained, prepared.data_args
    if not (data_args.predict_with_generate and isinstance(pretrained.captioner, NativeCaptioner)):
        return pretrained
    config = copy.deepcopy(pretrained.captioner.generation_config)
    config.num_beams = data_args.num_beams or config.num_beams or 1
    # Besides the start token; a `max_length` of 20 would be taken for transformers' default.
    config.max_new_tokens = target_length(data_args, "validation") - 1
    captioner = dataclasses.replace(pretrained.captioner, generation_config=config)
    return dataclasses.replace(pretrained, captioner=captioner)
