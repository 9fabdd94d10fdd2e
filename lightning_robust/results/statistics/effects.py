"""Effects of a defense, and accuracies, with intervals over seeds and items."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lightning_robust.errors import RobustError
from lightning_robust.results.statistics.crossed import Floats, Ints, crossed_mean, split

Bools = NDArray[np.bool_]
Method = Literal["studentised", "bootstrap"]
Pairs = tuple[ArrayLike, ArrayLike]
"""``(treated, baseline)``, each ``(seeds, items)``, paired."""

MIN_ITEMS = 30
"""Fewer items get no interval: below, coverage was not shown."""

_LEAST_SKILL = 0.1


class StatisticsError(RobustError, ValueError):
    """Values from which nothing can be estimated."""


class Differences(NamedTuple):
    """Paired differences ``(seeds, items)`` and the group of each item ``(items,)``; None for one group."""

    values: Floats
    strata: Ints | None


@dataclass(frozen=True)
class Effect:
    """A difference (or an accuracy) with its interval, as fractions: 0.01 is one percentage point.

    Args:
        delta: The estimate.
        low: Lower end; NaN where no interval can be stood behind.
        high: Upper end; the same.
        p_value: Two-sided, of no difference; NaN for accuracies and without an interval.
        num_seeds: Pairs of training runs.
        num_items: Items that all runs answered.
        standard_error: NaN without an interval.
        reason: Why there is no interval; empty where there is one.
    """

    delta: float
    low: float
    high: float
    p_value: float
    num_seeds: int
    num_items: int
    standard_error: float = math.nan
    reason: str = ""

    @property
    def scope(self) -> str:
        """What the interval is about: one training run says nothing of the method's other seeds."""
        return "this training run" if self.num_seeds == 1 else "the method"

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def effect(
    treated: ArrayLike,
    baseline: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    confidence: float = 0.95,
    method: Method = "studentised",
    resamples: int = 2000,
    seed: int = 0,
) -> Effect:
    """Return how much more often ``treated`` is right than ``baseline``, paired by seed and item.

    With several seeds the interval is about the method: seeds and items are both samples. The seeds' part is
    referred to Student's t, the items' to the normal distribution, and the interval to their sum
    (`lightning_robust.results.statistics.crossed`); it covers 95 % from two seeds on, which a bootstrap that
    resamples two to five seeds does not (benchmarks/README.md). With one seed the interval is about this training
    run, and ``p_value`` is McNemar's exact one where answers are right or wrong.

    Args:
        treated: ``(seeds, items)`` or ``(items,)``: right or wrong, or shares between 0 and 1.
        baseline: The same shape; row by row the same seed, column by column the same item.
        strata: ``(items,)`` names of groups of items that count equally, such as environments.
        confidence: Of the interval.
        method: ``bootstrap`` resamples seeds and items with replacement and takes percentiles; for comparison.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        StatisticsError: If shapes differ, or values are missing or outside of [0, 1].

    Example:
        >>> found = effect([[1] * 60 + [0] * 40] * 3, [[1] * 50 + [0] * 50] * 3)
        >>> f"{found.delta:.2f} [{found.low:.2f}, {found.high:.2f}]"
        '0.10 [0.04, 0.16]'
    """
    values, groups = differences(treated, baseline, strata)
    found = _estimate(values, groups, confidence, method, resamples, seed)
    if found.known and len(values) == 1 and groups is None and np.isin(values, (-1.0, 0.0, 1.0)).all():
        return replace(found, p_value=mcnemar(values[0] > 0, values[0] < 0))
    return found


def differences(treated: ArrayLike, baseline: ArrayLike, strata: ArrayLike | None = None) -> Differences:
    """Return paired differences, checked.

    Raises:
        StatisticsError: If shapes differ, or values are missing or outside of [0, 1].
    """
    after, before = _matrix(treated, "treated"), _matrix(baseline, "baseline")
    if after.shape != before.shape:
        raise StatisticsError(
            f"Expected `treated` and `baseline` of one shape (seeds, items), but got {after.shape} and "
            f"{before.shape}. Keep the seeds and items that both have."
        )
    return Differences(after - before, None if strata is None else _codes(strata, after.shape[1]))


def accuracy(correct: ArrayLike, *, strata: ArrayLike | None = None, confidence: float = 0.95) -> Effect:
    """Return an accuracy with its interval over seeds and items, as an `Effect` whose ``delta`` it is.

    One seed and no strata: Wilson's interval (1927), of this training run.

    Args:
        correct: ``(seeds, items)`` or ``(items,)``: right or wrong, or shares between 0 and 1.
        strata: ``(items,)`` names of groups of items that count equally.
        confidence: Of the interval.

    Raises:
        StatisticsError: If values are missing or outside of [0, 1].
    """
    values = _matrix(correct, "correct")
    groups = None if strata is None else _codes(strata, values.shape[1])
    found = _estimate(values, groups, confidence, "studentised", 0, 0)
    low, high = found.low, found.high
    if found.known and len(values) == 1 and groups is None:
        low, high = wilson(found.delta, values.shape[1], confidence)
    # NaN stays, as it comes first.
    return replace(found, low=max(low, 0.0), high=min(high, 1.0), p_value=math.nan)


def wilson(share: float, num_items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a share of ``num_items``."""
    z = float(stats.norm.isf((1 - confidence) / 2))
    centre = (share + z**2 / (2 * num_items)) / (1 + z**2 / num_items)
    half = z * math.sqrt(share * (1 - share) / num_items + z**2 / (4 * num_items**2)) / (1 + z**2 / num_items)
    return max(0.0, centre - half), min(1.0, centre + half)


def is_constant(correct: ArrayLike, labels: ArrayLike) -> bool:
    """Return whether answers say next to nothing about the labels.

    The mean over K labels of the share of a label's items that are right (balanced accuracy) is 1 / K for a constant
    answer, as for any that does not depend on the text, and 1 for right ones. Answers are called constant below a
    tenth of that way. No attack can change a constant answer, so that such a model seems robust.

    Args:
        correct: ``(items,)`` right or wrong.
        labels: ``(items,)``; of one label only nothing can be said.
    """
    right = np.asarray(correct, dtype=np.float64)
    names, codes = np.unique(np.asarray(labels), return_inverse=True)
    if len(names) < 2:
        return False
    balanced = float((np.bincount(codes, right) / np.bincount(codes)).mean())
    guess = 1 / len(names)
    return (balanced - guess) / (1 - guess) < _LEAST_SKILL


def mcnemar(treated: ArrayLike, baseline: ArrayLike) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947): of the items that changed, as many each way.

    Args:
        treated: ``(items,)`` right or wrong.
        baseline: ``(items,)`` right or wrong.
    """
    after, before = np.asarray(treated, dtype=bool), np.asarray(baseline, dtype=bool)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: ArrayLike) -> Floats:
    """Return Holm's adjusted p-values (1979): rejecting those below α errs anywhere with probability α at most.

    Args:
        p_values: Any shape; NaN marks what was not tested, and does not count.
    """
    given = np.asarray(p_values, dtype=np.float64)
    flat = given.ravel()
    tested = np.flatnonzero(~np.isnan(flat))
    order = tested[np.argsort(flat[tested], kind="stable")]
    adjusted = np.full(flat.shape, math.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(flat[order] * factors))
    return adjusted.reshape(given.shape)


def _estimate(
    values: Floats,
    groups: Ints | None,
    confidence: float,
    method: Method,
    resamples: int,
    seed: int,
) -> Effect:
    if not 0 < confidence < 1:
        raise StatisticsError(f"Expected `confidence` to be between 0 and 1, but got {confidence}.")
    num_seeds, num_items = values.shape
    smallest = num_items if groups is None else int(np.bincount(groups).min(initial=num_items))
    reason = _too_little(num_seeds, smallest)
    found = crossed_mean(values, groups) if smallest and num_seeds else None
    delta = math.nan if found is None else found.mean
    if reason or found is None:
        return Effect(delta, math.nan, math.nan, math.nan, num_seeds, num_items, reason=reason)
    if method == "bootstrap":
        low, high = _bootstrap(values, groups, confidence, resamples, seed)
    else:
        half = found.half_width(confidence)
        low, high = delta - half, delta + half
    return Effect(
        delta,
        max(low, -1.0),
        min(high, 1.0),
        found.p_value(),
        num_seeds,
        num_items,
        standard_error=found.standard_error,
    )


def _too_little(num_seeds: int, num_items: int) -> str:
    if num_seeds == 0:
        return "no run to compare with"
    if num_items < MIN_ITEMS:
        return f"{num_items} items are too few for an interval ({MIN_ITEMS} are needed)"
    return ""


def _bootstrap(
    values: Floats, strata: Ints | None, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Return percentiles of means over seeds and items that are both drawn with replacement."""
    rng = np.random.default_rng(seed)
    num_seeds = len(values)
    groups = split(values, strata)
    means = np.zeros(resamples)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=resamples) / num_seeds
    for group in groups:
        size = group.shape[1]
        items = rng.multinomial(size, np.full(size, 1 / size), size=resamples) / size
        means += np.einsum("rs,si,ri->r", seeds, group, items, optimize=True) / len(groups)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _matrix(values: ArrayLike, name: str) -> Floats:
    found: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    found = found[np.newaxis] if found.ndim == 1 else found
    if found.ndim != 2:
        raise StatisticsError(
            f"Expected `{name}` to be an array (seeds, items), but got {found.ndim} dimensions."
        )
    if not ((found >= 0) & (found <= 1)).all():
        raise StatisticsError(
            f"Expected `{name}` to be right or wrong, or between 0 and 1, everywhere; items without an answer "
            "count as wrong."
        )
    return found


def _codes(strata: ArrayLike, num_items: int) -> Ints:
    codes = np.unique(np.asarray(strata), return_inverse=True)[1]
    if codes.shape != (num_items,):
        raise StatisticsError(
            f"Expected one stratum for each of {num_items} items, but got shape {codes.shape}."
        )
    return codes.astype(np.int64)
