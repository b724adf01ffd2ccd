"""Measure a recipe's targets: run it under several seeds and write values, mean, spread and bounds into the recipe.

    python benchmarks/recipe_targets.py pocket --seeds 1 2 3 4 5 --folder /tmp/seeds

Bounds are the 99 % prediction interval of one further run, mean ± t(n - 1) s sqrt(1 + 1 / n): at both ends, because
a run that is too good does not reproduce either. Accuracies have a lower bound alone, where the project promises one
that.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import repro.recipes
from repro.recipes import read_recipe

BANDED = ("eval_loss", "eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_gen_len")
FLOORED = ("count_accuracy", "exact_match")
PROMISED = {"attribute_accuracy": 0.9, "colour_accuracy": 0.9, "shape_accuracy": 0.9}
REPORTED = (*BANDED, *FLOORED, *PROMISED, "captions_without_attributes", "minutes")
# Student's t, 99.5 % quantile, by degrees of freedom (the number of seeds less one).
T_995 = {4: 4.604, 5: 4.032, 6: 3.707, 7: 3.499, 8: 3.355, 9: 3.250}


def run_seed(recipe: str, seed: int, folder: Path) -> dict[str, float]:
    """Run the recipe under a seed, unless its result is there already."""
    result = folder / f"seed-{seed}" / "result.json"
    if not result.exists():
        command = [sys.executable, "-m", "repro", "reproduce", recipe, "--seed", str(seed)]
        # Status 1 is a missed target of the recipe as it was: the very thing that is measured anew here.
        status = subprocess.run([*command, "--output_dir", str(result.parent)], check=False).returncode
        if status not in (0, 1):
            raise SystemExit(f"seed {seed}: status {status}")
    return json.loads(result.read_text())["measured"]


def prediction_interval(values: list[float]) -> tuple[float, float]:
    """The bounds within which one further run lies with 99 % confidence, if runs are normally distributed."""
    mean, spread, count = statistics.fmean(values), statistics.stdev(values), len(values)
    reach = T_995[count - 1] * spread * math.sqrt(1 + 1 / count)
    return mean - reach, mean + reach


def make_targets(measured: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Turn the seeds' values into targets with mean, standard deviation and bounds."""
    targets = []
    for metric in (*BANDED, *FLOORED, *PROMISED):
        values = [run[metric] for run in measured]
        low, high = prediction_interval(values)
        source = f"99 % prediction interval of {len(values)} seeds, listed below"
        if metric in PROMISED:
            low, source = (
                PROMISED[metric],
                f"promise of the project; mean and spread of {len(values)} seeds, listed below",
            )
        targets.append(
            {
                "metric": metric,
                "low": round(low, 4),
                "high": round(high, 4) if metric in BANDED else None,
                "mean": round(statistics.fmean(values), 4),
                "standard_deviation": round(statistics.stdev(values), 4),
                "source": source,
            }
        )
    return targets


def main() -> None:
    """Run the seeds one after another and rewrite the recipe's file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="five to ten of them")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    args = parser.parse_args()
    measured = [run_seed(args.recipe, seed, args.folder) for seed in args.seeds]
    recipe = read_recipe(args.recipe)
    recipe["targets"] = make_targets(measured)
    recipe["seeds"] = [
        {"seed": seed, **{name: round(run[name], 4) for name in REPORTED}}
        for seed, run in zip(args.seeds, measured, strict=True)
    ]
    recipe["measured_with"] = {name: importlib.metadata.version(name) for name in ("jax", "flax", "transformers")}
    path = Path(repro.recipes.__file__).with_name(f"{args.recipe}.json")
    path.write_text(json.dumps(recipe, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
