"""Robustness beyond what clean accuracy predicts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lightning_robust.results.statistics.crossed import Floats
from lightning_robust.results.statistics.effects import Effect, StatisticsError

LEAST_BASELINES = 5
"""Undefended models of different clean accuracy that a line is fitted through, at least."""


def effective_robustness(
    clean: float,
    robust: float,
    baseline_clean: ArrayLike,
    baseline_robust: ArrayLike,
    *,
    robust_error: float,
    clean_error: float = 0.0,
    num_seeds: int = 1,
    num_items: int = 0,
    confidence: float = 0.95,
) -> Effect:
    """Return the accuracy beyond what undefended models of this clean accuracy have.

    A line through the baselines' accuracies on probit scales (Taori et al. 2020, arXiv:2007.00644; Miller et al.
    2021, arXiv:2107.04649) predicts. The question is whether the model stands out from undefended ones, so that the
    interval is one of prediction: it holds how models scatter around the line, the line's own error, and the errors of
    both accuracies, and takes Student's t with the fewer degrees of freedom of line and seeds. Baselines must be
    independent models of different clean accuracy: the epochs of one run are not.

    Args:
        clean: The defended model's clean accuracy.
        robust: Its accuracy under attack or shift.
        baseline_clean: Clean accuracies of undefended models, ``(models,)``.
        baseline_robust: Their accuracies under the same attack or shift, ``(models,)``.
        robust_error: Standard error of ``robust``.
        clean_error: Standard error of ``clean``.
        num_seeds: Behind ``robust``; with two or more they limit the degrees of freedom.
        num_items: Behind ``robust``; passed on.
        confidence: Of the interval.

    Returns:
        The difference; NaN without interval, and with the reason, where fewer than five baselines differ in clean
        accuracy or the model lies outside of their range.

    Raises:
        StatisticsError: If the baselines' arrays differ in length.
    """
    x, y = probit(baseline_clean), probit(baseline_robust)
    if len(x) != len(y):
        raise StatisticsError("Expected the baselines' clean and robust accuracies to be as many.")
    reason = _unfit(clean, np.asarray(baseline_clean, dtype=np.float64))
    if reason:
        return Effect(math.nan, math.nan, math.nan, math.nan, num_seeds, num_items, reason=reason)
    at = float(probit([clean])[0])
    fit = stats.linregress(x, y)
    predicted = float(fit.intercept + fit.slope * at)
    df = len(x) - 2
    spread = float(np.sum((x - x.mean()) ** 2))
    residual = math.sqrt(float(np.sum((y - fit.intercept - fit.slope * x) ** 2)) / df)
    scatter = residual * math.sqrt(1 + 1 / len(x) + (at - x.mean()) ** 2 / spread)
    expected = float(stats.norm.cdf(predicted))
    # From the probit scale to accuracies by the slope of the normal distribution at the prediction.
    slope = float(stats.norm.pdf(predicted))
    shift = slope * fit.slope / float(stats.norm.pdf(at)) * clean_error
    error = math.sqrt((slope * scatter) ** 2 + shift**2 + robust_error**2)
    df = min(df, num_seeds - 1) if num_seeds > 1 else df
    reach = float(stats.t.isf((1 - confidence) / 2, df)) * error
    delta = robust - expected
    p_value = float(2 * stats.t.sf(abs(delta) / error, df)) if error else math.nan
    # An accuracy lies between 0 and 1, so that it is beyond what is expected by no more than that leaves.
    low, high = max(delta - reach, -expected), min(delta + reach, 1 - expected)
    return Effect(delta, low, high, p_value, num_seeds, num_items, standard_error=error)


def expected_accuracy(clean: ArrayLike, baseline_clean: ArrayLike, baseline_robust: ArrayLike) -> Floats:
    """Return what the line of `effective_robustness` predicts.

    Args:
        clean: Clean accuracies, any shape.
        baseline_clean: As there.
        baseline_robust: As there.
    """
    fit = stats.linregress(probit(baseline_clean), probit(baseline_robust))
    return np.asarray(stats.norm.cdf(fit.intercept + fit.slope * probit(clean)))


def probit(shares: ArrayLike) -> Floats:
    """Return the normal quantiles of shares, those of 0 and 1 kept finite (as of 0.001 and 0.999)."""
    return np.asarray(stats.norm.ppf(np.clip(np.asarray(shares, dtype=np.float64), 1e-3, 1 - 1e-3)))


def _unfit(clean: float, baselines: Floats) -> str:
    different = len(np.unique(np.round(probit(baselines), 6)))
    if different < LEAST_BASELINES:
        models = (
            "1 undefended model is"
            if different == 1
            else f"{different} undefended models of different clean accuracy are"
        )
        return f"{models} too few for a line ({LEAST_BASELINES} are needed)"
    if not baselines.min() <= clean <= baselines.max():
        return "its clean accuracy lies outside of the undefended models'"
    return ""
