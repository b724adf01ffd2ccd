"""The curves of runs as figures, which the page's script draws, and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from repro.record.metrics import METRICS
from repro.reports.runs import RunFiles, finite, label_and_unit, metric_names

POINTS = 500  # of a line: more cannot be told apart on a screen
RINGS = "rings and the shade behind them: what is wanted"
FEWEST = 3  # evaluations that make a curve; fewer are in a table


@dataclass(frozen=True)
class Line:
    """Values of a run, or those that a recipe wants of it."""

    name: str
    number: int  # of the run, which decides on colour and dashes
    x: Sequence[float]  # steps
    y: Sequence[float]
    low: Sequence[float] = ()  # with `high` the range that each value stands for; of what is wanted, open at infinity
    high: Sequence[float] = ()
    dotted: bool = False  # whether each value is marked


@dataclass(frozen=True)
class Chart:
    """What is to be drawn."""

    key: str  # an identifier, unique on the page
    title: str
    unit: str  # of the vertical axis
    lines: Sequence[Line]
    wanted: Line | None
    note: str  # what a value, a band or a bar is
    last: int  # step at which the horizontal axis ends; it begins at 0
    further: bool = False  # folded away, behind all others

    @property
    def summary(self) -> str:
        """The chart in words."""
        return " ".join(
            f"{line.name}: {number(line.y[0])} at step {line.x[0]:,.0f}, {number(line.y[-1])} at {line.x[-1]:,.0f},"
            f" between {number(min(line.y))} and {number(max(line.y))}."
            for line in self.lines
        )


def curves_of(runs: Sequence[RunFiles], wanted: Mapping[str, Line]) -> list[Chart]:
    """Draw up the curves of runs with what is wanted of them by metric, those of metrics without a label last."""
    last = max(1, *(run.last_step for run in runs))
    size = max(-(-max(len(run.recorded.steps) for run in runs) // POINTS), 1)
    averaged = f"each point is the mean of {size} steps, the shade their range" if size > 1 else ""
    kinds = [
        ("loss", "Training loss", METRICS["loss"].unit, averaged, [_of_steps(run, "loss", size) for run in runs]),
        ("learning_rate", "Learning rate", "", "", [_of_steps(run, "learning_rate", size) for run in runs]),
    ]
    for metric in dict.fromkeys(name for run in runs for name in metric_names(run.final)):
        found = [_of_evaluations(run, metric) for run in runs]
        if max(len(columns.get("x", ())) for columns in found) >= FEWEST:
            label, unit = label_and_unit(metric)
            note = "bars: the mean's 95 % bootstrap interval" * any("low" in columns for columns in found)
            kinds.append((f"eval_{metric}", f"Validation: {label}", unit, note, found))
    speeds = [columns_of(run.speed, "x", "y") for run in runs]
    kinds.append(("speed", "Speed", "rows a second", "between logged steps, without evaluations", speeds))
    charts = []
    for key, title, unit, note, found in kinds:
        lines = [Line(runs[place].name, place, **columns) for place, columns in enumerate(found) if columns]
        equal = [line.name for line in lines[1:] if (line.x, line.y) == (lines[0].x, lines[0].y)]
        notes = [note, f"{', '.join(equal)}: equal to {lines[0].name}" if equal else "", RINGS * (key in wanted)]
        said, further = "; ".join(filter(None, notes)), key.startswith("eval_") and key[5:] not in METRICS
        charts += [Chart(key, title, unit, lines, wanted.get(key), said, last, further)] if lines else []
    return sorted(charts, key=lambda chart: chart.further)


def _of_steps(run: RunFiles, name: str, size: int) -> dict[str, Any]:
    rows = [(row["step"], row[name]) for row in run.recorded.steps if finite(row.get(name))]
    return columns_of(thinned(rows, size), "x", "y", "low", "high")


def _of_evaluations(run: RunFiles, metric: str) -> dict[str, Any]:
    found = {step: row for step, row in run.evaluations.items() if finite(row.get(metric))}
    ranges = [row.get("rouge_intervals", {}).get(metric, ()) for row in found.values()]
    values = columns_of(((step, row[metric]) for step, row in found.items()), "x", "y")
    if values and all(ends and all(map(finite, ends)) for ends in ranges):
        values |= columns_of(ranges, "low", "high")
    return {**values, "dotted": True} if values else {}


def columns_of(rows: Iterable[Sequence[float]], *names: str) -> dict[str, Any]:
    """Turn rows into named columns; there are none without rows."""
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=False))


def rounded(value: Any) -> Any:
    """Round what is in figures for JSON; what is not finite is null."""
    if isinstance(value, float):
        return (int(value) if value == int(value) else float(f"{value:.5g}")) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def thinned(points: Sequence[tuple[float, float]], size: int) -> list[tuple[float, float, float, float]]:
    """Average points over buckets of `size` neighbours: (last x, mean, least, most) of each."""
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    values = [[y for _, y in bucket] for bucket in buckets]
    return [(bucket[-1][0], fmean(ys), min(ys), max(ys)) for bucket, ys in zip(buckets, values, strict=True)]


def number(value: float) -> str:
    """Write a number as briefly as its size allows."""
    if abs(value) >= 1000 and math.isfinite(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
