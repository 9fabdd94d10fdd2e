"""What happened, in sentences: only counts and accuracies, no claim that needs an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_robust.results.runs import Evaluated, Run
from lightning_robust.results.tables import headline_attacks

ON = {"clean": "on clean text", "adv": "on adversarial text", "ood": "under distribution shift"}


def opening(runs: Sequence[Run]) -> str:
    """Return the sentence that the page opens with."""
    if len(runs) == 1:
        return summary(runs[0])
    parts = []
    for measure, where in ON.items():
        scored = [(run.last.scores[measure].accuracy, run.name) for run in runs if measure in run.last.scores]
        if scored:
            low, high = min(scored), max(scored)
            same = low[0] == high[0]
            span = f"between {_share(low[0])} ({low[1]}) and {_share(high[0])} ({high[1]})"
            span = f"at {_share(low[0])}" if same else span
            parts.append(f"{span} {where} ({_items(measure, runs)})")
    return f"At their last evaluation the {len(runs)} runs score {_listed(parts)}."


def summary(run: Run) -> str:
    """Return one sentence on a run: its three accuracies at its first and last evaluation."""
    first, last = run.first, run.last
    if len(run.evaluations) == 1:
        when = _when(last)
        return f"{run.name} was evaluated once{f' ({when})' if when else ''}: {_state(run)}.{_absent(run)}"
    moves = [_move(measure, first, last) for measure in ON if measure in last.scores]
    return (
        f"{run.name} went from its first evaluation ({_when(first) or 'number 1'}) to its last "
        f"({_when(last) or f'number {len(run.evaluations)}'}) {_listed(moves)}.{_absent(run)}"
    )


def _move(measure: str, first: Evaluated, last: Evaluated) -> str:
    now = last.scores[measure]
    if measure not in first.scores:
        return f"to {_share(now.accuracy)} {ON[measure]} ({_basis(measure, last)}; not measured at first)"
    before = first.scores[measure].accuracy
    return f"from {_share(before)} to {_share(now.accuracy)} {ON[measure]} ({_basis(measure, last)})"


def _state(run: Run) -> str:
    return _listed(
        [
            f"{_share(score.accuracy)} of answers are right {ON[measure]} ({_basis(measure, run.last)})"
            for measure, score in run.last.scores.items()
        ]
    )


def _items(measure: str, runs: Sequence[Run]) -> str:
    sizes = [run.last.scores[measure].num_items for run in runs if measure in run.last.scores]
    low, high = _number(min(sizes)), _number(max(sizes))
    return f"{low} items" if low == high else f"{low} to {high} items"


def _number(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _basis(measure: str, one: Evaluated) -> str:
    """Return what an accuracy rests on, such as ``mean of 3 environments, 600 items``."""
    items = f"{_number(one.scores[measure].num_items)} items"
    attacks = len(headline_attacks(one.parts))
    if measure == "adv" and attacks:
        return items if attacks == 1 else f"worst of {attacks} attacks on each of {items}"
    kind = {"clean": "clean", "adv": "adversarial", "ood": "ood"}[measure]
    environments = sum(its_kind == kind for its_kind, _ in one.parts)
    return items if environments < 2 else f"mean of {environments} environments, {items}"


def _absent(run: Run) -> str:
    """Return what was not measured, so that nobody reads silence as strength."""
    missing = [ON[measure] for measure in ON if measure not in run.last.scores]
    return f" It was not measured {_listed(missing, 'or')}." if missing else ""


def _when(one: Evaluated) -> str:
    if one.epoch is not None:
        return f"epoch {one.epoch}"
    return "" if one.global_step is None else f"step {one.global_step}"


def _share(value: float) -> str:
    return "no value" if math.isnan(value) else f"{100 * value:.1f}\u00a0%"


def _listed(parts: Sequence[str], word: str = "and") -> str:
    if len(parts) < 2:
        return "".join(parts) or "nothing that was measured"
    return f"{', '.join(parts[:-1])} {word} {parts[-1]}"
