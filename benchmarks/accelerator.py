"""An accelerator that is at hand for minutes: what is worth most first, each part written as it ends.

    python benchmarks/accelerator.py --output benchmarks/results/h200/accelerator.json --seconds 540
    python benchmarks/accelerator.py --output FILE --parts float32          # resumes: what FILE has is kept
    python benchmarks/accelerator.py --smoke                                # very small models, on any machine

Compiling is most of such a session, and it needs processors rather than the device. So the jobs of a part compile at
the same time, each in a process of its own, and wait; then each has the device to itself for its turns. A job that is
done gives its memory back before the next one begins. `first_run_seconds` includes making the model and compiling, and
is longer than alone, because the others compile beside it.

The work is that of `train_step.py` and `generation.py`, with their rules and counts. PyTorch computes the same step by
autocast with SDPA and its fused AdamW, as it comes (`torch`) and by `torch.compile` (`torch_compiled`). Utilisation is
of the peak in the device's data sheet (`roofline.PEAKS`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from generation import make_generation
from peers import REASON, WARM_UPS, Make, peak_memory, write_result
from roofline import PEAKS, work_of
from suite import run_part, time_to_target
from train_step import make_step

TURNS = 7
COMPILED_WITHIN = 240
"""Seconds after which a job is not waited for."""
TRAINING = {"length": 32, "beams": 8, "smoke": False}


@dataclass(frozen=True)
class Job:
    """A piece of work for one peer; `kind` is what `roofline.work_of` counts it as."""

    kind: str
    make: Make
    peer: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        replicas = self.settings.get("replicas", 1)
        layout = f" as {replicas} replicas" if replicas > 1 else ""
        return f"{self.kind}, {self.peer}, {self.settings['dtype']}, {self.settings['batch']} rows{layout}"


def training(peer: str, dtype: str, batch: int, replicas: int = 1) -> Job:
    settings = TRAINING | {"dtype": dtype, "batch": batch, "replicas": replicas}
    return Job("training step", make_step, peer, settings)


def generation(peer: str, batch: int = 256) -> Job:
    return Job("generation", make_generation, peer, TRAINING | {"dtype": "bfloat16", "batch": batch})


PARTS: dict[str, list[Job]] = {
    "documented run": [
        training("native", "bfloat16", 256, replicas=8),
        training("torch", "bfloat16", 256),
        training("torch_compiled", "bfloat16", 256),
        generation("native"),
        generation("torch"),
        training("native", "float32", 256, replicas=8),
    ],
    "batch sizes": [training("native", "bfloat16", batch) for batch in (256, 128, 64, 32)],
    "batch sizes, torch": [training("torch", "bfloat16", batch) for batch in (128, 64, 32)],
    "float32": [training(peer, "float32", batch) for batch in (128, 64, 32) for peer in ("native", "torch")],
}
PROGRAMS = {
    "input pipeline": ("input_pipeline.py",),
    "evaluation": ("generation.py", "--evaluation", "--dtype", "bfloat16", "--batch", "256", "--peers", "native"),
    "end to end": ("rehearsal.py", "--images", "6000", "--train_steps", "100", "--eval_images", "250"),
}
SMALL = {"evaluation": ("--batch", "2", "--turns", "2")}  # what `--smoke` leaves large
SELFTEST, POCKET = "selftest", "pocket"
ORDER = (SELFTEST, "documented run", POCKET, *list(PARTS)[1:], *PROGRAMS)


def run_together(jobs: list[Job], turns: int) -> dict[str, dict[str, Any]]:
    """Compile the jobs at the same time, then time one after another.

    Returns:
        By a job's name its times, rates and memory, or `failed`, the reason.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in jobs]
    processes = [
        context.Process(target=_work, args=(job, turns, theirs), daemon=True)
        for job, (_, theirs) in zip(jobs, pipes, strict=True)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    begun, results = time.perf_counter(), {}
    answers = [_receive(ours, COMPILED_WITHIN + begun - time.perf_counter()) for ours, _ in pipes]
    for job, process, (ours, _), answer in zip(jobs, processes, pipes, answers, strict=True):
        if "failed" not in answer:
            ours.send("run")
            answer = {**answer, **_receive(ours, COMPILED_WITHIN)}
        results[job.name] = {"settings": job.settings, **answer}
        print(f"{job.name}: {answer.get('failed') or round(answer['seconds'], 4)}", flush=True)
        process.kill()
        process.join()
    return results


def _receive(pipe: Any, seconds: float) -> dict[str, Any]:
    try:
        return pipe.recv() if pipe.poll(max(seconds, 0)) else {"failed": f"not ready after {COMPILED_WITHIN} s"}
    except (EOFError, OSError):
        return {"failed": "its process ended, as one that is out of memory may"}


def _work(job: Job, turns: int, pipe: Any) -> None:
    """Compile, say so, wait, and say what was measured."""
    try:
        started = time.perf_counter()
        run = job.make(job.peer, job.settings)
        if job.peer == "torch_compiled":  # which compiles when it is first run
            run()
            _give_back_torch_memory()
        pipe.send({"first_run_seconds": time.perf_counter() - started})
        pipe.recv()
        for _ in range(WARM_UPS + 1):
            run()
        times = []
        for _ in range(turns):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        pipe.send({**rates(job, statistics.median(times)), "seconds_of_turns": times, "peak_memory_mb": _peak(job)})
    except Exception as error:  # each backend has an error of its own for memory that is not there
        pipe.send({"failed": f"{type(error).__name__}: {error}"[:REASON]})


def rates(job: Job, seconds: float) -> dict[str, Any]:
    """What a time comes to, on the device that this process computes on."""
    import jax

    count = work_of(job.kind, job.settings)["operations"]
    peak = PEAKS.get(jax.devices()[0].device_kind, {}).get(job.settings["dtype"])
    share = {"utilisation": count / seconds / 1e12 / peak} if peak else {}
    return {
        "seconds": seconds,
        "rows_per_second": job.settings["batch"] / seconds,
        "teraflops": count / seconds / 1e12,
        **share,
    }


def _give_back_torch_memory() -> None:
    import torch

    torch.cuda.empty_cache()


def _peak(job: Job) -> float:
    if job.peer.startswith("torch"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 1e6
    return peak_memory(job.peer)


def run_selftest(smoke: bool) -> dict[str, Any]:
    """Run `repro selftest`; what it prints, or that it failed."""
    flags = [] if smoke else ["--dtype", "bfloat16"]
    done = subprocess.run([sys.executable, "-m", "repro", "selftest", "--json", *flags], stdout=subprocess.PIPE)
    return json.loads(done.stdout) if done.stdout else {"failed": f"status {done.returncode}"}


def run(
    parts: list[str], known: dict[str, Any], *, seconds: float, smoke: bool, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure the parts that are not known, as long as there is time to begin one."""
    results, begun = dict(known), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        for name in parts:
            if name in results or time.perf_counter() - begun > seconds:
                continue
            print(f"== {name}, {time.perf_counter() - begun:.0f} s", flush=True)
            if name == SELFTEST:
                results[name] = run_selftest(smoke)
            elif name == POCKET:
                results[name] = time_to_target(Path(place) / "pocket", smoke=smoke)
            elif name in PROGRAMS:
                results[name] = run_part(
                    [*PROGRAMS[name], *(["--smoke", *SMALL.get(name, ())] if smoke else [])], Path(place)
                )
            else:
                jobs = [job for job in PARTS[name] if not job.peer.startswith("torch") or find_spec("torch")]
                results[name] = run_together([_small(job) for job in jobs] if smoke else jobs, 2 if smoke else TURNS)
            save(results)
    return results


def _small(job: Job) -> Job:
    batch = max(job.settings["batch"] // 32, job.settings["replicas"]) if "replicas" in job.settings else 2
    return Job(job.kind, job.make, job.peer, {**job.settings, "smoke": True, "batch": batch, "length": 8})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(ORDER), choices=ORDER, help="default: all, in this order")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no part is begun")
    parser.add_argument("--smoke", action="store_true", help="very small models, to see that it runs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    # JAX takes three quarters of a GPU at its start, and the jobs are there at the same time.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    known = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    name = Path(__file__).stem

    def save(results: dict[str, Any]) -> None:
        write_result(name, results, args.output, quiet=True)

    write_result(name, run(args.parts, known, seconds=args.seconds, smoke=args.smoke, save=save), args.output)


if __name__ == "__main__":
    main()
