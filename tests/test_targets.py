"""What can be concluded from so many runs: the rates of wrong verdicts are those that are promised."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.errors import InputError
from repro.evaluation.targets import (
    FALSE_FAILS,
    FALSE_PASSES,
    HOPELESS,
    Measured,
    Outcome,
    Target,
    Verdict,
    against,
    judge,
    judge_values,
    overall,
    prediction_reach,
    read_targets,
)

DRAWS = 4000
SPREAD = 0.01
# Four standard errors of a rate that is measured with so many draws.
SLACK = 4 * math.sqrt(0.05 * 0.95 / DRAWS)


def target(**fields: Any) -> Target:
    return Target(**{"metric": "eval_loss", "source": "a test", **fields})


def verdicts(
    *, true_difference: float, seeds: int, runs: int, margin: float, false_fails: float = FALSE_FAILS
) -> Counter[Verdict]:
    """Draw seeds, and a reference of `runs` runs, whose true means differ; count the verdicts."""
    random = np.random.default_rng(seeds * 100 + runs)
    found: Counter[Verdict] = Counter()
    for _ in range(DRAWS):
        reference = random.normal(2.0, SPREAD, runs)
        values = random.normal(2.0 + true_difference, SPREAD, seeds)
        spread = {"standard_deviation": float(reference.std(ddof=1)), "runs": runs} if runs > 1 else {}
        goal = target(value=float(reference.mean()), margin=margin, **spread)
        found[judge_values(goal, values.tolist(), false_fails).verdict] += 1
    return found


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("runs", [1, 5])
def test_a_difference_of_a_margin_passes_once_in_twenty_and_no_oftener(seeds: int, runs: int) -> None:
    for sign in (-1, 1):  # too good is a miss as well
        found = verdicts(true_difference=sign * 0.04, seeds=seeds, runs=runs, margin=0.04)
        assert found[Verdict.PASS] / DRAWS <= FALSE_PASSES + SLACK


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("runs", [1, 5])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_difference_within_the_margin_hardly_ever_fails(seeds: int, runs: int, share: float) -> None:
    found = verdicts(true_difference=share * 0.04, seeds=seeds, runs=runs, margin=0.04)
    assert found[Verdict.FAIL] / DRAWS <= FALSE_FAILS + SLACK / 2


def test_the_verdicts_come_when_there_are_enough_seeds() -> None:
    same = verdicts(true_difference=0.0, seeds=5, runs=5, margin=0.04)
    assert same[Verdict.PASS] / DRAWS > 0.99
    other = verdicts(true_difference=0.12, seeds=5, runs=5, margin=0.04)
    assert other[Verdict.FAIL] / DRAWS > 0.9
    assert other[Verdict.PASS] == 0
    few = verdicts(true_difference=0.0, seeds=2, runs=1, margin=0.04)
    assert few[Verdict.CANNOT_TELL] / DRAWS > 0.3


def test_the_interval_with_one_reference_run_is_that_runs_prediction_interval() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(DRAWS):
        values, published = random.normal(2.0, SPREAD, 4), random.normal(2.0, SPREAD)
        interval = judge_values(target(value=published, margin=1.0), values.tolist(), FALSE_FAILS).interval
        assert interval is not None
        inside += interval[0] <= 0 <= interval[1]
    assert inside / DRAWS == pytest.approx(1 - 2 * FALSE_PASSES, abs=SLACK)


@pytest.mark.parametrize("count", [5, 8])
def test_a_single_run_leaves_the_band_of_the_recipes_seeds_as_often_as_is_said(count: int) -> None:
    random = np.random.default_rng(count)
    failed = 0
    for _ in range(DRAWS):
        seeds = random.normal(0.6, SPREAD, count)
        goal = target(value=seeds.mean(), standard_deviation=seeds.std(ddof=1), runs=count, margin=0.05)
        failed += judge_values(goal, [random.normal(0.6, SPREAD)], 0.05).verdict is Verdict.FAIL
    assert failed / DRAWS == pytest.approx(0.05, abs=SLACK)
    # By hand: t(99.5 %, 4 degrees) is 4.604.
    assert prediction_reach(1.0, 5, 0.01) == pytest.approx(4.604 * math.sqrt(1.2), abs=1e-3)


def test_all_targets_of_a_recipe_together_fail_a_right_run_as_seldom_as_is_said() -> None:
    random = np.random.default_rng(9)
    failed = 0
    for _ in range(DRAWS):
        for seeds in random.normal(0.6, SPREAD, (8, 6)):
            goal = target(value=seeds.mean(), standard_deviation=seeds.std(ddof=1), runs=6, margin=0.05)
            outcome = judge(goal, [Measured(0, {"": random.normal(0.6, SPREAD)})], num_targets=8)
            if outcome and outcome.verdict is Verdict.FAIL:
                failed += 1
                break
    assert failed / DRAWS <= FALSE_FAILS + SLACK / 2


@pytest.mark.parametrize(
    ("value", "verdict"), [(2.016, "CANNOT TELL"), (2.1, "CANNOT TELL"), (2.3, "FAIL"), (1.7, "FAIL")]
)
def test_one_run_against_one_cannot_pass(value: float, verdict: str) -> None:
    outcome = judge_values(target(value=2.0153, margin=0.02), [value], FALSE_FAILS)
    assert outcome.verdict == verdict
    assert HOPELESS == 10


def test_a_reference_without_spread_and_seeds_without_spread_are_compared_by_their_difference() -> None:
    assert judge_values(target(value=1.0, margin=0.1), [1.05, 1.05], 0.01).verdict is Verdict.PASS
    assert judge_values(target(value=1.0, margin=0.1), [1.2, 1.2], 0.01).verdict is Verdict.FAIL


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    assert judge_values(target(value=1.0, margin=0.1), [value, 1.0], 0.01).verdict is Verdict.FAIL
    bounded = judge(target(low=0.5, high=2.0), [Measured(0, {"": math.nan})])
    exact = judge(target(value=1.0, tolerance=0.1), [Measured(0, {"": math.nan})])
    steps = {str(n): 1.0 for n in range(5)}
    path = judge(target(values=steps, margin=0.1), [Measured(0, {**steps, "1": math.nan})])
    assert all(outcome and outcome.verdict is Verdict.FAIL for outcome in (bounded, exact, path))


@given(low=st.none() | st.floats(-5, 5), high=st.none() | st.floats(-5, 5), value=st.floats(-9, 9))
def test_bounds_are_kept_by_what_lies_between_them(low: float | None, high: float | None, value: float) -> None:
    outcome = judge(target(low=low, high=high), [Measured(0, {"": value})])
    expected = (low is None or value >= low) and (high is None or value <= high)
    assert outcome is not None
    assert (outcome.verdict is Verdict.PASS) is expected


def test_every_run_keeps_to_bounds_and_values() -> None:
    runs = [Measured(0, {"": 1.0}), Measured(1, {"": 3.0})]
    for goal in (target(low=0, high=2), target(value=1.0, tolerance=0.5)):
        outcome = judge(goal, runs)
        assert outcome is not None
        assert outcome.verdict is Verdict.FAIL


def test_values_by_step_fail_at_once_and_pass_when_all_are_there() -> None:
    goal = target(metric="learning_rate", values={"1": 3e-5, "10": 2.99e-5}, tolerance=1e-9)
    found = [
        judge(goal, [Measured(0, values)])
        for values in ({"1": 3e-5}, {"1": 3.3e-5}, {"1": 3e-5, "10": 2.99e-5}, {"1": 3e-5, "10": 3e-5})
    ]
    assert [outcome and outcome.verdict for outcome in found] == ["CANNOT TELL", "FAIL", "PASS", "FAIL"]


def test_a_seeds_own_values_bind_runs_of_that_seed_alone() -> None:
    goal = target(metric="loss", seeds={"42": {"1": 6.0}}, tolerance=1e-3)
    known, wrong, other = (
        judge(goal, [Measured(seed, {"1": loss})]) for seed, loss in ((42, 6.0), (42, 6.1), (7, 5.0))
    )
    assert known
    assert known.verdict is Verdict.PASS
    assert wrong
    assert wrong.verdict is Verdict.FAIL
    assert other is None


@pytest.mark.parametrize(
    ("offset", "verdict"), [(0.0, "PASS"), (0.05, "PASS"), (0.5, "FAIL"), (-0.5, "FAIL"), (0.1, "CANNOT TELL")]
)
def test_a_trajectory_is_judged_by_its_mean_distance(offset: float, verdict: str) -> None:
    published = {str(10 * n): 3.2 - 0.05 * n for n in range(1, 13)}
    noise = [0.02, -0.02] * 6
    losses = {step: loss + offset + jitter for (step, loss), jitter in zip(published.items(), noise, strict=True)}
    goal = target(metric="loss", values=published, margin=0.1)
    outcome = judge(goal, [Measured(42, losses)])
    assert outcome is not None
    assert outcome.verdict == verdict
    early = judge(goal, [Measured(42, {"10": 9.0, "20": 9.0})])
    assert early is not None
    assert early.verdict is Verdict.CANNOT_TELL, "two points are not a trajectory"


def test_what_was_not_measured_never_passes() -> None:
    for fields in (
        {"low": 0},
        {"value": 1.0, "tolerance": 1},
        {"value": 1.0, "margin": 1},
        {"values": {"1": 1.0}, "margin": 1},
    ):
        outcome = judge(target(**fields), [Measured(0, {})])
        assert outcome is not None
        assert outcome.verdict is Verdict.CANNOT_TELL


def test_a_run_passes_only_if_everything_does() -> None:
    def of(*verdicts: Verdict) -> Verdict:
        goal = target(low=0)
        return overall([Outcome(goal, verdict) for verdict in verdicts])

    assert of(Verdict.PASS, Verdict.PASS) is Verdict.PASS
    assert of(Verdict.PASS, Verdict.CANNOT_TELL) is Verdict.CANNOT_TELL
    assert of(Verdict.PASS, Verdict.CANNOT_TELL, Verdict.FAIL) is Verdict.FAIL
    assert of() is Verdict.CANNOT_TELL


def test_other_runs_take_the_references_place_with_the_recipes_margins() -> None:
    targets = [target(value=1.0, margin=0.2, step=5), target(metric="eval_rouge2", low=3)]
    (moved,) = against(targets, {"eval_loss at 5": [2.0, 2.2, 2.4]})
    assert moved.value == pytest.approx(2.2)
    assert moved.standard_deviation == pytest.approx(0.2)
    assert (moved.runs, moved.margin) == (3, 0.2)
    with pytest.raises(InputError, match="--against: takes at least two runs"):
        against(targets, {"eval_loss at 5": [2.0]})


def test_a_recipes_row_may_say_more_than_a_target_knows() -> None:
    (goal,) = read_targets([{"metric": "eval_loss", "low": 1, "source": "here", "comment": "for people"}])
    assert goal == target(low=1, source="here")
