"""What a study's defenses change, where they aim at and where they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from lightning_robust.results.outcomes import ADV, CLEAN, OOD_MEAN, Column, Floats, Positions, combine
from lightning_robust.results.selection import Rule, select
from lightning_robust.results.statistics import (
    MIN_ITEMS,
    Effect,
    Verdict,
    accuracy,
    effect,
    holm,
    is_constant,
    transfer_verdict,
)
from lightning_robust.results.study import Condition, Run, Study, columns, pair, seed_pairs

Aim = Literal["adv", "ood"]
ALPHA = 0.05
AIMS: dict[str, Aim] = {"adversarial": "adv", "ood": "ood"}


@dataclass(frozen=True)
class TransferMatrix:
    """Effects of defenses (rows) on everything that was measured (columns).

    Args:
        conditions: Those that have a baseline, by aim.
        baselines: What each is compared with.
        columns: Clean, adversarial and OOD, summaries first.
        cells: ``[row][column]``; None where not both measured it.
        adjusted: ``(rows, columns)``: Holm's p-values over the matrix; NaN without one.
        rule: Which evaluation of each run counts.
        collapsed: Rows that `is_collapsed` holds for: their gains under attack are those of a constant answer.
    """

    conditions: list[Condition]
    baselines: list[Condition]
    columns: list[Column]
    cells: list[list[Effect | None]]
    adjusted: Floats
    rule: Rule
    collapsed: list[bool]


class StudyVerdict(NamedTuple):
    """The verdict on defenses of one aim on one backbone.

    Args:
        backbone: As in `Condition`.
        aim: The kind of robustness that the defenses aim at.
        conditions: Whose mean is judged.
        baseline: What they are compared with.
        verdict: None where it cannot be asked.
        reason: Why not; empty where there is one.
        left_out: Collapsed conditions, which are not among ``conditions``.
        note: Which seeds do not count, as not all have them; empty where all count.
    """

    backbone: str
    aim: Aim
    conditions: list[Condition]
    baseline: Condition
    verdict: Verdict | None
    reason: str
    left_out: list[Condition]
    note: str = ""


def transfer_matrix(study: Study, *, rule: Rule = "last", confidence: float = 0.95) -> TransferMatrix:
    """Return the effect of every defense on everything that was measured, paired by seed and item.

    The family-wise error over all cells is held by Holm's correction.

    Args:
        study: With baselines; conditions without one make no row.
        rule: Which evaluation of each run counts.
        confidence: Of the intervals.
    """
    order = {"adversarial": 0, "both": 1, "ood": 2, "none": 3}
    rows = sorted(compared(study), key=lambda row: (row[0].backbone, order[row[0].aim]))
    found = columns(study)
    cells = [[_cell(study, *row, column, rule, confidence) for column in found] for row in rows]
    p_values = np.array([[one.p_value if one else math.nan for one in row] for row in cells])
    return TransferMatrix(
        [condition for condition, _ in rows],
        [baseline for _, baseline in rows],
        found,
        cells,
        holm(p_values.reshape(len(rows), len(found))),
        rule,
        [is_collapsed(condition, rule) for condition, _ in rows],
    )


def study_verdicts(study: Study, *, rule: Rule = "last", margin: float = 0.01) -> list[StudyVerdict]:
    """Return, for each backbone and aim, whether what its defenses do on the mean transfers.

    Defenses that aim at both kinds have no off-target side and are not judged; collapsed ones are left out.

    Args:
        study: With baselines.
        rule: Which evaluation of each run counts.
        margin: What counts as no change, as a fraction.
    """
    groups: dict[tuple[str, Aim, int], tuple[Condition, list[Condition]]] = {}
    for condition, baseline in compared(study):
        if condition.aim in AIMS and not condition.stage:
            key = (condition.backbone, AIMS[condition.aim], id(baseline))
            groups.setdefault(key, (baseline, []))[1].append(condition)
    return [
        _study_verdict(backbone, aim, members, baseline, rule, margin, study.min_items)
        for (backbone, aim, _), (baseline, members) in groups.items()
    ]


def condition_accuracy(condition: Condition, column: Column, rule: Rule = "last") -> Effect | None:
    """Return a condition's accuracy in a column over its seeds and items; None where not all runs measured it."""
    runs = [select(run, rule) for run in condition.runs]
    found = combine([one.evaluation for one in runs], column, runs[0].reported)
    return None if found is None else accuracy(found.values, strata=found.strata)


def compared(study: Study) -> list[tuple[Condition, Condition]]:
    """Return the conditions that have a baseline, with it."""
    found = [(condition, study.baseline(condition)) for condition in study.conditions]
    return [(condition, baseline) for condition, baseline in found if baseline is not None]


def _cell(
    study: Study, treated: Condition, baseline: Condition, column: Column, rule: Rule, confidence: float
) -> Effect | None:
    paired = pair(treated, baseline, column, rule)
    if paired is None:
        return None
    found = effect(paired.treated, paired.baseline, strata=paired.strata, confidence=confidence)
    return enough(found, study.min_items)


def enough(found: Effect, min_items: int) -> Effect:
    """Return an effect, without its interval where there are fewer than ``min_items`` items."""
    if found.num_items >= min_items:
        return found
    reason = f"{found.num_items} common items are too few for an interval ({min_items} are needed)"
    return Effect(found.delta, math.nan, math.nan, math.nan, found.num_seeds, found.num_items, reason=reason)


class Together(NamedTuple):
    """Several conditions and their baseline on the items that all measured.

    Args:
        treated: ``(conditions, seeds, items)``.
        baseline: ``(seeds, items)``.
        strata: ``(items,)`` or None, as in `Paired`.
    """

    treated: Floats
    baseline: Floats
    strata: Positions | None


def together(
    conditions: Sequence[Condition], baseline: Condition, column: Column, rule: Rule = "last"
) -> Together | None:
    """Return the outcomes of several conditions and their baseline, seed by seed; None where not all measured it."""
    rows = common_rows(conditions, baseline)
    if not rows[0]:
        return None
    chosen = [select(run, rule) for side in rows for run in side]
    keep = None if rule in ("last", "oracle") else chosen[0].reported
    found = combine([one.evaluation for one in chosen], column, keep)
    if found is None:
        return None
    values = found.values.reshape(len(rows), len(rows[0]), -1)
    return Together(values[:-1], values[-1], found.strata)


def common_rows(conditions: Sequence[Condition], baseline: Condition) -> list[list[Run]]:
    """Return each condition's runs and, last, the baseline's, such that a column is one seed."""
    pairs = [seed_pairs(condition, baseline) for condition in conditions]
    partners = [{id(plain): run for run, plain in found} for found in pairs]
    plain = [run for run in baseline.runs if all(id(run) in found for found in partners)]
    return [*([found[id(run)] for run in plain] for found in partners), plain]


def is_collapsed(condition: Condition, rule: Rule = "last") -> bool:
    """Return whether at least half of the runs are hardly better on clean items than a constant answer.

    See `is_constant`. Without clean items those under shift are asked; runs with fewer than `MIN_ITEMS` do not say.

    Args:
        condition: Without clean and OOD items it counts as not collapsed.
        rule: Which evaluation of each run counts.
    """
    found = []
    for run in condition.runs:
        chosen = select(run, rule)
        known = (combine([chosen.evaluation], column, chosen.reported) for column in (CLEAN, OOD_MEAN))
        asked = next((one for one in known if one is not None), None)
        if asked is not None and len(asked.labels) >= MIN_ITEMS:
            found.append(is_constant(asked.values.ravel(), asked.labels))
    return bool(found) and sum(found) >= len(found) / 2


def _study_verdict(
    backbone: str,
    aim: Aim,
    conditions: list[Condition],
    baseline: Condition,
    rule: Rule,
    margin: float,
    min_items: int,
) -> StudyVerdict:
    members = [one for one in conditions if not is_collapsed(one, rule)]
    left_out = [one for one in conditions if one not in members]

    note = _unused_seeds(members, baseline)

    def without(reason: str) -> StudyVerdict:
        return StudyVerdict(backbone, aim, members, baseline, None, reason, left_out, note)

    if is_collapsed(baseline, rule):
        return without("the baseline is hardly better than a constant answer")
    if not members:
        return without("all defenses are hardly better than a constant answer")
    if not common_rows(members, baseline)[0]:
        return without("the defenses and their baseline have no seed in common")
    adv, ood = (together(members, baseline, column, rule) for column in (ADV, OOD_MEAN))
    if adv is None or ood is None:
        kind, column = ("adversarial", ADV) if adv is None else ("OOD", OOD_MEAN)
        measured = any(condition_accuracy(one, column, rule) for one in [*members, baseline])
        return without(
            f"{kind} accuracy was {'not measured in all runs' if measured else 'measured in no run'}"
        )
    smallest = min(adv.baseline.shape[1], ood.baseline.shape[1])
    if smallest < min_items:
        return without(f"{smallest} common items are too few ({min_items} are needed)")
    found = transfer_verdict(
        (adv.treated.mean(axis=0), adv.baseline),
        (ood.treated.mean(axis=0), ood.baseline),
        aim=aim,
        margin=margin,
        adv_strata=adv.strata,
        ood_strata=ood.strata,
    )
    off = ood if aim == "adv" else adv
    verdict = _unless_they_differ(found, [one.name for one in members], off)
    return StudyVerdict(backbone, aim, members, baseline, verdict, "", left_out, note)


def _unused_seeds(conditions: Sequence[Condition], baseline: Condition) -> str:
    """Say which runs of the baseline do not count, as some condition has no partner for them."""
    partners = {one.name: {id(plain) for _, plain in seed_pairs(one, baseline)} for one in conditions}
    every = set().union(*partners.values())
    common = every.intersection(*partners.values())
    if len(common) == len(every):
        return ""
    lacking = [f"{name} lacks {len(every - own)}" for name, own in partners.items() if every - own]
    return f"Only {len(common)} of {len(every)} seeds count, those that all have: {', '.join(lacking)}."


def _unless_they_differ(found: Verdict, names: Sequence[str], off: Together) -> Verdict:
    """Return a verdict on a mean, or ``inconclusive`` where single defenses contradict it.

    Some gain and some lose, or those that can be told from 0 went another way than the mean: p-values by Holm over
    the defenses.
    """
    effects = [effect(treated, off.baseline, strata=off.strata) for treated in off.treated]
    shown = holm([one.p_value for one in effects]) < ALPHA
    beyond = [not (-found.margin < one.low and one.high < found.margin) for one in effects]
    moved = [
        [
            name
            for name, one, p, out in zip(names, effects, shown, beyond, strict=True)
            if p and out and sign * one.delta > 0
        ]
        for sign in (1, -1)
    ]
    raised, lowered = (", ".join(side) for side in moved)
    if found.label == "inconclusive" or not (raised or lowered):
        return found
    if raised and lowered:
        reason = f"the defenses differ: {raised} raised the other kind, {lowered} lowered it"
    elif (found.label == "positive" and raised) or (found.label == "negative" and lowered):
        return found
    else:
        reason = (
            f"the defenses differ: {raised or lowered} {'raised' if raised else 'lowered'} the other kind"
        )
    return replace(found, label="inconclusive", reason=reason)
