"""Measured values against a recipe's targets, and what can be concluded from so many runs.

A target is one of five kinds, by the names it has:

- `low`, `high`: bounds, either of which may be missing, that each run keeps to. A bound is not a reproduced value.
- `value` or `values` (by step), and `tolerance`: what each run has exactly but for rounding. With `seeds`, the values
  of each of these seeds; runs with other seeds are not held to it, but may not have a listed seed's values either.
- `fingerprint`: what each run has to the letter.
- `value` and `margin`: a quantity that varies from seed to seed. The reference is one run, or `runs` of them with a
  `standard_deviation` (of `freedom` degrees, where more runs than these tell it).
- `values` and `margin`: one run's trajectory, such as logged losses; its mean distance is what is judged, once and when
  all of it is there: a test that looks nine times stops more honest runs than it says.

What is concluded for the last two is in `repro.recipes.equivalence`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from repro.errors import InputError
from repro.recipes import equivalence
from repro.recipes.equivalence import HOPELESS, POWER, WORST_FIRST, Reference, Verdict, compare, pooled

WIDEST = 4.0  # margins that half a prediction interval may be wide, where a recipe does not say it
FEWEST_POINTS = 4  # of a trajectory that is not over, to find it hopeless
COPIED = 0.1  # share of the tolerance within which the losses of another seed are that seed's
# The largest possible value of a metric, by what its name holds; the least is 0.
LARGEST = {"accuracy": 1.0, "exact_match": 1.0, "rouge": 100.0, "": math.inf}


@dataclass(frozen=True)
class Target:
    """One of a recipe's targets, as its JSON has it."""

    metric: str  # of a run (`read_run`), or of each step
    source: str  # where the figures come from
    step: int | None = None  # at which it is evaluated; None for the last evaluation, or where there are no steps
    low: float = -math.inf  # from here on, the names of the five kinds above
    high: float = math.inf
    value: float | None = None
    values: Mapping[str, float] | None = None
    tolerance: float | None = None
    margin: float | None = None
    widest: float | None = None  # half the width that the prediction interval of a single run may have
    seeds: Mapping[str, Mapping[str, float]] | None = None
    standard_deviation: float | None = None  # of the reference, as the next two
    freedom: int | None = None
    runs: int = 1
    fingerprint: str | None = None

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
    def is_score(self) -> bool:
        """Whether it says how good the trained model is."""
        return self.metric.startswith("eval_") and self.metric != "eval_rows"

    @property
    def reference(self) -> Reference:
        """What runs are held against; a trajectory's distances, against 0."""
        known = self.standard_deviation is not None
        freedom = (self.runs - 1 if self.freedom is None else self.freedom) if known else 0
        return Reference(self.value or 0.0, self.runs, self.standard_deviation or 0.0, freedom)

    @property
    def wanted(self) -> str:
        """What is asked for, in words."""
        if self.fingerprint is not None:
            return self.fingerprint
        if self.margin is not None:
            return f"{f'{self.value:g}' if self.values is None else f'{len(self.values)} values'} ± {self.margin:g}"
        if self.tolerance is not None:
            return f"{self.value:.12g}" if self.value is not None else f"reference's ± {self.tolerance:g}"
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.low == -math.inf else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Outcome:
    """A target and what was measured."""

    target: Target
    verdict: Verdict
    measured: float | None = None  # the mean over runs
    difference: float | None = None  # from what is wanted; of a trajectory or several values, the mean or largest one
    interval: tuple[float, float] | None = None  # of the difference, the one that decided, where there is one
    reason: str = ""  # the verdict in words, where the figures do not say it
    band: str = ""  # what was asked for, where that depends on the runs
    claim: str = ""  # what a PASS says

    @property
    def wanted(self) -> str:
        return self.band or self.target.wanted


@dataclass(frozen=True)
class Measured:
    """What one run measured of one target."""

    seed: int
    values: Mapping[str, float] = field(default_factory=dict)  # by step; a metric without steps is at ""
    text: str | None = None  # of a fingerprint


Run = Callable[[Target], Measured]


def read_targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Make targets of a recipe's rows; a row may also have fields that only people read."""
    known = Target.__dataclass_fields__
    return [Target(**{name: value for name, value in row.items() if name in known}) for row in rows]


def judge_all(targets: Sequence[Target], runs: Sequence[Run], *, named: bool = True) -> list[Outcome]:
    """Judge every target that says something about the runs, whose number was `named` before the first of them."""
    shared = max(sum(target.is_statistical for target in targets), 1)
    found = [judge(target, [run(target) for run in runs], num_targets=shared, named=named) for target in targets]
    return [outcome for outcome in found if outcome is not None]


def judge(target: Target, runs: Sequence[Measured], *, num_targets: int = 1, named: bool = True) -> Outcome | None:
    """Hold runs against a target.

    Args:
        runs: at least one, with different seeds; `values` may lack steps that they have not come to.
        num_targets: among which FALSE_FAILS is shared.

    Returns:
        None if the target says nothing about these runs' seeds.
    """
    if target.fingerprint is not None:
        other = sorted({str(run.text) for run in runs} - {target.fingerprint})
        reason = f"found {', '.join(other)}" if other else ""
        return Outcome(target, Verdict.FAIL if other else Verdict.PASS, reason=reason)
    if target.tolerance is not None:
        return _judge_values(target, runs)
    look = 1.0 if named or len(runs) == 1 else equivalence.LOOKING
    fails, passes = equivalence.FALSE_FAILS / num_targets * look, equivalence.FALSE_PASSES * look
    rates = {"false_fails": fails, "false_passes": passes}
    if target.values is not None:
        return _judge_trajectory(target, runs, rates)
    found, seeds = [run.values[""] for run in runs if "" in run.values], [run.seed for run in runs]
    if len(found) < len(runs):
        return Outcome(target, Verdict.CANNOT_TELL, reason="not measured")
    if target.margin is None:
        return _judge_bounds(target, found, seeds)
    return judge_statistically(target, found, seeds, **rates)


def judge_statistically(
    target: Target, values: Sequence[float], seeds: Sequence[int], *, false_fails: float, false_passes: float
) -> Outcome:
    """Hold the values of one quantity under several seeds against a reference that varies too."""
    assert target.margin is not None
    reference, count, margin = target.reference, len(values), target.margin
    widest = target.widest or WIDEST * margin
    found = compare(values, reference, margin=margin, widest=widest, false_fails=false_fails, false_passes=false_passes)
    verdict, difference, reach = WORST_FIRST[int(found.places)], float(found.difference), float(found.reach)
    mean = statistics.fmean(values) if target.values is None else None
    outlying = [str(seed) for seed, out in zip(seeds, found.outlying, strict=True) if out]
    single, many = count == 1 or reference.runs == 1, reference.runs > 1
    claim = f"{'consistent with' if single else 'equivalent to'} "
    claim += f"{reference.runs} reference runs" if many else "the published run"
    band = reason = ""
    if not all(map(math.isfinite, values)):
        return Outcome(target, verdict, mean, difference, reason="not finite")
    if math.isinf(reach):
        reason = f"more than {HOPELESS} margins away" if abs(difference) > HOPELESS * margin else "no spread is known"
        return Outcome(target, verdict, mean, difference, reason=f"{reason}: add seeds", claim=claim)
    if single and many:
        largest = next(value for part, value in LARGEST.items() if part in target.metric)
        band = f"{max(reference.mean - reach, 0):.4g} to {min(reference.mean + reach, largest):.4g}"
        reason = f"band of {reference.runs} seeds"
    elif single:
        band = f"{'' if target.values else f'{target.value:g} '}within ± {reach:.4g} of the runs' mean"
    if outlying:
        reason = f"seed {', '.join(outlying)} by itself is beyond the margin and the reference's spread"
    elif found.uneven:
        reason = "the runs differ from one another more than the reference's do"
    elif verdict is Verdict.CANNOT_TELL and single:
        reason = f"an interval of ± {reach:.3g} tells too little: at most ± {widest:g}; add seeds"
    elif verdict is Verdict.CANNOT_TELL:
        spread, freedom = pooled((statistics.stdev(values), count - 1), (reference.spread, reference.freedom))
        needed = equivalence.seeds_that_would_tell(float(spread), freedom, margin=margin, false_passes=false_passes)
        reason = f"{needed} of each would tell with {POWER:.0%}, if nothing differs" if needed else "too much spread"
    return Outcome(target, verdict, mean, difference, (difference - reach, difference + reach), reason, band, claim)


def _judge_bounds(target: Target, values: Sequence[float], seeds: Sequence[int]) -> Outcome:
    out = [str(seed) for seed, value in zip(seeds, values, strict=True) if not target.low <= value <= target.high]
    reason = f"seed {', '.join(out)}" if out and len(seeds) > 1 else "a bound" if target.is_score else ""
    verdict = Verdict.FAIL if out else Verdict.PASS
    return Outcome(target, verdict, statistics.fmean(values), reason=reason, claim="within bounds")


def _judge_values(target: Target, runs: Sequence[Measured]) -> Outcome | None:
    assert target.tolerance is not None
    distances, missing, compared = [], False, False
    for run in runs:
        wanted: Mapping[str, float] = target.values or {}
        if target.seeds is not None:
            wanted = target.seeds.get(str(run.seed), {})
            if not wanted and (copied := _seed_with_the_losses_of(target, run)):
                return Outcome(target, Verdict.FAIL, reason=f"seed {run.seed} has the losses of seed {copied}")
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
    verdict = Verdict.CANNOT_TELL if missing else Verdict.PASS
    return Outcome(target, verdict, mean, worst, reason="not all steps were measured" if missing else "")


def _seed_with_the_losses_of(target: Target, run: Measured) -> str | None:
    """Find the listed seed whose values an unlisted one has; one step alone may be as near by chance."""
    assert target.tolerance is not None
    near = COPIED * target.tolerance
    for seed, values in (target.seeds or {}).items():
        if len(values) > 1 and all(abs(run.values.get(step, math.inf) - v) <= near for step, v in values.items()):
            return seed
    return None


def _judge_trajectory(target: Target, runs: Sequence[Measured], rates: Mapping[str, float]) -> Outcome:
    assert target.margin is not None
    wanted = target.values or {}
    distances = [[run.values[step] - value for step, value in wanted.items() if step in run.values] for run in runs]
    points = [point for found in distances for point in found]
    if len(points) < len(runs) * len(wanted):
        if len(points) >= FEWEST_POINTS and not any(abs(point) <= HOPELESS * target.margin for point in points):
            reason = f"each more than {HOPELESS} margins away"
            return Outcome(target, Verdict.FAIL, None, statistics.fmean(points), reason=reason)
        return Outcome(target, Verdict.CANNOT_TELL, reason="not all of its steps were measured")
    if len(runs) > 1 or target.standard_deviation is not None:
        means = [statistics.fmean(found) for found in distances]
        return judge_statistically(target, means, [run.seed for run in runs], **rates)
    # A single run against a single run: its steps are what there is to tell the spread of one batch's loss.
    found = compare(distances[0], Reference(0.0, math.inf), margin=target.margin, widest=math.inf, **rates)
    verdict, mean, reach = WORST_FIRST[int(found.places)], float(found.difference), float(found.reach)
    if not math.isfinite(mean):
        return Outcome(target, Verdict.FAIL, None, mean, reason="not finite")
    reason = "more seeds would tell" if verdict is Verdict.CANNOT_TELL else ""
    return Outcome(target, verdict, None, mean, (mean - reach, mean + reach), reason, claim="near the published losses")


def overall(outcomes: Sequence[Outcome]) -> Verdict:
    """The worst of all verdicts; CANNOT TELL also where no score was judged."""
    worst = min((outcome.verdict for outcome in outcomes), key=WORST_FIRST.index, default=Verdict.CANNOT_TELL)
    judged = worst is Verdict.FAIL or any(outcome.target.is_score for outcome in outcomes)
    return worst if judged else Verdict.CANNOT_TELL


def against(targets: Sequence[Target], runs: Sequence[Run]) -> list[Target]:
    """Put other runs in the place of a recipe's references, with the recipe's margins and what it knows of the spread.

    Where a seed is shared its early losses are wanted again, step by step; counts and floors stay the recipe's.

    Raises:
        InputError: no target has a margin and is measured in the other runs.
    """
    found: list[Target] = []
    for target in targets:
        measured = [run(target) for run in runs]
        moved: dict[str, Any] = {}
        if target.seeds is not None:
            moved = {"seeds": {str(run.seed): run.values for run in measured if run.values}}
        elif target.margin is not None:
            steps = list(target.values or [""])
            if not all(run.values.keys() >= set(steps) for run in measured):
                continue
            means = {step: statistics.fmean(run.values[step] for run in measured) for step in steps}
            each = [statistics.fmean(run.values[step] - means[step] for step in steps) for run in measured]
            spread = (statistics.stdev(each), len(each) - 1) if len(each) > 1 else (0.0, 0)
            known, freedom = pooled(spread, (target.reference.spread, target.reference.freedom))
            moved = {"standard_deviation": float(known), "freedom": freedom} if freedom else {}
            moved |= {"runs": len(each)} | ({"values": means} if target.values else {"value": means[""]})
        found.append(replace(target, **moved))
    if not any(target.is_statistical for target in found):
        raise InputError("--against: takes runs that have what the recipe measures.")
    return found
