"""`repro reproduce --dry_run`: whether a run can start and end on this machine, and how long it would take."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repro.assemble import build_evaluator, build_training
from repro.check import BYTES_OF_WEIGHT, existing
from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.data.image_cache import cores
from repro.data.image_store import load_images
from repro.data.images import resize_of
from repro.data.pipeline import number_images
from repro.data.rows import Rows
from repro.data.whole_file import check_writable
from repro.flags import check_values
from repro.prepare import (
    PreparedRun,
    cache_folder,
    check_rows,
    check_run,
    count_evaluations,
    mesh_of,
    prepare,
    read_rows,
)
from repro.protocol import Protocol, protocol_named
from repro.training.memory import device_bytes
from repro.training.optimizer import count_parameters
from repro.training.sharding import put, replicated

STEPS, WARM_UPS = 3, 1
TIMED_IMAGES = 500
BYTES_OF_STATE = 3 * 4
"""A parameter in a state, with AdamW's two moments."""
GIBIBYTE = 2**30


@dataclass(frozen=True)
class DryRun:
    """What was found.

    Attributes:
        problems: what would end the run before its end.
        facts: counts, bytes and seconds, measured and projected.
    """

    problems: tuple[str, ...]
    facts: dict[str, Any]


def dry_run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> DryRun:
    """Read all rows and some images, load the weights, compile and time a few steps and one turn of evaluation.

    They are real ones of the first rows: the steps with as many replicas as there are devices, the turn with as many
    device batches as the run evaluates at once beside its state. The run's time is projected from them.

    Raises:
        InputError: a flag, the weights or the data cannot be used at all.
    """
    check_values(model_args, data_args, args)
    check_writable(cache_folder(model_args), "--cache_dir")
    protocol = protocol_named(args.protocol)
    with jax.threefry_partitionable(protocol.threefry_partitionable):
        started = time.perf_counter()
        rows = read_rows(model_args, data_args, ["train", "validation"])
        reading = time.perf_counter() - started
        check_rows(args, protocol, {name: len(split.dataset) for name, split in rows.items()}, jax.device_count())
        small, decoding = _prepare_small(model_args, data_args, args, protocol, rows)
        check_run(data_args, args, small.pretrained, jax.devices())
        timed = _time_steps(small)
        timed |= _time_evaluation(small, args.num_replicas or jax.device_count(), held_bytes=timed["state_bytes"])
    images = {name: len(number_images([split.dataset])) for name, split in rows.items()}
    global_batch = (args.num_replicas or jax.device_count()) * args.per_device_train_batch_size
    steps_per_epoch = len(rows["train"].dataset) // global_batch
    steps = steps_per_epoch * int(args.num_train_epochs)
    evaluations = count_evaluations(args, protocol, steps_per_epoch)
    evaluated = images["validation"] if protocol.generate_per_image else len(rows["validation"].dataset)
    seconds = {
        "rows": reading,
        "images": decoding * sum(images.values()),
        "compiling": timed["compile_seconds"] + timed["evaluation_compile_seconds"],
        "training": steps * global_batch / timed["train_rows_per_second"],
        "evaluations": evaluations * evaluated / timed["evaluation_rows_per_second"],
    }
    needs = _needs(model_args, data_args, args, small, images, evaluations)
    facts = {
        "devices": [str(device) for device in jax.devices()],
        "device_bytes": device_bytes(jax.devices()[0]),
        "host_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": data_args.preprocessing_num_workers or cores(),
        "model_notes": list(small.pretrained.notes),
        "rows": {name: len(split.dataset) for name, split in rows.items()},
        "images": images,
        "rows_dropped_of_those_tried": [row["reason"] for row in small.dropped],
        "steps": steps,
        "evaluations": evaluations,
        "evaluated": "images" if protocol.generate_per_image else "rows",
        **timed,
        "bytes_needed": needs,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    return DryRun(tuple(_problems(facts, model_args, args)), facts)


def _prepare_small(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    protocol: Protocol,
    rows: dict[str, Rows],
) -> tuple[PreparedRun, float]:
    """Prepare a run of the first rows with one replica for each device; and the seconds that an image takes."""
    devices = jax.devices()
    replicas = min(args.num_replicas or len(devices), len(devices))
    batch = (args.num_replicas or len(devices)) * args.per_device_eval_batch_size
    paths = rows["validation"].dataset["image_path"][:]
    wanted: dict[str, Any] = {
        "max_train_samples": 2 * (STEPS + WARM_UPS) * replicas * args.per_device_train_batch_size,
        # A global batch, with room for rows that are dropped.
        "max_eval_samples": _rows_of(paths, batch) if protocol.generate_per_image else min(2 * batch, len(paths)),
    }
    small_args = dataclasses.replace(
        args,
        do_train=True,
        do_eval=True,
        do_predict=False,
        num_replicas=replicas,
        block_size=0,
        num_train_epochs=1,
        metric_for_best_model=None,
    )
    small_data = dataclasses.replace(data_args, image_cache=False, overwrite_cache=False, **wanted)
    prepared = prepare(model_args, small_data, small_args, protocol, devices[:replicas], progress=False)
    some = list(number_images([rows["train"].dataset.select(range(min(TIMED_IMAGES, len(rows["train"].dataset))))]))
    started = time.perf_counter()
    load_images(
        some,
        prepared.pretrained.image_processor,
        convert_to_rgb=True,
        cache_dir=None,
        num_workers=data_args.preprocessing_num_workers,
        progress=False,
    )
    return prepared, (time.perf_counter() - started) / len(some)


def _rows_of(images: Sequence[str] | np.ndarray, number: int) -> int:
    """Count the rows that come before the first row of another image than the first `number`."""
    firsts = np.sort(np.unique(images, return_index=True)[1])
    return int([*firsts, len(images)][min(number, len(firsts))])


def _time_steps(prepared: PreparedRun) -> dict[str, Any]:
    started = time.perf_counter()
    training = build_training(prepared)
    compiled = time.perf_counter() - started
    times = []
    steps = training.from_state(training.create(), 0)
    for _ in range(min(WARM_UPS + STEPS, prepared.num_steps)):
        started = time.perf_counter()
        jax.block_until_ready(next(steps).state)
        times.append(time.perf_counter() - started)
    steps.close()  # type: ignore[attr-defined]
    return {
        "compile_seconds": round(compiled, 1),
        "step_bytes": training.facts["step_bytes"],
        "state_bytes": training.facts["state_bytes"],
        "train_rows_per_second": round(prepared.train_batch / float(np.median(times[WARM_UPS:] or times)), 2),
    }


def _time_evaluation(prepared: PreparedRun, num_replicas: int, *, held_bytes: int) -> dict[str, Any]:
    """Time the first turn of an evaluation by the run's replicas on the run's devices."""
    args, data = prepared.args, prepared.splits["validation"]
    mesh = mesh_of(args, jax.devices(), num_replicas)
    prepared = dataclasses.replace(prepared, num_replicas=num_replicas, mesh=mesh, progress=False)
    whole = dataclasses.replace(args, num_replicas=num_replicas)
    check_rows(whole, prepared.protocol, {"validation": len(data)}, mesh.size)
    started = time.perf_counter()
    evaluator = build_evaluator(prepared, held_bytes=held_bytes)
    programs = evaluator.programs()
    compiled = time.perf_counter() - started
    per_image, size = prepared.protocol.generate_per_image, programs.num_rows
    size = _rows_of(data.image_index, size) if per_image else size
    data = dataclasses.replace(data, kept=data.kept[:size], image_index=data.image_index[:size])
    turn = dataclasses.replace(evaluator, num_replicas=programs.num_rows // args.per_device_eval_batch_size)
    params = put(prepared.pretrained.params, replicated(mesh))
    started = time.perf_counter()
    evaluation = turn.evaluate(params, data)
    seconds = time.perf_counter() - started
    units = len(set(evaluation.image_paths)) if per_image else evaluation.details["rows"]
    return {
        "evaluation_rows_at_once": programs.num_rows,
        "evaluation_bytes": programs.num_bytes,
        "evaluation_compile_seconds": round(compiled, 1),
        "evaluation_rows_per_second": round(units / seconds, 2),
    }


def _needs(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    prepared: PreparedRun,
    images: dict[str, int],
    evaluations: int,
) -> dict[str, int]:
    parameters = count_parameters(prepared.pretrained.params)
    side = int(np.prod(resize_of(prepared.pretrained.image_processor).shape))
    states = 0 if args.save_steps == 0 else args.save_total_limit + 1
    return {
        "image_cache": sum(images.values()) * side if data_args.image_cache else 0,
        "models": max(evaluations, 1) * parameters * BYTES_OF_WEIGHT,
        "states": states * parameters * BYTES_OF_STATE,
    }


def _problems(facts: dict[str, Any], model_args: ModelArguments, args: TrainingArguments) -> list[str]:
    problems = []
    needs = facts["bytes_needed"]
    output, cache = existing(Path(args.output_dir or ".")), existing(cache_folder(model_args))
    wanted: dict[Path, int] = {}
    for folder, size in ((output, needs["models"] + needs["states"]), (cache, needs["image_cache"])):
        device = os.stat(folder).st_dev
        place = next((other for other in wanted if os.stat(other).st_dev == device), folder)
        wanted[place] = wanted.get(place, 0) + size
    for folder, size in wanted.items():
        free = shutil.disk_usage(folder).free
        if size > free:
            problems.append(
                f"{folder}: {size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; make room, name another"
                " --output_dir or --cache_dir, or add --no_image_cache"
            )
    if facts["step_bytes"] > facts["device_bytes"]:
        problems.append(
            f"one replica's step takes {facts['step_bytes'] / GIBIBYTE:.1f} GiB and a device has"
            f" {facts['device_bytes'] / GIBIBYTE:.1f}; add --gradient_checkpointing or --mesh fsdp=N"
        )
    evaluation = facts["evaluation_bytes"] + facts["state_bytes"]
    if evaluation > facts["device_bytes"]:
        problems.append(
            f"evaluating {facts['evaluation_rows_at_once']} rows beside the state takes {evaluation / GIBIBYTE:.1f} GiB"
            f" and a device has {facts['device_bytes'] / GIBIBYTE:.1f}; lower --per_device_eval_batch_size or"
            " --num_beams, or add --mesh fsdp=N"
        )
    return problems


def describe(found: DryRun) -> str:
    """Put it into words."""
    facts = found.facts
    needs, seconds = facts["bytes_needed"], facts["seconds"]
    lines = [
        f"machine: {len(facts['devices'])} x {facts['devices'][0]} with {facts['device_bytes'] / GIBIBYTE:.1f} GiB,"
        f" {facts['host_bytes'] / GIBIBYTE:.1f} GiB of memory, {facts['threads']} threads",
        *(f"weights: {note}" for note in facts["model_notes"]),
        *(f"{name}: {count} rows of {facts['images'][name]} images" for name, count in facts["rows"].items()),
        *(f"dropped among the first rows: {reason}" for reason in facts["rows_dropped_of_those_tried"][:3]),
        f"disk: {needs['image_cache'] / 1e9:.1f} GB for images, {needs['models'] / 1e9:.1f} GB for models,"
        f" {needs['states'] / 1e9:.1f} GB for states",
        f"step: {facts['step_bytes'] / GIBIBYTE:.1f} GiB with one replica on each device,"
        f" {facts['train_rows_per_second']:.0f} rows/s",
        f"evaluation: {facts['evaluation_bytes'] / GIBIBYTE:.1f} GiB with {facts['evaluation_rows_at_once']} at once,"
        f" {facts['evaluation_rows_per_second']:.0f} {facts['evaluated']}/s",
        f"time: {_duration(sum(seconds.values()))} for {facts['steps']} steps and {facts['evaluations']} evaluations ("
        + ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
        + "), before rows are dropped",
        *(f"problem: {problem}" for problem in found.problems),
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
