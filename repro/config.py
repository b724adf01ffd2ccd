"""The documented flags of the example, name for name, as three dataclasses, and how a command line becomes them.

The help strings are the flags' documentation, `allowed` the numbers that they take. `Further` flags, which the example
does not have, are marked as such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

from repro.errors import InputError
from repro.limits import SETTINGS_BYTES, read_file
from repro.masking import learn_flags
from repro.parser import Checked, Numbers, Parser, add_fields, sentence

DTYPES = ("float32", "float16", "bfloat16")
IMPLEMENTATIONS = ("native", "transformers")
FORMATS = ("msgpack", "safetensors", "pickle")

USAGE = "%(prog)s FLAGS\n       %(prog)s FILE [FLAGS]"
HOW_FLAGS_ARE_WRITTEN = (
    " FILE (.json, .yaml, .yml or .toml) holds flags and their values; flags that follow it win. A flag with [BOOL] may"
    " stand alone, which means true."
)
FILES_OF_FLAGS = (".json", ".yaml", ".yml", ".toml")
# The parts of the help, each by its first flag.
GROUPS = {
    "model_name_or_path": "model",
    "dtype": "computation",
    "dataset_name": "data",
    "max_target_length": "captions and rows",
    "preprocessing_num_workers": "reading images",
    "predict_with_generate": "evaluation",
    "output_dir": "run",
    "per_device_train_batch_size": "training",
    "push_to_hub": "upload",
    "protocol": "what is computed",
    "replicas_at_once": "layout: time and memory",
    "save_steps": "states, to go on from",
    "coordinator": "several processes",
    "topology": "TPUs",
    "report_dir": "report",
}

NATURAL, COUNT, LENGTH = Numbers(0), Numbers(1), Numbers(2)
SEED = Numbers(0, 2**32 - 1)
POSITIVE = Numbers(0, math.inf, without=(0,))
NOT_NEGATIVE = Numbers(0, math.inf)
SHARE = Numbers(0, 1, without=(1,))
TOPOLOGY = "TPUs that are not at hand, such as v3:2x2 or v5e:2x4, and say what it takes of them"


def flag(default: Any, text: str, allowed: Numbers | None = None, **metadata: Any) -> Any:
    about = {"help": text, "allowed": allowed, **metadata}
    return field(default=default, repr=not metadata.get("secret"), metadata=about)


def _free(default: Any, text: str, allowed: Numbers | None = None, **metadata: Any) -> Any:
    """A flag that may change when a run is resumed: what it computes does not depend on it, or is compared itself."""
    return flag(default, text, allowed, may_change=True, **metadata)


@dataclass(frozen=True)
class CreateModelArguments(Checked):
    """What `repro create-model` takes; the same six flags may be given to `repro train`."""

    encoder_model_name_or_path: str | None = flag(None, "Folder or Hub id of the vision encoder's weights.")
    decoder_model_name_or_path: str | None = flag(None, "Folder or Hub id of the text decoder's weights and tokenizer.")
    encoder_config_name: str | None = flag(None, "The encoder's configuration; alone, its weights are random.")
    decoder_config_name: str | None = flag(None, "The decoder's configuration; alone, its weights are random.")
    weights_format: str | None = flag(None, "Of their weights, those in this format.", choices=FORMATS)
    seed: int = flag(42, "Seed of the weights that are not loaded.", SEED)
    output_dir: str | None = flag(None, "Folder to write the new model to.", required=True)


@dataclass(frozen=True)
class ExportArguments(Checked):
    """What `repro export` takes."""

    model_name_or_path: str | None = flag(None, "Folder or Hub id of the model to export.", required=True)
    output_dir: str | None = flag(None, "Folder to write it to.", required=True)
    weights_format: str | None = flag(None, "Of its weights, those in this format.", choices=FORMATS)


@dataclass(frozen=True)
class ModelArguments(Checked):
    """The model and how it computes."""

    model_name_or_path: str | None = _free(None, "Folder or Hub id of a whole model with its tokenizer.")
    encoder_model_name_or_path: str | None = _free(None, "Instead of a whole model: the encoder (see create-model).")
    decoder_model_name_or_path: str | None = _free(None, "Instead of a whole model: the decoder (see create-model).")
    encoder_config_name: str | None = _free(None, "Configuration of the encoder, if not its own.")
    decoder_config_name: str | None = _free(None, "Configuration of the decoder, if not its own.")
    weights_format: str | None = _free(None, "Further: of its weights, those in this format.", choices=FORMATS)
    cache_dir: str | None = _free(None, "Where downloads, rows, tokens and images are kept (default: Hugging Face's).")
    use_fast_tokenizer: bool = _free(True, "Use the tokenizers library's tokenizer.")
    token: str | None = _free(None, "Hub token, for private models and data sets.", secret=True)
    trust_remote_code: bool = _free(False, "Allow a Hub model to run its own code.")
    dtype: str = flag("float32", "Type of the computation; parameters stay float32.", choices=DTYPES)
    model_implementation: str | None = flag(None, "Further: whose (native where it can).", choices=IMPLEMENTATIONS)
    gradient_checkpointing: bool = _free(False, "Further: recompute activations backward, for less memory (native).")


@dataclass(frozen=True)
class DataArguments(Checked):
    """The captioned images, and what is evaluated on them."""

    dataset_name: str | None = _free(
        None, "Hub id or folder; ydshieh/dummy_coco_dataset, ydshieh/coco_dataset_script mean the built-in COCO reader."
    )
    dataset_config_name: str | None = _free(None, "Its configuration; for COCO the year, 2017.")
    data_dir: str | None = _free(None, "Folder of COCO's zips or folders, or in which a list's relative paths begin.")
    image_column: str | None = _free(None, "Column with the images or their paths.")
    caption_column: str | None = _free(None, "Column with the captions, text or lists of texts.")
    train_file: str | None = _free(
        None,
        "Training rows: csv, tsv, txt, json (also COCO's or Karpathy's), jsonl, parquet, WebDataset's tar, or a folder"
        " of images with a text beside each.",
    )
    validation_file: str | None = _free(None, "Validation rows, likewise.")
    test_file: str | None = _free(None, "Test rows, likewise.")
    max_target_length: int = flag(128, "Tokens per training caption, padded and truncated.", LENGTH)
    val_max_target_length: int | None = flag(
        None, "Tokens per evaluated or generated caption, with the start token (default: max_target_length).", LENGTH
    )
    max_train_samples: int | None = _free(None, "Use only the first rows for training.", COUNT)
    max_eval_samples: int | None = _free(None, "Use only the first rows for evaluation.", COUNT)
    max_predict_samples: int | None = _free(None, "Use only the first rows for prediction.", COUNT)
    preprocessing_num_workers: int | None = _free(None, "Threads that decode images (default: one a core).", COUNT)
    overwrite_cache: bool = _free(False, "Read the rows and decode the images again.")
    image_cache: bool = _free(
        True, "Further: keep decoded images on disk; --no_image_cache keeps --block_size of them in memory (0: all)."
    )
    predict_with_generate: bool = flag(False, "Generate captions and compute ROUGE.")
    caption_metrics: bool = flag(False, "Further: BLEU and CIDEr-D too, of one caption an image against all it has.")
    attention_pictures: int = _free(
        12, "Further: validation images of which the report shows where each word of their caption looks.", NATURAL
    )
    num_beams: int | None = flag(None, "Beams (default: the model's configuration).", COUNT)


@dataclass(frozen=True)
class TrainingArguments(Checked):
    """The run: what is done, for how long, and how its numbers are computed."""

    output_dir: str | None = _free(None, "Folder of the run.")
    overwrite_output_dir: bool = _free(False, "Replace the run in output_dir, if there is one.")
    do_train: bool = _free(False, "Train.")
    do_eval: bool = _free(False, "Evaluate on the validation rows, during training too.")
    do_predict: bool = _free(False, "Caption the test rows.")
    per_device_train_batch_size: int = flag(8, "Training rows per replica and step.", COUNT)
    per_device_eval_batch_size: int = flag(8, "Evaluation rows per replica and step.", COUNT)
    block_size: int = _free(0, "Rows per block, a multiple of the global batch sizes; 0: one block.", NATURAL)
    learning_rate: float = flag(5e-5, "Peak learning rate of AdamW.", NOT_NEGATIVE)
    weight_decay: float = flag(0.0, "Decoupled weight decay of AdamW.", NOT_NEGATIVE)
    adam_beta1: float = flag(0.9, "Beta 1 of AdamW.", SHARE)
    adam_beta2: float = flag(0.999, "Beta 2 of AdamW.", SHARE)
    adam_epsilon: float = flag(1e-8, "Epsilon of AdamW.", POSITIVE)
    label_smoothing_factor: float = flag(0.0, "Probability spread over the other tokens.", SHARE)
    num_train_epochs: float = flag(3.0, "Times to go over the training rows (a whole number).", Numbers(1, whole=True))
    warmup_steps: int = flag(0, "Steps of linear warm-up from 0.", NATURAL)
    logging_steps: int = _free(500, "Steps between two lines in the log and in TensorBoard.", NATURAL)
    eval_steps: int | None = _free(None, "Steps between two evaluations and checkpoints (default: an epoch).", NATURAL)
    seed: int = flag(42, "Seed of the rows' order and of dropout.", SEED)
    push_to_hub: bool = _free(False, "Upload the checkpoints to the Hugging Face Hub.")
    hub_model_id: str | None = _free(None, "Repository there (default: output_dir's name).")
    hub_token: str | None = _free(None, "Token with write access there.", secret=True)
    protocol: str = flag(
        "exact", "Further: whose numeric choices: published, current or exact; some changed: published,stop_rule=exact."
    )
    num_replicas: int | None = _free(None, "Further: replicas, whatever computes them (default: devices).", COUNT)
    max_grad_norm: float | None = flag(None, "Further: scale gradients of a larger norm down to it.", POSITIVE)
    log_grad_norm: bool = _free(False, "Further: write the norm of each step's gradient to metrics.jsonl.")
    deterministic: bool = _free(False, "Further: same bits in every run on a GPU too, without its fastest kernels.")
    replicas_at_once: int | None = _free(None, "Further: replicas computed at once (default: as many as fit).", COUNT)
    mesh: str | None = _free(
        None, "Further: layout of the devices; fsdp cuts parameters too (default: all data).", metavar="data=N,fsdp=M"
    )
    save_steps: int | None = _free(
        None, "Further: steps between states, besides those at evaluations and ends of epochs; 0: no state.", NATURAL
    )
    save_total_limit: int = _free(2, "Further: how many of the last states are kept.", COUNT)
    metric_for_best_model: str | None = _free(None, "Further: keep the state of the best METRIC too.", metavar="METRIC")
    resume: str = _free(
        "never", "Further: auto resumes output_dir's last state; or a run's or a state's folder.", metavar="auto|FOLDER"
    )
    coordinator: str | None = _free(None, "Further: where process 0 of several listens.", metavar="HOST:PORT")
    process_id: int | None = _free(None, "Further: number of this process, from 0.", NATURAL)
    num_processes: int | None = _free(None, "Further: how many processes there are.", COUNT)
    distributed: bool = _free(
        False, "Further: several processes, found by JAX (Slurm, Open MPI and GKE are recognized without it)."
    )


@dataclass(frozen=True)
class CheckArguments(Checked):
    """What `repro data check` takes besides the flags of the run."""

    topology: str | None = flag(None, f"Compile the run for {TOPOLOGY}, too.")
    report_dir: str = flag("data-check", "Folder for data_check.json and the picture sheet data_check.png.")
    num_pictures: int = flag(24, "Random rows on the picture sheet.", NATURAL)


# What a run takes; and of it, how the flags of two halves of a model begin, and what tells processes apart.
ARGUMENTS = (ModelArguments, DataArguments, TrainingArguments)
FLAGS = {each.name: each for kind in ARGUMENTS for each in fields(kind)}
HALVES = ("encoder_", "decoder_")
SEVERAL = ("coordinator", "process_id", "num_processes", "distributed")


def parse_arguments(
    classes: Sequence[type[Checked]], argv: Sequence[str], *, command: str, about: str = ""
) -> tuple[Any, ...]:
    """Parse `argv` as `given_flags` does into one instance of each class."""
    description = sentence(about) + HOW_FLAGS_ARE_WRITTEN
    return make_arguments(classes, given_flags(classes, argv, command=command, usage=USAGE, description=description))


def given_flags(
    classes: Sequence[type[Checked]],
    argv: Sequence[str],
    *,
    command: str,
    hidden: Sequence[type[Checked]] = (),
    **help_texts: str,
) -> dict[str, Any]:
    """Parse `argv`, whose first word may be a file of flags; returns the values of the flags that are given, by name.

    A flag may be written with dashes for its underscores. One that is true or false may stand alone, or have a value.

    Args:
        command: that the help is of; `help_texts` are argparse's.
        hidden: those of the classes that the help leaves out.

    Raises:
        InputError: a flag is unknown (the nearest known one is named), lacks its value or has a wrong one.
        SystemExit: `--help` was asked for.
    """
    parser = Parser(prog=f"repro {command}", **help_texts)
    for dataclass_type in classes:
        add_fields(parser, dataclass_type, GROUPS if len(classes) > 1 else {}, hidden=dataclass_type in hidden)
    if argv and argv[0].endswith(FILES_OF_FLAGS) and not argv[0].startswith("-"):
        argv = [*_read_flags(argv[0]), *argv[1:]]
        learn_flags(argv)
    return vars(parser.parse_args(argv))


def make_arguments(classes: Sequence[type[Checked]], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """Make an instance of each class of the flags given, others as by default; an InputError names one out of range."""
    return tuple(kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given}) for kind in classes)  # type: ignore[arg-type]


def _read_flags(path: str) -> list[str]:
    """Turn a file of flags into the command line that says the same, so that both are checked alike."""
    form: Any = {".json": msgspec.json, ".toml": msgspec.toml}.get(Path(path).suffix, msgspec.yaml)
    try:
        flags = form.decode(read_file(path, SETTINGS_BYTES), type=dict[str, str | bool | int | float | None])
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
        raise InputError(f"{path}: cannot be read as flags and their values: {error}") from error
    return flags_of(flags)


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """Write flags and their values as a command line does."""
    return [f"--{name}={value}" for name, value in values.items() if value is not None]
