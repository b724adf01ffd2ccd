"""Recipes: what one run of a small one leaves, how targets decide, where the pocket recipe's targets come from."""

import importlib
import json
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

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


def make_small():
    """The pocket recipe with too little data to learn from, and a tiny model."""
    recipe = tiny_pocket()
    recipe["data"] |= {"num_train": 24, "num_val": 7}
    recipe["flags"] |= {"num_train_epochs": 1, "num_replicas": 2, "block_size": 0, "num_beams": 2}
    recipe["flags"]["attention_pictures"] = 0
    recipe["targets"] = [{"metric": "eval_loss", "low": 0.5, "high": 50.0, "source": "any loss"}]
    return recipe


@pytest.fixture
def small_recipe(monkeypatch):
    """What `make_small` makes, in the place of every recipe."""
    recipe = make_small()
    for module in (repro.recipes, repro.recipes.reproduce, repro.recipes.verify):
        monkeypatch.setattr(module, "read_recipe", lambda name: recipe)
    return recipe


def test_reproduce_passes_or_fails_by_its_targets(small_recipe, tmp_path, capsys):
    folder = tmp_path / "pocket"
    assert main(["reproduce", "--output_dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "PASS" in printed
    assert printed.count("shows:") == 6
    result = json.loads((folder / "result.json").read_text())
    assert result["targets"][0]["verdict"] == "PASS"
    assert 0.0 <= result["metrics"]["eval_attribute_accuracy"] <= 1.0
    assert len(json.loads(next(folder.glob("run/ckpt_*/eval_generation.json")).read_text())) == 7 * 5
    found = json.loads((folder / "run" / "run.json").read_text())["data"]["validation"]
    assert found | {"fingerprint": ""} == {
        **{"read": 35, "kept": 35, "dropped": 0, "images": 7, "captions": 35, "captions_cut": 1, "max_length": 20},
        **{"fingerprint": "", "turned": 0},
    }
    small_recipe["targets"][0]["high"] = 0.6
    steps = (folder / "run" / "metrics.jsonl").read_bytes()
    assert main(["reproduce", "--output_dir", str(folder)]) == 1, "the run goes on from its end, and is judged anew"
    assert (folder / "run" / "metrics.jsonl").read_bytes() == steps
    assert "FAIL" in capsys.readouterr().out


def test_a_dry_run_projects_and_trains_nothing(small_recipe, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "pocket"
    monkeypatch.setattr(repro.recipes.preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(repro.recipes.preflight, "device_bytes", lambda _: 1000)
    assert main(["reproduce", "--dry_run", "--output_dir", str(folder)]) == 2
    printed = capsys.readouterr().out
    assert "train: 120 rows of 24 images" in printed
    assert "for 7 steps and 1 evaluations" in printed
    assert re.search(r"evaluation: \d+\.\d GiB with \d+ at once, \d+ images/s", printed)
    assert "make room, name another --output_dir" in printed
    assert re.search(r"problem: evaluating \d+ rows beside the state takes", printed)
    assert not (folder / "run").exists()


def test_what_cannot_be_reproduced_there_is_refused_and_leaves_the_folder_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("draft")
    for flags, message in (
        (["--dry_run", "--distributed"], "--dry_run: is of one process; drop --distributed"),
        ([], "holds something else; name a new or an empty folder"),
    ):
        assert main(["reproduce", *flags, "--output_dir", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_pocket_targets_come_from_the_seeds_that_it_lists_and_nine_of_ten_attributes_are_to_be_true():
    recipe, lows = read_recipe("pocket"), {}
    assert len({run["seed"] for run in recipe["seeds"]}) >= 5
    for target in recipe["targets"]:
        lows[target["metric"]] = target.get("low")
        if "margin" in target:
            values = [run[target["metric"]] for run in recipe["seeds"]]
            assert target["runs"] == len(values)
            assert target["value"] == pytest.approx(statistics.fmean(values), abs=1e-3)
    assert all(lows[f"eval_{what}_accuracy"] >= 0.9 for what in ("attribute", "colour", "shape"))


def test_pockets_spread_is_that_of_all_seeds_that_were_run():
    targets = verdict_rates.statistical("pocket")
    covariance, freedom = verdict_rates.measured_spread([target.metric for target in targets])
    assert [target.freedom for target in targets] == [freedom] * 7 == [27] * 7
    assert [target.standard_deviation for target in targets] == pytest.approx(covariance.diagonal() ** 0.5, rel=0.01)


@pytest.mark.parametrize("margins", verdict_rates.MARGINS_OFF)
def test_the_rates_on_the_page_are_those_of_the_rules(margins):
    # With a tenth of its draws: each share within four standard errors, and a per cent for what is rounded.
    page = (Path(__file__).parents[1] / "repro" / "recipes" / "README.md").read_text()  # not in the package
    again = verdict_rates.pocket_table(verdict_rates.Pocket(2000, seed=7), margins).splitlines()[2:]
    corners = page.split("| new \\ reference runs |")
    shown = corners[1 + verdict_rates.MARGINS_OFF.index(margins)].splitlines()[2 : 2 + len(again)]
    p, drawn = (np.array([re.split("[|/]", line)[2:-1] for line in lines], float) / 100 for lines in (shown, again))
    assert (abs(p - drawn) <= 4 * (np.maximum(p * (1 - p), 1e-3) / 2000) ** 0.5 + 0.01).all()


def test_the_documented_workflow_passes_nine_of_ten_unchanged_programs_and_hardly_any_changed_one():
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


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_read_by_what_runs_and_judges_it(name):
    recipe = read_recipe(name)
    assert recipe["name"] == name
    parse_arguments(ARGUMENTS, flags_of(recipe["flags"]), command="reproduce")
    assert all(target.source for target in read_targets(recipe["targets"]))
    assert all(set(row) <= set(Target.__dataclass_fields__) for row in recipe["targets"])


@pytest.mark.parametrize("name", ["coco2017", "coco2017-exact"])
def test_the_documented_run_is_the_documented_command(name):
    words = documented_command()[1:], flags_of(read_recipe(name)["flags"])
    parsed = (parse_arguments(ARGUMENTS, argv, command="train") for argv in words)
    documented, recipe = (dict(item for part in parts for item in vars(part).items()) for parts in parsed)
    different = {flag for flag, value in documented.items() if recipe[flag] != value}
    elsewhere = {"output_dir", "data_dir", "dataset_name", "overwrite_output_dir", "push_to_hub"}
    unseen = {"preprocessing_num_workers", "num_replicas", "protocol", "caption_metrics"}
    assert different <= elsewhere | unseen


def test_the_documented_runs_own_numbers_are_its_targets():
    targets = {target.name: target for target in read_targets(read_recipe("coco2017")["targets"])}
    assert targets["eval_loss at 2000"].value == 2.0153
    assert targets["eval_rouge2 at 2000"].value == 14.64
    assert targets["learning_rate"].values["2000"] == pytest.approx(3e-5 * (1 - 1999 / 2307))
    assert len(targets["loss"].values) == 12


def test_several_seeds_are_one_command_that_goes_on_and_one_verdict(small_recipe, tmp_path, capsys):
    folder = tmp_path / "pocket"
    command = ["reproduce", "--output_dir", str(folder), "--seeds", "3-4"]
    assert main(command) == 0
    assert "PASS: 2 runs of pocket" in capsys.readouterr().out
    runs = [folder / f"seed-{seed}" / "run" for seed in (3, 4)]
    assert [json.loads((run / "run.json").read_text())["flags"]["seed"] for run in runs] == [3, 4]
    assert list(tmp_path.rglob("data")) == [folder / "data"], "rendered once"
    (last,) = runs[1].glob("ckpt_*")
    generation = json.loads((last / "generation_config.json").read_text())
    assert (generation["num_beams"], generation["max_new_tokens"]) == (2, 19), "as the recipe evaluates"
    rows = [(run / "metrics.jsonl").read_bytes() for run in runs]
    assert main(command) == 0, "given again, it goes on from the end of each"
    assert [(run / "metrics.jsonl").read_bytes() for run in runs] == rows
    page = (folder / "report.html").read_text()
    assert "each look at so many runs" not in page
    (folder / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == page
    assert main(["verify", str(folder), "--json", str(tmp_path / "again.json")]) == 0
    assert "PASS: 2 runs of pocket" in capsys.readouterr().out
    told, again = (json.loads(path.read_text()) for path in (folder / "result.json", tmp_path / "again.json"))
    assert again["targets"] == told["targets"], "their number was named, here too"
    assert main(["caption", str(runs[1].parent), str(next(folder.rglob("val2017/*.jpg")))]) == 0
    assert "the newest of 1 checkpoint" in capsys.readouterr().err
    assert main(["export", "--model_name_or_path", str(last), "--output_dir", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "README.md").read_bytes() == (last / "README.md").read_bytes()


@pytest.mark.parametrize("seeds", ["", "x", "1", "1-", "3-1", "1,1", "1-100000000"])
def test_seeds_are_named_once_each(seeds):
    with pytest.raises(InputError, match="--seeds"):
        _seeds(seeds, {})
