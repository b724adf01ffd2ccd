"""All benchmarks of one device, as one file of results and one page; and whether a later one is slower.

    python benchmarks/suite.py --device cpu-2-cores              # results/cpu-2-cores/DATE.json and DATE.md
    python benchmarks/suite.py --smoke                           # every part in seconds, to see that it runs
    python benchmarks/suite.py --compare OLD.json NEW.json

Rules, written before any number. A clock starts with arguments on the device and stops when the result is there
(`block_until_ready`). A peer's first run, compilation included, is reported apart; two more warm it up. Peers take
turns in the same run; medians are reported, with minimum and maximum, and as ratio the median of the turns' ratios.
Operations are counted from the shapes, a product and a sum being two, and the rate stands beside a square matrix
product of 2048 on the same device, which is the roof that arithmetic has there.

Two results are compared part by part, native against native, by the one-sided Mann-Whitney test on the turns: slower by
more than SLOWER with p < LEVEL (shared by the parts) is a REGRESSION, exit status 1. Fewer than five turns cannot show
one. Different devices or settings are refused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peers import write_result
from scipy.stats import mannwhitneyu

HERE = Path(__file__).parent
SLOWER, LEVEL = 1.05, 0.01
PARTS: dict[str, tuple[str, ...]] = {
    "training step": ("train_step.py", "--turns", "7"),
    "generation": ("generation.py", "--turns", "5"),
    "evaluation": ("generation.py", "--evaluation", "--turns", "5"),
    "input pipeline": ("input_pipeline.py",),
    "saving and restart": ("saving.py",),
}
TIMED = ("training step", "generation", "evaluation")
"""Parts in which peers take turns."""


def run_part(command: tuple[str, ...], more: list[str], folder: Path) -> dict[str, Any]:
    """Run one benchmark in a process of its own; what it wrote."""
    output = folder / "result.json"
    output.unlink(missing_ok=True)
    arguments = [sys.executable, str(HERE / command[0]), *command[1:], *more, "--output", str(output)]
    subprocess.run(arguments, check=True)
    return json.loads(output.read_text())


def time_to_target(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Run the pocket recipe from nothing to its verdict, in a process of its own, start-up and compilation included."""
    command = [sys.executable, "-m", "repro", "reproduce", "pocket", "--keep_going", "--output_dir", str(folder)]
    command += ["--max_train_samples", "640", "--max_eval_samples", "64"] if smoke else []
    started = time.perf_counter()
    status = subprocess.run(command, check=False).returncode
    seconds = time.perf_counter() - started
    verdict = json.loads((folder / "result.json").read_text())["verdict"]
    facts = json.loads((folder / "run" / "run.json").read_text())
    return {
        "status": status,
        "verdict": verdict,
        "seconds": seconds,
        "startup_seconds": facts["startup_seconds"],
        "train_seconds": facts["train_seconds"],
    }


def installed_peers() -> list[str]:
    """The peers whose packages are there."""
    import transformers

    has_class = hasattr(transformers, "FlaxVisionEncoderDecoderModel")
    return ["native", *["flax"] * has_class, *["torch"] * (find_spec("torch") is not None)]


def run_suite(*, smoke: bool, peers: list[str], more: list[str]) -> dict[str, Any]:
    """Run every part."""
    from repro.check import multiplication_rate

    results: dict[str, Any] = {"smoke": smoke, "matrix_product_teraflops": multiplication_rate("float32") / 1e12}
    with tempfile.TemporaryDirectory() as place:
        for name, command in PARTS.items():
            print(f"== {name}", flush=True)
            flags = ["--smoke"] if smoke else []
            if name in TIMED:
                flags += ["--peers", *peers, *more]
            results[name] = run_part(command, flags, Path(place))
        print("== time to target", flush=True)
        results["time to target"] = time_to_target(Path(place) / "pocket", smoke=smoke)
    return results


def page(result: dict[str, Any]) -> str:
    """Put a result on a Markdown page."""
    lines = [
        f"# Benchmarks of {result['device']}, {result['date']}\n",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version) + "; a matrix product"
        f" of 2048 runs at {result['matrix_product_teraflops']:.2f} TFLOP/s. Rules: `benchmarks/suite.py`.\n",
        "| | peer | seconds (min to max) | times native | first run | peak memory | TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in TIMED:
        for peer, found in result[name]["peers"].items():
            low, high = found["spread"]
            ratio = f"{found['times_native']:.2f}" if "times_native" in found else ""
            rate = f"{found['teraflops']:.2f}" if "teraflops" in found else ""
            lines.append(
                f"| {name} | {peer} | {found['seconds']:.3g} ({low:.3g} to {high:.3g}) | {ratio} |"
                f" {found['first_run_seconds']:.1f} s | {found['peak_memory_mb']:.0f} MB | {rate} |"
            )
    saving, target = result["saving and restart"], result["time to target"]
    totals = ", ".join(f"{name} {parts['total']:.1f} s" for name, parts in saving["restart"].items())
    lines += [
        f"\nSaving costs {saving['saving']['overhead_percent']:.1f} % at every 50 steps"
        f" ({saving['saving']['state_megabytes']} MB). From restart to the next step: {totals}.",
        f"\nThe pocket recipe from nothing to its verdict ({target['verdict']}): {target['seconds']:.0f} s, of which"
        f" {target['startup_seconds']:.0f} s before the first step and {target['train_seconds']:.0f} s in training.\n",
    ]
    return "\n".join(lines)


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the native times of two results against each other.

    Raises:
        SystemExit: they are of different devices or settings.
    """
    rows = []
    for name in TIMED:
        before, after = old[name], new[name]
        for what in ("device", "settings"):
            if before[what] != after[what]:
                raise SystemExit(f"{name}: {what} differ: {before[what]} and {after[what]}")
        times = [found["peers"]["native"]["seconds_of_turns"] for found in (before, after)]
        p = float(mannwhitneyu(times[1], times[0], alternative="greater").pvalue)
        ratio = after["peers"]["native"]["seconds"] / before["peers"]["native"]["seconds"]
        regression = ratio > SLOWER and p < LEVEL / len(TIMED)
        rows.append({"part": name, "ratio": ratio, "p": p, "regression": regression})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="this-device", help="the folder under results/")
    parser.add_argument("--peers", nargs="+", help="default: native, and what is installed of flax and torch")
    parser.add_argument("--smoke", action="store_true", help="very small models and few steps; writes nothing")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    args, more = parser.parse_known_args()
    if args.compare:
        rows = compare(*(json.loads(path.read_text()) for path in args.compare))
        for row in rows:
            word = "REGRESSION" if row["regression"] else "no regression shown"
            print(f"{row['part']:16} {row['ratio']:.3f} times the time, p = {row['p']:.4f}: {word}")
        sys.exit(any(row["regression"] for row in rows))
    result = run_suite(smoke=args.smoke, peers=args.peers or installed_peers(), more=more)
    stem = None if args.smoke else HERE / "results" / args.device / date.today().isoformat()
    write_result("suite", result, stem and stem.with_suffix(".json"))
    if stem:
        stem.with_suffix(".md").write_text(page(json.loads(stem.with_suffix(".json").read_text())))


if __name__ == "__main__":
    main()
