"""Whether defenses that do more for one kind of robustness do more, or less, for the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lightning_robust.results.statistics.crossed import Floats
from lightning_robust.results.statistics.effects import StatisticsError

LEAST_DEFENSES = {"pearson": 5, "spearman": 8, "partial": 6}
"""Fewer defenses give intervals that hold nearly every correlation, or do not cover (benchmarks/README.md)."""

MOST_BIAS = 0.25
"""Noise may move a correlation by so many of its standard errors at most: intervals then still cover 94 %."""


@dataclass(frozen=True)
class Correlation:
    """A correlation over defenses with its interval.

    Args:
        value: Between -1 and 1; NaN where it is not printed.
        low: Lower end.
        high: Upper end.
        num_defenses: Points; the runs of one defense are one point.
        reason: Why there is none; empty where there is one.
    """

    value: float
    low: float
    high: float
    num_defenses: int
    reason: str = ""


@dataclass(frozen=True)
class TransferCorrelation:
    """How (Δ adversarial, Δ OOD) of defenses go together.

    Args:
        pearson: On the effects.
        spearman: On their ranks.
        partial: Pearson's, given Δ clean.
        reliability: Share of the variance between defenses that is not noise of seeds and items, by kind; NaN
            where errors were not given.
    """

    pearson: Correlation
    spearman: Correlation
    partial: Correlation
    reliability: dict[str, float]


def transfer_correlation(
    adv: ArrayLike,
    ood: ArrayLike,
    clean: ArrayLike | None = None,
    *,
    adv_errors: ArrayLike | None = None,
    ood_errors: ArrayLike | None = None,
    clean_errors: ArrayLike | None = None,
    num_seeds: int | None = None,
    confidence: float = 0.95,
) -> TransferCorrelation:
    """Return the correlations of defenses' adversarial and OOD effects.

    One point is one defense, the mean over its seeds: runs of one defense, or scores of one run on several
    benchmarks, are no further evidence on how defenses differ. Intervals are Fisher's (1921), Spearman's with the
    variance of Bonett and Wright (2000, doi:10.1007/BF02294183). All hold for defenses drawn from a population
    without outliers: with one collapsed defense look at the ranks.

    Args:
        adv: Adversarial effects, ``(defenses,)``.
        ood: OOD effects, ``(defenses,)``.
        clean: Clean effects for the partial correlation.
        adv_errors: Standard errors of ``adv`` that differ between defenses. With errors, a correlation is given only
            where noise can move it by a quarter of its standard error at most. Noise pulls correlations towards 0, or
            towards 1 where both accuracies share a training run's luck; noise in ``clean`` leaves in the partial
            correlation what it should take out.
        ood_errors: The same for ``ood``.
        clean_errors: The same for ``clean``.
        num_seeds: Behind each effect. With one, errors do not hold how training runs differ, and there is no
            correlation: the runs' luck, which both accuracies share, would make one.
        confidence: Of the intervals.

    Raises:
        StatisticsError: If the arrays differ in length or hold NaN.
    """
    x, y, z = _column(adv, "adv"), _column(ood, "ood"), None if clean is None else _column(clean, "clean")
    if len(x) != len(y) or (z is not None and len(z) != len(x)):
        raise StatisticsError("Expected one effect of each kind for each defense, but the lengths differ.")
    reliability = {"adversarial": _reliability(x, adv_errors), "OOD": _reliability(y, ood_errors)}
    if z is not None:
        reliability["clean"] = _reliability(z, clean_errors)

    def estimate(name: str) -> Correlation:
        least, number = LEAST_DEFENSES[name], len(x)
        if number < least:
            return _none(number, _too_few(number, least))
        if num_seeds == 1:
            return _none(
                number, "one seed does not show how much of the effects is the luck of training runs"
            )
        if name == "partial" and z is None:
            return _none(number, "no effects on clean accuracy")
        columns = [x, y] if name != "partial" or z is None else [x, y, z]
        if any(np.ptp(column) == 0 for column in columns):
            return _none(number, "all defenses have the same effect")
        error = 1 / math.sqrt(number - 3 - (name == "partial"))
        kinds = ("adversarial", "OOD", "clean")[: len(columns)]
        reason = _unreliable({kind: reliability[kind] for kind in kinds}, MOST_BIAS * error)
        if reason:
            return _none(number, reason)
        value = _correlate(columns, ranks=name == "spearman")
        wider = math.sqrt(1 + value**2 / 2) if name == "spearman" else 1.0
        low, high = _fisher(value, error * wider, confidence)
        return Correlation(value, low, high, number)

    return TransferCorrelation(estimate("pearson"), estimate("spearman"), estimate("partial"), reliability)


def trajectory_p_value(
    adv: Sequence[ArrayLike], ood: Sequence[ArrayLike], *, permutations: int = 2000, seed: int = 0
) -> float:
    """Return how surprising it is that the two accuracies move together from epoch to epoch within runs; two-sided.

    Epochs of one run are no independent points. The null keeps each run's series as they are and only shifts one
    of them in a circle by a random number of epochs (block permutation); the statistic is the mean over runs of
    the correlation of changes.

    Args:
        adv: Adversarial accuracies of each run, ``(evaluations,)``, five or more.
        ood: OOD accuracies of the same evaluations.
        permutations: Random shifts of all runs.
        seed: Of the shifts.

    Returns:
        NaN where no run has five evaluations, or fewer than 20 shifts are possible.
    """
    pairs = [
        (np.diff(_column(a, "adv")), np.diff(_column(o, "ood")))
        for a, o in zip(adv, ood, strict=True)
        if len(np.asarray(a)) >= 5
    ]
    pairs = [(a, o) for a, o in pairs if np.ptp(a) > 0 and np.ptp(o) > 0]
    if math.prod(len(a) for a, _ in pairs) < 20:
        return math.nan
    # Every run's correlation at every shift: a random shift of all runs is then a look-up.
    tables = [[_correlate([a, np.roll(o, shift)], ranks=False) for shift in range(len(a))] for a, o in pairs]
    rng = np.random.default_rng(seed)
    drawn = np.mean([rng.choice(table, size=permutations) for table in tables], axis=0)
    observed = np.mean([table[0] for table in tables])
    return float((1 + np.sum(np.abs(drawn) >= abs(observed) - 1e-12)) / (1 + permutations))


def _correlate(columns: Sequence[Floats], *, ranks: bool) -> float:
    """Return the correlation of the first two columns, given the third where there is one."""
    data = np.array([stats.rankdata(column) if ranks else column for column in columns])
    precision = np.corrcoef(data)
    r = precision[0, 1]
    if len(columns) == 3:
        a, b = precision[0, 2], precision[1, 2]
        rest = (1 - a**2) * (1 - b**2)
        r = (r - a * b) / math.sqrt(rest) if rest > 1e-12 else 0.0
    return float(np.clip(r, -1, 1))


def _fisher(value: float, error: float, confidence: float) -> tuple[float, float]:
    centre = math.atanh(min(max(value, -0.999999), 0.999999))
    reach = float(stats.norm.isf((1 - confidence) / 2)) * error
    return math.tanh(centre - reach), math.tanh(centre + reach)


def _reliability(effects: Floats, errors: ArrayLike | None) -> float:
    if errors is None or len(effects) < 2:
        return math.nan
    total = float(effects.var(ddof=1))
    noise = float(np.mean(_column(errors, "errors") ** 2))
    return max(0.0, 1 - noise / total) if total else 0.0


def _unreliable(reliability: dict[str, float], most: float) -> str:
    for kind, share in reliability.items():
        if 1 - share > most:
            return (
                f"noise of seeds and items makes up {100 * (1 - share):.0f} % of how the defenses' {kind} effects "
                f"differ (at most {100 * most:.0f} % would do)"
            )
    return ""


def _too_few(number: int, least: int) -> str:
    found = "1 defense is" if number == 1 else f"{number} defenses are"
    return f"{found} too few for an interval ({least} are needed)"


def _none(number: int, reason: str) -> Correlation:
    return Correlation(math.nan, math.nan, math.nan, number, reason)


def _column(values: ArrayLike, name: str) -> Floats:
    found: Floats = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or np.isnan(found).any():
        raise StatisticsError(f"Expected `{name}` to be numbers, one each, without NaN.")
    return found
