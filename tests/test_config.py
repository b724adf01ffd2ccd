"""The documented flags: their defaults and types, and how they are read, also from a file."""

import json

import pytest
from transformers import HfArgumentParser

from repro.config import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from repro.errors import InputError

TRAIN_CLASSES = (ModelArguments, DataArguments, TrainingArguments)
TEXTS = (
    *("model_name_or_path", "encoder_model_name_or_path", "decoder_model_name_or_path"),
    *("encoder_config_name", "decoder_config_name", "cache_dir", "token"),
    *("dataset_name", "dataset_config_name", "data_dir", "image_column", "caption_column"),
    *("train_file", "validation_file", "test_file", "hub_model_id", "hub_token"),
    *("mesh", "metric_for_best_model", "coordinator"),
)
COUNTS = (
    *("val_max_target_length", "max_train_samples", "max_eval_samples", "max_predict_samples"),
    *("preprocessing_num_workers", "num_beams", "eval_steps", "num_replicas", "replicas_at_once", "save_steps"),
    *("process_id", "num_processes"),
)
SWITCHES = (
    *("trust_remote_code", "gradient_checkpointing", "predict_with_generate", "overwrite_cache", "caption_metrics"),
    *("overwrite_output_dir", "do_train", "do_eval", "do_predict", "push_to_hub"),
    *("log_grad_norm", "deterministic", "distributed"),
)
WHOLE = {
    **{"max_target_length": 128, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "block_size": 0},
    **{"warmup_steps": 0, "logging_steps": 500, "seed": 42, "attention_pictures": 12, "save_total_limit": 2},
}
REAL = {
    **{"learning_rate": 5e-5, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
    **{"label_smoothing_factor": 0.0, "max_grad_norm": None},
}
# By flag: the default, a value as it is typed, and what that becomes.
FLAGS = {
    **dict.fromkeys(TEXTS, (None, "a-b=c", "a-b=c")),
    **dict.fromkeys(COUNTS, (None, "16", 16)),
    **dict.fromkeys(SWITCHES, (False, "True", True)),
    **{name: (default, "16", 16) for name, default in WHOLE.items()},
    **{name: (default, "3e-5", 3e-5) for name, default in REAL.items()},
    "num_train_epochs": (3.0, "1", 1.0),
    "use_fast_tokenizer": (True, "False", False),
    "image_cache": (True, "False", False),
    "dtype": ("float32", "bfloat16", "bfloat16"),
    "model_implementation": (None, "native", "native"),
    "weights_format": (None, "safetensors", "safetensors"),
    "protocol": ("exact", "published", "published"),
    "resume": ("never", "auto", "auto"),
}
BOOLEAN = (*SWITCHES, "use_fast_tokenizer", "image_cache")
SPACED = [word for name, (_, typed, _) in FLAGS.items() for word in (f"--{name}", typed)]
DASHED = [f"--{name.replace('_', '-')}={typed}" for name, (_, typed, _) in FLAGS.items()]


def parse(*argv):
    """All flags of `repro train` in one dictionary."""
    parsed = parse_arguments(TRAIN_CLASSES, argv, command="train")
    return {name: value for arguments in parsed for name, value in vars(arguments).items()}


def with_types(flags):
    return {name: (type(value), value) for name, value in flags.items()}


def test_every_flag_has_its_default_and_its_type():
    defaults = {name: default for name, (default, _, _) in FLAGS.items()}
    assert with_types(parse()) == with_types({**defaults, "output_dir": None})
    given = {name: value for name, (_, _, value) in FLAGS.items()}
    for argv in (SPACED, DASHED):
        assert with_types(parse("--output_dir", "out", *argv)) == with_types({**given, "output_dir": "out"})


def test_flags_are_read_as_the_examples_own_parser_reads_them():
    class Theirs(HfArgumentParser):
        def add_argument(self, *names, may_change=False, allowed=None, secret=False, **options):
            return super().add_argument(*names, **options)

        def error(self, message):
            raise InputError(message)

    def read(parser, *arguments, **more):
        try:
            return parser(*arguments, **more)
        except InputError:
            return "refused"

    for argv in (
        SPACED,
        DASHED,
        [*(f"--{name}" for name in BOOLEAN), "--seed", "3"],
        ["--no_use_fast_tokenizer", "--no_image_cache"],
        ["--no-use-fast-tokenizer", "--no-image-cache"],
        *(["--do_train", text] for text in ("yes", "T", "y", "1", "NO", "f", "n", "0", "perhaps")),
        ["--image_cache", "false", "--image_cache"],
    ):
        theirs = read(Theirs(TRAIN_CLASSES, allow_abbrev=False).parse_args_into_dataclasses, argv)
        assert read(parse_arguments, TRAIN_CLASSES, argv, command="train") == theirs, argv


@pytest.mark.parametrize(("suffix", "line"), [("toml", "{} = {}\n"), ("yaml", "{}: {}\n"), ("json", None)])
def test_a_file_says_the_same_as_the_command_line_and_flags_that_follow_it_win(tmp_path, suffix, line):
    flags = {"output_dir": "out", "do_train": True, "use_fast_tokenizer": False, "learning_rate": 3e-5, "seed": 7}
    flags |= {"num_train_epochs": 2, "data_dir": "a folder/with spaces", "train_file": "-odd=name.csv"}
    lines = [line.format(name, json.dumps(value)) for name, value in flags.items()] if line else []
    path = tmp_path / f"flags.{suffix}"
    path.write_text("".join(lines) or json.dumps({**flags, "eval_steps": None}))
    assert parse(str(path)) == {**parse(), **flags}
    assert parse(str(path), "--seed", "8") == {**parse(), **flags, "seed": 8}


BOMB = "\n".join(["a: &a0 [1, 1]", *(f"b{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flags.json", '{"learning_rat": 1}', "'--learning_rat'.*--learning_rate"),
        ("flags.json", '{"learning_rate": "fast"}', "--learning_rate.*'fast'"),
        ("flags.json", '{"do_train": "perhaps"}', "--do_train.*'perhaps'"),
        ("flags.json", '{"output_dir": "a\\u0000b"}', r"--output_dir 'a\\x00b': holds a null character"),
        ("flags.json", "[1]", "cannot be read as flags.*Expected `object`"),
        ("flags.json", "{", "cannot be read as flags.*truncated"),
        ("flags.yaml", BOMB, "cannot be read as flags.*got `array`"),
    ],
    ids=range(7),
)
def test_a_wrong_file_of_flags_is_refused_with_its_fault(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        parse(str(tmp_path / name))


def test_help_ends_the_program_and_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert [name for name in FLAGS if f"--{name}" not in shown] == []
    assert "Rows per block, a multiple of the global batch sizes; 0: one block (default: 0)." in " ".join(shown.split())
