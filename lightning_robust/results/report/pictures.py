"""Figures of a study: how conditions are told apart, curves over the training, and paths in the plane."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from lightning_robust.results import figures
from lightning_robust.results.figures import BACKGROUND, BASELINE, Line, Style, slot_style
from lightning_robust.results.report.formats import estimate
from lightning_robust.results.report.measures import MEASURES, TITLES, Moment
from lightning_robust.results.study import Condition

MOST_COLORED = 8
"""More defenses than this are drawn grey, but for the best ones."""

Traces = Mapping[str, Sequence[Moment]]
Styles = Mapping[str, Style]


class Drawing(NamedTuple):
    """A figure with its file name and what a screen reader says of it."""

    name: str
    figure: Figure
    label: str


def styles_of(
    conditions: Sequence[Condition], baselines: Sequence[str], collapsed: Sequence[str], traces: Traces
) -> dict[str, Style]:
    """Return how each condition of a backbone is drawn.

    Many conditions would not be told apart: then only the baseline and the defenses with the highest adversarial
    and OOD accuracy, and the highest mean of both, keep a colour. Collapsed ones never have one.
    """
    names = [one.name for one in conditions if one.name not in (*baselines, *collapsed)]
    styles = dict.fromkeys(baselines, BASELINE)
    strong = names if len(names) <= MOST_COLORED else _best(names, traces)
    for slot, name in enumerate(strong):
        styles[name] = slot_style(slot)
    return {one.name: styles.get(one.name, BACKGROUND) for one in conditions}


def legend(styles: Styles) -> list[tuple[Style, str]]:
    """Return the entries of a legend: baselines first, background left out."""
    shown = [(style, name) for name, style in styles.items() if style.strong]
    return sorted(shown, key=lambda entry: not entry[0].dashed)


def curves(traces: Traces, styles: Styles, axis: str, suffix: str) -> list[Drawing]:
    """Draw the accuracies over the training: one panel for a single condition, else one for each measure."""
    if all(len(moments) < 2 for moments in traces.values()):
        return []
    measures = [
        column.key
        for column in MEASURES
        if any(not math.isnan(value) for moments in traces.values() for value in _values(moments, column.key))
    ]
    if len(traces) == 1 and measures:
        (moments,) = traces.values()
        lines = [
            _line(moments, measure, slot_style(slot), TITLES[measure])
            for slot, measure in enumerate(TITLES)
            if measure in measures
        ]
        label = f"Line chart of accuracy by {axis}; the numbers are in the table of evaluations."
        return [Drawing(f"curves{suffix}", figures.curves("", axis, lines, wide=True), label)]
    drawings = []
    for measure in measures:
        lines = [_line(moments, measure, styles[name]) for name, moments in _ordered(traces, styles)]
        figure = figures.curves(TITLES[measure], axis, lines, baseline=_majority(traces, measure))
        label = f"Line chart of {TITLES[measure]} accuracy by {axis}; the numbers are in the table of evaluations."
        drawings.append(Drawing(f"curves-{measure.replace('_', '-')}{suffix}", figure, label))
    return drawings


def plane(traces: Traces, styles: Styles, suffix: str) -> Drawing | None:
    """Draw adversarial against OOD accuracy; None without two points."""
    lines = [
        Line(_values(moments, "adv"), _values(moments, "ood_mean"), styles[name])
        for name, moments in _ordered(traces, styles)
        if any({"adv", "ood_mean"} <= set(one.scores) for one in moments)
    ]
    if sum(not math.isnan(x + y) for line in lines for x, y in zip(line.x, line.y, strict=True)) < 2:
        return None
    what = "Paths" if any(len(line.x) > 1 for line in lines) else "Points"
    label = f"{what} of adversarial against OOD accuracy; the numbers are in the table of evaluations."
    return Drawing(f"plane{suffix}", figures.plane(lines), label)


def _best(names: Sequence[str], traces: Traces) -> list[str]:
    def last(name: str, *measures: str) -> float:
        scores = traces[name][-1].scores if traces[name] else {}
        values = [estimate(scores[one].effect) if one in scores else math.nan for one in measures]
        return -math.inf if math.isnan(sum(values)) else sum(values)

    best = [
        max(names, key=lambda name: last(name, *ms)) for ms in (("adv",), ("ood_mean",), ("adv", "ood_mean"))
    ]
    return list(dict.fromkeys(best))


def _ordered(traces: Traces, styles: Styles) -> list[tuple[str, Sequence[Moment]]]:
    """Return the background first, then colours, then the baseline: what is drawn later lies above."""
    return sorted(traces.items(), key=lambda entry: (styles[entry[0]].strong, styles[entry[0]].dashed))


def _line(moments: Sequence[Moment], measure: str, style: Style, label: str = "") -> Line:
    effects = [one.scores[measure].effect if measure in one.scores else None for one in moments]
    low = [math.nan if one is None else one.low for one in effects]
    high = [math.nan if one is None else one.high for one in effects]
    return Line([one.x for one in moments], _values(moments, measure), style, label, low, high)


def _values(moments: Sequence[Moment], measure: str) -> list[float]:
    return [estimate(one.scores[measure].effect) if measure in one.scores else math.nan for one in moments]


def _majority(traces: Traces, measure: str) -> float:
    """Return the majority baseline where all conditions share it, else NaN."""
    values = {
        round(moments[-1].scores[measure].majority, 6)
        for moments in traces.values()
        if moments and measure in moments[-1].scores
    }
    return values.pop() if len(values) == 1 else math.nan
