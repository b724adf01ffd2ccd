"""All benchmarks of one device, as one file of results and one page; and whether a later one is slower.

    python benchmarks/suite.py --device cpu-2-cores              # results/cpu-2-cores/DATE.json and DATE.md
    python benchmarks/suite.py --device h200 --dtype bfloat16 --batch 256 --folder DIR        # an accelerator's session
    python benchmarks/suite.py --smoke                           # every part in seconds, to see that it runs
    python benchmarks/suite.py --compare OLD.json NEW.json
    python benchmarks/suite.py --into RESULT.json --parts generation evaluation               # these anew

Rules, written before any number. A clock starts with arguments on the device and stops when the result is there
(`block_until_ready`). A peer's first run, compilation included, is reported apart; two more warm it up. Peers take
turns in the same run; medians are reported, with minimum and maximum, and as ratio the median of the turns' ratios. On
an accelerator each peer has the device to itself. What fails, for want of memory or otherwise, is reported as failed;
the rest goes on, and the exit status is 1 if a part, or the native peer of one, has failed.

Operations and bytes are counted from the shapes (`roofline.py`), a product and a sum being two operations; beside them
stand the device's roofs, measured in the same run: the largest rate of a square matrix product in the same type, and
the rate of reading and writing an array. Utilisation is of the peak in the device's data sheet, where that is known.
The training step is measured in `--dtype` and in float32, and the native one at five batch sizes for time and memory.

End to end is the documented run on a stand-in (`rehearsal.py`): a part of it, with the whole projected. Its own flags
may be given with `--rehearsal`, such as '--images 118287' for all of it.

What is measured is written part by part, and `--into` adds parts to an earlier result or measures them anew, so that a
suite may be gone through in several calls.

Two results are compared part by part, native against native, by the one-sided Mann-Whitney test on the turns: slower by
more than SLOWER with p < LEVEL (shared by the parts) is a REGRESSION, exit status 1. Fewer than five turns cannot show
one. Different devices or settings are refused.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peers import write_result
from roofline import verdict, work_of
from scipy.stats import mannwhitneyu

HERE = Path(__file__).parent
SLOWER, LEVEL = 1.05, 0.01
PARTS: dict[str, tuple[str, ...]] = {
    "roofs": ("roofline.py",),
    "training step": ("train_step.py", "--turns", "7"),
    "training step, float32": ("train_step.py", "--turns", "7"),
    "batch sizes": ("train_step.py", "--turns", "3", "--peers", "native"),
    "generation": ("generation.py", "--turns", "5"),
    "evaluation": ("generation.py", "--evaluation", "--turns", "5"),
    "input pipeline": ("input_pipeline.py",),
    "saving and restart": ("saving.py",),
    "time to target": (),
    "end to end": ("rehearsal.py",),
}
TIMED = ("training step", "training step, float32", "generation", "evaluation")
"""Parts in which peers take turns."""
FRACTION = {
    "cpu": ("--images", "600", "--train_steps", "2", "--eval_images", "16", "--replicas_at_once", "1"),
    "accelerator": ("--images", "6000", "--train_steps", "100", "--eval_images", "250"),
}
"""Of the documented run that is gone through end to end."""


@dataclass(frozen=True)
class Plan:
    """What a run of the suite measures.

    Attributes:
        rehearsal: flags of the end to end part; none for those of `FRACTION`.
        folder: for the stand-in; a temporary one without it.
    """

    dtype: str = "float32"
    batch: int = 8
    peers: tuple[str, ...] = ("native",)
    parts: tuple[str, ...] = tuple(PARTS)
    rehearsal: tuple[str, ...] = ()
    folder: Path | None = None
    smoke: bool = False

    def includes(self, name: str) -> bool:
        """Tell whether a part is measured: roofs always, none twice."""
        is_repeated = name.endswith("float32") and self.dtype == "float32"
        return name == "roofs" or (name in self.parts and not is_repeated)

    def flags(self, name: str, *, platform: str) -> list[str]:
        """Flags of a part on a platform, in addition to those of `PARTS`."""
        found = ["--smoke"] if self.smoke and name != "roofs" else []
        dtype = ["--dtype", "float32" if name.endswith("float32") else self.dtype]
        if name == "end to end":
            fraction = () if self.smoke else FRACTION["cpu" if platform == "cpu" else "accelerator"]
            folder = ("--folder", str(self.folder)) if self.folder else ()
            found += [*folder, *(self.rehearsal or fraction), *dtype]
        if name in TIMED:
            apart = [] if platform == "cpu" else ["--apart"]
            found += [*dtype, "--batch", str(self.batch), *apart, "--peers", *self.peers]
        if name == "batch sizes":
            sizes = [self.batch * 2**power // 8 for power in range(5)]
            found += [*dtype, "--batches", *(str(size) for size in sizes if size)]
        return found


def run_part(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run one benchmark in a process of its own; what it wrote, or that it failed."""
    output = folder / "result.json"
    output.unlink(missing_ok=True)
    if command[0] == "rehearsal.py" and "--folder" not in command:
        command = [*command, "--folder", str(folder / "rehearsal"), "--remove"]
    arguments = [sys.executable, str(HERE / command[0]), *command[1:], "--output", str(output)]
    status = subprocess.run(arguments, check=False).returncode
    return json.loads(output.read_text()) if output.exists() else {"failed": f"status {status}"}


def time_to_target(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Run the pocket recipe from nothing to its verdict, in a process of its own, start-up and compilation included."""
    command = [sys.executable, "-m", "repro", "reproduce", "pocket", "--keep_going", "--output_dir", str(folder)]
    command += ["--max_train_samples", "640", "--max_eval_samples", "64"] if smoke else []
    started = time.perf_counter()
    status = subprocess.run(command, check=False).returncode
    seconds = time.perf_counter() - started
    if not (folder / "result.json").exists():
        return {"failed": f"status {status}"}
    verdict_reached = json.loads((folder / "result.json").read_text())["verdict"]
    facts = json.loads((folder / "run" / "run.json").read_text())
    return {
        "status": status,
        "verdict": verdict_reached,
        "seconds": seconds,
        "startup_seconds": facts["startup_seconds"],
        "train_seconds": facts["train_seconds"],
    }


def installed_peers() -> tuple[str, ...]:
    """The peers whose packages are there."""
    import transformers

    has_class = hasattr(transformers, "FlaxVisionEncoderDecoderModel")
    return ("native", *["flax"] * has_class, *["torch"] * (find_spec("torch") is not None))


def run_suite(
    plan: Plan,
    known: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Run the parts, roofs first.

    Args:
        known: an earlier result, of which other parts are kept.
        save: is given what is there after each part.

    Raises:
        SystemExit: the earlier result is of another device, type or size.
    """
    results: dict[str, Any] = {**(known or {}), "smoke": plan.smoke, "dtype": plan.dtype}
    for what in ("smoke", "dtype"):
        if known and known[what] != results[what]:
            raise SystemExit(f"the earlier result has {what} {known[what]}, not {results[what]}")
    platform = "cpu"
    with tempfile.TemporaryDirectory() as place:
        for name, command in PARTS.items():
            if not plan.includes(name):
                continue
            print(f"== {name}", flush=True)
            if name == "time to target":
                results[name] = time_to_target(Path(place) / "pocket", smoke=plan.smoke)
            else:
                results[name] = run_part([*command, *plan.flags(name, platform=platform)], Path(place))
            platform = results["roofs"].get("platform", platform)
            if known and results["roofs"].get("device", known["device"]) != known["device"]:
                raise SystemExit(f"the earlier result is of {known['device']}, not {results['roofs']['device']}")
            save(with_roofline(results))
    return with_roofline(results)


def with_roofline(results: dict[str, Any]) -> dict[str, Any]:
    """Add to the native peer of each timed part what binds it, and how near it comes."""
    results = dict(results)
    for name in TIMED:
        part = results.get(name, {"failed": ""})
        if "failed" in part or "failed" in results["roofs"] or "failed" in part["peers"]["native"]:
            continue
        work = work_of(name.partition(",")[0], part["settings"])
        found = verdict(work, part["peers"]["native"]["seconds"], results["roofs"], part["settings"]["dtype"])
        results[name] = {**part, "roofline": found}
    return results


def failures(result: dict[str, Any]) -> list[str]:
    """Say which parts have failed, or their native peer."""
    found = []
    for name in PARTS:
        part = result.get(name, {})
        native = part.get("peers", {}).get("native", {}) if isinstance(part.get("peers"), dict) else {}
        for failed in (part, native):
            if "failed" in failed:
                found.append(f"{name}: {failed['failed']}")
    return found


def page(result: dict[str, Any]) -> str:
    """Put a result on a Markdown page, of the parts that were measured."""
    measured = {name: part for name, part in result.items() if name in PARTS and "failed" not in part}
    roofs = measured.get("roofs", {"teraflops": {}, "gigabytes_a_second": 0.0})
    rates = ", ".join(f"{rate:.2f} TFLOP/s in {dtype}" for dtype, rate in roofs["teraflops"].items())
    lines = [
        f"# Benchmarks of {result['device']}, {result['date']}\n",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version) + ". Rules:"
        " `benchmarks/suite.py`.\n",
        f"Roofs, as measured: square matrix products at {rates}; memory at {roofs['gigabytes_a_second']:.0f} GB/s.\n",
        *(f"- failed: {failure}" for failure in failures(result)),
        *_timed_table(measured),
        *_roofline_table(measured),
    ]
    if "batch sizes" in measured:
        lines += _batches_table(measured["batch sizes"]["batches"])
    if "input pipeline" in measured:
        lines += _input_lines(measured["input pipeline"])
    if "saving and restart" in measured:
        saving = measured["saving and restart"]
        totals = ", ".join(f"{name} {parts['total']:.1f} s" for name, parts in saving["restart"].items())
        compiling = ", ".join(f"{name} {parts['model_and_compile']:.1f} s" for name, parts in saving["restart"].items())
        lines.append(
            f"\nSaving costs {saving['saving']['overhead_percent']:.1f} % at every 50 steps"
            f" ({saving['saving']['state_megabytes']} MB). From restart to the next step: {totals}; of it model and"
            f" compilation: {compiling}."
        )
    if "time to target" in measured:
        target = measured["time to target"]
        lines.append(
            f"\nThe pocket recipe from nothing to its verdict ({target['verdict']}): {target['seconds']:.0f} s, of"
            f" which {target['startup_seconds']:.0f} s before the first step and {target['train_seconds']:.0f} s in"
            " training."
        )
    if "end to end" in measured:
        lines += _projection_table(measured["end to end"])
    return "\n".join(lines) + "\n"


def _timed_table(measured: dict[str, Any]) -> list[str]:
    lines = [
        "\n| | peer | seconds (min to max) | times native | first run | peak memory | TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [name for name in TIMED if name in measured]:
        for peer, found in measured[name]["peers"].items():
            if "failed" in found:
                lines.append(f"| {name} | {peer} | failed: {found['failed']} | | | | |")
                continue
            low, high = found["spread"]
            ratio = f"{found['times_native']:.2f}" if "times_native" in found else ""
            rate = f"{found['teraflops']:.2f}" if "teraflops" in found else ""
            lines.append(
                f"| {name} | {peer} | {found['seconds']:.3g} ({low:.3g} to {high:.3g}) | {ratio} |"
                f" {found['first_run_seconds']:.1f} s | {found['peak_memory_mb']:.0f} MB | {rate} |"
            )
    return lines


def _roofline_table(measured: dict[str, Any]) -> list[str]:
    lines = [
        "\n| native | 10¹² operations | GB at least | operations a byte | bound by | share of roof | of the peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [name for name in TIMED if "roofline" in measured.get(name, {})]:
        found = measured[name]["roofline"]
        peak = f"{100 * found['utilisation']:.0f} %" if "utilisation" in found else "not stated"
        lines.append(
            f"| {name} | {found['tera_operations']:.3g} | {found['gigabytes']:.3g} | {found['operations_a_byte']:.0f} |"
            f" {found['bound_by']} | {100 * found['share_of_roof']:.0f} % | {peak} |"
        )
    return lines


def _batches_table(sizes: list[dict[str, Any]]) -> list[str]:
    lines = ["\n| rows of a training step | seconds | rows a second | peak memory |", "|---|---|---|---|"]
    for size in sizes:
        rows, found = size["settings"]["batch"], size["peers"]["native"]
        if "failed" in found:
            lines.append(f"| {rows} | failed: {found['failed']} | | |")
        else:
            rate, memory = found["rows_per_second"], found["peak_memory_mb"]
            lines.append(f"| {rows} | {found['seconds']:.3g} | {rate:.4g} | {memory:.0f} MB |")
    return lines


def _input_lines(result: dict[str, Any]) -> list[str]:
    peers = result["peers"]
    first, later = peers["ours"], peers["ours_again"]
    low, high = first["ratio_spread"]
    return [
        f"\nInput of an epoch of {result['rows']:,} rows on one core: {first['cpu_seconds']:.2f} s, later epochs"
        f" {later['cpu_seconds']:.2f} s. The example's way takes {first['example_times']:.1f} ({low:.1f} to {high:.1f})"
        f" times as long, {later['example_times']:.0f} times in later epochs, and"
        f" {result['example_bytes_times_ours']:.0f} times the disk."
    ]


def _projection_table(result: dict[str, Any]) -> list[str]:
    projection = result["projection"]
    steps, times = result["run"]["num_steps"], projection["published_times_projected"]
    rows = [f"| {row['term']} | {row['arithmetic']} | {row['seconds']:.1f} |" for row in projection["terms"]]
    return [
        f"\nThe documented run, projected from {steps} of its steps; verdict {result['verdict']}:\n",
        *("| | | seconds |", "|---|---|---|", *rows),
        f"| all | | {projection['seconds']:.0f} |",
        f"\nThe published {projection['published_seconds']} s are {times:.2f} times that.",
    ]


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the native times of two results against each other, of the parts that both have.

    Raises:
        SystemExit: they are of different devices or settings, or have no part in common.
    """
    rows = []
    for name in TIMED:
        if name not in old or name not in new:
            continue
        before, after = old[name], new[name]
        natives = [found.get("peers", {}).get("native", {"failed": "no peers"}) for found in (before, after)]
        if any("failed" in native for native in natives):
            raise SystemExit(f"{name}: has failed in one of them")
        for what in ("device", "settings"):
            if before[what] != after[what]:
                raise SystemExit(f"{name}: {what} differ: {before[what]} and {after[what]}")
        p = float(mannwhitneyu(*(native["seconds_of_turns"] for native in natives[::-1]), alternative="greater").pvalue)
        ratio = natives[1]["seconds"] / natives[0]["seconds"]
        regression = ratio > SLOWER and p < LEVEL / len(TIMED)
        rows.append({"part": name, "ratio": ratio, "p": p, "regression": regression})
    if not rows:
        raise SystemExit("there is no part that both have")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="this-device", help="the folder under results/")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=8, help="rows of the timed parts")
    parser.add_argument("--peers", nargs="+", help="default: native, and what is installed of flax and torch")
    parser.add_argument("--parts", nargs="+", default=tuple(PARTS), choices=tuple(PARTS), help="default: all")
    parser.add_argument("--rehearsal", default="", help="flags of the end to end part, as one word")
    parser.add_argument("--folder", type=Path, help="for the stand-in, which is kept; a temporary one without it")
    parser.add_argument("--smoke", action="store_true", help="very small models and few steps; writes nothing")
    parser.add_argument("--output", type=Path, help="a file in the place of results/DEVICE/DATE.json")
    parser.add_argument("--into", type=Path, metavar="RESULT", help="an earlier result, whose other parts are kept")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    args = parser.parse_args()
    if args.compare:
        rows = compare(*(json.loads(path.read_text()) for path in args.compare))
        for row in rows:
            word = "REGRESSION" if row["regression"] else "no regression shown"
            print(f"{row['part']:22} {row['ratio']:.3f} times the time, p = {row['p']:.4f}: {word}")
        sys.exit(any(row["regression"] for row in rows))
    plan = Plan(
        dtype=args.dtype,
        batch=2 if args.smoke else args.batch,
        peers=tuple(args.peers or installed_peers()),
        parts=tuple(args.parts),
        rehearsal=tuple(shlex.split(args.rehearsal)),
        folder=args.folder,
        smoke=args.smoke,
    )
    dated = HERE / "results" / args.device / f"{date.today().isoformat()}.json"
    output = args.output or args.into or (None if args.smoke else dated)
    known = json.loads(args.into.read_text()) if args.into else None
    result = run_suite(plan, known, partial(write_result, "suite", output=output, quiet=True))
    write_result("suite", result, output)
    if output:
        output.with_suffix(".md").write_text(page(json.loads(output.read_text())))
    if failed := failures(result):
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
