"""Whatever happens to a JSON file: a cache is made again, a record or model is refused by name, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import pytest
from damage import mutations
from test_resume import CLASSES, flags, start

import repro.recipes.verify
import repro.reports.write
import repro.run.train
from repro.__main__ import main
from repro.config import parse_arguments
from repro.errors import InputError
from repro.models.captioning import Captioner
from repro.run.train import run

QUICK, MANY = 60, 2000
STATUSES = (0, 2)
"""Done, or bad input; 1 would be a missed target, and a traceback none of them."""


class Begun(Exception):
    """A run has read all that it reads before it compiles."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, golden_inputs: Path) -> Path:
    """A finished run, the cache that it made, and the model that it began with."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(golden_inputs / "model", folder / "model")
    start(folder / "run", "--model_name_or_path", str(folder / "model"))
    return folder


@pytest.fixture
def recipe(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the finished run, whose targets it meets."""
    given = parse_arguments(
        CLASSES, flags(whole / "run", "--model_name_or_path", str(whole / "model")), command="train"
    )
    wanted = {
        field.name: value
        for part in given
        for field in dataclasses.fields(part)
        if (value := getattr(part, field.name)) not in (None, field.default)
    }
    targets = [
        {"metric": "num_steps", "value": 16, "tolerance": 0, "source": "the run"},
        {"metric": "eval_loss", "high": 100.0, "source": "anything that learns"},
    ]
    made = {"name": "this", "flags": wanted, "targets": targets}
    for module in (repro.recipes.verify, repro.reports.write):
        monkeypatch.setattr(module, "read_recipe", lambda name: made)


def status_of(call: Callable[[], object]) -> int:
    """What a command ends with."""
    try:
        found = call()
    except Begun:
        return 0
    except InputError:
        return 2
    return found if isinstance(found, int) else 0


def begin(whole: Path, *more: str) -> Callable[[], object]:
    """Start a run up to where it would compile."""
    text = flags(whole / "run", "--model_name_or_path", str(whole / "model"), *more)
    return lambda: run(*parse_arguments(CLASSES, text, command="train"), devices=jax.devices()[:1], progress=False)


def readers(whole: Path) -> dict[str, list[Callable[[], object]]]:
    """What reads each folder."""
    record, elsewhere = str(whole / "run"), str(whole / "report.html")
    anew = ("--output_dir", str(whole / "other"))
    return {
        "run": [
            lambda: main(["verify", record, "--recipe", "this"]),
            lambda: main(["report", record, "--recipe", "this", "--output", elsewhere]),
            begin(whole, "--resume", "auto"),
        ],
        "model": [lambda: Captioner.from_pretrained(str(whole / "model")), begin(whole, *anew)],
        "cache": [begin(whole, *anew)],
    }


def json_files(folder: Path) -> list[Path]:
    """Files of JSON, whatever their names end with."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        content = path.read_bytes()
        with suppress(ValueError):
            for value in content.splitlines() if path.suffix == ".jsonl" else [content]:
                json.loads(value)
            found.append(path)
    return found


def check_damage(whole: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage one file after another, and read it."""

    def compile_nothing(*_: object) -> None:
        raise Begun

    monkeypatch.setattr(repro.run.train, "build_training", compile_nothing)
    draw, kept = random.Random(count), whole.with_name("kept")
    for kind, calls in readers(whole).items():
        assert [status_of(call) for call in calls] == [0] * len(calls), "what is whole is read"
        files = json_files(whole / kind)
        assert len(files) > 3
        shutil.copytree(whole / kind, kept, dirs_exist_ok=True)
        for _ in range(count // 3 + 1):
            path = draw.choice(files)
            what, content = mutations(draw, path.read_bytes(), lines=path.suffix == ".jsonl")
            path.write_bytes(content)
            for number, call in enumerate(calls):
                try:
                    status = status_of(call)
                except BaseException as error:
                    raise AssertionError(f"{path.relative_to(whole)}: {what}: {kind} {number}: {error!r}") from error
                assert status in (STATUSES if kind != "cache" else (0,)), f"{path.relative_to(whole)}: {what}: {status}"
            shutil.rmtree(whole / kind)
            shutil.copytree(kept, whole / kind)
        shutil.rmtree(kept)


@pytest.mark.usefixtures("recipe")
def test_any_damage_to_a_file_is_mended_or_refused_by_name(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_damage(whole, QUICK, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("recipe")
def test_two_thousand_damages_are_mended_or_refused_by_name(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_damage(whole, MANY, monkeypatch)
