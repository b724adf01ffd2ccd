"""Input that cannot be used ends before any training: one message, status 2, nothing overwritten."""

import json
import shutil

import pytest
from PIL import Image

from repro.__main__ import main


class Workplace:
    """A small data set, a model and the command line of a run that works."""

    def __init__(self, folder, golden_inputs):
        self.folder, self.model, self.output_dir = folder, folder / "model", folder / "run"
        shutil.copytree(golden_inputs / "model", self.model)
        for number in range(6):
            Image.new("RGB", (40, 30), (40 * number, 90, 200)).save(folder / f"{number}.png")
        self.write_captions([f"picture number {number}" for number in range(6)])
        self.flags = {"output_dir": self.output_dir, "cache_dir": folder / "cache", "model_name_or_path": self.model}
        self.flags |= {"train_file": folder / "train.jsonl", "validation_file": folder / "train.jsonl"}
        self.flags |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_replicas": 1}
        self.flags |= {"do_train": "true", "max_target_length": 12, "num_train_epochs": 1}

    def write_captions(self, captions):
        rows = [{"image_path": f"{number}.png", "caption": caption} for number, caption in enumerate(captions)]
        (self.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(self, **flags):
        """Run with these flags, an empty one of which is left out."""
        return main(["train", *(f"--{name}={value}" for name, value in {**self.flags, **flags}.items() if value)])

    def refuse(self, capsys, **flags):
        """Give the one message of a run that does not begin."""
        capsys.readouterr()
        assert self.train(**flags) == 2
        assert not self.output_dir.exists()
        (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return message


@pytest.fixture
def workplace(tmp_path, golden_inputs):
    return Workplace(tmp_path, golden_inputs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, golden_inputs):
    """A workplace in which nothing is changed."""
    return Workplace(tmp_path_factory.mktemp("whole"), golden_inputs)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("do_train=", ["--do_train, --do_eval or --do_predict"]),
        ("output_dir=", ["--output_dir is missing"]),
        ("model_name_or_path=", ["--model_name_or_path"]),
        ("model_name_or_path= encoder_config_name=MODEL", ["--decoder_model_name_or_path"]),
        ("encoder_config_name=vit", ["--model_name_or_path", "--encoder_config_name a part of one: drop one"]),
        ("train_file=absent.jsonl", ["absent.jsonl", "no such file"]),
        ("caption_column=text", ["'text'", "'image_path', 'caption'"]),
        ("cache_dir=/dev/null/cache", ["--cache_dir", "no file can be written there"]),
        ("block_size=3", ["--block_size 3", "multiple", "2 rows"]),
        ("per_device_train_batch_size=7", ["7 rows", "6 rows", "--per_device_train_batch_size"]),
        ("per_device_eval_batch_size=7 do_eval=true protocol=current", ["6 rows", "batch of 7", "--protocol exact"]),
        ("do_eval=true predict_with_generate=true num_beams=341", ["--num_beams 341", "vocabulary's 340"]),
        ("max_target_length=65", ["--max_target_length 65", "64"]),
        ("mesh=data=2,model=2", ["--mesh data=2,model=2", "data=4,fsdp=2"]),
        ("mesh=fsdp=0", ["--mesh fsdp=0", "from 1 on"]),
        ("mesh=data=2,data=4", ["--mesh data=2,data=4", "each once"]),
        ("mesh=data=4", ["--mesh data=4,fsdp=1", "1 replicas", "2 rows", "--num_replicas"]),
        ("mesh=data=16", ["needs 16 devices", "there are 8"]),
        ("num_replicas=4 per_device_train_batch_size=1 replicas_at_once=3", ["--replicas_at_once 3", "4"]),
        ("resume=auto overwrite_output_dir=true", ["contradict each other"]),
        ("resume=absent", ["--resume absent", "auto, never", "state/STEP"]),
        ("coordinator=here:1", ["--process_id, --num_processes missing"]),
        ("caption_metrics=true", ["--caption_metrics", "--predict_with_generate"]),
        ("metric_for_best_model=bleu", ["--metric_for_best_model bleu", "loss, rouge1", "bleu4, cider."]),
        ("metric_for_best_model=gen_len", ["--metric_for_best_model gen_len", "loss, rouge1"]),
        ("metric_for_best_model=loss", ["--metric_for_best_model loss", "needs --do_eval too"]),
        ("do_eval=true metric_for_best_model=rouge2", ["rouge2: needs --predict_with_generate too"]),
        ("do_eval=true metric_for_best_model=loss save_steps=0", ["--save_steps 0 saves none"]),
        (
            "do_eval=true metric_for_best_model=loss eval_steps=500 protocol=published",
            ["500 nothing is evaluated in 3 steps"],
        ),
    ],
)
def test_flags_that_cannot_be_met_end_a_run_before_training(flags, wanted, whole, capsys):
    words = flags.replace("MODEL", str(whole.model)).split()
    message = whole.refuse(capsys, **dict(word.split("=", 1) for word in words))
    assert [part for part in wanted if part not in message] == []


def no_readable_image(place):
    for image in place.folder.glob("*.png"):
        image.write_bytes(b"not an image")


def no_pad_token(place):
    path = place.model / "config.json"
    path.write_text(path.read_text().replace('"pad_token_id"', '"other_id"'))


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (no_readable_image, ["no row is left of 6", "Check the paths", "0.png"]),
        (lambda place: place.write_captions([None]), ["no row is left for the train split", "it has no caption"]),
        (
            lambda place: (place.model / "flax_model.msgpack").unlink(),
            ["model", "holds no weights", "flax_model.msgpack", "model.safetensors"],
        ),
        (no_pad_token, ["pad_token_id", "config.json"]),
    ],
    ids=["images", "captions", "weights", "pad"],
)
def test_files_that_cannot_be_used_end_a_run_before_training(spoil, wanted, workplace, capsys):
    spoil(workplace)
    message = workplace.refuse(capsys)
    assert [part for part in wanted if part not in message] == []


def test_a_full_output_dir_is_left_as_it_is(workplace, capsys):
    workplace.output_dir.mkdir()
    (workplace.output_dir / "metrics.jsonl").write_text("an earlier run\n")
    assert workplace.train() == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    # Allowed to overwrite, but with other input that cannot be used: the earlier run still stands.
    assert workplace.train(overwrite_output_dir="true", block_size="3") == 2
    assert (workplace.output_dir / "metrics.jsonl").read_text() == "an earlier run\n"


def test_a_single_broken_image_or_caption_is_dropped_counted_and_listed(workplace):
    (workplace.folder / "1.png").write_bytes((workplace.folder / "1.png").read_bytes()[:40])
    workplace.write_captions([*map(str, range(4)), 17, "5"])
    assert workplace.train(save_steps="0") == 0
    dropped = [json.loads(line) for line in (workplace.output_dir / "dropped.jsonl").read_text().splitlines()]
    assert {(row["split"], row["row"]) for row in dropped} == {("train", 1), ("train", 4)}
    assert all(row["reason"] for row in dropped)
    counts = json.loads((workplace.output_dir / "run.json").read_text())["data"]["train"]
    assert (counts["read"], counts["kept"], counts["dropped"]) == (6, 4, 2)
    (checkpoint,) = workplace.output_dir.glob("ckpt_*")
    assert checkpoint.name == "ckpt_epoch_1_step_2", "without an evaluation there is a model"


def test_no_training_ends_without_a_model(workplace):
    evaluated_never = {"protocol": "current", "do_eval": "true", "eval_steps": "500"}
    assert workplace.train(**evaluated_never, save_steps="0", max_train_samples="4") == 0
    (checkpoint,) = workplace.output_dir.glob("ckpt_*")
    assert checkpoint.name == "ckpt_epoch_1_step_2"
    assert (checkpoint / "flax_model.msgpack").is_file()
    assert not (checkpoint / "eval_results.json").exists(), "--eval_steps suppresses the evaluation, as in the example"
