"""What a run would find: `repro data check` reads all its data, `repro reproduce --dry_run` tries its first steps."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from datasets import concatenate_datasets
from jax.sharding import Mesh

from repro.config import CheckArguments, DataArguments, ModelArguments, TrainingArguments
from repro.data.atomic import check_writable
from repro.data.image_cache import cores, load_images
from repro.data.images import resize_of
from repro.data.rows import Rows
from repro.data.sheet import picture_sheet
from repro.json_files import write_json
from repro.record.model_card import cut_in_words
from repro.run.build import build_evaluator, build_training
from repro.run.prepare import PreparedRun, check_run, prepare, read_rows, turned_in_words
from repro.run.settings import Settings
from repro.training.memory import REMEDY, device_bytes
from repro.training.sharding import put, replicated

# A model is kept in float32 for Flax and for PyTorch; a state holds each parameter with AdamW's two moments.
BYTES_OF_WEIGHT, BYTES_OF_STATE = 2 * 4, 3 * 4
REASONS_LISTED, EXAMPLES = 20, 3
STEPS, WARM_UPS = 3, 1
TIMED_IMAGES = 500

R = TypeVar("R")


class DryRun(NamedTuple):
    """What was found."""

    problems: list[str]  # what would end the run before its end
    facts: dict[str, Any]  # what was measured
    text: str  # all of it in words


def check_data(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, check_args: CheckArguments
) -> str:
    """Do what a run does before its first step; writes `data_check.json` and `data_check.png`, and tells what is there.

    Without `--do_train`, `--do_eval` and `--do_predict`, the training and validation rows are checked. Rows, tokens and
    images stay in the caches for the run.

    Raises:
        InputError: a run with these flags and data would be refused.
    """
    if not (args.do_train or args.do_eval or args.do_predict):
        args = replace(args, do_train=True, do_eval=True)
    settings = Settings.of(model_args, data_args, args, num_devices=jax.device_count())
    folder = Path(check_args.report_dir)
    check_writable(folder, "--report_dir")
    check_writable(settings.cache, "--cache_dir")
    if settings.output_dir is not None:
        check_writable(settings.folder, "--output_dir")
    prepared, seconds = timed(lambda: prepare(settings, jax.devices(), progress=True))
    settings, splits = prepared.settings, prepared.facts["data"]
    needs = _bytes_on_disk(prepared, sum(counts["images"] for counts in splits.values()))
    reasons = _by_kind(prepared.dropped)
    report = {
        "splits": splits,
        "reasons": reasons,
        "bytes": needs,
        "seconds": round(seconds, 1),
        **{name: getattr(settings, name) for name in ("train_batch", "num_steps", "num_evaluations", "num_models")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "data_check.json", report)
    rows = concatenate_datasets([split.dataset.select(split.kept) for split in prepared.splits.values()])
    if count := min(check_args.num_pictures, len(rows)):
        drawn = rows.select(np.random.default_rng(settings.seed).permutation(len(rows))[:count])
        picture_sheet(list(zip(drawn["image_path"], drawn["caption"], strict=True))).save(folder / "data_check.png")
    lines = [
        *(
            f"{name}: {found['read']} rows, {found['kept']} can be used, of {found['images']} images; captions:"
            f" {cut_in_words(found)}"
            for name, found in splits.items()
        ),
        *turned_in_words(prepared),
        *(f"dropped: {row['rows']} rows, such as {', '.join(row['examples'])}: {row['reason']}" for row in reasons),
        *([f"training: {settings.num_steps} steps of {settings.train_batch} rows"] if settings.do_train else []),
        _disk_in_words(needs),
        *(f"problem: {problem}" for problem in _lacking_room(settings, needs)),
        f"read, decoded and tokenized in {duration(seconds)}; a run finds it in {settings.cache}",
    ]
    return "\n".join(lines)


def _by_kind(dropped: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count the rows that are dropped for reasons that differ in numbers and names alone, most frequent first."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in dropped:
        kinds.setdefault(re.sub(r"\d+|'[^']*'", "", row["reason"]), []).append(row)
    found = []
    for rows in sorted(kinds.values(), key=len, reverse=True)[:REASONS_LISTED]:
        names = dict.fromkeys(row["image_path"] or f"row {row['row']}" for row in rows)
        found.append({"reason": rows[0]["reason"], "rows": len(rows), "examples": [*names][:EXAMPLES]})
    return found


def _bytes_on_disk(prepared: PreparedRun, num_images: int) -> dict[str, int]:
    """Tell what a run keeps at most: decoded images, models and states."""
    settings, pretrained = prepared.settings, prepared.pretrained
    parameters, image = pretrained.num_parameters, resize_of(pretrained.image_processor).shape
    return {
        "images": num_images * math.prod(image) if settings.image_cache else 0,
        "models": settings.num_models * parameters * BYTES_OF_WEIGHT,
        "states": settings.num_states * parameters * BYTES_OF_STATE,
    }


def _disk_in_words(needs: dict[str, int]) -> str:
    return "disk: " + ", ".join(f"{size_in_words(size)} for {name}" for name, size in needs.items())


def size_in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def dry_run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> DryRun:
    """Read all rows and some images, load the weights, compile and time a few steps and one turn of evaluation.

    They are real ones of the first rows: the steps with as many replicas as there are devices, the turn with as many
    device batches as the run evaluates at once beside its state. The run's time is projected from them.

    Raises:
        InputError: a flag, the weights or the data cannot be used at all.
    """
    devices = jax.devices()
    settings = Settings.of(model_args, data_args, args, num_devices=len(devices))
    settings = replace(settings, do_train=True, do_eval=True, do_predict=False)
    check_writable(settings.cache, "--cache_dir")
    with jax.threefry_partitionable(settings.rules.threefry_partitionable):
        rows, reading = timed(lambda: read_rows(settings))
        settings = settings.with_rows({name: len(split.dataset) for name, split in rows.items()})
        trial = prepare_trial(settings, rows["validation"], devices)
        image_seconds = _time_images(rows["train"], trial)
        mesh = check_run(settings, trial.pretrained, devices)
        facts = _time_steps(trial)
        facts |= _time_evaluation(trial, settings, mesh, held_bytes=facts["state_bytes"])
    settings = replace(settings, do_eval=args.do_eval)
    available = device_bytes(devices[0])
    num_images = {name: len(split.dataset.unique("image_path")) for name, split in rows.items()}
    unit, evaluated = ("images", num_images) if settings.rules.generate_per_image else ("rows", settings.num_rows)
    seconds = {
        "rows": reading,
        "images": image_seconds * sum(num_images.values()),
        "compiling": facts["compile_seconds"] + facts["evaluation_compile_seconds"],
        "training": settings.num_steps * settings.train_batch / facts["train_rows_per_second"],
        "evaluations": settings.num_evaluations * evaluated["validation"] / facts["evaluation_rows_per_second"],
    }
    needs = _bytes_on_disk(replace(trial, settings=settings), sum(num_images.values()))
    problems = [*_lacking_room(settings, needs), *_lacking_memory(facts, available)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    lines = [
        f"machine: {len(devices)} x {devices[0]} with {gib(available)} GiB, {gib(memory)} GiB of memory,"
        f" {settings.preprocessing_num_workers or cores()} threads",
        *(f"model: {note}" for note in trial.pretrained.notes),
        *(f"{name}: {count} rows of {num_images[name]} images" for name, count in settings.num_rows.items()),
        *(f"dropped among the first rows: {row['reason']}" for row in trial.dropped[:3]),
        _disk_in_words(needs),
        f"step: {gib(facts['step_bytes'])} GiB with one replica on each device,"
        f" {facts['train_rows_per_second']:.0f} rows/s",
        f"evaluation: {gib(facts['evaluation_bytes'])} GiB with {facts['evaluation_rows_at_once']} at once,"
        f" {facts['evaluation_rows_per_second']:.0f} {unit}/s",
        f"time: {duration(sum(seconds.values()))} for {settings.num_steps} steps and {settings.num_evaluations}"
        f" evaluations ({parts}), before rows are dropped",
        *(f"problem: {problem}" for problem in problems),
    ]
    return DryRun(problems, facts, "\n".join(lines))


def prepare_trial(settings: Settings, validation: Rows, devices: Sequence[jax.Device]) -> PreparedRun:
    """Prepare a run of the first rows with at most one replica for each device."""
    replicas, paths = min(settings.replicas, len(devices)), validation.dataset["image_path"][:]
    # A global batch of evaluation, with room for rows that are dropped.
    per_image = settings.rules.generate_per_image
    rows = _rows_of(paths, settings.eval_batch) if per_image else min(2 * settings.eval_batch, len(paths))
    trial = replace(
        settings,
        num_replicas=replicas,
        num_rows={},
        block_size=0,
        num_train_epochs=1,
        metric_for_best_model=None,
        image_cache=False,
        overwrite_cache=False,
        max_train_samples=2 * (STEPS + WARM_UPS) * replicas * settings.per_device_train_batch_size,
        max_eval_samples=rows,
    )
    return prepare(trial, devices[:replicas], progress=False)


def _time_images(split: Rows, trial: PreparedRun) -> float:
    """Tell the seconds that an image takes, of the split's first ones."""
    some = split.dataset.select(range(min(TIMED_IMAGES, len(split.dataset)))).unique("image_path")
    load = partial(load_images, some, trial.pretrained.image_processor, convert_to_rgb=True, cache_dir=None)
    workers = trial.settings.preprocessing_num_workers
    return timed(lambda: load(num_workers=workers, progress=False))[1] / len(some)


def _time_steps(trial: PreparedRun) -> dict[str, Any]:
    """Compile and take a few steps; returns seconds, bytes on one device, and rows a second."""
    training, compiling = timed(lambda: build_training(trial))
    state, times = training.create(), list[float]()
    with closing(training.batches(0)) as batches:
        for _, batch, _ in islice(batches, WARM_UPS + STEPS):
            assert batch is not None, "none but a run that goes on has a step without"
            (state, _), seconds = timed(lambda: jax.block_until_ready(training.step(state, batch)))  # noqa: B023
            times.append(seconds)
    return {
        "compile_seconds": round(compiling, 1),
        "step_bytes": training.facts["step_bytes"],
        "state_bytes": training.facts["state_bytes"],
        "train_rows_per_second": round(trial.settings.train_batch / float(np.median(times[WARM_UPS:] or times)), 2),
    }


def _time_evaluation(trial: PreparedRun, settings: Settings, mesh: Mesh, *, held_bytes: int) -> dict[str, Any]:
    """Compile and take the first turn of an evaluation on the run's devices, beside a state of `held_bytes` on each.

    Its speed is in rows or images, whichever the protocol evaluates.
    """
    data = trial.splits["validation"]
    own = replace(trial.settings, num_replicas=settings.replicas).with_rows({"validation": len(data)})
    evaluator = build_evaluator(replace(trial, settings=own, mesh=mesh), held_bytes=held_bytes)
    programs, compiling = timed(evaluator.programs)
    per_image = own.rules.generate_per_image
    size = _rows_of(data.image_index, programs.num_rows) if per_image else programs.num_rows
    data = replace(data, kept=data.kept[:size], image_index=data.image_index[:size])
    turn = replace(evaluator, num_replicas=programs.num_rows // own.per_device_eval_batch_size)
    params = put(trial.pretrained.params, replicated(mesh))
    evaluation, seconds = timed(lambda: turn.evaluate(params, data))
    units = len(set(evaluation.image_paths)) if per_image else evaluation.details["rows"]
    return {
        "evaluation_rows_at_once": programs.num_rows,
        "evaluation_bytes": programs.num_bytes,
        "evaluation_compile_seconds": round(compiling, 1),
        "evaluation_rows_per_second": round(units / seconds, 2),
    }


def _lacking_room(settings: Settings, needs: dict[str, int]) -> Iterator[str]:
    """Say which file systems have fewer bytes free than their folders are to hold."""
    wanted: Counter[Path] = Counter()
    place_on: dict[int, Path] = {}
    written = (Path(settings.output_dir or "."), needs["models"] + needs["states"])
    for folder, size in (written, (settings.cache, needs["images"])):
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        wanted[place_on.setdefault(there.stat().st_dev, there)] += size
    for folder, size in wanted.items():
        free = shutil.disk_usage(folder).free
        if size > free:
            yield (
                f"{folder}: {size_in_words(size)} are needed and {size_in_words(free)} free; make room, name another"
                " --output_dir or --cache_dir, or add --no_image_cache"
            )


def _lacking_memory(facts: dict[str, Any], available: int) -> Iterator[str]:
    """Say what of a trial takes more than the bytes that a device has."""
    if facts["step_bytes"] > available:
        yield f"one replica's step takes {gib(facts['step_bytes'])} GiB and a device has {gib(available)}; {REMEDY}"
    evaluation = facts["evaluation_bytes"] + facts["state_bytes"]
    if evaluation > available:
        yield (
            f"evaluating {facts['evaluation_rows_at_once']} rows beside the state takes {gib(evaluation)} GiB and a"
            f" device has {gib(available)}; lower --per_device_eval_batch_size or --num_beams, or add --mesh fsdp=N"
        )


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"


def duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _rows_of(images: Sequence[str] | np.ndarray, number: int) -> int:
    """Count the rows that come before the first row of another image than the first `number`."""
    firsts = np.sort(np.unique(images, return_index=True)[1])
    return int([*firsts, len(images)][min(number, len(firsts))])


def timed(call: Callable[[], R]) -> tuple[R, float]:
    """Return what a call returns, and the seconds that it took."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started
