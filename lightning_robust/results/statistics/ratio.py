"""How much of a gain arrives where it was not aimed at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from numpy.typing import ArrayLike
from scipy import optimize

from lightning_robust.results.statistics.crossed import crossed_mean, rounding, seed_means, tail_quantile
from lightning_robust.results.statistics.effects import Pairs, differences, effect


@dataclass(frozen=True)
class Ratio:
    """Off-target gain for each unit of on-target gain.

    Args:
        value: NaN where it cannot be estimated.
        low: Lower end of the interval.
        high: Upper end.
        reason: Why there is no estimate; empty where there is one.
    """

    value: float
    low: float
    high: float
    reason: str = ""


def transfer_ratio(
    on: Pairs,
    off: Pairs,
    *,
    on_strata: ArrayLike | None = None,
    off_strata: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Ratio:
    """Return the off-target over the on-target effect with Fieller's interval (1954).

    The interval holds every ratio ρ for which the effect ``off - ρ on`` is not told from 0. It is not estimable
    where the on-target effect's own interval contains 0: every ratio would be possible.

    Args:
        on: ``(treated, baseline)`` where the defense aims at, each ``(seeds, items)``.
        off: The same where it does not, on other items; its rows are the same seeds.
        on_strata: Groups of items that count equally, as in `effect`.
        off_strata: The same for the off-target items.
        confidence: Of the interval.

    Raises:
        StatisticsError: If the arrays do not fit each other.
    """
    target, other = effect(*on, strata=on_strata, confidence=confidence), effect(*off, strata=off_strata)
    if not target.known or not other.known:
        return _unknown(target.reason or other.reason)
    if not target.sign:
        return _unknown("not estimable: the on-target effect's interval contains 0")
    x, y = differences(*on, on_strata), differences(*off, off_strata)
    if len(x.values) != len(y.values):
        return _unknown("not estimable: the two effects rest on different seeds")
    x_mean, y_mean = crossed_mean(*x), crossed_mean(*y)
    x_seeds, y_seeds = seed_means(*x), seed_means(*y)
    x_rounding, y_rounding = rounding(*x), rounding(*y)

    def beyond(ratio: float) -> float:
        """Above 0 where ``off - ratio * on`` is told from 0."""
        seeds = y_seeds - ratio * x_seeds
        rounded = y_rounding + ratio**2 * x_rounding
        seed_error = math.sqrt((seeds.var(ddof=1) + rounded) / len(seeds)) if len(seeds) > 1 else 0.0
        item_error = math.hypot(y_mean.item_error, ratio * x_mean.item_error)
        half = tail_quantile(1 - confidence, seed_error, item_error, len(seeds) - 1)
        return float(abs(y_mean.mean - ratio * x_mean.mean) - half)

    value = y_mean.mean / x_mean.mean
    return Ratio(value, _root(beyond, value, -1), _root(beyond, value, 1))


def _root(beyond: Callable[[float], float], start: float, side: int) -> float:
    step = 0.05
    while beyond(start + side * step) <= 0:
        step *= 2
    end: float = optimize.brentq(beyond, start, start + side * step, rtol=1e-6)
    return end


def _unknown(reason: str) -> Ratio:
    return Ratio(math.nan, math.nan, math.nan, reason)
