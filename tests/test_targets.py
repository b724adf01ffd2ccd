"""What can be concluded from so many runs: the rates of wrong verdicts are those that are promised."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.errors import InputError
from repro.recipes import equivalence, read_recipe, recipe_names
from repro.recipes.equivalence import FALSE_FAILS, FALSE_PASSES, HOPELESS, LOOKING, Reference, Verdict, compare, pooled
from repro.recipes.targets import Measured, Outcome, Target, against, judge, judge_statistically, overall, read_targets

DRAWS = 4000
SPREAD = 0.01
MARGIN = 4 * SPREAD
# Four standard errors of a rate that is measured with so many draws.
SLACK = 4 * math.sqrt(0.05 * 0.95 / DRAWS)


def target(**fields):
    return Target(**{"metric": "eval_loss", "source": "a test", **fields})


def rates_of(*, difference=0.0, seeds, runs, margin=MARGIN, known=0, false_fails=FALSE_FAILS):
    """Draw seeds, and a reference of `runs` runs, whose true means differ; give the share of each verdict.

    Args:
        known: degrees of freedom of a spread that is known beforehand.
    """
    random = np.random.default_rng(seeds * 100 + runs)
    reference = random.normal(2.0, SPREAD, (DRAWS, runs))
    values = random.normal(2.0 + difference, SPREAD, (DRAWS, seeds))
    groups = [(SPREAD * np.sqrt(random.chisquare(known, DRAWS) / known), known)] if known else []
    groups += [(reference.std(1, ddof=1), runs - 1)] if runs > 1 else []
    spread, freedom = pooled(*groups)
    rates = {"false_fails": false_fails, "false_passes": FALSE_PASSES}
    of = Reference(reference.mean(1), runs, spread, freedom)
    places = compare(values, of, margin=margin, widest=4 * margin, **rates).places
    return {verdict: np.mean(places == place) for place, verdict in enumerate(equivalence.WORST_FIRST)}


def verdict_of(goal, values, false_fails=FALSE_FAILS):
    rates = {"false_fails": false_fails, "false_passes": FALSE_PASSES}
    return judge_statistically(goal, values, range(len(values)), **rates)


@pytest.mark.parametrize(("seeds", "runs", "known"), [*itertools.product([2, 3, 16], [2, 3, 16], [0, 33])])
def test_a_difference_of_a_margin_passes_once_in_twenty_at_most_and_fails_hardly_ever(seeds, runs, known):
    for difference in (-MARGIN, MARGIN):  # too good is a miss as well
        found = rates_of(difference=difference, seeds=seeds, runs=runs, known=known)
        assert found[Verdict.PASS] <= FALSE_PASSES + SLACK
        assert found[Verdict.FAIL] <= FALSE_FAILS + SLACK / 2
    assert rates_of(seeds=seeds, runs=runs, known=known)[Verdict.FAIL] <= FALSE_FAILS + SLACK / 2


@pytest.mark.parametrize(("seeds", "runs"), [(1, 8), (1, 3), (8, 1), (3, 1)])
@pytest.mark.parametrize("known", [0, 33])
def test_a_single_run_on_either_side_fails_as_seldom_as_is_said_if_nothing_differs(seeds, runs, known):
    for false_fails, slack in ((FALSE_FAILS, SLACK / 2), (0.05, SLACK)):
        found = rates_of(seeds=seeds, runs=runs, known=known, false_fails=false_fails)
        assert found[Verdict.FAIL] == pytest.approx(false_fails, abs=slack)
    # By hand: t(99.5 %, 4 degrees) is 4.604.
    assert equivalence.prediction_reach(1.0, 4, 5, 0.01) == pytest.approx(4.604 * math.sqrt(1.2), abs=1e-3)


def test_the_verdicts_come_when_there_are_enough_seeds():
    assert rates_of(seeds=5, runs=5)[Verdict.PASS] > 0.99
    other = rates_of(difference=3 * MARGIN, seeds=5, runs=5)
    assert other[Verdict.FAIL] > 0.9
    assert other[Verdict.PASS] == 0
    assert rates_of(seeds=2, runs=1)[Verdict.CANNOT_TELL] > 0.3


@pytest.mark.parametrize("runs", [2, 3])
def test_a_band_that_is_wider_than_the_margins_bear_tells_nothing(runs):
    """Five margins off, one new run against two or three old ones, whose band is up to 545 standard deviations wide."""
    found = rates_of(difference=5 * 0.013, seeds=1, runs=runs, margin=0.013, false_fails=FALSE_FAILS / 7)
    assert found[Verdict.PASS] < 0.03


def test_adding_runs_until_they_pass_is_paid_for():
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
            ever |= compare(new[:, :count], of, margin=margin, widest=1.0, **rates).places == equivalence.PASS
    assert passed[1.0].mean() > 0.12
    assert passed[LOOKING].mean() <= FALSE_PASSES + SLACK
    runs = [Measured(seed, {"": value}) for seed, value in enumerate(random.normal(0.0, SPREAD, 5))]
    goal = target(value=0.0, standard_deviation=SPREAD, runs=8, margin=1.6 * SPREAD)
    named, looked = (judge(goal, runs, named=named).interval for named in (True, False))
    assert np.diff(named) < np.diff(looked)


KNOWN = {"value": 2.0, "standard_deviation": SPREAD, "freedom": 33, "runs": 8}
OF_TWO = {"value": 2.0, "standard_deviation": SPREAD, "runs": 2, "margin": 0.013}
OF_ONE = {"value": 1.0, "margin": 0.1}
PUBLISHED_RUN = {"value": 14.64, "margin": 0.3, "widest": 0.9}  # whose spread is not known
AROUND = np.array([14.6, 14.75, 14.5, 14.62, 14.7, 14.58, 14.66, 14.71])


@pytest.mark.parametrize(
    ("goal", "values", "verdict", "said"),
    [
        ({**KNOWN, "margin": 0.02}, [1.998, 2.004, 1.991, 2.012, 2.001], "PASS", "equivalent to 8 reference runs"),
        ({**KNOWN, "margin": 0.02}, [1.998, 2.004, 1.991, 2.012, 2.3], "FAIL", "seed 4 by itself"),
        ({**KNOWN, "margin": 0.05}, [1.95, 2.05, 1.955, 2.045], "CANNOT TELL", "differ from one another"),
        (OF_TWO, [2.0], "CANNOT TELL", "tells too little"),
        (PUBLISHED_RUN, AROUND, "PASS", "consistent with the published run"),
        (PUBLISHED_RUN, AROUND + 1, "FAIL", ""),
        (PUBLISHED_RUN, AROUND[:2], "CANNOT TELL", "tells too little"),
        # One against one: no spread is known, and only what is hopelessly far fails.
        *((OF_ONE, [value], "CANNOT TELL", "no spread is known") for value in (1.01, 1.9)),
        *((OF_ONE, [value], "FAIL", f"more than {HOPELESS} margins") for value in (2.1, -0.1)),
        # Runs that do not differ at all are not several.
        (OF_ONE, [1.0, 1.0], "CANNOT TELL", ""),
        (OF_ONE, [3.0, 3.0], "FAIL", ""),
        *((OF_ONE, [value, 1.0], "FAIL", "not finite") for value in (math.nan, math.inf)),
    ],
)
def test_several_values_come_to_a_verdict_that_says_why(goal, values, verdict, said):
    outcome = verdict_of(target(**goal), list(values), FALSE_FAILS / 3)
    assert outcome.verdict == verdict
    assert said in f"{outcome.reason} {outcome.claim}"


def test_the_message_says_how_many_seeds_would_do():
    values = [36.9, 35.6, 37.1, 36.7, 36.9]
    reason = verdict_of(target(value=36.2, standard_deviation=0.69, freedom=33, runs=8, margin=0.9), values).reason
    number = int(reason.split()[0])
    assert reason == f"{number} of each would tell with 80%, if nothing differs"
    spread, freedom = pooled((np.std(values, ddof=1), 4), (0.69, 33))
    random = np.random.default_rng(0)
    passed = []
    for count in (number, number - 2):
        new, old = random.normal(0, spread, (2, DRAWS, count))
        of = Reference(old.mean(1), count, float(spread), freedom)
        places = compare(new, of, margin=0.9, widest=9.0, false_fails=1e-4, false_passes=FALSE_PASSES).places
        passed.append((places == equivalence.PASS).mean())
    assert passed[0] > 0.78
    assert passed[1] < 0.82


def test_all_targets_of_a_recipe_together_fail_a_right_run_as_seldom_as_is_said():
    failed = [rates_of(seeds=1, runs=5 + number, false_fails=FALSE_FAILS / 8)[Verdict.FAIL] for number in range(8)]
    assert sum(failed) <= FALSE_FAILS + SLACK / 2


def test_what_is_printed_is_what_decided_and_no_band_leaves_what_is_possible():
    goal = target(metric="eval_count_accuracy", value=0.9, standard_deviation=0.04, freedom=33, runs=8, margin=0.065)
    inside, outside = verdict_of(goal, [0.99]), verdict_of(goal, [0.70])
    low, high = map(float, inside.wanted.split(" to "))
    assert 0.70 < low < high == 1.0
    assert (inside.verdict, outside.verdict) == ("PASS", "FAIL")
    assert inside.claim == "consistent with 8 reference runs"
    assert verdict_of(goal, [0.9, 0.91, 0.89, 0.9, 0.92, 0.88]).wanted == "0.9 ± 0.065"
    bounds = [target(low=1), target(high=2), target(low=1, high=2)]
    assert [bound.wanted for bound in bounds] == ["at least 1", "at most 2", "1 to 2"]


@given(low=st.just(-math.inf) | st.floats(-5, 5), high=st.just(math.inf) | st.floats(-5, 5), value=st.floats(-9, 9))
def test_bounds_are_kept_by_what_lies_between_them(low, high, value):
    outcome = judge(target(low=low, high=high), [Measured(0, {"": value})])
    assert (outcome.verdict == "PASS") is (low <= value <= high)


STEPS = {"1": 3e-5, "10": 2.99e-5}
RATES = {"metric": "learning_rate", "values": STEPS, "tolerance": 1e-9}
LOSSES = {"metric": "loss", "seeds": {"42": {"1": 6.0, "2": 5.9}}, "tolerance": 2e-3}
ONE_LOSS = {"metric": "loss", "step": 50, "seeds": {"42": {"50": 3.6938}}, "tolerance": 5e-3}
FINGERPRINT = {"metric": "train_fingerprint", "fingerprint": "e463e88b07cdb93a"}
NAN = math.nan


@pytest.mark.parametrize(
    ("goal", "runs", "verdict"),
    [
        # Every run keeps to bounds and values.
        *((goal, [1.0, 3.0], "FAIL") for goal in ({"low": 0, "high": 2}, {"value": 1.0, "tolerance": 0.5})),
        *((goal, [NAN], "FAIL") for goal in ({"low": 0.5, "high": 2.0}, {"value": 1.0, "tolerance": 0.1})),
        ({"values": dict.fromkeys("01234", 1.0), "margin": 0.1}, [{**dict.fromkeys("01234", 1.0), "1": NAN}], "FAIL"),
        # What was not measured never passes.
        *((goal, [{}], "CANNOT TELL") for goal in ({"low": 0}, {"value": 1.0, "tolerance": 1})),
        *((goal, [{}], "CANNOT TELL") for goal in ({"value": 1.0, "margin": 1}, {"values": STEPS, "margin": 1})),
        # Values by step fail at once, and pass when all are there.
        (RATES, [{"1": 3e-5}], "CANNOT TELL"),
        (RATES, [{"1": 3.3e-5}], "FAIL"),
        (RATES, [STEPS], "PASS"),
        (RATES, [{**STEPS, "10": 3e-5}], "FAIL"),
        # A seed's own values bind runs of that seed alone, and belong to it; of one step it may be chance.
        (LOSSES, {42: {"1": 6.0, "2": 5.9}}, "PASS"),
        (LOSSES, {42: {"1": 6.1}}, "FAIL"),
        (LOSSES, {7: {"1": 5.0, "2": 4.9}}, None),
        (LOSSES, {8: {"1": 6.00001, "2": 5.90002}}, "FAIL: seed 8 has the losses of seed 42"),
        (ONE_LOSS, {8: {"50": 3.6939}}, None),
        # A fingerprint is had to the letter.
        (FINGERPRINT, ["e463e88b07cdb93a"], "PASS"),
        *((FINGERPRINT, [text], f"FAIL: found {text}") for text in ("e463e88b07cdb93b", None)),
    ],
)
def test_what_each_run_is_held_to_decides_by_itself(goal, runs, verdict):
    """Runs are values alone, values by step, or the text of a fingerprint; by seed, where that matters."""
    measured = []
    for seed, found in runs.items() if isinstance(runs, dict) else enumerate(runs):
        values = found if isinstance(found, dict) else {"": found}
        measured.append(Measured(seed, text=found) if goal is FINGERPRINT else Measured(seed, values))
    outcome = judge(target(**goal), measured)
    told, _, reason = (verdict or "").partition(": ")
    assert (outcome.verdict if outcome else "") == told
    assert not reason or outcome.reason == reason


PUBLISHED = {str(10 * n): 3.2 - 0.05 * n for n in range(1, 13)}
PATH = {"metric": "loss", "values": PUBLISHED, "margin": 0.1}


def losses(offset, noise=(0.02, -0.02) * 6):
    return {step: loss + offset + jitter for (step, loss), jitter in zip(PUBLISHED.items(), noise, strict=True)}


@pytest.mark.parametrize(
    ("offset", "verdict"), [(0.0, "PASS"), (0.05, "PASS"), (0.5, "FAIL"), (-0.5, "FAIL"), (0.1, "CANNOT TELL")]
)
def test_a_trajectory_is_judged_by_its_mean_distance(offset, verdict):
    assert judge(target(**PATH), [Measured(42, losses(offset))]).verdict == verdict
    if verdict != "CANNOT TELL":
        runs = [Measured(seed, losses(offset + 0.01 * (seed - 2))) for seed in range(5)]
        assert judge(target(**PATH, widest=0.3), runs).verdict == verdict


def stopped(offset, draws):
    """At how many points a trajectory off by so much is found to fail, over all looks; 0 where it never is."""
    random, found = np.random.default_rng(0), []
    for _ in range(draws):
        seen = list(losses(offset, random.normal(0, 0.07, 12)).items())
        looks = [judge(target(**PATH), [Measured(42, dict(seen[:count]))]) for count in range(1, 13)]
        found.append(min((count for count, look in enumerate(looks, 1) if look.verdict == "FAIL"), default=0))
    return found


def test_the_watch_stops_one_honest_run_in_a_hundred_at_most_and_a_wrong_one_in_time():
    for honest in (0.0, 0.08):
        assert sum(count > 0 for count in stopped(honest, 400)) <= 4 + 8  # four standard errors above
    assert all(0 < count <= 12 for count in stopped(0.3, 100)), "by step 120"
    assert set(stopped(3.0, 20)) == {4}, "what is hopeless is stopped early; fewer points are no trajectory"


def test_a_run_passes_only_if_everything_does_and_a_score_is_judged():
    passes, fails, unknown = Verdict.PASS, Verdict.FAIL, Verdict.CANNOT_TELL
    for metric, verdicts, expected in (
        ("eval_loss", [passes, passes], passes),
        ("eval_loss", [passes, unknown], unknown),
        ("eval_loss", [passes, unknown, fails], fails),
        ("eval_loss", [], unknown),
        ("num_steps", [passes], unknown),
        ("num_steps", [fails], fails),
    ):
        assert overall([Outcome(target(metric=metric, low=0), verdict) for verdict in verdicts]) is expected
    assert all(any(t.is_score for t in read_targets(read_recipe(name)["targets"])) for name in recipe_names())


def test_other_runs_take_the_references_place_with_the_recipes_margins():
    targets = [
        target(value=1.0, margin=0.2, step=5),
        target(metric="eval_rouge2", low=3),
        target(metric="num_steps", value=7, tolerance=0),
        target(metric="loss", seeds={"42": {"1": 6.0}}, tolerance=2e-3),
    ]

    def run(seed, value):
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
    # What the recipe knows of the spread is pooled with the other runs', by hand: (33 x 0.01 + 1 x 0.08) / 34.
    goal = target(value=1.0, margin=0.2, standard_deviation=0.1, freedom=33, runs=8)
    (moved,) = against([goal], [run(1, 2.0), run(2, 2.4)])
    assert moved.standard_deviation == pytest.approx(math.sqrt(0.41 / 34))
    assert (moved.freedom, moved.runs) == (34, 2)


def test_a_recipes_row_may_say_more_than_a_target_knows():
    (goal,) = read_targets([{"metric": "eval_loss", "low": 1, "source": "here", "comment": "for people"}])
    assert goal == target(low=1, source="here")
