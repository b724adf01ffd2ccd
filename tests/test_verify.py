"""`repro verify` on real runs of a very small recipe: right ones pass, and no planted fault does."""

from __future__ import annotations

import importlib
import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from filelock import FileLock

import repro.data.batches
import repro.recipes.reproduce
import repro.recipes.verify
import repro.reports.write
import repro.run.build
import repro.training.steps
from repro.__main__ import main
from repro.config import flags_of, parse_arguments
from repro.data.atomic import sha256_of
from repro.pocket.halves import render_pocket
from repro.recipes import read_recipe, recipe_names
from repro.recipes.targets import judge_all, read_targets
from repro.recipes.verify import measures, verify

SEEDS = (1, 2, 3, 4)
OWN = 42
FIRST = ("1", "2", "3")


def small_recipe() -> dict[str, Any]:
    recipe = read_recipe("pocket")
    recipe["data"] |= {"num_train": 24, "num_val": 8}
    # As wide as it is: a narrower one learns too little to caption otherwise when its pictures are mirrored.
    recipe["model"]["encoder"]["num_hidden_layers"] = recipe["model"]["decoder"]["n_layer"] = 1
    recipe["flags"] |= {
        **{"num_train_epochs": 2, "num_replicas": 2, "per_device_train_batch_size": 6, "warmup_steps": 3},
        **{"per_device_eval_batch_size": 6, "block_size": 60, "logging_steps": 2, "eval_steps": 20},
        **{"num_beams": 2, "learning_rate": 3e-3, "save_steps": 0, "attention_pictures": 0},
    }
    recipe["targets"], recipe["recompute"] = [], False
    return recipe


def targets_from(folders: list[Path], own: Path) -> list[dict[str, Any]]:
    """What a recipe's author would write down after some runs."""
    rows = [[json.loads(line) for line in (f / "run" / "metrics.jsonl").read_text().splitlines()] for f in folders]
    final = [run[-1]["eval"]["loss"] for run in rows]
    mine = [json.loads(line) for line in (own / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {str(row["step"]): row["learning_rate"] for row in mine if "loss" in row}
    losses = {str(row["step"]): row["loss"] for row in mine if "loss" in row}
    facts = json.loads((own / "run" / "run.json").read_text())
    return [
        {"metric": "parameters", "value": facts["model"]["parameters"], "tolerance": 0, "source": "the model"},
        {"metric": "eval_rows", "value": 40, "tolerance": 0, "source": "8 scenes of five captions"},
        *(
            {"metric": f"{split}_fingerprint", "fingerprint": counts["fingerprint"], "source": "the data"}
            for split, counts in facts["data"].items()
        ),
        {"metric": "train_rows", "value": 120, "tolerance": 0, "source": "24 scenes of five captions"},
        {"metric": "num_steps", "low": 20, "high": 20, "source": "120 rows in twelves, twice"},
        {"metric": "learning_rate", "values": rates, "tolerance": 1e-9, "source": "the schedule"},
        {
            "metric": "loss",
            "seeds": {str(OWN): {step: losses[step] for step in FIRST}},
            "tolerance": 1e-3,
            "source": "a run",
        },
        {
            "metric": "eval_loss",
            "step": 20,
            "value": statistics.fmean(final),
            "standard_deviation": statistics.stdev(final),
            "runs": len(final),
            "margin": 0.5,
            "source": "the other seeds",
        },
    ]


@pytest.fixture(scope="module")
def runs(shared_folder: Path) -> Iterator[Callable[..., Path]]:
    """Gives folders of finished reproductions by seed; the recipe of that name is the small one meanwhile."""
    root, recipe = shared_folder / "seeds", small_recipe()
    root.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in (repro.recipes.reproduce, repro.reports.write, repro.recipes.verify):
            patch.setattr(module, "read_recipe", lambda name: recipe)

        def folder(seed: int, name: str = "", *flags: str) -> Path:
            path = root / f"{seed}{name}"
            with FileLock(f"{path}.lock"):
                if not (path / "result.json").exists():
                    main(["reproduce", "--output_dir", str(path), "--seed", str(seed), *flags])
            return path

        recipe["targets"] += targets_from([folder(seed) for seed in SEEDS], folder(OWN))
        yield folder


@pytest.fixture
def copied(runs: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished reproduction to spoil."""
    return Path(shutil.copytree(runs(OWN), tmp_path / "copy"))


def test_one_run_passes_by_the_band_of_the_recipes_seeds(runs, capsys):
    assert main(["verify", str(runs(OWN))]) == 0
    printed = capsys.readouterr().out
    assert "PASS: 1 run of pocket" in printed
    assert "validation loss at step 20" in printed
    assert "consistent with 4 reference runs" in printed


def test_a_runs_minutes_are_all_that_it_was_at_work(runs):
    record = repro.recipes.verify.read_run(runs(OWN), read_recipe("pocket"))
    evaluations = [row["eval"] for row in record.recorded.rows if "eval" in row]
    assert all(found["saving_seconds"] > 0 for found in evaluations)
    parts = [found[name] for found in evaluations for name in ("seconds", "saving_seconds")]
    expected = sum(parts) + record.facts["train_seconds"] + record.facts["startup_seconds"]
    assert record.minutes == pytest.approx(record.facts["seconds"] / 60)
    # What is left is making the state, cards and files.
    assert expected < record.facts["seconds"] < expected + 20


@pytest.mark.parametrize("name", recipe_names())
def test_time_is_reported_beside_the_published_and_never_judged(name, runs, monkeypatch, capsys):
    recipe = read_recipe(name)
    assert not [target for target in recipe["targets"] if "minutes" in target["metric"]]
    verification = verify([runs(OWN)])
    (note,) = (note for note in verification.notes if "minutes" in note)
    assert "never judged" in note
    if name.startswith("coco"):
        noted = repro.recipes.verify._time(verification.runs[0], recipe)
        assert "published: 90 (the example's documentation: about 1h30" in noted


def test_the_report_has_the_verdict_at_its_top(runs, tmp_path):
    assert "report.html" in {path.name for path in runs(OWN).iterdir()}
    assert main(["report", str(runs(OWN)), "--output", str(tmp_path / "report.html")]) == 0
    assert ">PASS</strong> against the targets of pocket" in (tmp_path / "report.html").read_text()


def test_several_runs_pass_by_equivalence_and_say_so_to_machines(runs, tmp_path, capsys):
    report = tmp_path / "verdict.json"
    assert main(["verify", *(str(runs(seed)) for seed in (OWN, *SEEDS)), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["verdict"] == "PASS"
    assert [run["seed"] for run in found["runs"]] == [OWN, *SEEDS]
    (loss,) = (row for row in found["targets"] if row["target"] == "eval_loss at 20")
    assert loss["interval"][0] < loss["difference"] < loss["interval"][1]


def test_runs_can_be_held_against_other_runs(runs):
    assert verify([runs(1), runs(2)], reference=[runs(3), runs(4)]).verdict != "FAIL"
    one = verify([runs(1), runs(2), runs(3)], reference=[runs(3), runs(4)])
    early = [outcome for outcome in one.outcomes if outcome.target.metric == "loss"]
    assert [outcome.verdict for outcome in early] == ["PASS"], "seed 3 is in both, and paired"
    names = {outcome.target.name for outcome in one.outcomes}
    assert names > {"train_rows", "parameters", "train_fingerprint", "eval_loss at 20"}, "counts are compared too"
    assert [note for note in one.notes if "losses equal those of" in note]


def test_the_number_of_runs_is_named_beforehand_or_looks_are_paid_for(runs, capsys):
    folders = [str(runs(seed)) for seed in (OWN, *SEEDS)]
    assert main(["verify", *folders, "--seeds", "5"]) == 0
    printed = capsys.readouterr().out
    assert "PASS: 5 runs of pocket, equivalent to 4 reference runs" in printed
    assert "each look" not in printed
    assert main(["verify", *folders]) in (0, 2)
    assert "each look at so many runs is paid for" in capsys.readouterr().out
    assert main(["verify", *folders, "--seeds", "8"]) == 2
    assert "--seeds 8: named 8 runs and 5 are given" in capsys.readouterr().out


def test_all_of_a_recipes_targets_are_written_from_its_runs(runs, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    module = importlib.import_module("recipe_targets")
    monkeypatch.setattr(module, "RATES", (1, 10))
    monkeypatch.setattr(module, "FIRST_STEPS", {(1, 2): 5e-4})
    rows, listed = module.make_targets({seed: runs(seed) / "run" for seed in SEEDS})
    assert [row["seed"] for row in listed] == list(SEEDS)
    assert {row["metric"] for row in read_recipe("pocket")["targets"]} <= {row["metric"] for row in rows}
    run = repro.recipes.verify.read_run(runs(SEEDS[0]), read_recipe("pocket"))
    of_run = measures(run.facts, run.recorded.rows)
    outcomes = {(o.target.metric, o.target.step): o.verdict for o in judge_all(read_targets(rows), [of_run])}
    exact = ("train_rows", "num_steps", "parameters", "eval_rows", "train_fingerprint", "validation_fingerprint")
    assert {outcomes[metric, None] for metric in (*exact, "learning_rate", "loss")} == {"PASS"}
    assert outcomes["loss", 1] == "PASS"


# The faults that a change of this code, or of a library below it, could plant.


def wrong_order(patch: pytest.MonkeyPatch) -> None:
    order = repro.data.batches.epoch_order
    patch.setattr(repro.data.batches, "epoch_order", lambda *args: order(*args)[::-1].copy())


def wrong_rate(patch: pytest.MonkeyPatch) -> None:
    create = repro.training.steps.create_learning_rate_fn
    patch.setattr(repro.training.steps, "create_learning_rate_fn", lambda rate, **more: create(1.1 * rate, **more))


def shifted_labels(patch: pytest.MonkeyPatch) -> None:
    losses = repro.training.steps.row_losses
    patch.setattr(
        repro.training.steps,
        "row_losses",
        lambda logits, labels, mask, **more: losses(logits, jnp.roll(labels, 1, axis=-1), mask, **more),
    )


@pytest.mark.parametrize(
    ("fault", "target"), [(wrong_order, "loss"), (wrong_rate, "learning_rate"), (shifted_labels, "loss")]
)
def test_a_planted_fault_fails(fault, target, runs, tmp_path, monkeypatch, request):
    if fault is shifted_labels:  # which a step that was compiled before would not call
        request.getfixturevalue("traced_anew")
    fault(monkeypatch)
    folder = tmp_path / "faulty"
    assert main(["reproduce", "--output_dir", str(folder), "--keep_going", "--seed", str(OWN)]) == 1
    found = verify([folder])
    assert target in {outcome.target.metric for outcome in found.outcomes if outcome.verdict == "FAIL"}


def test_a_doomed_run_is_stopped(runs, tmp_path, monkeypatch, capsys):
    wrong_rate(monkeypatch)
    folder = tmp_path / "faulty"
    assert main(["reproduce", "--output_dir", str(folder)]) == 3
    assert "cannot reproduce pocket any more: learning_rate" in capsys.readouterr().err
    steps = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 < len(steps) < 10
    assert main(["verify", str(folder)]) == 2


def test_dropped_rows_fail(runs, tmp_path):
    folder = tmp_path / "dropped"
    folder.mkdir()
    (folder / "recipe.json").write_text('{"name": "pocket"}')
    render_pocket(folder / "data", **small_recipe()["data"])
    image = sorted((folder / "data" / "train2017").iterdir())[0]
    image.write_bytes(image.read_bytes()[:200])
    assert main(["reproduce", "--output_dir", str(folder), "--keep_going"]) == 1
    failed = {outcome.target.metric for outcome in verify([folder]).outcomes if outcome.verdict == "FAIL"}
    assert "train_rows" in failed


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--protocol", "published"], "--protocol published, the recipe has exact"),
        (["--eval_steps", "7"], "--eval_steps 7, the recipe has 20"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_flags_than_the_recipes_tell_nothing(flags, named, runs, capsys):
    folder = runs(OWN, flags[0], *flags)
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 2
    printed = capsys.readouterr().out
    assert named in printed
    assert "CANNOT TELL: 1 run" in printed


def without_evaluation(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"eval"' not in line))
    facts = json.loads((run / "run.json").read_text())
    facts["checksums"]["metrics.jsonl"] = sha256_of(run / "metrics.jsonl")
    (run / "run.json").write_text(json.dumps(facts))


def crashed(run: Path) -> None:
    (run / "run.json").unlink()


# `test_integrity.py` has more ways to spoil a run.
@pytest.mark.parametrize(
    ("spoil", "reason"), [(without_evaluation, "not measured"), (crashed, "run.json: is not there")]
)
def test_a_run_that_cannot_be_relied_on_tells_nothing(spoil, reason, runs, copied, capsys):
    spoil(copied / "run")
    assert main(["verify", str(copied)]) == 2
    assert reason in capsys.readouterr().out


def test_one_seed_twice_is_not_two_runs(runs, copied, capsys):
    assert main(["verify", str(runs(OWN)), str(copied)]) == 2
    assert f"seed {OWN} is there 2 times" in capsys.readouterr().out


def test_a_run_that_was_trained_by_hand_needs_the_recipes_name(runs, copied, tmp_path, capsys):
    run = Path(shutil.copytree(copied / "run", tmp_path / "mine" / "output"))
    assert main(["verify", str(run)]) == 2
    assert "does not say which recipe it is of; add --recipe NAME" in capsys.readouterr().err
    assert main(["verify", str(run), "--recipe", "pocket"]) == 0
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_what_a_recipe_lets_vary_is_noted_and_nothing_else():
    recipe = read_recipe("coco2017")
    flags = [*flags_of(recipe["flags"]), "--encoder_model_name_or_path", "vit-folder", "--dtype", "bfloat16"]
    given = parse_arguments(repro.recipes.verify.ARGUMENTS, [*flags, "--num_beams", "4"], command="train")
    facts = {"flags": {name: value for arguments in given for name, value in vars(arguments).items()}}
    problems, notes = repro.recipes.verify._flags_that_differ(facts, recipe)
    assert problems == ["--num_beams 4, the recipe has 8"]
    assert [note.split()[0] for note in notes] == ["--encoder_model_name_or_path", "--dtype"]
    facts["flags"] |= {"gradient_checkpointing": True, "dtype": "float32", "coordinator": "host-0:1", "process_id": 0}
    notes = repro.recipes.verify._flags_that_differ(facts, recipe)[1]
    assert [note.split()[0] for note in notes] == ["--encoder_model_name_or_path", "--gradient_checkpointing"]
