"""A run's folder as a report reads it: whatever can be read, and in words what cannot."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any

from repro.data.limits import RECORDED_BYTES, Refused, open_file, read_file
from repro.reporting.writer import models_in

NOTED_DROPPED = 100
"""Dropped rows that are listed; the others are counted."""
HEADER = struct.Struct("<Q4x")
"""Of a TensorBoard record: its length, and a checksum, like the one that follows it, that is not looked at."""
CHECKSUM = 4


@dataclass(frozen=True)
class DroppedRows:
    """Rows that were left out.

    Attributes:
        counts: by (split, reason).
        first: some of the rows themselves.
    """

    counts: Counter[tuple[str, str]]
    first: list[dict[str, Any]]


@dataclass(frozen=True)
class Generated:
    """Captions of one evaluation.

    Attributes:
        step: at which they were generated; None if the file does not say it.
        rows: (generated, reference) of each row, in order.
        image_paths: of the same rows; shorter, or empty, where that is not recorded.
    """

    split: str
    step: int | None
    rows: list[tuple[str, str]]
    image_paths: list[str]


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds.

    Attributes:
        facts: `run.json`, or nothing.
        steps: rows of `metrics.jsonl` with a loss.
        evaluations: by name (`eval`, `test`) and step, each the metrics and details of `metrics.jsonl`.
        generated: the last captions, None if there are none.
        speed: (step, rows per second) up to it since the one before, where TensorBoard's file has the times.
        problems: what could not be read.
    """

    folder: Path
    facts: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: dict[str, dict[int, dict[str, Any]]]
    dropped: DroppedRows
    generated: Generated | None
    speed: list[tuple[int, float]]
    problems: list[str]

    def fact(self, *names: str) -> Any:
        """Look a fact up, by the names on the way to it; None where there is no such."""
        found: Any = self.facts
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation's metrics and details."""
        found = self.evaluations.get("eval", {})
        return found[max(found)] if found else {}

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        return max(
            [0, *(row["step"] for row in self.steps), *(s for found in self.evaluations.values() for s in found)]
        )


def holds_a_run(folder: Path) -> bool:
    """Tell whether there is anything of a run to report."""
    return (folder / "run.json").exists() or (folder / "metrics.jsonl").exists()


def read_run_folder(folder: Path) -> RunFiles:
    """Read a run's folder; nothing in it is so broken that this fails."""
    problems: list[str] = []
    facts = _json(folder / "run.json", dict, problems, needed=True)
    steps, evaluations = _metrics(folder / "metrics.jsonl", problems)
    if "finished" not in facts:
        problems.append("the run is not finished, or its end was not recorded")
    dropped = _dropped(folder / "dropped.jsonl", problems)
    generated = _generated(folder, problems)
    speed = _speed(folder, facts, {step for found in evaluations.values() for step in found})
    return RunFiles(folder, facts, steps, evaluations, dropped, generated, speed, problems)


def finite(value: Any) -> bool:
    """Tell whether a value from a file is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _json(path: Path, kind: type, problems: list[str], *, needed: bool = False) -> Any:
    try:
        value = json.loads(read_file(path, RECORDED_BYTES))
    except FileNotFoundError:
        if needed:
            problems.append(f"there is no {path.name}")
        return kind()
    except (OSError, ValueError, RecursionError) as error:
        problems.append(_unreadable(path, error))
        return kind()
    if not isinstance(value, kind):
        problems.append(f"{path.name} holds something else than it should")
        return kind()
    return value


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path.name} cannot be read ({error if isinstance(error, Refused) else type(error).__name__})"


def _lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a file's objects, one a line, and count the lines that are none."""
    bad = 0
    try:
        with TextIOWrapper(open_file(path, RECORDED_BYTES), "utf-8", "surrogateescape") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield row
                else:
                    bad += 1
    except FileNotFoundError:
        problems.append(f"there is no {path.name}")
    except OSError as error:
        problems.append(_unreadable(path, error))
    if bad:
        problems.append(f"{path.name}: {bad} line{'s' * (bad > 1)} that cannot be read")


def _metrics(path: Path, problems: list[str]) -> tuple[list[dict[str, Any]], dict[str, dict[int, dict[str, Any]]]]:
    steps, evaluations = [], {}  # type: ignore[var-annotated]
    unnumbered = 0
    for row in _lines(path, problems):
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            unnumbered += 1
        elif "loss" in row:
            steps.append(row)
        else:
            for name in ("eval", "test"):
                if isinstance(row.get(name), dict):
                    evaluations.setdefault(name, {})[step] = row[name]
    if unnumbered:
        problems.append(f"{path.name}: {unnumbered} line{'s' * (unnumbered > 1)} without a step")
    return sorted(steps, key=lambda row: row["step"]), evaluations


def _dropped(path: Path, problems: list[str]) -> DroppedRows:
    counts: Counter[tuple[str, str]] = Counter()
    first: list[dict[str, Any]] = []
    for row in _lines(path, problems) if path.exists() else ():
        # What a reason says of one row alone follows a colon, or is a path in it.
        reason = str(row.get("reason")).replace(str(row.get("image_path")), "…")
        counts[str(row.get("split")), reason] += 1
        if len(first) < NOTED_DROPPED:
            first.append(row)
    return DroppedRows(counts, first)


def _generated(folder: Path, problems: list[str]) -> Generated | None:
    try:
        models = models_in(folder)
    except ValueError:
        problems.append("a model's folder has no step in its name, so captions beside models were not looked for")
        models = []
    for name, split in (("eval", "validation"), ("test", "test")):
        for place in (*reversed(models), folder):
            path = place / f"{name}_generation.json"
            rows = _json(path, list, problems)
            texts = [
                (row["pred"], row["label"])
                for row in rows
                if isinstance(row, dict) and isinstance(row.get("pred"), str) and isinstance(row.get("label"), str)
            ]
            if len(texts) < len(rows):
                problems.append(f"{path.name}: {len(rows) - len(texts)} rows that cannot be read")
            elif texts:
                step = int(place.name.rpartition("_")[2]) if place != folder else None
                return Generated(split, step, texts, _image_paths(folder / f"{name}_images.json", problems))
    return None


def _image_paths(path: Path, problems: list[str]) -> list[str]:
    paths = _json(path, dict, problems).get("image_path", [])
    if not isinstance(paths, list) or not all(isinstance(found, str) for found in paths):
        problems.append(f"{path.name} does not name images")
        return []
    return paths


def _speed(folder: Path, facts: Mapping[str, Any], evaluated: set[int]) -> list[tuple[int, float]]:
    """Work out rows per second between logged steps; where there was an evaluation between them, it is left out."""
    flags = facts.get("flags")
    batch = flags.get("per_device_train_batch_size") if isinstance(flags, Mapping) else None
    replicas = facts.get("num_replicas")
    if not isinstance(batch, int) or not isinstance(replicas, int):
        return []
    found: dict[int, float] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        times = list(_scalars(path, "train_time"))
        for (step, begin), (later, end) in pairwise(times):
            if later > step and end > begin and not any(step <= place < later for place in evaluated):
                found[later] = (later - step) * batch * replicas / (end - begin)
    return sorted(found.items())


def _scalars(path: Path, tag: str) -> Iterator[tuple[int, float]]:
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    try:
        data = read_file(path, RECORDED_BYTES)
    except OSError:
        return
    place = 0
    while place + HEADER.size <= len(data):
        (length,) = HEADER.unpack_from(data, place)
        place += HEADER.size
        if not length:
            return
        try:
            event = Event.FromString(data[place : place + length])
        except DecodeError:  # the record that was being written when the run was killed
            return
        for value in event.summary.value:
            if value.tag == tag and math.isfinite(value.simple_value):
                yield event.step, value.simple_value
        place += length + CHECKSUM
