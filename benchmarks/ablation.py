"""What moves the numbers: the pocket recipe with one switch changed at a time, and under every protocol and model.

    python benchmarks/ablation.py --folder DIR --output benchmarks/results/cpu-2-cores/ablation.json

Rules, fixed before any run. Every variant is trained under the same seeds (five) on the recipe's data; nothing else
differs from the recipe than what the table says. Switches that only touch the evaluation are evaluated on the weights
of the recipe's own runs, so they are compared seed by seed (paired t); variants that train anew are compared as groups
(Welch's t), because rounding alone makes two runs of one seed part. Reported are the mean difference from the recipe
and its 95 % interval, and where two groups shall agree (native and transformers under each protocol) the equivalence
test of `repro verify` with the recipe's margins, over all seeds that have been run: `exact` against the recipe's own
seeds, the others against each other. Added when five seeds could not tell under `published`: then both groups get more
seeds, and how many is fixed before they are run (three, and eight more). Runs that are in the folder already are not
repeated; the result has the metrics of each, and with `--known RESULT.json` the runs of an earlier result count as
done.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers import write_result
from scipy.stats import t as students_t

METRICS = ("eval_loss", "eval_rouge2", "eval_gen_len", "eval_attribute_accuracy")
SEEDS = (42, 1, 2, 3, 4)
BASE = "exact, native"


@dataclass(frozen=True)
class Variant:
    """The recipe with other flags.

    Attributes:
        evaluates: the weights of the recipe's own runs, and trains nothing.
        like: another variant to which it shall be equivalent.
        mantissa_bits: what `rounded_products.py` leaves of the operands of products.
    """

    name: str
    flags: tuple[str, ...] = ()
    evaluates: bool = False
    like: str | None = None
    mantissa_bits: int | None = None


FILE_ORDER = ("--protocol", "exact,shuffle_without_blocks=false", "--block_size", "0")
# The share of COCO's rows that the published run dropped, 1,135 of 591,753, of the recipe's 75,000.
SOME_DROPPED = ("--max_train_samples", str(75_000 - 144))
VARIANTS = (
    Variant(BASE),
    Variant("current, native", ("--protocol", "current")),
    Variant("published, native", ("--protocol", "published")),
    Variant("loss: mean of 8 replicas' means", ("--protocol", "exact,loss_reduction=replica_means")),
    Variant("random stream of 2021", ("--protocol", "exact,threefry_partitionable=false")),
    Variant("rows in file order", FILE_ORDER),
    Variant("bfloat16", ("--dtype", "bfloat16")),
    Variant("0.2 % of the rows dropped", SOME_DROPPED),
    Variant("products as on a TPU, of bfloat16", mantissa_bits=7),
    Variant("products as on a GPU, of TensorFloat-32", mantissa_bits=10),
    Variant("evaluation loss: mean of batches", ("--protocol", "exact,token_eval_loss=false"), evaluates=True),
    Variant("incomplete batch dropped", ("--protocol", "exact,keep_incomplete_batch=false"), evaluates=True),
    Variant(
        "beams stop as today, by batch",
        ("--protocol", "exact,stop_rule=current,generate_per_image=false"),
        evaluates=True,
    ),
    Variant(
        "beams stop as in 2022, by batch",
        ("--protocol", "exact,stop_rule=2022,generate_per_image=false"),
        evaluates=True,
    ),
    Variant("evaluated in bfloat16", ("--dtype", "bfloat16"), evaluates=True),
    Variant("exact, transformers", ("--model_implementation", "transformers"), like=BASE),
    Variant(
        "current, transformers",
        ("--protocol", "current", "--model_implementation", "transformers"),
        like="current, native",
    ),
    Variant(
        "published, transformers",
        ("--protocol", "published", "--model_implementation", "transformers"),
        like="published, native",
    ),
)


def folder_of(root: Path, variant: Variant, seed: int) -> Path:
    return root / variant.name.replace(",", "").replace(" ", "-").replace(":", "").replace("'", "") / f"seed-{seed}"


def run(root: Path, variant: Variant, seed: int, cores: Sequence[int]) -> None:
    """Run a variant under a seed on some cores, unless its metrics are there."""
    folder = folder_of(root, variant, seed)
    if (folder / "metrics.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    program = ["-m", "repro"]
    if variant.mantissa_bits is not None:
        program = [str(Path(__file__).with_name("rounded_products.py")), str(variant.mantissa_bits)]
    command = [sys.executable, *program, "reproduce", "pocket", "--keep_going", "--seed", str(seed)]
    if variant.evaluates:
        base = folder_of(root, VARIANTS[0], seed)
        model = max((base / "run").glob("ckpt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
        # Everything but the training: the recipe's data, and its weights instead of its two halves.
        command += ["--do_train", "False", "--model_name_or_path", str(model)]
    with (folder.parent / f"seed-{seed}.log").open("w") as log:
        command += ["--output_dir", str(folder), *variant.flags]
        status = subprocess.run(
            command, stdout=log, stderr=log, check=False, preexec_fn=lambda: os.sched_setaffinity(0, cores)
        ).returncode
    # 1 and 2 are verdicts about another protocol than the recipe's.
    result = folder / "result.json"
    if status not in (0, 1, 2) or not result.exists():
        raise SystemExit(f"{variant.name}, seed {seed}: status {status}, see {log.name}")
    (folder / "metrics.json").write_text(json.dumps(json.loads(result.read_text())["metrics"]))
    print(f"{variant.name}, seed {seed}: done", flush=True)


def take_over(root: Path, known: dict[str, Any]) -> None:
    """Put the metrics of an earlier result's runs into the folder, as if they had been run there."""
    for variant in VARIANTS:
        for seed, metrics in known["runs"].get(variant.name, {}).items():
            file = folder_of(root, variant, int(seed)) / "metrics.json"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(metrics))


def run_all(root: Path, variants: Sequence[Variant], seeds: Sequence[int], workers: int) -> None:
    """Run everything, each worker on its share of the cores; trained variants first, which others evaluate."""
    cores = sorted(os.sched_getaffinity(0))
    free: queue.Queue[list[int]] = queue.Queue()
    for worker in range(workers):
        free.put(cores[worker::workers])

    def job(variant: Variant, seed: int) -> None:
        share = free.get()
        try:
            run(root, variant, seed, share)
        finally:
            free.put(share)

    for evaluates in (False, True):
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(job, v, seed) for v in variants if v.evaluates is evaluates for seed in seeds]
            for done in jobs:
                done.result()


def metrics_of_seeds(root: Path, variant: Variant) -> dict[int, dict[str, float]]:
    """What every run of a variant in the folder gave, by seed."""
    files = folder_of(root, variant, 0).parent.glob("seed-*/metrics.json")
    found = {int(file.parent.name.removeprefix("seed-")): json.loads(file.read_text()) for file in files}
    return dict(sorted(found.items()))


def difference(values: Sequence[float], base: Sequence[float], *, paired: bool) -> dict[str, float]:
    """The mean difference and half the width of its 95 % interval."""
    if paired:
        each = [value - other for value, other in zip(values, base, strict=True)]
        error, freedom = statistics.stdev(each) / len(each) ** 0.5, len(each) - 1.0
    else:
        parts = [statistics.variance(group) / len(group) for group in (values, base)]
        error = sum(parts) ** 0.5
        freedom = (
            sum(parts) ** 2 / sum(p**2 / (len(g) - 1) for p, g in zip(parts, (values, base), strict=True))
            if error
            else 1.0
        )
    return {
        "difference": statistics.fmean(values) - statistics.fmean(base),
        "half_width": float(students_t.ppf(0.975, freedom)) * error,
    }


def bootstrap_noise(generations: Path, *, repetitions: int, resamples: int) -> dict[str, float]:
    """The spread of ROUGE-2 that rouge_score's unseeded BootstrapAggregator gives to one and the same captions."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator

    rows = json.loads(generations.read_text())
    scorer = RougeScorer(["rouge2"], use_stemmer=True)
    scores = [scorer.score(row["label"], row["pred"]) for row in rows]
    values = []
    for seed in range(repetitions):
        np.random.seed(seed)
        aggregator = BootstrapAggregator(n_samples=resamples)
        for score in scores:
            aggregator.add_scores(score)
        values.append(100 * aggregator.aggregate()["rouge2"].mid.fmeasure)
    mean = 100 * statistics.fmean(score["rouge2"].fmeasure for score in scores)
    return {
        "rows": len(rows),
        "repetitions": repetitions,
        "plain_mean": mean,
        "mean": statistics.fmean(values),
        "standard_deviation": statistics.stdev(values),
        "min": min(values),
        "max": max(values),
    }


def summarize(
    root: Path, variants: Sequence[Variant], seeds: Sequence[int], known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Put what is in the folder into tables; the bootstrap, which needs captions, may be an earlier result's."""
    from repro.recipes import read_recipe
    from repro.recipes.targets import Measured, against, judge_all, read_targets

    every = {variant.name: found for variant in variants if (found := metrics_of_seeds(root, variant))}
    measured = {name: [found[s] for s in seeds] for name, found in every.items() if set(seeds) <= set(found)}
    targets = [t for t in read_targets(read_recipe("pocket")["targets"]) if t.is_statistical and t.values is None]
    rows = []
    for variant in variants:
        if variant.name not in measured:
            continue
        runs = measured[variant.name]
        row: dict[str, Any] = {"variant": variant.name, "flags": list(variant.flags), "paired": variant.evaluates}
        for metric in METRICS:
            values = [run[metric] for run in runs]
            base = [run[metric] for run in measured[BASE]]
            row[metric] = {"mean": statistics.fmean(values), "standard_deviation": statistics.stdev(values)}
            row[metric] |= difference(values, base, paired=variant.evaluates)
        if variant.like in measured:
            # The recipe's targets are the seeds of the base.
            new, like = (
                [lambda target, seed=seed, run=run: Measured(seed, {"": run[target.metric]}) for seed, run in group]
                for group in (every[variant.name].items(), every[variant.like].items())
            )
            references = targets if variant.like == BASE else against(targets, like)
            paid = {found.target.name: found for found in judge_all(references, new, named=False)}
            outcomes = judge_all(references, new)
            row["equivalent_to"] = variant.like
            row["equivalence_seeds"] = list(every[variant.name])
            row["equivalence"] = {
                outcome.target.name: {
                    "margin": outcome.target.margin,
                    "difference": outcome.difference,
                    "interval": outcome.interval,
                    "verdict": outcome.verdict,
                    "if_each_look_is_paid_for": {
                        "interval": paid[outcome.target.name].interval,
                        "verdict": paid[outcome.target.name].verdict,
                    },
                }
                for outcome in outcomes
            }
        rows.append(row)
    base = folder_of(root, VARIANTS[0], seeds[0])
    generations = max(base.glob("run/ckpt_*/eval_generation.json"), key=lambda path: path.stat().st_mtime, default=None)
    if generations is not None:
        bootstrap = bootstrap_noise(generations, repetitions=20, resamples=1000)
    else:
        bootstrap = known["bootstrap"] if known else None
    return {
        "seeds": list(seeds),
        "variants": rows,
        "bootstrap": bootstrap,
        "runs": {name: {str(seed): run for seed, run in every[name].items()} for name in measured},
    }


def table(result: dict[str, Any]) -> str:
    """What `summarize` found, in Markdown: the base's means, and what each variant differs by."""
    columns = {"eval_loss": ("loss", 4), "eval_rouge2": ("ROUGE-2", 2)}
    columns |= {"eval_gen_len": ("tokens", 2), "eval_attribute_accuracy": ("attributes", 3)}

    def effect(row: dict[str, Any], metric: str, digits: int) -> str:
        found = row[metric]
        if row["variant"] == BASE:
            return f"{found['mean']:.{digits}f} ({found['standard_deviation']:.{digits}f})"
        if not found["difference"] and not found["half_width"]:
            return "0"
        return f"{found['difference']:+.{digits}f} ± {found['half_width']:.{digits}f}"

    lines = [f"| changed from `{BASE.partition(',')[0]}` | {' | '.join(name for name, _ in columns.values())} |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for row in result["variants"]:
        name = row["variant"] + ("" if row["paired"] else " (trained anew)")
        if row["variant"] == BASE:
            name = "nothing: mean (standard deviation of a run)"
        cells = [effect(row, metric, digits) for metric, (_, digits) in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go, and are found again")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--variants", type=int, nargs="+", default=range(len(VARIANTS)), help="numbers, from 0")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument("--known", type=Path, metavar="RESULT", help="an earlier result, whose runs count as done")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    variants = [VARIANTS[number] for number in args.variants]
    known = json.loads(args.known.read_text()) if args.known else None
    if known:
        take_over(args.folder, known)
    run_all(args.folder, variants, args.seeds, args.workers)
    if VARIANTS[0] in variants:
        result = summarize(args.folder, variants, args.seeds, known)
        write_result("ablation", result, args.output, quiet=True)
        print(table(result))


if __name__ == "__main__":
    main()
