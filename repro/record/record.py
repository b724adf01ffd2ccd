"""A run's record, `run.json` and `metrics.jsonl`, as everybody reads it: resuming, verifying, reporting."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from repro.errors import InputError
from repro.json_files import Count, Form, Positive, checked, keys, optional, read_json, read_lines
from repro.record.metrics import METRICS

FACTS, ROWS, CLOCK = "run.json", "metrics.jsonl", "clock.json"
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
CLOCK_FORM = keys(seconds=Seconds)
FLAGS = keys(seed=int, **optional(dtype=str, per_device_train_batch_size=Positive, metric_for_best_model=str | None))
SPLIT = keys(kept=Count, dropped=Count, images=Count, fingerprint=str, **optional(read=Count))
# What is read of `run.json` by name; a run that has only begun lacks some.
RUN_FORM = optional(
    flags=FLAGS,
    data=dict[str, SPLIT],  # type: ignore[valid-type]
    model=keys(implementation=str, parameters=Count),
    **dict.fromkeys(("startup_seconds", "train_seconds", "seconds"), Seconds),
    **{"num_replicas": Positive, "num_steps": Count, "shuffle": bool, "parts": list[dict[str, Any]]},
    **dict.fromkeys(("versions", "protocol", "probe"), dict[str, Any]),
    **{"finished": str, "checksums": dict[str, str]},
)
OF_EVALUATION = optional(
    **{"rows_scored": Count, "rouge_intervals": dict[str, tuple[float, float]], "saving_seconds": Seconds},
    **{"sentence_splitter": str, "caption_tokenizer": str, "search": dict[str, Any]},
)
DETAILS = ("rows", "seconds", *OF_EVALUATION)  # what a row says of an evaluation besides its metrics, which are numbers
DETAILS_FORM = keys(rows=Count, seconds=Seconds, **OF_EVALUATION)
EVALUATIONS = ("eval", "test")
# Of a step of training; the seconds of training up to it where it is logged.
NUMBERS = ("loss", "learning_rate", "grad_norm", "seconds")
ROW = keys(step=Count, **optional(**dict.fromkeys(NUMBERS, float), **dict.fromkeys(EVALUATIONS, dict[str, Any])))
GENERATION = keys(pred=str, label=str)  # a row of `eval_generation.json`: the caption, and what it is scored by


@dataclass(frozen=True)
class Recorded:
    """What `metrics.jsonl` says."""

    rows: list[dict[str, Any]]  # its objects, in order

    def up_to(self, step: int) -> Recorded:
        """Leave out what is of later steps."""
        return Recorded([row for row in self.rows if row["step"] <= step])

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of training, by step."""
        return sorted((row for row in self.rows if "loss" in row), key=lambda row: row["step"])

    def evaluations(self, prefix: str) -> dict[int, dict[str, Any]]:
        """The evaluations of a name, by step: metrics and details."""
        return {row["step"]: row[prefix] for row in self.rows if prefix in row}

    def best_step(self, metric: str) -> int | None:
        """Find the step with the best value of a metric, the first of several."""
        sign = 1.0 if METRICS[metric].better == "more" else -1.0
        values = {step: found.get(metric, math.nan) for step, found in self.evaluations("eval").items()}
        scored = [(sign * value, -step) for step, value in values.items() if math.isfinite(value)]
        return -max(scored)[1] if scored else None


@dataclass(frozen=True)
class Record:
    """A run's record, as far as it can be read."""

    folder: Path
    facts: dict[str, Any]  # of `run.json`; nothing if that is missing or damaged
    recorded: Recorded
    problems: Sequence[str]  # what cannot be read, each beginning with the name of its file, or forbids conclusions
    notes: Sequence[str] = ()  # what differs from a recipe and is allowed to

    @property
    def seed(self) -> int:
        return self.facts["flags"]["seed"]

    @property
    def minutes(self) -> float | None:
        """What the run took, start-up, evaluations and saved models included."""
        return self.facts["seconds"] / 60 if "seconds" in self.facts else None

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(row["loss"] for row in self.recorded.rows if "loss" in row)


def read_record(folder: Path) -> Record:
    """Read a run's record; what cannot be read of it is told, and is not there."""
    problems: list[str] = []
    facts = read_or_tell(folder / FACTS, keys(**RUN_FORM), problems) or {}
    rows = lines_or_tell(folder / ROWS, ROW, problems, check=_check_evaluations)
    return Record(folder, facts, Recorded(rows), problems)


def read_clock(folder: Path) -> float:
    """Read for how many seconds a run has been at work, until it ended or was killed; 0 where that is not known."""
    return (read_or_tell(folder / CLOCK, CLOCK_FORM, []) or {"seconds": 0.0})["seconds"]


def digest_of_facts(facts: Mapping[str, Any]) -> str:
    """Hash a run's facts, but for the checksums among which the hash is to stand."""
    rest = {name: value for name, value in facts.items() if name != "checksums"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_or_tell(path: Path, form: type[Form], problems: list[str]) -> Form | None:
    """Read a file of a run; what is wrong with it is added to its problems."""
    try:
        return read_json(path, form)
    except InputError as error:
        problems.append(_by_name(path, error))
        return None


def lines_or_tell(
    path: Path, form: type[Form], problems: list[str], *, check: Callable[[Form], object] = bool
) -> list[Form]:
    """Read a file of a run with a row a line, as `read_lines` does; what is wrong is added to its problems."""
    try:
        rows, bad = read_lines(path, form, check=check)
    except InputError as error:
        problems.append(_by_name(path, error))
        return []
    if bad:
        problems.append(f"{path.name}: {bad} line{'s' * (bad > 1)} cannot be read")
    return rows


def _by_name(path: Path, error: InputError) -> str:
    return str(error).removeprefix(f"{path.parent}/").removesuffix(".")


def _check_evaluations(row: dict[str, Any]) -> None:
    for entry in (row[name] for name in EVALUATIONS if name in row):
        checked(entry, DETAILS_FORM)
        checked({name: value for name, value in entry.items() if name not in DETAILS}, dict[str, float])
