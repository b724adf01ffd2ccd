"""From the files of public data sets, as they are unpacked, to captions: the README's lines for own data."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repro.__main__ import main

PARTS = {"train": range(8), "val": range(8, 10)}
CAPTIONS = [f"A picture, number {number} ." for number in range(10)]


def draw(folder, numbers):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"{folder}/{number}.jpg")


def as_flickr8k():
    """`captions.txt` has `image,caption`, one line a caption, and `Images/` lies beside it; here it is cut in two."""
    for part, numbers in PARTS.items():
        draw("Images", numbers)
        with open(f"captions-{part}.txt", "w", newline="") as file:
            rows = [[f"{number}.jpg", CAPTIONS[number]] for number in numbers for _ in range(2)]
            csv.writer(file).writerows([["image", "caption"], *rows])
    return ["--train_file=captions-train.txt", "--validation_file=captions-val.txt", "--data_dir=Images"]


def as_sidecars():
    """`0.jpg` beside `0.txt`, a folder for each split."""
    for part, numbers in PARTS.items():
        draw(part, numbers)
        for number in numbers:
            Path(f"{part}/{number}.txt").write_text(f"{CAPTIONS[number]}\n" * 2)
    return ["--train_file=train", "--validation_file=val"]


def as_karpathy():
    """`dataset_coco.json` in a folder of its own, with all splits, and COCO 2014's folders elsewhere."""
    images = []
    for part, numbers in PARTS.items():
        draw(f"coco/{part}2014", numbers)
        for number in numbers:
            image = {"filepath": f"{part}2014", "filename": f"{number}.jpg", "cocoid": number, "split": part}
            sentences = [{"raw": CAPTIONS[number], "tokens": CAPTIONS[number].split()}] * 2
            images.append(image | {"sentences": sentences})
    file = Path("caption_datasets/dataset_coco.json")
    file.parent.mkdir()
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return [f"--train_file={file}", f"--validation_file={file}", "--data_dir=coco"]


@pytest.mark.parametrize("make", [as_flickr8k, as_sidecars, as_karpathy], ids=lambda make: make.__name__)
def test_a_public_layout_goes_from_its_files_to_captions(make, tmp_path, golden_inputs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [f"--model_name_or_path={golden_inputs / 'model'}", "--max_target_length=12", "--num_replicas=1"]
    flags += [*make(), "--cache_dir=cache"]
    assert main(["data", "check", *flags]) == 0
    said = capsys.readouterr().out
    assert "train: 16 rows, 16 can be used, of 8 images" in said
    assert "validation: 4 rows, 4 can be used, of 2 images" in said
    assert main(["train", *flags, "--output_dir=my-run", "--do_train", "--num_train_epochs=1"]) == 0
    capsys.readouterr()
    picture = next(path for path in sorted(tmp_path.rglob("9.jpg")) if "cache" not in path.parts)
    assert main(["caption", "my-run", str(picture), "--num_beams=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["captions"]
    (checkpoint,) = Path("my-run").glob("ckpt_*")
    assert main(["export", f"--model_name_or_path={checkpoint}", "--output_dir=my-model"]) == 0
    assert Path("my-model/model.safetensors").is_file()
