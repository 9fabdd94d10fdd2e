"""What conditions scored: over the training, and at the evaluation that is reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_robust.results.outcomes import ADV, CLEAN, OOD_MEAN, Column, Keep, Outcomes, combine
from lightning_robust.results.selection import Rule, reported, select
from lightning_robust.results.statistics import Effect, accuracy
from lightning_robust.results.study import Condition, Evaluated, Run, Study
from lightning_robust.results.tables import NON_TEXT_ATTACKS

MEASURES = (CLEAN, ADV, OOD_MEAN)
TITLES = {"clean": "Clean", "adv": "Adversarial", "ood_mean": "OOD"}
WHERE = {"clean": "on clean text", "adv": "on adversarial text", "ood_mean": "under distribution shift"}


class Score(NamedTuple):
    """An accuracy with its interval, and what always answering the most frequent label would score."""

    effect: Effect
    majority: float


class Moment(NamedTuple):
    """One evaluation of all runs of a condition.

    Args:
        x: Where it stands on the axis of time.
        epoch: Of training; None outside.
        step: Of the first run.
        scores: By the keys of ``MEASURES``, those that were measured.
        queries: Of all runs.
        seconds: Of all runs.
    """

    x: float
    epoch: int | None
    step: int | None
    scores: dict[str, Score]
    queries: int
    seconds: float


def title(column: Column) -> str:
    """Return what a column is called on the page."""
    # With several environments it is called «embedding_pgd on imdb».
    attack = column.label.partition(" on ")[0] if column.key.startswith("attack/") else ""
    return f"{column.label} (on embeddings)" if attack in NON_TEXT_ATTACKS else column.label


def time_axis(study: Study) -> str:
    """Return what the evaluations of all runs are told apart by: ``epoch``, ``step`` or their number."""
    for label, name in (("epoch", "epoch"), ("step", "global_step")):
        columns = [[getattr(one, name) for one in run.evaluations] for run in study.runs]
        if all(None not in column and len(set(column)) == len(column) for column in columns):
            return label
    return "evaluation"


def moments(condition: Condition, axis: str, rule: Rule) -> list[Moment]:
    """Return the evaluations that all runs of a condition have, in order."""
    by_time = [dict(zip(_times(run, axis), run.evaluations, strict=True)) for run in condition.runs]
    shared = [x for x in by_time[0] if all(x in one for one in by_time)]
    return [_moment(x, [one[x] for one in by_time], rule) for x in shared]


def final(condition: Condition, column: Column, rule: Rule) -> Score | None:
    """Return what a condition scored at the reported evaluation; None where not all of its runs measured it."""
    evaluated = [select(run, rule).evaluation for run in condition.runs]
    return _score(combine(evaluated, column, kept(rule)))


def kept(rule: Rule) -> Keep | None:
    """Return which items count under a rule; None for all of them."""
    return None if rule in ("last", "oracle") else reported(rule)


def _moment(x: float, evaluated: Sequence[Evaluated], rule: Rule) -> Moment:
    scores = {
        column.key: score
        for column in MEASURES
        if (score := _score(combine(evaluated, column, kept(rule)))) is not None
    }
    return Moment(
        x,
        evaluated[0].epoch,
        evaluated[0].global_step,
        scores,
        sum(one.queries for one in evaluated),
        sum(one.seconds for one in evaluated),
    )


def _score(found: Outcomes | None) -> Score | None:
    if found is None:
        return None
    return Score(accuracy(found.values, strata=found.strata), _majority(found))


def _majority(found: Outcomes) -> float:
    strata = np.zeros(len(found.ids), np.int64) if found.strata is None else found.strata
    shares = []
    for stratum in np.unique(strata):
        counts = np.unique(found.labels[strata == stratum], return_counts=True)[1]
        shares.append(counts.max() / counts.sum())
    return float(np.mean(shares))


def _times(run: Run, axis: str) -> list[float]:
    if axis == "evaluation":
        return [float(index + 1) for index in range(len(run.evaluations))]
    name = {"epoch": "epoch", "step": "global_step"}[axis]
    return [float(getattr(one, name)) for one in run.evaluations]
