"""From the files of public data sets, as they are unpacked, to captions: the README's lines for own data."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repro.__main__ import main

PARTS = {"train": range(8), "val": range(8, 10)}
CAPTIONS = [f"A picture, number {number} ." for number in range(10)]


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def as_flickr8k() -> list[str]:
    """`captions.txt` has `image,caption`, one line a caption, and `Images/` lies beside it; here it is cut in two."""
    for part, numbers in PARTS.items():
        with open(f"captions-{part}.txt", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "caption"])
            rows.writerows([f"{number}.jpg", CAPTIONS[number]] for number in numbers for _ in range(2))
        for number in numbers:
            draw(Path(f"Images/{number}.jpg"), number)
    return ["--train_file=captions-train.txt", "--validation_file=captions-val.txt", "--data_dir=Images"]


def as_sidecars() -> list[str]:
    """`0.jpg` beside `0.txt`, a folder for each split."""
    for part, numbers in PARTS.items():
        for number in numbers:
            draw(Path(f"{part}/{number}.jpg"), number)
            Path(f"{part}/{number}.txt").write_text(f"{CAPTIONS[number]}\n" * 2)
    return ["--train_file=train", "--validation_file=val"]


def as_karpathy() -> list[str]:
    """`dataset_coco.json` in a folder of its own, with all splits, and COCO 2014's folders elsewhere."""
    images = []
    for part, numbers in PARTS.items():
        for number in numbers:
            draw(Path(f"coco/{part}2014/{number}.jpg"), number)
            sentences = [{"raw": CAPTIONS[number], "tokens": CAPTIONS[number].split()}] * 2
            image = {"filepath": f"{part}2014", "filename": f"{number}.jpg", "cocoid": number, "split": part}
            images.append(image | {"sentences": sentences})
    Path("caption_datasets").mkdir()
    Path("caption_datasets/dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    file = "caption_datasets/dataset_coco.json"
    return [f"--train_file={file}", f"--validation_file={file}", "--data_dir=coco"]


@pytest.mark.parametrize("make", [as_flickr8k, as_sidecars, as_karpathy], ids=lambda make: make.__name__)
def test_a_public_layout_goes_from_its_files_to_captions(
    make: Callable[[], list[str]], tmp_path: Path, golden_inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    model, length = f"--model_name_or_path={golden_inputs / 'model'}", "--max_target_length=12"
    flags = [model, *make(), length, "--cache_dir=cache", "--num_replicas=1"]
    assert main(["data", "check", *flags]) == 0
    said = capsys.readouterr().out
    for words in ("train: 16 rows, 16 can be used, of 8 images", "validation: 4 rows, 4 can be used, of 2 images"):
        assert words in said
    run = ["--output_dir=my-run", "--do_train", "--do_eval", "--predict_with_generate", "--num_beams=2"]
    assert main(["train", *flags, *run, "--num_train_epochs=1"]) == 0
    capsys.readouterr()
    picture = next(path for path in sorted(tmp_path.rglob("9.jpg")) if "cache" not in path.parts)
    assert main(["caption", "my-run", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["captions"]
    checkpoint = next(Path("my-run").glob("ckpt_*"))
    assert main(["export", f"--model_name_or_path={checkpoint}", "--output_dir=my-model"]) == 0
    assert Path("my-model/model.safetensors").is_file()
