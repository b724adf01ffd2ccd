"""What a page knows of its runs: their folders, as far as they can be read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from repro.json_files import keys
from repro.record.metrics import METRICS, name_of
from repro.record.record import DETAILS, GENERATION, Record, lines_or_tell, read_clock, read_or_tell, read_record
from repro.record.sanitize import clip
from repro.record.writer import ATTENTION, LOCK, models_in, step_of_model

IMAGES = keys(image_path=list[str])
LOOKED: Any = list[keys(image_path=str, tokens=list[str], weights=list[str])]  # type: ignore[misc]
NOTED_DROPPED = 100  # dropped rows that are listed; the others are counted
DEEPEST = 3  # objects in objects of `run.json` that are written out
SHOWN_EVALUATIONS = 6  # of a run, that are shown beside one another


@dataclass(frozen=True)
class Generated:
    """Captions of a run's evaluations."""

    split: str
    step: int | None  # of the last evaluation; None if the file does not say it
    rows: list[tuple[str, str]]  # its (generated, reference) of each row, in order
    image_paths: list[str]  # of the same rows; shorter, or empty, where that is not recorded
    earlier: Sequence[tuple[int | None, list[str]]] = ()  # (step, generated) of some evaluations before


@dataclass(frozen=True, kw_only=True)
class RunFiles(Record):
    """What a run's folder holds."""

    dropped: Counter[tuple[str, str]]  # rows that were left out, by (split, reason)
    first_dropped: list[dict[str, Any]]  # some of these rows
    generated: Generated | None  # None if there are no captions
    attention: list[dict[str, Any]]  # `eval_attention.json`
    name: str  # that tells it from others on the page
    is_at_work: bool  # whether a process holds the run's lock
    seconds: float  # that it has been at work, 0 if not known

    @property
    def state(self) -> tuple[str, str]:
        """How the run stands, in a word, and why."""
        stopped = str(self.facts.get("stopped", ""))
        if "finished" in self.facts:
            return "finished", ""
        if self.is_at_work:
            return "running", ""
        if stopped:
            return ("interrupted" if stopped.startswith("Interrupted") else "stopped"), stopped
        return "crashed", "it ended without saying why: it was killed, or the machine was; --resume auto goes on"

    @property
    def progress(self) -> str:
        """How far the run has come."""
        known = self.facts.get("num_steps")
        return f"step {self.last_step}" + (f" of {known}" if known else "")

    @property
    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Metrics and details of evaluations of the validation rows, by step in order."""
        return dict(sorted(self.recorded.evaluations("eval").items()))

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation's metrics and details."""
        return next(reversed(self.evaluations.values()), {})

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


def read_run_folder(folder: Path, name: str = "") -> RunFiles:
    """Read a run's folder; nothing in it is so broken that this fails."""
    record = read_record(folder)
    problems = list(record.problems)
    path = folder / "dropped.jsonl"
    rows = lines_or_tell(path, dict[str, Any], problems) if path.exists() else []
    looks = (read_or_tell(folder / ATTENTION, LOOKED, problems) if (folder / ATTENTION).exists() else None) or []
    return RunFiles(
        **{**vars(record), "problems": problems},
        dropped=Counter(map(_why_dropped, rows)),
        first_dropped=rows[:NOTED_DROPPED],
        generated=_generated(folder, problems),
        attention=looks,
        name=clip(name, 80),
        is_at_work=(folder / LOCK).exists() and _is_held(folder / LOCK),
        seconds=record.facts.get("seconds") or read_clock(folder),
    )


def _is_held(lock: Path) -> bool:
    """Tell whether a process holds a lock, by trying to take it."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError) as error:  # an OSError: the folder is another's, or its file system has no locks
        return isinstance(error, Timeout)


def finite(value: Any) -> bool:
    """Tell whether a value from a file is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _why_dropped(row: Mapping[str, Any]) -> tuple[str, str]:
    # What a reason says of one row alone follows a colon, or is a path in it.
    return words(row.get("split")), words(row.get("reason")).replace(words(row.get("image_path")), "…")


def spread(found: Sequence[Any], most: int = SHOWN_EVALUATIONS) -> list[Any]:
    """Choose at most so many, evenly, the first and the last among them."""
    return [found[place] for place in sorted(set(np.linspace(0, len(found) - 1, min(len(found), most)).astype(int)))]


def _generated(folder: Path, problems: list[str]) -> Generated | None:
    for name, split in (("eval", "validation"), ("test", "test")):
        file = f"{name}_generation.json"
        places = spread([place for place in (folder, *models_in(folder)) if (place / file).exists()])
        read = [(place, read_or_tell(place / file, list[GENERATION], problems)) for place in places]
        found = [(step_of_model(place) if place != folder else None, rows) for place, rows in read if rows]
        if found:
            *earlier, (step, rows) = found
            images = folder / f"{name}_images.json"
            paths = read_or_tell(images, IMAGES, problems) if images.exists() else None
            texts = [(row["pred"], row["label"]) for row in rows]
            before = [(at, [row["pred"] for row in old]) for at, old in earlier if len(old) == len(rows)]
            return Generated(split, step, texts, paths["image_path"] if paths else [], before)
    return None


def words(value: Any, depth: int = DEEPEST) -> str:
    """Write a value of a run's files as people do, as text that can be shown."""
    if value is None or value == "":
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping | list | tuple):
        if not value or not depth:
            return "…" if value else "none"
        pairs = value.items() if isinstance(value, Mapping) else [("", inner) for inner in value]
        value = ", ".join(f"{key} {words(inner, depth - 1)}".strip() for key, inner in pairs)
    return clip(str(value).removesuffix(".0") if isinstance(value, float) else str(value), 200)


def label_and_unit(metric: str) -> tuple[str, str]:
    """Look a metric up; one that is not known is called as it is."""
    return clip(name_of(metric), 60), METRICS[metric].unit if metric in METRICS else ""


def metric_names(row: Mapping[str, Any]) -> list[str]:
    """Names of metrics that can be identifiers on the page too; a run writes no others."""
    return [name for name, value in row.items() if finite(value) and name not in DETAILS and name.isidentifier()]
