"""Recipes: what one run of a small one leaves, how targets decide, where the pocket recipe's targets come from."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

import repro.reproduce
from repro.__main__ import main
from repro.recipes import read_recipe, recipe_names

MIN_SEEDS = 5


@pytest.fixture
def small_recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The pocket recipe with too little data to learn from."""
    recipe = read_recipe("pocket")
    recipe["data"] |= {"num_train": 24, "num_val": 7}
    recipe["flags"] |= {"num_train_epochs": 1, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 8}
    recipe["targets"] = [{"metric": "eval_loss", "low": 0.5, "high": 50.0, "source": "any loss"}]
    monkeypatch.setattr(repro.reproduce, "read_recipe", lambda name: recipe)
    return recipe


def test_reproduce_passes_or_fails_by_its_targets(
    small_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pocket"
    assert main(["reproduce", "--output_dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "PASS" in printed
    assert printed.count("shows:") == 6
    result = json.loads((folder / "result.json").read_text())
    assert result["targets"][0]["passed"] is True
    assert 0.0 <= result["measured"]["attribute_accuracy"] <= 1.0
    rows = json.loads(next(folder.glob("run/ckpt_*/eval_generation.json")).read_text())
    assert len(rows) == 7 * 5
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert facts["data"]["validation"] | {"fingerprint": ""} == {
        **{"read": 35, "kept": 35, "dropped": 0, "images": 7},
        "fingerprint": "",
    }

    small_recipe["targets"][0]["high"] = 0.6
    assert main(["reproduce", "--output_dir", str(folder)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_pocket_targets_come_from_the_seeds_that_it_lists() -> None:
    recipe = read_recipe("pocket")
    assert len({run["seed"] for run in recipe["seeds"]}) >= MIN_SEEDS
    for target in recipe["targets"]:
        values = [run[target["metric"]] for run in recipe["seeds"]]
        assert target["mean"] == pytest.approx(statistics.fmean(values), abs=1e-3)
        assert target["standard_deviation"] == pytest.approx(statistics.stdev(values), abs=1e-3)
        assert all(target["low"] <= value <= (target["high"] or value) for value in values)


def test_pocket_promises_that_nine_of_ten_attributes_are_true() -> None:
    lows = {target["metric"]: target["low"] for target in read_recipe("pocket")["targets"]}
    for metric in ("attribute_accuracy", "colour_accuracy", "shape_accuracy"):
        assert lows[metric] >= 0.9


def test_recipes_are_found() -> None:
    assert "pocket" in recipe_names()
