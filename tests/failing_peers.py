"""Peers of a benchmark that run out of memory; apart, since each of their processes imports this module."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

RUNS_BEFORE_TURNS = 3


def make_failing(peer: str, settings: dict) -> Callable[[], None]:
    """Fail while it is made (`early`), in the first turn (`late`), killed in the second (`killed`), or never."""
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        if peer == "late" and runs > RUNS_BEFORE_TURNS:
            raise MemoryError("RESOURCE_EXHAUSTED: 12 GiB")
        if peer == "killed" and runs > RUNS_BEFORE_TURNS + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if peer == "early":
        raise MemoryError("RESOURCE_EXHAUSTED: 34 GiB")
    return run
