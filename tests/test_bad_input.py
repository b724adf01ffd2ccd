"""Input that cannot be used ends before any training: one message, status 2, nothing overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import serialization
from PIL import Image

from repro.__main__ import main
from repro.pocket.halves import render_pocket


class Workplace:
    """A small data set, a model and the command line of a run that works."""

    def __init__(self, folder: Path, golden_inputs: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        shutil.copytree(golden_inputs / "model", self.model)
        self.rows = []
        for number in range(6):
            name = f"{number}.png"
            Image.new("RGB", (40, 30), (40 * number, 90, 200)).save(folder / name)
            self.rows.append({"image_path": name, "caption": f"picture number {number}"})
        self.train_file = folder / "train.jsonl"
        self.write_rows()
        self.output_dir = folder / "run"
        self.flags = {
            "output_dir": str(self.output_dir),
            "cache_dir": str(folder / "cache"),
            "model_name_or_path": str(self.model),
            "train_file": str(self.train_file),
            "validation_file": str(self.train_file),
            "image_column": "image_path",
            "caption_column": "caption",
            "do_train": "true",
            "per_device_train_batch_size": "2",
            "per_device_eval_batch_size": "2",
            "num_replicas": "1",
            "max_target_length": "12",
            "num_train_epochs": "1",
        }

    def write_rows(self) -> None:
        self.train_file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def train(self, **flags: str | None) -> int:
        merged = {name: value for name, value in {**self.flags, **flags}.items() if value is not None}
        return main(["train", *(f"--{name}={value}" for name, value in merged.items())])


@pytest.fixture
def workplace(tmp_path: Path, golden_inputs: Path) -> Workplace:
    return Workplace(tmp_path, golden_inputs)


def wrong_column(place: Workplace) -> dict[str, str]:
    return {"caption_column": "text"}


def missing_file(place: Workplace) -> dict[str, str]:
    return {"train_file": str(place.folder / "absent.jsonl")}


def missing_data_folder(place: Workplace) -> dict[str, str | None]:
    return {"dataset_name": "ydshieh/coco_dataset_script", "data_dir": str(place.folder / "absent")}


def empty_data_folder(place: Workplace) -> dict[str, str | None]:
    (place.folder / "empty").mkdir()
    return {"dataset_name": "ydshieh/coco_dataset_script", "data_dir": str(place.folder / "empty")}


def missing_annotations(place: Workplace) -> dict[str, str | None]:
    data = place.folder / "coco"
    render_pocket(data, num_train=2, num_val=1, image_size=16, seed=0)
    (data / "annotations" / "captions_train2017.json").unlink()
    return {"dataset_name": "ydshieh/coco_dataset_script", "data_dir": str(data)}


def no_readable_image(place: Workplace) -> dict[str, str]:
    for image in place.folder.glob("*.png"):
        image.write_bytes(b"not an image")
    return {}


def null_captions(place: Workplace) -> dict[str, str]:
    for row in place.rows:
        row["caption"] = None
    place.write_rows()
    return {}


def block_size(place: Workplace) -> dict[str, str]:
    return {"block_size": "3"}


def batch_larger_than_data(place: Workplace) -> dict[str, str]:
    return {"per_device_train_batch_size": "7"}


def eval_batch_larger_than_data(place: Workplace) -> dict[str, str]:
    return {"per_device_eval_batch_size": "7", "do_eval": "true", "protocol": "current"}


def more_beams_than_tokens(place: Workplace) -> dict[str, str]:
    return {"do_eval": "true", "predict_with_generate": "true", "num_beams": "341"}


def weights_not_finite(place: Workplace) -> dict[str, str]:
    file = place.model / "flax_model.msgpack"
    params = serialization.msgpack_restore(file.read_bytes())
    params["encoder"]["layernorm"]["bias"] = np.full(48, np.inf, np.float32)
    file.write_bytes(serialization.msgpack_serialize(params))
    return {}


def no_weights(place: Workplace) -> dict[str, str]:
    (place.model / "flax_model.msgpack").unlink()
    return {}


def no_pad_token(place: Workplace) -> dict[str, str]:
    path = place.model / "config.json"
    config = json.loads(path.read_text())
    del config["pad_token_id"]
    path.write_text(json.dumps(config))
    return {}


def unknown_protocol(place: Workplace) -> dict[str, str]:
    return {"protocol": "exakt"}


def nothing_to_do(place: Workplace) -> dict[str, str | None]:
    return {"do_train": None}


def unknown_flag(place: Workplace) -> dict[str, str]:
    return {"num_beam": "3"}


def no_model(place: Workplace) -> dict[str, str | None]:
    return {"model_name_or_path": None}


def no_output_dir(place: Workplace) -> dict[str, str | None]:
    return {"output_dir": None}


def half_a_model(place: Workplace) -> dict[str, str | None]:
    return {"model_name_or_path": None, "encoder_config_name": str(place.model)}


def too_long(place: Workplace) -> dict[str, str]:
    return {"max_target_length": "65"}


def part_of_an_epoch(place: Workplace) -> dict[str, str]:
    return {"num_train_epochs": "1.5"}


def output_dir_is_a_file(place: Workplace) -> dict[str, str]:
    (place.folder / "file").write_text("mine")
    return {"output_dir": str(place.folder / "file")}


def values(**flags: str) -> Callable[[Workplace], dict[str, str | None]]:
    """Flags alone, under the name of the last."""

    def spoil(place: Workplace) -> dict[str, str | None]:
        return dict(flags)

    spoil.__name__ = "=".join(list(flags.items())[-1])
    return spoil


CASES: list[tuple[Callable[[Workplace], dict[str, str | None]], tuple[str, ...]]] = [
    (wrong_column, ("'text'", "'image_path', 'caption'")),
    (missing_file, ("absent.jsonl", "no such file")),
    (missing_data_folder, ("absent", "not a folder", "zip")),
    (empty_data_folder, ("empty", "zip")),
    (missing_annotations, ("captions_train2017.json", "annotations_trainval2017.zip")),
    (no_readable_image, ("no row is left of 6", "Check the paths", "0.png")),
    (null_captions, ("no row is left for the train split", "it has no caption")),
    (block_size, ("--block_size 3", "multiple", "2 rows")),
    (batch_larger_than_data, ("7 rows", "6 rows", "--per_device_train_batch_size")),
    (eval_batch_larger_than_data, ("6 rows", "batch of 7", "--protocol exact")),
    (no_weights, ("model", "holds no weights", "flax_model.msgpack", "model.safetensors")),
    (more_beams_than_tokens, ("--num_beams 341", "vocabulary's 340")),
    (weights_not_finite, ("1 not finite: encoder.layernorm.bias (48,)", "flax_model.msgpack")),
    (no_pad_token, ("pad_token_id", "config.json")),
    (unknown_protocol, ("'exakt'", "published, current, exact")),
    (nothing_to_do, ("--do_train, --do_eval or --do_predict",)),
    (unknown_flag, ("--num_beam", "--num_beams")),
    (no_model, ("--model_name_or_path",)),
    (no_output_dir, ("--output_dir is missing",)),
    (half_a_model, ("--decoder_model_name_or_path",)),
    (too_long, ("--max_target_length 65", "64")),
    (part_of_an_epoch, ("1.5", "whole number")),
    (output_dir_is_a_file, ("file: no file can be written there", "name another folder")),
    (values(mesh="data=2,model=2"), ("--mesh data=2,model=2", "data=4,fsdp=2")),
    (values(mesh="fsdp=0"), ("--mesh fsdp=0", "from 1 on")),
    (values(mesh="data=2,data=4"), ("--mesh data=2,data=4", "each once")),
    (values(encoder_config_name="vit"), ("--model_name_or_path", "--encoder_config_name a part of one: drop one")),
    (values(caption_metrics="true"), ("--caption_metrics", "--predict_with_generate")),
    (values(cache_dir="/dev/null/cache"), ("--cache_dir", "no file can be written there")),
    (values(output_dir="/dev/null/a/b"), ("--output_dir", "no file can be written there")),
    (values(output_dir="/proc/a/b"), ("--output_dir", "no file can be written there")),
    (values(output_dir="a" * 300), ("--output_dir", "no file can be written there", "too long")),
    (values(resume="auto", overwrite_output_dir="true"), ("contradict each other",)),
    (values(mesh="data=4"), ("--mesh data=4,fsdp=1", "1 replicas", "2 rows", "--num_replicas")),
    (values(mesh="data=16"), ("needs 16 devices", "there are 8")),
    (values(num_replicas="4", per_device_train_batch_size="1", replicas_at_once="3"), ("--replicas_at_once 3", "4")),
    (values(save_total_limit="0"), ("--save_total_limit 0", "at least 1")),
    (values(save_steps="-1"), ("--save_steps -1", "at least 0")),
    (values(metric_for_best_model="bleu"), ("--metric_for_best_model bleu", "loss, rouge1", "bleu4, cider.")),
    (values(metric_for_best_model="gen_len"), ("--metric_for_best_model gen_len", "loss, rouge1")),
    (values(metric_for_best_model="loss"), ("--metric_for_best_model loss", "needs --do_eval too")),
    (values(do_eval="true", metric_for_best_model="rouge2"), ("rouge2: needs --predict_with_generate too",)),
    (values(do_eval="true", save_steps="0", metric_for_best_model="loss"), ("--save_steps 0 saves none",)),
    (
        values(do_eval="true", eval_steps="500", protocol="published", metric_for_best_model="loss"),
        ("--eval_steps 500 nothing is evaluated in 3 steps",),
    ),
    (values(max_grad_norm="0"), ("--max_grad_norm 0.0", "above 0")),
    (values(resume="absent"), ("--resume absent", "auto, never", "state/STEP")),
    (values(coordinator="here:1"), ("--process_id, --num_processes missing",)),
]


@pytest.mark.parametrize(("spoil", "wanted"), [pytest.param(*case, id=case[0].__name__) for case in CASES])
def test_unusable_input_ends_before_training_with_one_message(
    spoil: Callable[[Workplace], dict[str, str | None]],
    wanted: tuple[str, ...],
    workplace: Workplace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = spoil(workplace)
    capsys.readouterr()
    assert workplace.train(**flags) == 2
    message = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    for words in wanted:
        assert words in message
    assert not workplace.output_dir.exists()


def test_a_full_output_dir_is_left_as_it_is(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    workplace.output_dir.mkdir()
    (workplace.output_dir / "metrics.jsonl").write_text("an earlier run\n")
    assert workplace.train() == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    # Allowed to overwrite, but with other input that cannot be used: the earlier run still stands.
    assert workplace.train(overwrite_output_dir="true", block_size="3") == 2
    assert (workplace.output_dir / "metrics.jsonl").read_text() == "an earlier run\n"


def test_a_single_broken_image_or_caption_is_dropped_counted_and_listed(workplace: Workplace) -> None:
    (workplace.folder / "1.png").write_bytes((workplace.folder / "1.png").read_bytes()[:40])
    workplace.rows[4]["caption"] = 17
    workplace.write_rows()
    assert workplace.train() == 0
    dropped = [json.loads(line) for line in (workplace.output_dir / "dropped.jsonl").read_text().splitlines()]
    assert {(row["split"], row["row"]) for row in dropped} == {("train", 1), ("train", 4)}
    assert all(row["reason"] for row in dropped)
    counts = json.loads((workplace.output_dir / "run.json").read_text())["data"]["train"]
    assert (counts["read"], counts["kept"], counts["dropped"]) == (6, 4, 2)


@pytest.mark.parametrize("do_eval", ["true", "false"])
def test_no_training_ends_without_a_model(workplace: Workplace, do_eval: str) -> None:
    assert workplace.train(protocol="current", do_eval=do_eval, eval_steps="500") == 0
    (checkpoint,) = workplace.output_dir.glob("ckpt_*")
    assert checkpoint.name == "ckpt_epoch_1_step_3"
    assert (checkpoint / "flax_model.msgpack").is_file()
    assert not (checkpoint / "eval_results.json").exists()  # --eval_steps suppresses the evaluation, as in the example


def test_commands_and_recipes_are_looked_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err
    assert main(["reproduce", "poket", "--output_dir", str(tmp_path / "new")]) == 2
    assert "pocket" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").write_text("mine")
    assert main(["reproduce", "--output_dir", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("caption model a.jpg --num_beam 3", "unknown argument '--num_beam'. Did you mean --num_beams?"),
        ("caption model --num-beam=3", "unknown argument '--num_beam'. Did you mean --num_beams?"),
        ("caption model a.jpg --colour", "unknown argument '--colour'. `repro caption --help` lists the flags."),
        ("caption model a.jpg --dtype float23", "argument --dtype: invalid choice: 'float23'"),
        ("caption model a.jpg --batch_size many", "argument --batch_size: invalid int value: 'many'"),
        ("caption model", "the following arguments are required: IMAGE"),
        ("verify --recpie pocket run", "unknown argument '--recpie'. Did you mean --recipe?"),
        ("reproduce --hub_tokn=secret", "unknown argument '--hub_tokn'. Did you mean --hub_token?"),
        ("train --hub_tokn=secret", "unknown argument '--hub_tokn'. Did you mean --hub_token?"),
        ("reproduce --dry_rnu", "unknown argument '--dry_rnu'. Did you mean --dry_run?"),
        ("reproduce --learning_rat 1", "unknown argument '--learning_rat'. Did you mean --learning_rate?"),
        ("data coco --data_dri here", "unknown argument '--data_dri'. Did you mean --data_dir?"),
        ("data pocket --num_trian 3", "unknown argument '--num_trian'. Did you mean --num_train?"),
        ("data coco --num_train 3", "unknown argument '--num_train'. `repro data coco --help` lists the flags."),
        ("export --model_name model", "unknown argument '--model_name'. Did you mean --model_name_or_path?"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(
    command: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert f"error: {wanted}" in capsys.readouterr().err
