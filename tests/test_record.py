"""A run's record is read in one way by all, as far as it is whole; what is damaged is told by its file's name."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import mutations
from synthetic_run import read_data, write_run

from repro.__main__ import main
from repro.commands.caption import _checkpoint_of
from repro.config import TrainingArguments
from repro.errors import InputError
from repro.recipes import recipe_names
from repro.record.record import read_record
from repro.record.writer import RunWriter, holds_only_run_files, models_in
from repro.reports.write import write_report
from repro.run.resume import choose_start

OLD = Path(__file__).parent / "old_run"
"""What a run of sixteen steps left before there were seconds in its rows, without weights and arrays."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def change(folder: Path, name: str, edit: Any) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def test_an_earlier_versions_run_is_read_verified_reported_and_gone_on_with(old: Path, capsys) -> None:
    record = read_record(old)
    assert record.problems == []
    assert [row["step"] for row in record.recorded.steps] == list(range(1, 17))
    assert list(record.recorded.evaluations("eval")) == [8, 16]
    assert record.facts["num_steps"] == 16
    assert main(["verify", str(old), "--recipe", "coco2017"]) == 2
    said = capsys.readouterr().out
    assert "the recipe has" in said
    assert "not as the run left it" not in said
    assert "run.json: has no" not in said
    assert "has no checksum of ckpt_epoch_2_step_16/flax_model.msgpack" in said
    write_report([old], old / "report.html")
    page = (old / "report.html").read_text()
    assert [chart["key"] for chart in read_data(page)["charts"]] == ["loss", "learning_rate"]
    for step, loss in ((8, "5.1"), (16, "4.831")):
        assert f'data-name="step {step}">{loss}</td>' in page
    begun = choose_start(TrainingArguments(output_dir=str(old), resume="auto"), old)
    assert begun.step == 16
    assert begun.recorded.rows == record.recorded.rows
    assert len(begun.parts) == 1


ROWS = [
    *(b"[]", b"3", b"\xff\xfe", b"{}", b'{"step": "1"}', b'{"step": 1e400}', b'{"step": -1, "loss": 1}', b'{"step": 3'),
    *(b'{"step": 8, "eval": %s}' % value for value in (b"3", b"{}", b'{"rows": 1, "seconds": 1, "loss": "x"}')),
    *(b'{"step": 5, "loss": %s}' % value for value in (b'"x"', b"1e400", b"9" * 400, b"[]", b"true")),
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_row_of_another_form_is_told_and_forbids_conclusions(old: Path, row: bytes, capsys) -> None:
    lines = (old / "metrics.jsonl").read_bytes().splitlines()
    for place, text in ((4, row), (len(lines), row[:-1] or b"{")):
        (old / "metrics.jsonl").write_bytes(b"\n".join([*lines[:place], text, *lines[place + 1 :]]))
        assert main(["verify", str(old), "--recipe", "coco2017"]) == 2
        assert "metrics.jsonl: 1 line cannot be read" in capsys.readouterr().out
        write_report([old], old / "report.html")
        assert "metrics.jsonl: 1 line cannot be read" in (old / "report.html").read_text()
        args = TrainingArguments(output_dir=str(old), resume="auto")
        if place == 4:
            with pytest.raises(InputError, match=r"metrics\.jsonl: step 5 is missing or damaged"):
                choose_start(args, old)
        else:  # as a kill leaves it
            assert choose_start(args, old).step == 16


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"\xff", b"{", b"\0" * 99, b'{"num_steps": -1}', b'{"flags": {}}']
)
def test_damaged_facts_are_told_and_forbid_conclusions(old: Path, content: bytes, capsys) -> None:
    (old / "run.json").write_bytes(content)
    assert main(["verify", str(old), "--recipe", "coco2017"]) == 2
    assert "run.json: is damaged, or is not what its name says" in capsys.readouterr().out
    write_report([old], old / "report.html")
    assert "run.json: is damaged" in (old / "report.html").read_text()
    with pytest.raises(InputError, match=r"run\.json: is damaged; take it away"):
        choose_start(TrainingArguments(output_dir=str(old), resume="auto"), old)
    (old / "run.json").unlink()
    assert choose_start(TrainingArguments(output_dir=str(old), resume="auto"), old).step == 16


@pytest.mark.parametrize("metric", ["loss", "of another version", "search"])
def test_a_runs_checkpoint_is_found_whatever_metric_it_names(old: Path, metric: str) -> None:
    change(old, "run.json", lambda facts: facts["flags"].update(metric_for_best_model=metric))
    assert _checkpoint_of(str(old)) == str(old / "ckpt_epoch_2_step_16")


@pytest.mark.parametrize("seconds", [1e300, -1.0, 8.7e13])
def test_seconds_that_no_run_takes_are_told(old: Path, seconds: float) -> None:
    change(old, "run.json", lambda facts: facts.update(train_seconds=seconds))
    write_report([old], old / "report.html")
    assert "run.json: is damaged" in (old / "report.html").read_text()


@pytest.mark.parametrize("name", ["flags", "data", "model", "num_steps"])
def test_facts_that_lack_something_tell_nothing(old: Path, name: str, capsys) -> None:
    change(old, "run.json", lambda facts: facts.pop(name))
    assert main(["verify", str(old), "--recipe", "coco2017"]) == 2
    assert f"run.json: has no {name}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"[]", b'{"name": 3}', b'{"name": "none"}', b"\xff"])
def test_a_recipes_marker_of_another_form_is_named(old: Path, content: bytes, capsys) -> None:
    (old / "recipe.json").write_bytes(content)
    assert main(["verify", str(old)]) == 2
    assert ("recipe.json" if b"none" not in content else "'none'") in capsys.readouterr().err
    for name in recipe_names():
        assert main(["reproduce", name, "--output_dir", str(old), "--dry_run"]) == 2


def test_only_what_a_run_names_so_is_a_model(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [("a.jpg", "a dog", "a dog")])
    others = ["ckpt_epoch_1_step_8.bak", "ckpt_epoch_1_step_2²", "ckpt_epoch_x_step_1", "ckpt_epoch_1_step_"]
    for name in others:
        shutil.copytree(folder / "ckpt_epoch_1_step_40", folder / name)
    assert [path.name for path in models_in(folder)] == ["ckpt_epoch_1_step_40"]
    assert not holds_only_run_files(folder)
    write_report([folder], folder / "report.html")
    with RunWriter(folder):
        pass
    assert {path.name for path in folder.glob("ckpt_*")} == set(others), "somebody else's are not removed"


def test_any_damage_to_a_record_is_told_or_harmless(old: Path) -> None:
    draw, whole = random.Random(0), {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    files = [path for path in whole if path.name != "metadata"]
    for _ in range(60):
        path = draw.choice(files)
        what, content = mutations(draw, whole[path], lines=path.suffix == ".jsonl")
        path.write_bytes(content)
        assert main(["verify", str(old), "--recipe", "coco2017"]) == 2, (path, what)
        path.write_bytes(whole[path])
