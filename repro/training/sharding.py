"""Which device computes what: a mesh, and where batches and states lie on it."""

from __future__ import annotations

from collections.abc import Sequence
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
