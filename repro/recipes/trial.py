"""What this machine does in a second: a run's first steps and a turn of its evaluation, and a large product."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from repro.config import DataArguments, ModelArguments, TrainingArguments
from repro.data.batches import number_images
from repro.data.image_store import load_images
from repro.data.images import resize_of
from repro.data.rows import Rows
from repro.models.pretrained import Pretrained
from repro.protocol import Protocol
from repro.run.build import build_evaluator, build_training
from repro.run.prepare import PreparedRun, check_rows, mesh_of, prepare
from repro.training.losses import row_losses
from repro.training.sharding import put, replicated

STEPS, WARM_UPS = 3, 1
TIMED_IMAGES = 500
PROBE_SIDES, PROBE_TURNS, PROBE_SECONDS = (2048, 4096, 8192, 16384), 4, 0.01

Result = TypeVar("Result")


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return what a call returns, and the seconds that it took."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def prepare_trial(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    protocol: Protocol,
    rows: dict[str, Rows],
) -> PreparedRun:
    """Prepare a run of the first rows with at most one replica for each device."""
    devices = jax.devices()
    replicas = min(args.num_replicas or len(devices), len(devices))
    batch = (args.num_replicas or len(devices)) * args.per_device_eval_batch_size
    paths = rows["validation"].dataset["image_path"][:]
    few_rows = replace(
        data_args,
        image_cache=False,
        overwrite_cache=False,
        max_train_samples=2 * (STEPS + WARM_UPS) * replicas * args.per_device_train_batch_size,
        # A global batch, with room for rows that are dropped.
        max_eval_samples=_rows_of(paths, batch) if protocol.generate_per_image else min(2 * batch, len(paths)),
    )
    one_epoch = replace(
        args,
        do_train=True,
        do_eval=True,
        do_predict=False,
        num_replicas=replicas,
        block_size=0,
        num_train_epochs=1,
        metric_for_best_model=None,
    )
    return prepare(model_args, few_rows, one_epoch, protocol, devices[:replicas], progress=False)


def time_images(split: Rows, prepared: PreparedRun) -> float:
    """Tell the seconds that an image takes, of the split's first ones."""
    some = list(number_images([split.dataset.select(range(min(TIMED_IMAGES, len(split.dataset))))]))
    processor, num_workers = prepared.pretrained.image_processor, prepared.data_args.preprocessing_num_workers
    settings: dict[str, Any] = {"cache_dir": None, "num_workers": num_workers, "progress": False}
    _, seconds = timed(lambda: load_images(some, processor, convert_to_rgb=True, **settings))
    return seconds / len(some)


def time_steps(prepared: PreparedRun) -> dict[str, Any]:
    """Compile and take a few steps; returns seconds, bytes on one device, and rows a second."""
    training, compiling = timed(lambda: build_training(prepared))
    steps = training.from_state(training.create(), 0)

    def take() -> None:
        jax.block_until_ready(next(steps).state)

    times = [timed(take)[1] for _ in range(min(WARM_UPS + STEPS, prepared.num_steps))]
    steps.close()  # type: ignore[attr-defined]
    return {
        "compile_seconds": round(compiling, 1),
        "step_bytes": training.facts["step_bytes"],
        "state_bytes": training.facts["state_bytes"],
        "train_rows_per_second": round(prepared.train_batch / float(np.median(times[WARM_UPS:] or times)), 2),
    }


def time_evaluation(prepared: PreparedRun, num_replicas: int, *, held_bytes: int) -> dict[str, Any]:
    """Compile and take the first turn of an evaluation by the run's replicas on the run's devices.

    Args:
        held_bytes: what the state takes on a device.

    Returns:
        Rows at once, bytes on one device, seconds, and rows or images a second, whichever the protocol evaluates.
    """
    args, data = prepared.args, prepared.splits["validation"]
    mesh = mesh_of(args, jax.devices(), num_replicas)
    prepared = replace(prepared, num_replicas=num_replicas, mesh=mesh, progress=False)
    check_rows(replace(args, num_replicas=num_replicas), prepared.protocol, {"validation": len(data)}, mesh.size)
    evaluator = build_evaluator(prepared, held_bytes=held_bytes)
    programs, compiling = timed(evaluator.programs)
    per_image, size = prepared.protocol.generate_per_image, programs.num_rows
    size = _rows_of(data.image_index, size) if per_image else size
    data = replace(data, kept=data.kept[:size], image_index=data.image_index[:size])
    turn = replace(evaluator, num_replicas=programs.num_rows // args.per_device_eval_batch_size)
    params = put(prepared.pretrained.params, replicated(mesh))
    evaluation, seconds = timed(lambda: turn.evaluate(params, data))
    units = len(set(evaluation.image_paths)) if per_image else evaluation.details["rows"]
    return {
        "evaluation_rows_at_once": programs.num_rows,
        "evaluation_bytes": programs.num_bytes,
        "evaluation_compile_seconds": round(compiling, 1),
        "evaluation_rows_per_second": round(units / seconds, 2),
    }


def _rows_of(images: Sequence[str] | np.ndarray, number: int) -> int:
    """Count the rows that come before the first row of another image than the first `number`."""
    firsts = np.sort(np.unique(images, return_index=True)[1])
    return int([*firsts, len(images)][min(number, len(firsts))])


def training_operations(pretrained: Pretrained, max_length: int) -> float:
    """Count the arithmetic operations of one row's training step, optimizer left out, from the compiler's own count."""
    captioner = pretrained.captioner
    pixels = jax.ShapeDtypeStruct((1, *resize_of(pretrained.image_processor).shape), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((1, max_length), jnp.int32)

    def loss(params: Any, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        sums, _ = row_losses(captioner.logits(params, pixels, ids, mask), ids, mask)
        return sums.sum()

    params = jax.eval_shape(lambda: pretrained.params)
    cost = jax.jit(jax.grad(loss)).lower(params, pixels, tokens, tokens).cost_analysis()
    assert cost is not None, "every backend counts operations before it compiles"
    return float(cost["flops"])


def multiplication_rate(dtype: str) -> float:
    """Measure how many operations a second the first device does in a large matrix product: what nothing exceeds."""
    multiply, rate = jax.jit(jnp.matmul), 0.0
    for side in PROBE_SIDES:
        matrix = jnp.ones((side, side), dtype)
        product = partial(lambda matrix: multiply(matrix, matrix).block_until_ready(), matrix)
        product()  # compiles
        seconds = min(timed(product)[1] for _ in range(PROBE_TURNS))
        rate = max(rate, 2 * side**3 / seconds)
        if seconds > PROBE_SECONDS:  # an accelerator spends longer on the start of a small product than on it
            break
    return rate
