"""Programs compiled from shapes alone, for as many replicas at once as fit a device, and kept for the next start."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding

from repro.errors import InputError
from repro.training.processes import true_in_all

# Of a device's memory that a step may take; evaluation's leftovers and fragmentation need the rest.
SHARE = 0.92
REMEDY = "add --gradient_checkpointing or --mesh fsdp=N, or lower the batch size"

Program = TypeVar("Program")


class Chip(NamedTuple):
    """What one of JAX's devices has: a chip, or one of the two cores of a v3 chip."""

    gib: float  # of memory
    teraflops: float  # in bfloat16, of which products of float32 are made too


# By JAX's name of the device. Source: Google Cloud's documentation of each TPU version.
CHIPS = {
    **{"TPU v3": Chip(16, 61.5), "TPU v4": Chip(32, 275), "TPU v5 lite": Chip(16, 197)},
    **{"TPU v5": Chip(95, 459), "TPU v6 lite": Chip(32, 918)},
}


@contextmanager
def keeping_programs(folder: Path) -> Iterator[None]:
    """Keep what takes long to compile in a folder, for a run that starts again, unless JAX was told of another.

    Such programs are run as they are found: a folder in which others may write is left alone.
    """
    told = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if told is None:
        with suppress(OSError):  # whoever needs the cache for more says what is wrong with it
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            if (status := folder.stat()).st_uid == os.getuid() and not status.st_mode & 0o022:
                compilation_cache.reset_cache()  # it opens a folder once
                compilation_cache.set_cache_dir(str(folder))
    try:
        yield
    finally:
        compilation_cache.reset_cache()
        compilation_cache.set_cache_dir(told)


def batch_shapes(
    row: Mapping[str, Any], sizes: tuple[int, ...], sharding: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Batches of such sizes, from one row [1,...]."""
    return {
        name: jax.ShapeDtypeStruct((*sizes, *array.shape[1:]), array.dtype, sharding=sharding)
        for name, array in row.items()
    }


def tree_bytes(tree: Any) -> int:
    """Sum what arrays, or shapes with shardings, take on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def step_bytes(compiled: jax.stages.Compiled) -> int:
    """Sum what a compiled function holds on one device: arguments, results and temporaries, donated buffers once."""
    found = compiled.memory_analysis()
    assert found is not None, "every backend of jax 0.10 tells"
    held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return held - found.alias_size_in_bytes


def device_bytes(device: jax.Device) -> int:
    """Tell the memory of a device: of a TPU that is not at hand its chip's, of a CPU its part of the machine's."""
    if device.device_kind in CHIPS and device not in jax.devices():
        return int(CHIPS[device.device_kind].gib * 2**30)
    shared = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", shared)


def choices(mesh: Mesh, *, num_replicas: int, replica_batch: int) -> list[int]:
    """List the numbers of replicas that can be computed at once, most first: the devices share each turn evenly."""
    divisors = [n for n in range(num_replicas, 0, -1) if num_replicas % n == 0]
    return [n for n in divisors if n % mesh.size == 0 or replica_batch % mesh.size == 0]


def compile_what_fits(
    compile_program: Callable[[int], Program], at_once: list[int], *, limit: float, bytes_of: Callable[[Program], int]
) -> tuple[int, Program]:
    """Compile for the most replicas at once that take at most `limit` bytes in every process, else for the fewest.

    Raises:
        InputError: the compiler refuses even these, as a TPU's does with what its memory does not hold.
    """
    for number in at_once:
        is_last = number == at_once[-1]
        try:
            compiled = compile_program(number)
            fits = bytes_of(compiled) <= limit
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if is_last:
                said = str(error).splitlines()[0]
                raise InputError(f"{number} at once: more than the memory of a device; {REMEDY} ({said}).") from error
            fits = False
        if is_last or true_in_all(fits):
            return number, compiled
    raise AssertionError("the caller gives at least one")
