"""A run's record is read in one way by all, as far as it is whole; what is damaged is told by its file's name."""

import json
import shutil
from pathlib import Path

import pytest
from synthetic_run import read_data

from repro.__main__ import main
from repro.commands.caption import _checkpoint_of
from repro.config import TrainingArguments
from repro.errors import InputError
from repro.record.record import read_record
from repro.reports.write import write_report
from repro.run.resume import choose_start


@pytest.fixture
def old(tmp_path):
    """What a run of sixteen steps left before there were seconds in its rows, without weights and arrays."""
    return Path(shutil.copytree(Path(__file__).parent / "old_run", tmp_path / "run"))


def change_facts(folder, edit):
    facts = json.loads((folder / "run.json").read_text())
    edit(facts)
    (folder / "run.json").write_text(json.dumps(facts))


def test_an_earlier_versions_run_is_read_verified_reported_and_gone_on_with(old, capsys):
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
    begun = begin(old)
    assert begun.step == 16
    assert begun.recorded.rows == record.recorded.rows
    assert len(begun.parts) == 1


ROWS = [
    *(b"[]", b"3", b"\xff\xfe", b"{}", b'{"step": "1"}', b'{"step": 1e400}', b'{"step": -1, "loss": 1}', b'{"step": 3'),
    *(b'{"step": 8, "eval": %s}' % value for value in (b"3", b"{}", b'{"rows": 1, "seconds": 1, "loss": "x"}')),
    *(b'{"step": 5, "loss": %s}' % value for value in (b'"x"', b"1e400", b"9" * 400, b"[]", b"true")),
]


def assert_told(folder, problem, capsys):
    """Check that the record has a problem, and that whoever reads it says so and concludes nothing."""
    (found,) = read_record(folder).problems
    assert found.startswith(problem)
    assert main(["verify", str(folder), "--recipe", "coco2017"]) == 2
    assert problem in capsys.readouterr().out
    write_report([folder], folder / "report.html")
    assert problem in (folder / "report.html").read_text()


def begin(folder):
    return choose_start(TrainingArguments(output_dir=str(folder), resume="auto"), folder)


def test_a_row_of_another_form_is_told_and_forbids_conclusions(old, capsys):
    file, problem = old / "metrics.jsonl", "metrics.jsonl: 1 line cannot be read"
    lines = file.read_bytes().splitlines()
    for row in ROWS:
        file.write_bytes(b"\n".join([*lines[:4], row, *lines[5:]]))
        assert read_record(old).problems == [problem], row
        with pytest.raises(InputError, match=r"metrics\.jsonl: step 5 is missing or damaged"):
            begin(old)
        file.write_bytes(b"\n".join([*lines, row[:-1] or b"{"]))  # as a kill leaves it
        assert read_record(old).problems == [problem], row
        assert begin(old).step == 16
    assert_told(old, problem, capsys)


def test_damaged_facts_are_told_and_forbid_conclusions(old, capsys):
    file, problem = old / "run.json", "run.json: is damaged, or is not what its name says"
    facts = json.loads(file.read_text())
    contents = [b"", b"[]", b"3", b"\xff", b"{", b"\0" * 99, b'{"num_steps": -1}', b'{"flags": {}}']
    # Which no run takes.
    contents += [json.dumps(facts | {"train_seconds": seconds}).encode() for seconds in (1e300, -1.0, 8.7e13)]
    for content in contents:
        file.write_bytes(content)
        (found,) = read_record(old).problems
        assert found.startswith(problem)
        with pytest.raises(InputError, match=r"run\.json: is damaged; take it away"):
            begin(old)
    assert_told(old, problem, capsys)
    file.unlink()
    assert begin(old).step == 16


def test_a_runs_checkpoint_is_found_whatever_metric_it_names(old):
    for metric in ("loss", "of another version", "search"):
        change_facts(old, lambda facts, metric=metric: facts["flags"].update(metric_for_best_model=metric))
        assert _checkpoint_of(str(old)) == str(old / "ckpt_epoch_2_step_16"), metric


def test_facts_that_lack_something_tell_nothing(old, capsys):
    for name in ("flags", "data", "model", "num_steps"):
        change_facts(old, lambda facts, name=name: facts.pop(name))
        assert main(["verify", str(old), "--recipe", "coco2017"]) == 2
        assert f"run.json: has no {name}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"[]", b'{"name": 3}', b'{"name": "none"}', b"\xff"])
def test_a_recipes_marker_of_another_form_is_named(old, content, capsys):
    (old / "recipe.json").write_bytes(content)
    assert main(["verify", str(old)]) == 2
    assert ("recipe.json" if b"none" not in content else "'none'") in capsys.readouterr().err
    assert main(["reproduce", "coco2017", "--output_dir", str(old), "--dry_run"]) == 2
