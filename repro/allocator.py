"""mimalloc in the place of the system's malloc: training on a CPU takes less time, and no number changes.

XLA's CPU backend takes and gives back its buffers at every step; glibc returns their pages to the kernel, which clears
them for the next step.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

SWITCH = "REPRO_ALLOCATOR"  # `system` leaves the process what it has
LIBRARY = "cmeel.prefix/lib/libmimalloc.so"  # of the package cmeel-mimalloc
ACCELERATORS = ("jax_plugins", "libtpu")  # packages that are there where JAX may compute on something else
PURGE = {"MIMALLOC_PURGE_DELAY": "10000"}  # ms until what is freed goes back: the next step takes most of it again


def preload() -> None:
    """Start this process anew with mimalloc, unless something else is wanted or it is not there."""
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS))
    if sys.platform != "linux" or not on_cpu or os.environ.get(SWITCH) == "system" or "LD_PRELOAD" in os.environ:
        return
    with suppress(PackageNotFoundError, OSError):
        library = Path(str(distribution("cmeel-mimalloc").locate_file(LIBRARY))).resolve(strict=True)
        os.execve(sys.executable, sys.orig_argv, {**PURGE, **os.environ, "LD_PRELOAD": str(library)})


def allocator() -> str:
    """Name what gives this process its memory."""
    return "mimalloc" if "libmimalloc" in os.environ.get("LD_PRELOAD", "") else "malloc"
