"""The documented flags, one by one, and what is said about a wrong one; the protocols' table."""

from __future__ import annotations

import json

import pytest
from transformers import HfArgumentParser

from repro.config import CreateModelArguments, DataArguments, ModelArguments, TrainingArguments, parse_arguments
from repro.errors import InputError
from repro.protocol import protocol_named

# (flag, default, a value as it is typed, the value it becomes)
MODEL_FLAGS = [
    ("model_name_or_path", None, "model", "model"),
    ("encoder_model_name_or_path", None, "google/vit", "google/vit"),
    ("decoder_model_name_or_path", None, "gpt2", "gpt2"),
    ("encoder_config_name", None, "vit", "vit"),
    ("decoder_config_name", None, "gpt2", "gpt2"),
    ("cache_dir", None, "cache", "cache"),
    ("use_fast_tokenizer", True, "False", False),
    ("dtype", "float32", "bfloat16", "bfloat16"),
    ("dtype", "float32", "float16", "float16"),
    ("token", None, "secret", "secret"),
    ("trust_remote_code", False, "True", True),
]
DATA_FLAGS = [
    ("dataset_name", None, "ydshieh/dummy_coco_dataset", "ydshieh/dummy_coco_dataset"),
    ("dataset_config_name", None, "2017", "2017"),
    ("data_dir", None, "data", "data"),
    ("image_column", None, "image_path", "image_path"),
    ("caption_column", None, "caption", "caption"),
    ("train_file", None, "train.csv", "train.csv"),
    ("validation_file", None, "val.json", "val.json"),
    ("test_file", None, "test.jsonl", "test.jsonl"),
    ("max_target_length", 128, "32", 32),
    ("val_max_target_length", None, "16", 16),
    ("max_train_samples", None, "10", 10),
    ("max_eval_samples", None, "10", 10),
    ("max_predict_samples", None, "10", 10),
    ("preprocessing_num_workers", None, "16", 16),
    ("predict_with_generate", False, "True", True),
    ("num_beams", None, "8", 8),
    ("overwrite_cache", False, "true", True),
]
TRAINING_FLAGS = [
    ("overwrite_output_dir", False, "1", True),
    ("do_train", False, "True", True),
    ("do_eval", False, "yes", True),
    ("do_predict", False, "True", True),
    ("per_device_train_batch_size", 8, "32", 32),
    ("per_device_eval_batch_size", 8, "32", 32),
    ("block_size", 0, "16384", 16384),
    ("learning_rate", 5e-5, "3e-5", 3e-5),
    ("weight_decay", 0.0, "0.01", 0.01),
    ("adam_beta1", 0.9, "0.8", 0.8),
    ("adam_beta2", 0.999, "0.98", 0.98),
    ("adam_epsilon", 1e-8, "1e-6", 1e-6),
    ("label_smoothing_factor", 0.0, "0.1", 0.1),
    ("num_train_epochs", 3.0, "1", 1.0),
    ("warmup_steps", 0, "100", 100),
    ("logging_steps", 500, "10", 10),
    ("eval_steps", None, "500", 500),
    ("seed", 42, "7", 7),
    ("push_to_hub", False, "True", True),
    ("hub_model_id", None, "me/model", "me/model"),
    ("hub_token", None, "secret", "secret"),
]
FURTHER_FLAGS = [
    ("protocol", "exact", "published", "published"),
    ("num_replicas", None, "8", 8),
    ("model_implementation", None, "native", "native"),
    ("weights_format", None, "safetensors", "safetensors"),
    ("gradient_checkpointing", False, "true", True),
    ("image_cache", True, "False", False),
    ("caption_metrics", False, "True", True),
    ("attention_pictures", 12, "3", 3),
    ("replicas_at_once", None, "4", 4),
    ("mesh", None, "data=4,fsdp=2", "data=4,fsdp=2"),
    ("max_grad_norm", None, "1", 1.0),
    ("log_grad_norm", False, "True", True),
    ("deterministic", False, "True", True),
    ("save_steps", None, "50", 50),
    ("save_total_limit", 2, "3", 3),
    ("metric_for_best_model", None, "rouge2", "rouge2"),
    ("resume", "never", "auto", "auto"),
    ("coordinator", None, "host-0:1234", "host-0:1234"),
    ("process_id", None, "1", 1),
    ("num_processes", None, "4", 4),
    ("distributed", False, "True", True),
]
TRAIN_CLASSES = (ModelArguments, DataArguments, TrainingArguments)
ALL_FLAGS = MODEL_FLAGS + DATA_FLAGS + TRAINING_FLAGS + FURTHER_FLAGS


def parse(*argv: str) -> dict:
    """All flags of `repro train` in one dictionary."""
    parsed = parse_arguments(TRAIN_CLASSES, argv, command="train")
    return {name: value for arguments in parsed for name, value in vars(arguments).items()}


def parse_create(*argv: str) -> dict:
    return vars(*parse_arguments((CreateModelArguments,), argv, command="create-model"))


def assert_is(value, expected):
    assert value == expected
    assert type(value) is type(expected)


@pytest.fixture(scope="module")
def defaults() -> dict:
    return parse("--output_dir", "out")


def test_the_tables_name_every_flag(defaults):
    assert set(defaults) == {"output_dir", *(flag for flag, *_ in ALL_FLAGS)}


@pytest.mark.parametrize(("flag", "default", "typed", "value"), ALL_FLAGS)
def test_flag_of_train_has_its_default_and_its_type(defaults, flag, default, typed, value):
    assert_is(defaults[flag], default)
    assert_is(parse("--output_dir", "out", f"--{flag}", typed)[flag], value)
    assert_is(parse("--output_dir", "out", f"--{flag}={typed}")[flag], value)


@pytest.mark.parametrize(
    "argv",
    [
        *([f"--{flag}", typed] for flag, _, typed, _ in ALL_FLAGS),
        *([f"--{flag.replace('_', '-')}={typed}"] for flag, _, typed, _ in ALL_FLAGS),
        *([f"--{flag}", "--seed", "3"] for flag, default, *_ in ALL_FLAGS if isinstance(default, bool)),
        *([f"--no_{flag}"] for flag, default, *_ in ALL_FLAGS if default is True),
        *([f"--no-{flag.replace('_', '-')}"] for flag, default, *_ in ALL_FLAGS if default is True),
        *(["--do_train", text] for text in ("yes", "T", "y", "1", "NO", "f", "n", "0", "perhaps")),
        ["--image_cache", "false", "--image_cache"],
        ["--data_dir=a=b", "--train_file", "a-b_c.csv"],
    ],
    ids=" ".join,
)
def test_flags_are_read_as_the_examples_own_parser_reads_them(argv):
    class Theirs(HfArgumentParser):
        def add_argument(self, *names, may_change=False, allowed=None, secret=False, **options):
            return super().add_argument(*names, **options)

        def error(self, message):
            raise InputError(message)

    def read(parser):
        try:
            return parser()
        except InputError:
            return "refused"

    theirs = read(lambda: Theirs(TRAIN_CLASSES, allow_abbrev=False).parse_args_into_dataclasses(argv))
    assert read(lambda: parse_arguments(TRAIN_CLASSES, argv, command="train")) == theirs


def test_a_json_file_says_the_same_as_the_command_line(tmp_path):
    flags = {"output_dir": "out", "do_train": True, "use_fast_tokenizer": False, "learning_rate": 3e-5, "seed": 7}
    flags |= {"num_train_epochs": 2, "data_dir": "a folder/with spaces", "train_file": "-odd=name.csv"}
    flags |= {"eval_steps": None}
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(flags))
    read = parse(str(path))
    assert {name: read[name] for name in flags} == flags
    assert read == parse(
        *("--output_dir", "out", "--do_train", "--use_fast_tokenizer", "False", "--learning_rate", "3e-5"),
        *("--seed", "7", "--num_train_epochs", "2", "--data_dir", "a folder/with spaces"),
        "--train_file=-odd=name.csv",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"output_dir": "out", "learning_rat": 1}', "'--learning_rat'.*--learning_rate"),
        ('{"output_dir": "out", "learning_rate": "fast"}', "learning_rate.*'fast'"),
        ('{"output_dir": "out", "do_train": "perhaps"}', "do_train|perhaps"),
        ("[1]", "cannot be read as flags.*Expected `object`"),
        ("{", "cannot be read as flags.*truncated"),
        (None, "cannot be read as flags.*No such file"),
    ],
    ids=["unknown", "wrong-type", "wrong-bool", "no-object", "no-json", "no-file"],
)
def test_a_wrong_json_file_is_refused_with_its_fault(tmp_path, content, message):
    path = tmp_path / "flags.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        parse(str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rte", "1"], r"unknown argument '--learning_rte'\. Did you mean --learning_rate\?"),
        (["--learning_rte=1"], r"Did you mean --learning_rate\?"),
        (["--num_beam", "4"], r"unknown argument '--num_beam'\. Did you mean --num_beams\?"),
        (["--zzzzzzzz"], r"unknown argument '--zzzzzzzz'"),
        (["stray"], "unknown argument 'stray'"),
        (["--learning_rate", "fast"], "--learning_rate.*: .*'fast'.*repro train --help"),
        (["--num_beams", "2.5"], r"--num_beams.*: .*'2\.5'"),
        (["--do_train", "perhaps"], "perhaps|do_train"),
        (["--dtype", "float64"], "--dtype.*: .*'float64'.*bfloat16"),
        (["--learning_rate"], "--learning_rate.*: expected one argument"),
    ],
)
def test_a_wrong_flag_is_refused_with_its_remedy(argv, message):
    with pytest.raises(InputError, match=message):
        parse("--output_dir", "out", *argv)


def test_create_model_refuses_flags_of_training():
    with pytest.raises(InputError, match="--num_beams"):
        parse_create("--num_beams", "8")


def test_help_ends_the_program_and_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert [flag for flag, *_ in ALL_FLAGS if f"--{flag}" not in shown] == []
    assert "Rows per block, a multiple of the global batch sizes; 0: one block (default: 0)." in " ".join(shown.split())


def test_an_unknown_protocol_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"'precise'.*published, current, exact"):
        protocol_named("precise")
