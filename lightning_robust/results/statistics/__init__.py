"""Estimates and intervals as pure functions of arrays; no records, no files."""

from lightning_robust.results.statistics.crossed import Components, CrossedMean, components, crossed_mean
from lightning_robust.results.statistics.effects import (
    MIN_ITEMS,
    Effect,
    StatisticsError,
    accuracy,
    effect,
    holm,
    mcnemar,
    wilson,
)

__all__ = [
    "MIN_ITEMS",
    "Components",
    "CrossedMean",
    "Effect",
    "StatisticsError",
    "accuracy",
    "components",
    "crossed_mean",
    "effect",
    "holm",
    "mcnemar",
    "wilson",
]
