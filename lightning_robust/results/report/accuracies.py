"""Tables of accuracies, of what attacks did, of items without an answer, and of cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_robust.results.outcomes import Column
from lightning_robust.results.report.formats import Notes, Shown, count, percent, show_accuracy
from lightning_robust.results.report.measures import Moment, Score, final, kept, title
from lightning_robust.results.selection import Rule, select
from lightning_robust.results.statistics import Effect
from lightning_robust.results.study import Condition, Part

_TALLEST = 3
"""With more conditions than this they are the rows: columns for each would need a wide screen."""


class Grid(NamedTuple):
    """A table of text: ``head`` names the columns, and each row starts with its own name."""

    head: list[str]
    rows: list[tuple[str, list[Shown]]]
    notes: Notes


class AttackRow(NamedTuple):
    """What one attack did to all runs of a condition."""

    condition: str
    attack: str
    accuracy: Effect
    statuses: dict[str, int]
    num_items: int
    queries: int

    @property
    def attempted(self) -> int:
        """Items whose search ended, which were right before."""
        return self.statuses.get("success", 0) + self.statuses.get("failed", 0)


class CoverageRow(NamedTuple):
    """Items of one environment or attack that got no usable answer, over all runs of a condition."""

    condition: str
    part: str
    num_items: int
    unparsed: int
    errors: int


class CostRow(NamedTuple):
    """What the runs of a condition took; NaN where ``run.json`` does not say."""

    condition: str
    num_runs: int
    queries: int
    evaluation_seconds: float
    run_seconds: float
    peak_memory: float


def final_scores(
    conditions: Sequence[Condition], columns: Sequence[Column], rule: Rule
) -> dict[tuple[str, str], Score]:
    """Return what was measured at the reported evaluation, by condition and column."""
    found = {(one.name, column.key): final(one, column, rule) for one in conditions for column in columns}
    return {key: score for key, score in found.items() if score is not None}


def grid(
    conditions: Sequence[Condition], columns: Sequence[Column], scores: dict[tuple[str, str], Score]
) -> Grid:
    """Return accuracies with their intervals, items and majority baselines; long side down the page."""
    notes = Notes()
    shown = [column for column in columns if any((one.name, column.key) in scores for one in conditions)]

    def cell(condition: Condition, column: Column) -> Shown:
        score = scores.get((condition.name, column.key))
        return (
            Shown("", note=notes.mark("not measured"))
            if score is None
            else show_accuracy(score.effect, notes)
        )

    basis = [(_items(scores, column), _majority(scores, column)) for column in shown]
    if len(conditions) <= _TALLEST:
        head = [
            "Items",
            "Majority",
            *([one.name for one in conditions] if len(conditions) > 1 else ["Accuracy"]),
        ]
        rows = [
            (title(column), [Shown(items), Shown(majority), *(cell(one, column) for one in conditions)])
            for column, (items, majority) in zip(shown, basis, strict=True)
        ]
        return Grid(head, rows, notes)
    rows = [(one.name, [cell(one, column) for column in shown]) for one in conditions]
    rows.append(("Majority baseline", [Shown(majority) for _, majority in basis]))
    rows.append(("Items", [Shown(items) for items, _ in basis]))
    return Grid([title(column) for column in shown], rows, notes)


def attack_rows(
    conditions: Sequence[Condition], scores: dict[tuple[str, str], Score], rule: Rule
) -> list[AttackRow]:
    """Return what each attack did at the reported evaluation, summed over runs."""
    rows = []
    for condition in conditions:
        for (kind, name), parts in _parts(condition, rule).items():
            score = scores.get((condition.name, f"attack/{name}"))
            if kind == "attack" and score is not None:
                statuses: Counter[str] = Counter()
                for part in parts:
                    statuses.update(part.statuses)
                sizes = sum(len(part.items) for part in parts)
                queries = sum(int(part.queries.sum()) for part in parts)
                rows.append(AttackRow(condition.name, name, score.effect, dict(statuses), sizes, queries))
    return rows


def coverage_rows(conditions: Sequence[Condition], rule: Rule) -> list[CoverageRow]:
    """Return the environments and attacks where items got no usable answer."""
    rows = []
    for condition in conditions:
        for (kind, name), parts in _parts(condition, rule).items():
            unparsed = sum(part.statuses.get("unparsed", 0) for part in parts)
            errors = sum(part.statuses.get("error", 0) for part in parts)
            if unparsed or errors:
                where = name if kind in ("clean", "attack") else f"{name} ({kind})"
                sizes = sum(len(part.items) for part in parts)
                rows.append(CoverageRow(condition.name, where, sizes, unparsed, errors))
    return rows


def cost_rows(conditions: Sequence[Condition]) -> list[CostRow]:
    """Return what the runs of each condition took together."""
    return [
        CostRow(
            one.name,
            len(one.runs),
            sum(evaluated.queries for run in one.runs for evaluated in run.evaluations),
            sum(evaluated.seconds for run in one.runs for evaluated in run.evaluations),
            sum(finished(run.info, "seconds") for run in one.runs),
            _largest([peak_memory(run.info) for run in one.runs]),
        )
        for one in conditions
    ]


def finished(info: dict[str, Any], name: str) -> float:
    """Return a number that a run noted when it had finished; NaN without it."""
    notes = info.get("finished")
    value = notes.get(name) if isinstance(notes, dict) else None
    return float(value) if isinstance(value, int | float) else math.nan


def peak_memory(info: dict[str, Any]) -> float:
    """Return the most memory that a run needed, in bytes; NaN where it did not note any."""
    notes = info.get("finished")
    names = [name for name in notes if "memory" in name] if isinstance(notes, dict) else []
    return _largest([finished(info, name) for name in names])


def _largest(values: Sequence[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _parts(condition: Condition, rule: Rule) -> dict[tuple[str, str], list[Part]]:
    found: dict[tuple[str, str], list[Part]] = {}
    keep = kept(rule)
    for run in condition.runs:
        for key, part in select(run, rule).evaluation.parts.items():
            found.setdefault(key, []).append(part if keep is None else part.only(keep(part.items)))
    return found


def _items(scores: dict[tuple[str, str], Score], column: Column) -> str:
    sizes = sorted({score.effect.num_items for (_, key), score in scores.items() if key == column.key})
    return count(sizes[0]) if len(sizes) == 1 else f"{count(sizes[0])} to {count(sizes[-1])}"


def _majority(scores: dict[tuple[str, str], Score], column: Column) -> str:
    shares = sorted({round(score.majority, 6) for (_, key), score in scores.items() if key == column.key})
    return percent(shares[0]) if len(shares) == 1 else f"{percent(shares[0])} to {percent(shares[-1])}"


def evaluation_rows(traces: dict[str, list[Moment]]) -> list[tuple[str, Moment]]:
    """Return all evaluations, by condition."""
    return [(name, moment) for name, moments in traces.items() for moment in moments]
