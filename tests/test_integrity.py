"""Finished runs that were tampered with, by accident or otherwise: none passes without a word."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score import tokenize
from test_verify import OWN, runs

import repro.models.captioner
import repro.models.generation
import repro.recipes.integrity
import repro.run.settings
import repro.run.train
import repro.training.steps
from repro.__main__ import main
from repro.data.atomic import sha256_of
from repro.evaluation import rouge
from repro.recipes.integrity import other_versions
from repro.recipes.verify import verify
from repro.record.record import digest_of
from repro.record.writer import checked_files, models_in

__all__ = ["runs"]  # the fixture of finished reproductions


@pytest.fixture
def copied(runs: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished run to spoil."""
    return Path(shutil.copytree(runs(OWN), tmp_path / "copy")) / "run"


def facts_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def change_facts(run: Path, **changed: Any) -> None:
    """Put values in `run.json`, a mapping into what is there, and its checksum; take those out that are None."""
    facts = facts_of(run)
    for name, value in changed.items():
        facts[name] = {**facts[name], **value} if isinstance(value, dict) else value
    facts = {name: value for name, value in facts.items() if name not in changed or value is not None}
    if "checksums" in facts:
        facts["checksums"]["run.json"] = digest_of(facts)
    (run / "run.json").write_text(json.dumps(facts))


def change_rows(run: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Change `metrics.jsonl`, and its checksum with it."""
    path = run / "metrics.jsonl"
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sign(run)


def sign(run: Path) -> None:
    """Renew all checksums."""
    sums = {path.relative_to(run).as_posix(): sha256_of(path) for path in checked_files(run)}
    facts = facts_of(run)
    (run / "run.json").write_text(json.dumps({**facts, "checksums": sums}))


def change_file(run: Path, pattern: str, change: Callable[[Any], Any]) -> None:
    (path,) = run.glob(pattern)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    sign(run)


def with_row(rows: list[dict[str, Any]], step: int, **changed: Any) -> list[dict[str, Any]]:
    return [{**row, **changed} if row["step"] == step and "loss" in row else row for row in rows]


def with_score(steps: list[dict[str, Any]], **changed: Any) -> list[dict[str, Any]]:
    return [{**row, "eval": {**row["eval"], **changed}} if "eval" in row else row for row in steps]


def drop_checksum(run: Path, part: str) -> None:
    sums = facts_of(run)["checksums"]
    (name,) = (name for name in sums if name.endswith(part))
    change_facts(run, checksums={})
    facts = facts_of(run)
    (run / "run.json").write_text(json.dumps({**facts, "checksums": {n: s for n, s in sums.items() if n != name}}))


def swap_weights(run: Path) -> None:
    path = models_in(run)[-1] / "flax_model.msgpack"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


# What may not vary, and two flags that may, with the value that is put in the place of the run's.
FLAGS: dict[str, tuple[str, Any]] = {
    "another learning rate": ("learning_rate", 1.0),
    "another batch": ("per_device_train_batch_size", 3),
    "another protocol": ("protocol", "current"),
    "another precision": ("dtype", "bfloat16"),
    "another number of beams": ("num_beams", 1),
    "a start from trained weights": ("model_name_or_path", "trained"),
    "an encoder from trained weights": ("encoder_model_name_or_path", "trained"),
    "fewer rows evaluated": ("max_eval_samples", 10),
    "fewer rows trained on": ("max_train_samples", 60),
    "not trained": ("do_train", False),
    "a harmless flag": ("gradient_checkpointing", True),
    "other data sets named": ("train_file", "mine.csv"),
}


Spoil = Callable[[Path], Any]


def facts(**changed: Any) -> Spoil:
    return lambda run: change_facts(run, **changed)


def split(name: str, **changed: Any) -> Spoil:
    return lambda run: change_facts(run, data={name: {**facts_of(run)["data"][name], **changed}})


def rows(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Spoil:
    return lambda run: change_rows(run, change)


def file(name: str, change: Callable[[Any], Any]) -> Spoil:
    return lambda run: change_file(run, f"ckpt_*/eval_{name}.json", change)


def both(*spoils: Spoil) -> Spoil:
    return lambda run: [spoil(run) for spoil in spoils]


def without_checksum(part: str) -> Spoil:
    return lambda run: drop_checksum(run, part)


def without_weights(run: Path) -> None:
    (models_in(run)[-1] / "flax_model.msgpack").unlink()


MANIPULATIONS: dict[str, tuple[Spoil, str]] = {
    "a copy with its seed edited": (facts(flags={"seed": 8}), "has the losses of seed 42"),
    **{
        name: (facts(flags={flag: value}), f"--{flag} {value}, the recipe has") for name, (flag, value) in FLAGS.items()
    },
    "order of the file": (facts(shuffle=False), "decides whether rows are shuffled"),
    "rows dropped": (split("train", kept=119), "training rows"),
    "other training data": (split("train", fingerprint="0123456789abcdef"), "training rows' fingerprint"),
    "other validation data": (split("validation", fingerprint="0123456789abcdef"), "validation rows' fingerprint"),
    "five times the parameters": (facts(model={"parameters": 5_000_000}), "parameters"),
    "64 rows evaluated": (rows(lambda all_: with_score(all_, rows=8)), "of 8 rows"),
    "a step is missing": (rows(lambda all_: all_[:8] + all_[9:]), "19 of 20 steps"),
    "steps in another order": (rows(lambda all_: [*all_[1::-1], *all_[2:]]), "not in order"),
    "a step twice": (rows(lambda all_: [all_[0], *all_]), "not in order"),
    "the last steps are missing": (rows(lambda all_: all_[:10] + all_[20:]), "10 of 20 steps"),
    "NaN after the compared steps": (
        rows(lambda all_: with_row(all_, 15, loss=float("nan"))),
        "the loss of step 15 is not finite",
    ),
    "another first loss": (rows(lambda all_: with_row(all_, 1, loss=1.0)), "loss"),
    "a better score in metrics.jsonl": (rows(lambda all_: with_score(all_, loss=5.9)), "metrics.jsonl has 5.9"),
    "a better score in the results": (
        file("results", lambda found: {**found, "eval_loss": 0.1}),
        "eval_loss is 0.1",
    ),
    "a better ROUGE in both": (
        both(
            rows(lambda all_: with_score(all_, rouge2=99.0)),
            file("results", lambda found: {**found, "eval_rouge2": 99.0}),
        ),
        "rouge2 of its captions",
    ),
    "other captions": (
        file("generation", lambda all_: [{**row, "pred": row["label"]} for row in all_]),
        "rouge1 of its captions is 100",
    ),
    "captions that are none": (file("generation", lambda _: {"a": 1}), "its results and captions cannot be read"),
    "captions left out": (file("generation", lambda all_: all_[:20]), "20 captions, of 40 rows"),
    "no evaluation": (rows(lambda all_: all_[:-1]), "not measured"),
    "results without their checksum": (without_checksum("eval_results.json"), "no checksum of ckpt_"),
    "captions without their checksum": (without_checksum("generation.json"), "no checksum of ckpt_"),
    "metrics without their checksum": (without_checksum("metrics.jsonl"), "no checksum of metrics.jsonl"),
    "weights without their checksum": (without_checksum(".msgpack"), "no checksum of ckpt_"),
    "no checksums": (facts(checksums=None), "no checksums"),
    "facts edited by hand": (
        lambda run: (run / "run.json").write_text(json.dumps({**facts_of(run), "train_seconds": 1.0})),
        "run.json is not as the run left it",
    ),
    "a changed checkpoint": (swap_weights, "flax_model.msgpack is not as the run left it"),
    "a checkpoint is gone": (without_weights, "flax_model.msgpack is not as the run left it"),
    "a checkpoint is gone, and its checksum": (both(without_weights, sign), "no checksum of ckpt_"),
    "not finished": (facts(finished=None), "the run is not finished"),
}


NOTED = ("a harmless flag", "other data sets named")  # whose content is the same, by its fingerprint


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_no_manipulation_passes_without_a_word(
    name: str, runs: Callable[..., Path], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = MANIPULATIONS[name]
    spoil(copied)
    status = main(["verify", str(copied.parent)])
    printed = capsys.readouterr().out
    if name in NOTED:
        assert status == 0
    else:
        assert status in (1, 2)
        assert "PASS:" not in printed
    told = [line for line in printed.splitlines() if "note:" in line or "cannot tell:" in line or "  PASS" not in line]
    assert said in "\n".join(told)


@pytest.mark.parametrize("copies", [2, 8])
def test_one_run_under_several_seeds_is_one_run(
    copies: int, runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for seed in range(100, 100 + copies):
        folders.append(Path(shutil.copytree(runs(1), tmp_path / str(seed))))
        change_facts(folders[-1] / "run", flags={"seed": seed})
    assert main(["verify", *map(str, folders)]) == 2
    assert "have the same losses, so they are one run" in capsys.readouterr().out
    # Nor is another seed of the new runs one of the old ones.
    assert main(["verify", str(folders[0]), str(runs(2)), "--against", str(runs(1)), str(runs(3))]) == 2
    assert "seeds 1, 100 have the same losses" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("data", {"data": {"train": {"kept": 120, "dropped": 0, "images": 24, "fingerprint": "another"}}}),
        ("steps", {"num_steps": 21}),
        ("parameters", {"model": {"parameters": 7}}),
        ("counts", {"data": {"train": {"kept": 119, "dropped": 1, "images": 24, "fingerprint": "another"}}}),
        ("models", {"model": {"fingerprint": "another"}}),
    ],
)
def test_old_and_new_runs_have_the_same_data_counts_and_model(
    what: str, changed: dict[str, Any], runs: Callable[..., Path], copied: Path
) -> None:
    change_facts(copied, **changed)
    found = verify([runs(1), runs(2)], reference=[runs(3), copied.parent])
    assert found.verdict == "CANNOT TELL"
    assert any(f"of different {what}" in problem for problem in found.problems)


def test_floors_and_counts_hold_for_new_runs_too(runs: Callable[..., Path], copied: Path) -> None:
    reference = [runs(3), runs(4)]
    for run in (
        copied,
        *(Path(shutil.copytree(path, copied.parent.with_name(path.name))) / "run" for path in reference),
    ):
        split("train", kept=119)(run)
    found = verify([copied.parent], reference=[copied.parent.with_name(path.name) for path in reference])
    assert {outcome.target.metric for outcome in found.outcomes if outcome.verdict == "FAIL"} == {"train_rows"}


def test_weights_that_are_evaluated_again_belong_to_the_scores(
    runs: Callable[..., Path], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run's weights, with checksums of their own."""
    assert main(["verify", str(copied.parent), "--recompute"]) == 0
    assert "evaluated again: loss" in capsys.readouterr().out
    other, own = models_in(runs(1) / "run")[-1], models_in(copied)[-1]
    for name in ("flax_model.msgpack", "model.safetensors"):
        shutil.copy(other / name, own / name)
    sign(copied)
    assert main(["verify", str(copied.parent), "--no-recompute"]) == 0
    capsys.readouterr()
    assert main(["verify", str(copied.parent), "--recompute"]) == 2
    assert "loss of its weights is" in capsys.readouterr().out
    shutil.rmtree(copied.parent / "data")
    change_facts(copied, flags={"data_dir": str(copied.parent / "data")})
    assert main(["verify", str(copied.parent), "--recompute"]) == 0
    assert "not evaluated again" in capsys.readouterr().out


# What a change of this code, or of a library below it, could plant into the scoring of one and the same weights.

Plant = Callable[[pytest.MonkeyPatch], None]
MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 1, 1, 3)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 1, 1, 3)


def replaced(place: Any, name: str, change: Callable[..., Any]) -> Plant:
    """Put `change` in the place of a function, which it gets before the function's own arguments."""
    original = getattr(place, name)
    return lambda patch: patch.setattr(place, name, lambda *args, **more: change(original, *args, **more))


def other_protocol(**changed: Any) -> Plant:
    return replaced(
        repro.run.settings, "protocol_named", lambda named, text: dataclasses.replace(named(text), **changed)
    )


def other_search(**changed: Any) -> Plant:
    return replaced(
        repro.models.generation, "beam_search", lambda search, *args, **more: search(*args, **{**more, **changed})
    )


def other_beams(count: int) -> Plant:
    return replaced(
        repro.models.captioner.NativeCaptioner,
        "generate",
        lambda generate, *args, **more: generate(*args, **{**more, "num_beams": count}),
    )


def other_pixels(change: Callable[[Any], Any]) -> Plant:
    """Change what the encoder sees, -1 to 1."""
    return replaced(repro.models.captioner, "normalize", lambda normalize, *args: change(normalize(*args)))


def other_losses(change: Callable[..., Any]) -> Plant:
    return replaced(repro.training.steps, "row_losses", change)


FAULTS: dict[str, Plant] = {
    "1 beam": other_beams(1),
    "8 beams": other_beams(8),
    "length penalty 0": other_search(length_penalty=0.0),
    "length penalty 2": other_search(length_penalty=2.0),
    "captions of at most 12 tokens": other_search(max_length=12),
    "pictures mirrored": other_pixels(lambda pixels: pixels[:, :, ::-1]),
    "BGR for RGB": other_pixels(lambda pixels: pixels[..., ::-1]),
    "ImageNet's normalization": other_pixels(lambda pixels: ((pixels + 1) / 2 - MEAN) / STD),
    "no normalization": other_pixels(lambda pixels: (pixels + 1) / 2),
    "loss averaged by batch": other_protocol(token_eval_loss=False),
    "the last batch dropped": other_protocol(keep_incomplete_batch=False),
    "labels shifted by one": other_losses(
        lambda losses, logits, labels, mask, **more: losses(logits, jnp.roll(labels, 1, axis=-1), mask, **more)
    ),
    "padding in the loss": other_losses(
        lambda losses, logits, labels, mask, **more: losses(logits, labels, jnp.ones_like(mask), **more)
    ),
    "a smoothed loss": other_losses(lambda losses, *args, **more: losses(*args, **{**more, "label_smoothing": 0.1})),
}


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_scoring_shows_when_an_older_run_is_evaluated_again(
    fault: str, runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FAULTS[fault](monkeypatch)
    assert main(["verify", str(runs(OWN)), "--recompute"]) == 2
    assert re.search(r"(of its weights|of its captions) is", capsys.readouterr().out)


SCORERS: dict[str, Plant] = {
    "ROUGE without stemming": replaced(PorterStemmer, "stem", lambda _, self, word: word),
    "letters that are not made small": replaced(
        tokenize,
        "tokenize",
        lambda _, text, stemmer: [stemmer.stem(word) for word in re.findall("[a-z0-9]+", text)],
    ),
    "every second reference": replaced(
        repro.recipes.integrity,
        "rouge_scores",
        lambda score, found, wanted, **more: score(found, [wanted[place - place % 2] for place in range(40)], **more),
    ),
}


@pytest.mark.parametrize("fault", SCORERS)
def test_a_fault_in_rouge_shows_in_the_captions_of_an_older_run(
    fault: str, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With captions that are worth scoring, which so small a model does not generate."""

    def as_if_trained(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        found = [row["label"].replace("circle", "circles").capitalize() for row in rows]
        return [{**row, "pred": pred} for row, pred in zip(rows, [*found[5:], *found[:5]], strict=True)]

    change_file(copied, "ckpt_*/eval_generation.json", as_if_trained)
    rows = json.loads(next(copied.glob("ckpt_*/eval_generation.json")).read_text())
    means = rouge.rouge_scores([row["pred"] for row in rows], [row["label"] for row in rows]).means
    change_rows(copied, lambda steps: with_score(steps, **means))
    results = {f"eval_{name}": value for name, value in means.items()}
    change_file(copied, "ckpt_*/eval_results.json", lambda found: {**found, **results})
    command = ["verify", str(copied.parent), "--no-recompute"]
    assert main(command) == 0
    capsys.readouterr()
    SCORERS[fault](monkeypatch)
    assert main(command) == 2
    assert "of its captions is" in capsys.readouterr().out


def test_what_an_upgrade_has_changed_is_said() -> None:
    old, new = (SimpleNamespace(facts={"versions": {"jax": jax, "flax": "0.12.8"}}) for jax in ("0.10.2", "0.12.0.1"))
    assert other_versions([new], [old]) == ["versions: jax 0.10.2 then, 0.12.0.1 now"]
    assert other_versions([new], [new, new]) == []
    assert other_versions([new], [SimpleNamespace(facts={})]) == [
        "versions: jax None then, 0.12.0.1 now; flax None then, 0.12.8 now"
    ]
