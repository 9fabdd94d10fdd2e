"""Estimates and intervals as pure functions of arrays; no records, no files."""

from lightning_robust.results.statistics.correlation import (
    Correlation,
    TransferCorrelation,
    trajectory_p_value,
    transfer_correlation,
)
from lightning_robust.results.statistics.crossed import Components, CrossedMean, components, crossed_mean
from lightning_robust.results.statistics.effective import effective_robustness, expected_accuracy, probit
from lightning_robust.results.statistics.effects import (
    MIN_ITEMS,
    Differences,
    Effect,
    StatisticsError,
    accuracy,
    differences,
    effect,
    holm,
    is_constant,
    mcnemar,
    wilson,
)
from lightning_robust.results.statistics.power import (
    Needed,
    minimal_detectable_effect,
    needed,
    needed_items,
)
from lightning_robust.results.statistics.ratio import Ratio, transfer_ratio
from lightning_robust.results.statistics.simulation import Simulation
from lightning_robust.results.statistics.verdict import GUARD, Verdict, transfer_verdict

__all__ = [
    "GUARD",
    "MIN_ITEMS",
    "Components",
    "Correlation",
    "CrossedMean",
    "Differences",
    "Effect",
    "Needed",
    "Ratio",
    "Simulation",
    "StatisticsError",
    "TransferCorrelation",
    "Verdict",
    "accuracy",
    "components",
    "crossed_mean",
    "differences",
    "effect",
    "effective_robustness",
    "expected_accuracy",
    "holm",
    "is_constant",
    "mcnemar",
    "minimal_detectable_effect",
    "needed",
    "needed_items",
    "probit",
    "trajectory_p_value",
    "transfer_correlation",
    "transfer_ratio",
    "transfer_verdict",
    "wilson",
]
