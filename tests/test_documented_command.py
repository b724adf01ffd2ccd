"""The documented command as the README has it, on local folders in the place of what a network would give."""

import json
import re
import shlex
from pathlib import Path

from repro.__main__ import main
from repro.models.pretrained import load_model
from repro.pocket.halves import render_pocket

README = Path(__file__).parents[1] / "README.md"


def documented_command():
    block = re.search(r"```\nrepro train \\\n.*?```", README.read_text(), re.S)
    assert block, "the README has lost the documented command"
    words = shlex.split(block.group().strip("`").replace("\\\n", " "))
    assert words[:2] == ["repro", "train"]
    return words[1:]


def test_the_documented_command_runs_with_all_its_flags(halves, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    render_pocket(tmp_path / "data", num_train=54, num_val=3, image_size=32, seed=1)
    arguments = [halves.get(word, word.replace("$PWD", str(tmp_path))) for word in documented_command()]
    assert main([*arguments, "--cache_dir", str(tmp_path / "cache")]) == 0
    folder = tmp_path / "image-captioning-training-results"
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["num_replicas"], facts["num_steps"]) == (8, 54 * 5 // 256), "as many as the tests have devices"
    captions = json.loads((folder / "ckpt_epoch_1_step_1" / "eval_generation.json").read_text())
    assert len(captions) == 15
    paths = json.loads((folder / "eval_images.json").read_text())["image_path"]
    for shown in json.loads((folder / "eval_attention.json").read_text()):
        assert "".join(shown["tokens"]).strip() == captions[paths.index(shown["image_path"])]["pred"]
        weights = [bytes.fromhex(text) for text in shown["weights"]]
        assert {(len(patches), max(patches)) for patches in weights} == {(16, 255)}
    assert "--push_to_hub: the Hub cannot be reached" in (folder / "log").read_text()
    assert "ROUGE-2" in capsys.readouterr().out
    load_model(str(folder / "ckpt_epoch_1_step_1"))
