"""What can be concluded from so many runs: the rates of wrong verdicts are those that are promised."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.errors import InputError
from repro.recipes import read_recipe, recipe_names
from repro.recipes.equivalence import (
    FALSE_FAILS,
    FALSE_PASSES,
    HOPELESS,
    LOOKING,
    PASS,
    WORST_FIRST,
    Reference,
    Verdict,
    compare,
    pooled,
    prediction_reach,
)
from repro.recipes.targets import (
    WIDEST,
    Measured,
    Outcome,
    Target,
    against,
    judge,
    judge_statistically,
    overall,
    read_targets,
)

DRAWS = 4000
SPREAD = 0.01
# Four standard errors of a rate that is measured with so many draws.
SLACK = 4 * math.sqrt(0.05 * 0.95 / DRAWS)


def target(**fields: Any) -> Target:
    return Target(**{"metric": "eval_loss", "source": "a test", **fields})


def verdicts(
    *, true_difference: float, seeds: int, runs: int, margin: float, known: int = 0, false_fails: float = FALSE_FAILS
) -> Counter[Verdict]:
    """Draw seeds, and a reference of `runs` runs, whose true means differ; count the verdicts.

    Args:
        known: degrees of freedom of a spread that is known beforehand.
    """
    random = np.random.default_rng(seeds * 100 + runs)
    reference = random.normal(2.0, SPREAD, (DRAWS, runs))
    values = random.normal(2.0 + true_difference, SPREAD, (DRAWS, seeds))
    groups = [(SPREAD * np.sqrt(random.chisquare(known, DRAWS) / known), known)] if known else []
    groups += [(reference.std(1, ddof=1), runs - 1)] if runs > 1 else []
    spread, freedom = pooled(*groups)
    rates = {"false_fails": false_fails, "false_passes": FALSE_PASSES}
    of = Reference(reference.mean(1), runs, spread, freedom)
    places = compare(values, of, margin=margin, widest=WIDEST * margin, **rates).places
    return Counter(WORST_FIRST[place] for place in places)


def verdict_of(goal: Target, values: Sequence[float], false_fails: float = FALSE_FAILS) -> Outcome:
    rates = {"false_fails": false_fails, "false_passes": FALSE_PASSES}
    return judge_statistically(goal, values, range(len(values)), **rates)


NUMBERS = [2, 3, 5, 8, 16]


@pytest.mark.parametrize("seeds", NUMBERS)
@pytest.mark.parametrize("runs", NUMBERS)
@pytest.mark.parametrize("known", [0, 33])
def test_a_difference_of_a_margin_passes_once_in_twenty_and_no_oftener(seeds: int, runs: int, known: int) -> None:
    for sign in (-1, 1):  # too good is a miss as well
        found = verdicts(true_difference=sign * 0.04, seeds=seeds, runs=runs, margin=0.04, known=known)
        assert found[Verdict.PASS] / DRAWS <= FALSE_PASSES + SLACK


@pytest.mark.parametrize("seeds", NUMBERS)
@pytest.mark.parametrize("runs", NUMBERS)
@pytest.mark.parametrize("known", [0, 33])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_difference_within_the_margin_hardly_ever_fails(seeds: int, runs: int, known: int, share: float) -> None:
    found = verdicts(true_difference=share * 0.04, seeds=seeds, runs=runs, margin=0.04, known=known)
    assert found[Verdict.FAIL] / DRAWS <= FALSE_FAILS + SLACK / 2


@pytest.mark.parametrize(("seeds", "runs"), [(1, 8), (1, 3), (8, 1), (3, 1)])
@pytest.mark.parametrize("known", [0, 33])
def test_a_single_run_on_either_side_fails_as_seldom_as_is_said_if_nothing_differs(
    seeds: int, runs: int, known: int
) -> None:
    found = verdicts(true_difference=0.0, seeds=seeds, runs=runs, margin=0.04, known=known)
    assert found[Verdict.FAIL] / DRAWS == pytest.approx(FALSE_FAILS, abs=SLACK / 2)


def test_the_verdicts_come_when_there_are_enough_seeds() -> None:
    same = verdicts(true_difference=0.0, seeds=5, runs=5, margin=0.04)
    assert same[Verdict.PASS] / DRAWS > 0.99
    other = verdicts(true_difference=0.12, seeds=5, runs=5, margin=0.04)
    assert other[Verdict.FAIL] / DRAWS > 0.9
    assert other[Verdict.PASS] == 0
    few = verdicts(true_difference=0.0, seeds=2, runs=1, margin=0.04)
    assert few[Verdict.CANNOT_TELL] / DRAWS > 0.3


@pytest.mark.parametrize("runs", [2, 3])
def test_a_band_that_is_wider_than_the_margins_bear_tells_nothing(runs: int) -> None:
    """Five margins off, one new run against two or three old ones, whose band is up to 545 standard deviations wide."""
    found = verdicts(true_difference=5 * 0.013, seeds=1, runs=runs, margin=0.013, false_fails=FALSE_FAILS / 7)
    assert found[Verdict.PASS] / DRAWS < 0.03
    outcome = verdict_of(target(value=2.0, standard_deviation=0.01, runs=2, margin=0.013), [2.0])
    assert outcome.verdict is Verdict.CANNOT_TELL
    assert "tells too little" in outcome.reason


def test_adding_runs_until_they_pass_is_paid_for() -> None:
    passed = {look: np.zeros(DRAWS, bool) for look in (1.0, LOOKING)}
    random = np.random.default_rng(0)
    margin = 3.6 * SPREAD  # beside which false passes are most frequent
    new, old = random.normal(margin, SPREAD, (DRAWS, 16)), random.normal(0.0, SPREAD, (DRAWS, 16))
    known = SPREAD * np.sqrt(random.chisquare(33, DRAWS) / 33)
    for look, ever in passed.items():
        for count in range(2, 17):
            spread, freedom = pooled((known, 33), (old[:, :count].std(1, ddof=1), count - 1))
            of = Reference(old[:, :count].mean(1), count, spread, freedom)
            rates = {"false_fails": FALSE_FAILS * look, "false_passes": FALSE_PASSES * look}
            ever |= compare(new[:, :count], of, margin=margin, widest=1.0, **rates).places == PASS
    assert passed[1.0].mean() > 0.12
    assert passed[LOOKING].mean() <= FALSE_PASSES + SLACK
    runs = [Measured(seed, {"": value}) for seed, value in enumerate(random.normal(0.0, SPREAD, 5))]
    goal = target(value=0.0, standard_deviation=SPREAD, runs=8, margin=1.6 * SPREAD)
    reaches = [outcome.interval for named in (True, False) if (outcome := judge(goal, runs, named=named))]
    assert reaches[0] is not None
    assert reaches[1] is not None
    assert np.diff(reaches[0]) < np.diff(reaches[1])


def test_a_broken_run_beside_good_ones_is_named() -> None:
    goal = target(value=2.0, standard_deviation=SPREAD, freedom=33, runs=8, margin=0.02)
    good = [1.998, 2.004, 1.991, 2.012]
    assert verdict_of(goal, [*good, 2.001]).verdict is Verdict.PASS
    outcome = verdict_of(goal, [*good, 2.3])
    assert outcome.verdict is Verdict.FAIL
    assert "seed 4 by itself" in outcome.reason


def test_runs_that_differ_more_than_the_references_do_not_pass() -> None:
    goal = target(value=2.0, standard_deviation=SPREAD, freedom=33, runs=8, margin=0.05)
    outcome = verdict_of(goal, [1.95, 2.05, 1.955, 2.045])
    assert outcome.verdict is Verdict.CANNOT_TELL
    assert "differ from one another" in outcome.reason


def test_the_message_says_how_many_seeds_would_do() -> None:
    goal = target(value=36.2, standard_deviation=0.69, freedom=33, runs=8, margin=0.9)
    reason = verdict_of(goal, [36.9, 35.6, 37.1, 36.7, 36.9]).reason
    number = int(reason.split()[0])
    assert reason == f"{number} of each would tell with 80%, if nothing differs"
    spread, freedom = pooled((np.std([36.9, 35.6, 37.1, 36.7, 36.9], ddof=1), 4), (0.69, 33))
    random = np.random.default_rng(0)
    passed = []
    for count in (number, number - 2):
        new, old = random.normal(0, spread, (2, DRAWS, count))
        of = Reference(old.mean(1), count, float(spread), freedom)
        places = compare(new, of, margin=0.9, widest=9.0, false_fails=1e-4, false_passes=FALSE_PASSES).places
        passed.append((places == PASS).mean())
    assert passed[0] > 0.78
    assert passed[1] < 0.82


@pytest.mark.parametrize("count", [5, 8])
def test_a_single_run_leaves_the_band_of_the_recipes_seeds_as_often_as_is_said(count: int) -> None:
    found = verdicts(true_difference=0.0, seeds=1, runs=count, margin=1.0, false_fails=0.05)
    assert found[Verdict.FAIL] / DRAWS == pytest.approx(0.05, abs=SLACK)
    # By hand: t(99.5 %, 4 degrees) is 4.604.
    assert prediction_reach(1.0, 4, 5, 0.01) == pytest.approx(4.604 * math.sqrt(1.2), abs=1e-3)


def test_all_targets_of_a_recipe_together_fail_a_right_run_as_seldom_as_is_said() -> None:
    failed = sum(
        verdicts(true_difference=0.0, seeds=1, runs=5 + number, margin=1.0, false_fails=FALSE_FAILS / 8)[Verdict.FAIL]
        for number in range(8)
    )
    assert failed / DRAWS <= FALSE_FAILS + SLACK / 2


def test_what_is_printed_is_what_decided_and_no_band_leaves_what_is_possible() -> None:
    goal = target(metric="eval_count_accuracy", value=0.9, standard_deviation=0.04, freedom=33, runs=8, margin=0.065)
    inside, outside = verdict_of(goal, [0.99]), verdict_of(goal, [0.70])
    low, _, high = inside.wanted.partition(" to ")
    assert float(high) == 1.0
    assert float(low) > 0.70
    assert (inside.verdict, outside.verdict) == ("PASS", "FAIL")
    assert inside.claim == "consistent with 8 reference runs"
    several = verdict_of(goal, [0.9, 0.91, 0.89, 0.9, 0.92, 0.88])
    assert (several.verdict, several.wanted) == ("PASS", "0.9 ± 0.065")
    assert several.claim == "equivalent to 8 reference runs"


def test_seeds_around_a_published_run_are_consistent_with_it_and_not_equivalent() -> None:
    published = target(value=14.64, margin=0.3, widest=0.9)
    near = verdict_of(published, [14.6, 14.75, 14.5, 14.62, 14.7, 14.58, 14.66, 14.71], FALSE_FAILS / 3)
    assert (near.verdict, near.claim) == ("PASS", "consistent with the published run")
    assert near.interval is not None
    assert near.interval[1] - near.interval[0] < 2 * 0.9
    far = verdict_of(published, [15.6, 15.75, 15.5, 15.62, 15.7, 15.58, 15.66, 15.71], FALSE_FAILS / 3)
    assert far.verdict is Verdict.FAIL
    few = verdict_of(published, [14.6, 14.75], FALSE_FAILS / 3)
    assert few.verdict is Verdict.CANNOT_TELL


@pytest.mark.parametrize(
    ("value", "verdict"), [(2.016, "CANNOT TELL"), (2.1, "CANNOT TELL"), (2.3, "FAIL"), (1.7, "FAIL")]
)
def test_one_run_against_one_cannot_pass(value: float, verdict: str) -> None:
    outcome = verdict_of(target(value=2.0153, margin=0.02), [value])
    assert outcome.verdict == verdict
    assert HOPELESS == 10


def test_runs_that_do_not_differ_are_not_several() -> None:
    assert verdict_of(target(value=1.0, margin=0.1), [1.05, 1.05]).verdict is not Verdict.PASS
    assert verdict_of(target(value=1.0, margin=0.1), [3.0, 3.0]).verdict is Verdict.FAIL


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    assert verdict_of(target(value=1.0, margin=0.1), [value, 1.0]).verdict is Verdict.FAIL
    bounded = judge(target(low=0.5, high=2.0), [Measured(0, {"": math.nan})])
    exact = judge(target(value=1.0, tolerance=0.1), [Measured(0, {"": math.nan})])
    steps = {str(n): 1.0 for n in range(5)}
    path = judge(target(values=steps, margin=0.1), [Measured(0, {**steps, "1": math.nan})])
    assert all(outcome and outcome.verdict is Verdict.FAIL for outcome in (bounded, exact, path))


@given(low=st.just(-math.inf) | st.floats(-5, 5), high=st.just(math.inf) | st.floats(-5, 5), value=st.floats(-9, 9))
def test_bounds_are_kept_by_what_lies_between_them(low: float, high: float, value: float) -> None:
    outcome = judge(target(low=low, high=high), [Measured(0, {"": value})])
    expected = low <= value <= high
    assert outcome is not None
    assert (outcome.verdict is Verdict.PASS) is expected


@pytest.mark.parametrize("goal", [target(low=0, high=2), target(value=1.0, tolerance=0.5)], ids=["bounds", "value"])
def test_every_run_keeps_to_bounds_and_values(goal: Target) -> None:
    outcome = judge(goal, [Measured(0, {"": 1.0}), Measured(1, {"": 3.0})])
    assert outcome and outcome.verdict is Verdict.FAIL  # noqa: PT018


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
    assert [outcome and outcome.verdict for outcome in (known, wrong, other)] == ["PASS", "FAIL", None]


PUBLISHED = {str(10 * n): 3.2 - 0.05 * n for n in range(1, 13)}


def losses(offset: float, noise: Sequence[float] = (0.02, -0.02) * 6) -> dict[str, float]:
    return {step: loss + offset + jitter for (step, loss), jitter in zip(PUBLISHED.items(), noise, strict=True)}


@pytest.mark.parametrize(
    ("offset", "verdict"), [(0.0, "PASS"), (0.05, "PASS"), (0.5, "FAIL"), (-0.5, "FAIL"), (0.1, "CANNOT TELL")]
)
def test_a_trajectory_is_judged_by_its_mean_distance(offset: float, verdict: str) -> None:
    goal = target(metric="loss", values=PUBLISHED, margin=0.1)
    outcome = judge(goal, [Measured(42, losses(offset))])
    assert outcome is not None
    assert outcome.verdict == verdict
    early = judge(goal, [Measured(42, {"10": 9.0, "20": 9.0})])
    assert early is not None
    assert early.verdict is Verdict.CANNOT_TELL, "two points are not a trajectory"


def stopped(offset: float, draws: int) -> list[int]:
    """At how many points a trajectory off by so much is found to fail, over all looks; 0 where it never is."""
    random, found = np.random.default_rng(0), []
    goal = target(metric="loss", values=PUBLISHED, margin=0.1)
    for _ in range(draws):
        seen = list(losses(offset, random.normal(0, 0.07, 12)).items())
        looks = [judge(goal, [Measured(42, dict(seen[:count]))]) for count in range(1, 13)]
        failed = [count for count, look in enumerate(looks, 1) if look and look.verdict is Verdict.FAIL]
        found.append(min(failed, default=0))
    return found


def test_the_watch_stops_one_honest_run_in_a_hundred_at_most_and_a_wrong_one_in_time() -> None:
    for honest in (0.0, 0.08):
        assert sum(count > 0 for count in stopped(honest, 1000)) <= 10 + 12  # four standard errors above
    assert all(0 < count <= 12 for count in stopped(0.3, 200)), "by step 120"
    assert set(stopped(3.0, 20)) == {4}, "what is hopeless is stopped early"


def test_trajectories_of_several_runs_are_held_against_the_published_one() -> None:
    goal = target(metric="loss", values=PUBLISHED, margin=0.1, widest=0.3)
    for offset, verdict in ((0.0, "PASS"), (0.5, "FAIL")):
        runs = [Measured(seed, losses(offset + 0.01 * (seed - 2))) for seed in range(5)]
        outcome = judge(goal, runs)
        assert outcome is not None
        assert outcome.verdict == verdict


def test_a_fingerprint_is_had_to_the_letter() -> None:
    goal = target(metric="train_fingerprint", fingerprint="e463e88b07cdb93a")
    found = [judge(goal, [Measured(0, text=text)]) for text in ("e463e88b07cdb93a", "e463e88b07cdb93b", None)]
    assert [outcome and outcome.verdict for outcome in found] == ["PASS", "FAIL", "FAIL"]


def test_another_seed_with_a_listed_ones_losses_is_that_run() -> None:
    goal = target(metric="loss", seeds={"42": {"1": 6.0, "2": 5.9}}, tolerance=2e-3)
    copied = judge(goal, [Measured(8, {"1": 6.00001, "2": 5.90002})])
    assert copied is not None
    assert (copied.verdict, copied.reason) == ("FAIL", "seed 8 has the losses of seed 42")
    near_by_chance = target(metric="loss", step=50, seeds={"42": {"50": 3.6938}}, tolerance=5e-3)
    assert judge(near_by_chance, [Measured(8, {"50": 3.6939})]) is None


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


def test_a_run_passes_only_if_everything_does_and_a_score_is_judged() -> None:
    def of(*verdicts: Verdict, metric: str = "eval_loss") -> Verdict:
        return overall([Outcome(target(metric=metric, low=0), verdict) for verdict in verdicts])

    assert of(Verdict.PASS, Verdict.PASS) is Verdict.PASS
    assert of(Verdict.PASS, Verdict.CANNOT_TELL) is Verdict.CANNOT_TELL
    assert of(Verdict.PASS, Verdict.CANNOT_TELL, Verdict.FAIL) is Verdict.FAIL
    assert of() is Verdict.CANNOT_TELL
    assert of(Verdict.PASS, metric="num_steps") is Verdict.CANNOT_TELL
    assert of(Verdict.FAIL, metric="num_steps") is Verdict.FAIL
    assert all(any(t.is_score for t in read_targets(read_recipe(name)["targets"])) for name in recipe_names())


def test_other_runs_take_the_references_place_with_the_recipes_margins() -> None:
    targets = [
        target(value=1.0, margin=0.2, step=5),
        target(metric="eval_rouge2", low=3),
        target(metric="num_steps", value=7, tolerance=0),
        target(metric="loss", seeds={"42": {"1": 6.0}}, tolerance=2e-3),
    ]

    def run(seed: int, value: float) -> Callable[[Target], Measured]:
        values = {"eval_loss": {"": value}, "loss": {"1": 6.0 + 0.01 * seed}}
        return lambda goal: Measured(seed, values.get(goal.metric, {}))

    moved, floor, count, early = against(targets, [run(1, 2.0), run(2, 2.2), run(3, 2.4)])
    assert moved.value == pytest.approx(2.2)
    assert moved.standard_deviation == pytest.approx(0.2)
    assert (moved.runs, moved.margin, moved.freedom) == (3, 0.2, 2)
    assert (floor, count) == (targets[1], targets[2]), "counts and floors stay"
    assert early.seeds == {str(seed): {"1": 6.0 + 0.01 * seed} for seed in (1, 2, 3)}, "shared seeds are paired"
    with pytest.raises(InputError, match="--against: takes runs that have"):
        against(targets, [lambda goal: Measured(1, {})])


def test_what_a_recipe_knows_of_the_spread_is_pooled_with_the_other_runs() -> None:
    goal = target(value=1.0, margin=0.2, standard_deviation=0.1, freedom=33, runs=8)
    (moved,) = against([goal], [lambda _: Measured(1, {"": 2.0}), lambda _: Measured(2, {"": 2.4})])
    # By hand: (33 x 0.01 + 1 x 0.08) / 34.
    assert moved.standard_deviation == pytest.approx(math.sqrt(0.41 / 34))
    assert (moved.freedom, moved.runs) == (34, 2)


def test_a_recipes_row_may_say_more_than_a_target_knows() -> None:
    (goal,) = read_targets([{"metric": "eval_loss", "low": 1, "source": "here", "comment": "for people"}])
    assert goal == target(low=1, source="here")
