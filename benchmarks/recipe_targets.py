"""Measure a recipe's targets: run it under several seeds, and write what they give into the recipe.

    python benchmarks/recipe_targets.py pocket --seeds 42 1 2 3 4 5 6 7 --further 8 9 10 --folder DIR \
        --output benchmarks/results/cpu-2-cores/pocket_seeds.json

Of each metric the mean over the seeds is written, the standard deviation over these and the further ones, and the
margin of `MARGINS`; what is concluded from them is in `repro.recipes.targets`. Counts, learning rates, fingerprints of
data and the losses of each seed's first steps are written as they are: a run has just these, but for rounding. The
promised accuracies are lower bounds. Without `--seeds` all of this stays, and further seeds tell the spread anew.
These, and those whose products are rounded as on a TPU (`rounded_products.py`), are then judged one by one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import write_result

import repro.recipes
from repro.recipes import read_recipe
from repro.recipes.verify import verify

MARGINS = {
    "eval_loss": 0.02,
    "eval_rouge1": 1.3,
    "eval_rouge2": 0.9,
    "eval_rougeL": 1.4,
    "eval_gen_len": 0.7,
    "eval_count_accuracy": 0.065,
    "eval_exact_match": 0.07,
}
"""About three standard deviations of the first five seeds that were ever run, with transformers' model; fixed since."""
PROMISED = {"eval_attribute_accuracy": 0.9, "eval_colour_accuracy": 0.9, "eval_shape_accuracy": 0.9}
FIRST_STEPS = {(1, 2, 3, 5, 10, 20): 5e-4, (50,): 5e-3}
"""And how far a loss may be off there: about three times as far as a TPU's rounding of products moves it."""
ROUNDING = {"loss": 2e-4, "loss at 50": 1.6e-3, "grad_norm": 0.005, "moved": 0.1}
TOLERATED = "a TPU's rounding of products moves it by at most {:g} (benchmarks/rounded_products.py)"
PROBED = {"loss": (5, 5e-4), "grad_norm": (4, 0.015), "moved": (1, 1.0), "idle": (9, 1e-9), "orders": (0, 0)}
"""Of what the fixed first steps give (`repro.recipes.probe`): decimals, and how far it may be off, likewise."""
START = 0.1
"""By how much the first loss of random weights differs from seed to seed at most, with room."""
RATES = (1, 10, 100, 200, 500, 1000, 2000)
ROUNDED = (str(Path(__file__).with_name("rounded_products.py")), "7")


def run_seed(recipe: str, seed: int, folder: Path, *, rounded: bool = False) -> Path:
    """Run the recipe under a seed, unless its result is there already; returns its folder."""
    folder = folder / f"{'rounded' if rounded else 'seed'}-{seed}"
    if not (folder / "result.json").exists():
        program = [sys.executable, *(ROUNDED if rounded else ("-m", "repro"))]
        command = [*program, "reproduce", recipe, "--keep_going", "--seed", str(seed), "--output_dir", str(folder)]
        # Status 1 is a missed target of the recipe as it was: the very thing that is measured anew here.
        status = subprocess.run(command, check=False).returncode
        if status not in (0, 1, 2):
            raise SystemExit(f"seed {seed}: status {status}")
    return folder


def scores_of(run: Path) -> dict[str, float]:
    """Its last scores, by a target's name."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = [row["eval"] for row in rows if "eval" in row][-1]
    return {name: round(final[name.removeprefix("eval_")], 4) for name in (*MARGINS, *PROMISED)}


def judged(folder: Path, recipe: str) -> dict[str, Any]:
    """What `repro verify` says of a run by itself, and which targets it does not meet."""
    found = verify([folder], recipe=recipe, recompute=False)
    missed = [outcome.target.name for outcome in found.outcomes if outcome.verdict != "PASS"]
    return {"verdict": found.verdict, "missed": missed or list(found.problems)}


def make_targets(runs: Mapping[int, Path]) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Turn the seeds' runs into targets; returns each run's own scores as well."""
    facts = [json.loads((run / "run.json").read_text()) for run in runs.values()]
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs.values()]
    listed = [{"seed": seed, **scores_of(run)} for seed, run in runs.items()]
    steps = [{row["step"]: row for row in found if "loss" in row} for found in rows]
    (kept,), (count,) = {f["data"]["train"]["kept"] for f in facts}, {f["num_steps"] for f in facts}
    (parameters,) = {f["model"]["parameters"] for f in facts}
    (evaluated,) = {row["eval"]["rows"] for found in rows for row in found if "eval" in row}
    firsts = [found[1]["loss"] for found in steps]
    targets: list[dict[str, Any]] = [
        {"metric": "train_rows", "value": kept, "tolerance": 0, "source": "the recipe's data"},
        {"metric": "num_steps", "value": count, "tolerance": 0, "source": "rows // global batch x epochs"},
        {"metric": "parameters", "value": parameters, "tolerance": 0, "source": "the recipe's model"},
        {"metric": "eval_rows", "value": evaluated, "tolerance": 0, "source": "the recipe's data"},
        *(
            {"metric": f"{split}_fingerprint", "fingerprint": counts["fingerprint"], "source": "the recipe's data"}
            for split, counts in facts[0]["data"].items()
        ),
        {
            "metric": "loss",
            "step": 1,
            "values": {"1": round(statistics.fmean(firsts), 4)},
            "tolerance": START,
            "source": f"mean of the seeds, which lie between {min(firsts):.3f} and {max(firsts):.3f};"
            " trained weights begin far below",
        },
        {
            "metric": "learning_rate",
            "values": {str(step): steps[0][step]["learning_rate"] for step in (*RATES, count)},
            "tolerance": 1e-8,
            "source": "warm-up and decay, both linear",
        },
        *(
            {
                "metric": "loss",
                **({"step": first[0]} if len(first) == 1 else {}),
                "seeds": {
                    str(seed): {str(step): round(found[step]["loss"], 5) for step in first}
                    for seed, found in zip(runs, steps, strict=True)
                },
                "tolerance": tolerance,
                "source": "the runs of these seeds: weights, order, labels and dropout are the same; "
                + TOLERATED.format(ROUNDING["loss at 50" if first == (50,) else "loss"]),
            }
            for first, tolerance in FIRST_STEPS.items()
        ),
    ]
    for name, (decimals, tolerance) in PROBED.items():
        found = facts[0]["probe"][name]
        by_step = isinstance(found, dict)
        wanted = {step: round(value, decimals) for step, value in found.items()} if by_step else round(found, decimals)
        source = "from fixed weights, whatever the seed (repro/recipes/probe.py)"
        source += f"; {TOLERATED.format(ROUNDING[name])}" if name in ROUNDING else ""
        row = {"metric": f"probe_{name}", "values" if by_step else "value": wanted, "tolerance": tolerance}
        targets.append(row | {"source": source})
    targets += score_targets(listed, ())
    targets += [{"metric": metric, "low": low, "source": "promise of the project"} for metric, low in PROMISED.items()]
    return targets, listed


def score_targets(
    listed: Sequence[Mapping[str, float]], further: Sequence[Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    """Give the targets of `MARGINS`: the mean of the listed runs, the spread of these and the further ones."""
    for metric, margin in MARGINS.items():
        values = [row[metric] for row in listed]
        every = [*values, *(row[metric] for row in further)]
        yield {
            "metric": metric,
            "value": round(statistics.fmean(values), 4),
            "standard_deviation": round(statistics.stdev(every), 4),
            "freedom": len(every) - 1,
            "runs": len(values),
            "margin": margin,
            "source": f"mean of the {len(values)} seeds listed below, spread of {len(every)}",
        }


def main() -> None:
    """Run the seeds one after another, rewrite the recipe's file, and hold the other runs against it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="five or more, which become the reference")
    parser.add_argument("--further", type=int, nargs="+", default=[], help="which tell the spread")
    parser.add_argument("--rounded", type=int, nargs="+", default=[], help="with products as on a TPU")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go, and are found again")
    parser.add_argument("--output", type=Path, help="for the scores of all of them")
    args = parser.parse_args()
    folders = {seed: run_seed(args.recipe, seed, args.folder) for seed in (*args.seeds, *args.further)}
    rounded = {seed: run_seed(args.recipe, seed, args.folder, rounded=True) for seed in args.rounded}
    recipe = read_recipe(args.recipe)
    if args.seeds:
        recipe["targets"], recipe["seeds"] = make_targets({seed: folders[seed] / "run" for seed in args.seeds})
        recipe["measured_with"] = {name: importlib.metadata.version(name) for name in ("jax", "flax", "transformers")}
    scores = score_targets(recipe["seeds"], [scores_of(folders[seed] / "run") for seed in args.further])
    spread = {row["metric"]: row for row in scores}
    recipe["targets"] = [spread.get(row["metric"], row) for row in recipe["targets"]]
    path = Path(repro.recipes.__file__).with_name(f"{args.recipe}.json")
    path.write_text(json.dumps(recipe, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    further = {seed: folders[seed] for seed in args.further}
    groups = {"reference seeds": recipe["seeds"]} | {
        name: [{"seed": seed, **scores_of(run / "run"), **judged(run, args.recipe)} for seed, run in found.items()]
        for name, found in (("further seeds", further), ("products as on a TPU", rounded))
    }
    write_result("recipe_targets", {"groups": groups}, args.output)


if __name__ == "__main__":
    main()
