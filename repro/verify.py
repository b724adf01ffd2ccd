"""`repro verify`: what finished runs say about a recipe's targets; and a run's figures while it is still at work."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.config import ARGUMENTS, flags_of, parse_arguments
from repro.data.whole_file import sha256_of
from repro.errors import InputError, RunStopped
from repro.evaluation.targets import (
    Measured,
    Outcome,
    Target,
    Verdict,
    against,
    judge,
    overall,
    read_targets,
)
from repro.protocol import protocol_named
from repro.recipes import read_recipe
from repro.reporting.writer import Recorded, read_facts, read_recorded

MARKER = "recipe.json"
RUN = "run"
BY_STEP = ("loss", "learning_rate")
COUNTS = ("train_rows", "train_dropped", "train_images", "num_steps", "parameters", "minutes")
ALSO_COMPARED = ("num_replicas", "eval_steps", "max_train_samples", "max_eval_samples")
"""Flags that a resumed run may change, and a recipe's may not."""
NOT_COMPARED = ("seed",)
EARLY = (*BY_STEP, *COUNTS[:-1])
"""What is known before the run is over."""


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it.

    Attributes:
        facts: `run.json`.
        problems: why nothing can be concluded from it.
        notes: what differs from the recipe and is allowed to.
    """

    folder: Path
    facts: dict[str, Any]
    recorded: Recorded
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        return int(self.facts["flags"]["seed"])

    def measured(self, target: Target) -> Measured:
        """Read what a target is about."""
        return Measured(self.seed, values_of(target, self.facts, self.recorded.rows))


@dataclass(frozen=True)
class Verification:
    """What runs come to.

    Attributes:
        problems: of the runs, by folder; with any, nothing was judged.
    """

    recipe: str
    runs: tuple[RunRecord, ...]
    outcomes: tuple[Outcome, ...]
    problems: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        return Verdict.CANNOT_TELL if self.problems else overall(self.outcomes)


def verify(folders: Sequence[Path], *, recipe: str | None = None, reference: Sequence[Path] = ()) -> Verification:
    """Hold one run, or several with different seeds, against a recipe.

    Args:
        folders: of reproductions, or of runs, which do not know their recipe.
        recipe: by name; None for the one that the first folder names.
        reference: other runs of the recipe, whose values take the place of the recipe's.

    Raises:
        InputError: a folder is not there, or no recipe is named.
    """
    for folder in (*folders, *reference):
        if not folder.is_dir():
            raise InputError(f"{folder}: is not a folder; name a reproduction's, or a run's.")
    content = read_recipe(recipe) if recipe else _recipe_of(folders[0])
    runs = [read_run(folder, content) for folder in folders]
    others = [read_run(folder, content) for folder in reference]
    problems = [f"{run.folder}: {problem}" for run in (*runs, *others) for problem in run.problems]
    problems += [*_mixed(runs), *_mixed(others)]
    targets = read_targets(content["targets"])
    if others and not problems:
        values = {t.name: [run.measured(t).values.get("") for run in others] for t in targets}
        targets = against(targets, {name: [v for v in found if v is not None] for name, found in values.items()})
    outcomes = [] if problems else judge_all(targets, [run.measured for run in runs])
    return Verification(content["name"], tuple(runs), tuple(outcomes), tuple(problems))


def judge_all(targets: Sequence[Target], runs: Sequence[Any]) -> list[Outcome]:
    """Judge every target that says something about the runs, each a function from a target to what was measured."""
    shared = max(sum(target.is_statistical for target in targets), 1)
    found = [judge(target, [run(target) for run in runs], num_targets=shared) for target in targets]
    return [outcome for outcome in found if outcome is not None]


class Watcher:
    """Stops a run of which it is plain before its end that it misses its recipe's targets.

    A run that was given other flags than the recipe's is none of the recipe's, and is left to go on.
    """

    def __init__(self, recipe: Mapping[str, Any]) -> None:
        self._recipe = recipe
        self._targets = [target for target in read_targets(recipe["targets"]) if target.metric in EARLY]
        self._is_of_recipe: bool | None = None

    def __call__(self, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Look at a run, given what will be its `run.json`, and its rows so far.

        Raises:
            RunStopped: a count, a learning rate or the losses so far fail.
        """
        if self._is_of_recipe is None:
            self._is_of_recipe = not _flags_that_differ(facts, self._recipe)[0]
        if not self._is_of_recipe:
            return
        seed = int(facts["flags"]["seed"])
        outcomes = judge_all(self._targets, [lambda target: Measured(seed, values_of(target, facts, rows))])
        failed = [outcome for outcome in outcomes if outcome.verdict is Verdict.FAIL]
        if failed:
            raise RunStopped(
                f"the run cannot reproduce {self._recipe['name']} any more: {'; '.join(map(describe, failed))}. Mend"
                " what differs, or add --keep_going to have it finished all the same."
            )


def read_run(folder: Path, recipe: Mapping[str, Any]) -> RunRecord:
    """Read a run, and find what forbids conclusions from it."""
    if (folder / RUN).is_dir():
        folder = folder / RUN
    facts = read_facts(folder)
    if not facts:
        return RunRecord(folder, {}, Recorded([]), ("there is no run.json that can be read",))
    recorded = read_recorded(folder, int(facts.get("num_steps", 0)))
    problems, notes = _flags_that_differ(facts, recipe)
    if "finished" not in facts:
        problems.append("the run is not finished; --resume auto goes on with it")
    else:
        problems += _changed_files(folder, facts.get("checksums", {}))
    return RunRecord(folder, facts, recorded, tuple(problems), tuple(notes))


def values_of(target: Target, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Find a metric among a run's facts and rows: by step, or at "" ."""
    if target.metric in BY_STEP:
        return {
            str(row["step"]): row[target.metric] for row in rows if row["step"] in target.steps and target.metric in row
        }
    evaluations = {row["step"]: row["eval"] for row in rows if "eval" in row}
    train = facts.get("data", {}).get("train", {})
    values: dict[str, Any] = {
        "train_rows": train.get("kept"),
        "train_dropped": train.get("dropped"),
        "train_images": train.get("images"),
        "num_steps": facts.get("num_steps"),
        "parameters": facts.get("model", {}).get("parameters"),
    }
    if "seconds" in facts:
        values["minutes"] = facts["seconds"] / 60
    step = target.step if target.step is not None else max(evaluations, default=None)
    found = evaluations.get(step, {}) if step is not None else {}
    values |= {f"eval_{name}": value for name, value in found.items() if isinstance(value, int | float)}
    value = values.get(target.metric)
    return {} if value is None else {"": float(value)}


def _recipe_of(folder: Path) -> dict[str, Any]:
    marker = (folder if (folder / MARKER).is_file() else folder.parent) / MARKER
    if not marker.is_file():
        raise InputError(f"{folder}: does not say which recipe it is of; add --recipe NAME.")
    return read_recipe(json.loads(marker.read_text(encoding="utf-8"))["name"])


def _flags_that_differ(facts: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    parsed, may_vary = (
        parse_arguments(ARGUMENTS, flags_of(recipe["flags"]), command="verify"),
        recipe.get("may_vary", ()),
    )
    wanted = {
        field.name: getattr(arguments, field.name)
        for arguments in parsed
        for field in dataclasses.fields(arguments)
        if not field.metadata.get("may_change") or field.name in (*ALSO_COMPARED, *may_vary)
    }
    flags = facts["flags"]
    problems: list[str] = []
    notes: list[str] = []
    for name, value in wanted.items():
        if name in NOT_COMPARED or flags.get(name) == value:
            continue
        text = f"--{name} {flags.get(name)}, the recipe has {value}"
        (notes if name in may_vary else problems).append(text)
    shuffles = parsed[-1].block_size > 0 or protocol_named(parsed[-1].protocol).shuffle_without_blocks
    if facts.get("shuffle", shuffles) != shuffles:
        problems.append(
            f"--block_size {flags.get('block_size')}: decides whether rows are shuffled, unlike the recipe's"
        )
    return problems, notes


def _changed_files(folder: Path, checksums: Mapping[str, str]) -> list[str]:
    if not checksums:
        return ["run.json has no checksums of its figures"]
    changed = [n for n, s in checksums.items() if not (folder / n).is_file() or sha256_of(folder / n) != s]
    return [f"{name} is not as the run left it" for name in changed]


def _mixed(runs: Sequence[RunRecord]) -> list[str]:
    """Find what forbids to take runs for repetitions of one another."""
    usable = [run for run in runs if run.facts]
    problems = []
    seeds = [run.seed for run in usable]
    for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        problems.append(f"seed {seed} is there {seeds.count(seed)} times; runs of one seed are not independent")
    for what, values in {
        "data": {str({n: s["fingerprint"] for n, s in run.facts["data"].items()}) for run in usable},
        "model_implementation": {run.facts["model"]["implementation"] for run in usable},
        "dtype": {run.facts["flags"]["dtype"] for run in usable},
    }.items():
        if len(values) > 1:
            problems.append(f"the runs are of different {what}: {', '.join(sorted(values))}")
    return problems


def describe(outcome: Outcome) -> str:
    """Put an outcome on one line."""
    target = outcome.target
    parts = [f"{target.name}: wanted {target.wanted}"]
    if outcome.measured is not None:
        parts.append(f"measured {outcome.measured:.6g}")
    if outcome.difference is not None:
        parts.append(f"difference {outcome.difference:+.4g}")
    if outcome.interval is not None:
        parts.append(f"interval {outcome.interval[0]:+.4g} to {outcome.interval[1]:+.4g}")
    return ", ".join(parts) + (f" ({outcome.reason})" if outcome.reason else "")


def table(outcomes: Sequence[Outcome]) -> str:
    """Lay outcomes out as text."""
    lines = [f"{'target':30} {'wanted':>22} {'measured':>11} {'difference':>11}  {'90 % interval':>22}  verdict"]
    for outcome in outcomes:
        measured, difference = (
            "" if value is None else f"{value:{form}}"
            for value, form in ((outcome.measured, ".6g"), (outcome.difference, "+.4g"))
        )
        interval = "" if outcome.interval is None else f"{outcome.interval[0]:+.4g} to {outcome.interval[1]:+.4g}"
        reason = f" ({outcome.reason})" if outcome.reason else ""
        lines.append(
            f"{outcome.target.name:30} {outcome.target.wanted:>22} {measured:>11} {difference:>11}  {interval:>22}"
            f"  {outcome.verdict}{reason}"
        )
    return "\n".join(lines)


def as_json(verification: Verification) -> dict[str, Any]:
    """Make what `--json` writes."""
    return {
        "recipe": verification.recipe,
        "verdict": verification.verdict,
        "problems": list(verification.problems),
        "runs": [
            {"folder": str(run.folder), "seed": run.facts.get("flags", {}).get("seed"), "notes": list(run.notes)}
            for run in verification.runs
        ],
        "targets": [
            {
                "target": outcome.target.name,
                "wanted": outcome.target.wanted,
                "measured": outcome.measured,
                "difference": outcome.difference,
                "interval": outcome.interval,
                "verdict": outcome.verdict,
                "reason": outcome.reason,
                "source": outcome.target.source,
            }
            for outcome in verification.outcomes
        ],
    }


def as_junit(verification: Verification) -> bytes:
    """Make what `--junit` writes: a failure for FAIL, an error for CANNOT TELL, which is no success either."""
    count = {v: sum(o.verdict is v for o in verification.outcomes) for v in Verdict}
    suite = ET.Element(
        "testsuite",
        name=f"repro verify {verification.recipe}",
        tests=str(len(verification.outcomes) + len(verification.problems)),
        failures=str(count[Verdict.FAIL]),
        errors=str(count[Verdict.CANNOT_TELL] + len(verification.problems)),
    )
    for outcome in verification.outcomes:
        case = ET.SubElement(suite, "testcase", classname=verification.recipe, name=outcome.target.name)
        if outcome.verdict is not Verdict.PASS:
            kind = "failure" if outcome.verdict is Verdict.FAIL else "error"
            ET.SubElement(case, kind, message=describe(outcome))
    for problem in verification.problems:
        case = ET.SubElement(suite, "testcase", classname=verification.recipe, name="runs")
        ET.SubElement(case, "error", message=problem)
    return ET.tostring(suite, encoding="utf-8", xml_declaration=True)
