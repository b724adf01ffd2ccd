"""What the compiled training step takes of a device's memory, and what the devices send each other in it.

    python benchmarks/scaling.py --output benchmarks/results/cpu-2-cores/scaling.json

At ViT-B/16 + GPT-2 size, a global batch of 256 rows as 8 replicas of 32, captions of 32 tokens, AdamW: the step is
compiled for each layout and never run, so that no layout has to fit the machine. The devices are eight that XLA makes
of one CPU. Memory and collectives are those of XLA's compiler for the backend it runs on; a GPU's schedules and fuses
otherwise. Of a collective the bytes of its result on one device are counted; one inside a loop is listed apart, with
the times that the loop is run.

`--estimate` compiles nothing: from the step's operations, the gradients' bytes and published peaks it works out what
machines that are not at hand could do at best, under assumptions that it states.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peers import model_config, pixel_table, write_result
from train_step import forward_operations

NUM_DEVICES, REPLICAS, ROWS, TOKENS = 8, 8, 32, 32
GIBIBYTE = 2**30
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "s64": 8, "f64": 8}


@dataclass(frozen=True)
class Layout:
    """How the step is computed."""

    name: str
    data: int = 1
    fsdp: int = 1
    at_once: int = REPLICAS
    remat: bool = False


LAYOUTS = (
    Layout("one device, 8 replicas at once"),
    Layout("one device, at once, rematerialized", remat=True),
    Layout("one device, one after another", at_once=1),
    Layout("one device, one after another, rematerialized", at_once=1, remat=True),
    Layout("data=8", data=8),
    Layout("fsdp=8", fsdp=8),
    Layout("data=2,fsdp=4", data=2, fsdp=4),
    Layout("data=8, one after another", data=8, at_once=1),
)


@dataclass(frozen=True)
class Machine:
    """Chips, and per chip the peak in bfloat16 and the rate at which gradients can be all-reduced, as published."""

    name: str
    chips: int
    teraflops: float
    gigabytes_a_second: float


MACHINES = (
    # Cloud TPU documentation, v3: 123 teraflops a chip; all-reduce bandwidth 340 TB/s for a pod of 1024 chips.
    Machine("TPU v3-8", 4, 123, 340e3 / 1024),
    # NVIDIA H100 data sheet, SXM: 989 teraflops dense; NVLink 900 GB/s, half of it each way.
    Machine("8 H100 SXM", 8, 989, 450),
    # Cloud TPU documentation, v4: 275 teraflops a chip; all-reduce bandwidth 1.1 PB/s for a pod of 4096 chips.
    Machine("64 TPU v4 chips", 64, 275, 1.1e6 / 4096),
)
UTILIZATION = 0.35
"""Assumed share of the peak that the model's operations reach, whatever a chip's share of the batch."""
PARAMETERS = 239_195_904
STEPS = 2307
"""Of the documented run at batch 256."""


def estimate(machine: Machine, batch: int) -> dict[str, Any]:
    """Work out a step of pure data parallelism: arithmetic at the assumed utilization, a ring of float32 gradients."""
    operations = 3 * forward_operations({"batch": batch, "length": TOKENS, "smoke": False})
    compute = operations / (machine.chips * machine.teraflops * 1e12 * UTILIZATION)
    ring = 2 * (machine.chips - 1) / machine.chips * 4 * PARAMETERS / (machine.gigabytes_a_second * 1e9)
    return {
        "machine": machine.name,
        "batch": batch,
        "rows_a_chip": batch / machine.chips,
        "compute_ms": 1e3 * compute,
        "all_reduce_ms": 1e3 * ring,
        "efficiency_without_overlap": compute / (compute + ring),
        "rows_a_second_without_overlap": batch / (compute + ring),
        "rows_a_second_with_overlap": batch / max(compute, ring),
        "minutes_of_training": STEPS * 256 / batch * (compute + ring) / 60,
    }


def compile_step(layout: Layout, *, dtype: str, smoke: bool) -> tuple[Any, int]:
    """Compile the step from shapes alone; returns it and the number of parameters."""
    import jax
    import jax.numpy as jnp
    from transformers import GenerationConfig

    from repro.models.captioner import NativeCaptioner
    from repro.training.checkpoint import abstract
    from repro.training.memory import compile_step as compile_train_step
    from repro.training.sharding import create_mesh, state_sharding
    from repro.training.steps import (
        count_parameters,
        create_learning_rate_fn,
        create_optimizer,
        create_train_state,
        make_train_step,
    )

    config = model_config({"smoke": smoke})
    captioner = NativeCaptioner(config, GenerationConfig(), pixel_table(), dtype=jnp.dtype(dtype), remat=layout.remat)
    schedule = create_learning_rate_fn(3e-5, num_steps=1000)
    optimizer = create_optimizer(schedule, rule="layer_norms")
    params = jax.eval_shape(partial(captioner.init, 0))
    shapes = jax.eval_shape(partial(create_train_state, optimizer=optimizer, seed=0, num_replicas=REPLICAS), params)
    mesh = create_mesh(
        jax.devices(), num_replicas=REPLICAS, replica_batch=ROWS, shape={"data": layout.data, "fsdp": layout.fsdp}
    )
    side = config.encoder.image_size
    row = dict.fromkeys(
        ("labels", "decoder_input_ids", "decoder_attention_mask"), jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    )
    row["pixels"] = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    compiled = compile_train_step(
        partial(make_train_step, captioner.logits, optimizer, schedule, reduction="tokens"),
        abstract(shapes, state_sharding(mesh, shapes)),
        row,
        mesh,
        num_replicas=REPLICAS,
        replica_batch=ROWS,
        replicas_at_once=layout.at_once,
    )
    return compiled, count_parameters(params)


def count_collectives(hlo: str) -> dict[str, dict[str, float]]:
    """Count the collectives of an optimized program by kind; those in a loop's body under `kind in a loop`.

    Returns:
        For each kind the number of operations, `bytes` of their results, and `larger`: how many exceed 1 MiB.
    """
    counts: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "larger": 0, "bytes": 0})
    loops = set(re.findall(r"body=%?([\w.\-]+)", hlo))
    pattern = re.compile(r" = (.*?) (" + "|".join(COLLECTIVES) + r")(?:-start)?\(")
    computation = ""
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        if found := pattern.search(line):
            size = sum(
                BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
                for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1])
            )
            entry = counts[found[2] + (" in a loop" if computation in loops else "")]
            entry["count"] += 1
            entry["larger"] += size > 2**20
            entry["bytes"] += size
    return dict(counts)


def measure(layout: Layout, *, dtype: str, smoke: bool) -> dict[str, Any]:
    """Compile one layout; its memory in bytes on one device, and its collectives."""
    from repro.training.memory import step_bytes

    started = time.perf_counter()
    compiled, parameters = compile_step(layout, dtype=dtype, smoke=smoke)
    analysis = compiled.memory_analysis()
    return {
        **asdict(layout),
        "dtype": dtype,
        "parameters": parameters,
        "compile_seconds": round(time.perf_counter() - started, 1),
        "step_bytes": step_bytes(compiled),
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "collectives": count_collectives(compiled.as_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layouts", nargs="+", type=int, default=range(len(LAYOUTS)), help="numbers, from 0")
    parser.add_argument("--smoke", action="store_true", help="very small models, to see that it runs")
    parser.add_argument("--estimate", action="store_true", help="compile nothing")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.estimate:
        cells = [estimate(machine, batch) for machine in MACHINES for batch in (256, 2048)]
        write_result("scaling estimate", {"utilization": UTILIZATION, "machines": cells}, args.output)
        return
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    rows = []
    for number in args.layouts:
        rows.append(measure(LAYOUTS[number], dtype=args.dtype, smoke=args.smoke))
        row = rows[-1]
        print(f"{row['name']}: {row['step_bytes'] / GIBIBYTE:.2f} GiB, {row['compile_seconds']} s", flush=True)
        for kind, found in row["collectives"].items():
            print(f"  {kind}: {found['count']} ({found['larger']} large), {found['bytes'] / 1e6:.1f} MB", flush=True)
    write_result("scaling", {"smoke": args.smoke, "layouts": rows}, args.output)


if __name__ == "__main__":
    main()
