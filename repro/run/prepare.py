"""From settings to a run that can start: everything is checked, read and decoded, nothing is written yet."""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any
from uuid import uuid4

import jax
import numpy as np
from jax.sharding import Mesh

from repro.config import HALVES, ModelArguments
from repro.data.batches import CaptionedImages, prepare_split
from repro.data.image_cache import load_images
from repro.data.rows import Rows
from repro.data.sources import load_splits
from repro.errors import InputError
from repro.evaluation.caption_metrics import check_installed
from repro.masking import masked_command
from repro.models.beam_search import check_beams
from repro.models.captioner import NativeCaptioner
from repro.models.pretrained import Options, Pretrained, Source, create_model, load_model
from repro.progress import waiting
from repro.provenance import versions, where
from repro.record.record import ROWS
from repro.record.writer import log
from repro.run.settings import DETERMINISTIC, SPLITS, Settings, is_deterministic, mesh_shape
from repro.training.memory import choices
from repro.training.processes import decided_by_first
from repro.training.sharding import create_mesh

# Which the reader of rows takes under the same names.
SOURCE_FLAGS = signature(load_splits).parameters.keys() - {"splits", "rows_dir", "rebuild"}

# By what they compute: runs of one process share them, because JAX compiles the functions of one object once.
_CAPTIONERS: dict[tuple[Any, ...], NativeCaptioner] = {}


@dataclass(frozen=True)
class PreparedRun:
    """All that is known before the first step."""

    settings: Settings
    mesh: Mesh
    pretrained: Pretrained
    splits: dict[str, CaptionedImages]
    dropped: list[dict[str, Any]]  # rows that cannot be used, with the reason
    facts: dict[str, Any]  # what `run.json` says before the first step
    progress: bool


def load_or_create(model_args: ModelArguments, *, seed: int) -> Pretrained:
    """Load the whole model that the flags name, or join the two halves that they name."""
    options = Options(
        implementation=model_args.model_implementation,  # type: ignore[arg-type]
        dtype=model_args.dtype,
        gradient_checkpointing=model_args.gradient_checkpointing,
        seed=seed,
        use_fast_tokenizer=model_args.use_fast_tokenizer,
        weights_format=model_args.weights_format,  # type: ignore[arg-type]
        hub={name: getattr(model_args, name) for name in ("cache_dir", "token", "trust_remote_code")},
    )
    whole = model_args.model_name_or_path
    encoder = Source(model_args.encoder_model_name_or_path, model_args.encoder_config_name)
    decoder = Source(model_args.decoder_model_name_or_path, model_args.decoder_config_name)
    found = create_model(encoder, decoder, options) if whole is None else load_model(whole, options)
    if not isinstance(found.captioner, NativeCaptioner):  # the class holds its parameters, too large to be kept
        return found
    key = (found.fingerprint(), model_args.dtype, model_args.gradient_checkpointing)
    return dataclasses.replace(found, captioner=_CAPTIONERS.setdefault(key, found.captioner))


def read_rows(settings: Settings) -> dict[str, Rows]:
    """Read the first rows of each split, or find them where an earlier run has put them."""
    named = {name: getattr(settings, name) for name in SOURCE_FLAGS}
    rows_dir = settings.cache / "rows"
    found = load_splits(splits=settings.splits, rows_dir=rows_dir, rebuild=_rebuilding(settings), **named)
    for name, split in found.items():
        most = getattr(settings, SPLITS[name][1])
        if most is not None and most < len(split.dataset):
            found[name] = dataclasses.replace(split, dataset=split.dataset.select(range(most)))
    return found


def prepare(settings: Settings, devices: Sequence[jax.Device], *, progress: bool) -> PreparedRun:
    """Read rows, load the model, decode the images and tokenize the captions, from caches where they are there.

    A run is refused, by an InputError,

    - that evaluates or generates what its model or an optional package cannot (`check_run`), or asks for devices,
      meshes or determinism that are not there;
    - whose rows make no whole batch where one is needed (`Settings.with_rows`), looked at twice: as they are read, and
      as they are left once those are dropped whose image or caption cannot be used;
    - whose data, model or caches cannot be read, each by the module that reads it.
    """
    with waiting("reading the rows", progress=progress):
        rows = read_rows(settings)
    with waiting("reading the model", progress=progress):
        pretrained = load_or_create(settings, seed=settings.seed)
    mesh = check_run(settings, pretrained, devices)
    settings.with_rows({name: len(split.dataset) for name, split in rows.items()})
    splits: dict[str, CaptionedImages] = {}
    dropped: list[dict[str, Any]] = []
    rebuild = _rebuilding(settings)
    converted = {name: settings.converts_to_rgb(name) for name in rows}
    for convert in sorted(set(converted.values())):  # splits that treat images alike share them
        together = {name: split for name, split in rows.items() if converted[name] == convert}
        images = dict.fromkeys(path for split in together.values() for path in split.dataset.unique("image_path"))
        places = {path: place for place, path in enumerate(images)}
        store = load_images(
            list(places),
            pretrained.image_processor,
            convert_to_rgb=convert,
            turn_upright=settings.rules.turn_upright,
            cache_dir=settings.cache / "images" if settings.image_cache else None,
            capacity=settings.block_size or None,
            num_workers=settings.preprocessing_num_workers,
            rebuild=rebuild,
            progress=progress,
        )
        for name, split in together.items():
            splits[name], failed = prepare_split(
                split.dataset,
                pretrained.tokenizer,
                places,
                store,
                max_length=settings.max_length(name),
                decoder_start_token_id=pretrained.captioner.config.decoder_start_token_id,
                split=name,
                tokens_dir=settings.cache / "tokens",
            )
            dropped += [*split.dropped, *failed]
    settings = settings.with_rows({name: len(split) for name, split in splits.items()})
    prepared = PreparedRun(settings, mesh, pretrained, splits, dropped, facts={}, progress=progress)
    num_read = {name: len(split.dataset) + len(split.dropped) for name, split in rows.items()}
    return dataclasses.replace(prepared, facts=_facts(prepared, num_read))


def check_run(settings: Settings, pretrained: Pretrained, devices: Sequence[jax.Device]) -> Mesh:
    """Lay out the devices; an InputError if these or the model cannot do what is asked, or a package is missing."""
    decoder = pretrained.captioner.config.decoder
    positions = getattr(decoder, "max_position_embeddings", None)
    for name in ("max_target_length", "val_max_target_length"):
        length = getattr(settings, name)
        if None not in (length, positions) and length > positions:
            raise InputError(f"--{name} {length}: must be between 2 and the decoder's {positions} positions.")
    if settings.caption_metrics:
        check_installed()
    if settings.predict_with_generate:
        check_beams(num_beams=num_beams(settings, pretrained), num_return_sequences=1, vocab_size=decoder.vocab_size)
    rows, shape = settings.per_device_train_batch_size, mesh_shape(settings.mesh)
    mesh = create_mesh(devices, num_replicas=settings.replicas, replica_batch=rows, shape=shape)
    if settings.deterministic and not is_deterministic(mesh):
        raise InputError(f"--deterministic: on a GPU, set XLA_FLAGS={DETERMINISTIC} before JAX starts.")
    if settings.do_train:
        at_once_choices(settings, mesh)
    return mesh


def at_once_choices(settings: Settings, mesh: Mesh) -> list[int]:
    """How many replicas may be computed at once, most first; an InputError refuses what the flag asks for."""
    replica_batch = settings.per_device_train_batch_size
    possible = choices(mesh, num_replicas=settings.replicas, replica_batch=replica_batch)
    if settings.replicas_at_once not in (None, *possible):
        raise InputError(
            f"--replicas_at_once {settings.replicas_at_once}: with {settings.replicas} replicas of {replica_batch}"
            f" rows on {mesh.size} devices it can be {', '.join(map(str, possible))}."
        )
    return possible if settings.replicas_at_once is None else [settings.replicas_at_once]


def num_beams(settings: Settings, pretrained: Pretrained) -> int:
    """Beams of a search: as asked for, or as the model says."""
    return settings.num_beams or pretrained.captioner.generation_config.num_beams or 1


def _rebuilding(settings: Settings) -> str | None:
    """Name this run to a cache that it is to build again, once for all of its processes."""
    return decided_by_first(lambda: uuid4().hex) if settings.overwrite_cache else None


def _facts(prepared: PreparedRun, num_read: Mapping[str, int]) -> dict[str, Any]:
    settings, pretrained = prepared.settings, prepared.pretrained
    counts = {
        name: {
            "read": num_read[name],
            "kept": len(split),
            "dropped": sum(row["split"] == name for row in prepared.dropped),
            "images": len(np.unique(split.image_index)),
            "fingerprint": split.fingerprint(),
            "captions": int(split.have_captions(np.arange(len(split))).sum()),
            "captions_cut": split.num_cut,
            "turned": split.num_turned,
            "max_length": settings.max_length(name),
        }
        for name, split in ((name, prepared.splits[name]) for name in num_read)
    }
    return {
        "command": masked_command(sys.argv),
        "flags": settings.flags,
        "protocol": dataclasses.asdict(settings.rules),
        "num_replicas": settings.replicas,
        "devices": [str(device) for device in prepared.mesh.devices.flat],
        "mesh": dict(prepared.mesh.shape),
        "processes": jax.process_count(),
        "deterministic": is_deterministic(prepared.mesh),
        "platform": f"{where()}, Python {platform.python_version()}",
        "versions": versions(),
        "model": {
            "implementation": "native" if isinstance(pretrained.captioner, NativeCaptioner) else "transformers",
            "parameters": pretrained.num_parameters,
            "fingerprint": pretrained.fingerprint(),
            "notes": list(pretrained.notes),
        },
        "data": counts,
        "steps_per_epoch": settings.steps_per_epoch,
        "num_steps": settings.num_steps,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def turned_in_words(prepared: PreparedRun) -> Iterator[str]:
    """Say how many photographs of each split are stored turned, and how the run uses them."""
    protocol, upright = prepared.settings.protocol, prepared.settings.rules.turn_upright
    how = "upright" if upright else f"as stored, as by the example; --protocol {protocol},turn_upright=true turns them"
    for name, counts in prepared.facts["data"].items():
        if counts["turned"]:
            number = f"{counts['turned']} of {counts['images']} images"
            yield f"{name}: {number} are stored turned, says their EXIF; they are used {how}"


def log_preparation(prepared: PreparedRun, after: int) -> None:
    """Tell the log what is computed after a step, on what and how, what the splits hold, what is new in the model."""
    settings, devices = prepared.settings, list(prepared.mesh.devices.flat)
    halves = [value for name, value in settings.flags.items() if name.startswith(HALVES) and value is not None]
    log.info("model: %s", settings.model_name_or_path or " + ".join(halves))
    log.info(
        "computation: %s parameters, %s, on %d x %s, protocol %s",
        *(f"{prepared.facts['model']['parameters']:,}", settings.dtype),
        *(len(devices), devices[0].device_kind, settings.protocol),
    )
    if settings.do_train:
        sizes = f"{settings.train_batch} rows ({settings.replicas} x {settings.per_device_train_batch_size})"
        log.info("training: steps %d to %d of %s", after + 1, settings.num_steps, sizes)
    log.info("folder: %s, all metrics in its %s", settings.folder, ROWS)
    for name, counts in prepared.facts["data"].items():
        log.info("%s: %d rows read, %d kept, %d dropped, %d images", name, *list(counts.values())[:4])
        kept, captions, cut, length = (counts[key] for key in ("kept", "captions", "captions_cut", "max_length"))
        if cut:
            use = "trained on" if name == "train" else "scored against"
            longer = f"{cut} of {captions} captions are longer than {length} tokens"
            log.warning("%s: %s; what is left of them is %s", name, longer, use)
        if captions < kept:
            what = f"loss and scores are of the other {captions}" if captions else "there are no loss and no scores"
            log.warning("%s: %d of %d rows have no caption; %s", name, kept - captions, kept, what)
    for line in turned_in_words(prepared):
        log.warning(line)
    for note in prepared.pretrained.notes if after == 0 else ():  # of a later step the state has the weights
        log.info("model: %s", note)
