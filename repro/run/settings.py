"""What a run is asked to do: each question about it is answered once, here, and nothing below sees flags."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets.config
from jax.sharding import Mesh

from repro.config import FLAGS, HALVES, DataArguments, ModelArguments, TrainingArguments
from repro.errors import InputError
from repro.masking import SECRET_FLAGS
from repro.parser import Checked
from repro.protocol import Protocol, protocol_named
from repro.record.metrics import METRICS
from repro.training.sharding import AXES

MESH_SIZE = re.compile(r"[1-9][0-9]{0,8}")
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# By split: the flag that asks for it, and the one that limits its rows.
SPLITS = {
    "train": ("do_train", "max_train_samples"),
    "validation": ("do_eval", "max_eval_samples"),
    "test": ("do_predict", "max_predict_samples"),
}


@dataclass(frozen=True)
class Settings(ModelArguments, DataArguments, TrainingArguments):
    """The flags of a run, which do not contradict each other, and what follows from them.

    How long the run is follows from its rows: it can be asked once `with_rows` has been told their number.

    Raises:
        InputError: when it is made; flags contradict each other, or something is missing.
    """

    num_devices: int = 1  # that compute the run
    num_rows: Mapping[str, int] = field(default_factory=dict)  # of each split that it uses

    @classmethod
    def of(cls, *arguments: Checked, num_devices: int) -> Settings:
        """Put the instances of `ARGUMENTS` together."""
        return cls(**{name: value for part in arguments for name, value in vars(part).items()}, num_devices=num_devices)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.splits:
            raise InputError("nothing to do: add --do_train, --do_eval or --do_predict.")
        if self.resume == "auto" and self.overwrite_output_dir:
            raise InputError("--resume auto and --overwrite_output_dir contradict each other: drop one.")
        if self.resume != "never" and not self.do_train:
            raise InputError(f"--resume {self.resume}: goes on with training; add --do_train.")
        mesh_shape(self.mesh)
        if self.caption_metrics and not self.predict_with_generate:
            raise InputError("--caption_metrics: scores generated captions; add --predict_with_generate.")
        if self.metric_for_best_model is not None:
            self._check_metric(self.metric_for_best_model)
        named = [f"--{name}" for name, value in self.flags.items() if name.startswith(HALVES) and value is not None]
        if self.model_name_or_path is not None and named:
            raise InputError(f"--model_name_or_path names a whole model, {', '.join(named)} a part of one: drop one.")
        if self.model_name_or_path is None and not any(name.startswith("--encoder_") for name in named):
            raise InputError(
                "no model is named: give --model_name_or_path, or --encoder_model_name_or_path and"
                " --decoder_model_name_or_path."
            )

    def _check_metric(self, metric: str) -> None:
        """Check that a metric has a best value, and that the run computes it and saves states."""
        known = [name for name, found in METRICS.items() if found.better]
        if metric not in known:
            raise InputError(f"--metric_for_best_model {metric}: choose one of {', '.join(known)}.")
        needed = dict.fromkeys(["do_train", "do_eval", METRICS[metric].needs])
        if missing := [f"--{name}" for name in needed if not self.flags[name]]:
            raise InputError(f"--metric_for_best_model {metric}: needs {', '.join(missing)} too.")
        if self.save_steps == 0:
            raise InputError(f"--metric_for_best_model {metric}: keeps a state, --save_steps 0 saves none: drop one.")

    # What is computed, and where.

    @property
    def flags(self) -> dict[str, Any]:
        """All flags as they were given, but for secrets."""
        return {name: getattr(self, name) for name in FLAGS if name not in SECRET_FLAGS}

    @cached_property
    def rules(self) -> Protocol:
        """The numeric choices that `--protocol` names."""
        return protocol_named(self.protocol)

    @property
    def replicas(self) -> int:
        """Replicas that the run is made of, whatever computes them."""
        return self.num_replicas or self.num_devices

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        if self.output_dir is None:
            raise InputError("--output_dir is missing: name a folder for the run.")
        return Path(self.output_dir)

    @property
    def cache(self) -> Path:
        """Where rows, tokens and decoded images are kept."""
        return Path(datasets.config.HF_CACHE_HOME if self.cache_dir is None else self.cache_dir) / "repro"

    # Its rows.

    @property
    def splits(self) -> list[str]:
        """The splits that it uses."""
        return [split for split, (flag, _) in SPLITS.items() if getattr(self, flag)]

    def max_length(self, split: str) -> int:
        """Tokens of a caption, or of a generated one."""
        length = None if split == "train" else self.val_max_target_length
        return length or self.max_target_length

    def converts_to_rgb(self, split: str) -> bool:
        """Tell whether images of other modes are converted in a split, or their rows dropped."""
        return self.rules.convert_to_rgb if split == "train" else self.rules.convert_evaluated_to_rgb

    @property
    def shuffle(self) -> bool:
        return self.block_size > 0 or self.rules.shuffle_without_blocks

    # How long it is.

    def with_rows(self, num_rows: Mapping[str, int]) -> Settings:
        """Settle how many rows there are.

        Raises:
            InputError: there is no whole batch where one is needed, the block size is no multiple of the batches, or
                the best of no evaluation is asked for.
        """
        settled = replace(self, num_rows=num_rows)
        for split, number in num_rows.items():
            if not number:
                raise InputError(f"{split}: no row is left; look at the paths and images of its rows.")
            if split == "train":
                for name, batch in (("train", self.train_batch), ("eval", self.eval_batch)):
                    if self.block_size % batch:
                        raise InputError(
                            f"--block_size {self.block_size}: must be 0 or a multiple of the global {name} batch of"
                            f" {batch} rows (replicas x --per_device_{name}_batch_size)."
                        )
                if number < self.train_batch:
                    raise InputError(
                        f"the global train batch of {self.train_batch} rows is larger than the data: {number} rows"
                        " are left; lower --per_device_train_batch_size or --num_replicas."
                    )
            elif number < self.eval_batch and not self.rules.keep_incomplete_batch:
                raise InputError(
                    f"{split}: {number} rows do not fill one batch of {self.eval_batch}, and --protocol"
                    f" {self.protocol} drops incomplete batches; lower --per_device_eval_batch_size, or use --protocol"
                    " exact."
                )
        if self.metric_for_best_model and not settled.num_evaluations:
            raise InputError(
                f"--metric_for_best_model {self.metric_for_best_model}: with --eval_steps {self.eval_steps} nothing is"
                f" evaluated in {settled.num_steps} steps; lower --eval_steps."
            )
        return settled

    @property
    def train_batch(self) -> int:
        """Rows of a global batch."""
        return self.replicas * self.per_device_train_batch_size

    @property
    def eval_batch(self) -> int:
        return self.replicas * self.per_device_eval_batch_size

    @property
    def num_epochs(self) -> int:
        return int(self.num_train_epochs)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_rows.get("train", 0) // self.train_batch

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.num_epochs

    def epoch_of(self, step: int) -> int:
        """The epoch of a step; both are counted from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def evaluates_at(self, step: int) -> bool:
        """The example's rule: every `eval_steps`, or else at the end of each epoch; `exact` adds the last step."""
        at_end = self.rules.always_evaluate_at_end and step == self.num_steps
        return self.do_eval and (at_end or step % (self.eval_steps or self.steps_per_epoch) == 0)

    def saves_at(self, step: int) -> bool:
        """Whether a state is saved: where it evaluates, at the end of each epoch, and every `save_steps`."""
        if self.save_steps == 0:
            return False
        at_epoch_end = step % self.steps_per_epoch == 0
        return at_epoch_end or self.evaluates_at(step) or (self.save_steps is not None and step % self.save_steps == 0)

    @property
    def num_evaluations(self) -> int:
        """How many steps `evaluates_at` holds of."""
        if not self.do_eval or not self.num_steps:
            return 0
        every = self.eval_steps or self.steps_per_epoch
        return self.num_steps // every + (self.rules.always_evaluate_at_end and self.num_steps % every > 0)

    @property
    def num_models(self) -> int:
        """Saved at each evaluation; no training ends without one."""
        return max(self.num_evaluations, 1)

    @property
    def num_states(self) -> int:
        """States on disk at most, the one that is being written included."""
        return 0 if self.save_steps == 0 else self.save_total_limit + 1


def is_deterministic(mesh: Mesh) -> bool:
    """Tell whether a run would compute the same bits again: not on a GPU, unless XLA was told to before it started."""
    return mesh.devices.flat[0].platform != "gpu" or DETERMINISTIC in os.environ.get("XLA_FLAGS", "")


def mesh_shape(text: str | None) -> dict[str, int] | None:
    """Read `--mesh data=N,fsdp=M`, of which one may be left out; an InputError if it is not like that."""
    if text is None:
        return None
    parts = text.split(",")
    sizes = dict(part.partition("=")[::2] for part in parts)
    known = len(sizes) == len(parts) and set(sizes) <= set(AXES)
    if not known or not all(MESH_SIZE.fullmatch(size) for size in sizes.values()):
        raise InputError(f"--mesh {text}: must be like data=4,fsdp=2, each once and with whole numbers from 1 on.")
    return {axis: int(size) for axis, size in sizes.items()}
