"""A run that was ended goes on as if it had not been, or says why it cannot; and two runs do not meet in one folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import repro.models.generation
import repro.run.train
import repro.training.steps
from repro.__main__ import main
from repro.config import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from repro.errors import InputError, Interrupted, RunStopped
from repro.recipes.selftest import command_line, read_case
from repro.record.record import read_clock
from repro.record.writer import locked, models_in
from repro.run.resume import check_same, choose_start
from repro.run.step_log import StepLog
from repro.run.train import RunResult, run

CLASSES = (ModelArguments, DataArguments, TrainingArguments)
CASE = read_case("current_block0")
STEPS = 16


def flags(folder: Path, *more: str) -> list[str]:
    """Two epochs of eight steps with evaluations, states at steps 3, 6, 8, 9 and so on, and two rows to caption."""
    case = {**CASE, "devices": 2, "args": [*CASE["args"], "--per_device_train_batch_size", "2"]}
    return [*command_line(case, folder), "--save_steps", "3", "--save_total_limit", "20", *more]


def start(folder: Path, *more: str, num_devices: int = 1) -> RunResult:
    parsed = parse_arguments(CLASSES, flags(folder, *more), command="train")
    return run(*parsed, devices=jax.devices()[:num_devices], progress=False)


def rows(folder: Path) -> list[str]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in found:
        for entry in (row, row.get("eval", {})):
            for name in ("seconds", "saving_seconds"):
                entry.pop(name, None)
    return [json.dumps(row) for row in found]


def assert_same_run(folder: Path, expected: Path) -> None:
    assert rows(folder) == rows(expected)
    names = sorted(str(path.relative_to(expected)) for path in expected.glob("ckpt_*/*"))
    assert len(names) > 10
    assert names == sorted(str(path.relative_to(folder)) for path in folder.glob("ckpt_*/*"))
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert not list(folder.rglob("*partial*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody ended."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder)
    assert [json.loads(row)["step"] for row in rows(folder) if "loss" in json.loads(row)] == list(range(1, STEPS + 1))
    return folder


def test_a_second_run_of_a_process_traces_nothing_again_whatever_its_seed(whole, tmp_path, monkeypatch):
    start(tmp_path / "first" / "run")
    for module, name in ((repro.training.steps, "row_losses"), (repro.models.generation, "beam_search")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("traced again"))
    start(tmp_path / "again" / "run")
    assert_same_run(tmp_path / "again" / "run", whole)
    start(tmp_path / "other" / "run", "--seed", "2")
    assert rows(tmp_path / "other" / "run") != rows(whole)
    with pytest.raises(pytest.fail.Exception, match="traced again"):
        start(tmp_path / "smoothed" / "run", "--label_smoothing_factor", "0.1")


def copy_of(whole: Path, tmp_path: Path, *, up_to: int | None = None) -> Path:
    """A copy of the whole run, or of what it left had it died after the state of a step."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.copytree(whole.parent / "cache", tmp_path / "cache")
    if up_to is not None:
        for path in [*folder.glob("state/*"), *folder.glob("ckpt_*")]:
            if int(path.name.split("_")[-1]) > up_to:
                shutil.rmtree(path)
        facts = json.loads((folder / "run.json").read_text())
        facts.pop("finished")
        (folder / "run.json").write_text(json.dumps(facts))
    return folder


def at_step(number: int, action: Callable[[], Any]) -> Callable[..., None]:
    """StepLog.add, and an action after a step."""
    original = StepLog.add

    def add(self: StepLog, step: int, *arguments: Any, **more: Any) -> None:
        original(self, step, *arguments, **more)
        if step == number:
            action()

    return add


@pytest.mark.parametrize(("signum", "step"), [(signal.SIGTERM, 5), (signal.SIGINT, 8)], ids=["term", "int"])
def test_a_signal_saves_the_state_and_the_run_goes_on_from_it(whole, signum, step, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "add", at_step(step, lambda: os.kill(os.getpid(), signum)))
        with pytest.raises(Interrupted, match=rf"{signum.name}: the state of step {step} is saved|SIGINT") as caught:
            start(folder)
    assert caught.value.signum == signum
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert str(step) in {path.name for path in (folder / "state").iterdir()}
    assert "finished" not in json.loads((folder / "run.json").read_text())
    result = start(folder, "--resume", "auto")
    assert [part["first_step"] for part in result.facts["parts"]] == [1, step + 1]
    assert_same_run(folder, whole)


def test_a_run_that_is_ended_before_its_first_step_keeps_what_is_known_of_its_parts(whole, tmp_path):
    def probe(_training: Any) -> dict[str, Any]:
        raise Interrupted(signal.SIGTERM, "before the first step.")

    folder = copy_of(whole, tmp_path, up_to=8)
    parsed = parse_arguments(CLASSES, flags(folder, "--resume", "auto"), command="train")
    with pytest.raises(Interrupted):
        run(*parsed, probe=probe, progress=False)
    start(folder, "--resume", "auto")
    parts = json.loads((folder / "run.json").read_text())["parts"]
    assert [part["first_step"] for part in parts] == [1, 9, 9]


def test_the_command_line_has_a_status_for_each_end(tmp_path, monkeypatch, capsys):
    for error, status, said in (
        (Interrupted(signal.SIGTERM, "saved."), 143, "stopped by SIGTERM: saved."),
        (Interrupted(signal.SIGINT, "saved."), 130, "stopped by SIGINT: saved."),
        (RunStopped("the disk is full"), 3, "stopped: the disk is full"),
        (InputError("--resume: no"), 2, "error: --resume: no"),
    ):

        def ends(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(repro.run.train, "run", ends)
        assert main(["train", *flags(tmp_path / "run")]) == status
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("up_to", [3, 8, 15])
def test_a_run_goes_on_after_any_of_its_states(whole, up_to, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=up_to)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')  # killed while it was writing
    (folder / "ckpt_epoch_2_step_16.partial").mkdir()
    result = start(folder, "--resume", "auto")
    assert result.facts["parts"][-1]["first_step"] == up_to + 1
    assert_same_run(folder, whole)
    assert set(result.evaluations) == {"eval"}


def test_a_finished_run_is_not_run_again(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("ckpt_*/*")}
    result = start(folder, "--resume", "auto")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("ckpt_*/*")} == before
    expected = json.loads((folder / "ckpt_epoch_2_step_16" / "eval_results.json").read_text())
    assert result.metrics == expected
    generations = json.loads((folder / "ckpt_epoch_2_step_16" / "eval_generation.json").read_text())
    assert result.evaluations["eval"].generations == generations
    assert len(result.evaluations["eval"].image_paths) == len(generations)
    assert [path.name for path in models_in(result.folder)] == ["ckpt_epoch_1_step_8", "ckpt_epoch_2_step_16"]


def test_an_evaluation_that_was_not_done_is_done_from_the_state(whole, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=8)
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "eval" not in line]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    shutil.rmtree(folder / "ckpt_epoch_1_step_8")
    start(folder, "--resume", "auto")
    assert_same_run(folder, whole)


def test_a_damaged_state_costs_only_the_steps_since_the_one_before(whole, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=9)
    largest = max((folder / "state" / "9").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    result = start(folder, "--resume", "auto")
    assert result.facts["parts"][-1]["first_step"] == 9
    assert (folder / "state" / "9.corrupt").is_dir()
    assert "state of step 9 is corrupt: set aside as 9.corrupt" in (folder / "log").read_text()
    shutil.rmtree(folder / "state" / "9.corrupt")
    assert_same_run(folder, whole)


def test_more_devices_go_on_with_the_same_replicas(whole, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=9)
    text = flags(folder, "--resume", "auto", "--mesh", "data=1,fsdp=2")
    place = text.index("--num_replicas")
    parsed = parse_arguments(CLASSES, text[:place] + text[place + 2 :], command="train")
    result = run(*parsed, devices=jax.devices()[:4], progress=False)
    assert result.facts["num_replicas"] == 2
    assert result.facts["mesh"] == {"data": 1, "fsdp": 2}
    for ours, theirs in zip(rows(folder), rows(whole), strict=True):
        ours, theirs = json.loads(ours), json.loads(theirs)
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_a_run_may_branch_off_into_another_folder(whole, tmp_path):
    copied, branch = copy_of(whole, tmp_path), tmp_path / "branch"
    start(branch, "--resume", str(copied / "state" / "6"))
    assert_same_run(branch, whole)
    assert (copied / "state" / "15").is_dir()


@pytest.mark.parametrize("step", [8, 12])
def test_a_branch_may_replace_another_run_and_evaluates_where_it_begins(whole, step, tmp_path):
    copied, branch = copy_of(whole, tmp_path), tmp_path / "branch"
    shutil.copytree(whole, branch)
    (branch / "ckpt_epoch_9_step_99").mkdir()
    start(branch, "--resume", str(copied / "state" / str(step)), "--overwrite_output_dir")
    assert [path.name for path in branch.glob("ckpt_*")] != []
    assert not (branch / "ckpt_epoch_9_step_99").exists()
    assert min(int(path.name) for path in (branch / "state").iterdir()) == step  # its own copy
    assert rows(branch) == rows(whole)
    for folder in branch.glob("ckpt_*"):
        names = {path.name for path in folder.iterdir()}
        assert {"eval_results.json", "eval_generation.json", "model.safetensors"} <= names


def test_going_back_in_a_folder_forgets_what_came_after(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    start(folder, "--resume", str(folder / "state" / "12"))
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--learning_rate", "0.5"], "learning_rate: 0.003 then, 0.5 now"),
        (["--seed", "7"], "seed: 42 then, 7 now"),
        (["--num_train_epochs", "3"], "num_train_epochs: 2.0 then, 3.0 now"),
        (["--num_replicas", "1"], "num_replicas: 2 then, 1 now"),
        (["--protocol", "exact"], "protocol name: current then, exact now"),
        (["--max_train_samples", "34"], "data train kept:"),
        (["--max_eval_samples", "24"], "data validation kept:"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_run_is_not_gone_on_with(whole, more, difference, tmp_path, monkeypatch):
    folder = copy_of(whole, tmp_path)
    before = sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.name != "run.lock")
    monkeypatch.setattr(repro.run.train, "build_training", None)  # it must not come so far
    with pytest.raises(InputError, match=difference):
        start(folder, "--resume", "auto", *more)
    after = sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.name != "run.lock")
    assert before == after


def test_other_captions_are_other_data(whole, tmp_path, golden_inputs, monkeypatch):
    folder = copy_of(whole, tmp_path)
    inputs = tmp_path / "inputs"
    shutil.copytree(golden_inputs, inputs)
    text = (inputs / "train.jsonl").read_text()
    (inputs / "train.jsonl").write_text(text.replace('caption": "', 'caption": "Another ', 1))
    monkeypatch.setattr(repro.run.train, "build_training", None)
    with pytest.raises(InputError, match=r"data train fingerprint: \w+ then, \w+ now"):
        start(folder, "--resume", "auto", "--train_file", str(inputs / "train.jsonl"))


def test_every_flag_either_may_change_or_is_compared():
    names = {field.name: field.metadata.get("may_change", False) for c in CLASSES for field in dataclasses.fields(c)}
    compared = {name for name, may_change in names.items() if not may_change}
    assert compared == {
        *("dtype", "model_implementation", "max_target_length", "val_max_target_length", "predict_with_generate"),
        *("num_beams", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "num_train_epochs", "warmup_steps"),
        *("seed", "protocol", "max_grad_norm", "caption_metrics"),
    }


def test_every_difference_is_named():
    saved = {"flags": {"seed": 1, "gone": 2}, "data": {"train": {"kept": 3}}, "num_replicas": 8}
    now = {"flags": {"seed": 2}, "data": {"train": {"kept": 3}, "test": {"kept": 1}}, "num_replicas": 4}
    with pytest.raises(InputError) as caught:
        check_same(saved, now)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert lines == ["--gone: 2 then, absent now", "--seed: 1 then, 2 now", "num_replicas: 8 then, 4 now"]


def test_what_trains_nothing_cannot_be_resumed_but_evaluates(golden_inputs, tmp_path):
    text = flags(tmp_path / "run")
    text.remove("--do_train")
    parsed = parse_arguments(CLASSES, text, command="train")
    result = run(*parsed, devices=jax.devices()[:1], progress=False)
    assert result.metrics["eval_loss"] > 0
    assert not (tmp_path / "run" / "state").exists()
    with pytest.raises(InputError, match="--resume auto: goes on with training; add --do_train"):
        run(*parse_arguments(CLASSES, [*text, "--resume", "auto"], command="train"), progress=False)


def test_resume_needs_something_to_go_on_from(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "holiday.jpg").touch()
    with pytest.raises(InputError, match="holds no state that can be used, but other files"):
        start(folder, "--resume", "auto")
    with pytest.raises(InputError, match="holds no state that can be used; give auto, never"):
        start(tmp_path / "other", "--resume", str(folder))
    with pytest.raises(InputError, match="contradict each other"):
        start(folder, "--resume", "auto", "--overwrite_output_dir")
    with pytest.raises(InputError, match="is not empty; name another folder, or add --resume auto"):
        start(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["holiday.jpg", "run.lock"]
    assert not (tmp_path / "other").exists()


def test_a_run_without_states_is_never_started_over_by_resuming(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    shutil.rmtree(folder / "state")
    with pytest.raises(InputError, match="holds no state that can be used"):
        start(folder, "--resume", "auto")
    assert_same_run(folder, whole)


def test_a_run_that_died_before_its_first_state_starts_anew(whole, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=0)
    start(folder, "--resume", "auto")
    assert_same_run(folder, whole)


def test_two_runs_do_not_meet_in_one_folder(tmp_path):
    folder = tmp_path / "run"
    with locked(folder):
        with pytest.raises(InputError, match="another run is at work in it"):
            start(folder, "--resume", "auto")
        with pytest.raises(InputError, match="another run is at work in it"):
            start(folder, "--overwrite_output_dir")
    assert not folder.exists()


def test_a_step_that_is_not_finite_ends_the_run_with_its_rows_and_the_state_before(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    original = repro.run.train.build_training

    def poisoned(prepared: Any) -> Any:
        training = original(prepared)

        def step(state: Any, batch: Any) -> Any:
            following, metrics = training.step(state, batch)
            if int(following.step) == 8:
                metrics = {**metrics, "grad_norm": np.float32("inf")}
            return following, metrics

        return dataclasses.replace(training, step=step)

    monkeypatch.setattr(repro.run.train, "build_training", poisoned)
    with pytest.raises(RunStopped, match=r"step 8 is not finite \(.*grad_norm inf.*the state of step 6 is saved"):
        start(folder, "--log_grad_norm")
    logged = [json.loads(row) for row in rows(folder)]
    assert [row["step"] for row in logged] == list(range(1, 8))
    assert all(row["grad_norm"] > 0 for row in logged)
    report = json.loads((folder / "non_finite.json").read_text())
    assert (report["step"], report["metrics"]["grad_norm"]) == (8, "inf")
    assert len(report["rows"]) == 4
    # The eighth step of an epoch in the order of the file takes the last rows.
    assert [row["row"] for row in report["rows"]] == sorted(row["row"] for row in report["rows"])
    assert all(Path(row["image_path"]).is_file() and row["caption"] for row in report["rows"])
    assert not list(folder.glob("ckpt_*"))
    assert sorted(int(path.name) for path in (folder / "state").iterdir()) == [3, 6]
    monkeypatch.undo()
    start(folder, "--log_grad_norm", "--resume", "auto")
    assert not (folder / "non_finite.json").exists(), "it is not true any more"


def test_save_steps_0_saves_no_state(tmp_path):
    folder = tmp_path / "run"
    start(folder, "--save_steps", "0", "--num_train_epochs", "1")
    assert not list((folder / "state").glob("*"))
    assert load_file(folder / "ckpt_epoch_1_step_8" / "model.safetensors")


def test_the_state_of_the_best_evaluation_is_kept_and_not_the_last_one(tmp_path):
    parsed = parse_arguments(
        CLASSES,
        flags(tmp_path / "run", *("--save_total_limit", "1", "--metric_for_best_model", "loss", "--eval_steps", "4")),
        command="train",
    )
    for way, losses, kept in (("less", [3.0, 1.0, 2.0, 4.0], [8, 16]), ("first", [1.0, 3.0, 1.0, 2.0], [4, 16])):
        scripted = iter(losses)
        args = dataclasses.replace(parsed[-1], output_dir=str(tmp_path / way))
        run(*parsed[:-1], args, devices=jax.devices()[:1], progress=False, score=lambda _: {"loss": next(scripted)})  # noqa: B023
        assert sorted(int(path.name) for path in (tmp_path / way / "state").iterdir()) == kept


NAMES = ["link", "link/state", "run/../run", "other/../run/state/15"]


@pytest.mark.parametrize("name", ["link/state/15", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)])
def test_the_output_folder_is_the_same_run_by_whatever_path(whole, name, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=15)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "other").mkdir()
    for path in (name, *NAMES):
        found = choose_start(TrainingArguments(resume=str(tmp_path / path), overwrite_output_dir=True), folder)
        assert (found.step, found.branches_off) == (15, False), path
    start(folder, "--resume", str(tmp_path / name), "--overwrite_output_dir")
    assert_same_run(folder, whole)
    assert {"3", "15", "16"} <= {path.name for path in (folder / "state").iterdir()}


@pytest.mark.parametrize("place", ["state/15", "ckpt_epoch_1_step_15", "new"])
def test_a_run_is_not_overwritten_from_inside(whole, place, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=15)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="lies in the run that --resume names"):
        start(folder / place, "--resume", str(folder), "--overwrite_output_dir")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path in before} == before


@pytest.mark.parametrize("named", ["run", "link"])
def test_states_on_another_disk_are_still_the_runs_own(whole, named, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=15)
    shutil.move(folder / "state", tmp_path / "scratch")
    (folder / "state").symlink_to(tmp_path / "scratch")
    (tmp_path / "link").symlink_to(folder)
    start(folder, "--resume", str(tmp_path / named), "--overwrite_output_dir")
    assert_same_run(folder, whole)


def test_a_link_to_another_runs_states_is_removed_and_not_the_states(whole, tmp_path):
    other = copy_of(whole, tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "state").symlink_to(other / "state")
    start(folder, "--overwrite_output_dir", "--num_train_epochs", "1")
    assert {"3", "16"} <= {path.name for path in (other / "state").iterdir()}
    assert not (folder / "state").is_symlink()


def test_a_run_folder_may_have_any_name(whole, tmp_path):
    copied = copy_of(whole, tmp_path)
    for name in ("1", "7", "state"):
        source = copied = copied.rename(tmp_path / name)
        for named, step in ((source, 16), (source / "state", 16), (source / "state" / "6", 6)):
            found = choose_start(TrainingArguments(resume=str(named)), tmp_path / "branch").found
            assert found is not None, named
            assert (found.step, found.folder) == (step, str(source / "state")), named
    start(tmp_path / "branch", "--resume", str(source / "state" / "6"))
    assert rows(tmp_path / "branch") == rows(whole)


def test_the_run_that_is_gone_on_from_is_locked(whole, tmp_path, monkeypatch):
    copied, branch = copy_of(whole, tmp_path), tmp_path / "branch"
    with locked(copied), pytest.raises(InputError, match=r"--resume .*: another run is at work in it"):
        start(branch, "--resume", str(copied / "state" / "6"))
    assert not branch.exists()

    def look(*_: object) -> None:
        with pytest.raises(InputError, match="another run is at work"), locked(copied):
            pass
        raise RunStopped("seen")

    monkeypatch.setattr(repro.run.train, "build_training", look)
    with pytest.raises(RunStopped, match="seen"):
        start(branch, "--resume", str(copied))
    with locked(copied):
        pass


def test_a_run_says_in_its_files_why_it_stopped_and_which_command_goes_on(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    for more, how in (([], "--resume auto goes"), (["--resume", "auto"], "the same command goes")):
        with monkeypatch.context() as patched:
            patched.setattr(StepLog, "add", at_step(4 + len(more), lambda: os.kill(os.getpid(), signal.SIGINT)))
            assert main(["train", *flags(folder, *more)]) == 130
        said = f"stopped by SIGINT: the state of step {4 + len(more)} is saved, {how} on from it."
        assert said in capsys.readouterr().err.splitlines()
        assert json.loads((folder / "run.json").read_text())["stopped"].endswith(said)
        assert f"ERROR - ended: Interrupted: {said}" in (folder / "log").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "add", at_step(8, lambda: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            start(folder, "--resume", "auto")
    assert json.loads((folder / "run.json").read_text())["stopped"] == "ZeroDivisionError: division by zero"
    assert "stopped" not in start(folder, "--resume", "auto").facts


def test_the_bar_is_ended_before_anything_is_said(tmp_path, monkeypatch):
    bars = []
    original = StepLog.__init__

    def opened(self: StepLog, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **settings)
        bars.append((self.bar, close := [])) or setattr(self.bar, "close", lambda: close.append(1))

    monkeypatch.setattr(StepLog, "__init__", opened)
    monkeypatch.setattr(StepLog, "add", at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(Interrupted):
        start(tmp_path / "run")
    assert [closed for _, closed in bars] == [[1]]


def test_making_or_restoring_the_state_is_no_training(whole, tmp_path, monkeypatch):
    events: list[str] = []
    original, restore, clock = repro.run.train.build_training, repro.run.train.Checkpoints.restore, StepLog.__init__

    def told(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **settings: [function(*arguments, **settings), events.append(name)][0]

    def watched(prepared: Any) -> Any:
        training = original(prepared)
        return dataclasses.replace(training, create=told("made", training.create))

    monkeypatch.setattr(repro.run.train, "build_training", watched)
    monkeypatch.setattr(repro.run.train.Checkpoints, "restore", told("restored", restore))
    monkeypatch.setattr(repro.run.train.jax, "block_until_ready", told("there", jax.block_until_ready))
    monkeypatch.setattr(StepLog, "__init__", told("clock", clock))
    start(tmp_path / "run", "--num_train_epochs", "1")
    assert events[:3] == ["made", "there", "clock"]
    events.clear()
    start(copy_of(whole, tmp_path / "other", up_to=15), "--resume", "auto")
    assert events[:3] == ["restored", "there", "clock"]


def test_clocks_go_on_through_a_kill_and_count_what_was_lost(tmp_path, monkeypatch):
    folder = tmp_path / "run"

    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    slow = 0.4

    def slower(self: StepLog, step: int, *arguments: Any, original: Any = StepLog.add, **more: Any) -> None:
        time.sleep(slow if step in (1, 5) else 0)
        original(self, step, *arguments, **more)
        if step == 5:
            die()

    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "add", slower)
        with pytest.raises(Killed):
            start(folder, "--logging_steps", "1")
    killed_after = read_clock(folder)
    assert killed_after > 2 * slow
    record = json.loads((folder / "state" / "3" / "record" / "metadata").read_text())
    assert slow < record["training_seconds"] < record["seconds"] < killed_after - slow
    facts = start(folder, "--resume", "auto", "--logging_steps", "1").facts
    # Steps 4 and 5 were repeated: what the first try of them took is in the run's time, and not in that of its steps.
    assert facts["seconds"] > killed_after
    assert slow < facts["train_seconds"] < facts["seconds"] - slow
    assert facts["waiting_for_input_seconds"] >= record["waiting_for_input_seconds"] > 0
    branch = start(tmp_path / "branch", "--resume", str(folder / "state" / "3")).facts
    assert record["seconds"] < branch["seconds"]
