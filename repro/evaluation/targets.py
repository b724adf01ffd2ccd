"""Measured values against a recipe's targets, and what can be concluded from so many runs.

A target is one of four kinds, by the names it has:

- `low`, `high`: bounds, either of which may be missing, that each run keeps to.
- `value` or `values` (by step), and `tolerance`: what each run has exactly but for rounding. With `seeds`, the values
  of each of these seeds; runs with other seeds are not held to it.
- `value` and `margin`: a quantity that varies from seed to seed. The reference is one run, or `runs` of them with a
  `standard_deviation`.
- `values` and `margin`: one run's trajectory, such as logged losses; its mean distance is what is judged.

For the last two, the verdict is that of two one-sided t-tests against the margin, which was fixed before the runs. With
the difference d between the mean of n seeds and the reference,

    PASS         d ± t(95 %) SE lies within ± margin:   a true difference of a margin or more passes at most once in 20
    FAIL         d ± t(...) SE lies beyond ± margin:    a true difference within the margin fails at most FALSE_FAILS
    CANNOT TELL  otherwise: more seeds would tell

    SE = s sqrt(1 + 1 / n)              one reference run, supposed to vary as the seeds do
    SE = sqrt(s² / n + s_r² / n_r)      several reference runs (Welch)

With one reference run the interval is the prediction interval of a single published run, seen from the seeds. A single
run with several reference runs is held against their prediction interval, mean ± t s_r sqrt(1 + 1 / n_r). A single run
against a single run cannot pass: neither says how much runs differ. It fails if they are HOPELESS margins apart.

Both ends count: a run that is too good does not reproduce either. FALSE_FAILS is shared by a recipe's targets.

Source: D. J. Schuirmann, A comparison of the two one-sided tests procedure and the power approach (1987);
B. L. Welch, The generalization of Student's problem when several different population variances are involved (1947).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from scipy.stats import t as students_t

from repro.errors import InputError

FALSE_PASSES = 0.05
FALSE_FAILS = 0.01
HOPELESS = 10
"""Margins; there is no statistics for one run against one."""
FEWEST_POINTS = 4
"""Of a trajectory."""


class Verdict(StrEnum):
    """What a target or a run comes to."""

    PASS = "PASS"
    FAIL = "FAIL"
    CANNOT_TELL = "CANNOT TELL"


@dataclass(frozen=True)
class Target:
    """One of a recipe's targets, as its JSON has it.

    Attributes:
        metric: of a run (`read_run`), or of each step.
        step: at which it is evaluated; None for the last evaluation, or where there are no steps.
        low, high, value, values, tolerance, margin, seeds: see above.
        standard_deviation, runs: of the reference.
        source: where the figures come from.
    """

    metric: str
    source: str
    step: int | None = None
    low: float | None = None
    high: float | None = None
    value: float | None = None
    values: Mapping[str, float] | None = None
    tolerance: float | None = None
    margin: float | None = None
    seeds: Mapping[str, Mapping[str, float]] | None = None
    standard_deviation: float | None = None
    runs: int = 1

    @property
    def name(self) -> str:
        """The metric, and the step that it belongs to."""
        return self.metric if self.step is None else f"{self.metric} at {self.step}"

    @property
    def steps(self) -> set[int]:
        """The steps whose own values are asked for."""
        return {int(step) for values in (self.values or {}, *(self.seeds or {}).values()) for step in values}

    @property
    def is_statistical(self) -> bool:
        return self.margin is not None

    @property
    def wanted(self) -> str:
        """What is asked for, in words."""
        if self.margin is not None:
            return (
                f"{self.value:g} ± {self.margin:g}"
                if self.values is None
                else f"{len(self.values)} values ± {self.margin:g}"
            )
        if self.tolerance is not None:
            return f"{self.value:g}" if self.value is not None else "the reference's values"
        if self.high is None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.low is None else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Outcome:
    """A target and what was measured.

    Attributes:
        measured: the mean over runs; of a trajectory or several values the largest or mean distance is `difference`.
        interval: of the difference, at 95 % to either side, where there is one.
        reason: the verdict in words, where the figures do not say it.
    """

    target: Target
    verdict: Verdict
    measured: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """What one run measured of one target.

    Attributes:
        values: by step; a metric without steps is at "".
    """

    seed: int
    values: Mapping[str, float] = field(default_factory=dict)


def read_targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Make targets of a recipe's rows; a row may also have fields that only people read."""
    known = Target.__dataclass_fields__
    return [Target(**{name: value for name, value in row.items() if name in known}) for row in rows]


def judge(target: Target, runs: Sequence[Measured], *, num_targets: int = 1) -> Outcome | None:
    """Hold runs against a target.

    Args:
        runs: at least one, with different seeds; `values` may lack steps that they have not come to.
        num_targets: among which FALSE_FAILS is shared.

    Returns:
        None if the target says nothing about these runs' seeds.
    """
    if target.margin is None and target.tolerance is None:
        return _judge_bounds(target, runs)
    if target.margin is None:
        return _judge_values(target, runs)
    false_fails = FALSE_FAILS / num_targets
    if target.values is not None:
        return _judge_trajectory(target, runs, false_fails)
    values = [run.values[""] for run in runs if "" in run.values]
    if len(values) < len(runs):
        return Outcome(target, Verdict.CANNOT_TELL, reason="not measured")
    return judge_values(target, values, false_fails)


def judge_values(target: Target, values: Sequence[float], false_fails: float) -> Outcome:
    """Hold the values of one quantity under several seeds against a reference that varies too."""
    assert target.value is not None
    assert target.margin is not None
    mean, count = statistics.fmean(values), len(values)
    difference, spread = mean - target.value, target.standard_deviation
    if not all(map(math.isfinite, values)):
        return Outcome(target, Verdict.FAIL, mean, difference, reason="not finite")
    if count == 1:
        return _judge_single(target, mean, false_fails)
    s = statistics.stdev(values)
    if spread is None or target.runs < 2:
        error, freedom = s * math.sqrt(1 + 1 / count), count - 1.0
    else:
        ours, theirs = s**2 / count, spread**2 / target.runs
        error = math.sqrt(ours + theirs)
        freedom = error**4 / (ours**2 / (count - 1) + theirs**2 / (target.runs - 1)) if error else 1.0
    return _judge_interval(target, mean, difference, error, freedom, false_fails)


def _judge_interval(
    target: Target, measured: float | None, difference: float, error: float, freedom: float, false_fails: float
) -> Outcome:
    assert target.margin is not None
    reach = float(students_t.ppf(1 - FALSE_PASSES, freedom)) * error
    interval = (difference - reach, difference + reach)
    # A true difference within the margin is wrongly left on one side only, so the quantile is that of one side.
    beyond = abs(difference) - float(students_t.ppf(1 - false_fails, freedom)) * error
    if -target.margin < interval[0] and interval[1] < target.margin:
        return Outcome(target, Verdict.PASS, measured, difference, interval)
    if beyond > target.margin:
        return Outcome(target, Verdict.FAIL, measured, difference, interval)
    return Outcome(target, Verdict.CANNOT_TELL, measured, difference, interval, "more seeds would tell")


def _judge_single(target: Target, value: float, false_fails: float) -> Outcome:
    assert target.value is not None
    assert target.margin is not None
    difference, spread = value - target.value, target.standard_deviation
    if spread is not None and target.runs >= 2:
        reach = prediction_reach(spread, target.runs, false_fails)
        verdict = Verdict.PASS if abs(difference) <= reach else Verdict.FAIL
        reason = f"band of {target.runs} seeds: {target.value - reach:.4g} to {target.value + reach:.4g}"
        return Outcome(target, verdict, value, difference, reason=reason)
    if abs(difference) > HOPELESS * target.margin:
        return Outcome(target, Verdict.FAIL, value, difference, reason=f"more than {HOPELESS} margins away")
    where = "within" if abs(difference) <= target.margin else "beyond"
    reason = f"{where} the margin, but one run does not say how much runs differ: add seeds"
    return Outcome(target, Verdict.CANNOT_TELL, value, difference, reason=reason)


def prediction_reach(spread: float, count: int, false_fails: float) -> float:
    """How far from the mean of `count` runs one further run lies at most, but for a share `false_fails` of them."""
    return float(students_t.ppf(1 - false_fails / 2, count - 1)) * spread * math.sqrt(1 + 1 / count)


def _judge_bounds(target: Target, runs: Sequence[Measured]) -> Outcome:
    values = [run.values.get("") for run in runs]
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return Outcome(target, Verdict.CANNOT_TELL, reason="not measured")
    low = -math.inf if target.low is None else target.low
    high = math.inf if target.high is None else target.high
    verdict = Verdict.PASS if all(low <= value <= high for value in found) else Verdict.FAIL
    return Outcome(target, verdict, statistics.fmean(found))


def _judge_values(target: Target, runs: Sequence[Measured]) -> Outcome | None:
    assert target.tolerance is not None
    distances, missing, compared = [], False, False
    for run in runs:
        wanted: Mapping[str, float] = target.values or {}
        if target.seeds is not None:
            wanted = target.seeds.get(str(run.seed), {})
        elif target.value is not None:
            wanted = {"": target.value}
        compared |= bool(wanted)
        missing |= not wanted.keys() <= run.values.keys()
        distances += [run.values[step] - value for step, value in wanted.items() if step in run.values]
    if not compared:
        return None
    worst = max(distances, key=abs, default=None)
    mean = statistics.fmean(run.values[""] for run in runs) if target.value is not None and not missing else None
    if worst is not None and not abs(worst) <= target.tolerance:
        return Outcome(target, Verdict.FAIL, mean, worst)
    if missing:
        return Outcome(target, Verdict.CANNOT_TELL, mean, worst, reason="not all steps were measured")
    return Outcome(target, Verdict.PASS, mean, worst)


def _judge_trajectory(target: Target, runs: Sequence[Measured], false_fails: float) -> Outcome:
    assert target.values is not None
    distances = [
        statistics.fmean(run.values[step] - value for run in runs)
        for step, value in target.values.items()
        if all(step in run.values for run in runs)
    ]
    if len(distances) < min(FEWEST_POINTS, len(target.values)):
        return Outcome(target, Verdict.CANNOT_TELL, reason="too few of its steps were measured")
    mean, count = statistics.fmean(distances), len(distances)
    if not math.isfinite(mean):
        return Outcome(target, Verdict.FAIL, None, mean, reason="not finite")
    error = statistics.stdev(distances) / math.sqrt(count)
    return _judge_interval(target, None, mean, error, count - 1.0, false_fails)


def overall(outcomes: Sequence[Outcome]) -> Verdict:
    """FAIL if any target failed; else CANNOT TELL if any could not be told, or there is none; else PASS."""
    verdicts = {outcome.verdict for outcome in outcomes}
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    return Verdict.PASS if verdicts == {Verdict.PASS} else Verdict.CANNOT_TELL


def against(targets: Sequence[Target], reference: Mapping[str, Sequence[float]]) -> list[Target]:
    """Put the values of other runs in the place of a recipe's references, with the recipe's margins.

    Raises:
        InputError: no target has a margin and is measured in the other runs.
    """
    found = []
    for target in targets:
        values = reference.get(target.name, ())
        if target.margin is None or target.values is not None or len(values) < 2:
            continue
        found.append(
            replace(
                target, value=statistics.fmean(values), standard_deviation=statistics.stdev(values), runs=len(values)
            )
        )
    if not found:
        raise InputError("--against: takes at least two runs that have what the recipe measures.")
    return found
