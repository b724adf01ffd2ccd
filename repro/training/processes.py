"""Several processes that compute one run: how they find each other, and how they come to the same decision."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from repro.errors import InputError

Value = TypeVar("Value")
PROCESS_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
START_SECONDS = 50  # that processes wait for each other when they start
# Of silence after which the other processes end; JAX's 100 seconds, and its 300 at the start, are paid by all of them.
WAITS: Any = {"heartbeat_timeout_seconds": 30, "initialization_timeout": START_SECONDS}
TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


def start_processes(
    *,
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    distributed: bool = False,
) -> None:
    """Join the other processes of this run, if there are any; before JAX is used for anything else.

    Args:
        coordinator: host:port that process 0 opens; None to let JAX ask the cluster.
        distributed: ask the cluster even where its variables do not show several processes (a Cloud TPU pod).

    Raises:
        InputError: the three values are not all given or do not fit together, some process does not come, or JAX finds
            no cluster.
    """
    explicit = {"--coordinator": coordinator, "--process_id": process_id, "--num_processes": num_processes}
    names = ", ".join(explicit)
    if coordinator is None or process_id is None or num_processes is None:
        missing = [name for name, value in explicit.items() if value is None]
        if len(missing) < len(explicit):
            raise InputError(f"{', '.join(missing)} missing: the three of {names} go together.")
        if distributed or launched_several(os.environ):
            try:
                jax.distributed.initialize(**WAITS)
            except ValueError as error:
                raise InputError(f"--distributed: JAX finds no cluster ({error}); give {names} instead.") from error
        return
    if not 0 <= process_id < num_processes:
        raise InputError(f"--process_id {process_id}: must be between 0 and {num_processes - 1}.")
    host, _, port = coordinator.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise InputError(f"--coordinator {coordinator}: must be host:port.")
    try:
        late = _missing(host.strip("[]"), int(port), process_id, num_processes)
    except OSError as error:
        raise InputError(f"--coordinator {coordinator}: cannot be opened ({error}); name another port.") from error
    if late:
        raise InputError(
            f"process {', '.join(map(str, late))} of {num_processes} did not come to {coordinator} within"
            f" {START_SECONDS} s; start all with the same --coordinator, each with a --process_id of its own."
        )
    jax.distributed.initialize(coordinator, num_processes, process_id, cluster_detection_method="deactivate", **WAITS)


def _missing(host: str, port: int, process_id: int, num_processes: int) -> list[int]:
    """Wait for all processes, and tell every one which did not come; JAX would end those that did, and name none."""
    end, others = time.monotonic() + START_SECONDS, range(1, num_processes)
    while process_id in others and time.monotonic() < end:
        # The first answers within its own START_SECONDS, or has died when the line is empty.
        with suppress(OSError, ValueError), socket.create_connection((host, port), START_SECONDS + 5) as link:
            link.sendall(b"%d\n" % process_id)
            return json.loads(link.makefile().readline())
        time.sleep(0.1)
    if process_id in others:
        return [0]
    came, dual = dict[int, socket.socket](), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with ExitStack() as links, socket.create_server(("", port), family=family, dualstack_ipv6=dual) as server:
        while len(came) < len(others) and time.monotonic() < end:
            server.settimeout(max(end - time.monotonic(), 0.01))
            with suppress(OSError, ValueError):  # also of what is no process of this run, which tells no number of one
                link = links.enter_context(server.accept()[0])
                link.settimeout(1)
                came[1 + others.index(int(link.makefile().readline()))] = link
        missing = [number for number in others if number not in came]
        for link in came.values():
            with suppress(OSError):
                link.sendall(b"%s\n" % json.dumps(missing).encode())
    return missing


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
