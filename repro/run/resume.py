"""What a run saves while it trains, and where it starts: anew, or after a state of itself or of another run."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from repro.config import FLAGS, TrainingArguments
from repro.data.atomic import check_writable
from repro.errors import InputError
from repro.evaluation.evaluator import Evaluation
from repro.json_files import PARTIAL
from repro.models.captioner import NativeCaptioner
from repro.models.pretrained import Pretrained, save_model
from repro.record.model_card import Trained, write_card
from repro.record.record import FACTS, ROWS, Recorded, read_clock, read_record
from repro.record.writer import STATE, check_output_dir, holds_only_run_files, locked, log, models_in
from repro.run.prepare import PreparedRun, num_beams
from repro.run.settings import Settings
from repro.run.step_log import StepLog
from repro.training.checkpoint import CORRUPT, RECORD, STEP, Checkpoints, Found, find_newest, whole_states
from repro.training.processes import decided_by_first, is_first
from repro.training.steps import TrainState


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training starts; `parts` says when, where and with what the earlier parts of the run were computed."""

    found: Found | None  # the state that it goes on from; None to start anew
    recorded: Recorded  # steps and evaluations up to there
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    branches_off: bool = False  # from another run than the one in the output folder
    seconds: float = 0.0  # that these took, with what was lost when one was killed

    @property
    def step(self) -> int:
        return self.found.step if self.found else 0

    def announce(self) -> None:
        """Say where the run goes on, in its own log."""
        if self.found:
            for step in self.found.corrupt:
                log.warning("the state of step %d is corrupt: set aside as %d%s", step, step, CORRUPT)
            log.info("goes on after step %d of %s", self.step, self.found.folder)


ANEW = Start(None, Recorded([]))


def enter_folders(stack: ExitStack, settings: Settings) -> Start:
    """Lock a run's folder until the stack ends, and that of another that it goes on from; decide where it starts.

    Raises:
        InputError: in all processes; a folder cannot be written or is in use, or see `choose_start`.
    """
    folder = settings.folder

    def enter() -> dict[str, Any]:
        stack.enter_context(locked(folder))
        check_writable(settings.cache, "--cache_dir")
        source = folder if settings.resume in ("never", "auto") else _named(Path(settings.resume))[0]
        # What cannot be written, nobody of this run's rights can change.
        if source.is_dir() and not _same(source, folder) and os.access(source, os.W_OK):
            stack.enter_context(locked(source, "--resume"))
        return dataclasses.asdict(choose_start(settings, folder))

    chosen = decided_by_first(enter)
    found = Found(**chosen["found"]) if chosen["found"] else None
    return Start(**{**chosen, "found": found, "recorded": Recorded(**chosen["recorded"])})


def choose_start(args: TrainingArguments, folder: Path) -> Start:
    """Do what `--resume` says; looks only, changes nothing.

    Raises:
        InputError: the folder holds something that this run may not go on with or replace, or there is no such state.
    """
    if args.resume == "never":
        check_output_dir(folder, overwrite=args.overwrite_output_dir)
        return ANEW
    if args.resume == "auto":
        found = find_newest(folder / STATE)
        if found is None:
            later = [*models_in(folder), *whole_states(folder / STATE)]  # which the first state precedes
            if later or "finished" in read_record(folder).facts or not holds_only_run_files(folder):
                raise InputError(
                    f"--resume auto: {folder} holds no state that can be used, but other files; name another"
                    " --output_dir, or start anew in it with --overwrite_output_dir instead of --resume."
                )
            return dataclasses.replace(ANEW, seconds=read_clock(folder))
        return _after(found, folder, folder)
    source, step = _named(Path(args.resume))
    if _same(source, folder):
        source = folder
    found = find_newest(source / STATE, step=step)
    if found is None:
        raise InputError(
            f"--resume {args.resume}: holds no state that can be used; give auto, never, the folder of a run, or of one"
            f" of its states ({STATE}/STEP)."
        )
    start = _after(found, source, folder)
    if source.resolve() in folder.resolve().parents:
        raise InputError(f"--output_dir {folder}: lies in the run that --resume names, {source}; name another folder.")
    if start.branches_off:
        check_output_dir(folder, overwrite=args.overwrite_output_dir)
    return start


def _named(path: Path) -> tuple[Path, int | None]:
    """The folder of the run that a path names, and the step if it is a state's."""
    path = path.absolute()
    step = int(path.name) if STEP.fullmatch(path.name) and (path / RECORD).is_dir() else None
    if step is None and (path.name != STATE or (path / STATE).is_dir()):
        return path, None
    states = path if step is None else path.parent
    # A link may lead from a run to states on another disk, or from elsewhere to the states of a run.
    return (states.parent if (states.parent / ROWS).exists() else states.resolve().parent), step


def _same(source: Path, folder: Path) -> bool:
    """Tell whether two folders are one, or have their states in one."""
    pairs = ((source, folder), (source / STATE, folder / STATE))
    return any(one.is_dir() and other.is_dir() and one.samefile(other) for one, other in pairs)


def _after(found: Found, source: Path, folder: Path) -> Start:
    record, branches_off = read_record(source), source != folder
    recorded = record.recorded.up_to(found.step)
    if missing := set(range(1, found.step + 1)) - {row["step"] for row in recorded.steps}:
        raise InputError(
            f"{source / ROWS}: step {min(missing)} is missing or damaged in it, and the state is of step"
            f" {found.step}; put a whole copy there, or resume from an earlier state ({STATE}/STEP)."
        )
    if (source / FACTS).exists() and not record.facts:
        raise InputError(f"{source / FACTS}: is damaged; take it away, and the run goes on without what it told.")
    seconds = found.record.get("seconds", 0.0) if branches_off else read_clock(folder)
    if branches_off:  # the model of this step stays behind, so it is saved and evaluated once more
        recorded = Recorded([row for row in recorded.rows if "loss" in row or row["step"] < found.step])
    return Start(found, recorded, record.facts.get("parts", []), branches_off, seconds)


def what_stays(prepared: PreparedRun) -> dict[str, Any]:
    """Collect what the numbers of a run depend on: what may not change when it is resumed; as JSON has it."""
    settings = prepared.settings
    stays = {
        "flags": {name: value for name, value in settings.flags.items() if not FLAGS[name].metadata.get("may_change")},
        "protocol": dataclasses.asdict(settings.rules),
        "num_replicas": settings.replicas,
        "num_steps": settings.num_steps,
        "shuffle": settings.shuffle,
        "model": prepared.facts["model"]["fingerprint"],
        "data": {
            split: {name: counts[name] for name in ("kept", "fingerprint")}
            for split, counts in prepared.facts["data"].items()
        },
    }
    return json.loads(json.dumps(stays))


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run would go on as it began; an InputError names every setting that differs, with both values."""
    if different := list(_differences(saved, now)):
        listed = "\n  ".join(["--resume: the state belongs to a run that computes something else:", *different])
        raise InputError(f"{listed}\nUse the earlier values, or start anew in another --output_dir.")


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*saved, *now}):
        before, after = saved.get(name, "absent"), now.get(name, "absent")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, "--" if name == "flags" else f"{prefix}{name} ")
        elif before != after and not (prefix in ("data ", "protocol ") and "absent" in (before, after)):
            yield f"{prefix}{name}: {before} then, {after} now"


def save_state(states: Checkpoints, state: TrainState, step: int, steps: StepLog, prepared: PreparedRun) -> None:
    """Save a state to go on from, once it is known to be finite and everything before it is written."""
    settings = prepared.settings
    if settings.save_steps == 0 or step in states.steps():
        return
    steps.flush()
    steps.writer.sync()
    record = {
        "step": step,
        "training_seconds": steps.training_seconds,
        "waiting_for_input_seconds": steps.waited,
        "seconds": round(steps.writer.seconds(), 3),
        "settings": what_stays(prepared),
    }
    states.save(state, step, record)


def how_to_go_on(states: Checkpoints, settings: Settings) -> str:
    """Say which state is saved, and which command goes on from it."""
    how, steps = "the same command" if settings.resume == "auto" else "--resume auto", states.steps()
    return f"the state of step {steps[-1]} is saved, {how} goes on from it." if steps else "no state is saved."


def save_whole_model(prepared: PreparedRun, params: Any, folder: Path, *, again: bool) -> float:
    """Write a model's folder whole or not at all, or again where it is there; returns the seconds that this took."""
    if not is_first() or (folder.exists() and not again):
        return 0.0
    started = time.perf_counter()
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    save_model(_as_evaluated(prepared), jax.device_get(params), partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    seconds = time.perf_counter() - started
    log.info("%s: saved in %.1f s", folder.name, seconds)
    return seconds


def _as_evaluated(prepared: PreparedRun) -> Pretrained:
    """Have a model's generation configuration name the beams and the length that it is evaluated with."""
    pretrained, settings = prepared.pretrained, prepared.settings
    if not (settings.predict_with_generate and isinstance(pretrained.captioner, NativeCaptioner)):
        return pretrained
    config = copy.deepcopy(pretrained.captioner.generation_config)
    config.num_beams = num_beams(settings, pretrained)
    # Besides the start token; a `max_length` of 20 would be taken for transformers' default.
    config.max_new_tokens = settings.max_length("validation") - 1
    captioner = dataclasses.replace(pretrained.captioner, generation_config=config)
    return dataclasses.replace(pretrained, captioner=captioner)


def describe_model(prepared: PreparedRun, step: int, evaluation: Evaluation | None, folder: Path) -> None:
    """Write a saved model's card."""
    if not is_first():
        return
    devices, flags = list(prepared.mesh.devices.flat), what_stays(prepared)["flags"]
    trained = Trained(
        epoch=prepared.settings.epoch_of(step),
        step=step,
        facts=prepared.facts,
        flags={name: value for name, value in flags.items() if value != FLAGS[name].default},
        device=f"{len(devices)} x {devices[0].device_kind}",
        evaluation=evaluation,
    )
    write_card(folder, trained)
