"""The transfer matrix, the changes, and effective robustness as the page shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from lightning_robust.results import figures
from lightning_robust.results.correlations import EffectiveRobustness, StudyCorrelation
from lightning_robust.results.figures import Cell, Point, Style, heat_name, slot_style
from lightning_robust.results.report.formats import Notes, Shown, counted, show_change
from lightning_robust.results.report.measures import title
from lightning_robust.results.report.pictures import Drawing, Styles
from lightning_robust.results.report.wording import AIM_TITLES, NOT_DECLARED, aim_title
from lightning_robust.results.statistics import Effect, expected_accuracy
from lightning_robust.results.study import Condition
from lightning_robust.results.transfer import ALPHA, TransferMatrix

_LEAST_SCALE = 0.02
_LONGEST_LABEL = 16
_KINDS = {"clean": "Clean", "adv": "Adversarial", "ood": "OOD"}
_AIM_SLOTS = {
    AIM_TITLES["adversarial"]: 1,
    AIM_TITLES["ood"]: 0,
    AIM_TITLES["both"]: 3,
    AIM_TITLES["none"]: 7,
    NOT_DECLARED: 5,
}
"""Colours of aims where defenses are too many for colours of their own."""


class HeatCell(NamedTuple):
    """A cell of the matrix: its colour's name, its text, the mark of a change told from 0, and what is coloured."""

    css: str
    shown: Shown
    mark: str
    words: str
    value: float = math.nan


class HeatRow(NamedTuple):
    """A defense's row."""

    number: int
    name: str
    seeds: str
    style: Style
    cells: list[HeatCell]
    collapsed: bool


class Heat(NamedTuple):
    """The matrix of one backbone."""

    groups: list[tuple[str, list[HeatRow]]]
    kinds: list[tuple[str, int]]
    columns: list[str]
    scale: float
    baselines: list[str]
    notes: Notes

    @property
    def collapsed(self) -> bool:
        """Whether a row is that of a constant answer."""
        return any(row.collapsed for _, rows in self.groups for row in rows)

    @property
    def several(self) -> bool:
        """Whether rows need numbers."""
        return sum(len(rows) for _, rows in self.groups) > 1


def heat(matrix: TransferMatrix, backbone: str, styles: Styles) -> Heat | None:
    """Return a backbone's rows of the matrix, without columns that none of them has; None without rows."""
    rows = [index for index, one in enumerate(matrix.conditions) if one.backbone == backbone]
    places = [k for k in range(len(matrix.columns)) if any(matrix.cells[row][k] for row in rows)]
    if not places:
        return None
    notes, scale = Notes(), scale_of(matrix)
    groups: dict[str, list[HeatRow]] = {}
    for number, row in enumerate(rows, 1):
        condition = matrix.conditions[row]
        cells = [
            _heat_cell(matrix.cells[row][k], float(matrix.adjusted[row, k]), scale, notes) for k in places
        ]
        if matrix.collapsed[row]:
            # A constant answer under attack is no gain: neither colour nor mark.
            words = "of a constant answer"
            cells = [HeatCell("hatched", one.shown, "", words) for one in cells]
        most = max((one.num_seeds for one in matrix.cells[row] if one), default=0)
        cells = [
            one if effect is None or effect.num_seeds == most else _of_fewer_seeds(one, effect, notes)
            for one, effect in zip(cells, (matrix.cells[row][k] for k in places), strict=True)
        ]
        seeds = counted(most, "seed")
        entry = HeatRow(number, condition.name, seeds, styles[condition.name], cells, matrix.collapsed[row])
        groups.setdefault(aim_title(condition), []).append(entry)
    columns = [matrix.columns[k] for k in places]
    kinds = [(_KINDS[kind], len(list(members))) for kind, members in groupby(columns, lambda one: one.kind)]
    baselines = list(dict.fromkeys(matrix.baselines[row].name for row in rows))
    return Heat(list(groups.items()), kinds, [title(one) for one in columns], scale, baselines, notes)


def heat_figure(shown: Heat, suffix: str) -> Drawing:
    """Draw a matrix as a file; on the page it is a table.

    Args:
        shown: The matrix.
        suffix: Of the file's name.
    """
    groups = [
        (
            name,
            [
                (
                    f"{row.number}  {row.name}",
                    [Cell(cell.value, bool(cell.mark)) for cell in row.cells],
                )
                for row in rows
            ],
        )
        for name, rows in shown.groups
    ]
    return Drawing(f"transfer-matrix{suffix}", figures.heat_map(groups, shown.columns, shown.scale), "")


def scale_of(matrix: TransferMatrix) -> float:
    """Return the change that gets the strongest colour: the largest of rows that did not collapse, in whole points."""
    rows = [row for row, collapsed in zip(matrix.cells, matrix.collapsed, strict=True) if not collapsed]
    known = [abs(one.delta) for row in rows for one in row if one is not None and one.known]
    return max(math.ceil(100 * max(known, default=0.0)) / 100, _LEAST_SCALE)


def changes(
    found: StudyCorrelation, styles: Styles, numbers: Mapping[str, int], suffix: str
) -> Drawing | None:
    """Draw the changes of a backbone's defenses; None where none has both with intervals."""
    known = [point for point in found.points if point.adv.known and point.ood.known]
    if not known:
        return None
    many = any(not styles[point.condition.name].strong for point in known)
    points = [
        Point(
            point.adv.delta,
            point.ood.delta,
            (point.adv.low, point.adv.high),
            (point.ood.low, point.ood.high),
            aim_style(point.condition) if many else styles[point.condition.name],
            str(numbers.get(point.condition.name, "")) if many else "",
        )
        for point in known
    ]
    label = "Changes of adversarial and OOD accuracy, one point per defense; the numbers are in the transfer matrix."
    return Drawing(f"changes{suffix}", figures.changes(points), label)


def aim_style(condition: Condition) -> Style:
    """Return the style of what a condition aims at."""
    return slot_style(_AIM_SLOTS[aim_title(condition)])._replace(strong=False)


def aims_legend(conditions: Sequence[Condition]) -> list[tuple[Style, str]]:
    """Return the legend of ``aim_style``."""
    present = dict.fromkeys(aim_title(one) for one in conditions)
    return [(slot_style(_AIM_SLOTS[aim]), aim[0].lower() + aim[1:]) for aim in present]


def effective(found: Sequence[EffectiveRobustness], styles: Styles) -> list[Drawing]:
    """Draw accuracies against what clean accuracy predicts, for those that have an interval."""
    drawings = []
    for kind, name in (("adv", "adversarial"), ("ood", "OOD")):
        known = [one for one in found if one.kind == kind and one.beyond.known]
        if not known:
            continue
        several = len({one.condition.backbone for one in known}) > 1
        points = [
            Point(
                one.clean,
                one.robust,
                (one.clean, one.clean),
                _around(one),
                styles[one.condition.name],
                # Colours are told apart within a backbone only.
                one.condition.name[:_LONGEST_LABEL] if several else "",
            )
            for one in known
        ]
        figure = figures.predicted(points, _prediction(known), f"{name} accuracy →")
        label = f"{name.capitalize() if kind == 'adv' else name} accuracy against clean accuracy, with the line that clean accuracy predicts."
        drawings.append(Drawing(f"effective-{kind}", figure, label))
    return drawings


def _prediction(known: Sequence[EffectiveRobustness]) -> tuple[list[float], list[float]]:
    """Return the line that predicts, over the range of the undefended models; nothing where there are several."""
    if any(one.line != known[0].line for one in known):
        return [], []
    clean, robust = zip(*known[0].line, strict=True)
    x = np.linspace(min(clean), max(clean), 50)
    return x.tolist(), expected_accuracy(x, clean, robust).tolist()


def _around(one: EffectiveRobustness) -> tuple[float, float]:
    expected = one.robust - one.beyond.delta
    return expected + one.beyond.low, expected + one.beyond.high


def _of_fewer_seeds(cell: HeatCell, effect: Effect, notes: Notes) -> HeatCell:
    if not effect.known:
        return cell
    seeds = counted(effect.num_seeds, "seed")
    return cell._replace(
        shown=cell.shown._replace(note=notes.mark(f"{seeds} only, unlike the rest of the row"))
    )


def _heat_cell(effect: Effect | None, adjusted: float, scale: float, notes: Notes) -> HeatCell:
    if effect is None:
        return HeatCell("hatched", Shown("", note=notes.mark("not measured by both")), "", "no value")
    shown = show_change(effect, notes)
    if not effect.known:
        return HeatCell("hatched", shown, "", "no value")
    marked = adjusted < ALPHA
    mark = ("▲" if effect.delta > 0 else "▼") if marked else ""
    words = (
        ("told from no change: a gain" if effect.delta > 0 else "told from no change: a loss")
        if marked
        else ""
    )
    return HeatCell(heat_name(effect.delta, scale), shown, mark, words, effect.delta)
