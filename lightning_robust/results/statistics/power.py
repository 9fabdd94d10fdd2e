"""How many seeds and items it takes to see an effect."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_robust.results.statistics.crossed import Components, tail_quantile
from lightning_robust.results.statistics.effects import MIN_ITEMS

MOST_ITEMS = 1_000_000
SEEDS = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30)


class Needed(NamedTuple):
    """Seeds, and items for each, with which an effect is seen."""

    num_seeds: int
    num_items: int


def minimal_detectable_effect(
    parts: Components, num_seeds: int, num_items: int, *, confidence: float = 0.95, power: float = 0.8
) -> float:
    """Return the smallest true effect that is told from 0 with probability ``power``, as a fraction.

    Args:
        parts: Variances of one item's difference (`lightning_robust.results.statistics.components`).
        num_seeds: Pairs of training runs. One sees the effect in that run only.
        num_items: Items that all of them answer.
        confidence: Of the interval that must leave out 0.
        power: Between 0.5 and 1.
    """
    # The last terms are those that `crossed_mean` adds, too.
    seeds = 0.0 if num_seeds == 1 else parts.seed + parts.residual / num_items + 1 / 12 / num_items**2
    items = (parts.item + (parts.residual if num_seeds == 1 else 0.0)) / num_items
    seed_error = math.sqrt(seeds / num_seeds)
    item_error = math.sqrt(items + 1 / (num_items + 2) ** 2 / num_seeds)
    df = num_seeds - 1
    return tail_quantile(1 - confidence, seed_error, item_error, df) + tail_quantile(
        2 * (1 - power), seed_error, item_error, df
    )


def needed_items(
    parts: Components, effect: float, num_seeds: int, *, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Return how many items, not fewer than `MIN_ITEMS`, see a true effect with so many seeds.

    None where no number of items would do, or the spread between seeds is unknown.

    Args:
        parts: Variances of one item's difference.
        effect: As a fraction, > 0.
        num_seeds: Pairs of training runs.
        confidence: Of the interval that must leave out 0.
        power: Probability of seeing it.
    """

    def sees(items: int) -> bool:
        found = minimal_detectable_effect(parts, num_seeds, items, confidence=confidence, power=power)
        return found <= effect

    if (math.isnan(parts.seed) and num_seeds > 1) or not sees(MOST_ITEMS):
        return None
    low, high = 1, MOST_ITEMS
    while high - low > max(1, low // 200):  # within half a percent
        middle = (low + high) // 2
        low, high = (low, middle) if sees(middle) else (middle, high)
    return max(high, MIN_ITEMS)


def needed(
    parts: Components,
    effect: float,
    *,
    confidence: float = 0.95,
    power: float = 0.8,
    most_items: int = 10_000,
) -> Needed | None:
    """Return the fewest seeds that see an effect, and the items for it; None where 30 seeds would not do.

    A training run costs more than many items: few seeds come first.

    Args:
        parts: Variances of one item's difference.
        effect: As a fraction, > 0.
        confidence: Of the interval that must leave out 0.
        power: Probability of seeing it.
        most_items: Further seeds are better than more items than these.
    """
    for seeds in SEEDS:
        items = needed_items(parts, effect, seeds, confidence=confidence, power=power)
        if items is not None and items <= most_items:
            return Needed(seeds, items)
    return None
