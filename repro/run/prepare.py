"""From flags to a run that can start: everything is checked, read and decoded, nothing is written yet."""

from __future__ import annotations

import dataclasses
import logging
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import jax
import numpy as np
from jax.sharding import Mesh

from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.data.batches import CaptionedImages, check_sizes, number_images, prepare_split
from repro.data.image_store import load_images
from repro.data.rows import Rows
from repro.data.sources import load_splits
from repro.errors import InputError
from repro.evaluation.caption_metrics import check_installed
from repro.masking import SECRET_FLAGS, masked_command
from repro.models.beam_search import check_beams
from repro.models.captioner import NativeCaptioner
from repro.models.pretrained import Options, Pretrained, Source, create_model, load_model
from repro.protocol import Protocol
from repro.provenance import versions
from repro.run.flags import DETERMINISTIC, is_deterministic, mesh_shape
from repro.training.optimizer import count_parameters
from repro.training.processes import decided_by_first
from repro.training.sharding import create_mesh

SPLIT_FLAGS = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}


class Plan(NamedTuple):
    """How much a training does: the rows of a global batch, its steps and its evaluations."""

    train_batch: int
    steps: int
    evaluations: int


@dataclass(frozen=True)
class PreparedRun:
    """All that is known before the first step."""

    data_args: DataArguments
    args: TrainingArguments
    protocol: Protocol
    num_replicas: int
    mesh: Mesh
    pretrained: Pretrained
    splits: dict[str, CaptionedImages]
    dropped: list[dict[str, Any]]
    facts: dict[str, Any]
    progress: bool

    @property
    def shuffle(self) -> bool:
        return self.args.block_size > 0 or self.protocol.shuffle_without_blocks

    @property
    def evaluated(self) -> CaptionedImages:
        """A split that is evaluated; both have rows of one shape."""
        return next(self.splits[name] for name in ("validation", "test") if name in self.splits)

    @property
    def train_batch(self) -> int:
        return self.num_replicas * self.args.per_device_train_batch_size

    @property
    def num_epochs(self) -> int:
        return int(self.args.num_train_epochs)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.splits["train"]) // self.train_batch

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.num_epochs


def load_or_create(model_args: ModelArguments, *, seed: int) -> Pretrained:
    """Load the whole model that the flags name, or join the two halves that they name."""
    options = Options(
        implementation=model_args.model_implementation,  # type: ignore[arg-type]
        dtype=model_args.dtype,
        gradient_checkpointing=model_args.gradient_checkpointing,
        seed=seed,
        use_fast_tokenizer=model_args.use_fast_tokenizer,
        hub={name: getattr(model_args, name) for name in ("cache_dir", "token", "trust_remote_code")},
    )
    if model_args.model_name_or_path is not None:
        return load_model(model_args.model_name_or_path, options)
    encoder = Source(model_args.encoder_model_name_or_path, model_args.encoder_config_name)
    decoder = Source(model_args.decoder_model_name_or_path, model_args.decoder_config_name)
    return create_model(encoder, decoder, options)


def read_rows(model_args: ModelArguments, data_args: DataArguments, splits: Sequence[str]) -> dict[str, Rows]:
    """Read the first rows of some splits from what the flags name, or find them where an earlier run has put them."""
    limits = data_args.max_train_samples, data_args.max_eval_samples, data_args.max_predict_samples
    rows = load_splits(
        splits=splits,
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        data_dir=data_args.data_dir,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        test_file=data_args.test_file,
        image_column=data_args.image_column,
        caption_column=data_args.caption_column,
        allow_image_urls=data_args.allow_image_urls,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        rows_dir=cache_folder(model_args) / "rows",
        rebuild=_rebuilding(data_args),
    )
    limit_of = dict(zip(SPLIT_FLAGS, limits, strict=True))
    return {split: _first(found, limit_of[split]) for split, found in rows.items()}


def target_length(data_args: DataArguments, split: str) -> int:
    """Tokens per caption of a split."""
    length = None if split == "train" else data_args.val_max_target_length
    return length or data_args.max_target_length


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    protocol: Protocol,
    devices: Sequence[jax.Device],
    progress: bool,
) -> PreparedRun:
    """Read, check and decode what the flags name; rows that cannot be used are listed in `dropped`.

    Raises:
        InputError: a run with these flags and data is not possible.
    """
    say = logging.getLogger("repro").info if progress else lambda _: None
    say("reading the rows")
    rows = read_rows(model_args, data_args, [split for split, flag in SPLIT_FLAGS.items() if getattr(args, flag)])
    say("reading the model")
    pretrained = load_or_create(model_args, seed=args.seed)
    mesh = check_run(data_args, args, pretrained, devices)
    # Now, and again when it is known how many rows are left.
    check_rows(args, protocol, {name: len(split.dataset) for name, split in rows.items()}, len(devices))
    folder, rebuild = cache_folder(model_args), _rebuilding(data_args)
    say("decoding the images")
    splits: dict[str, CaptionedImages] = {}
    dropped: list[dict[str, Any]] = []
    converted = {name: converts_to_rgb(protocol, name) for name in rows}
    for convert in sorted(set(converted.values())):
        together = {name: split for name, split in rows.items() if converted[name] == convert}
        places = number_images(split.dataset for split in together.values())
        store = load_images(
            list(places),
            pretrained.image_processor,
            convert_to_rgb=convert,
            cache_dir=folder / "images" if data_args.image_cache else None,
            capacity=args.block_size or None,
            num_workers=data_args.preprocessing_num_workers,
            rebuild=rebuild,
            progress=progress,
        )
        for name, split in together.items():
            splits[name], failed = prepare_split(
                split.dataset,
                pretrained.tokenizer,
                places,
                store,
                max_length=target_length(data_args, name),
                decoder_start_token_id=pretrained.captioner.config.decoder_start_token_id,
                split=name,
                tokens_dir=folder / "tokens",
            )
            dropped += [*split.dropped, *failed]
    check_rows(args, protocol, {name: len(split) for name, split in splits.items()}, len(devices))
    num_replicas = args.num_replicas or len(devices)
    prepared = PreparedRun(
        data_args, args, protocol, num_replicas, mesh, pretrained, splits, dropped, facts={}, progress=progress
    )
    return dataclasses.replace(prepared, facts=_facts(prepared, rows, model_args))


def mesh_of(args: TrainingArguments, devices: Sequence[jax.Device], num_replicas: int) -> Mesh:
    """Lay out the devices as the flags say."""
    rows, shape = args.per_device_train_batch_size, mesh_shape(args.mesh)
    return create_mesh(devices, num_replicas=num_replicas, replica_batch=rows, shape=shape)


def check_run(
    data_args: DataArguments, args: TrainingArguments, pretrained: Pretrained, devices: Sequence[jax.Device]
) -> Mesh:
    """Check what a run asks of its model and its devices; returns how it lays these out.

    Raises:
        InputError: the model or the devices cannot do it, or a package is missing.
    """
    positions = getattr(pretrained.captioner.config.decoder, "max_position_embeddings", None)
    for name in ("max_target_length", "val_max_target_length"):
        length = getattr(data_args, name)
        if None not in (length, positions) and length > positions:
            raise InputError(f"--{name} {length}: must be between 2 and the decoder's {positions} positions.")
    if data_args.caption_metrics:
        check_installed()
    if data_args.predict_with_generate:
        captioner = pretrained.captioner
        check_beams(
            num_beams=data_args.num_beams or captioner.generation_config.num_beams or 1,
            num_return_sequences=1,
            vocab_size=captioner.config.decoder.vocab_size,
        )
    mesh = mesh_of(args, devices, args.num_replicas or len(devices))
    if args.deterministic and not is_deterministic(mesh):
        raise InputError(f"--deterministic: on a GPU, set XLA_FLAGS={DETERMINISTIC} before JAX starts.")
    return mesh


def check_rows(args: TrainingArguments, protocol: Protocol, num_rows: Mapping[str, int], num_devices: int) -> None:
    """Check that the rows of each split can be cut into batches as the run does.

    Raises:
        InputError: there is no whole batch where one is needed, or the block size is no multiple of the batches.
    """
    plan = plan_of(args, protocol, num_rows.get("train", 0), num_devices)
    eval_batch = (args.num_replicas or num_devices) * args.per_device_eval_batch_size
    for split, number in num_rows.items():
        if not number:
            raise InputError(f"{split}: no row is left; look at the paths and images of its rows.")
        if split == "train":
            check_sizes(number, train_batch=plan.train_batch, eval_batch=eval_batch, block_size=args.block_size)
        elif number < eval_batch and not protocol.keep_incomplete_batch:
            raise InputError(
                f"{split}: {number} rows do not fill one batch of {eval_batch}, and --protocol {protocol.name} drops"
                " incomplete batches; lower --per_device_eval_batch_size, or use --protocol exact."
            )
    if args.metric_for_best_model and not plan.evaluations:
        raise InputError(
            f"--metric_for_best_model {args.metric_for_best_model}: with --eval_steps {args.eval_steps} nothing is"
            f" evaluated in {plan.steps} steps; lower --eval_steps."
        )


def plan_of(args: TrainingArguments, protocol: Protocol, num_rows: int, num_devices: int) -> Plan:
    """Plan a training on some rows; its evaluations are counted by the rule of `evaluates_at`."""
    train_batch = (args.num_replicas or num_devices) * args.per_device_train_batch_size
    steps_per_epoch = num_rows // train_batch
    steps, every = steps_per_epoch * int(args.num_train_epochs), args.eval_steps or steps_per_epoch
    evaluations = 0
    if args.do_eval and steps:
        evaluations = steps // every + (protocol.always_evaluate_at_end and steps % every > 0)
    return Plan(train_batch, steps, evaluations)


def evaluates_at(args: TrainingArguments, protocol: Protocol, step: int, steps_per_epoch: int) -> bool:
    """The example's rule: every `eval_steps`, or else at the end of each epoch; `exact` adds the end of training."""
    at_end = protocol.always_evaluate_at_end and step == steps_per_epoch * int(args.num_train_epochs)
    return args.do_eval and (at_end or step % (args.eval_steps or steps_per_epoch) == 0)


def _first(split: Rows, limit: int | None) -> Rows:
    if limit is None or limit >= len(split.dataset):
        return split
    return dataclasses.replace(split, dataset=split.dataset.select(range(limit)))


def _rebuilding(data_args: DataArguments) -> str | None:
    """Name this run to a cache that it is to build again, once for all of its processes."""
    return decided_by_first(lambda: uuid4().hex) if data_args.overwrite_cache else None


def converts_to_rgb(protocol: Protocol, split: str) -> bool:
    """Tell whether images of other modes are converted in a split, or their rows dropped."""
    return protocol.convert_to_rgb if split == "train" else protocol.convert_evaluated_to_rgb


def cache_folder(model_args: ModelArguments) -> Path:
    """Where rows, tokens and decoded images are kept."""
    if model_args.cache_dir is not None:
        return Path(model_args.cache_dir) / "repro"
    from datasets.config import HF_CACHE_HOME

    return Path(HF_CACHE_HOME) / "repro"


def _facts(prepared: PreparedRun, rows: dict[str, Rows], model_args: ModelArguments) -> dict[str, Any]:
    all_flags = {**vars(model_args), **vars(prepared.data_args), **vars(prepared.args)}
    counts = {}
    for name, read in rows.items():
        split = prepared.splits[name]
        counts[name] = {
            "read": len(read.dataset) + len(read.dropped),
            "kept": len(split),
            "dropped": sum(row["split"] == name for row in prepared.dropped),
            "images": len(np.unique(split.image_index)),
            "fingerprint": split.fingerprint(),
            "captions": int(split.have_captions(np.arange(len(split))).sum()),
            "captions_cut": split.num_cut,
            "max_length": target_length(prepared.data_args, name),
        }
    steps = prepared.args.do_train
    is_native = isinstance(prepared.pretrained.captioner, NativeCaptioner)
    return {
        "command": masked_command(sys.argv),
        "flags": {name: value for name, value in all_flags.items() if name not in SECRET_FLAGS},
        "protocol": dataclasses.asdict(prepared.protocol),
        "num_replicas": prepared.num_replicas,
        "devices": [str(device) for device in prepared.mesh.devices.flat],
        "mesh": dict(prepared.mesh.shape),
        "processes": jax.process_count(),
        "deterministic": is_deterministic(prepared.mesh),
        "platform": f"{jax.default_backend()}, {platform.platform()}, Python {sys.version.split()[0]}",
        "versions": versions(),
        "model": {
            "implementation": "native" if is_native else "transformers",
            "parameters": count_parameters(prepared.pretrained.params),
            "fingerprint": prepared.pretrained.fingerprint(),
            "notes": list(prepared.pretrained.notes),
        },
        "data": counts,
        "steps_per_epoch": prepared.steps_per_epoch if steps else 0,
        "num_steps": prepared.num_steps if steps else 0,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def data_in_words(data: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """Say what the splits of `run.json` hold, with the level of the log at which it is said."""
    for name, counts in data.items():
        read, kept, dropped, images = list(counts.values())[:4]
        yield logging.INFO, f"{name}: {read} rows read, {kept} kept, {dropped} dropped, {images} images"
        captions, cut = counts["captions"], counts["captions_cut"]
        if cut:
            use = "trained on" if name == "train" else "scored against"
            longer = f"{cut} of {captions} captions are longer than {counts['max_length']} tokens"
            yield logging.WARNING, f"{name}: {longer}; what is left of them is {use}"
        if captions < kept:
            what = f"loss and scores are of the other {captions}" if captions else "there are no loss and no scores"
            yield logging.WARNING, f"{name}: {kept - captions} of {kept} rows have no caption; {what}"
