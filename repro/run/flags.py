"""What flags must satisfy before any file is read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from repro.config import HALVES, DataArguments, ModelArguments, TrainingArguments
from repro.errors import InputError
from repro.record.metrics import METRICS
from repro.training.sharding import AXES

MESH_SIZE = re.compile(r"[1-9][0-9]{0,8}")
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def check_flags(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> Path:
    """Check what needs no file, and return the run's folder."""
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("nothing to do: add --do_train, --do_eval or --do_predict.")
    check_values(model_args, data_args, args)
    if args.output_dir is None:
        raise InputError("--output_dir is missing: name a folder for the run.")
    if args.resume != "never" and not args.do_train:
        raise InputError(f"--resume {args.resume}: goes on with training; add --do_train.")
    return Path(args.output_dir)


def is_deterministic(mesh: Mesh) -> bool:
    """Tell whether a run would compute the same bits again: not on a GPU, unless XLA was told to before it started."""
    return mesh.devices.flat[0].platform != "gpu" or DETERMINISTIC in os.environ.get("XLA_FLAGS", "")


def mesh_shape(text: str | None) -> dict[str, int] | None:
    """Read `--mesh data=N,fsdp=M`, of which one may be left out."""
    if text is None:
        return None
    parts = text.split(",")
    sizes = dict(part.partition("=")[::2] for part in parts)
    known = len(sizes) == len(parts) and set(sizes) <= set(AXES)
    if not known or not all(MESH_SIZE.fullmatch(size) for size in sizes.values()):
        raise InputError(f"--mesh {text}: must be like data=4,fsdp=2, each once and with whole numbers from 1 on.")
    return {axis: int(size) for axis, size in sizes.items()}


def check_values(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Check what needs no file at all: that the flags do not contradict each other, and that a model is named."""
    if args.resume == "auto" and args.overwrite_output_dir:
        raise InputError("--resume auto and --overwrite_output_dir contradict each other: drop one.")
    mesh_shape(args.mesh)
    if data_args.caption_metrics and not data_args.predict_with_generate:
        raise InputError("--caption_metrics: scores generated captions; add --predict_with_generate.")
    if args.metric_for_best_model is not None:
        _check_metric(args.metric_for_best_model, {**vars(data_args), **vars(args)})
    halves = {name: value for name, value in vars(model_args).items() if name.startswith(HALVES)}
    named = [f"--{name}" for name, value in halves.items() if value is not None]
    if model_args.model_name_or_path is not None and named:
        raise InputError(f"--model_name_or_path names a whole model, {', '.join(named)} a part of one: drop one.")
    if model_args.model_name_or_path is None and not any(name.startswith("--encoder_") for name in named):
        raise InputError(
            "no model is named: give --model_name_or_path, or --encoder_model_name_or_path and"
            " --decoder_model_name_or_path."
        )


def _check_metric(metric: str, flags: Mapping[str, Any]) -> None:
    """Check that a metric has a best value, and that a run computes it and saves states."""
    known = [name for name, found in METRICS.items() if found.better]
    if metric not in known:
        raise InputError(f"--metric_for_best_model {metric}: choose one of {', '.join(known)}.")
    missing = [f"--{name}" for name in ("do_train", "do_eval", METRICS[metric].needs) if not flags[name]]
    if missing:
        raise InputError(f"--metric_for_best_model {metric}: needs {', '.join(dict.fromkeys(missing))} too.")
    if flags["save_steps"] == 0:
        raise InputError(f"--metric_for_best_model {metric}: keeps a state, --save_steps 0 saves none: drop one.")
