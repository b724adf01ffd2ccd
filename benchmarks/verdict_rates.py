"""How often `repro verify` says what, by simulation of the whole verdict.

    python benchmarks/verdict_rates.py                  # the tables of repro/recipes/README.md, in half a minute

Runs are drawn as the measured ones vary: with the spread and the correlations of all of pocket's metrics in runs that
differ by the seed alone (`results/cpu-2-cores/pocket_seeds.json`). The spread that the recipe knows is drawn anew too,
from as many degrees of freedom as it has. What is drawn is judged by the package's own functions: nothing of the rules
is written down here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repro.recipes import read_recipe
from repro.recipes.equivalence import (
    CANNOT_TELL,
    FAIL,
    FALSE_FAILS,
    FALSE_PASSES,
    LOOKING,
    PASS,
    WORST_FIRST,
    Reference,
    compare,
    pooled,
)
from repro.recipes.targets import WIDEST, Measured, Target, judge, read_targets

SEEDS = Path(__file__).with_name("results") / "cpu-2-cores" / "pocket_seeds.json"
COUNTS = (1, 2, 3, 5, 8, 12, 16)
MARGINS_OFF = (0.0, 0.5, 1.0, 2.0)
DRAWS = 20_000
OFF = "eval_rouge2"  # of all targets the one whose margin is smallest beside its spread
# Nobody knows how COCO's scores vary from seed to seed: (eval_loss, eval_rouge2), a guess, its 1.5 and its 1.8 fold.
COCO_SPREADS = ((0.003, 0.10), (0.0045, 0.15), (0.0054, 0.18))
BATCH_NOISE = 0.05  # of the logged loss of one batch, as the published values scatter around a smooth curve


def statistical(name: str) -> list[Target]:
    """A recipe's targets that vary from seed to seed, trajectories not among them."""
    return [t for t in read_targets(read_recipe(name)["targets"]) if t.is_statistical and t.values is None]


def measured_spread(metrics: Sequence[str]) -> tuple[np.ndarray, int]:
    """Covariance of metrics over runs that differ by the seed alone, and its degrees of freedom."""
    known = json.loads(SEEDS.read_text())["groups"]
    values = [[run[metric] for metric in metrics] for run in (*known["reference seeds"], *known["further seeds"])]
    return np.cov(np.array(values), rowvar=False), len(values) - 1


class Pocket:
    """Draws runs of pocket, in units of nothing: as they are measured."""

    def __init__(self, draws: int, seed: int = 0) -> None:
        self.targets = statistical("pocket")
        covariance, self.freedom = measured_spread([t.metric for t in self.targets])
        self._root = np.linalg.cholesky(covariance)
        self._draws, self._random = draws, np.random.default_rng(seed)
        residuals = self.runs(self.freedom + 1)
        self.spread = residuals.std(1, ddof=1)

    def runs(self, count: int) -> np.ndarray:
        """float64[draws, count, targets] around 0."""
        return self._random.normal(size=(self._draws, count, len(self.targets))) @ self._root.T

    def verdicts(self, new: np.ndarray, old: np.ndarray, *, look: float = 1.0, known: bool = True) -> np.ndarray:
        """Places of the whole verdicts, int[draws]; the recipe's spread is known or not."""
        places = []
        for number, target in enumerate(self.targets):
            assert target.margin is not None
            own, values = old[:, :, number], new[:, :, number]
            groups = [(self.spread[:, number], self.freedom)] if known else []
            if own.shape[1] > 1:
                groups.append((own.std(1, ddof=1), own.shape[1] - 1))
            spread, freedom = pooled(*groups)
            found = compare(
                values,
                Reference(own.mean(1), own.shape[1], spread, freedom),
                margin=target.margin,
                widest=target.widest or WIDEST * target.margin,
                false_fails=FALSE_FAILS / len(self.targets) * look,
                false_passes=FALSE_PASSES * look,
            )
            places.append(found.places)
        return np.min(places, axis=0)

    def shift(self, margins: float, metric: str = OFF) -> np.ndarray:
        """What one metric is off by, float64[targets]."""
        return np.array([(t.metric == metric) * margins * (t.margin or 0.0) for t in self.targets])


def rates(places: np.ndarray) -> tuple[float, float, float]:
    """Shares of PASS, FAIL and CANNOT TELL."""
    passes, fails, cannot_tell = (float((places == place).mean()) for place in (PASS, FAIL, CANNOT_TELL))
    return passes, fails, cannot_tell


def percent(found: Iterable[float]) -> str:
    return " / ".join(f"{100 * share:.1f}" if share < 0.1 else f"{100 * share:.0f}" for share in found)


def table(corner: str, rows: Iterable[Any], columns: Iterable[Any], cell: Callable[[Any, Any], str]) -> str:
    columns = list(columns)
    lines = [f"| {corner} | {' | '.join(map(str, columns))} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {row} | {' | '.join(cell(row, column) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def pocket_table(pocket: Pocket, margins: float) -> str:
    """PASS / FAIL / CANNOT TELL in per cent: new runs down, reference runs across."""
    shift = pocket.shift(margins)
    return table(
        "new \\ reference runs",
        COUNTS,
        COUNTS,
        lambda new, old: percent(rates(pocket.verdicts(pocket.runs(new) + shift, pocket.runs(old)))),
    )


def looks_table(draws: int, most: int = 16) -> str:
    """Rates of a PASS or a FAIL at any of the looks, when runs are added one at a time on both sides."""

    def cell(margins: str, look: str) -> str:
        pocket = Pocket(draws, seed=1)
        new, old = pocket.runs(most) + pocket.shift(float(margins)), pocket.runs(most)
        looks = [
            pocket.verdicts(new[:, :n], old[:, :n], look=LOOKING if look == "paid for" else 1.0)
            for n in range(2, most + 1)
        ]
        return percent(float((np.array(looks) == place).any(0).mean()) for place in (PASS, FAIL))

    return table("margins off", ("0", "0.5", "1", "2"), ("as if there were one", "paid for"), cell)


def coco_table(draws: int, spreads: tuple[float, float]) -> str:
    """PASS / FAIL / CANNOT TELL of the two published scores: number of seeds down, margins off across."""
    targets = statistical("coco2017")
    share = sum(t.is_statistical for t in read_targets(read_recipe("coco2017")["targets"]))
    random = np.random.default_rng(2)

    def cell(seeds: int, margins: float) -> str:
        places = []
        common = random.normal(size=(draws, seeds + 1))
        for target, spread in zip(targets, spreads, strict=True):
            assert target.margin is not None
            noise = random.normal(size=(draws, seeds + 1))
            drawn = spread * (np.sqrt(0.5) * common + np.sqrt(0.5) * noise)
            found = compare(
                drawn[:, 1:] + margins * target.margin,
                Reference(drawn[:, 0], 1),
                margin=target.margin,
                widest=target.widest or WIDEST * target.margin,
                false_fails=FALSE_FAILS / share,
                false_passes=FALSE_PASSES,
            )
            places.append(found.places)
        return percent(rates(np.min(places, axis=0)))

    return table("seeds \\ margins off", (1, 3, 5, 8), (0, 1, 2, 4, 8), cell)


def watch_table(draws: int) -> str:
    """How often the watch on the logged losses stops a run, over all its looks up to step 120, in per cent."""
    (target,) = (t for t in read_targets(read_recipe("coco2017")["targets"]) if t.is_statistical and t.values)
    published = dict(target.values or {})
    steps = np.array([int(step) for step in published])
    random = np.random.default_rng(3)
    offsets = {
        "nothing": 0.0 * steps,
        "another start, 0.08": 0.08 + 0.0 * steps,
        "another start, 0.3 that fades within 20 steps": 0.3 * np.exp(-steps / 20),
        "0.3": 0.3 + 0.0 * steps,
        "2, labels shifted": 2.0 + 0.0 * steps,
    }

    def cell(name: str, column: str) -> str:
        stopped = np.zeros(draws, bool)
        last = len(steps) if column == "step 120" else 4
        for draw in range(draws):
            noise = random.normal(0, BATCH_NOISE * np.sqrt(2), len(steps))
            losses = dict(zip(published, np.array([*published.values()]) + offsets[name] + noise, strict=True))
            for look in range(1, last + 1):
                seen = dict(list(losses.items())[:look])
                outcome = judge(target, [Measured(42, seen)])
                stopped[draw] |= outcome is not None and WORST_FIRST.index(outcome.verdict) == FAIL
        return percent([float(stopped.mean())])

    return table("off by", offsets, ("step 40", "step 120"), cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS)
    args = parser.parse_args()
    pocket = Pocket(args.draws)
    for margins in MARGINS_OFF:
        print(f"\n{OFF} off by {margins:g} margins, PASS / FAIL / CANNOT TELL in %\n\n{pocket_table(pocket, margins)}")
    print(f"\nlooks: PASS / FAIL at any of them, in %\n\n{looks_table(args.draws)}")
    for spreads in COCO_SPREADS:
        print(f"\ncoco2017, spreads of loss and ROUGE-2 {spreads}\n\n{coco_table(args.draws, spreads)}")
    print(f"\nthe watch on logged losses\n\n{watch_table(args.draws // 10)}")


if __name__ == "__main__":
    main()
