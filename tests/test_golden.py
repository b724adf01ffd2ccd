"""The reference's own numbers, through `repro train`: `recipes/golden/README.md` has the bounds and their reason."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest

from repro.__main__ import main
from repro.config import ARGUMENTS, parse_arguments
from repro.recipes.selftest import CASES, Bounds, CaseResult, command_line, compare, read_case, run_case
from repro.run.train import run

LONG_CASES = ("current_1dev_long", "published_8dev_long")
ON_A_CPU = Bounds(noise=1e-6)
ANY_LAYOUT = Bounds(loss=1e-5, noise=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_short_runs_equal_the_reference_step_by_step_and_caption_by_caption(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(["train", *command_line(read_case(name), folder)]) == 0
    result = compare(folder, name, ON_A_CPU)
    assert result.passed, result
    assert result.steps == len(read_case(name)["train_steps"]) > 0
    assert result.captions_equal == result.captions >= 48
    facts = json.loads((folder / "run.json").read_text())
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    by_split = [sum(row["split"] == split for row in dropped) for split in facts["data"]]
    assert by_split == [split["dropped"] for split in facts["data"].values()]
    assert all(split["read"] == split["kept"] + split["dropped"] for split in facts["data"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_CASES)
def test_long_runs_stay_with_the_reference_as_far_as_rounding_lets_them(name: str, tmp_path: Path) -> None:
    folder, case = tmp_path / "run", read_case(name)
    run_case(name, folder)
    result = compare(folder, name, Bounds(loss=1e-3))
    assert not result.counts
    assert (result.first_difference or math.inf) > 30
    last = case["evals"][-1]
    # Training has drifted as far as it will by then.
    loss = json.loads((folder / last["dir"] / "eval_results.json").read_text())["eval_loss"]
    assert loss == pytest.approx(last["eval_results"]["eval_loss"], abs=0.03)
    rows = json.loads((folder / last["dir"] / "eval_generation.json").read_text())
    assert len({row["pred"] for row in rows}) > 1  # captions have come to differ by image


WAYS = {
    "1 device": (1, []),
    "2 at once": (1, ["--replicas_at_once", "2", "--gradient_checkpointing"]),
    "4 at once, 2 x 2, cut by 2": (4, ["--replicas_at_once", "4", "--mesh", "data=2,fsdp=2"]),
}
MORE_WAYS = {
    "2 devices": (2, []),
    "4 devices": (4, []),
    "2 x 4, cut by 4": (8, ["--mesh", "data=2,fsdp=4"]),
    "cut by 8": (8, ["--mesh", "fsdp=8"]),
    "4 at once": (1, ["--replicas_at_once", "4"]),
    "1 at once": (1, ["--replicas_at_once", "1"]),
}


def run_on(num_devices: int, name: str, folder: Path, *flags: str) -> CaseResult:
    arguments = parse_arguments(ARGUMENTS, [*command_line(read_case(name), folder), *flags], command="train")
    run(*arguments, devices=jax.devices()[:num_devices], progress=False)
    return compare(folder, name, ANY_LAYOUT)


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in MORE_WAYS)])
def test_eight_replicas_give_the_same_numbers_whatever_computes_them(way: str, tmp_path: Path) -> None:
    num_devices, flags = (WAYS | MORE_WAYS)[way]
    folder = tmp_path / "run"
    result = run_on(num_devices, "published_8dev", folder, *flags)
    assert result.passed, result
    facts = json.loads((folder / "run.json").read_text())
    assert len(facts["devices"]) == num_devices
    if "--replicas_at_once" in flags:
        assert facts["replicas_at_once"] == int(flags[1])


@pytest.mark.parametrize("num_devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_today_s_protocol_does_not_depend_on_the_devices_either(num_devices: int, tmp_path: Path) -> None:
    result = run_on(num_devices, "current_8dev", tmp_path / "run")
    assert result.passed, result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a case, whose files the tests below change."""
    folder = tmp_path_factory.mktemp("case") / "run"
    run_case("current_block0", folder)
    return folder


def judge(folder: Path, file: str, change) -> CaseResult:
    """What is said of a run when one file of it is other than it was; the file is put back."""
    path = folder / file
    before = path.read_text()
    path.write_text(change(before))
    try:
        return compare(folder, "current_block0")
    finally:
        path.write_text(before)


def each_row(change):
    def edit(text: str) -> str:
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            change(row)
        return "".join(json.dumps(row) + "\n" for row in rows)

    return edit


def test_whatever_differs_from_the_record_fails(finished: Path) -> None:
    assert judge(finished, "metrics.jsonl", lambda text: text).passed

    def shift(kind: str, by: float, step: int):
        def change(row: dict[str, float]) -> None:
            if kind in row and row["step"] >= step:
                row[kind] += by

        return each_row(change)

    for kind, by in (("loss", 3e-5), ("loss", float("nan")), ("learning_rate", 2e-7)):
        result = judge(finished, "metrics.jsonl", shift(kind, by, step=5))
        assert (result.passed, result.first_difference) == (False, 5)

    def worse(name: str):
        def change(row: dict[str, dict[str, float]]) -> None:
            if "eval" in row:
                row["eval"][name] += 2e-4

        return each_row(change)

    for name in ("loss", "gen_len", "rouge2"):
        assert not judge(finished, "metrics.jsonl", worse(name)).passed
    shorter = judge(finished, "metrics.jsonl", lambda text: "\n".join(text.splitlines()[:7] + text.splitlines()[8:]))
    assert not shorter.passed
    assert any(count.startswith("steps: ") for count in shorter.counts)
    other = judge(
        finished, "ckpt_epoch_2_step_16/eval_generation.json", lambda text: text.replace('"pred": "', '"pred": "x', 1)
    )
    assert (other.passed, other.captions - other.captions_equal) == (False, 1)
    fewer = judge(finished, "run.json", lambda text: text.replace('"kept": ', '"kept": 1'))
    assert not fewer.passed


def test_a_verdict_asks_for_every_bound(finished: Path) -> None:
    near = compare(finished, "current_block0")
    assert near.passed
    for field in dataclasses.fields(Bounds):
        if field.name in ("loss", "norm", "noise", "evaluation"):
            measured = {"evaluation": max(near.evaluation, near.rouge)}.get(field.name, getattr(near, field.name))
            tight = dataclasses.replace(Bounds(), **{field.name: measured / 2})
            assert measured == 0 or not compare(finished, "current_block0", tight).passed, field.name
