"""`repro data check` says what is in a data set, names what cannot be used, and trains nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repro.__main__ import main
from repro.data.captions import caption_lengths
from repro.data.census import picture_sheet
from repro.pocket.halves import render_pocket


@pytest.fixture
def flags(tmp_path: Path, golden_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run on 12 training and 3 validation images with five captions each."""
    monkeypatch.chdir(tmp_path)
    render_pocket(tmp_path / "coco", num_train=12, num_val=3, image_size=48, seed=0)
    flags = {
        "dataset_name": "ydshieh/coco_dataset_script",
        "data_dir": str(tmp_path / "coco"),
        "model_name_or_path": str(golden_inputs / "model"),
        "cache_dir": str(tmp_path / "cache"),
        "per_device_train_batch_size": "4",
        "num_replicas": "2",
        "num_train_epochs": "3",
        "max_target_length": "12",
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def check(flags: list[str], *more: str) -> dict:
    assert main(["data", "check", *flags, *more]) == 0
    return json.loads(Path("data-check/data_check.json").read_text())


def test_each_split_is_looked_at_as_the_run_would(flags: list[str], tmp_path: Path) -> None:
    for folder in ("train2017", "val2017"):
        image = sorted((tmp_path / "coco" / folder).iterdir())[0]
        Image.open(image).convert("L").save(image)
    report = check(flags, "--protocol=published,convert_evaluated_to_rgb=true", "--per_device_eval_batch_size=4")
    kept = {name: split["rows_kept"] for name, split in report["splits"].items()}
    assert kept == {"train": 55, "validation": 15}
    assert report["images"]["modes"] == {"RGB": 13, "L": 2}
    assert (report["images"]["distinct"], report["images"]["unusable"]) == (15, 1)


def test_a_data_set_is_counted(flags: list[str], tmp_path: Path, tokenizer, capsys) -> None:
    report = check(flags)
    train, validation = report["splits"]["train"], report["splits"]["validation"]
    assert (train["rows"], train["rows_kept"], train["images"]) == (60, 60, 12)
    assert train["images_by_captions"] == {"5": 12}
    assert (validation["rows"], validation["images"]) == (15, 3)
    content = json.loads((tmp_path / "coco" / "annotations" / "captions_train2017.json").read_text())
    lengths = [len(tokenizer(f"{row['caption'].lower()} ").input_ids) + 1 for row in content["annotations"]]
    assert train["tokens_of_a_caption"]["p100"] == max(lengths)
    assert train["captions_cut"] == sum(length > 12 for length in lengths) > 0
    assert report["images"]["modes"] == {"RGB": 15}
    assert report["images"]["width"]["p50"] == report["images"]["height"]["p0"] == 48
    assert report["images"]["failures"] == {}
    needs = report["needs"]
    assert (needs["global_batch"], needs["steps"], needs["checkpoints"]) == (8, 60 // 8 * 3, 3)
    assert needs["image_cache_bytes"] == 15 * 32 * 32 * 3
    out = capsys.readouterr().out
    for words in ("train: 60 rows, 60 can be used", "12 with 5", "15 RGB", "21 steps of 8 rows", "data-check"):
        assert words in out
    with Image.open("data-check/data_check.png") as sheet:
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "coco", "data-check"]
    assert not list((tmp_path / "cache").rglob("pixels"))  # nothing is decoded for later


def test_the_checkpoint_at_the_end_is_counted_where_the_protocol_saves_one(flags: list[str]) -> None:
    for protocol, checkpoints in (("published", 4), ("published,always_evaluate_at_end=true", 5)):
        more = (f"--protocol={protocol}", "--eval_steps=5", "--per_device_eval_batch_size=4")
        needs = check(flags, *more)["needs"]
        assert (needs["steps"], needs["checkpoints"]) == (21, checkpoints)
        assert check(flags, *more, "--do_train")["needs"]["checkpoints"] == 1, "without evaluations there is the last"


def test_rows_that_are_too_few_once_images_are_dropped_are_refused_and_told(flags: list[str], tmp_path: Path, capsys):
    for image in sorted((tmp_path / "coco" / "train2017").iterdir())[1:]:
        image.write_bytes(b"")
    assert main(["data", "check", *flags, "--do_train"]) == 2
    assert "larger than the data: 5 rows are left" in capsys.readouterr().err
    assert json.loads(Path("data-check/data_check.json").read_text())["splits"]["train"]["rows_kept"] == 5


def test_what_cannot_be_used_is_named_with_its_reason(flags: list[str], tmp_path: Path, capsys) -> None:
    broken, gray, *_ = sorted((tmp_path / "coco" / "train2017").iterdir())
    broken.write_bytes(broken.read_bytes()[:-40])
    Image.open(gray).convert("L").save(gray)
    report = check(flags, "--protocol=current", "--do_train")
    assert set(report["splits"]) == {"train"}
    assert report["splits"]["train"]["rows_dropped_for_their_image"] == 10
    assert report["splits"]["train"]["rows_kept"] == 50
    assert set(report["images"]["failures"]) == {str(broken), str(gray)}
    assert "mode L is not RGB" in report["images"]["failures"][str(gray)]
    assert report["images"]["modes"] == {"RGB": 10, "L": 1}
    assert report["needs"]["steps"] == 50 // 8 * 3
    assert str(broken) in capsys.readouterr().out
    assert check(flags, "--protocol=exact", "--do_train")["splits"]["train"]["rows_kept"] == 55


def test_limits_and_faults_are_those_of_the_run(flags: list[str], capsys) -> None:
    assert check(flags, "--max_train_samples=9", "--do_train", "--num_pictures=0")["splits"]["train"]["rows"] == 9
    for more, words in (
        ("--data_dir=absent", "not a folder"),
        ("--num_pictures=-1", "--num_pictures -1: must be at least 0"),
        ("--num_replicas=0", "--num_replicas 0: must be at least 1"),
        ("--num_train_epochs=0.5", "whole number"),
        ("--protocol=exakt", "'exakt'"),
        ("--report_dri=x", "--report_dir"),
        ("--report_dir=/dev/null/x", "--report_dir /dev/null/x: no file can be written there"),
        ("--cache_dir=/dev/null/x", "--cache_dir /dev/null/x/repro: no file can be written there"),
        ("--output_dir=/dev/null/x", "--output_dir /dev/null/x: no file can be written there"),
        ("--seed=-1", "--seed -1: must be at least 0 and at most 4294967295"),
        ("--max_target_length=65", "must be between 2 and the decoder's 64 positions"),
        ("--predict_with_generate --num_beams=341", "vocabulary's 340"),
        ("--mesh=data=16", "needs 16 devices"),
        ("--block_size=12", "--block_size 12: must be 0 or a multiple"),
        ("--max_train_samples=7", "larger than the data: 7 rows"),
        ("--protocol=published", "validation: 15 rows do not fill one batch of 16"),
    ):
        assert main(["data", "check", *flags, *more.split()]) == 2
        assert words in capsys.readouterr().err


def test_lengths_are_those_before_the_cut(tokenizer) -> None:
    captions = ["a cat", None, "word " * 500, ""]
    lengths = caption_lengths(captions, tokenizer)
    assert lengths[1] == 0
    assert lengths[2] > 500
    assert lengths[3] == len(tokenizer(" ").input_ids) + 1


def test_a_sheet_shows_each_row_and_survives_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (50, 20), (255, 0, 0)).save(path)
    sheet = np.asarray(picture_sheet([(str(path), "a caption")] * 5 + [(str(tmp_path / "absent.png"), None)]))
    assert ((sheet == (255, 0, 0)).all(axis=2)).sum() == 5 * 50 * 20
