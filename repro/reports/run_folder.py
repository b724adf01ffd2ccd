"""A run's folder as a report reads it: whatever can be read, and in words what cannot."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from repro.json_files import keys
from repro.record.record import FACTS, GENERATION, ROWS, Record, lines_or_tell, read_or_tell, read_record
from repro.record.writer import models_in, step_of_model

IMAGES = keys(image_path=list[str])
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


@dataclass(frozen=True)
class RunFiles(Record):
    """What a run's folder holds."""

    dropped: DroppedRows
    generated: Generated | None  # the last captions, None if there are none

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
    return RunFiles(record.facts, record.recorded, problems, dropped, generated)


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
