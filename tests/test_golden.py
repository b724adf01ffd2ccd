"""The reference's own numbers, through `repro train`: `recipes/golden/README.md` has the bounds and their reason."""

import dataclasses
import json
import math
from functools import cache

import jax
import pytest

from repro.__main__ import main
from repro.config import ARGUMENTS, parse_arguments
from repro.recipes.selftest import CASES, Bounds, command_line, compare_with_golden, read_case, run_case
from repro.run.train import run

ON_A_CPU = Bounds(noise=1e-6)
ANY_LAYOUT = Bounds(loss=1e-5, noise=1e-6)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Runs a case once, for all tests that look at it."""

    @cache
    def folder_of(name):
        folder = tmp_path_factory.mktemp(name) / "run"
        assert main(["train", *command_line(read_case(name), folder)]) == 0
        return folder

    return folder_of


@pytest.mark.parametrize("name", CASES)
def test_short_runs_equal_the_reference_step_by_step_and_caption_by_caption(name, folder_of):
    folder = folder_of(name)
    result = compare_with_golden(folder, name, ON_A_CPU)
    assert result.passed, result
    assert result.steps == len(read_case(name)["train_steps"]) > 0
    assert result.captions_equal == result.captions >= 48
    data = json.loads((folder / "run.json").read_text())["data"]
    dropped = [json.loads(line)["split"] for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert {name: dropped.count(name) for name in data} == {name: split["dropped"] for name, split in data.items()}
    assert all(split["read"] == split["kept"] + split["dropped"] for split in data.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["current_1dev_long", "published_8dev_long"])
def test_long_runs_stay_with_the_reference_as_far_as_rounding_lets_them(name, tmp_path):
    folder, case = tmp_path / "run", read_case(name)
    run_case(name, folder)
    result = compare_with_golden(folder, name, Bounds(loss=1e-3))
    assert not result.counts
    assert (result.first_difference or math.inf) > 30
    last = case["evals"][-1]
    # Training has drifted as far as it will by then.
    loss = json.loads((folder / last["dir"] / "eval_results.json").read_text())["eval_loss"]
    assert loss == pytest.approx(last["eval_results"]["eval_loss"], abs=0.03)
    rows = json.loads((folder / last["dir"] / "eval_generation.json").read_text())
    assert len({row["pred"] for row in rows}) > 1  # captions have come to differ by image


# On all eight devices the short runs are computed.
WAYS = [("current_8dev", 1, ""), ("published_8dev", 1, "--replicas_at_once 2 --gradient_checkpointing")]
WAYS += [("published_8dev", 1, ""), ("published_8dev", 4, "--replicas_at_once 4 --mesh data=2,fsdp=2")]
MORE_WAYS = [("current_8dev", 4, ""), *(("published_8dev", devices, "") for devices in (2, 4))]
MORE_WAYS += [("published_8dev", 8, f"--mesh {mesh}") for mesh in ("data=2,fsdp=4", "fsdp=8")]
MORE_WAYS += [("published_8dev", 1, f"--replicas_at_once {number}") for number in (4, 1)]


@pytest.mark.parametrize(
    ("name", "num_devices", "flags"), [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in MORE_WAYS)]
)
def test_eight_replicas_give_the_same_numbers_whatever_computes_them(name, num_devices, flags, tmp_path):
    folder = tmp_path / "run"
    arguments = parse_arguments(ARGUMENTS, [*command_line(read_case(name), folder), *flags.split()], command="train")
    run(*arguments, devices=jax.devices()[:num_devices], progress=False)
    result = compare_with_golden(folder, name, ANY_LAYOUT)
    assert result.passed, result
    facts = json.loads((folder / "run.json").read_text())
    assert len(facts["devices"]) == num_devices
    assert facts["replicas_at_once"] == (int(flags.split()[1]) if "at_once" in flags else 8)


FINISHED = "current_block0"


@pytest.fixture
def finished(folder_of):
    """A finished run, whose files the tests below change."""
    return folder_of(FINISHED)


def judge(folder, file, change):
    """What is said of a run when one file of it is other than it was; the file is put back."""
    path = folder / file
    before = path.read_text()
    path.write_text(change(before))
    try:
        return compare_with_golden(folder, FINISHED)
    finally:
        path.write_text(before)


def shift(kind, by, *, step=1, evaluated=False):
    """Add to what steps, or evaluations, have measured from a step on."""

    def edit(text):
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            measured = row.get("eval", {}) if evaluated else row
            if kind in measured and row["step"] >= step:
                measured[kind] += by
        return "".join(json.dumps(row) + "\n" for row in rows)

    return edit


def test_whatever_differs_from_the_record_fails(finished):
    assert judge(finished, "metrics.jsonl", str).passed
    for kind, by in (("loss", 3e-5), ("loss", float("nan")), ("learning_rate", 2e-7)):
        result = judge(finished, "metrics.jsonl", shift(kind, by, step=5))
        assert (result.passed, result.first_difference) == (False, 5)
    for kind in ("loss", "gen_len", "rouge2"):
        assert not judge(finished, "metrics.jsonl", shift(kind, 2e-4, evaluated=True)).passed
    shorter = judge(finished, "metrics.jsonl", lambda text: "\n".join(text.splitlines()[:7] + text.splitlines()[8:]))
    assert not shorter.passed
    assert any(count.startswith("steps: ") for count in shorter.counts)
    file = "ckpt_epoch_2_step_16/eval_generation.json"
    other = judge(finished, file, lambda text: text.replace('"pred": "', '"pred": "x', 1))
    assert (other.passed, other.captions - other.captions_equal) == (False, 1)
    assert not judge(finished, "run.json", lambda text: text.replace('"kept": ', '"kept": 1')).passed


def test_a_verdict_asks_for_every_bound(finished):
    near = compare_with_golden(finished, FINISHED)
    assert near.passed
    for name in ("loss", "norm", "noise", "evaluation"):
        measured = max(near.evaluation, near.rouge) if name == "evaluation" else getattr(near, name)
        tight = dataclasses.replace(Bounds(), **{name: measured / 2})
        assert measured == 0 or not compare_with_golden(finished, FINISHED, tight).passed, name
