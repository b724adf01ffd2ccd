"""The reference's own numbers, through `repro train`: see golden/README.md for the bounds and their reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from flax import serialization, traverse_util

from repro.__main__ import main
from repro.config import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from repro.run import run

SHORT = ("current_1dev", "current_8dev", "published_8dev", "current_block0")
LONG = ("current_1dev_long", "published_8dev_long")
PROTOCOLS = {"head": "current", "published": "published"}


def read_case(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def command_line(case: dict[str, Any], output_dir: Path) -> list[str]:
    inputs = GOLDEN / "inputs"
    return [
        *("--output_dir", str(output_dir), "--cache_dir", str(output_dir.parent / "cache")),
        *("--model_name_or_path", str(inputs / "model")),
        *("--train_file", str(inputs / "train.jsonl"), "--validation_file", str(inputs / "val.jsonl")),
        *("--test_file", str(inputs / "test.jsonl")),
        *("--image_column", "image_path", "--caption_column", "caption"),
        *("--protocol", PROTOCOLS[case["semantics"]], "--num_replicas", str(case["devices"])),
        *case["args"],
    ]


def read_steps(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def check_steps(folder: Path, case: dict[str, Any], *, first: int | None = None, tolerance: float) -> None:
    measured, expected = read_steps(folder), case["train_steps"]
    assert [row["step"] for row in measured] == [row["step"] for row in expected]
    for name, bound in (("loss", tolerance), ("learning_rate", 1e-7)):
        np.testing.assert_allclose(
            [row[name] for row in measured[:first]], [row[name] for row in expected[:first]], rtol=0, atol=bound
        )


def check_counts(folder: Path, case: dict[str, Any]) -> None:
    facts, counts = json.loads((folder / "run.json").read_text()), case["counts"]
    batch = case["counts"]["Total train batch size (w. parallel & distributed)"]
    assert facts["steps_per_epoch"] == counts["Optimization steps per epoch"]
    kept = facts["data"]["train"]["kept"]
    assert (kept - kept % batch) == counts["Num train examples"] or kept == counts["Num train examples"]
    assert facts["data"]["validation"]["kept"] == counts["Num evaluation examples"]
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    by_split = [sum(row["split"] == split for row in dropped) for split in facts["data"]]
    assert by_split == [split["dropped"] for split in facts["data"].values()]
    assert all(split["read"] == split["kept"] + split["dropped"] for split in facts["data"].values())


def check_evaluation(folder: Path, expected: dict[str, Any]) -> None:
    prefix = "eval" if "eval_results" in expected else "test"
    folder = folder / expected["dir"]
    results = json.loads((folder / f"{prefix}_results.json").read_text())
    assert set(results) == set(expected[f"{prefix}_results"])
    assert json.loads((folder / f"{prefix}_generation.json").read_text()) == expected[f"{prefix}_generation"]
    for name in (f"{prefix}_loss", f"{prefix}_gen_len"):
        assert results[name] == pytest.approx(expected[f"{prefix}_results"][name], abs=1e-4)
    for name, value in expected[f"{prefix}_rouge_exact_mean"].items():
        assert results[f"{prefix}_{name}"] == pytest.approx(value, abs=1e-4)


def check_parameters(folder: Path, expected: dict[str, Any]) -> None:
    params = serialization.msgpack_restore((folder / expected["dir"] / "flax_model.msgpack").read_bytes())
    norms = {
        path: float(np.linalg.norm(np.asarray(value, np.float64)))
        for path, value in traverse_util.flatten_dict(params, sep="/").items()
    }
    assert set(norms) == set(expected["param_l2_norms"])
    for path, norm in expected["param_l2_norms"].items():
        # Attention keys' biases have a zero gradient in exact arithmetic: theirs is rounding noise.
        assert norms[path] == pytest.approx(norm, rel=1e-3, abs=1e-6), path


@pytest.mark.parametrize("name", SHORT)
def test_short_runs_equal_the_reference_step_by_step_and_caption_by_caption(name: str, tmp_path: Path) -> None:
    case, folder = read_case(name), tmp_path / "run"
    assert main(["train", *command_line(case, folder)]) == 0
    check_counts(folder, case)
    check_steps(folder, case, tolerance=2e-5)
    for evaluation in case["evals"]:
        check_evaluation(folder, evaluation)
        if "param_l2_norms" in evaluation:
            check_parameters(folder, evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_long_runs_stay_with_the_reference_as_far_as_rounding_lets_them(name: str, tmp_path: Path) -> None:
    case, folder = read_case(name), tmp_path / "run"
    assert main(["train", *command_line(case, folder)]) == 0
    check_steps(folder, case, first=30, tolerance=1e-3)
    final = case["evals"][-1]
    results = json.loads((folder / final["dir"] / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(final["eval_results"]["eval_loss"], abs=0.03)
    rows = json.loads((folder / final["dir"] / "eval_generation.json").read_text())
    assert len({row["pred"] for row in rows}) > 1  # captions have come to differ by image


WAYS = {
    "1 device": (1, []),
    "2 devices": (2, []),
    "4 devices": (4, []),
    "2 x 4, cut by 4": (8, ["--mesh", "data=2,fsdp=4"]),
    "cut by 8": (8, ["--mesh", "fsdp=8"]),
    "4 at once": (1, ["--replicas_at_once", "4"]),
    "2 at once": (1, ["--replicas_at_once", "2", "--gradient_checkpointing"]),
    "1 at once": (1, ["--replicas_at_once", "1"]),
    "4 at once, 2 x 2, cut by 2": (4, ["--replicas_at_once", "4", "--mesh", "data=2,fsdp=2"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_eight_replicas_give_the_same_numbers_whatever_computes_them(way: str, tmp_path: Path) -> None:
    num_devices, more = WAYS[way]
    case, folder = read_case("published_8dev"), tmp_path / "run"
    arguments = parse_arguments(
        (ModelArguments, DataArguments, TrainingArguments), [*command_line(case, folder), *more], command="train"
    )
    result = run(*arguments, devices=jax.devices()[:num_devices], progress=False)
    assert len(result.facts["devices"]) == num_devices
    if "--replicas_at_once" in more:
        assert result.facts["replicas_at_once"] == int(more[1])
    check_steps(folder, case, tolerance=1e-5)
    for evaluation in case["evals"]:
        check_evaluation(folder, evaluation)
        check_parameters(folder, evaluation)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_today_s_protocol_does_not_depend_on_the_devices_either(num_devices: int, tmp_path: Path) -> None:
    case, folder = read_case("current_8dev"), tmp_path / "run"
    arguments = parse_arguments(
        (ModelArguments, DataArguments, TrainingArguments), command_line(case, folder), command="train"
    )
    run(*arguments, devices=jax.devices()[:num_devices], progress=False)
    check_steps(folder, case, tolerance=1e-5)
    for evaluation in case["evals"]:
        check_evaluation(folder, evaluation)
        check_parameters(folder, evaluation)
