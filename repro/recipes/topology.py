"""TPUs that are not at hand: what a run would take of one, by XLA's own compiler, which needs none.

The compiler plans a program's memory as the TPU would be given it, and refuses what a chip does not hold. Nothing is
run, and operations are counted, not timed: what moves in memory and between chips comes on top of their time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies

from repro.config import DataArguments, ModelArguments, TrainingArguments, flags_of
from repro.errors import InputError
from repro.recipes.preflight import DryRun, duration, gib, prepare_trial, size_in_words
from repro.run.build import build_evaluator, build_training
from repro.run.prepare import PreparedRun, check_run, load_or_create, read_rows
from repro.run.settings import Settings
from repro.training.memory import CHIPS, SHARE, device_bytes, step_bytes

EXAMPLES = "v3:2x2, v4:2x2x1, v5e:1x1, v5e:2x4, v5p:2x2x1 or v6e:2x4"
COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SHAPE = re.compile(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


def devices_of(topology: str) -> list[jax.Device]:
    """Describe the devices of a machine such as `v5e:2x4`, chips along each axis, for programs that are only compiled.

    Raises:
        InputError: libtpu is not installed, or there is no such machine.
    """
    if find_spec("libtpu") is None:
        raise InputError("--topology: XLA's compiler for TPUs is not installed; pip install '.[tpu]' installs it.")
    layout = [int(size) for size in re.findall(r"\d+(?=x|$)", topology.partition(":")[2])]
    more: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if math.prod(layout) < 4:  # chips, which a host has otherwise
        more["chips_per_host_bounds"] = (*layout, 1, 1)[:3]
    try:
        devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology {topology}: must be like {EXAMPLES} ({str(error).splitlines()[0]}).") from error
    if devices[0].device_kind not in CHIPS:
        raise InputError(f"--topology {topology}: a {devices[0].device_kind} is none of {', '.join(CHIPS)}.")
    return list(devices)


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Count the collectives of an optimized program, once each even in a loop: {kind: (number, bytes of results)}."""
    counts: dict[str, tuple[int, int]] = {}
    for results, kind in COLLECTIVE.findall(hlo):
        shapes = [(int(bits or 8), map(int, filter(None, sides.split(",")))) for bits, sides in SHAPE.findall(results)]
        number, size = counts.get(kind, (0, 0))
        counts[kind] = number + 1, size + sum(bits * math.prod(sides) // 8 for bits, sides in shapes)
    return counts


def compile_for(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, *, devices: Sequence[jax.Device]
) -> DryRun:
    """Compile the programs of a run for the devices of `devices_of`, and tell what they take of them.

    Where they do not fit with the run's flags, they are compiled with others that take less memory for more time, and
    the first that fit are named. Rows and weights are read as by the run; nothing is computed.

    Raises:
        InputError: a flag, the weights or the data cannot be used at all.
    """
    args, available = replace(args, do_train=True, do_eval=True, do_predict=False), device_bytes(devices[0])
    settings = Settings.of(model_args, data_args, args, num_devices=len(devices))
    lines = [f"machine: {len(devices)} x {devices[0].device_kind} with {gib(available)} GiB, not at hand"]
    problems = list[str]()
    with jax.threefry_partitionable(settings.rules.threefry_partitionable):
        rows = read_rows(settings)
        settings = settings.with_rows({name: len(split.dataset) for name, split in rows.items()})
        trial = prepare_trial(settings, rows["validation"], devices)
        for change in _layouts(settings, len(devices)):
            flags = " ".join(flags_of(change)) or "these flags"
            try:
                facts = _compile(trial, replace(settings, **change), devices)
            except InputError as error:
                problems.append(f"with {flags}: {error}")
                continue
            if facts["bytes"] <= SHARE * available:
                fitting = [*([f"it fits with {flags}:"] if problems else []), *_in_words(facts, settings)]
                break
            problems.append(f"with {flags}: takes {gib(facts['bytes'])} GiB")
        else:
            facts, fitting = {}, ["it fits with none of these"]
    return DryRun(problems, facts, "\n".join([*lines, *(f"problem: {problem}" for problem in problems), *fitting]))


def _layouts(settings: Settings, num_devices: int) -> Iterator[dict[str, Any]]:
    """Give changes of the layout that change no number but by rounding: none, then the least costly first."""
    checkpointing, fsdp = {"gradient_checkpointing": True}, {"mesh": f"data=1,fsdp={num_devices}"}
    yield {}
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
    compiled: dict[str, Any] = {"step": training.step, "encoding": evaluation.encode, "losses": evaluation.row_losses}
    programs = {
        name: {
            "bytes": step_bytes(program),
            "operations": float((program.cost_analysis() or {}).get("flops", 0)),  # those of a loop once
            "collectives": collectives(program.as_text()),
        }
        for name, program in (compiled | {"search": evaluation.generate}).items()
        if program is not None
    }
    facts, peak = training.facts, CHIPS[devices[0].device_kind].teraflops * 1e12
    held, turns = evaluation.num_bytes + facts["state_bytes"], settings.replicas / facts["replicas_at_once"]
    return {
        **facts,
        "mesh": dict(prepared.mesh.shape),
        "programs": programs,
        "evaluation_rows_at_once": evaluation.num_rows,
        "evaluation_bytes": held,
        "bytes": max(programs["step"]["bytes"], held),
        "step_seconds_at_least": programs["step"]["operations"] * turns / peak,
    }


def _in_words(facts: dict[str, Any], settings: Settings) -> Iterator[str]:
    seconds = facts["step_seconds_at_least"]
    yield f"layout: {facts['mesh']}, {facts['replicas_at_once']} of {settings.replicas} replicas at once"
    for name, found in facts["programs"].items():
        sent = [f", {number} {kind} of {size_in_words(size)}" for kind, (number, size) in found["collectives"].items()]
        yield f"{name}: {gib(found['bytes'])} GiB, {found['operations'] / 1e9:.1f} GFLOP{''.join(sent)} on each device"
    at_once = f"{facts['evaluation_rows_at_once']} of {settings.eval_batch} rows at once"
    yield f"evaluation: {gib(facts['evaluation_bytes'])} GiB beside the state, {at_once}"
    yield (
        f"time: at least {seconds * 1e3:.1f} ms a step and {duration(settings.num_steps * seconds)} of training, by the"
        " operations alone at the chip's peak in bfloat16"
    )
