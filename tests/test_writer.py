"""A run's files: any caption survives them, nothing else in the folder is touched."""

from __future__ import annotations

import io
import json
import logging
import struct
import tempfile
from collections.abc import Iterator
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
from repro.record.writer import RunWriter, check_output_dir, locked, prefixed
from repro.run.step_log import StepLog

# Control characters and lone surrogates ("Cs") included.
any_text = st.text(st.characters(exclude_categories=()))


def evaluation(generations=(), images=(), **metrics) -> Evaluation:
    paths, ids = ([path for path, _ in images], [image_id for _, image_id in images])
    return Evaluation(metrics, {"rows": 2}, generations=list(generations), image_paths=paths, image_ids=ids)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def read_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_events(folder: Path) -> Iterator[Event]:
    """TensorBoard's records: length uint64, crc uint32, an Event, crc uint32; those with a summary."""
    for path in folder.glob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            if event.summary.value:
                yield event


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    scalars: dict[str, list[tuple[int, float]]] = {}
    for event in read_events(folder):
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


@given(any_text)
def test_any_text_survives_a_json_file(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value.json"
        write_json(path, [{text: text}])
        assert json.loads(path.read_text(encoding="utf-8")) == [{text: text}]
        assert [other.name for other in Path(folder).iterdir()] == ["value.json"]


@settings(max_examples=25)
@given(any_text, any_text)
def test_any_caption_survives_every_file_of_a_run(caption, prediction):
    dropped = {"split": "train", "row": 3, "image_path": caption, "caption": caption, "reason": prediction}
    generation = {"label": caption, "pred": prediction}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with RunWriter(folder) as writer:
            writer.describe({"command": [caption]}, [dropped, dropped])
            writer.evaluation("eval", evaluation([generation], loss=1.0), step=1, folder=folder / "at", seconds=0.1)
        assert json.loads((folder / "run.json").read_text(encoding="utf-8")) == {"command": [caption]}
        assert read_lines(folder / "dropped.jsonl") == [dropped, dropped]
        written = json.loads((folder / "at" / "eval_generation.json").read_text(encoding="utf-8"))
        assert written == [generation]


def test_readable_text_is_not_escaped(tmp_path):
    write_json(tmp_path / "value.json", ["ein Bär 熊"])
    assert "ein Bär 熊" in (tmp_path / "value.json").read_text(encoding="utf-8")


def test_a_value_that_cannot_be_written_leaves_the_old_file_whole(tmp_path):
    write_json(tmp_path / "value.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", [object()])
    assert json.loads((tmp_path / "value.json").read_text()) == [1]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_empty_folder_is_accepted_and_not_made(tmp_path, overwrite):
    check_output_dir(tmp_path, overwrite=overwrite)
    check_output_dir(tmp_path / "new", overwrite=overwrite)
    assert snapshot(tmp_path) == {}


def test_a_folder_that_holds_something_is_refused_unless_it_may_be_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="--overwrite_output_dir"):
        check_output_dir(tmp_path, overwrite=False)
    check_output_dir(tmp_path, overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_file_is_refused_as_a_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("content")
    with pytest.raises(InputError, match="no file can be written there"), locked(file):
        pass
    assert file.read_text() == "content"


def test_overwriting_removes_what_a_run_writes_and_nothing_else(tmp_path):
    mine = ["thesis.tex", "notes/run.json", "ckpt_backup/flax_model.msgpack", "flax_model.msgpack", "metrics.csv"]
    old = ["eval_results.json", "test_generation.json", "dropped.jsonl", "ckpt_epoch_1_step_5/flax_model.msgpack"]
    old += ["events.out.tfevents.1.host", "run.json"]
    for name in mine + old:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "log").write_text("an older run")
    with RunWriter(tmp_path):
        pass
    kept = snapshot(tmp_path)
    assert {name: kept[name] for name in mine} == {name: name.encode() for name in mine}
    assert not set(old) & set(kept)
    assert "ckpt_epoch_1_step_5" not in kept
    assert b"an older run" not in kept["log"]


def test_results_have_the_examples_names_and_six_decimals(tmp_path):
    metrics = {"loss": 2.01534567, "rouge1": 40.0, "gen_len": 1 / 3}
    with RunWriter(tmp_path) as writer:
        writer.evaluation("eval", evaluation(**metrics), step=7, folder=tmp_path / "ckpt_epoch_1_step_7", seconds=1.5)
    written = json.loads((tmp_path / "ckpt_epoch_1_step_7" / "eval_results.json").read_text())
    assert written == {"eval_loss": 2.015346, "eval_rouge1": 40.0, "eval_gen_len": 0.333333}
    assert written == prefixed("eval", metrics)
    assert not (tmp_path / "ckpt_epoch_1_step_7" / "eval_generation.json").exists()


def test_captions_are_also_written_as_cocos_servers_take_them(tmp_path):
    rows = [{"label": "a", "pred": "x"}, {"label": "b", "pred": "x"}, {"label": "c", "pred": "y"}]
    images = [("val/9.jpg", "9"), ("val/9.jpg", "9"), ("val/3.jpg", "3")]
    with RunWriter(tmp_path) as writer:
        writer.evaluation("test", evaluation(rows, images), step=7, folder=tmp_path, seconds=1.5)
    written = json.loads((tmp_path / "test_captions.json").read_text())
    assert written == [{"image_id": 9, "caption": "x"}, {"image_id": 3, "caption": "y"}]


def test_images_without_numbers_have_no_file_for_cocos_servers(tmp_path):
    rows, images = [{"label": "a", "pred": "x"}] * 2, [("a.jpg", "1"), ("b.jpg", "b.jpg")]
    with RunWriter(tmp_path) as writer:
        writer.evaluation("eval", evaluation(rows, images), step=7, folder=tmp_path, seconds=1.5)
    assert not (tmp_path / "eval_captions.json").exists()


def test_a_split_names_its_images_once(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.images("eval", ["a.jpg", "a.jpg", "b\n.jpg"], ["1", "1", "2"])
        written = (tmp_path / "eval_images.json").stat()
        writer.images("eval", ["a.jpg", "a.jpg", "b\n.jpg"], ["1", "1", "2"])
    assert (tmp_path / "eval_images.json").stat().st_mtime_ns == written.st_mtime_ns
    content = json.loads((tmp_path / "eval_images.json").read_text())
    assert content == {"image_path": ["a.jpg", "a.jpg", "b\n.jpg"], "image_id": ["1", "1", "2"]}


def test_tensorboard_has_images_with_captions(tmp_path, golden_inputs):
    paths = [str(path) for path in sorted((golden_inputs / "images" / "val").iterdir())]
    images = [(path, path) for path in (*paths, str(tmp_path / "gone.jpg")) for _ in range(2)]
    rows = [{"label": "a", "pred": f"{path[-7:]} \0\u202e熊 " * 99} for path, _ in images]
    with RunWriter(tmp_path) as writer:
        writer.evaluation("eval", evaluation(rows, images), step=7, folder=tmp_path, seconds=1.5)
    (event,) = [event for event in read_events(tmp_path) if event.summary.value[0].tag == "eval_captions"]
    sheet = Image.open(io.BytesIO(event.summary.value[0].image.encoded_image_string))
    assert event.step == 7
    assert sheet.width > sheet.height > 300


def test_metrics_have_one_line_for_each_step_and_evaluation(tmp_path):
    steps = [{"step": step, "loss": 1 / step, "learning_rate": 3e-5} for step in (1, 2, 3)]
    with RunWriter(tmp_path) as writer:
        writer.append(steps)
        writer.evaluation("eval", evaluation(loss=1 / 3), step=3, folder=tmp_path, seconds=1.23456)
    *lines, last = read_lines(tmp_path / "metrics.jsonl")
    assert lines == steps
    assert last == {"step": 3, "eval": {"loss": 1 / 3, "rows": 2, "seconds": 1.235}}


def test_tensorboard_has_the_examples_scalars_at_their_steps(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.train_scalars(10, {"loss": 3.5, "learning_rate": 0.25}, 1.5)
        writer.train_scalars(20, {"loss": 2.5, "learning_rate": 0.125}, 3.0)
        writer.evaluation("eval", evaluation(loss=2.0, rouge2=14.5), step=20, folder=tmp_path, seconds=1.0)
    assert read_scalars(tmp_path) == {
        "train_loss": [(10, 3.5), (20, 2.5)],
        "train_learning_rate": [(10, 0.25), (20, 0.125)],
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


def settings_of(num_steps: int, logging_steps: int = 1) -> SimpleNamespace:
    return SimpleNamespace(num_steps=num_steps, logging_steps=logging_steps, train_batch=10, log_grad_norm=False)


def metrics_of(step: int) -> dict:
    return {"loss": jnp.asarray(0.5 * step), "learning_rate": jnp.asarray(0.25)}


@pytest.mark.parametrize(("logging_steps", "logged"), [(3, [3, 6]), (1, [1, 2, 3, 4, 5, 6, 7]), (0, []), (100, [])])
def test_every_step_is_in_the_metrics_and_every_logging_step_in_tensorboard(tmp_path, logging_steps, logged):
    with RunWriter(tmp_path) as writer:
        steps = StepLog(writer, settings_of(7, logging_steps), progress=False)
        for step in range(1, 8):
            steps.add(step, metrics_of(step))
        times = steps.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line.pop("seconds", -1) >= 0] == logged
    assert lines == [{"step": step, "loss": 0.5 * step, "learning_rate": 0.25} for step in range(1, 8)]
    assert read_scalars(tmp_path).get("train_loss", []) == [(step, 0.5 * step) for step in logged]
    assert set(times) == {"train_seconds", "train_rows_per_second", "waiting_for_input_seconds"}
    assert times["train_rows_per_second"] > 0


def test_pauses_do_not_count_as_training_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("repro.run.step_log.time.perf_counter", lambda: now[0])
    with RunWriter(tmp_path) as writer:
        steps = StepLog(writer, settings_of(2), progress=False)
        now[0] += 2.0
        steps.add(1, metrics_of(1))
        steps.pause()
        now[0] += 50.0
        steps.resume()
        now[0] += 3.0
        steps.add(2, metrics_of(2))
        times = steps.close()
    assert times == {"train_seconds": 5.0, "train_rows_per_second": 4.0, "waiting_for_input_seconds": 0.0}


def test_the_log_tells_rate_and_time_left(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "repro")
    now = [100.0]
    monkeypatch.setattr("repro.run.step_log.time.perf_counter", lambda: now[0])
    with RunWriter(tmp_path) as writer:
        steps = StepLog(writer, settings_of(200), progress=False)
        now[0] += 2.0
        steps.add(1, metrics_of(1), waited=0.5)
        times = steps.close()
    line = "step 1 of 200: loss 0.5000, learning rate 2.50e-01, 5 rows/s, 0:06:38 left"
    assert line in (tmp_path / "log").read_text()
    assert times["waiting_for_input_seconds"] == 0.5
