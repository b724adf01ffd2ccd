"""What mimalloc in the place of the system's malloc gains on a CPU: the same work with both, one after the other.

    pip install '.[flax-class]'
    python benchmarks/allocator.py --output benchmarks/results/cpu-2-cores/allocator.json
    python benchmarks/allocator.py --parts pocket    # one of pocket, training, generation

`pocket` is `repro reproduce` from nothing to its verdict; `training` and `generation` are a step and a search at
ViT-B/16 + GPT-2 size beside transformers' Flax class, which gets the same allocator. Of each: seconds, processor time,
the kernel's share of it, how many cores were busy, and the largest resident size of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from peers import write_result

from repro.allocator import LIBRARY, SWITCH

HERE = Path(__file__).parent
PEERS = ("--peers", "native", "flax", "--turns")
# Commands, to which the place of what they write is added.
PARTS: dict[str, tuple[str, ...]] = {
    "training": (str(HERE / "train_step.py"), *PEERS, "3", "--output"),
    "generation": (str(HERE / "generation.py"), *PEERS, "3", "--output"),
    "pocket": ("-m", "repro", "reproduce", "--output_dir"),
}
SMOKE_POCKET = ("--keep_going", "--max_train_samples", "100", "--max_eval_samples", "20", "--num_train_epochs", "1")
ALLOCATORS = ("malloc", "mimalloc")


def environment(allocator: str) -> dict[str, str]:
    """The variables of a process that is given its memory by an allocator."""
    found = {**os.environ, SWITCH: "system", "JAX_PLATFORMS": "cpu"}
    if allocator == "mimalloc":
        library = Path(str(distribution("cmeel-mimalloc").locate_file(LIBRARY))).resolve(strict=True)
        found |= {"LD_PRELOAD": str(library), "MIMALLOC_PURGE_DELAY": "-1"}
    return found


def measure(part: str, allocator: str, *, smoke: bool) -> dict[str, Any]:
    """Do a part's work, and tell what it took of the machine."""
    with tempfile.TemporaryDirectory() as place:
        made = Path(place, "made")
        more = () if not smoke else SMOKE_POCKET if part == "pocket" else ("--smoke",)
        command, began = [sys.executable, *PARTS[part], str(made), *more], time.perf_counter()
        process = subprocess.Popen(command, env=environment(allocator), cwd=place)
        _, status, used = os.wait4(process.pid, 0)  # with the processes that it started
        seconds, processor = time.perf_counter() - began, used.ru_utime + used.ru_stime
        figure = "train_rows_per_second" if part == "pocket" else "peers"
        found = json.loads((made / "run" / "run.json").read_text() if part == "pocket" else made.read_text())
    return {
        "status": os.waitstatus_to_exitcode(status),  # of a very small pocket 1: it misses its targets
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "system_share": round(used.ru_stime / processor, 3),
        "busy_cores": round(processor / seconds, 2),
        "largest_mb": round(used.ru_maxrss / 1e3),
        figure: found[figure],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="very small, to see that it runs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for part in args.parts:
        both = {allocator: measure(part, allocator, smoke=args.smoke) for allocator in ALLOCATORS}
        times = {name: both[name]["seconds"] for name in ALLOCATORS}
        if part != "pocket":
            times = {name: both[name]["peers"]["native"]["seconds"] for name in ALLOCATORS}
        found[part] = {**both, "times_as_fast": round(times["malloc"] / times["mimalloc"], 3)}
        write_result("allocator", {"smoke": args.smoke, "parts": found}, args.output, quiet=True)
        print(json.dumps({part: found[part]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
