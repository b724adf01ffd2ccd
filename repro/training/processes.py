"""Several processes that compute one run: how they find each other, and how they come to the same decision."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from repro.errors import InputError

Value = TypeVar("Value")
PROCESS_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
HEARTBEAT_SECONDS = 30  # of silence after which the other processes end; JAX's 100 are paid by all of them
TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


def start_processes(
    *, coordinator: str | None, process_id: int | None, num_processes: int | None, distributed: bool
) -> None:
    """Join the other processes of this run, if there are any; before JAX is used for anything else.

    Args:
        coordinator: host:port that process 0 opens; None to let JAX ask the cluster.
        distributed: ask the cluster even where its variables do not show several processes (a Cloud TPU pod).

    Raises:
        InputError: the three values are not all given or do not fit together, or JAX finds no cluster.
    """
    explicit = {"--coordinator": coordinator, "--process_id": process_id, "--num_processes": num_processes}
    names = ", ".join(explicit)
    if coordinator is None or process_id is None or num_processes is None:
        missing = [name for name, value in explicit.items() if value is None]
        if len(missing) < len(explicit):
            raise InputError(f"{', '.join(missing)} missing: the three of {names} go together.")
        if distributed or launched_several(os.environ):
            try:
                jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
            except ValueError as error:
                raise InputError(f"--distributed: JAX finds no cluster ({error}); give {names} instead.") from error
        return
    if not 0 <= process_id < num_processes:
        raise InputError(f"--process_id {process_id}: must be between 0 and {num_processes - 1}.")
    if not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator {coordinator}: must be host:port.")
    how: Any = {"cluster_detection_method": "deactivate", "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    jax.distributed.initialize(coordinator, num_processes, process_id, **how)


def launched_several(environment: Mapping[str, str]) -> bool:
    """Tell from the variables of Slurm, Open MPI and TPU pods (GKE) whether there are other processes."""
    several_hosts = any("," in environment.get(name, "") for name in TPU_HOSTS)
    return several_hosts or any(int(environment.get(name) or 1) > 1 for name in PROCESS_COUNTS)


def is_first() -> bool:
    """Tell whether this process writes the run's files."""
    return jax.process_index() == 0


def decided_by_first(decide: Callable[[], Value]) -> Value:
    """Let the first process compute a JSON value that all get; its InputError is raised in all of them."""
    if jax.process_count() == 1:
        return decide()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": decide()}
        except InputError as error:
            outcome = {"error": str(error)}
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    outcome = json.loads(bytes(np.asarray(text)))
    if "error" in outcome:
        raise InputError(outcome["error"])
    return outcome["value"]


def true_in_all(mine: bool) -> bool:
    """Tell whether something is true in every process, so that all of them act alike."""
    return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(mine)).all())


def check_alike(find: Callable[[], dict[str, Any]]) -> None:
    """Check that all processes find the same; an InputError in each of them names what differs from the first's."""
    if jax.process_count() == 1:
        return
    mine = json.loads(json.dumps(find()))
    first = decided_by_first(lambda: mine)
    found = [
        f"{name}: {its} here, {first.get(name)} in process 0" for name, its in mine.items() if its != first.get(name)
    ]
    if not true_in_all(not found):
        raise InputError(
            f"process {jax.process_index()}: the processes of a run are not alike"
            f" ({'; '.join(found) or 'others say in what'}); start all with the same flags, versions, data and weights."
        )


def wait_for_all(name: str) -> None:
    """Go on once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
