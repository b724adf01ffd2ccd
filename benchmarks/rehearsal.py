"""The documented run at full size without its data and weights: every phase, measured, and what the whole would take.

    python benchmarks/rehearsal.py --folder DIR --dtype bfloat16 --output results/DEVICE/rehearsal.json   # all of it
    python benchmarks/rehearsal.py --folder DIR --train_steps 200 --eval_images 1000                      # a part
    python benchmarks/rehearsal.py --smoke                                                                # seconds

In DIR a stand-in for COCO is made (`stand_in.py`; 20 GB, found again by the next rehearsal), and a ViT-B/16 with a
GPT-2 of random weights. Then the commands of the documented run are given, each in a process of its own:
`create-model`, `reproduce coco2017 --dry_run`, `data check`, `reproduce coco2017`, `verify`; before the run the images
are decoded into a new cache by the run's own preparation, once cold and once warm. Flags of `repro train` are passed
on. The whole needs 60 GB of disk, 19 of them for the saved models and states; `--images 20000` needs 26. Where a step
is to be computed in little memory, add `--replicas_at_once 1`.

`--images` makes a smaller stand-in in COCO's proportions. `--train_steps` trains on the first rows only, evaluated in
the middle and at the end, and `--eval_images` evaluates on the first. Random weights reach no loss: the verdict must
be FAIL, or CANNOT TELL for a part, and it must be reached.

Rules. The clock of a phase runs from the start of its process to its end. The whole run is projected from the part as
a sum of terms, each measured here (`project`): start-up, compilation included, once; rows, cache and tokens by images;
steps by the median time between two logged steps with no evaluation between them; what else training took (the first
steps, states) and saved models by evaluations; evaluations by rows, the first one's compilation apart; everything
else, imports, `verify` and the report included, once, as it was. An evaluation ends when captions do, which is not as
in a model that has learned to end them. The sum is held against the published 5,400 seconds, of which nobody knows what
they included. Memory is each process's largest resident size, files mapped into it included, and on a device what the
backend reports.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import stand_in
from filelock import FileLock, Timeout
from peers import write_result

RECIPE = "coco2017"
DOCUMENTED = {"steps": 2307, "evaluations": 5, "rows": 24_832, "images": stand_in.TRAIN_IMAGES + stand_in.VAL_IMAGES}
"""The run with its addition, an evaluation at the end; rows of one evaluation; images of both splits."""
PUBLISHED_SECONDS = 5400
OWN = ("data", "model", "cache", "check", "run", "logs")
MARKER, LOCK = ".rehearsal", ".lock"
STEP_LINE = re.compile(r"^(\S+ \S+) - INFO - step (\d+) of \d+: loss", re.MULTILINE)
SMOKE = ("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2", "--num_beams", "2")
KEPT_OF_RUN = ("num_steps", "replicas_at_once", "train_rows_per_second", "waiting_for_input_seconds")
KEPT_OF_CHECK = ("read", "kept", "images", "captions", "captions_cut")


@dataclass(frozen=True)
class Measured:
    """What was measured of a run.

    Attributes:
        step_seconds: one step, nothing else between.
        train_seconds: of all steps, states included; no evaluation and no saved model.
        saves: seconds of each saved model.
        evaluations: (rows, seconds) of each.
        images_seconds: reading, decoding and tokenizing what belongs to `images`.
        all_seconds: from the start of the process to its end.
    """

    steps: int
    step_seconds: float
    train_seconds: float
    saves: Sequence[float]
    evaluations: Sequence[tuple[int, float]]
    startup_seconds: float
    images: int
    images_seconds: float
    all_seconds: float


def project(found: Measured) -> dict[str, Any]:
    """Work out the documented run from what was measured; each term with its arithmetic."""
    steps, count, rows, images = (DOCUMENTED[name] for name in ("steps", "evaluations", "rows", "images"))
    (first_rows, first_seconds), *later = found.evaluations
    row_seconds = statistics.median(seconds / rows_of for rows_of, seconds in later or found.evaluations)
    compiling = max(first_seconds - first_rows * row_seconds, 0.0)
    apart = max(found.train_seconds - found.steps * found.step_seconds, 0.0) / len(found.evaluations)
    saving = statistics.median(found.saves) if found.saves else 0.0
    evaluating = sum(seconds for _, seconds in found.evaluations)
    rest = found.all_seconds - found.startup_seconds - found.train_seconds - sum(found.saves) - evaluating
    per_image = found.images_seconds / found.images
    terms = [
        ("start-up with compilation", "as measured", found.startup_seconds),
        ("rows, image cache, tokens", f"{images} images x {per_image:.3g} s", images * per_image),
        ("steps", f"{steps} x {found.step_seconds:.4g} s", steps * found.step_seconds),
        ("first steps, states", f"{count} evaluations x {apart:.3g} s", count * apart),
        ("saved models", f"{count} x {saving:.3g} s", count * saving),
        ("evaluations", f"{count} x {rows} rows x {row_seconds:.4g} s", count * rows * row_seconds),
        ("their compilation", "as measured", compiling),
        ("everything else", "as measured", rest),
    ]
    total = sum(seconds for *_, seconds in terms)
    return {
        "terms": [{"term": term, "arithmetic": how, "seconds": round(seconds, 2)} for term, how, seconds in terms],
        "seconds": round(total, 1),
        "published_seconds": PUBLISHED_SECONDS,
        "published_times_projected": round(PUBLISHED_SECONDS / total, 3),
    }


def step_seconds(log: str, evaluated: Sequence[int]) -> float | None:
    """Read the median time of a step between logged ones from a run's log; None if an evaluation is in all of them."""
    marks = [(datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f"), int(step)) for when, step in STEP_LINE.findall(log)]
    times = [
        (later - earlier).total_seconds() / (step - before)
        for (earlier, before), (later, step) in pairwise(marks)
        if not any(before <= at < step for at in evaluated)
    ]
    return statistics.median(times) if times else None


def rows_for(batches: int, batch_size: int) -> int:
    """How many of the first rows fill so many batches and no more, once the grayscale images' rows are dropped."""
    rows = batches * batch_size
    return rows + rows // stand_in.GRAYSCALE_EVERY + batch_size // 2


def read_run(folder: Path, facts: dict[str, Any], **more: Any) -> Measured:
    """Read what a run's files say of its times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = {row["step"]: row["eval"] for row in rows if "eval" in row}
    of_a_step = step_seconds((folder / "log").read_text(), list(evaluations))
    return Measured(
        steps=facts["num_steps"],
        step_seconds=of_a_step or facts["train_seconds"] / facts["num_steps"],
        train_seconds=facts["train_seconds"],
        saves=[found["saving_seconds"] for found in evaluations.values()],
        evaluations=[(found["rows"], found["seconds"]) for found in evaluations.values()],
        startup_seconds=facts["startup_seconds"],
        **more,
    )


class PhaseFailed(Exception):
    """A phase did not end as it may; the message says which, and how."""


class Phases:
    """Runs commands in processes of their own, and keeps what each took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, *arguments: object, allowed: Sequence[int] = (0,)) -> dict[str, Any]:
        """Run one; its output goes to a file of its name.

        Raises:
            PhaseFailed: it ended with another status than those allowed.
        """
        stem = name.replace(" ", "-")
        log, report = self.folder / f"{stem}.log", self.folder / f"{stem}.json"
        report.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--inside", str(report), *map(str, arguments)]
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.terminate()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in allowed or not report.exists():
            print(log.read_text()[-4000:], file=sys.stderr)
            raise PhaseFailed(f"{name}: ended with status {process.returncode}")
        self.results[name] = {
            "seconds": round(time.perf_counter() - started, 1),
            "status": process.returncode,
            "peak_host_mb": round(usage.ru_maxrss * 1024 / 1e6),
            **json.loads(report.read_text()),
        }
        print(f"   {self.results[name]}", flush=True)
        return self.results[name]


def inside(report: Path, arguments: list[str]) -> int:
    """Run one phase in this process, and write what the device says of its memory."""
    found: dict[str, Any] = {}
    if arguments[0] == "prepare":
        status, found = 0, prepare_twice(arguments[1:])
    else:
        from repro.__main__ import main as command_line

        status = command_line(arguments)
    import jax

    statistics_of_device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of_device:
        found["peak_device_mb"] = round(statistics_of_device["peak_bytes_in_use"] / 1e6)
    report.write_text(json.dumps(found))
    return status


def prepare_twice(flags: list[str]) -> dict[str, float]:
    """Do all that a run does before it compiles, with no cache there yet, and with the one that this has made."""
    import jax

    from repro.commands.terminal import start_logging
    from repro.config import parse_arguments
    from repro.recipes.verify import ARGUMENTS
    from repro.run.prepare import prepare
    from repro.run.settings import Settings

    start_logging()
    parsed = parse_arguments(ARGUMENTS, flags, command="train")
    settings = Settings.of(*parsed, num_devices=jax.device_count())
    seconds = []
    with jax.threefry_partitionable(settings.rules.threefry_partitionable):
        for _ in range(2):
            started = time.perf_counter()
            prepare(settings, jax.devices(), progress=True)
            seconds.append(round(time.perf_counter() - started, 2))
    return {"cold_seconds": seconds[0], "warm_seconds": seconds[1]}


def part_flags(flags: list[str], train_steps: int | None, eval_images: int | None, *, rows: int | None) -> list[str]:
    """Flags of a run that is ended after some steps and evaluates on some images.

    Args:
        rows: of a stand-in smaller than COCO, whose run is evaluated in the middle too if it is trained on to its end.
    """
    from repro.config import ARGUMENTS, given_flags, make_arguments
    from repro.recipes import read_recipe
    from repro.recipes.reproduce import recipe_flags

    given = given_flags(ARGUMENTS, flags, command="train")
    _, _, args = make_arguments(ARGUMENTS, recipe_flags(read_recipe(RECIPE), Path(), given, Path()))
    found: list[str] = []
    batch = args.num_replicas * args.per_device_train_batch_size
    if train_steps is None and rows is not None:
        train_steps = max(rows // batch - 1, 2)
    if train_steps is not None:
        logging_steps = max(min(args.logging_steps, train_steps // 8), 1)
        found += ["--max_train_samples", str(rows_for(train_steps, batch))]
        found += ["--eval_steps", str(train_steps // 2), "--logging_steps", str(logging_steps)]
    if eval_images is not None:
        batch = args.num_replicas * args.per_device_eval_batch_size
        found += ["--max_eval_samples", str(rows_for(-(-eval_images * 5 // batch), batch))]
    return found


def on_disk(folder: Path) -> float:
    """Gigabytes."""
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 3)


def says(log: Path, *beginnings: str) -> list[str]:
    """Find the lines of a phase's output that begin so."""
    return [line for line in log.read_text().splitlines() if line.startswith(beginnings)]


@dataclass(frozen=True)
class Plan:
    """What is rehearsed.

    Attributes:
        images: of the stand-in's training split.
        train_steps, eval_images: of a part; None for all.
        flags: of `repro train`.
        data_only: stop before the training.
    """

    images: int
    train_steps: int | None
    eval_images: int | None
    flags: tuple[str, ...]
    smoke: bool = False
    data_only: bool = False


def rehearse(folder: Path, plan: Plan) -> dict[str, Any]:
    """Go through all phases in a folder; one that fails ends them, and what was measured before it is kept."""
    for name in ("cache", "check", "run"):
        shutil.rmtree(folder / name, ignore_errors=True)
    phase = Phases(folder / "logs")
    result: dict[str, Any] = {"settings": vars(plan), "phases": phase.results}
    try:
        flags = make_inputs(folder, plan, phase, result)
        images_seconds = rehearse_data(folder, flags, phase, result)
        if not plan.data_only:
            rehearse_run(folder, plan, flags, images_seconds, phase, result)
    except PhaseFailed as error:
        result["failed"] = str(error)
    result["gigabytes"] = {name: on_disk(folder / name) for name in OWN if (folder / name).is_dir()}
    return result


def make_inputs(folder: Path, plan: Plan, phase: Phases, result: dict[str, Any]) -> list[str]:
    """Make data and model; returns the flags that name them, and those of the plan."""
    data, halves, model = folder / "data", folder / "model" / "halves", folder / "model" / "whole"
    started, was_there = time.perf_counter(), (data / "stand_in.json").exists()
    result["counts"] = stand_in.write_data(data, plan.images, len(os.sched_getaffinity(0)))
    stand_in.write_halves(halves, smoke=plan.smoke)
    phase.results["stand-in"] = {"seconds": round(time.perf_counter() - started, 1), "was_there": was_there}
    print(f"stand-in: {phase.results['stand-in']}, {result['counts']}", flush=True)
    shutil.rmtree(model, ignore_errors=True)
    configs = ("--encoder_config_name", halves / "encoder", "--decoder_config_name", halves / "decoder")
    phase("create-model", "create-model", *configs, "--output_dir", model)
    places = ["--data_dir", str(data), "--cache_dir", str(folder / "cache"), "--model_name_or_path", str(model)]
    return [*places, *(SMOKE if plan.smoke else ()), *plan.flags]


def rehearse_data(folder: Path, flags: list[str], phase: Phases, result: dict[str, Any]) -> float:
    """Do what comes before a run; returns the seconds that rows, images and tokens took."""
    from repro.config import ARGUMENTS, flags_of, given_flags
    from repro.recipes import read_recipe
    from repro.recipes.reproduce import recipe_flags

    run = folder / "run"
    whole = flags_of(recipe_flags(read_recipe(RECIPE), run, given_flags(ARGUMENTS, flags, command="train"), run))
    # There may be no room for all of it: this is reported, and a part is tried.
    phase("dry run", "reproduce", RECIPE, "--output_dir", run, "--dry_run", *flags, allowed=(0, 2))
    result["dry_run"] = says(folder / "logs" / "dry-run.log", "step:", "time:", "disk:")
    prepared = phase("prepare", "prepare", *whole)
    phase("data check", "data", "check", *whole, "--report_dir", folder / "check")
    report = json.loads((folder / "check" / "data_check.json").read_text())
    result["data_check"] = {
        split: {name: found[name] for name in KEPT_OF_CHECK} for split, found in report["splits"].items()
    }
    return prepared["cold_seconds"] - prepared["warm_seconds"]


def rehearse_run(
    folder: Path, plan: Plan, flags: list[str], images_seconds: float, phase: Phases, result: dict[str, Any]
) -> None:
    """Reproduce and verify, and project the whole."""
    run, verdict_file = folder / "run", folder / "logs" / "verdict.json"
    rows = result["counts"]["train"][1] if plan.images < stand_in.TRAIN_IMAGES else None
    part = part_flags(flags, plan.train_steps, plan.eval_images, rows=rows)
    command = ("reproduce", RECIPE, "--output_dir", run, "--keep_going", *part, *flags)
    done = phase("reproduce", *command, allowed=(0, 1, 2))
    # Input that cannot be used ends with the same status as a verdict of CANNOT TELL.
    if not (run / "result.json").exists():
        raise PhaseFailed(f"reproduce: {says(folder / 'logs' / 'reproduce.log', 'error:')}")
    phase("verify", "verify", run, "--json", verdict_file, allowed=(0, 1, 2))
    verdict = json.loads(verdict_file.read_text())
    facts = json.loads((run / "run" / "run.json").read_text())
    images = sum(of_split[0] for of_split in result["counts"].values())
    measured = read_run(run / "run", facts, images=images, images_seconds=images_seconds, all_seconds=done["seconds"])
    result |= {
        "verdict": verdict["verdict"],
        "problems": [problem.partition(": ")[2] for problem in verdict["problems"]],
        "targets": {found["target"]: found["verdict"] for found in verdict["targets"]},
        "run": {
            **{name: facts[name] for name in KEPT_OF_RUN},
            "parameters": facts["model"]["parameters"],
            "step_gigabytes": round(facts["step_bytes"] / 1e9, 2),
            "report_megabytes": round((run / "report.html").stat().st_size / 1e6, 2),
        },
        "projection": {"measured": vars(measured), **project(measured)},
    }


def claim(folder: Path) -> FileLock:
    """Take a folder that is new, empty, or of an earlier rehearsal, for as long as the lock is kept.

    Raises:
        SystemExit: it holds something else, or another rehearsal is at work in it.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise SystemExit(f"{folder}: holds something else; name a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SystemExit(
            f"{folder}: another rehearsal is at work in it; wait for it, or name another folder"
        ) from error
    return lock


def remove(folder: Path) -> None:
    """Remove what rehearsals have made in a folder, and the folder if nothing else is in it."""
    for name in OWN:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (MARKER, LOCK):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def table(projection: dict[str, Any]) -> str:
    """Lay a projection out as text."""
    lines = [f"{row['term']:28} {row['arithmetic']:38} {row['seconds']:>10.1f} s" for row in projection["terms"]]
    times = projection["published_times_projected"]
    published = f"the published {projection['published_seconds']} s are {times} times that"
    return "\n".join([*lines, f"{'the documented run':67} {projection['seconds']:>10.1f} s; {published}"])


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, help="for everything that is made; with --smoke a temporary one")
    parser.add_argument("--images", type=int, help="training images of the stand-in (default: 118,287)")
    parser.add_argument("--train_steps", type=int, help="2 or more (default: all that the images give)")
    parser.add_argument("--eval_images", type=int, help="about so many, in whole batches of captions (default: all)")
    parser.add_argument("--data_only", action="store_true", help="stop before the training")
    parser.add_argument("--remove", action="store_true", help="remove all that was made in the folder afterwards")
    parser.add_argument("--smoke", action="store_true", help="few images and a very small model, to see that it runs")
    parser.add_argument("--output", type=Path)
    args, more = parser.parse_known_args()
    if args.train_steps is not None and args.train_steps < 2:
        parser.error("--train_steps: 2 or more, so that there are two evaluations")
    if args.folder is None and not args.smoke:
        parser.error("--folder is missing")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary) / "rehearsal").absolute()
        lock = claim(folder)
        plan = Plan(
            images=args.images or (60 if args.smoke else stand_in.TRAIN_IMAGES),
            train_steps=args.train_steps or (8 if args.smoke else None),
            eval_images=args.eval_images or (8 if args.smoke else None),
            flags=tuple(more),
            smoke=args.smoke,
            data_only=args.data_only,
        )
        result = rehearse(folder, plan)
        if args.remove:
            remove(folder)
        lock.release()
    write_result(Path(__file__).stem, result, args.output)
    if "projection" in result:
        print(table(result["projection"]))
    if "failed" in result:
        sys.exit(result["failed"])


if __name__ == "__main__":
    main()
