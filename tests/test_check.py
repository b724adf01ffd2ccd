"""`repro data check` says what is in a data set, names what cannot be used, and trains nothing."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from repro.__main__ import main
from repro.data.sheet import picture_sheet
from repro.errors import RunStopped
from repro.pocket.halves import render_pocket


@pytest.fixture
def flags(tmp_path, golden_inputs, monkeypatch):
    """Of a run on 12 training and 3 validation images with five captions each."""
    monkeypatch.chdir(tmp_path)
    render_pocket(tmp_path / "coco", num_train=12, num_val=3, image_size=48, seed=0)
    return [
        *("--dataset_name=ydshieh/coco_dataset_script", f"--data_dir={tmp_path / 'coco'}"),
        *(f"--model_name_or_path={golden_inputs / 'model'}", f"--cache_dir={tmp_path / 'cache'}", "--num_replicas=2"),
        *("--per_device_train_batch_size=4", "--num_train_epochs=3", "--max_target_length=12"),
    ]


def check(flags, *more):
    assert main(["data", "check", *flags, *more]) == 0
    return json.loads(Path("data-check/data_check.json").read_text())


def test_each_split_is_looked_at_as_the_run_would(flags, tmp_path):
    for folder in ("train2017", "val2017"):
        image = sorted((tmp_path / "coco" / folder).iterdir())[0]
        Image.open(image).convert("L").save(image)
    report = check(flags, "--protocol=published,convert_evaluated_to_rgb=true", "--per_device_eval_batch_size=4")
    assert {name: split["kept"] for name, split in report["splits"].items()} == {"train": 55, "validation": 15}


def test_a_data_set_is_counted_and_what_is_decoded_stays_for_the_run(flags, tmp_path, monkeypatch, capsys):
    report = check(flags)
    train, validation = report["splits"]["train"], report["splits"]["validation"]
    assert (train["read"], train["kept"], train["images"]) == (60, 60, 12)
    assert (validation["read"], validation["images"]) == (15, 3)
    assert 0 < train["captions_cut"] < 60
    assert report["reasons"] == []
    assert (report["train_batch"], report["num_steps"], report["num_models"]) == (8, 60 // 8 * 3, 3)
    assert report["bytes"]["images"] == 15 * 32 * 32 * 3
    out = capsys.readouterr().out
    for words in ("train: 60 rows, 60 can be used, of 12 images", "21 steps of 8 rows", "for models", "data-check"):
        assert words in out
    with Image.open("data-check/data_check.png") as sheet:
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "coco", "data-check"]
    monkeypatch.setattr("repro.data.image_cache.decode_image", lambda *_, **__: pytest.fail("decoded again"))
    monkeypatch.setattr("repro.run.train.build_training", MagicMock(side_effect=RunStopped("all is prepared")))
    assert main(["train", *flags, "--do_train", "--do_eval", f"--output_dir={tmp_path / 'run'}"]) == 3
    assert "stopped: all is prepared" in capsys.readouterr().err


def test_what_cannot_be_used_is_named_with_its_reason_and_too_little_that_is_left_is_refused(flags, tmp_path, capsys):
    broken, gray, _, *others = sorted((tmp_path / "coco" / "train2017").iterdir())
    broken.write_bytes(broken.read_bytes()[:-40])
    Image.open(gray).convert("L").save(gray)
    report = check(flags, "--protocol=current", "--do_train")
    assert set(report["splits"]) == {"train"}
    assert (report["splits"]["train"]["dropped"], report["splits"]["train"]["kept"]) == (10, 50)
    assert {(found["rows"], *found["examples"]) for found in report["reasons"]} == {(5, str(broken)), (5, str(gray))}
    assert report["num_steps"] == 50 // 8 * 3
    out = capsys.readouterr().out
    assert f"dropped: 5 rows, such as {gray}: mode L is not RGB" in out
    assert str(broken) in out
    assert check(flags, "--protocol=exact", "--do_train")["splits"]["train"]["kept"] == 55
    for image in others:
        image.write_bytes(b"")
    assert main(["data", "check", *flags, "--protocol=current", "--do_train"]) == 2
    assert "larger than the data: 5 rows are left" in capsys.readouterr().err


def test_turned_photographs_are_counted_and_used_as_the_protocol_says(flags, tmp_path, capsys):
    exif, fingerprints = Image.Exif(), []
    exif[0x0112] = 3  # upside down
    for path in list((tmp_path / "coco" / "train2017").iterdir())[:5]:
        Image.open(path).save(path, exif=exif)
    for protocol, how in (
        ("exact", "upright"),
        ("current", "as stored, as by the example; --protocol current,turn_upright=true turns them"),
        ("current,turn_upright=true", "upright"),
    ):
        report = check(flags, f"--protocol={protocol}", "--do_train")
        assert report["splits"]["train"]["turned"] == 5
        fingerprints.append(report["splits"]["train"]["fingerprint"])
        told = f"train: 5 of 12 images are stored turned, says their EXIF; they are used {how}"
        assert told in capsys.readouterr().out
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


def test_reasons_are_grouped_by_kind_and_no_room_on_the_disk_is_named(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    missing = sorted((tmp_path / "coco" / "train2017").iterdir())[:4]
    for image in missing:
        image.unlink()
    file = tmp_path / "coco" / "annotations" / "captions_train2017.json"
    content = json.loads(file.read_text())
    kept = [image for image in content["images"] if image["file_name"] != missing[0].name][:-2]
    file.write_text(json.dumps({**content, "images": kept}))
    report = check(flags, "--do_train")
    assert [(found["rows"], len(found["examples"])) for found in report["reasons"]] == [(15, 3)] * 2
    lost = next(found for found in report["reasons"] if found["reason"].startswith("No such file"))
    assert set(lost["examples"]) == set(map(str, missing[1:]))
    out = capsys.readouterr().out
    assert f"dropped: 15 rows, such as {', '.join(lost['examples'])}: No such file" in out
    assert "MB are needed and 1.0 MB free; make room" in out


def test_limits_and_faults_are_those_of_the_run(flags, capsys):
    assert check(flags, "--max_train_samples=9", "--do_train", "--num_pictures=0")["splits"]["train"]["read"] == 9
    for more, words in (
        ("--data_dir=absent", "not a folder"),
        ("--num_pictures=-1", "--num_pictures -1: must be at least 0"),
        ("--report_dri=x", "--report_dir"),
        ("--report_dir=/dev/null/x", "--report_dir /dev/null/x: no file can be written there"),
        ("--cache_dir=/dev/null/x", "--cache_dir /dev/null/x/repro: no file can be written there"),
        ("--output_dir=/dev/null/x", "--output_dir /dev/null/x: no file can be written there"),
        ("--max_target_length=65", "must be between 2 and the decoder's 64 positions"),
        ("--max_train_samples=7", "larger than the data: 7 rows"),
        ("--protocol=published", "validation: 15 rows do not fill one batch of 16"),
    ):
        assert main(["data", "check", *flags, more]) == 2
        assert words in capsys.readouterr().err


def test_a_sheet_shows_each_row_and_survives_a_broken_one(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (50, 20), (255, 0, 0)).save(path)
    sheet = np.asarray(picture_sheet([(str(path), "a caption")] * 5 + [(str(tmp_path / "absent.png"), None)]))
    assert ((sheet == (255, 0, 0)).all(axis=2)).sum() == 5 * 50 * 20
