"""Which device computes what: a mesh, and where batches and states lie on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def create_mesh(devices: Sequence[jax.Device], *, num_replicas: int, replica_batch: int) -> Mesh:
    """Make the `data` mesh of as many devices as divide the replicas, or else the rows of each.

    A device left over would need a part of a row; it idles instead.
    """
    counts = range(len(devices), 0, -1)
    used = next(n for n in counts if num_replicas % n == 0 or replica_batch % n == 0)
    return Mesh(np.asarray(devices[:used]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def train_batch_sharding(mesh: Mesh, *, num_replicas: int) -> NamedSharding:
    """Split [R,b,...] by replicas where the devices divide them, else by each replica's rows."""
    by_replica = num_replicas % mesh.size == 0
    return NamedSharding(mesh, PartitionSpec("data") if by_replica else PartitionSpec(None, "data"))


def rows_sharding(mesh: Mesh, *, num_rows: int) -> NamedSharding:
    """Split [B,...] by rows where the devices divide them, else compute all rows on every device."""
    return NamedSharding(mesh, PartitionSpec("data") if num_rows % mesh.size == 0 else PartitionSpec())


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Copy host arrays to the devices (asynchronously)."""
    return jax.device_put(tree, sharding)


def put_rows(
    load: Callable[[np.ndarray], dict[str, np.ndarray]], sharding: NamedSharding, rows: np.ndarray
) -> dict[str, jax.Array]:
    """Load a batch and copy it to the devices; each process loads only the rows that its devices hold.

    Args:
        load: rows int[n] to arrays [n,...].
        rows: int[R,b], the whole batch.

    Returns:
        Arrays [R,b,...] under the sharding.
    """
    held = np.zeros(rows.shape, bool)
    for index in sharding.addressable_devices_indices_map(rows.shape).values():
        held[index] = True
    loaded = load(rows[held])
    if held.all():
        return put({name: values.reshape(*rows.shape, *values.shape[1:]) for name, values in loaded.items()}, sharding)
    place = np.cumsum(held).reshape(rows.shape) - 1

    def assemble(values: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return values[place[index[:2]]]

        return jax.make_array_from_callback((*rows.shape, *values.shape[1:]), sharding, part)

    return {name: assemble(values) for name, values in loaded.items()}
