"""Evaluation in turns of whole device batches: the same numbers, as many as fit, and the dry run knows how many."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from test_golden import command_line, read_case

import repro.recipes.preflight
import repro.run.build
from repro.config import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from repro.evaluation.evaluator import Evaluation
from repro.protocol import PROTOCOLS
from repro.recipes.preflight import dry_run
from repro.run.build import build_evaluator
from repro.run.prepare import PreparedRun, prepare
from repro.run.settings import Settings
from repro.run.train import run
from repro.training.memory import SHARE
from repro.training.sharding import put, replicated

CASE = read_case("published_8dev")


def arguments(folder: Path, **flags: Any) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    model_args, data_args, args = parse_arguments(
        (ModelArguments, DataArguments, TrainingArguments), command_line(CASE, folder), command="train"
    )
    return model_args, data_args, dataclasses.replace(args, **flags)


def evaluate(prepared: PreparedRun, at_once: int) -> Evaluation:
    settings = dataclasses.replace(prepared.settings, replicas_at_once=at_once)
    evaluator = build_evaluator(dataclasses.replace(prepared, settings=settings))
    assert evaluator.programs().num_rows == at_once * settings.per_device_eval_batch_size
    return evaluator.evaluate(put(prepared.pretrained.params, replicated(prepared.mesh)), prepared.splits["validation"])


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_captions_losses_and_metrics_do_not_depend_on_the_number_of_turns(protocol, tmp_path):
    flags = arguments(tmp_path / "run", protocol=protocol.name, do_train=False, do_predict=False)
    prepared = prepare(Settings.of(*flags, num_devices=1), jax.devices()[:1], progress=False)
    assert prepared.settings.replicas == 8
    whole, *others = (evaluate(prepared, at_once) for at_once in (8, 4, 2, 1))
    for other in others:
        assert other.generations == whole.generations
        # XLA:CPU multiplies batches of another size in another order: the loss may differ in the last bits.
        assert other.metrics.pop("loss") == pytest.approx(whole.metrics["loss"], rel=1e-6)
        assert other.metrics == {name: value for name, value in whole.metrics.items() if name != "loss"}
        assert other.details == whole.details


@pytest.mark.slow
def test_the_dry_run_measures_the_turns_that_the_run_takes(tmp_path, monkeypatch):
    flags = arguments(tmp_path / "run", num_replicas=16, per_device_eval_batch_size=1, per_device_train_batch_size=1)
    roomy = dry_run(*flags).facts
    assert roomy["evaluation_rows_at_once"] == 16
    # Room for the state and half of that.
    room = roomy["state_bytes"] + roomy["evaluation_bytes"] - 1
    monkeypatch.setattr(repro.run.build, "device_bytes", lambda _: room / SHARE)
    found = dry_run(*flags)
    assert found.facts["evaluation_rows_at_once"] == 8
    assert found.facts["evaluation_bytes"] < roomy["evaluation_bytes"]
    assert "with 8 at once" in found.text
    result = run(*flags, progress=False)
    assert "8 of 16 device batches are evaluated at once" in (result.folder / "log").read_text()


def test_what_does_not_fit_even_so_is_told_by_the_dry_run(tmp_path, monkeypatch):
    monkeypatch.setattr(repro.recipes.preflight, "device_bytes", lambda _: 1000)
    problems = dry_run(*arguments(tmp_path / "run")).problems
    assert any("evaluating 16 rows beside the state" in problem for problem in problems), problems
