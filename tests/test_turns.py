"""Evaluation in turns of whole device batches: the same numbers, as many as fit, and the dry run knows how many."""

import dataclasses
import logging

import jax
import pytest

import repro.run.build
from repro.config import ARGUMENTS, parse_arguments
from repro.recipes.preflight import dry_run
from repro.recipes.selftest import command_line, read_case
from repro.run.build import build_evaluator
from repro.run.prepare import prepare
from repro.run.settings import Settings
from repro.run.train import run
from repro.training.memory import SHARE
from repro.training.sharding import put, replicated

CASE = read_case("published_8dev")


def arguments(folder, **flags):
    *others, args = parse_arguments(ARGUMENTS, command_line(CASE, folder), command="train")
    return *others, dataclasses.replace(args, **flags)


def evaluate(prepared, at_once):
    settings = dataclasses.replace(prepared.settings, replicas_at_once=at_once)
    evaluator = build_evaluator(dataclasses.replace(prepared, settings=settings))
    assert evaluator.programs().num_rows == at_once * settings.per_device_eval_batch_size
    return evaluator.evaluate(put(prepared.pretrained.params, replicated(prepared.mesh)), prepared.splits["validation"])


def test_captions_losses_and_metrics_do_not_depend_on_the_number_of_turns(tmp_path):
    # By the protocol that captions each image once; test_golden.py has another one, in turns.
    flags = arguments(tmp_path / "run", protocol="exact", do_train=False, do_predict=False)
    prepared = prepare(Settings.of(*flags, num_devices=1), jax.devices()[:1], progress=False)
    assert prepared.settings.replicas == 8
    whole, turns = evaluate(prepared, 8), evaluate(prepared, 2)
    assert turns.generations == whole.generations
    # XLA:CPU multiplies batches of another size in another order: the loss may differ in the last bits.
    assert turns.metrics.pop("loss") == pytest.approx(whole.metrics.pop("loss"), rel=1e-6)
    assert turns.metrics == whole.metrics
    assert turns.details == whole.details


@pytest.mark.slow
def test_the_dry_run_measures_the_turns_that_the_run_takes(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "repro")
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
