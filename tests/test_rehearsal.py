"""The full-size rehearsal: a stand-in that is like COCO where it says so, and a projection that adds up."""

import importlib
import io
import json
import multiprocessing.dummy
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repro.data.coco import read_official

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
rehearsal = importlib.import_module("rehearsal")
stand_in = importlib.import_module("stand_in")


def test_cocos_numbers_are_the_stand_ins():
    assert stand_in.counts_of(118_287) == {"train": (118_287, 591_753), "val": (5_000, 25_014)}
    train = stand_in.captions_per_image(118_287, 591_753)
    grayscale = np.array([stand_in.is_grayscale(number) for number in range(len(train))])
    assert train.sum() == 591_753
    assert grayscale.sum() == 227
    assert train[~grayscale].sum() == 590_618, "the published run trained on 2307 batches of 256 of these"
    assert Counter(stand_in.captions_per_image(5_000, 25_014).tolist()) == {5: 4987, 6: 12, 7: 1}


def test_no_two_pictures_have_the_same_bytes_and_one_in_521_is_grayscale(tmp_path, monkeypatch):
    picture = stand_in.picture_of("train", 3)._replace(source=0)
    drawn = lambda _, number: picture._replace(grayscale=stand_in.is_grayscale(number))  # noqa: E731
    monkeypatch.setattr(stand_in, "picture_of", drawn)
    stand_in.write_pictures(tmp_path, "train", range(519, 522))
    contents = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    assert len(set(contents)) == 3
    assert [Image.open(io.BytesIO(content)).mode for content in contents] == ["RGB", "L", "RGB"]


def test_the_data_are_read_as_coco_not_grouped_by_image(tmp_path, monkeypatch):
    # All are cut from one picture, in a thread, which sees that.
    monkeypatch.setattr(stand_in, "POOL", 1)
    monkeypatch.setattr(stand_in.multiprocessing, "get_context", lambda _: multiprocessing.dummy)
    assert stand_in.write_data(tmp_path, 40, num_processes=1) == {"train": [40, 200], "val": [64, 320]}
    images = [row["image_id"] for row in read_official(tmp_path, "2017", "train")]
    assert Counter(Counter(images).values()) == {5: 40}
    assert sum(a == b for a, b in pairwise(images)) < 40, "neighbours are seldom of one image"
    places = {image: [place for place, other in enumerate(images) if other == image] for image in set(images)}
    assert max(max(found) - min(found) for found in places.values()) <= stand_in.ORDER_ROWS + 10
    content = json.loads((tmp_path / "annotations" / "captions_train2017.json").read_text())
    for image in content["images"]:
        assert Image.open(tmp_path / "train2017" / image["file_name"]).size == (image["width"], image["height"])


def test_steps_are_timed_between_evaluations():
    lines = [(0, 10), (2, 20), (50, 30), (53, 40)]
    line = "2026-01-01 10:00:{:02d},500 - INFO - step {} of 40: loss 1.0, 5 rows/s\n"
    log = "".join(line.format(*at) for at in lines)
    # By hand: 10 to 20 takes 2 s, 30 to 40 takes 3 s; between 20 and 30 lies the evaluation at 20.
    assert rehearsal.step_seconds(log, [20, 40]) == pytest.approx(0.25)
    assert rehearsal.step_seconds(log, [10, 20, 30]) is None


def test_the_projection_adds_up_by_hand():
    seconds = {"step_seconds": 0.25, "train_seconds": 14.0, "startup_seconds": 30.0, "images_seconds": 2.0}
    evaluations = {"saves": [3.0, 5.0], "evaluations": [(512, 20.0), (512, 8.0)], "all_seconds": 90.0}
    projection = rehearsal.project(rehearsal.Measured(steps=40, images=1_000, **seconds, **evaluations))
    assert {row["term"]: row["seconds"] for row in projection["terms"]} == {
        "start-up with compilation": 30.0,
        "rows, image cache, tokens": 246.57,  # 123,287 x 0.002
        "steps": 576.75,  # 2307 x 0.25
        "first steps, states": 10.0,  # 14 - 40 x 0.25 is 4 for two evaluations; there are five
        "saved models": 20.0,  # 5 x 4
        "evaluations": 1940.0,  # 5 x 24,832 x 8 / 512
        "their compilation": 12.0,  # 20 - 8
        "everything else": 10.0,  # 90 - 30 - 14 - 8 - 28
    }
    assert projection["seconds"] == pytest.approx(2845.3, abs=0.1)
    assert projection["published_times_projected"] == pytest.approx(5400 / 2845.32, abs=1e-3)


def test_a_part_has_so_many_batches_once_grayscale_rows_are_dropped_and_is_evaluated_in_its_middle_and_its_end():
    for batches, size in ((2, 256), (700, 256), (8, 16)):
        rows = rehearsal.rows_for(batches, size)
        dropped = 5 * sum(stand_in.is_grayscale(number) for number in range(rows // 5))
        assert (rows - dropped) // size == batches
    assert rehearsal.part_flags(["--per_device_eval_batch_size", "4"], 40, 100, rows=None) == [
        *("--max_train_samples", str(40 * 256 + 40 * 256 // 521 + 128), "--eval_steps", "20", "--logging_steps", "5"),
        *("--max_eval_samples", str(16 * 32 + 16)),
    ]
    assert rehearsal.part_flags([], None, None, rows=None) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("draft")
    with pytest.raises(SystemExit, match="holds something else"):
        rehearsal.claim(tmp_path)
    own = tmp_path / "own"
    for _ in range(2):
        lock = rehearsal.claim(own)
        with pytest.raises(SystemExit, match="another rehearsal is at work"):
            rehearsal.claim(own)
        lock.release()
    (own / "data").mkdir()
    (own / "note").write_text("kept")
    rehearsal.remove(own)
    assert [path.name for path in own.iterdir()] == ["note"]


def test_what_was_measured_before_a_phase_failed_is_kept(tmp_path, monkeypatch):
    def phase(name, *_, **__):
        phase.results[name] = {"seconds": 1.0}
        if name == "prepare":
            raise rehearsal.PhaseFailed("prepare: ended with status 3")
        return phase.results[name]

    phase.results = {}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "dry-run.log").write_text("time: 3 h for all\nwritten somewhere\n")
    monkeypatch.setattr(rehearsal, "Phases", lambda folder: phase)
    monkeypatch.setattr(stand_in, "write_data", lambda *_: {"train": [40, 200], "val": [64, 320]})
    monkeypatch.setattr(stand_in, "write_halves", lambda *_, **__: None)
    result = rehearsal.rehearse(tmp_path, rehearsal.Plan(40, 2, 8, flags=(), smoke=True))
    assert result["failed"] == "prepare: ended with status 3"
    assert result["dry_run"] == ["time: 3 h for all"]
    assert list(result["phases"]) == ["stand-in", "create-model", "dry run", "prepare"]
    assert "projection" not in result


@pytest.mark.slow
def test_the_rehearsal_ends_with_a_verdict_and_a_projection(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rehearsal.json"
    flags = ["--smoke", "--folder", str(tmp_path / "here"), "--remove", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["rehearsal.py", *flags])
    rehearsal.main()
    result = json.loads(output.read_text())
    assert result["verdict"] == "CANNOT TELL"
    assert any("--eval_steps 4, the recipe has 500" in problem for problem in result["problems"])
    assert result["data_check"]["validation"]["kept"] == 320
    assert result["run"]["num_steps"] == 8
    assert all(row["seconds"] >= 0 for row in result["projection"]["terms"])
    assert {phase for phase, found in result["phases"].items() if "peak_host_mb" in found} == {
        *("create-model", "dry run", "data check", "prepare", "reproduce", "verify")
    }
    assert not (tmp_path / "here").exists()
    assert str(tmp_path) not in output.read_text()
    assert re.search(r"the documented run .* s; the published 5400 s", capsys.readouterr().out)
