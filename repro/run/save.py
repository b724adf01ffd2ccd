"""What a run saves while it trains: states to go on from, and models with their cards."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import jax

from repro.evaluation.evaluator import Evaluation
from repro.json_files import PARTIAL
from repro.models.pretrained import save_model
from repro.record.model_card import Trained, write_card
from repro.record.writer import RunWriter, log
from repro.run.prepare import PreparedRun
from repro.run.resume import what_stays
from repro.run.settings import FLAGS, Settings
from repro.run.step_log import StepLog
from repro.training.checkpoint import Checkpoints
from repro.training.processes import is_first
from repro.training.steps import TrainState


def save_state(
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


def how_to_go_on(states: Checkpoints, settings: Settings) -> str:
    """Say which state is saved, and which command goes on from it."""
    how, steps = "the same command" if settings.resume == "auto" else "--resume auto", states.steps()
    return f"the state of step {steps[-1]} is saved, {how} goes on from it." if steps else "no state is saved."


def save_whole_model(prepared: PreparedRun, params: Any, folder: Path, *, again: bool) -> float:
    """Write a model's folder whole or not at all; returns the seconds that this took.

    Args:
        again: also where it is there already.
    """
    if not is_first() or (folder.exists() and not again):
        return 0.0
    started = time.perf_counter()
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    save_model(prepared.pretrained, jax.device_get(params), partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    seconds = time.perf_counter() - started
    log.info("%s: saved in %.1f s", folder.name, seconds)
    return seconds


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
