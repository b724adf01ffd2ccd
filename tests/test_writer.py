"""A run's files: any caption survives them, nothing else in the folder is touched."""

import io
import json
import logging
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from repro.errors import InputError
from repro.evaluation.evaluator import Evaluation
from repro.json_files import write_json
from repro.record.writer import RunWriter, check_output_dir, locked, models_in, prefixed
from repro.run.step_log import StepLog

# Control characters and lone surrogates ("Cs") included.
any_text = st.text(st.characters(exclude_categories=()))


def evaluation(generations=(), images=(), **metrics):
    paths, ids = ([path for path, _ in images], [image_id for _, image_id in images])
    return Evaluation(metrics, {"rows": 2}, generations=list(generations), image_paths=paths, image_ids=ids)


def write(folder, found, *, prefix="eval", at=""):
    """Write an evaluation at step 7 to a folder of a run."""
    with RunWriter(folder) as writer:
        writer.evaluation(prefix, found, step=7, folder=folder / at, seconds=1.5)


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_tensorboard(folder):
    """What was written at which steps, by name, from records of length uint64, crc uint32, an Event and crc uint32."""
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value or value.image))
    return found


@settings(max_examples=25)
@given(any_text, any_text)
def test_any_caption_survives_every_file_of_a_run(caption, prediction):
    dropped = {"split": "train", "row": 3, "image_path": caption, "caption": caption, "reason": prediction}
    generation = {"label": caption, "pred": prediction}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with RunWriter(folder) as writer:
            writer.describe({"command": [caption], caption: 1}, [dropped, dropped])
            writer.evaluation("eval", evaluation([generation], loss=1.0), step=1, folder=folder / "at", seconds=0.1)
        assert json.loads((folder / "run.json").read_text(encoding="utf-8")) == {"command": [caption], caption: 1}
        assert read_lines(folder / "dropped.jsonl") == [dropped, dropped]
        written = json.loads((folder / "at" / "eval_generation.json").read_text(encoding="utf-8"))
        assert written == [generation]


def test_readable_text_is_not_escaped_and_stays_whole_when_another_value_cannot_be_written(tmp_path):
    write_json(tmp_path / "value.json", ["ein Bär 熊"])
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", [object()])
    assert "ein Bär 熊" in (tmp_path / "value.json").read_text(encoding="utf-8")


def test_a_folder_is_accepted_that_is_new_or_empty_or_may_be_overwritten_and_is_left_as_it_is(tmp_path):
    for overwrite in (False, True):
        check_output_dir(tmp_path, overwrite=overwrite)
        check_output_dir(tmp_path / "new", overwrite=overwrite)
    assert snapshot(tmp_path) == {}
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="--overwrite_output_dir"):
        check_output_dir(tmp_path, overwrite=False)
    check_output_dir(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="no file can be written there"), locked(tmp_path / "thesis.tex"):
        pass
    assert snapshot(tmp_path) == {"thesis.tex": b"years of work"}


def test_overwriting_removes_what_a_run_writes_and_nothing_else(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "another run's states"
    mine = ["thesis.tex", "notes/run.json", "ckpt_backup/flax_model.msgpack", "flax_model.msgpack", "metrics.csv"]
    mine += [f"ckpt_epoch_{name}/config.json" for name in ("1_step_8.bak", "1_step_2²", "x_step_1", "1_step_")]
    old = ["eval_results.json", "test_generation.json", "dropped.jsonl", "ckpt_epoch_1_step_5/flax_model.msgpack"]
    old += ["events.out.tfevents.1.host", "run.json"]
    for name in mine + old:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    (folder / "log").write_text("an older run")
    (other / "16").mkdir(parents=True)
    (folder / "state").symlink_to(other)
    assert [path.name for path in models_in(folder)] == ["ckpt_epoch_1_step_5"]
    with RunWriter(folder):
        pass
    kept = snapshot(folder)
    assert {name: kept[name] for name in mine} == {name: name.encode() for name in mine}
    assert not {*old, "ckpt_epoch_1_step_5", "state"} & set(kept)
    assert b"an older run" not in kept["log"]
    assert (other / "16").is_dir(), "the link is removed, and not what it leads to"


def test_results_have_the_examples_names_and_six_decimals(tmp_path):
    metrics = {"loss": 2.01534567, "rouge1": 40.0, "gen_len": 1 / 3}
    write(tmp_path, evaluation(**metrics), at="ckpt_epoch_1_step_7")
    written = json.loads((tmp_path / "ckpt_epoch_1_step_7" / "eval_results.json").read_text())
    assert written == {"eval_loss": 2.015346, "eval_rouge1": 40.0, "eval_gen_len": 0.333333}
    assert written == prefixed("eval", metrics)
    assert not (tmp_path / "ckpt_epoch_1_step_7" / "eval_generation.json").exists()


def test_captions_are_also_written_as_cocos_servers_take_them(tmp_path):
    rows = [{"label": "a", "pred": "x"}, {"label": "b", "pred": "x"}, {"label": "c", "pred": "y"}]
    images = [("val/9.jpg", "9"), ("val/9.jpg", "9"), ("val/3.jpg", "3")]
    write(tmp_path, evaluation(rows, images), prefix="test")
    written = json.loads((tmp_path / "test_captions.json").read_text())
    assert written == [{"image_id": 9, "caption": "x"}, {"image_id": 3, "caption": "y"}]
    write(tmp_path / "no numbers", evaluation(rows, [*images[:2], ("b.jpg", "b.jpg")]))
    assert not (tmp_path / "no numbers" / "eval_captions.json").exists()


def test_a_split_names_its_images_once(tmp_path):
    named, file = {"image_path": ["a.jpg", "a.jpg", "b\n.jpg"], "image_id": list("112")}, tmp_path / "eval_images.json"
    with RunWriter(tmp_path) as writer:
        writer.images("eval", *named.values())
        written = file.stat()
        writer.images("eval", *named.values())
    assert file.stat().st_mtime_ns == written.st_mtime_ns
    assert json.loads(file.read_text()) == named


def test_tensorboard_has_images_with_captions(tmp_path, golden_inputs):
    paths = [str(path) for path in sorted((golden_inputs / "images" / "val").iterdir())]
    images = [(path, path) for path in (*paths, str(tmp_path / "gone.jpg")) for _ in range(2)]
    rows = [{"label": "a", "pred": f"{path[-7:]} \0\u202e熊 " * 99} for path, _ in images]
    write(tmp_path, evaluation(rows, images))
    ((step, image),) = read_tensorboard(tmp_path)["eval_captions"]
    sheet = Image.open(io.BytesIO(image.encoded_image_string))
    assert step == 7
    assert sheet.width > sheet.height > 300


def test_metrics_and_tensorboard_have_the_steps_and_evaluations(tmp_path):
    steps = [{"step": step, "loss": 35 / step, "learning_rate": 0.25} for step in (10, 20)]
    with RunWriter(tmp_path) as writer:
        writer.append(steps)
        for row, seconds in zip(steps, (1.5, 3.0), strict=True):
            writer.train_scalars(row["step"], row, seconds)
        writer.evaluation("eval", evaluation(loss=2.0, rouge2=14.5), step=20, folder=tmp_path, seconds=1.23456)
    *lines, last = read_lines(tmp_path / "metrics.jsonl")
    assert lines == steps
    assert last == {"step": 20, "eval": {"loss": 2.0, "rouge2": 14.5, "rows": 2, "seconds": 1.235}}
    assert read_tensorboard(tmp_path) == {
        "train_loss": [(10, 3.5), (20, 1.75)],
        "train_learning_rate": [(10, 0.25), (20, 0.25)],
        "train_time": [(10, 1.5), (20, 3.0)],
        "eval_loss": [(20, 2.0)],
        "eval_rouge2": [(20, 14.5)],
    }


def test_log_goes_to_the_runs_file_while_it_is_open(tmp_path):
    logger = logging.getLogger("repro")
    before = list(logger.handlers)
    with RunWriter(tmp_path):
        logger.warning("an image of 熊 is missing")
    logger.warning("too late")
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert "WARNING - an image of 熊 is missing" in text
    assert "too late" not in text
    assert logger.handlers == before


def settings_of(num_steps, logging_steps=1):
    return SimpleNamespace(num_steps=num_steps, logging_steps=logging_steps, train_batch=10, log_grad_norm=False)


def metrics_of(step):
    return {"loss": jnp.asarray(0.5 * step), "learning_rate": jnp.asarray(0.25)}


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, in a list, to be changed."""
    seconds = [100.0]
    monkeypatch.setattr("repro.run.step_log.time.perf_counter", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize(("logging_steps", "logged", "waiting"), [(3, [3, 6], 1), (0, [], 2), (100, [], 2)])
def test_every_step_is_in_the_metrics_and_every_logging_step_in_tensorboard(
    tmp_path, now, logging_steps, logged, waiting
):
    with RunWriter(tmp_path) as writer:
        steps = StepLog(writer, settings_of(7, logging_steps), progress=False)
        for step in range(1, 8):
            now[0] += 2.0
            steps.add(step, metrics_of(step))
        assert len(read_lines(tmp_path / "metrics.jsonl")) == 7 - waiting, "the newest stay on the device"
        steps.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line.pop("seconds", -1) >= 0] == logged
    assert lines == [{"step": step, "loss": 0.5 * step, "learning_rate": 0.25} for step in range(1, 8)]
    assert read_tensorboard(tmp_path).get("train_loss", []) == [(step, 0.5 * step) for step in logged]


def test_the_log_tells_rate_and_time_left_and_pauses_do_not_count_as_training(tmp_path, now, caplog):
    caplog.set_level(logging.INFO, "repro")
    with RunWriter(tmp_path) as writer:
        steps = StepLog(writer, settings_of(200), progress=False)
        now[0] += 2.0
        steps.add(1, metrics_of(1), waited=0.5)
        steps.pause()
        now[0] += 50.0
        steps.resume()
        now[0] += 3.0
        steps.add(2, metrics_of(2))
        times = steps.close()
    line = "step 1 of 200: loss 0.5000, learning rate 2.50e-01, 5 rows/s, 0:06:38 left"
    assert line in (tmp_path / "log").read_text()
    assert times == {"train_seconds": 5.0, "train_rows_per_second": 4.0, "waiting_for_input_seconds": 0.5}
