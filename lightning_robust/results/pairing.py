"""Conditions against what they are compared with: seed by seed and item by item."""

from __future__ import annotations

from typing import NamedTuple

from lightning_robust.results.conditions import Condition, Run
from lightning_robust.results.outcomes import Column, Floats, Outcomes, Positions, combine, measured
from lightning_robust.results.parts import Evaluated
from lightning_robust.results.selection import Rule, reported, select


class Paired(NamedTuple):
    """Outcomes of two conditions, seed by seed and item by item, as `statistics.effect` takes them.

    Args:
        treated: ``(seeds, items)``, between 0 and 1.
        baseline: The same shape.
        strata: ``(items,)``: each item's environment, for macro means; None where there is one.
        seeds: Of the treated runs.
        dropped: Items that not all runs have, or whose labels differ.
    """

    treated: Floats
    baseline: Floats
    strata: Positions | None
    seeds: list[int | None]
    dropped: int


def pair(
    treated: Condition,
    baseline: Condition,
    column: Column,
    rule: Rule = "last",
    *,
    min_items: int = 1,
) -> Paired | None:
    """Return the outcomes of two conditions on what both measured: attacks, environments, items, seeds.

    Runs are paired by seed where all seeds are known; where one is unknown, in order. Pairs of which a run did not
    measure the column do not count.

    Args:
        treated: A condition.
        baseline: What it is compared with.
        column: What is compared.
        rule: Which evaluation of each run counts.
        min_items: Fewer common items make no pair.

    Returns:
        None where no pair of runs measured it, or too few items are common.
    """
    pairs = [
        both
        for both in seed_pairs(treated, baseline)
        if all(measured(select(run, rule).evaluation, column) for run in both)
    ]
    chosen = [select(run, rule).evaluation for side in zip(*pairs, strict=True) for run in side]
    found = combine(chosen, column, reported(rule))
    if found is None or len(found.ids) < min_items:
        return None
    after, before = found.values[: len(pairs)], found.values[len(pairs) :]
    return Paired(after, before, found.strata, [run.seed for run, _ in pairs], found.dropped)


def seed_pairs(treated: Condition, baseline: Condition) -> list[tuple[Run, Run]]:
    """Return the runs of two conditions that are compared with each other."""
    if None in treated.seeds or None in baseline.seeds:
        return list(zip(treated.runs, baseline.runs, strict=False))
    partners = {run.seed: run for run in baseline.runs}
    return [(run, partners[run.seed]) for run in treated.runs if run.seed in partners]


def outcomes(one: Run | Evaluated, column: Column, rule: Rule = "last") -> Outcomes | None:
    """Return the values ``(items,)`` of one evaluation in a column; None where it was not measured.

    Args:
        one: An evaluation, or a run, of which ``rule`` chooses one.
        column: Of `columns`.
        rule: Which evaluation of a run counts, and which items.
    """
    evaluated = one if isinstance(one, Evaluated) else select(one, rule).evaluation
    found = combine([evaluated], column, None if isinstance(one, Evaluated) else reported(rule))
    return None if found is None else found._replace(values=found.values[0])
