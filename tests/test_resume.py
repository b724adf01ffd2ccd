"""A run that was ended goes on as if it had not been, or says why it cannot; and two runs do not meet in one folder."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest

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
from repro.run.train import run

CLASSES = (ModelArguments, DataArguments, TrainingArguments)
CASE = read_case("current_block0")
AUTO = ("--resume", "auto")
ONE_EPOCH = ("--num_train_epochs", "1")
TWO_STEPS = ("--max_train_samples", "8", *ONE_EPOCH)


def flags(folder, *more):
    """Two epochs of eight steps with evaluations, states at steps 3, 6, 8, 9 and so on, and two rows to caption."""
    case = {**CASE, "devices": 2, "args": [*CASE["args"], "--per_device_train_batch_size", "2"]}
    return [*command_line(case, folder), "--save_steps", "3", "--save_total_limit", "20", *more]


def start(folder, *more, num_devices=1, score=None, probe=None):
    parsed = parse_arguments(CLASSES, flags(folder, *more), command="train")
    return run(*parsed, devices=jax.devices()[:num_devices], score=score, probe=probe, progress=False)


def rows(folder):
    """What a run recorded, but for times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in found:
        for entry in (row, row.get("eval", {})):
            for name in ("seconds", "saving_seconds"):
                entry.pop(name, None)
    return found


def facts_of(folder):
    return json.loads((folder / "run.json").read_text())


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "state").iterdir())


def assert_same_run(folder, expected):
    assert json.dumps(rows(folder)) == json.dumps(rows(expected))
    names = sorted(str(path.relative_to(expected)) for path in expected.glob("ckpt_*/*"))
    assert len(names) > 10
    assert names == sorted(str(path.relative_to(folder)) for path in folder.glob("ckpt_*/*"))
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert not list(folder.rglob("*partial*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody ended."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder)
    assert [row["step"] for row in rows(folder) if "loss" in row] == list(range(1, 17))
    return folder


def copy_of(whole, tmp_path, *, up_to=None):
    """A copy of the whole run, or of what it left had it died after the state of a step."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.copytree(whole.parent / "cache", tmp_path / "cache")
    if up_to is not None:
        for path in [*folder.glob("state/*"), *folder.glob("ckpt_*")]:
            if int(path.name.split("_")[-1]) > up_to:
                shutil.rmtree(path)
        facts = facts_of(folder)
        facts.pop("finished")
        (folder / "run.json").write_text(json.dumps(facts))
    return folder


def at_step(number, action):
    """StepLog.add, and an action after a step."""
    original = StepLog.add

    def add(self, step, *arguments, **more):
        original(self, step, *arguments, **more)
        if step == number:
            action()

    return add


def test_a_second_run_of_a_process_traces_nothing_again_whatever_its_seed(tmp_path, monkeypatch):
    start(tmp_path / "first", *TWO_STEPS)
    for module, name in ((repro.training.steps, "row_losses"), (repro.models.generation, "beam_search")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("traced again"))
    start(tmp_path / "other", *TWO_STEPS, "--seed", "2")
    assert rows(tmp_path / "other") != rows(tmp_path / "first")
    with pytest.raises(pytest.fail.Exception, match="traced again"):
        start(tmp_path / "smoothed", *TWO_STEPS, "--label_smoothing_factor", "0.1")


def test_a_run_that_is_stopped_again_and_again_says_why_and_ends_as_one_that_was_not(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    saved = "Interrupted: stopped by {}: the state of step {} is saved, {} goes on from it."
    for more, step, end, reason in (
        ([], 5, lambda: signal.raise_signal(signal.SIGTERM), saved.format("SIGTERM", 5, "--resume auto")),
        (AUTO, 8, lambda: signal.raise_signal(signal.SIGINT), saved.format("SIGINT", 8, "the same command")),
        (AUTO, 12, lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ):
        bar = MagicMock()
        with monkeypatch.context() as patched:
            patched.setattr(StepLog, "add", at_step(step, end))
            patched.setattr("repro.run.step_log.progress_bar", lambda bar=bar, **_: bar)
            with pytest.raises((Interrupted, ZeroDivisionError)):
                start(folder, *more)
        bar.__exit__.assert_called_once()  # or what is said next is on the bar's line
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
        assert facts_of(folder)["stopped"] == reason
        assert "finished" not in facts_of(folder)
        assert f"ERROR - ended: {reason}" in (folder / "log").read_text()
    assert not (folder / "ckpt_epoch_2_step_16").exists()
    facts = start(folder, *AUTO).facts
    assert "stopped" not in facts
    # The evaluation at step 8 was broken off and is done from its state; the error lost what came after the state of 9.
    assert [part["first_step"] for part in facts["parts"]] == [1, 6, 9, 10]
    assert_same_run(folder, whole)


def test_a_run_that_is_ended_before_its_first_step_keeps_what_is_known_of_its_parts(whole, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=8)
    with pytest.raises(Interrupted):
        start(folder, *AUTO, probe=MagicMock(side_effect=Interrupted(signal.SIGTERM, "before the first step.")))
    parts = choose_start(TrainingArguments(resume="auto"), folder).parts
    assert [part["first_step"] for part in parts] == [1, 9]


def test_the_command_line_has_a_status_for_each_end(tmp_path, monkeypatch, capsys):
    for error, status, said in (
        (Interrupted(signal.SIGTERM, "saved."), 143, "stopped by SIGTERM: saved."),
        (Interrupted(signal.SIGINT, "saved."), 130, "stopped by SIGINT: saved."),
        (RunStopped("the disk is full"), 3, "stopped: the disk is full"),
        (InputError("--resume: no"), 2, "error: --resume: no"),
    ):
        monkeypatch.setattr(repro.run.train, "run", MagicMock(side_effect=error))
        assert main(["train", *flags(tmp_path / "run")]) == status
        assert said in capsys.readouterr().err.splitlines()


def test_a_finished_run_is_not_run_again(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("ckpt_*/*")}
    result = start(folder, *AUTO)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("ckpt_*/*")} == before
    last = folder / "ckpt_epoch_2_step_16"
    assert result.metrics == json.loads((last / "eval_results.json").read_text())
    evaluation = result.evaluations["eval"]
    assert evaluation.generations == json.loads((last / "eval_generation.json").read_text())
    assert len(evaluation.image_paths) == len(evaluation.generations)
    assert [path.name for path in models_in(result.folder)] == ["ckpt_epoch_1_step_8", last.name]


def test_half_written_files_cost_nothing_and_a_damaged_state_the_steps_since_the_one_before(whole, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=9)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')  # as a kill leaves it
    (folder / "ckpt_epoch_2_step_16.partial").mkdir()
    largest = max((folder / "state" / "9").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    result = start(folder, *AUTO)
    assert result.facts["parts"][-1]["first_step"] == 9
    assert set(result.evaluations) == {"eval"}
    assert "state of step 9 is corrupt: set aside as 9.corrupt" in (folder / "log").read_text()
    shutil.rmtree(folder / "state" / "9.corrupt")
    assert_same_run(folder, whole)


def test_more_devices_go_on_with_the_same_replicas(whole, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=12)
    text = flags(folder, *AUTO, "--mesh", "data=1,fsdp=2")
    place = text.index("--num_replicas")
    parsed = parse_arguments(CLASSES, text[:place] + text[place + 2 :], command="train")
    facts = run(*parsed, devices=jax.devices()[:4], progress=False).facts
    assert (facts["num_replicas"], facts["mesh"]) == (2, {"data": 1, "fsdp": 2})
    losses, expected = ([row["loss"] for row in rows(place) if "loss" in row] for place in (folder, whole))
    assert losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("step", [8, 12])
def test_a_branch_may_replace_another_run_and_evaluates_where_it_begins(whole, step, tmp_path):
    copied, branch = copy_of(whole, tmp_path), tmp_path / "branch"
    shutil.copytree(whole, branch)
    (branch / "ckpt_epoch_9_step_99").mkdir()
    start(branch, "--resume", str(copied / "state" / str(step)), "--overwrite_output_dir")
    models = [folder for folder in ("ckpt_epoch_1_step_8", "ckpt_epoch_2_step_16") if step == 8 or "16" in folder]
    assert sorted(path.name for path in branch.glob("ckpt_*")) == models
    for model in models:
        assert {path.name for path in (branch / model).iterdir()} >= {"eval_generation.json", "model.safetensors"}
    assert saved_steps(branch)[0] == step  # its own copy
    assert rows(branch) == rows(whole)


def test_a_run_may_branch_off_from_a_folder_of_any_name(whole, tmp_path):
    source, branch = copy_of(whole, tmp_path), tmp_path / "branch"
    for name in ("1", "7", "state"):
        source = source.rename(tmp_path / name)
        for named, step in ((source, 16), (source / "state", 16), (source / "state" / "6", 6)):
            found = choose_start(TrainingArguments(resume=str(named)), branch).found
            assert found is not None, named
            assert (found.step, found.folder) == (step, str(source / "state")), named
    start(branch, "--resume", str(source / "state" / "6"))
    assert_same_run(branch, whole)
    assert (source / "state" / "15").is_dir()


def test_another_run_is_not_gone_on_with(whole, tmp_path, golden_inputs, monkeypatch):
    folder = copy_of(whole, tmp_path)
    inputs = Path(shutil.copytree(golden_inputs, tmp_path / "inputs"))
    other_captions = inputs / "train.jsonl"
    other_captions.write_text(other_captions.read_text().replace('caption": "', 'caption": "Another ', 1))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "run.lock"}
    monkeypatch.setattr(repro.run.train, "build_training", None)  # it must not come so far
    for flag, value, difference in (
        ("learning_rate", 0.5, "--learning_rate: 0.003 then, 0.5 now"),
        ("num_replicas", 1, "num_replicas: 2 then, 1 now"),
        ("protocol", "exact", "protocol name: current then, exact now"),
        ("max_train_samples", 34, "data train kept:"),
        ("max_eval_samples", 24, "data validation kept:"),
        ("train_file", other_captions, r"data train fingerprint: \w+ then, \w+ now"),
    ):
        with pytest.raises(InputError, match=difference):
            start(folder, *AUTO, f"--{flag}", str(value))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "run.lock"} == before


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


def test_what_trains_nothing_cannot_be_resumed_but_evaluates(tmp_path):
    evaluate = ("--do_train", "false")
    assert start(tmp_path / "run", *evaluate).metrics["eval_loss"] > 0
    assert not (tmp_path / "run" / "state").exists()
    with pytest.raises(InputError, match="--resume auto: goes on with training; add --do_train"):
        start(tmp_path / "run", *evaluate, *AUTO)


def test_resume_needs_something_to_go_on_from(whole, tmp_path):
    without_states, folder = copy_of(whole, tmp_path), tmp_path / "pictures"
    shutil.rmtree(without_states / "state")
    folder.mkdir()
    (folder / "holiday.jpg").touch()
    for place, more, message in (
        (folder, AUTO, "holds no state that can be used, but other files"),
        (without_states, AUTO, "holds no state that can be used, but other files"),
        (tmp_path / "other", ("--resume", str(folder)), "holds no state that can be used; give auto, never"),
        (folder, (*AUTO, "--overwrite_output_dir"), "contradict each other"),
        (folder, (), "is not empty; name another folder, or add --resume auto"),
    ):
        with pytest.raises(InputError, match=message):
            start(place, *more)
    assert sorted(path.name for path in folder.iterdir()) == ["holiday.jpg", "run.lock"]
    assert not (tmp_path / "other").exists()
    assert_same_run(without_states, whole)


def test_a_run_that_died_before_its_first_state_starts_anew(whole, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=0)
    start(folder, *AUTO, *TWO_STEPS)
    assert [row["step"] for row in rows(folder)] == [1, 2, 2]
    assert rows(folder)[0]["loss"] == rows(whole)[0]["loss"]
    assert "step 16" not in (folder / "log").read_text()


def test_a_step_that_is_not_finite_ends_the_run_with_its_rows_and_the_state_before(tmp_path, monkeypatch):
    folder, more, original = tmp_path / "run", ("--log_grad_norm", *ONE_EPOCH), StepLog.add

    def poisoned(self, step, metrics, **waited):
        original(self, step, metrics | ({"grad_norm": np.float32("inf")} if step == 8 else {}), **waited)

    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "add", poisoned)
        with pytest.raises(RunStopped, match=r"step 8 is not finite \(.*grad_norm inf.*the state of step 6 is saved"):
            start(folder, *more)
    assert [row["step"] for row in rows(folder)] == list(range(1, 8))
    assert all(row["grad_norm"] > 0 for row in rows(folder))
    report = json.loads((folder / "non_finite.json").read_text())
    assert (report["step"], report["metrics"]["grad_norm"]) == (8, "inf")
    places = [row["row"] for row in report["rows"]]
    assert len(places) == 4
    assert places == sorted(places), "in the order of the file"
    assert all(Path(row["image_path"]).is_file() and row["caption"] for row in report["rows"])
    assert not list(folder.glob("ckpt_*"))
    assert saved_steps(folder) == [3, 6]
    start(folder, *more, *AUTO)
    assert not (folder / "non_finite.json").exists(), "it is not true any more"


def test_save_steps_0_saves_no_state_even_when_it_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(StepLog, "add", at_step(1, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Interrupted, match="no state is saved"):
        start(tmp_path / "run", "--save_steps", "0", *TWO_STEPS)
    assert saved_steps(tmp_path / "run") == []


def test_the_state_of_the_best_evaluation_is_kept_and_not_the_last_one(tmp_path):
    losses = iter([3.0, 1.0, 1.0, 4.0])
    more = ["--save_total_limit", "1", "--metric_for_best_model", "loss", "--eval_steps", "2"]
    start(tmp_path / "run", *more, *ONE_EPOCH, score=lambda _: {"loss": next(losses)})
    assert saved_steps(tmp_path / "run") == [4, 8]  # the first of the two best, and the last to go on from


def test_the_output_folder_is_the_same_run_by_whatever_path_and_forgets_what_came_after_a_state(whole, tmp_path):
    folder, link = copy_of(whole, tmp_path), tmp_path / "link"
    link.symlink_to(folder)
    (tmp_path / "other").mkdir()
    for name in ("run", "link", "link/state", "run/../run", "run/state/16", "link/state/16", "other/../run/state/16"):
        found = choose_start(TrainingArguments(resume=str(tmp_path / name), overwrite_output_dir=True), folder)
        assert (found.step, found.branches_off) == (16, False), name
    start(folder, "--resume", str(link / "state" / "12"), "--overwrite_output_dir")
    assert_same_run(folder, whole)
    shutil.rmtree(folder / "state" / "16")
    shutil.move(folder / "state", tmp_path / "another disk")
    (folder / "state").symlink_to(tmp_path / "another disk")
    for name in ("run/state", "link/state", "run/state/15", "link/state/15"):
        found = choose_start(TrainingArguments(resume=str(tmp_path / name), overwrite_output_dir=True), folder)
        assert (found.step, found.branches_off) == (15, False), name
    start(folder, "--resume", str(link), "--overwrite_output_dir")
    assert_same_run(folder, whole)
    assert {3, 15, 16} <= {*saved_steps(folder)}


def test_a_run_is_not_overwritten_from_inside(whole, tmp_path):
    folder = copy_of(whole, tmp_path, up_to=15)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for place in ("state/15", "ckpt_epoch_1_step_15", "new"):
        with pytest.raises(InputError, match="lies in the run that --resume names"):
            start(folder / place, "--resume", str(folder), "--overwrite_output_dir")
    assert {path: path.read_bytes() for path in before} == before


def test_two_runs_do_not_meet_in_one_folder_nor_in_one_that_is_gone_on_from(whole, tmp_path, monkeypatch):
    copied, branch = copy_of(whole, tmp_path), tmp_path / "branch"
    for folder, more, flag in (
        (branch, AUTO, "--output_dir"),
        (branch, ["--overwrite_output_dir"], "--output_dir"),
        (copied, ["--resume", str(copied / "state" / "6")], "--resume"),
    ):
        with locked(folder), pytest.raises(InputError, match=rf"{flag} {folder}: another run is at work in it"):
            start(branch, *more)
        assert not branch.exists()

    def look(*_):
        with pytest.raises(InputError, match="another run is at work"), locked(copied):
            pass
        raise RunStopped("seen")

    monkeypatch.setattr(repro.run.train, "build_training", look)
    with pytest.raises(RunStopped, match="seen"):
        start(branch, "--resume", str(copied))
    with locked(copied):
        pass


@pytest.mark.parametrize("step", [0, 15])
def test_making_or_restoring_the_state_is_no_training(whole, step, tmp_path, monkeypatch):
    waited_for = []
    monkeypatch.setattr(repro.run.train.jax, "block_until_ready", waited_for.append)
    monkeypatch.setattr(repro.run.train, "StepLog", MagicMock(side_effect=RunStopped("the clock starts")))
    with pytest.raises(RunStopped, match="the clock starts"):
        start(copy_of(whole, tmp_path, up_to=step), *AUTO)
    assert int(waited_for[-1].step) == step


def test_clocks_go_on_through_a_kill_and_count_what_was_lost(tmp_path, monkeypatch):
    folder, more = tmp_path / "run", ("--logging_steps", "1", *ONE_EPOCH)
    slow, original = 0.4, StepLog.add

    def slower(self, step, *arguments, **settings):
        time.sleep(slow if step in (1, 5) else 0)
        original(self, step, *arguments, **settings)
        if step == 5:
            raise SystemExit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "add", slower)
        with pytest.raises(SystemExit, match="killed"):
            start(folder, *more)
    killed_after = read_clock(folder)
    assert killed_after > 2 * slow
    record = json.loads((folder / "state" / "3" / "record" / "metadata").read_text())
    assert slow < record["training_seconds"] < record["seconds"] < killed_after - slow
    branch = choose_start(TrainingArguments(resume=str(folder / "state" / "3")), tmp_path / "branch")
    assert branch.seconds == record["seconds"]
    facts = start(folder, *more, *AUTO).facts
    # Steps 4 and 5 were repeated: what the first try of them took is in the run's time, and not in that of its steps.
    assert facts["seconds"] > killed_after
    assert slow < facts["train_seconds"] < facts["seconds"] - slow
    assert facts["waiting_for_input_seconds"] >= record["waiting_for_input_seconds"] > 0
