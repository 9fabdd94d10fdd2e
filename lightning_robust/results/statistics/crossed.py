"""Intervals for means over seeds and items, both of which are samples."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class CrossedMean(NamedTuple):
    """A mean over seeds and items, and how far it may be off.

    Args:
        mean: Of all values; with strata the mean of the strata's means.
        seed_error: Standard error from few seeds, whose reference is Student's t with ``df`` degrees of freedom; 0
            for one seed. It holds the noise of single answers too.
        item_error: Standard error from a sample of items, which is close to normal.
        df: Seeds - 1.
    """

    mean: float
    seed_error: float
    item_error: float
    df: int

    @property
    def standard_error(self) -> float:
        """Both errors together."""
        return math.hypot(self.seed_error, self.item_error)

    def half_width(self, confidence: float) -> float:
        """Return how far the interval reaches to either side."""
        return tail_quantile(1 - confidence, self.seed_error, self.item_error, self.df)

    def p_value(self, null: float = 0.0) -> float:
        """Return the probability, if the true mean is ``null``, of a mean at least as far from it; two-sided."""
        return tail(abs(self.mean - null), self.seed_error, self.item_error, self.df)


class Components(NamedTuple):
    """Variances of one item's value: between seeds, between items, and the rest (a single answer's noise)."""

    seed: float
    item: float
    residual: float


def crossed_mean(values: Floats, strata: Ints | None = None) -> CrossedMean:
    """Return the mean of values that are crossed by seed and item, with its two errors.

    The variance of such a mean is that of a two-way random-effects layout, estimated by mean squares (Searle,
    Casella and McCulloch 1992, chapter 4). It is kept in two parts because their accuracy differs: a handful of
    seeds, hundreds of items.

    Each item counts for the variance as if two more had differed by a half, one up and one down, after Agresti
    and Min (2005, doi:10.1002/sim.1781): without it a hundred equal answers would prove equality. Shares of right
    answers are multiples of 1 / items, so that two seeds may agree by chance: the variance of what this rounds off
    (Sheppard 1898) is added, as a spread of exactly 0 would turn a heavy tail into none.

    Args:
        values: ``(seeds, items)``, between -1 and 1.
        strata: ``(items,)`` numbers of groups of items that count equally; by default one.
    """
    num_seeds = len(values)
    groups = split(values, strata)
    weight = 1 / len(groups)
    by_seed = seed_means(values, strata)
    item_variance = sum(weight**2 * _item_variance(group) for group in groups)
    pseudo = sum((weight / (group.shape[1] + 2)) ** 2 for group in groups) / num_seeds
    seed_variance = float(by_seed.var(ddof=1)) + rounding(values, strata) if num_seeds > 1 else 0.0
    return CrossedMean(
        mean=float(by_seed.mean()),
        seed_error=math.sqrt(seed_variance / num_seeds),
        item_error=math.sqrt(max(item_variance, 0.0) + pseudo),
        df=num_seeds - 1,
    )


def rounding(values: Floats, strata: Ints | None = None) -> float:
    """Return the variance of what is rounded off from a seed's mean; see `crossed_mean`."""
    groups = split(values, strata)
    return float(sum((1 / len(groups) / group.shape[1]) ** 2 for group in groups)) / 12


def components(values: Floats, strata: Ints | None = None, *, guard: float = 0.5) -> Components:
    """Return the variance components of ``values (seeds, items)``, none below 0.

    With strata they are those of an item of the mean over strata, if further items are spread as these are. With one
    seed the rest cannot be told from the items, and the seeds' is NaN.

    Args:
        values: ``(seeds, items)``.
        strata: ``(items,)`` numbers of groups of items that count equally.
        guard: Probability that the seeds' true variance is no larger than the one returned. A few seeds often
            happen to agree, so that plans need more than 0.5 (Browne 1995, doi:10.1002/sim.4780141709).
    """
    num_seeds, num_items = values.shape
    groups = split(values, strata)
    weight = 1 / len(groups)
    items = num_items * sum(weight**2 * _item_variance(group) for group in groups)
    if num_seeds == 1:
        return Components(math.nan, items, 0.0)
    residual = num_items * sum(weight**2 * _residual_variance(group) / group.shape[1] for group in groups)
    seeds = float(seed_means(values, strata).var(ddof=1))
    if guard != 0.5:
        seeds *= (num_seeds - 1) / float(special.chdtri(num_seeds - 1, guard))
    seeds -= residual / num_items
    return Components(max(seeds, 0.0), max(items, 0.0), residual)


def split(values: Floats, strata: Ints | None) -> list[Floats]:
    """Return the strata of ``values (seeds, items)``, each ``(seeds, its items)``."""
    return [values] if strata is None else [values[:, strata == group] for group in np.unique(strata)]


def seed_means(values: Floats, strata: Ints | None = None) -> Floats:
    """Return each seed's mean over the strata's means, ``(seeds,)``."""
    return np.asarray(np.mean([group.mean(axis=1) for group in split(values, strata)], axis=0))


def tail(x: float, seed_error: float, item_error: float, df: int) -> float:
    """Return ``P(|seed_error * T + item_error * Z| >= x)`` for Student's T and a normal Z.

    The sum is the reference of Behrens and Fisher: exact where one error is negligible, slightly too wide between.
    """
    if seed_error <= 1e-9 * item_error:
        return float(2 * special.ndtr(-x / item_error)) if item_error else float(x == 0)
    if item_error <= 1e-9 * seed_error:
        return float(2 * special.stdtr(df, -x / seed_error))
    # Over the variable that jumps least: the other one smooths it.
    if seed_error > item_error:
        nodes, weights = _normal_nodes()
        return min(1.0, float(2 * weights @ special.stdtr(df, (item_error * nodes - x) / seed_error)))
    nodes, weights = _student_nodes(df)
    return min(1.0, float(2 * weights @ special.ndtr((seed_error * nodes - x) / item_error)))


def tail_quantile(share: float, seed_error: float, item_error: float, df: int) -> float:
    """Return the ``x`` that ``tail`` maps to ``share``."""
    if seed_error <= 1e-9 * item_error:
        return float(-item_error * special.ndtri(share / 2))
    high = -float(seed_error * special.stdtrit(df, share / 2) + item_error * special.ndtri(share / 2))
    if item_error <= 1e-9 * seed_error:
        return high
    return float(
        optimize.brentq(lambda x: tail(x, seed_error, item_error, df) - share, 0.0, 2 * high, rtol=1e-6)
    )


def _item_variance(group: Floats) -> float:
    """Return the variance of the mean that comes from the items only; below 0 by chance where there is none."""
    num_seeds, num_items = group.shape
    if num_items < 2:
        return 0.0
    residual = _residual_variance(group) / num_seeds if num_seeds > 1 else 0.0
    variance = float(group.mean(axis=0).var(ddof=1))
    return float((variance - residual) / num_items)


def _residual_variance(group: Floats) -> float:
    num_seeds, num_items = group.shape
    if num_items < 2:
        return 0.0
    rest = group - group.mean(axis=1, keepdims=True) - group.mean(axis=0) + group.mean()
    return float((rest**2).sum() / ((num_seeds - 1) * (num_items - 1)))


@lru_cache
def _normal_nodes() -> tuple[Floats, Floats]:
    nodes = np.linspace(-9, 9, 501)
    weights = stats.norm.pdf(nodes)
    return nodes, weights / weights.sum()


@lru_cache
def _student_nodes(df: int) -> tuple[Floats, Floats]:
    # Equal steps of asinh(t): dense in the middle, and far enough into tails that are heavy for 1 degree of freedom.
    steps = np.linspace(-20, 20, 4001)
    nodes = np.sinh(steps)
    weights = stats.t.pdf(nodes, df) * np.cosh(steps)
    return nodes, weights / weights.sum()
