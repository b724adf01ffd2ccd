"""Whatever happens to a JSON file: a cache is made again, a record or model is refused by name, and nothing else."""

import json
import random
import shutil
from contextlib import suppress

import pytest
from damage import mutations
from test_resume import start

import repro.recipes.verify
import repro.reports.write
import repro.run.train
from repro.__main__ import main
from repro.errors import InputError
from repro.models.captioning import Captioner

DONE, REFUSED = 0, 2  # 1 would be a missed target, and a traceback none of them


class Begun(Exception):
    """A run has read all that it reads before it compiles."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, golden_inputs):
    """A finished run, the cache that it made, and the model that it began with."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(golden_inputs / "model", folder / "model")
    start(folder / "run", "--model_name_or_path", str(folder / "model"))
    return folder


def status_of(call):
    """What a command ends with."""
    try:
        found = call()
    except (Begun, InputError) as error:
        return DONE if isinstance(error, Begun) else REFUSED
    return found if isinstance(found, int) else DONE


def begin(whole, *more):
    """Start a run up to where it would compile."""
    return lambda: start(whole / "run", "--model_name_or_path", str(whole / "model"), *more)


def json_files(folder):
    """Files of JSON, whatever their names end with."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        content = path.read_bytes()
        with suppress(ValueError):
            for value in content.splitlines() if path.suffix == ".jsonl" else [content]:
                json.loads(value)
            found.append(path)
    return found


@pytest.mark.parametrize("count", [39, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_damage_to_a_file_is_mended_or_refused_by_name(count, whole, monkeypatch):
    def compile_nothing(*_):
        raise Begun

    record, page = str(whole / "run"), str(whole / "report.html")
    anew = begin(whole, "--output_dir", str(whole / "other"))
    verify, report = ["verify", record, "--recipe", "this"], ["report", record, "--recipe", "this", "--output", page]
    readers = {
        "run": [lambda: main(verify), lambda: main(report), begin(whole, "--resume", "auto")],
        "model": [lambda: Captioner.from_pretrained(str(whole / "model")), anew],
        "cache": [anew],
    }
    recipe = {"name": "this", "flags": json.loads((whole / "run" / "run.json").read_text())["flags"]}
    recipe["targets"] = [
        {"metric": "num_steps", "value": 16, "tolerance": 0, "source": "the run"},
        {"metric": "eval_loss", "high": 100.0, "source": "anything that learns"},
    ]
    monkeypatch.setattr(repro.run.train, "build_training", compile_nothing)
    for module in (repro.recipes.verify, repro.reports.write):
        monkeypatch.setattr(module, "read_recipe", lambda name: recipe)
    draw, kept = random.Random(count), whole.with_name("kept")
    for kind, calls in readers.items():
        assert [status_of(call) for call in calls] == [DONE] * len(calls), "what is whole is read"
        files, statuses = json_files(whole / kind), (DONE,) if kind == "cache" else (DONE, REFUSED)
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
                assert status in statuses, f"{path.relative_to(whole)}: {what}: {status}"
            shutil.rmtree(whole / kind)
            shutil.copytree(kept, whole / kind)
        shutil.rmtree(kept)
