"""Summaries that mean the same in all conditions which stand side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lightning_robust.results.conditions import Condition, Run
from lightning_robust.results.outcomes import ADV, OOD_MEAN, Column, made_from, measured
from lightning_robust.results.parts import Evaluated, Key
from lightning_robust.results.problems import named

_SIDES = {
    "adv": (ADV, "Adversarial accuracy", "attack or environment"),
    "ood": (OOD_MEAN, "OOD accuracy", "environment"),
}


def like_for_like(conditions: Sequence[Condition], place: str = "") -> list[str]:
    """Make the summaries of ``conditions`` from what all their runs measured, and say what is left out for that.

    The worst case over two attacks is lower than that over one of them: side by side they would look like an effect.
    The last evaluations decide; runs that measured nothing of a kind have no say in it.

    Args:
        conditions: Whose numbers stand side by side; their evaluations get ``shared``.
        place: What tells them from others, for the sentences, such as « on minilm».

    Returns:
        A sentence for each summary that leaves something out, or that cannot be made alike.
    """
    return [sentence for side in _SIDES for sentence in _share(conditions, side, place)]


def _share(conditions: Sequence[Condition], side: str, place: str) -> Iterator[str]:
    column, what, parts = _SIDES[side]
    last = {run: run.evaluations[-1]._replace(shared={}) for one in conditions for run in one.runs}
    own = {run: found for run, one in last.items() if (found := _flat(made_from([one], column)))}
    if not own:
        return
    shared = _flat(made_from([last[run] for run in own], column))
    lacking = {
        key: [
            one.name
            for one in conditions
            if any(key not in last[run].parts for run in one.runs if run in own)
        ]
        for found in own.values()
        for key in found
        if key not in shared
    }
    if shared:
        _tell(last, side, frozenset(shared))
        yield from _incomplete(last, column, f"{what}{place}")
    if shared and lacking:
        left_out = [
            f"{name} (not measured in all runs of {named(names)})" for (_, name), names in lacking.items()
        ]
        yield f"{what}{place} is made from {named(_names(shared))}; it leaves out {named(left_out)}."
    elif lacking:
        yield (
            f"{what}{place}: no {parts} was measured in all conditions. Each comparison is made from what its conditions "
            f"share, and accuracies side by side are of different ones: {named(_measured(conditions, own))}."
        )


def _tell(runs: dict[Run, Evaluated], side: str, shared: frozenset[Key]) -> None:
    for run in runs:
        run.evaluations = [one._replace(shared={**one.shared, side: shared}) for one in run.evaluations]
        run.chosen.clear()


def _incomplete(runs: Iterable[Run], column: Column, what: str) -> Iterator[str]:
    found = {
        run.name: sum(
            bool(made_from([one._replace(shared={})], column)) and not measured(one, column)
            for one in run.evaluations
        )
        for run in runs
    }
    names = [name for name, count in found.items() if count]
    if names:
        yield (
            f"{what} is not told of {sum(found.values())} evaluations of {named(names)}, which did not measure all that "
            "the last ones did: over fewer attacks or environments it would be another measure."
        )


def _measured(conditions: Sequence[Condition], own: dict[Run, list[Key]]) -> list[str]:
    found = {one.name: next((own[run] for run in one.runs if run in own), []) for one in conditions}
    return [f"{name} ({named(_names(keys))})" for name, keys in found.items() if keys]


def _flat(groups: list[list[Key]]) -> list[Key]:
    return [key for group in groups for key in group]


def _names(keys: Sequence[Key]) -> list[str]:
    return [name for _, name in keys]
