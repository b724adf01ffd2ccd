"""Finished runs that were tampered with, by accident or otherwise: none passes without a word."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score import tokenize
from test_verify import OWN, failed, runs

import repro.models.generation
import repro.recipes.integrity
import repro.run.settings
from repro.__main__ import main
from repro.data.atomic import sha256_of
from repro.evaluation.rouge import rouge_scores
from repro.models.captioner import NativeCaptioner
from repro.recipes.integrity import contradictions, evaluated_again, other_versions
from repro.recipes.verify import verify
from repro.record.record import digest_of_facts, read_record
from repro.record.writer import checked_files, models_in

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from planted_faults import FAULTS, normalize, pixels, planted

__all__ = ["runs"]  # the fixture of finished reproductions


@pytest.fixture
def copied(runs, tmp_path):
    """A finished run to spoil."""
    return Path(shutil.copytree(runs(OWN), tmp_path / "copy")) / "run"


def facts_of(run):
    return json.loads((run / "run.json").read_text())


def sign(run):
    """Renew all checksums."""
    sums = {path.relative_to(run).as_posix(): sha256_of(path) for path in checked_files(run)}
    sums["run.json"] = digest_of_facts(facts_of(run))
    (run / "run.json").write_text(json.dumps({**facts_of(run), "checksums": sums}))


def edit(pattern, change, *, signed=True):
    """Change what a JSON file holds, or the rows of a file with one a line, and the checksums with it."""

    def spoil(run):
        (path,) = run.glob(pattern)
        if path.suffix == ".jsonl":
            rows = change([json.loads(line) for line in path.read_text().splitlines()])
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        if signed:
            sign(run)

    return spoil


def put(changed, into):
    return {**into, **{key: put(new, into[key]) if isinstance(new, dict) else new for key, new in changed.items()}}


def facts(**changed):
    return edit("run.json", partial(put, changed))


def rows(change):
    return edit("metrics.jsonl", change)


def loss(step, value):
    return rows(lambda all_: [{**row, "loss": value} if row["step"] == step and "loss" in row else row for row in all_])


def score(**changed):
    return rows(lambda all_: [put({"eval": changed}, row) if "eval" in row else row for row in all_])


def results(**changed):
    return edit("ckpt_*/eval_results.json", partial(put, changed))


def captions(change):
    return edit("ckpt_*/eval_generation.json", change)


def without_checksum(part):
    def change(found):
        sums = {name: digest for name, digest in found["checksums"].items() if not name.endswith(part)}
        return {**found, "checksums": sums}

    return edit("run.json", change, signed=False)


def both(*spoils):
    return lambda run: [spoil(run) for spoil in spoils]


def without(name):
    return lambda found: {key: value for key, value in found.items() if key != name}


def without_weights(run):
    (models_in(run)[-1] / "flax_model.msgpack").unlink()


def swap_weights(run):
    path = models_in(run)[-1] / "flax_model.msgpack"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


MANIPULATIONS = {
    "a copy with its seed edited": (facts(flags={"seed": 8}), "has the losses of seed 42"),
    "order of the file": (facts(shuffle=False), "decides whether rows are shuffled"),
    "rows dropped": (facts(data={"train": {"kept": 119}}), "training rows"),
    "other training data": (facts(data={"train": {"fingerprint": "0123"}}), "training rows' fingerprint"),
    "other validation data": (facts(data={"validation": {"fingerprint": "0123"}}), "validation rows' fingerprint"),
    "five times the parameters": (facts(model={"parameters": 5_000_000}), "parameters"),
    "64 rows evaluated": (score(rows=8), "of 8 rows"),
    "a step is missing": (rows(lambda all_: all_[:8] + all_[9:]), "19 of 20 steps"),
    "steps in another order": (rows(lambda all_: [*all_[1::-1], *all_[2:]]), "not in order"),
    "a step twice": (rows(lambda all_: [all_[0], *all_]), "not in order"),
    "the last steps are missing": (rows(lambda all_: all_[:10] + all_[20:]), "10 of 20 steps"),
    "NaN after the compared steps": (loss(15, float("nan")), "the loss of step 15 is not finite"),
    "another first loss": (loss(1, 1.0), "training losses"),
    "a better score in metrics.jsonl": (score(loss=5.9), "metrics.jsonl has 5.9"),
    "a better score in the results": (results(eval_loss=0.1), "eval_loss is 0.1"),
    "a better ROUGE in both": (both(score(rouge2=99.0), results(eval_rouge2=99.0)), "rouge2 of its captions"),
    "other captions": (
        captions(lambda all_: [{**r, "pred": r["label"]} for r in all_]),
        "rouge1 of its captions is 100",
    ),
    "captions that are none": (captions(lambda _: {"a": 1}), "its results and captions cannot be read"),
    "captions left out": (captions(lambda all_: all_[:20]), "20 captions, of 40 rows"),
    "no evaluation": (rows(lambda all_: all_[:-1]), "not measured"),
    "results without their checksum": (without_checksum("eval_results.json"), "no checksum of ckpt_"),
    "captions without their checksum": (without_checksum("generation.json"), "no checksum of ckpt_"),
    "metrics without their checksum": (without_checksum("metrics.jsonl"), "no checksum of metrics.jsonl"),
    "weights without their checksum": (without_checksum(".msgpack"), "no checksum of ckpt_"),
    "no checksums": (edit("run.json", without("checksums"), signed=False), "no checksums"),
    "facts edited by hand": (
        edit("run.json", partial(put, {"train_seconds": 1.0}), signed=False),
        "run.json is not as the run left it",
    ),
    "a changed checkpoint": (swap_weights, "flax_model.msgpack is not as the run left it"),
    "a checkpoint is gone": (without_weights, "flax_model.msgpack is not as the run left it"),
    "a checkpoint is gone, and its checksum": (both(without_weights, sign), "no checksum of ckpt_"),
    "not finished": (edit("run.json", without("finished")), "the run is not finished"),
    "killed": (lambda run: (run / "run.json").unlink(), "run.json: is not there"),
}


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_no_manipulation_passes_without_a_word(name, runs, copied):
    spoil, said = MANIPULATIONS[name]
    spoil(copied)
    found = verify([copied.parent])
    assert found.verdict != "PASS"
    wrong = [line for line in found.table.splitlines() if "  PASS" not in line]
    assert said in "\n".join([*found.problems, *wrong])


OTHER_FLAGS = {
    **{"learning_rate": 1.0, "per_device_train_batch_size": 3, "protocol": "current", "dtype": "bfloat16"},
    **{"num_beams": 1, "model_name_or_path": "trained", "encoder_model_name_or_path": "trained", "eval_steps": 7},
    **{"max_eval_samples": 10, "max_train_samples": 60, "do_train": False},
}
HARMLESS = {"gradient_checkpointing": True, "train_file": "mine.csv"}  # the content is the same, by its fingerprint


def test_each_flag_that_may_not_vary_is_a_problem_and_others_are_noted(runs, copied):
    facts(flags=HARMLESS)(copied)
    harmless = verify([copied.parent])
    assert harmless.verdict == "PASS"
    facts(flags=OTHER_FLAGS)(copied)
    spoilt = verify([copied.parent])
    assert spoilt.verdict == "CANNOT TELL"
    for flags, said in ((HARMLESS, harmless.runs[0].notes), (OTHER_FLAGS, spoilt.runs[0].problems)):
        assert {text.split(", ")[0] for text in said} == {f"--{name} {value}" for name, value in flags.items()}


def test_one_run_under_several_seeds_is_one_run(runs, tmp_path):
    folders = [Path(shutil.copytree(runs(1), tmp_path / str(seed))) for seed in (100, 101)]
    for folder in folders:
        facts(flags={"seed": int(folder.name)})(folder / "run")
    assert "seeds 100, 101 have the same losses, so they are one run" in verify(folders).problems
    # Nor is another seed of the new runs one of the old ones.
    found = verify([folders[0], runs(2)], reference=[runs(1), runs(OWN)])
    assert "seeds 1, 100 have the same losses, so they are one run" in found.problems


def test_old_and_new_runs_have_the_same_data_counts_and_model(runs, copied):
    model = {"parameters": 7, "fingerprint": "another"}
    facts(num_steps=21, model=model, data={"train": {"kept": 119, "fingerprint": "another"}})(copied)
    found = verify([runs(1)], reference=[runs(2), copied.parent])
    assert found.verdict == "CANNOT TELL"
    for what in ("data", "steps", "parameters", "counts", "models"):
        assert [problem for problem in found.problems if f"of different {what}" in problem]


def test_floors_and_counts_hold_for_new_runs_too(runs, copied):
    reference = [Path(shutil.copytree(runs(seed), copied.parents[1] / str(seed))) for seed in (1, 2)]
    for folder in (copied.parent, *reference):
        facts(data={"train": {"kept": 119}})(folder / "run")
    assert failed(verify([copied.parent], reference=reference)) == {"train_rows"}


def test_weights_that_are_evaluated_again_belong_to_the_scores(runs, copied, capsys):
    assert main(["verify", str(copied.parent), "--recompute"]) == 0
    assert "evaluated again: loss" in capsys.readouterr().out
    # Another run's weights, with checksums of their own.
    for name in ("flax_model.msgpack", "model.safetensors"):
        shutil.copy(models_in(runs(1) / "run")[-1] / name, models_in(copied)[-1] / name)
    sign(copied)
    assert main(["verify", str(copied.parent), "--no_recompute"]) == 0
    capsys.readouterr()
    assert main(["verify", str(copied.parent), "--recompute"]) == 2
    assert "loss of its weights is" in capsys.readouterr().out
    facts(flags={"data_dir": str(copied.parent / "gone")})(copied)
    assert main(["verify", str(copied.parent), "--recompute"]) == 0
    assert "not evaluated again" in capsys.readouterr().out


# What a change of this code, or of a library below it, could plant into the scoring of one and the same weights.


def replaced(place, name, change):
    """Put `change` in the place of a function, which it gets before the function's own arguments."""
    original = getattr(place, name)
    return lambda: mock.patch.object(place, name, lambda *args, **more: change(original, *args, **more))


def protocol(**changed):
    return replaced(
        repro.run.settings, "protocol_named", lambda named, text: dataclasses.replace(named(text), **changed)
    )


def with_settings(place, name, **changed):
    return replaced(place, name, lambda function, *args, **more: function(*args, **{**more, **changed}))


IN_LOSSES = {
    **{name: FAULTS[name] for name in ("BGR", "ImageNet's means")},
    "no normalization": pixels(lambda *args: (normalize(*args) + 1) / 2),
    **{name: FAULTS[name] for name in ("labels shifted by one", "padding in the loss", "smoothed loss")},
    "loss averaged by batch": protocol(token_eval_loss=False),
    "the last batch dropped": protocol(keep_incomplete_batch=False),
}
searched = partial(with_settings, repro.models.generation, "beam_search")
IN_CAPTIONS = {
    "mirrored": FAULTS["mirrored"],  # which moves so small a model's loss very little
    "1 beam": with_settings(NativeCaptioner, "generate", num_beams=1),
    "8 beams": with_settings(NativeCaptioner, "generate", num_beams=8),
    "length penalty 0": searched(length_penalty=0.0),
    "length penalty 2": searched(length_penalty=2.0),
    "captions of at most 12 tokens": searched(max_length=12),
}


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("fault", ["none", *IN_LOSSES, *IN_CAPTIONS])
def test_a_fault_in_scoring_shows_when_an_older_run_is_evaluated_again(fault, runs):
    record = read_record(runs(OWN) / "run")
    record.facts["flags"]["predict_with_generate"] = fault in IN_CAPTIONS  # losses do not need the search
    with planted({**IN_LOSSES, **IN_CAPTIONS, "none": FAULTS["none"]}[fault]):
        problems, _ = evaluated_again(record.folder, record.facts, record.recorded)
    assert bool(problems) == (fault != "none")


SCORERS = {
    "ROUGE without stemming": replaced(PorterStemmer, "stem", lambda _, self, word: word),
    "letters that are not made small": replaced(
        tokenize, "tokenize", lambda _, text, stemmer: [stemmer.stem(word) for word in re.findall("[a-z0-9]+", text)]
    ),
    "every second reference": replaced(
        repro.recipes.integrity,
        "rouge_scores",
        lambda scores, found, wanted: scores(found, [wanted[place - place % 2] for place in range(len(wanted))]),
    ),
}


@pytest.mark.parametrize("fault", SCORERS)
def test_a_fault_in_rouge_shows_in_the_captions_of_an_older_run(fault, copied):
    """With captions that are worth scoring, which so small a model does not generate."""

    def as_if_trained(rows):
        found = [row["label"].replace("circle", "circles").capitalize() for row in rows]
        return [{**row, "pred": caption} for row, caption in zip(rows, [*found[5:], *found[:5]], strict=True)]

    captions(as_if_trained)(copied)
    found = json.loads(next(copied.glob("ckpt_*/eval_generation.json")).read_text())
    means = rouge_scores(*([row[name] for row in found] for name in ("pred", "label"))).means
    both(score(**means), results(**{f"eval_{name}": value for name, value in means.items()}))(copied)
    recorded = read_record(copied).recorded
    assert contradictions(copied, recorded) == []
    with SCORERS[fault]():
        assert "of its captions is" in "\n".join(contradictions(copied, recorded))


def test_what_an_upgrade_has_changed_is_said():
    old, new = (SimpleNamespace(facts={"versions": {"jax": jax, "flax": "0.12.8"}}) for jax in ("0.10.2", "0.12.0.1"))
    assert other_versions([new], [old]) == ["versions: jax 0.10.2 then, 0.12.0.1 now"]
    assert other_versions([new], [new, new]) == []
    assert other_versions([new], [SimpleNamespace(facts={})]) == [
        "versions: jax None then, 0.12.0.1 now; flax None then, 0.12.8 now"
    ]
