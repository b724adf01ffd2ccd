"""What a page knows of its runs: their folders, as far as they can be read, and the curves that they give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from repro.json_files import keys
from repro.record.metrics import METRICS, name_of
from repro.record.record import DETAILS, FACTS, GENERATION, ROWS, Record, lines_or_tell, read_or_tell, read_record
from repro.record.sanitize import clip
from repro.record.writer import ATTENTION, models_in, step_of_model
from repro.reports.charts import POINTS, Chart, Line, Published, thinned

IMAGES = keys(image_path=list[str])
LOOKED: Any = list[keys(image_path=str, tokens=list[str], weights=list[str])]  # type: ignore[misc]
NOTED_DROPPED = 100  # dropped rows that are listed; the others are counted


@dataclass(frozen=True)
class DroppedRows:
    """Rows that were left out."""

    counts: Counter[tuple[str, str]]  # by (split, reason)
    first: list[dict[str, Any]]  # some of the rows themselves


@dataclass(frozen=True)
class Generated:
    """Captions of one evaluation."""

    split: str
    step: int | None  # at which they were generated; None if the file does not say it
    rows: list[tuple[str, str]]  # (generated, reference) of each row, in order
    image_paths: list[str]  # of the same rows; shorter, or empty, where that is not recorded


@dataclass(frozen=True, kw_only=True)
class RunFiles(Record):
    """What a run's folder holds."""

    dropped: DroppedRows
    generated: Generated | None  # the last captions, None if there are none
    attention: list[dict[str, Any]]  # `eval_attention.json`

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation's metrics and details."""
        found = self.recorded.evaluations("eval")
        return found[max(found)] if found else {}

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        return max((row["step"] for row in self.recorded.rows), default=0)

    @property
    def speed(self) -> list[tuple[int, float]]:
        """Rows per second up to a step since the logged one before, by the training's own clock: (step, rate)."""
        batch = self.facts.get("flags", {}).get("per_device_train_batch_size", 0) * self.facts.get("num_replicas", 0)
        times = [(row["step"], row["seconds"]) for row in self.recorded.steps if finite(row.get("seconds"))]
        return [
            (later, (later - step) * batch / (end - begin))
            for (step, begin), (later, end) in pairwise(times)
            if batch and later > step and end > begin
        ]


def holds_a_run(folder: Path) -> bool:
    """Tell whether there is anything of a run to report."""
    return (folder / FACTS).exists() or (folder / ROWS).exists()


def read_run_folder(folder: Path) -> RunFiles:
    """Read a run's folder; nothing in it is so broken that this fails."""
    record = read_record(folder)
    problems = list(record.problems)
    if "finished" not in record.facts:
        problems.append("the run is not finished, or its end was not recorded")
    dropped, generated = _dropped(folder / "dropped.jsonl", problems), _generated(folder, problems)
    looks = (read_or_tell(folder / ATTENTION, LOOKED, problems) if (folder / ATTENTION).exists() else None) or []
    return RunFiles(**{**vars(record), "problems": problems}, dropped=dropped, generated=generated, attention=looks)


def finite(value: Any) -> bool:
    """Tell whether a value from a file is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _dropped(path: Path, problems: list[str]) -> DroppedRows:
    counts: Counter[tuple[str, str]] = Counter()
    rows = lines_or_tell(path, dict[str, Any], problems) if path.exists() else []
    for row in rows:
        # What a reason says of one row alone follows a colon, or is a path in it.
        reason = str(row.get("reason")).replace(str(row.get("image_path")), "…")
        counts[str(row.get("split")), reason] += 1
    return DroppedRows(counts, rows[:NOTED_DROPPED])


def _generated(folder: Path, problems: list[str]) -> Generated | None:
    for name, split in (("eval", "validation"), ("test", "test")):
        for place in (*reversed(models_in(folder)), folder):
            path = place / f"{name}_generation.json"
            rows = read_or_tell(path, list[GENERATION], problems) if path.exists() else None
            if rows:
                images = folder / f"{name}_images.json"
                found = read_or_tell(images, IMAGES, problems) if images.exists() else None
                texts = [(row["pred"], row["label"]) for row in rows]
                step = step_of_model(place) if place != folder else None
                return Generated(split, step, texts, found["image_path"] if found else [])
    return None


def label_and_unit(metric: str) -> tuple[str, str]:
    """Look a metric up; one that is not known is called as it is."""
    return clip(name_of(metric), 60), METRICS[metric].unit if metric in METRICS else ""


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
    return [name for name, value in row.items() if finite(value) and name not in DETAILS and name.isidentifier()]
