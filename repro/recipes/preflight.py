"""What a run would find: `repro data check` reads all its data, `repro reproduce --dry_run` tries its first steps."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from datasets import concatenate_datasets

from repro.config import CheckArguments, DataArguments, ModelArguments, TrainingArguments
from repro.data.atomic import check_writable
from repro.data.batches import number_images
from repro.data.census import count_images, count_rows, look_at_images, picture_sheet
from repro.data.image_cache import cores
from repro.data.images import resize_of
from repro.data.rows import Rows, column
from repro.models.pretrained import Pretrained
from repro.protocol import protocol_named
from repro.recipes.trial import (
    multiplication_rate,
    prepare_trial,
    time_evaluation,
    time_images,
    time_steps,
    timed,
    training_operations,
)
from repro.record.writer import write_json
from repro.run.flags import check_values
from repro.run.prepare import (
    SPLIT_FLAGS,
    cache_folder,
    check_rows,
    check_run,
    converts_to_rgb,
    load_or_create,
    plan_of,
    read_rows,
    target_length,
)
from repro.training.memory import device_bytes
from repro.training.optimizer import count_parameters

# A model is kept in float32 for Flax and for PyTorch; a state holds each parameter with AdamW's two moments.
BYTES_OF_WEIGHT, BYTES_OF_STATE = 2 * 4, 3 * 4


class DryRun(NamedTuple):
    """What was found: what would end the run before its end, what was measured, and all of it in words."""

    problems: list[str]
    facts: dict[str, Any]
    text: str


def check_data(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, check_args: CheckArguments
) -> dict[str, Any]:
    """Check what the flags of a run name; writes `data_check.json` and `data_check.png`, and returns the former.

    Without `--do_train`, `--do_eval` and `--do_predict`, the training and validation rows are checked.

    Raises:
        InputError: a run with these flags and data would be refused; what the data hold is written all the same, as far
            as it can be read.
    """
    if not (args.do_train or args.do_eval or args.do_predict):
        args = replace(args, do_train=True, do_eval=True)
    check_values(model_args, data_args, args)
    folder = Path(check_args.report_dir)
    check_writable(folder, "--report_dir")
    check_writable(cache_folder(model_args), "--cache_dir")
    if args.output_dir is not None:
        check_writable(Path(args.output_dir), "--output_dir")
    protocol, num_workers = protocol_named(args.protocol), data_args.preprocessing_num_workers or cores()
    # Whether the images of each split are converted.
    splits = {split: converts_to_rgb(protocol, split) for split, flag in SPLIT_FLAGS.items() if getattr(args, flag)}
    rows, reading = timed(lambda: read_rows(model_args, data_args, list(splits)))
    pretrained = load_or_create(model_args, seed=args.seed)
    check_run(data_args, args, pretrained, jax.devices())
    uses = {(path, splits[name]): None for name, split in rows.items() for path in column(split.dataset, "image_path")}
    seen, decoding = timed(lambda: look_at_images(list(uses), resize_of(pretrained.image_processor), num_workers))
    counts, tokenizing = timed(
        lambda: {
            name: count_rows(split, splits[name], seen, pretrained.tokenizer, target_length(data_args, name))
            for name, split in rows.items()
        }
    )
    images, disk = count_images(seen), _disk(pretrained)
    usable = images["distinct"] - images["unusable"]
    needs: dict[str, Any] = {
        "seconds_reading_rows": round(reading, 1),
        "seconds_decoding_images": round(decoding, 1),
        "threads": num_workers,
        "seconds_tokenizing": round(tokenizing, 1),
        "image_cache_bytes": usable * disk["image"] if data_args.image_cache else 0,
        "cache_free_bytes": shutil.disk_usage(_existing(cache_folder(model_args))).free,
        "checkpoint_bytes": disk["model"],
        "output_free_bytes": shutil.disk_usage(_existing(Path(args.output_dir or "."))).free,
    }
    kept = {name: found["rows_kept"] for name, found in counts.items()}
    if "train" in kept:
        plan = plan_of(args, protocol, kept["train"], jax.device_count())
        operations = plan.steps * plan.train_batch * training_operations(pretrained, counts["train"]["max_length"])
        rate = multiplication_rate(model_args.dtype) * jax.device_count()
        needs |= {
            "global_batch": plan.train_batch,
            "steps": plan.steps,
            "checkpoints": max(plan.evaluations, 1),
            "operations": operations,
            "operations_per_second": rate,
            "seconds_training_at_least": round(operations / rate, 1),
        }
    report = {"splits": counts, "images": images, "needs": needs}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "data_check.json", report)
    broken = {path for (path, _), image in seen.items() if image.failure is not None}
    if drawn := _random_rows(rows, broken, check_args.num_pictures, args.seed):
        picture_sheet(drawn).save(folder / "data_check.png")
    check_rows(args, protocol, kept, jax.device_count())
    return report


def _random_rows(rows: Mapping[str, Rows], broken: set[str], count: int, seed: int) -> list[tuple[str, str | None]]:
    """Draw rows whose image can be used, from all splits."""
    whole = concatenate_datasets([split.dataset for split in rows.values()])
    order = np.random.default_rng(seed).permutation(len(whole))[: 4 * count + 100]
    usable = ((row["image_path"], row["caption"]) for row in whole.select(order) if row["image_path"] not in broken)
    return list(islice(usable, count))


def _disk(pretrained: Pretrained) -> dict[str, int]:
    """Tell the bytes on disk of one decoded image, one model and one state."""
    parameters = count_parameters(pretrained.params)
    image = int(np.prod(resize_of(pretrained.image_processor).shape))
    return {"image": image, "model": parameters * BYTES_OF_WEIGHT, "state": parameters * BYTES_OF_STATE}


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def describe_data(report: dict[str, Any]) -> str:
    """Put what `check_data` returns into words."""
    images, needs = report["images"], report["needs"]
    lines = []
    for name, split in report["splits"].items():
        by_captions = ", ".join(f"{number} with {n}" for n, number in split["images_by_captions"].items())
        lines += [
            f"{name}: {split['rows']} rows, {split['rows_kept']} can be used;"
            f" {split['rows_dropped_for_themselves']} dropped for themselves,"
            f" {split['rows_dropped_for_their_image']} for their image",
            f"  {split['images']} images, by captions: {by_captions}",
            f"  tokens of a caption: {_range(split['tokens_of_a_caption'])}; {split['captions_cut']} of"
            f" {split['captions']} are cut at {split['max_length']}",
            *(f"  dropped: {reason}" for reason in split["reasons"]),
        ]
    modes = ", ".join(f"{count} {mode}" for mode, count in images["modes"].items())
    lines += [
        f"images: {images['distinct']} distinct, {images['unusable']} cannot be used; modes: {modes}",
        f"  width {_range(images['width'])}; height {_range(images['height'])}",
        *(f"  {count} times: {reason}" for reason, count in images["reasons"].items()),
        *(f"  {path}: {reason}" for path, reason in images["failures"].items()),
        "a run needs",
        f"  once: {needs['seconds_reading_rows']} s to read the rows, {needs['seconds_decoding_images']} s to decode"
        f" the images in {needs['threads']} threads, {needs['seconds_tokenizing']} s to tokenize",
        f"  {_size(needs['image_cache_bytes'])} for the image cache ({_size(needs['cache_free_bytes'])} are free)",
    ]
    if "steps" in needs:
        lines += [
            f"  {needs['checkpoints']} checkpoints of {_size(needs['checkpoint_bytes'])}"
            f" ({_size(needs['output_free_bytes'])} are free)",
            f"  {needs['steps']} steps of {needs['global_batch']} rows: {needs['operations']:.3g} operations, at least"
            f" {needs['seconds_training_at_least']:.0f} s at the {needs['operations_per_second'] / 1e12:.2f} TFLOP/s of"
            " this machine's matrix products; evaluations not counted",
        ]
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _range(values: dict[str, int]) -> str:
    if not values:
        return "none"
    return f"{values['p0']} to {values['p100']}, median {values['p50']}, 99 % up to {values['p99']}"


def dry_run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> DryRun:
    """Read all rows and some images, load the weights, compile and time a few steps and one turn of evaluation.

    They are real ones of the first rows: the steps with as many replicas as there are devices, the turn with as many
    device batches as the run evaluates at once beside its state. The run's time is projected from them.

    Raises:
        InputError: a flag, the weights or the data cannot be used at all.
    """
    check_values(model_args, data_args, args)
    check_writable(cache_folder(model_args), "--cache_dir")
    protocol, devices = protocol_named(args.protocol), jax.devices()
    with jax.threefry_partitionable(protocol.threefry_partitionable):
        rows, reading = timed(lambda: read_rows(model_args, data_args, ["train", "validation"]))
        num_rows = {name: len(split.dataset) for name, split in rows.items()}
        check_rows(args, protocol, num_rows, len(devices))
        trial = prepare_trial(model_args, data_args, args, protocol, rows)
        image_seconds = time_images(rows["train"], trial)
        check_run(data_args, args, trial.pretrained, devices)
        facts = time_steps(trial)
        facts |= time_evaluation(trial, args.num_replicas or len(devices), held_bytes=facts["state_bytes"])
    plan, disk = plan_of(args, protocol, num_rows["train"], len(devices)), _disk(trial.pretrained)
    num_images = {name: len(number_images([split.dataset])) for name, split in rows.items()}
    unit, evaluated = ("images", num_images) if protocol.generate_per_image else ("rows", num_rows)
    seconds = {
        "rows": reading,
        "images": image_seconds * sum(num_images.values()),
        "compiling": facts["compile_seconds"] + facts["evaluation_compile_seconds"],
        "training": plan.steps * plan.train_batch / facts["train_rows_per_second"],
        "evaluations": plan.evaluations * evaluated["validation"] / facts["evaluation_rows_per_second"],
    }
    image_cache = sum(num_images.values()) * disk["image"] if data_args.image_cache else 0
    models = max(plan.evaluations, 1) * disk["model"]
    states = 0 if args.save_steps == 0 else (args.save_total_limit + 1) * disk["state"]
    problems = [
        *_lacking_room((Path(args.output_dir or "."), models + states), (cache_folder(model_args), image_cache)),
        *_lacking_memory(facts, device_bytes(devices[0])),
    ]
    lines = [
        f"machine: {len(devices)} x {devices[0]} with {_gib(device_bytes(devices[0]))} GiB,"
        f" {_gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} GiB of memory,"
        f" {data_args.preprocessing_num_workers or cores()} threads",
        *(f"weights: {note}" for note in trial.pretrained.notes),
        *(f"{name}: {count} rows of {num_images[name]} images" for name, count in num_rows.items()),
        *(f"dropped among the first rows: {row['reason']}" for row in trial.dropped[:3]),
        f"disk: {image_cache / 1e9:.1f} GB for images, {models / 1e9:.1f} GB for models, {states / 1e9:.1f} GB for"
        " states",
        f"step: {_gib(facts['step_bytes'])} GiB with one replica on each device,"
        f" {facts['train_rows_per_second']:.0f} rows/s",
        f"evaluation: {_gib(facts['evaluation_bytes'])} GiB with {facts['evaluation_rows_at_once']} at once,"
        f" {facts['evaluation_rows_per_second']:.0f} {unit}/s",
        f"time: {_duration(sum(seconds.values()))} for {plan.steps} steps and {plan.evaluations} evaluations ("
        + ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
        + "), before rows are dropped",
        *(f"problem: {problem}" for problem in problems),
    ]
    return DryRun(problems, facts, "\n".join(lines))


def _lacking_room(*sizes: tuple[Path, int]) -> Iterator[str]:
    """Say which file systems have fewer bytes free than their folders are to hold."""
    wanted: Counter[Path] = Counter()
    place_on: dict[int, Path] = {}
    for folder, size in sizes:
        there = _existing(folder)
        wanted[place_on.setdefault(there.stat().st_dev, there)] += size
    for folder, size in wanted.items():
        free = shutil.disk_usage(folder).free
        if size > free:
            yield (
                f"{folder}: {size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; make room, name another"
                " --output_dir or --cache_dir, or add --no_image_cache"
            )


def _lacking_memory(facts: dict[str, Any], available: int) -> Iterator[str]:
    """Say what of a trial takes more than the bytes that a device has."""
    if facts["step_bytes"] > available:
        yield (
            f"one replica's step takes {_gib(facts['step_bytes'])} GiB and a device has {_gib(available)}; add"
            " --gradient_checkpointing or --mesh fsdp=N"
        )
    evaluation = facts["evaluation_bytes"] + facts["state_bytes"]
    if evaluation > available:
        yield (
            f"evaluating {facts['evaluation_rows_at_once']} rows beside the state takes {_gib(evaluation)} GiB and a"
            f" device has {_gib(available)}; lower --per_device_eval_batch_size or --num_beams, or add --mesh fsdp=N"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
