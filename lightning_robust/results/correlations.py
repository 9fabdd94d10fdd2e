"""Over a study's defenses: how the two kinds of robustness go together, and beyond clean accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_robust.results.outcomes import ADV, CLEAN, OOD_MEAN, Column, Floats, made_from, scores
from lightning_robust.results.parts import Key
from lightning_robust.results.selection import Rule, select
from lightning_robust.results.statistics import (
    Effect,
    TransferCorrelation,
    crossed_mean,
    effect,
    effective_robustness,
    trajectory_p_value,
    transfer_correlation,
)
from lightning_robust.results.study import Condition, Study
from lightning_robust.results.transfer import (
    Aim,
    Together,
    compared,
    condition_accuracy,
    enough,
    is_collapsed,
    together,
)


class Point(NamedTuple):
    """One defense among others: its effects, each with interval."""

    condition: Condition
    adv: Effect
    ood: Effect
    clean: Effect | None


class StudyCorrelation(NamedTuple):
    """How the defenses' effects on the two kinds of robustness go together.

    Args:
        backbone: As in `Condition`.
        points: One for each defense.
        correlation: Over the points.
        trajectory_p: Of the two accuracies moving together from epoch to epoch within runs, against a
            block-permuted null; NaN without enough evaluations.
        left_out: Collapsed conditions, which are no points: one of them would make the correlation.
    """

    backbone: str
    points: list[Point]
    correlation: TransferCorrelation
    trajectory_p: float
    left_out: list[Condition]


class EffectiveRobustness(NamedTuple):
    """A condition's accuracy beyond what clean accuracy predicts, for ``adv`` and ``ood``.

    Args:
        condition: With a defense.
        clean: Its clean accuracy.
        robust: Its adversarial or OOD accuracy.
        kind: Which of the two.
        beyond: What clean accuracy does not predict.
        line: Clean and robust accuracies of the undefended models that predict.
    """

    condition: Condition
    clean: float
    robust: float
    kind: Aim
    beyond: Effect
    line: list[tuple[float, float]]


def study_correlations(study: Study, *, rule: Rule = "last") -> list[StudyCorrelation]:
    """Return, for each backbone, how effects on the two kinds of robustness go together over defenses.

    Args:
        study: With baselines.
        rule: Which evaluation of each run counts.
    """
    groups: dict[tuple[str, int], tuple[Condition, list[Condition]]] = {}
    for condition, baseline in compared(study):
        if not condition.stage:
            key = (condition.backbone, id(baseline))
            groups.setdefault(key, (baseline, []))[1].append(condition)
    found = [
        _correlation(backbone, members, baseline, rule, study.min_items)
        for (backbone, _), (baseline, members) in groups.items()
    ]
    return [one for one in found if one is not None]


def study_effective_robustness(study: Study, *, rule: Rule = "last") -> list[EffectiveRobustness]:
    """Return every defense's adversarial and OOD accuracy beyond what its clean accuracy predicts.

    The line goes through the study's undefended conditions, of all backbones, that were measured by the same attacks
    and environments and did not collapse.

    Args:
        study: With five undefended conditions of different clean accuracy, else only reasons are returned.
        rule: Which evaluation of each run counts.
    """
    sides: list[tuple[Aim, Column]] = [("adv", ADV), ("ood", OOD_MEAN)]
    return [one for kind, column in sides for one in _beyond(study, kind, column, rule)]


def _beyond(study: Study, kind: Aim, column: Column, rule: Rule) -> list[EffectiveRobustness]:
    known = [
        (one, clean, robust)
        for one in study.conditions
        if not one.stage
        and not is_collapsed(one, rule)
        and (clean := condition_accuracy(one, CLEAN, rule)) is not None
        and (robust := condition_accuracy(one, column, rule)) is not None
    ]
    found = []
    for one, clean, robust in known:
        if one.aim == "none":
            continue
        line = [
            (its_clean.delta, its_robust.delta)
            for other, its_clean, its_robust in known
            if other.aim == "none"
            and other.declared
            and _measures(other, column, rule) == _measures(one, column, rule)
        ]
        beyond = effective_robustness(
            clean.delta,
            robust.delta,
            [x for x, _ in line],
            [y for _, y in line],
            robust_error=robust.standard_error,
            clean_error=clean.standard_error,
            num_seeds=robust.num_seeds,
            num_items=robust.num_items,
        )
        unknown = robust.reason or clean.reason
        if unknown:
            nan = math.nan
            beyond = Effect(nan, nan, nan, nan, robust.num_seeds, robust.num_items, reason=unknown)
        found.append(EffectiveRobustness(one, clean.delta, robust.delta, kind, beyond, line))
    return found


def _measures(condition: Condition, column: Column, rule: Rule) -> set[Key]:
    """Return the attacks and environments that a condition's accuracy in a column is made from."""
    evaluated = [select(run, rule).evaluation for run in condition.runs]
    return {key for keys in made_from(evaluated, column) for key in keys}


def _correlation(
    backbone: str, conditions: list[Condition], baseline: Condition, rule: Rule, min_items: int
) -> StudyCorrelation | None:
    members = [one for one in conditions if not is_collapsed(one, rule)]
    if not members or is_collapsed(baseline, rule):
        return None
    adv, ood, clean = (together(members, baseline, column, rule) for column in (ADV, OOD_MEAN, CLEAN))
    if adv is None or ood is None:
        return None
    on_adv, on_ood = _effects(adv, min_items), _effects(ood, min_items)
    on_clean: Sequence[Effect | None] = [None] * len(members) if clean is None else _effects(clean, min_items)
    found = transfer_correlation(
        [one.delta for one in on_adv],
        [one.delta for one in on_ood],
        None if clean is None else [one.delta for one in on_clean if one is not None],
        adv_errors=_errors(adv),
        ood_errors=_errors(ood),
        clean_errors=None if clean is None else _errors(clean),
        num_seeds=len(adv.baseline),
    )
    points = [Point(*row) for row in zip(members, on_adv, on_ood, on_clean, strict=True)]
    return StudyCorrelation(
        backbone,
        points,
        found,
        _trajectories([*members, baseline]),
        [one for one in conditions if one not in members],
    )


def _effects(side: Together, min_items: int) -> list[Effect]:
    return [enough(effect(treated, side.baseline, strata=side.strata), min_items) for treated in side.treated]


def _errors(side: Together) -> Floats:
    """Return the standard errors of what tells defenses apart: the baseline, and what all share, cancels."""
    number = len(side.treated)
    if number < 2:
        return np.full(number, math.nan)
    apart = side.treated - side.treated.mean(axis=0)
    found = [crossed_mean(values, side.strata).standard_error for values in apart]
    return np.array(found) * math.sqrt(number / (number - 1))


def _trajectories(conditions: Sequence[Condition]) -> float:
    paths = []
    for run in (run for condition in conditions for run in condition.runs):
        points = [{name: score.accuracy for name, score in scores(one).items()} for one in run.evaluations]
        paths.append([(one["adv"], one["ood"]) for one in points if {"adv", "ood"} <= one.keys()])
    return trajectory_p_value(
        [[a for a, _ in path] for path in paths], [[o for _, o in path] for path in paths]
    )
