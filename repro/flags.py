"""What flags must satisfy before any file is read."""

from __future__ import annotations

import os
from pathlib import Path

from jax.sharding import Mesh

from repro.config import ModelArguments, TrainingArguments
from repro.errors import InputError
from repro.training.sharding import AXES

AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "num_replicas", "replicas_at_once"),
    *("save_total_limit", "num_processes"),
)
EVALUATION_METRICS = ("loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "gen_len")
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def check_flags(model_args: ModelArguments, args: TrainingArguments) -> Path:
    """Check what needs no file, and return the run's folder."""
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("nothing to do: add --do_train, --do_eval or --do_predict.")
    check_values(model_args, args)
    if args.output_dir is None:
        raise InputError("--output_dir is missing: name a folder for the run.")
    if args.resume != "never" and not args.do_train:
        raise InputError(f"--resume {args.resume}: goes on with training; add --do_train.")
    if args.resume == "auto" and args.overwrite_output_dir:
        raise InputError("--resume auto and --overwrite_output_dir contradict each other: drop one.")
    return Path(args.output_dir)


def is_deterministic(mesh: Mesh) -> bool:
    """Tell whether a run would compute the same bits again: not on a GPU, unless XLA was told to before it started."""
    return mesh.devices.flat[0].platform != "gpu" or DETERMINISTIC in os.environ.get("XLA_FLAGS", "")


def mesh_shape(text: str | None) -> dict[str, int] | None:
    """Read `--mesh data=N,fsdp=M`, of which one may be left out."""
    if text is None:
        return None
    sizes = dict(part.partition("=")[::2] for part in text.split(","))
    if not set(sizes) <= set(AXES) or not all(size.isdecimal() and int(size) > 0 for size in sizes.values()):
        raise InputError(f"--mesh {text}: must be like data=4,fsdp=2, with whole numbers from 1 on.")
    return {axis: int(size) for axis, size in sizes.items()}


def check_values(model_args: ModelArguments, args: TrainingArguments) -> None:
    """Check what needs no file at all: the numbers, and that a model is named."""
    if args.num_train_epochs != int(args.num_train_epochs) or args.num_train_epochs < 1:
        raise InputError(f"--num_train_epochs {args.num_train_epochs}: must be a whole number, at least 1.")
    for name in AT_LEAST_ONE:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1.")
    for name in ("save_steps", "warmup_steps"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise InputError(f"--{name} {value}: must not be negative.")
    if args.max_grad_norm is not None and not args.max_grad_norm > 0:
        raise InputError(f"--max_grad_norm {args.max_grad_norm}: must be above 0; leave it out for no clipping.")
    if args.metric_for_best_model not in (None, *EVALUATION_METRICS):
        raise InputError(
            f"--metric_for_best_model {args.metric_for_best_model}: choose one of {', '.join(EVALUATION_METRICS)}."
        )
    mesh_shape(args.mesh)
    named = (
        model_args.model_name_or_path,
        model_args.encoder_model_name_or_path or model_args.encoder_config_name,
    )
    if named.count(None) == len(named):
        raise InputError(
            "no model is named: give --model_name_or_path, or --encoder_model_name_or_path and"
            " --decoder_model_name_or_path."
        )
