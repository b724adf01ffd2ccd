"""Recipes: what one run of a small one leaves, how targets decide, where the pocket recipe's targets come from."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import tiny_pocket
from test_documented_command import documented_command

import repro.recipes
import repro.recipes.preflight
import repro.recipes.reproduce
import repro.recipes.verify
from repro.__main__ import main
from repro.commands.reproduce import _seeds
from repro.config import flags_of, parse_arguments
from repro.errors import InputError
from repro.recipes import read_recipe, recipe_names
from repro.recipes.targets import Target, read_targets
from repro.recipes.verify import ARGUMENTS

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
verdict_rates = importlib.import_module("verdict_rates")

MIN_SEEDS = 5


def make_small() -> dict[str, Any]:
    """The pocket recipe with too little data to learn from, and a tiny model."""
    recipe = tiny_pocket()
    recipe["data"] |= {"num_train": 24, "num_val": 7}
    recipe["flags"] |= {"num_train_epochs": 1, "num_replicas": 2, "block_size": 0, "num_beams": 2}
    recipe["targets"] = [{"metric": "eval_loss", "low": 0.5, "high": 50.0, "source": "any loss"}]
    return recipe


@pytest.fixture
def small_recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `make_small` makes, in the place of every recipe."""
    recipe = make_small()
    for module in (repro.recipes.reproduce, repro.recipes.verify):
        monkeypatch.setattr(module, "read_recipe", lambda name: recipe)
    monkeypatch.setattr(repro.recipes, "read_recipe", lambda name: recipe)
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
    assert result["targets"][0]["verdict"] == "PASS"
    assert 0.0 <= result["metrics"]["eval_attribute_accuracy"] <= 1.0
    rows = json.loads(next(folder.glob("run/ckpt_*/eval_generation.json")).read_text())
    assert len(rows) == 7 * 5
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert facts["data"]["validation"] | {"fingerprint": ""} == {
        **{"read": 35, "kept": 35, "dropped": 0, "images": 7, "captions": 35, "captions_cut": 1, "max_length": 20},
        **{"fingerprint": "", "turned": 0},
    }

    small_recipe["targets"][0]["high"] = 0.6
    steps = (folder / "run" / "metrics.jsonl").read_bytes()
    assert main(["reproduce", "--output_dir", str(folder)]) == 1, "the run goes on from its end, and is judged anew"
    assert (folder / "run" / "metrics.jsonl").read_bytes() == steps
    assert "FAIL" in capsys.readouterr().out


def test_a_dry_run_projects_and_trains_nothing(
    small_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pocket"
    assert main(["reproduce", "--dry_run", "--output_dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "train: 120 rows of 24 images" in printed
    assert "for 7 steps and 1 evaluations" in printed
    assert re.search(r"evaluation: \d+\.\d GiB with \d+ at once, \d+ images/s", printed)
    assert not (folder / "run").exists()
    monkeypatch.setattr(repro.recipes.preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert main(["reproduce", "--dry_run", "--output_dir", str(folder)]) == 2
    assert "make room, name another --output_dir" in capsys.readouterr().out


def test_a_dry_run_is_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--dry_run", "--distributed", "--output_dir", str(tmp_path / "pocket")]) == 2
    assert "--dry_run: is of one process; drop --distributed" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(small_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("draft")
    assert main(["reproduce", "--output_dir", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_pocket_targets_come_from_the_seeds_that_it_lists() -> None:
    recipe = read_recipe("pocket")
    assert len({run["seed"] for run in recipe["seeds"]}) >= MIN_SEEDS
    for target in recipe["targets"]:
        if "margin" in target:
            values = [run[target["metric"]] for run in recipe["seeds"]]
            assert target["runs"] == len(values)
            assert target["value"] == pytest.approx(statistics.fmean(values), abs=1e-3)


def test_pockets_spread_is_that_of_all_seeds_that_were_run() -> None:
    targets = verdict_rates.statistical("pocket")
    covariance, freedom = verdict_rates.measured_spread([target.metric for target in targets])
    assert len(targets) == 7
    for target, variance in zip(targets, covariance.diagonal(), strict=True):
        assert target.standard_deviation == pytest.approx(variance**0.5, rel=0.01)
        assert target.freedom == freedom == 27


@pytest.mark.parametrize("margins", verdict_rates.MARGINS_OFF)
def test_the_rates_on_the_page_are_those_of_the_rules(margins: float) -> None:
    """With a tenth of its draws: each share within four standard errors, and a per cent for what is rounded."""
    page = (Path(__file__).parents[1] / "repro" / "recipes" / "README.md").read_text()  # not in the package
    corner = "| new \\ reference runs |"
    again = verdict_rates.pocket_table(verdict_rates.Pocket(2000, seed=7), margins).splitlines()[2:]
    shown = page.split(corner)[1 + verdict_rates.MARGINS_OFF.index(margins)].splitlines()[2 : 2 + len(again)]
    for line, other in zip(shown, again, strict=True):
        for cell, found in zip(line.split("|")[2:-1], other.split("|")[2:-1], strict=True):
            for share, drawn in zip(cell.split("/"), found.split("/"), strict=True):
                p = float(share) / 100
                assert abs(p - float(drawn) / 100) <= 4 * (max(p * (1 - p), 1e-3) / 2000) ** 0.5 + 0.01


def test_the_documented_workflow_passes_nine_of_ten_unchanged_programs_and_hardly_any_changed_one() -> None:
    pocket = verdict_rates.Pocket(4000, seed=5)
    same = verdict_rates.rates(pocket.verdicts(pocket.runs(12), pocket.runs(12)))
    assert same[0] >= 0.9
    for target in pocket.targets:
        shift = pocket.shift(1.0, target.metric)
        passes, fails, _ = verdict_rates.rates(pocket.verdicts(pocket.runs(12) + shift, pocket.runs(12)))
        assert passes <= 0.05 + 0.014, "four standard errors"
        assert fails <= 0.01 + 0.0063
    everywhere = np.sum([pocket.shift(5.0, target.metric) for target in pocket.targets], axis=0)
    for old in (2, 3, 8):
        assert verdict_rates.rates(pocket.verdicts(pocket.runs(1) + everywhere, pocket.runs(old)))[0] == 0.0


def test_pocket_promises_that_nine_of_ten_attributes_are_true() -> None:
    lows = {target["metric"]: target.get("low") for target in read_recipe("pocket")["targets"]}
    for metric in ("eval_attribute_accuracy", "eval_colour_accuracy", "eval_shape_accuracy"):
        assert lows[metric] >= 0.9


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_read_by_what_runs_and_judges_it(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe["name"] == name
    parse_arguments(ARGUMENTS, flags_of(recipe["flags"]), command="reproduce")
    assert all(target.source for target in read_targets(recipe["targets"]))
    assert all(set(row) <= set(Target.__dataclass_fields__) for row in recipe["targets"])


@pytest.mark.parametrize("name", ["coco2017", "coco2017-exact"])
def test_the_documented_run_is_the_documented_command(name: str) -> None:
    documented = parse_arguments(ARGUMENTS, documented_command()[1:], command="train")
    recipe = parse_arguments(ARGUMENTS, flags_of(read_recipe(name)["flags"]), command="train")
    different = {
        field.name
        for ours, theirs in zip(recipe, documented, strict=True)
        for field in dataclasses.fields(ours)
        if getattr(ours, field.name) != getattr(theirs, field.name)
    }
    elsewhere = {"output_dir", "data_dir", "dataset_name", "overwrite_output_dir", "push_to_hub"}
    unseen = {"preprocessing_num_workers", "num_replicas", "protocol", "caption_metrics"}
    assert different <= elsewhere | unseen


def test_the_documented_runs_own_numbers_are_its_targets() -> None:
    targets = {t.name: t for t in read_targets(read_recipe("coco2017")["targets"])}
    assert targets["eval_loss at 2000"].value == 2.0153
    assert targets["eval_rouge2 at 2000"].value == 14.64
    rates = targets["learning_rate"].values
    assert rates is not None
    assert rates["2000"] == pytest.approx(3e-5 * (1 - 1999 / 2307))
    published = targets["loss"].values
    assert published is not None
    assert len(published) == 12


def test_several_seeds_are_one_command_that_goes_on_and_one_verdict(
    small_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "--output_dir", str(tmp_path / "pocket"), "--seeds", "3-4"]
    assert main(command) == 0
    assert "PASS: 2 runs of pocket" in capsys.readouterr().out
    runs = [tmp_path / "pocket" / f"seed-{seed}" / "run" for seed in (3, 4)]
    assert [json.loads((run / "run.json").read_text())["flags"]["seed"] for run in runs] == [3, 4]
    assert (tmp_path / "pocket" / "report.html").is_file()
    assert not [path for path in tmp_path.rglob("data") if path.parent != tmp_path / "pocket"], "rendered once"
    (last,) = runs[1].glob("ckpt_*")
    generation = json.loads((last / "generation_config.json").read_text())
    assert (generation["num_beams"], generation["max_new_tokens"]) == (2, 19), "as the recipe evaluates"
    rows = [(run / "metrics.jsonl").read_bytes() for run in runs]
    assert main(command) == 0, "given again, it goes on from the end of each"
    assert [(run / "metrics.jsonl").read_bytes() for run in runs] == rows
    page = (tmp_path / "pocket" / "report.html").read_text()
    (tmp_path / "pocket" / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "pocket")]) == 0
    assert (tmp_path / "pocket" / "report.html").read_text() == page
    for how in ([], ["--json", str(tmp_path / "again.json")]):
        assert main(["verify", str(tmp_path / "pocket"), *how]) == 0
        assert "PASS: 2 runs of pocket" in capsys.readouterr().out
    told, again = (json.loads(path.read_text()) for path in (tmp_path / "pocket/result.json", tmp_path / "again.json"))
    assert again["targets"] == told["targets"], "their number was named, here too"
    assert "each look at so many runs" not in page
    picture = next((tmp_path / "pocket").rglob("val2017/*.jpg"))
    assert main(["caption", str(runs[1].parent), str(picture)]) == 0
    assert "the newest of 1 checkpoint" in capsys.readouterr().err
    assert main(["export", "--model_name_or_path", str(last), "--output_dir", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "README.md").read_bytes() == (last / "README.md").read_bytes()


@pytest.mark.parametrize("seeds", ["", "x", "1", "1-", "3-1", "1,1", "1-100000000"])
def test_seeds_are_named_once_each(seeds: str) -> None:
    with pytest.raises(InputError, match="--seeds"):
        _seeds(seeds, {})
