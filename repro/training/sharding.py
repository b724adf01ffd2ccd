"""Which device computes and keeps what: a mesh, and where batches and states lie on it.

The axes are `data` and `fsdp`. Both cut the batch; `fsdp` cuts the parameters and the optimizer's state too (ZeRO,
Rajbhandari et al. 2020), which a step then gathers for its own time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from repro.errors import InputError

AXES = ("data", "fsdp")
# Scalars from which on an array is cut by `fsdp`: gathering smaller ones costs more than keeping them.
SMALLEST_CUT = 1024


def create_mesh(
    devices: Sequence[jax.Device], *, num_replicas: int, replica_batch: int, shape: Mapping[str, int] | None = None
) -> Mesh:
    """Lay devices out for batches [R,b].

    Args:
        shape: devices along each axis; None to put as many as divide the replicas, or else the rows of each, along
            `data`. A device left over would need a part of a row; it idles instead.

    Raises:
        InputError: the devices cannot be laid out so, or share the rows of a batch unevenly, or a process has none.
    """

    def divides(count: int) -> bool:
        return num_replicas % count == 0 or replica_batch % count == 0

    sizes = shape or {"data": next(filter(divides, range(len(devices), 0, -1)))}
    data, fsdp = (sizes.get(axis, 1) for axis in AXES)
    used = data * fsdp
    if used > len(devices):
        raise InputError(f"--mesh data={data},fsdp={fsdp}: needs {used} devices; there are {len(devices)}.")
    if not divides(used):
        raise InputError(
            f"--mesh data={data},fsdp={fsdp}: its {used} devices divide neither the {num_replicas} replicas nor the"
            f" {replica_batch} rows of each; change --mesh, --num_replicas or --per_device_train_batch_size."
        )
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:used]}
    if idle:
        raise InputError(
            f"only {used} of {len(devices)} devices divide {num_replicas} replicas or their {replica_batch} rows, which"
            f" leaves {len(idle)} processes without any; change --num_replicas or --per_device_train_batch_size."
        )
    return Mesh(np.asarray(devices[:used]).reshape(data, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """Cut each large array along its longest axis that `fsdp` divides; all others are on every device.

    Args:
        tree: arrays or their shapes; an optimizer's moments are cut like their parameters, because they are as large.

    Returns:
        The tree with a sharding in the place of each array.
    """
    size = mesh.shape["fsdp"]

    def sharding(array: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(array.shape) if length % size == 0]
        if size == 1 or not axes or np.prod(array.shape) < SMALLEST_CUT:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(sharding, tree)


@cache
def gather_on(mesh: Mesh) -> Callable[[Any], Any]:
    """Give what makes whole the arrays that `fsdp` cuts, and cuts their gradients like them, as JAX itself does not."""
    if mesh.shape["fsdp"] == 1:
        return lambda tree: tree
    constrain = jax.lax.with_sharding_constraint
    gather = jax.custom_vjp(lambda tree: constrain(tree, replicated(mesh)))
    cut = lambda _, gradients: (constrain(gradients, state_sharding(mesh, gradients)),)  # noqa: E731
    gather.defvjp(lambda tree: (gather(tree), None), cut)
    return gather


def train_batch_sharding(mesh: Mesh, *, num_replicas: int, replicas_at_once: int | None = None) -> NamedSharding:
    """Split [R,b,...] by replicas where the devices divide those computed at once, else by each replica's rows."""
    by_replica = (replicas_at_once or num_replicas) % mesh.size == 0
    return NamedSharding(mesh, PartitionSpec(AXES) if by_replica else PartitionSpec(None, AXES))


def rows_sharding(mesh: Mesh, *, num_rows: int) -> NamedSharding:
    """Split [B,...] by rows where the devices divide them, else compute all rows on every device."""
    return NamedSharding(mesh, PartitionSpec(AXES) if num_rows % mesh.size == 0 else PartitionSpec())


def put(tree: Any, sharding: Any) -> Any:
    """Copy host arrays to the devices (asynchronously); with several processes, each gives the parts that it holds.

    The sharding is one for all arrays, or a tree of them.
    """

    def place(array: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array, array.shape)

    return jax.tree.map(place, tree, jax.tree.broadcast(sharding, tree))


def put_rows(
    load: Callable[[np.ndarray], dict[str, np.ndarray]], sharding: NamedSharding, rows: np.ndarray
) -> dict[str, jax.Array]:
    """Load a batch and copy it to the devices; each process loads only the rows that its devices hold.

    Args:
        load: rows int[n] to arrays [n,...].
        rows: int[R,b] or int[B], the whole batch.

    Returns:
        Arrays [R,b,...] or [B,...] under the sharding.
    """
    held = np.zeros(rows.shape, bool)
    for index in sharding.addressable_devices_indices_map(rows.shape).values():
        held[index] = True
    own = [len(np.unique(places)) for places in np.nonzero(held)]  # a grid: one axis is cut

    def assemble(values: np.ndarray) -> jax.Array:
        shape = values.shape[1:]
        return jax.make_array_from_process_local_data(sharding, values.reshape(*own, *shape), (*rows.shape, *shape))

    return {name: assemble(values) for name, values in load(rows[held]).items()}
