"""The fixed first steps: no seed chooses them, a run does not notice them, and faults of training show in them."""

import sys
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from repro.config import ARGUMENTS, parse_arguments
from repro.recipes.probe import first_steps
from repro.recipes.selftest import command_line, read_case
from repro.run.build import build_training
from repro.run.prepare import prepare
from repro.run.settings import Settings

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from planted_faults import FAULTS, planted

CASE = read_case("current_block0")
SHUFFLED = ("--num_train_epochs", "2", "--block_size", "96", "--overwrite_output_dir")


def run_of(folder, seed):
    line = [*command_line(CASE, folder / "run"), *SHUFFLED, "--seed", str(seed)]
    settings = Settings.of(*parse_arguments(ARGUMENTS, line, command="train"), num_devices=1)
    return prepare(settings, jax.devices()[:1], progress=False)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("probe"), seed=1)


@pytest.fixture(scope="module")
def training(prepared):
    return build_training(prepared)


@pytest.fixture(scope="module")
def expected(training):
    return first_steps(training)


def first_losses(training):
    state, losses = training.create(), []
    for _, batch, _ in islice(training.batches(0), 5):
        state, metrics = training.step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def test_no_seed_chooses_them_and_the_run_does_not_notice_them(training, expected, tmp_path):
    before = first_losses(training)
    assert first_steps(training) == expected
    assert first_losses(training) == before
    other = build_training(run_of(tmp_path, seed=2))
    assert first_steps(other) == expected
    assert first_losses(other) != before
    assert (expected["orders"], expected["idle"]) == (3, 0)


def differences(found, expected):
    """What is further off than a target of the recipe allows."""
    named = [("loss", 5e-4), ("grad_norm", 5e-3 * max(expected["grad_norm"].values()))]
    off = [n for n, most in named if any(abs(found[n][step] - value) > most for step, value in expected[n].items())]
    off += ["moved"] * (not np.isclose(found["moved"], expected["moved"], rtol=2e-3))
    return off + [name for name in ("idle", "orders") if found[name] != expected[name]]


QUICK = ("half the rate", "weight decay 0.01", "dropout off")
# This run does not clip, and of so few rows 2 % are four.
OTHERS = sorted(FAULTS.keys() - {*QUICK, "none", "no clipping", "2 % wrong pictures"})


@pytest.mark.parametrize("fault", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_faults_of_training_show_under_any_seed(prepared, expected, fault):
    with planted(FAULTS[fault]):
        found = first_steps(build_training(prepared))
    assert differences(found, expected)
