"""Which curves a page of runs has: training, every metric of the validation, speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repro.reporting.charts import Chart, Line, Published, bucket_size, thinned
from repro.reporting.metrics import METRICS
from repro.reporting.run_folder import RunFiles, finite
from repro.reporting.untrusted import clip


@dataclass(frozen=True)
class Trajectory:
    """What is published of single steps."""

    name: str
    values: Mapping[int, float]


def label_of(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else clip(metric.replace("_", " "), 60)


def curves_of(runs: Sequence[RunFiles], names: Sequence[str], published: Mapping[str, Trajectory]) -> Iterable[Chart]:
    """Draw up the curves of runs with some names, those of metrics without a label as further ones.

    Args:
        published: what curves are held against, by metric (`loss`, `eval_rouge2`).
    """
    last = float(max([run.last_step for run in runs] + [1]))
    size = bucket_size(max((len(run.steps) for run in runs), default=0))
    averaged = f"each point is the mean of {size} steps, the band their range" if size > 1 else ""

    def curve(key: str, title: str, lines: list[Line], note: str, *, further: bool = False) -> Iterable[Chart]:
        found = published.get(key)
        marks = [Published(found.name, list(found.values), list(found.values.values()))] if found else []
        if lines:
            yield Chart(key, title, lines, marks, note, last, further)

    def by_step(name: str) -> list[Line]:
        lines = []
        for place, run in enumerate(runs):
            rows = [(row["step"], row[name]) for row in run.steps if finite(row.get(name))]
            if rows:
                x, y = (np.array(column, float) for column in zip(*rows, strict=True))
                lines.append(Line(names[place], place, *(column.tolist() for column in thinned(x, y, size))))
        return lines

    yield from curve("loss", "Training loss", by_step("loss"), averaged or "nats a token")
    yield from curve("learning_rate", "Learning rate", by_step("learning_rate"), "")
    for metric in dict.fromkeys(name for run in runs for name in metric_names(run.final)):
        label = label_of(metric)
        lines = [line for place, run in enumerate(runs) if (line := _evaluation(run, names[place], place, metric))]
        note, further = METRICS[metric].unit if metric in METRICS else "", metric not in METRICS
        yield from curve(f"eval_{metric}", f"Validation: {label}", lines, note, further=further)
    speeds = [
        Line(names[place], place, [step for step, _ in run.speed], [rate for _, rate in run.speed])
        for place, run in enumerate(runs)
        if run.speed
    ]
    yield from curve("speed", "Rows a second", speeds, "between logged steps, without evaluations")


def _evaluation(run: RunFiles, name: str, place: int, metric: str) -> Line | None:
    found = {step: row for step, row in sorted(run.evaluations.get("eval", {}).items()) if finite(row.get(metric))}
    if not found:
        return None
    ranges: list[Any] = [
        intervals.get(metric) if isinstance(intervals := row.get("rouge_intervals"), Mapping) else None
        for row in found.values()
    ]
    whole = all(isinstance(ends, list) and len(ends) == 2 and all(map(finite, ends)) for ends in ranges)
    low, high = zip(*ranges, strict=True) if whole else ((), ())
    return Line(name, place, list(found), [row[metric] for row in found.values()], low, high, dotted=True)


def metric_names(row: Mapping[str, Any]) -> list[str]:
    """Names of metrics that can be identifiers on the page too; a run writes no others."""
    return [
        name
        for name, value in row.items()
        if finite(value) and name not in ("rows", "seconds", "saving_seconds") and name.isidentifier()
    ]
