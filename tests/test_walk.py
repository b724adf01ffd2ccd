"""A person's walk: reproduce, look at the report, caption a picture, train on one's own, use the model in PyTorch.

Each step is the command as it is typed, in a process of its own, and starts from what the step before left. Collected
where torch is installed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

from repro.pocket.scenes import draw_scene, sample_scene

BEAMS, LENGTH = 4, 16


def repro(place: Path, *words: str) -> str:
    """What a command prints, run in a folder."""
    # One device, as a person has it: conftest asks for eight.
    settings = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "repro", *words], cwd=place, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done.stdout


def last_checkpoint(run: Path) -> Path:
    return max(run.glob("ckpt_*"), key=lambda folder: int(folder.name.rpartition("_")[2]))


def test_a_person_walks_from_the_recipe_to_an_own_model_in_pytorch(tmp_path):
    # No verdict can be had of so little data.
    few = ("--max_train_samples", "512", "--max_eval_samples", "40", "--num_train_epochs", "1", "--keep_going")
    done = subprocess.run(
        [sys.executable, "-m", "repro", "reproduce", *few], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "CANNOT TELL" in done.stdout
    page = (tmp_path / "repro-pocket" / "report.html").read_text()
    assert "CANNOT TELL" in page
    assert "eval_loss" in page

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for number in range(24):
        draw_scene(sample_scene(random.Random(number)), 200 + number).save(pictures / f"{number}.jpg")
        rows.append({"image": f"{number}.jpg", "caption": f"my picture number {number}"})
    for split, part in (("train", rows[:16]), ("val", rows[16:])):
        (pictures / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    model = str(last_checkpoint(tmp_path / "repro-pocket" / "run"))
    before = json.loads(repro(tmp_path, "caption", model, "pictures/0.jpg", "--json"))
    assert before["captions"][0]["score"] < 0

    repro(
        tmp_path, "train", "--model_name_or_path", model, "--output_dir", "mine", "--do_train", "--do_eval",
        "--train_file", "pictures/train.jsonl", "--validation_file", "pictures/val.jsonl", "--max_target_length", "16",
        "--num_train_epochs", "40", "--learning_rate", "1e-3", "--eval_steps", "1000",
        "--per_device_train_batch_size", "8", "--predict_with_generate",
    )  # fmt: skip
    losses = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (row["loss"] for row in losses if "loss" in row)
    assert last < first / 4
    assert (tmp_path / "mine" / "report.html").is_file()
    repro(
        tmp_path, "export", "--model_name_or_path", str(last_checkpoint(tmp_path / "mine")), "--output_dir", "exported"
    )

    settings = ("--num_beams", str(BEAMS), "--max_length", str(LENGTH), "--json")
    ours = json.loads(repro(tmp_path, "caption", "exported", "pictures/0.jpg", *settings))["captions"][0]["caption"]
    assert ours.startswith("my picture number")
    theirs = VisionEncoderDecoderModel.from_pretrained(tmp_path / "exported")
    picture = Image.open(pictures / "0.jpg").convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "exported")(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = theirs.generate(pixels, num_beams=BEAMS, max_length=LENGTH, do_sample=False)
    text = AutoTokenizer.from_pretrained(tmp_path / "exported").decode(tokens[0], skip_special_tokens=True).strip()
    assert text == ours
