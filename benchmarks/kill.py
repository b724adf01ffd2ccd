"""Kill runs at random moments, resume them, and compare every file with that of a run that nobody disturbed.

    python benchmarks/kill.py --runs 10 --kills 6 --output benchmarks/results/cpu-2-cores/kill.json

A run trains a small captioner with dropout on rendered scenes, saves its state every few steps, evaluates, and captions
test images. Moments are drawn within a phase, which is recognized by the files that a run has written: start-up, the
making of the image cache (emptied before), steps, saving a state, saving a model and evaluating it, prediction. What
must be the same afterwards, byte for byte: the loss of every step, the metrics of every evaluation, the weights of
every model, the last state's arrays, every caption; and no file may be left that cannot be read.

`--signal TERM` asks the runs to stop instead, which must save their state; `--processes 2` kills one of two processes,
whose companion has to end by itself; `--recipe` runs a recipe that makes its own data and model; `--disk MIB` fills a
disk of that size (a tmpfs, which takes root) with a file while a run is at work on it, and empties it before resuming.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers import write_result

POLL_SECONDS = 0.005
BLOCK = 2**16
PATIENCE_SECONDS = 400
ENCODER = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
MODEL = {"vocab_size": 320, "encoder": ENCODER | {"intermediate_size": 64}, "decoder": DECODER}
FLAGS = (
    *("--dataset_name", "ydshieh/coco_dataset_script", "--do_train", "--do_eval", "--do_predict"),
    *("--predict_with_generate", "--num_beams", "2", "--max_target_length", "16", "--learning_rate", "5e-3"),
    *("--num_replicas", "2", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"),
    *("--num_train_epochs", "2", "--save_steps", "20", "--logging_steps", "50", "--resume", "auto"),
    *("--attention_pictures", "0"),
)
TIMES = ("seconds", "saving_seconds", "train_time")
SCENES = {"num_val": 12, "num_test": 8, "image_size": 32, "seed": 0}


def with_recipe(recipe: dict[str, Any]) -> tuple[str, str]:
    """Give Python's arguments for `repro` with one recipe in the place of all others."""
    code = f"""
import repro.recipes.reproduce, repro.recipes.verify
from repro.__main__ import program
for module in (repro.recipes, repro.recipes.reproduce, repro.recipes.verify):
    module.read_recipe = lambda name: {recipe!r}
program()
"""
    return "-c", code


@dataclass(frozen=True)
class Case:
    """What every run of a comparison does, but for its output folder."""

    folder: Path
    num_processes: int = 1
    recipe: dict[str, Any] | None = None  # that is run, in the folder around the run's

    def command(self, out: Path) -> list[str]:
        if self.recipe:
            return [*with_recipe(self.recipe), "reproduce", "--output_dir", str(out.parent)]
        model = self.folder / "model"
        return [
            *("-m", "repro", "train", *FLAGS),
            *("--data_dir", str(self.folder / "data"), "--output_dir", str(out), "--cache_dir", str(self.cache(out))),
            *("--encoder_config_name", str(model / "encoder"), "--decoder_config_name", str(model / "decoder")),
        ]

    def out(self, place: Path) -> Path:
        """The folder of the run that is put in a place."""
        return place / "run" if self.recipe else place

    def cache(self, out: Path) -> Path:
        return out.with_name("cache") if self.recipe else out.with_name(f"{out.name}-cache")

    def log(self, out: Path, number: int = 0) -> Path:
        """What a process of the run says."""
        place = out.parent if self.recipe else out
        return place.with_name(f"{place.name}.{number}.log")


@dataclass(frozen=True)
class Kill:
    """One death.

    Attributes:
        seconds: since the run was started (again).
        step: the last in metrics.jsonl.
        statuses: exit statuses of the processes, negative for a signal.
        ended: seconds from the signal to the end of the last process.
    """

    phase: str
    seconds: float
    step: int
    statuses: list[int]
    ended: float


def make_case(folder: Path, *, num_train: int, num_processes: int = 1, of_recipe: bool = False) -> Case:
    """Render the scenes and make the model that all runs start from, unless a recipe does so itself."""
    from repro.config import ARGUMENTS, given_flags
    from repro.pocket.halves import render_pocket
    from repro.recipes.reproduce import make_halves

    scenes = SCENES | {"num_train": num_train}
    if of_recipe:
        targets = [{"metric": "eval_loss", "low": 0, "source": "any run"}]
        flags = given_flags(ARGUMENTS, FLAGS, command="train")
        recipe = {"name": "pocket", "data": scenes, "model": MODEL, "flags": flags, "targets": targets}
        return Case(folder, num_processes, recipe)
    render_pocket(folder / "data", **scenes)
    make_halves(MODEL, folder / "data", folder / "model")
    return Case(folder, num_processes)


def start(case: Case, out: Path) -> list[subprocess.Popen[bytes]]:
    """Start a run, or go on with it; what its processes say is appended to a log beside it."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = []
    for number in range(case.num_processes):
        command = [sys.executable, *case.command(out)]
        if case.num_processes > 1:
            command += ["--coordinator", address, "--process_id", str(number)]
            command += ["--num_processes", str(case.num_processes)]
        case.log(out).parent.mkdir(parents=True, exist_ok=True)
        with case.log(out, number).open("ab") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes


def finish(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all processes of a run; returns their statuses."""
    return [process.wait(timeout=PATIENCE_SECONDS) for process in processes]


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except ValueError:
            continue
    return 0


def phases(case: Case, out: Path) -> dict[str, Callable[[], bool]]:
    """Say how each phase is recognized, from what there is when a run is started."""
    cache, models, lines = case.cache(out), set(out.glob("ckpt_*")), last_step(out)
    return {
        "start-up": lambda: True,
        "cache": lambda: any(cache.rglob("pixels")),
        "steps": lambda: last_step(out) > lines,
        "saving": lambda: any(out.glob("state/*tmp*")),
        "model and evaluation": lambda: bool(set(out.glob("ckpt_*")) - models),
        "prediction": lambda: len(list(out.glob("ckpt_*/eval_results.json"))) == 2,
    }


WITHIN = {
    "start-up": 6.0,
    "cache": 0.2,
    "steps": 1.5,
    "saving": 0.08,
    "model and evaluation": 1.5,
    "prediction": 0.8,
}
"""Seconds from the beginning of a phase within which the moment is drawn."""


def kill_once(case: Case, out: Path, phase: str, draw: random.Random, signum: int) -> Kill | None:
    """Start a run and signal one of its processes in a phase; None if it was done before."""
    if phase == "cache":
        shutil.rmtree(case.cache(out), ignore_errors=True)
    begun = phases(case, out)[phase]
    started = time.perf_counter()
    processes = start(case, out)
    while not begun() and all(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
    until = time.perf_counter() + draw.uniform(0, WITHIN[phase])
    while time.perf_counter() < until and all(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
    victim = draw.choice(processes)
    if victim.poll() is not None:
        statuses = finish(processes)
        assert not any(statuses), f"{case.log(out)}: it ended with {statuses} before it was killed"
        return None
    victim.send_signal(signum)
    killed = time.perf_counter()
    statuses = finish(processes)
    return Kill(phase, killed - started, last_step(out), statuses, time.perf_counter() - killed)


def differences(out: Path, expected: Path) -> list[str]:
    """Compare two finished runs; returns what is not the same, which should be nothing."""
    found = [f"{path} cannot be read: {error}" for path, error in unreadable(out)]
    ours, theirs = (_rows(folder) for folder in (out, expected))
    if ours != theirs:
        found.append(f"metrics.jsonl: {sum(a != b for a, b in zip(ours, theirs, strict=False))} rows differ")
    names = [sorted(str(path.relative_to(folder)) for path in _results(folder)) for folder in (out, expected)]
    if names[0] != names[1]:
        found.append(f"files: {sorted(set(names[0]) ^ set(names[1]))}")
    common = set(names[0]) & set(names[1])
    for name in common:
        one, other = ((folder / name).read_bytes() for folder in (out, expected))
        if (out.parent / "recipe.json").exists():  # whose configurations name the folder that it made around its run
            one = one.replace(str(out.parent).encode(), str(expected.parent).encode())
        found += [f"{name} differs"] * (one != other)
    states = [_last_state(folder) for folder in (out, expected)]
    if not all(np.array_equal(a, b) for a, b in zip(*states, strict=True)):
        found.append("the last state differs")
    return found


def _rows(out: Path) -> list[Any]:
    """What `metrics.jsonl` says but for times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
        for evaluation in ("eval", "test"):
            for name in TIMES:
                row.get(evaluation, {}).pop(name, None)
    return [json.dumps(row) for row in rows]


def _results(out: Path) -> Iterator[Path]:
    for pattern in ("ckpt_*/*", "*_generation.json", "*_results.json", "dropped.jsonl"):
        yield from out.glob(pattern)


def _last_state(out: Path) -> list[np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    newest = max((out / "state").iterdir(), key=lambda path: int(path.name))
    reader = ocp.PyTreeCheckpointer()
    arrays = reader.metadata(newest / "state").item_metadata.tree
    to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays)
    restored = reader.restore(newest / "state", restore_args=to_host)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def unreadable(out: Path) -> Iterator[tuple[Path, str]]:
    """Find the files of a finished run that are incomplete, or that nothing should have left behind."""
    from flax import serialization
    from safetensors.numpy import load_file

    from repro.training.checkpoint import check_checksums

    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_bytes()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_bytes().splitlines()],
        ".safetensors": load_file,
        ".msgpack": lambda path: serialization.msgpack_restore(path.read_bytes()),
    }
    for path in sorted(out.rglob("*")):
        if "partial" in path.name or "tmp" in path.name or "corrupt" in path.name:
            yield path, "is left over"
        elif path.is_file() and path.suffix in readers:
            try:
                readers[path.suffix](path)
            except Exception as error:
                yield path, str(error)
    for state in (out / "state").iterdir():
        try:
            assert (state / "checksums.json").exists(), "has no checksums"
            check_checksums(state)
        except Exception as error:
            yield state, str(error)


def run_with_kills(case: Case, out: Path, kills: int, draw: random.Random, signum: int) -> list[Kill]:
    """Kill a run again and again, and then let it finish."""
    names = list(WITHIN)
    chosen = sorted((draw.choice(names) for _ in range(kills)), key=lambda name: name == "prediction")
    deaths = [kill_once(case, out, phase, draw, signum) for phase in chosen]
    statuses = finish(start(case, out))
    assert not any(statuses), f"{case.log(out)}: it ended with {statuses}"
    return [death for death in deaths if death]


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """Mount a disk of a few MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill_once(case: Case, out: Path, draw: random.Random) -> Kill | None:
    """Fill the disk while a run is at work, see it end, and free the disk again."""
    filler = out.parent / "filler"
    before, started = last_step(out), time.perf_counter()
    processes = start(case, out)
    while last_step(out) <= before and processes[0].poll() is None:
        time.sleep(POLL_SECONDS)
    time.sleep(draw.uniform(0, WITHIN["steps"]))
    filled = time.perf_counter()
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(BLOCK)):
            pass
    os.truncate(filler, max(filler.stat().st_size - draw.randrange(4 * BLOCK), 0))
    statuses = finish(processes)
    filler.unlink()
    if statuses == [0]:
        return None
    return Kill("disk full", filled - started, last_step(out), statuses, time.perf_counter() - filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=6, help="of each run")
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--images", type=int, default=400, help="to train on; a step takes longer with more processes")
    parser.add_argument("--recipe", action="store_true", help="kill `repro reproduce` in the place of `repro train`")
    parser.add_argument("--disk", type=int, metavar="MIB", help="fill a disk of this size instead of killing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("kill-test"), help="where the runs are put")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    signum = signal.Signals[f"SIG{args.signal}"]
    draw = random.Random(args.seed)
    sizes = {"num_train": args.images, "num_processes": args.processes}
    case = make_case(args.folder / "case", **sizes, of_recipe=args.recipe)
    expected = case.out(args.folder / "undisturbed")
    started = time.perf_counter()
    assert finish(start(case, expected)) == [0] * args.processes, f"see {case.log(expected)}"
    alone = time.perf_counter() - started
    result: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(args).items() if name not in ("folder", "output")},
        "undisturbed": {"seconds": round(alone, 1), "steps": last_step(expected)},
        "runs": [],
    }
    for number in range(args.runs):
        out = case.out(args.folder / f"run-{number}")
        if args.disk:
            with small_disk(args.folder / "disk", args.disk) as disk:
                deaths = [death for _ in range(args.kills) if (death := fill_once(case, disk / "run", draw))]
                assert finish(start(case, disk / "run")) == [0]
                different = differences(disk / "run", expected)
        else:
            deaths = run_with_kills(case, out, args.kills, draw, signum)
            different = differences(out, expected)
        result["runs"].append({"kills": [asdict(death) for death in deaths], "differences": different})
        print(f"run {number}: {len(deaths)} deaths, {'; '.join(different) or 'identical'}", flush=True)
    deaths = [death for run in result["runs"] for death in run["kills"]]
    by_phase = {name: sum(death["phase"] == name for death in deaths) for name in sorted({d["phase"] for d in deaths})}
    result["deaths"] = {"total": len(deaths), **by_phase}
    result["identical"] = sum(not run["differences"] for run in result["runs"])
    print(f"{result['deaths']}; {result['identical']} of {args.runs} runs identical to the undisturbed one")
    write_result("kill", result, args.output)
    sys.exit(0 if result["identical"] == args.runs else 1)


if __name__ == "__main__":
    main()
