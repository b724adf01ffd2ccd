"""`repro verify` on real runs of a very small recipe: right ones pass, and no planted fault does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock

import repro.recipes.reproduce
import repro.recipes.verify
import repro.reports.write
from repro.__main__ import main
from repro.config import flags_of, parse_arguments
from repro.errors import RunStopped
from repro.pocket.halves import render_pocket
from repro.recipes import read_recipe, recipe_names
from repro.recipes.targets import judge_all, read_targets
from repro.recipes.verify import measures, read_run, stop_if_hopeless, verify
from repro.training import steps

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import recipe_targets
from planted_faults import FAULTS, planted

OWN = 42
SEEDS = (OWN, 1, 2)
# What the recipe's author asks of runs that have learnt next to nothing.
ASKED = {
    **{"RATES": (2, 10), "FIRST_STEPS": {(1, 2, 3): 1e-3}, "MARGINS": {"eval_loss": 0.5}},
    **{"PROBED": {}, "PROMISED": {}},
}


def small_recipe():
    recipe = read_recipe("pocket")
    recipe["data"] |= {"num_train": 24, "num_val": 8}
    # As wide as it is: a narrower one learns too little to caption mirrored pictures, or by another search, otherwise.
    recipe["model"]["encoder"]["num_hidden_layers"] = recipe["model"]["decoder"]["n_layer"] = 1
    recipe["flags"] |= {
        **{"num_train_epochs": 2, "num_replicas": 2, "per_device_train_batch_size": 6, "warmup_steps": 3},
        **{"per_device_eval_batch_size": 6, "block_size": 60, "logging_steps": 2, "eval_steps": 20},
        **{"num_beams": 2, "learning_rate": 3e-3, "save_steps": 0, "attention_pictures": 0},
    }
    recipe["targets"], recipe["recompute"] = [], False
    return recipe


@pytest.fixture(scope="module")
def runs(shared_folder):
    """Gives folders of finished reproductions by seed; the recipe of that name is the small one meanwhile."""
    root, recipe = shared_folder / "seeds", small_recipe()
    root.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in (repro.recipes.reproduce, repro.reports.write, repro.recipes.verify):
            patch.setattr(module, "read_recipe", lambda name: recipe)

        def folder(seed, name="", *flags):
            path = root / f"{seed}{name}"
            with FileLock(f"{path}.lock"):
                if not (path / "result.json").exists():
                    main(["reproduce", "--output_dir", str(path), "--seed", str(seed), *flags])
            return path

        with pytest.MonkeyPatch.context() as asked:
            for name, value in ASKED.items():
                asked.setattr(recipe_targets, name, value)
            recipe["targets"] += recipe_targets.make_targets({seed: folder(seed) / "run" for seed in SEEDS})[0]
        yield folder


def failed(verification):
    return {outcome.target.metric for outcome in verification.outcomes if outcome.verdict == "FAIL"}


def test_one_run_passes_by_the_band_of_the_recipes_seeds_and_its_report_says_so(runs, tmp_path, capsys):
    assert main(["verify", str(runs(OWN))]) == 0
    printed = capsys.readouterr().out
    assert "PASS: 1 run of pocket" in printed
    assert "validation loss" in printed
    assert "consistent with 3 reference runs" in printed
    assert (runs(OWN) / "report.html").is_file()
    assert main(["report", str(runs(OWN)), "--output", str(tmp_path / "report.html")]) == 0
    assert ">PASS</strong> against the targets of pocket" in (tmp_path / "report.html").read_text()


def test_a_runs_minutes_are_all_that_it_was_at_work_and_never_judged(runs):
    record = read_run(runs(OWN), read_recipe("pocket"))
    evaluations = [row["eval"] for row in record.recorded.rows if "eval" in row]
    parts = [found[name] for found in evaluations for name in ("seconds", "saving_seconds")]
    assert min(parts) > 0
    expected = sum(parts) + record.facts["train_seconds"] + record.facts["startup_seconds"]
    assert record.minutes == pytest.approx(record.facts["seconds"] / 60)
    # What is left is making the state, cards and files.
    assert expected < record.facts["seconds"] < expected + 20
    (note,) = (note for note in verify([runs(OWN)]).notes if "minutes" in note)
    assert "never judged" in note
    published = repro.recipes.verify._time(record, read_recipe("coco2017"))
    assert "published: 90 (the example's documentation: about 1h30" in published
    metrics = [target["metric"] for name in recipe_names() for target in read_recipe(name)["targets"]]
    assert not [metric for metric in metrics if "minutes" in metric]


def test_several_runs_pass_by_equivalence_if_their_number_was_named_beforehand(runs, tmp_path, capsys):
    folders, report = [str(runs(seed)) for seed in SEEDS], tmp_path / "verdict.json"
    assert main(["verify", *folders, "--seeds", "3", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "PASS: 3 runs of pocket, equivalent to 3 reference runs" in printed
    assert "each look" not in printed
    found = json.loads(report.read_text())
    assert found["verdict"] == "PASS"
    assert [run["seed"] for run in found["runs"]] == [*SEEDS]
    (loss,) = (row for row in found["targets"] if row["target"] == "eval_loss")
    assert loss["interval"][0] < loss["difference"] < loss["interval"][1]
    assert [note for note in verify([runs(1), runs(2)]).notes if "each look at so many runs is paid for" in note]
    assert main(["verify", *folders[:2], "--seeds", "8"]) == 2
    assert "--seeds 8: named 8 runs and 2 are given" in capsys.readouterr().out


def test_runs_can_be_held_against_other_runs(runs):
    assert verify([runs(1)], reference=[runs(2), runs(OWN)]).verdict != "FAIL"
    found = verify([runs(1), runs(2)], reference=[runs(2), runs(OWN)])
    early = [outcome for outcome in found.outcomes if outcome.target.seeds]
    assert [outcome.verdict for outcome in early] == ["PASS"], "seed 2 is in both, and paired"
    names = {outcome.target.name for outcome in found.outcomes}
    assert names > {"train_rows", "parameters", "train_fingerprint", "eval_loss"}, "counts are compared too"
    assert [note for note in found.notes if "losses equal those of" in note]


def test_all_of_a_recipes_targets_are_written_from_its_runs(runs, monkeypatch):
    monkeypatch.setattr(recipe_targets, "RATES", (1, 10))
    monkeypatch.setattr(recipe_targets, "FIRST_STEPS", {(1, 2): 5e-4})
    rows, listed = recipe_targets.make_targets({seed: runs(seed) / "run" for seed in SEEDS})
    assert [row["seed"] for row in listed] == list(SEEDS)
    assert {row["metric"] for row in read_recipe("pocket")["targets"]} <= {row["metric"] for row in rows}
    run = read_run(runs(1), read_recipe("pocket"))
    outcomes = judge_all(read_targets(rows), [measures(run.facts, run.recorded.rows)])
    exact = ("train_rows", "num_steps", "parameters", "eval_rows", "train_fingerprint", "validation_fingerprint")
    exact += ("learning_rate", "loss", "probe_loss", "probe_orders")
    assert {outcome.verdict for outcome in outcomes if outcome.target.metric in exact} == {"PASS"}


# The faults that a change of this code, or of a library below it, could plant.


def wrong_rate():
    create = steps.create_learning_rate_fn
    return mock.patch.object(steps, "create_learning_rate_fn", lambda rate, **more: create(1.1 * rate, **more))


@pytest.mark.parametrize("fault", ["no shuffling", "labels shifted by one"])
def test_a_doomed_run_is_stopped(fault, runs, tmp_path, capsys):
    folder = tmp_path / "faulty"
    with planted(FAULTS[fault]):
        assert main(["reproduce", "--output_dir", str(folder), "--seed", str(OWN)]) == 3
    assert "cannot reproduce pocket any more: loss" in capsys.readouterr().err
    assert 0 < len((folder / "run" / "metrics.jsonl").read_text().splitlines()) < 10
    assert main(["verify", str(folder)]) == 2


def test_a_planted_fault_fails_in_a_run_that_is_finished_all_the_same(runs, tmp_path):
    folder = tmp_path / "faulty"
    with planted(wrong_rate):
        assert main(["reproduce", "--output_dir", str(folder), "--keep_going", "--seed", str(OWN)]) == 1
    assert "learning_rate" in failed(verify([folder]))


def test_a_run_with_dropped_rows_does_not_begin(runs, tmp_path, capsys):
    folder = tmp_path / "dropped"
    folder.mkdir()
    (folder / "recipe.json").write_text('{"name": "pocket"}')
    render_pocket(folder / "data", **small_recipe()["data"])
    image = sorted((folder / "data" / "train2017").iterdir())[0]
    image.write_bytes(image.read_bytes()[:200])
    assert main(["reproduce", "--output_dir", str(folder)]) == 3
    assert "train_rows: wanted 120, measured 115" in capsys.readouterr().err
    assert (folder / "run" / "metrics.jsonl").read_text() == ""


def test_a_hopeless_run_with_other_flags_than_the_recipes_is_not_stopped(runs):
    recipe = repro.recipes.verify.read_recipe("pocket")  # the small one
    record = read_run(runs(OWN), recipe)
    rows = [{**row, "learning_rate": 1.0} for row in record.recorded.rows if "loss" in row]
    with pytest.raises(RunStopped, match="any more: learning_rate"):
        stop_if_hopeless(recipe, record.facts, rows)
    record.facts["flags"]["protocol"] = "published"
    stop_if_hopeless(recipe, record.facts, rows)


def test_one_seed_twice_is_not_two_runs(runs):
    found = verify([runs(OWN), runs(OWN)])
    assert found.verdict == "CANNOT TELL"
    assert [problem for problem in found.problems if f"seed {OWN} is there 2 times" in problem]


def test_a_run_that_was_trained_by_hand_needs_the_recipes_name(runs, tmp_path, capsys):
    run = shutil.copytree(runs(OWN) / "run", tmp_path / "mine" / "output")
    assert main(["verify", str(run)]) == 2
    assert "does not say which recipe it is of; add --recipe NAME" in capsys.readouterr().err
    assert main(["verify", str(run), "--recipe", "pocket"]) == 0
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_what_a_recipe_lets_vary_is_noted_and_nothing_else():
    recipe = read_recipe("coco2017")
    given = parse_arguments(repro.recipes.verify.ARGUMENTS, flags_of(recipe["flags"]), command="train")
    flags = {name: value for arguments in given for name, value in vars(arguments).items()}
    noted = {"encoder_model_name_or_path": "vit-folder", "dtype": "bfloat16", "gradient_checkpointing": True}
    facts = {"flags": {**flags, **noted, "num_beams": 4, "coordinator": "host-0:1", "process_id": 0}}
    problems, notes = repro.recipes.verify._flags_that_differ(facts, recipe)
    assert problems == ["--num_beams 4, the recipe has 8"]
    assert {note.split()[0] for note in notes} == {f"--{name}" for name in noted}
