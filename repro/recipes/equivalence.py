"""What runs with different seeds say about a reference that varies too: the statistics of a verdict.

Of n new runs and m reference runs, with the difference d of their means, the pooled variance s² of both groups and of
what a recipe knows of the spread, f degrees of freedom together, and SE = s sqrt(1 / n + 1 / m):

    n, m > 1   *equivalent*: two one-sided t-tests against a margin that was fixed before the runs.
               PASS         d ± t(1 - FALSE_PASSES, f) SE lies within the margin
               FAIL         d ± t(1 - FALSE_FAILS / 2, f) SE lies beyond it, or one run lies beyond it by itself
    n or m 1   *consistent*: d ± t(1 - FALSE_FAILS / 2, f) SE is the prediction interval of the single run.
               PASS         it holds 0, and is no wider than the recipe can bear
               FAIL         it does not hold 0
    CANNOT TELL otherwise.

A true difference of a margin passes as equivalent at most once in 20, one within the margin fails at most once in a
hundred over all of a recipe's targets. Both rates are for a number of runs that was named before the first of them;
who looks after every run, and adds runs until they pass, pays for it with `LOOKING`. Both ends count: a run that is
too good does not reproduce either. `benchmarks/verdict_rates.py` simulates all of it.

Source: D. J. Schuirmann, A comparison of the two one-sided tests procedure and the power approach (1987).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import scipy  # whose `stats` take long to import, and are when they are first used

FALSE_PASSES = 0.05
FALSE_FAILS = 0.01
LOOKING = 0.2  # share of both rates for each look, so that all looks at up to 16 runs together keep to them
HOPELESS = 10  # margins, beyond which one run fails against one: there is no statistics for them
POWER = 0.8
MOST_SEEDS = 200  # of which it is said how many would tell


class Verdict(StrEnum):
    """What a target or a run comes to."""

    PASS = "PASS"
    FAIL = "FAIL"
    CANNOT_TELL = "CANNOT TELL"


# The least of these places is the verdict of several targets.
WORST_FIRST = (Verdict.FAIL, Verdict.CANNOT_TELL, Verdict.PASS)
FAIL, CANNOT_TELL, PASS = range(3)


@dataclass(frozen=True)
class Reference:
    """What new runs are held against; each field may be an array over simulated draws."""

    mean: Any  # of the reference runs
    runs: float  # how many they are; 1 for a published run, infinite for a fixed value
    spread: Any = 0.0  # standard deviation from run to run, known beforehand; 0 where nothing is known
    freedom: int = 0  # its degrees of freedom


@dataclass(frozen=True)
class Comparison:
    """Arrays over the draws, or scalars."""

    places: Any  # of the verdicts in `WORST_FIRST`
    difference: Any  # of the means
    reach: Any  # half the width of the interval around the difference that decides about PASS
    outlying: Any  # [..., n], which runs by themselves lie beyond the margin
    uneven: Any  # whether the new runs differ from one another more than the known spread explains


def pooled(*groups: tuple[Any, int]) -> tuple[Any, int]:
    """Pool (standard deviation, degrees of freedom) of several groups."""
    freedom = sum(count for _, count in groups)
    return np.sqrt(sum(count * np.square(spread) for spread, count in groups) / max(freedom, 1)), freedom


def compare(
    values: Any, reference: Reference, *, margin: float, widest: float, false_fails: float, false_passes: float
) -> Comparison:
    """Hold runs against a reference.

    Args:
        values: float64[..., n], what each of n runs measured.
        margin: the largest difference that does not matter.
        widest: half the width that the prediction interval of a single run may have.
        false_fails, false_passes: of this target alone.
    """
    values = np.asarray(values, np.float64)
    count, known = values.shape[-1], reference.freedom > 0
    difference = values.mean(-1) - reference.mean
    with np.errstate(invalid="ignore"):  # of what is not finite
        own = values.std(-1, ddof=1) if count > 1 else np.zeros_like(difference)
    spread, freedom = pooled((own, count - 1), (reference.spread, reference.freedom))
    distance = np.abs(difference)
    outlying, uneven = np.zeros(values.shape, bool), np.zeros(difference.shape, bool)
    if known and count > 1:
        uneven = own > reference.spread * math.sqrt(scipy.stats.f.ppf(1 - false_fails, count - 1, reference.freedom))
    if freedom == 0:
        reach = np.full_like(distance, np.inf)
        places = np.where(distance > HOPELESS * margin, FAIL, CANNOT_TELL)
    elif count == 1 or reference.runs == 1:
        reach = prediction_reach(spread, freedom, max(count, reference.runs), false_fails)
        places = np.where(distance > reach, FAIL, np.where((reach > widest) | uneven, CANNOT_TELL, PASS))
    else:
        error = spread * math.sqrt(1 / count + 1 / reference.runs)
        reach = scipy.stats.t.ppf(1 - false_passes, freedom) * error
        beyond = distance - scipy.stats.t.ppf(1 - false_fails / 2, freedom) * error > margin
        if known:
            of_one = false_fails / 2 / count
            limit = margin + prediction_reach(reference.spread, reference.freedom, reference.runs, of_one)
            outlying = np.abs(values - np.asarray(reference.mean)[..., None]) > np.asarray(limit)[..., None]
        passes = (distance + reach < margin) & ~uneven
        places = np.where(beyond | outlying.any(-1), FAIL, np.where(passes, PASS, CANNOT_TELL))
    # Runs that do not differ at all are not several runs.
    places = np.where((spread == 0) & (places == PASS), CANNOT_TELL, places)
    places = np.where(np.isfinite(values).all(-1), places, FAIL)
    return Comparison(places, difference, reach, outlying, uneven)


def prediction_reach(spread: Any, freedom: int, runs: float, false_fails: float) -> Any:
    """How far from the mean of `runs` runs one further run lies at most, but for a share `false_fails` of them."""
    return scipy.stats.t.ppf(1 - false_fails / 2, freedom) * spread * math.sqrt(1 + 1 / runs)


def seeds_that_would_tell(spread: float, freedom: int, *, margin: float, false_passes: float) -> int | None:
    """Find how many runs on either side would be found equivalent with `POWER`, if nothing differs.

    Judged by what is known of the spread by now; None if it takes more than `MOST_SEEDS`.
    """
    for count in range(2, MOST_SEEDS + 1):
        error = spread * math.sqrt(2 / count)
        reach = scipy.stats.t.ppf(1 - false_passes, max(freedom, 2 * count - 2)) * error
        if error == 0 or 2 * scipy.stats.norm.cdf((margin - reach) / error) - 1 >= POWER:
            return count
    return None
