"""TPUs that are not at hand: what a run would take of one, by XLA's own compiler, which needs none.

    pip install '.[tpu]'
    python benchmarks/topology.py v3:2x2 coco2017 --data_dir data    # a recipe, and flags of `repro train`

Rows and weights are read as by the run; its programs are compiled for the machine, and nothing is computed. The
compiler refuses what a chip's memory does not hold, and plans memory as the TPU would be given it; operations are
counted, not timed. Where the run does not fit, other layouts are tried, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

if "jax" not in sys.modules:
    # Neither JAX nor libtpu is to look for a TPU, or for the server that tells of one.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v3-8"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_WORKER_ID"] = "0"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # beside another process that compiles
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # what is compiled for another machine cannot be read back

import jax
from jax.experimental import topologies

import repro.run.build
from repro.config import (
    ARGUMENTS,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    flags_of,
    given_flags,
    make_arguments,
)
from repro.errors import InputError
from repro.recipes import read_recipe
from repro.recipes.preflight import DryRun, duration, gib, prepare_trial, size_of
from repro.recipes.reproduce import recipe_flags
from repro.run.build import build_evaluator, build_training
from repro.run.prepare import PreparedRun, check_run, load_or_create, read_rows
from repro.run.settings import Settings
from repro.training.memory import SHARE, step_bytes


class Chip(NamedTuple):
    """What one of JAX's devices has: a chip, or one of the two cores of a v3 chip."""

    gib: int  # of memory
    teraflops: float  # in bfloat16, of which products of float32 are made too


# By JAX's name of the device. Source: Google Cloud's documentation of each TPU version.
CHIPS = {
    **{"TPU v3": Chip(16, 61.5), "TPU v4": Chip(32, 275), "TPU v5 lite": Chip(16, 197)},
    **{"TPU v5": Chip(95, 459), "TPU v6 lite": Chip(32, 918)},
}
EXAMPLES = "v3:2x2, v4:2x2x1, v5e:1x1, v5e:2x4, v5p:2x2x1 or v6e:2x4"
COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SHAPE = re.compile(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


def devices_of(topology: str) -> list[jax.Device]:
    """Describe the devices of a machine such as `v5e:2x4`, chips along each axis, for programs that are only compiled.

    Raises:
        InputError: libtpu is not installed, or there is no such machine.
    """
    if find_spec("libtpu") is None:
        raise InputError("XLA's compiler for TPUs is not installed; pip install '.[tpu]' installs it.")
    layout = [int(size) for size in re.findall(r"\d+(?=x|$)", topology.partition(":")[2])]
    more: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if math.prod(layout) < 4:  # chips, which a host has otherwise
        more["chips_per_host_bounds"] = (*layout, 1, 1)[:3]
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"{topology}: must be like {EXAMPLES} ({str(error).splitlines()[0]}).") from error
    if devices[0].device_kind not in CHIPS:
        raise InputError(f"{topology}: a {devices[0].device_kind} is none of {', '.join(CHIPS)}.")
    return list(devices)


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Count the collectives of an optimized program, once each even in a loop: {kind: (number, bytes of results)}."""
    counts: dict[str, tuple[int, int]] = {}
    for results, kind in COLLECTIVE.findall(hlo):
        sizes = [
            math.prod(map(int, filter(None, n.split(",")))) * int(bits or 8) // 8 for bits, n in SHAPE.findall(results)
        ]
        number, size = counts.get(kind, (0, 0))
        counts[kind] = number + 1, size + sum(sizes)
    return counts


def bytes_of(device: jax.Device) -> int:
    """Tell the memory of a device that is not at hand."""
    return CHIPS[device.device_kind].gib << 30


def compile_for(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, devices: Sequence[jax.Device]
) -> DryRun:
    """Compile the programs of a run for the devices of `devices_of`, and tell what they take of them.

    Where they do not fit with the run's flags, they are compiled with others that take less memory for more time, and
    the first that fit are named. Rows and weights are read as by the run; nothing is computed.

    Raises:
        InputError: a flag, the weights or the data cannot be used at all.
    """
    repro.run.build.device_bytes = bytes_of  # a device that is not at hand tells nothing of its memory
    settings = Settings.of(model_args, data_args, args, num_devices=len(devices))
    settings = replace(settings, do_train=True, do_eval=True, do_predict=False)
    problems, facts = list[str](), dict[str, Any]()
    with jax.threefry_partitionable(settings.rules.threefry_partitionable):
        rows = read_rows(settings)
        settings = settings.with_rows({name: len(split.dataset) for name, split in rows.items()})
        trial = prepare_trial(settings, rows["validation"], devices)
        for change in ({}, *_with_less_memory(settings, len(devices))):
            flags = " ".join(flags_of(change)) or "these flags"
            try:
                facts = _compile(trial, replace(settings, **change), devices)
            except InputError as error:
                problems.append(f"with {flags}: {error}")
                continue
            if facts["bytes"] <= SHARE * bytes_of(devices[0]):
                break
            problems.append(f"with {flags}: takes {gib(facts['bytes'])} GiB")
        else:
            flags = ""
    seconds = facts.get("step_seconds_at_least", 0.0)
    lines = [
        f"machine: {len(devices)} x {devices[0].device_kind} with {gib(bytes_of(devices[0]))} GiB, not at hand",
        *(f"problem: {problem}" for problem in problems),
        *([f"it fits with {flags}:"] if problems and flags else []),
        *(f"{name}: {found}" for name, found in facts.pop("words", {}).items()),
        f"time: at least {seconds * 1e3:.1f} ms a step and {duration(settings.num_steps * seconds)} of training, by the"
        " operations alone at the chip's peak in bfloat16",
    ]
    return DryRun(problems, facts, "\n".join(lines))


def _with_less_memory(settings: Settings, num_devices: int) -> Iterator[dict[str, Any]]:
    """Give changes of the layout that change no number but by rounding, the least costly first."""
    checkpointing, fsdp = {"gradient_checkpointing": True}, {"mesh": f"data=1,fsdp={num_devices}"}
    if not settings.gradient_checkpointing:
        yield checkpointing
    if num_devices > 1 and settings.mesh is None:
        yield fsdp
        yield fsdp | checkpointing


def _compile(trial: PreparedRun, settings: Settings, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Compile a run's programs, or raise an InputError where the compiler refuses one."""
    pretrained = load_or_create(settings, seed=settings.seed)
    prepared = replace(trial, settings=settings, pretrained=pretrained, mesh=check_run(settings, pretrained, devices))
    training = build_training(prepared)
    evaluation = build_evaluator(prepared, held_bytes=training.facts["state_bytes"]).programs()
    compiled = {"step": training.step, "encoding": evaluation.encode, "losses": evaluation.row_losses}
    programs = {
        name: {
            "bytes": step_bytes(program),
            "operations": float((program.cost_analysis() or {}).get("flops", 0)),  # those of a loop once
            "collectives": collectives(program.as_text()),
        }
        for name, program in (compiled | {"search": evaluation.generate}).items()
        if program is not None
    }
    at_once, held = training.facts["replicas_at_once"], evaluation.num_bytes + training.facts["state_bytes"]
    peak = CHIPS[devices[0].device_kind].teraflops * 1e12
    words = {"layout": f"{dict(prepared.mesh.shape)}, {at_once} of {settings.replicas} replicas at once"}
    for name, found in programs.items():
        sent = [f"{number} {kind} of {size_of(size)}" for kind, (number, size) in found["collectives"].items()]
        counted = f"{gib(found['bytes'])} GiB, {found['operations'] / 1e9:.1f} GFLOP"
        words[name] = ", ".join([counted, *sent]) + " on each device"
    words["evaluation"] = (
        f"{gib(held)} GiB beside the state, {evaluation.num_rows} of {settings.eval_batch} rows at once"
    )
    return {
        **training.facts,
        "mesh": dict(prepared.mesh.shape),
        "programs": programs,
        "evaluation_rows_at_once": evaluation.num_rows,
        "evaluation_bytes": held,
        "bytes": max(programs["step"]["bytes"], held),
        "step_seconds_at_least": programs["step"]["operations"] * settings.replicas / at_once / peak,  # of all turns
        "words": words,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help=f"such as {EXAMPLES}")
    parser.add_argument("recipe", help="whose run it is; further flags are those of `repro train`")
    args, flags = parser.parse_known_args()
    try:
        devices, given = devices_of(args.machine), given_flags(ARGUMENTS, flags, command="reproduce")
        with tempfile.TemporaryDirectory() as folder:
            of_recipe = recipe_flags(read_recipe(args.recipe), Path(folder), given, Path(folder))
            found = compile_for(*make_arguments(ARGUMENTS, of_recipe), devices)
    except InputError as error:
        parser.error(str(error))
    print(found.text)
    return 2 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
