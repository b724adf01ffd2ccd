"""The documented command as the README has it, on local folders in the place of what a network would give."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import DECODER, ENCODER
from flax import serialization

from repro.__main__ import main
from repro.models.pretrained import load_model
from repro.models.weights import flatten
from repro.pocket.halves import render_pocket

README = Path(__file__).parents[1] / "README.md"


def documented_command() -> list[str]:
    block = re.search(r"```\nrepro train \\\n.*?```", README.read_text(), re.S)
    assert block, "the README has lost the documented command"
    words = shlex.split(block.group().strip("`").replace("\\\n", " "))
    assert words[:2] == ["repro", "train"]
    return words[1:]


def test_the_documented_command_runs_with_all_its_flags(
    halves: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    render_pocket(tmp_path / "data", num_train=54, num_val=3, image_size=32, seed=1)
    arguments = [halves.get(word, word.replace("$PWD", str(tmp_path))) for word in documented_command()]
    assert main([*arguments, "--cache_dir", str(tmp_path / "cache")]) == 0
    folder = tmp_path / "image-captioning-training-results"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["num_replicas"] == 8  # the devices of the tests
    assert facts["num_steps"] == 54 * 5 // 256
    captions = json.loads((folder / "ckpt_epoch_1_step_1" / "eval_generation.json").read_text())
    assert len(captions) == 15
    paths = json.loads((folder / "eval_images.json").read_text())["image_path"]
    for shown in json.loads((folder / "eval_attention.json").read_text()):
        assert "".join(shown["tokens"]).strip() == captions[paths.index(shown["image_path"])]["pred"]
        assert {len(bytes.fromhex(weights)) for weights in shown["weights"]} == {16}
        assert all(max(bytes.fromhex(weights)) == 255 for weights in shown["weights"])
    assert "--push_to_hub: the Hub cannot be reached" in (folder / "log").read_text()
    assert "ROUGE-2" in capsys.readouterr().out
    load_model(str(folder / "ckpt_epoch_1_step_1"))


def test_create_model_keeps_the_halves_and_reports_what_is_random(
    halves: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--encoder_model_name_or_path", halves[ENCODER], "--decoder_model_name_or_path", halves[DECODER]]
    model = tmp_path / "model"
    assert main(["create-model", *flags, "--output_dir", str(model)]) == 0
    assert "cross-attention, enc_to_dec_proj: random weights, seed 42" in capsys.readouterr().out
    created = load_model(str(model))
    for half, folder in (("encoder", halves[ENCODER]), ("decoder", halves[DECODER])):
        ours = flatten(created.params[half])
        theirs = flatten(serialization.msgpack_restore((Path(folder) / "flax_model.msgpack").read_bytes()))
        assert all((ours[name] == array).all() for name, array in theirs.items())
        assert all("cross" in name for name in ours.keys() - theirs.keys())
    assert created.tokenizer.pad_token == created.tokenizer.eos_token == "<|endoftext|>"
    assert main(["create-model", *flags, "--output_dir", str(model)]) == 2  # nothing is overwritten
