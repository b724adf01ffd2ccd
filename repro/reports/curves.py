"""Which curves a page of runs has: training, every metric of the validation, speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from repro.record.metrics import METRICS
from repro.record.sanitize import clip
from repro.reports.charts import POINTS, Chart, Line, Published, thinned
from repro.reports.run_folder import RunFiles, finite


def label_and_unit(metric: str) -> tuple[str, str]:
    """Look a metric up; one that is not known is called as it is."""
    known = METRICS.get(metric)
    return (known.label, known.unit) if known else (clip(metric.replace("_", " "), 60), "")


def curves_of(runs: Sequence[RunFiles], names: Sequence[str], published: Mapping[str, Published]) -> Iterable[Chart]:
    """Draw up the curves of runs with some names, those of metrics without a label as further ones.

    Args:
        published: what curves are held against, by metric (`loss`, `eval_rouge2`).
    """
    last = float(max(1, *(run.last_step for run in runs)))
    size = max(-(-max(len(run.recorded.steps) for run in runs) // POINTS), 1)
    averaged = f"each point is the mean of {size} steps, the band their range" if size > 1 else ""

    def curve(key: str, title: str, lines: list[Line], note: str, *, further: bool = False) -> Iterable[Chart]:
        if lines:
            yield Chart(key, title, lines, [published[key]] if key in published else [], note, last, further)

    def by_step(name: str) -> list[Line]:
        lines = []
        for place, run in enumerate(runs):
            if rows := [(row["step"], row[name]) for row in run.recorded.steps if finite(row.get(name))]:
                steps, values = np.array(rows, float).T
                lines.append(Line(names[place], place, *(part.tolist() for part in thinned(steps, values, size))))
        return lines

    yield from curve("loss", "Training loss", by_step("loss"), averaged or "nats a token")
    yield from curve("learning_rate", "Learning rate", by_step("learning_rate"), "")
    for metric in dict.fromkeys(name for run in runs for name in metric_names(run.final)):
        label, unit = label_and_unit(metric)
        lines = [line for place, run in enumerate(runs) if (line := _evaluation(run, names[place], place, metric))]
        yield from curve(f"eval_{metric}", f"Validation: {label}", lines, unit, further=metric not in METRICS)
    speeds = [
        Line(names[place], place, [step for step, _ in run.speed], [rate for _, rate in run.speed])
        for place, run in enumerate(runs)
        if run.speed
    ]
    yield from curve("speed", "Rows a second", speeds, "between logged steps, without evaluations")


def _evaluation(run: RunFiles, name: str, place: int, metric: str) -> Line | None:
    found = {step: row for step, row in sorted(run.recorded.evaluations("eval").items()) if finite(row.get(metric))}
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
