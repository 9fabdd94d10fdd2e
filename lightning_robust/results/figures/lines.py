"""Accuracies over the training, and the paths of adversarial against OOD accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_robust.results.figures.drawing import empty
from lightning_robust.results.figures.palette import LIGHT, Style

MOST_SHADES = 4
_ABOVE = {True: 3, False: 2}


class Line(NamedTuple):
    """One line: points ``(x, y)`` with their intervals, each of shape ``(evaluations,)``; NaN leaves a gap.

    ``label`` is written at the line's end.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: Style
    label: str = ""
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def curves(
    title: str, x_label: str, lines: Sequence[Line], *, baseline: float = math.nan, wide: bool = False
) -> Figure:
    """Draw accuracies over the training.

    Args:
        title: Written above; may be empty.
        x_label: What the horizontal axis counts.
        lines: Those whose style is not strong go below the others.
        baseline: Accuracy of the most frequent class, drawn dotted; NaN for none.
        wide: For a figure that stands alone and whose lines carry labels.
    """
    figure, axes = empty((4.0, 2.9) if wide else (3.3, 2.7), title)
    if not math.isnan(baseline):
        axes.axhline(baseline, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1.5, 2.5)), zorder=1)
    strong = [line for line in lines if line.style.strong]
    for place, line in enumerate(strong):
        if not has_whiskers(len(strong)):
            _band(axes, line)
        else:
            _whisker(axes, line, place - len(strong) / 2)
    for line in lines:
        _line(axes, line)
    _label_ends(axes, lines)
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(x_label)
    _fit_time(axes, lines)
    return figure


def has_whiskers(num_lines: int) -> bool:
    """Return whether `curves` draws intervals at the lines' ends only: more shades cannot be told apart."""
    return num_lines > MOST_SHADES


def plane(lines: Sequence[Line]) -> Figure:
    """Draw adversarial (x) against OOD accuracy (y), one path each from hollow to filled.

    Lines whose style is not strong are drawn thin and without markers, with a dot at their end.
    """
    figure, axes = empty((3.9, 3.3))
    for line in lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not math.isnan(x + y)]
        if points:
            _path(axes, [x for x, _ in points], [y for _, y in points], line.style)
    fit_percent(axes.xaxis, [x for line in lines for x in line.x])
    fit_percent(axes.yaxis, [y for line in lines for y in line.y])
    axes.grid(True, axis="x", color=LIGHT["line"], linewidth=0.8)
    axes.set_xlabel("adversarial accuracy →")
    axes.set_ylabel("OOD accuracy →")
    return figure


def fit_percent(axis: object, values: Sequence[float]) -> None:
    """Set an axis' range around fractions and write its ticks as percent."""
    low, high = _limits(values)
    axis.set_view_interval(low, high, ignore=True)  # type: ignore[attr-defined]
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))  # type: ignore[attr-defined]
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")  # type: ignore[attr-defined]


def _path(axes: Axes, xs: list[float], ys: list[float], style: Style) -> None:
    color = LIGHT[style.color]
    if not style.strong:
        axes.plot(xs, ys, color=color, linewidth=0.8, zorder=1)
        axes.plot(xs[-1:], ys[-1:], "o", color=color, markersize=4, zorder=1)
        return
    axes.plot(xs, ys, color=color, linewidth=1.6, zorder=2, solid_joinstyle="round", linestyle=_dash(style))
    axes.plot(xs[1:-1], ys[1:-1], style.marker, color=color, markersize=3.5, zorder=3)
    for x, y, face in ((xs[0], ys[0], LIGHT["card"]), (xs[-1], ys[-1], color)):
        axes.plot(
            [x], [y], style.marker, color=color, markerfacecolor=face,
            markeredgewidth=1.8, markersize=8.5, zorder=4,
        )  # fmt: skip


def _band(axes: Axes, line: Line) -> None:
    if not len(line.low):
        return
    low, high = np.asarray(line.low), np.asarray(line.high)
    color = LIGHT[line.style.color]
    if len(low) == 1:
        # An area needs two points.
        axes.vlines(line.x, low, high, color=color, linewidth=2, alpha=0.35, zorder=2)
    else:
        axes.fill_between(line.x, low, high, color=color, alpha=0.13, linewidth=0, zorder=2)


def _whisker(axes: Axes, line: Line, place: float) -> None:
    if len(line.low) and line.x:
        offset = 0.012 * place * (max(line.x) - min(line.x))
        ends = (line.low[-1], line.high[-1])
        axes.vlines(
            line.x[-1] + offset, *ends, color=LIGHT[line.style.color], linewidth=1.6, alpha=0.7, zorder=2
        )


def _line(axes: Axes, line: Line) -> None:
    strong, step = line.style.strong, 1 + len(line.x) // 12
    axes.plot(
        line.x, line.y, color=LIGHT[line.style.color], marker=line.style.marker, linestyle=_dash(line.style),
        linewidth=1.8 if strong else 0.8, markersize=5, markeredgecolor=LIGHT["card"],
        markeredgewidth=0.8, markevery=(max(len(line.x) - 1, 0) % step, step), zorder=_ABOVE[strong], clip_on=False,
    )  # fmt: skip


def _dash(style: Style) -> object:
    return (0, (4, 2)) if style.dashed else "solid"


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write the labels beside the last points, moved apart where they would touch."""
    ends = []
    for line in lines:
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not math.isnan(y)]
        if line.label and known:
            ends.append((known[-1][1], known[-1][0], line))
    floor = -1.0
    for y, x, line in sorted(ends, key=lambda end: end[0]):
        floor = max(y, floor + 0.085)
        axes.annotate(
            line.label, (x, floor), xytext=(9, 0), textcoords="offset points", va="center", parse_math=False,
            color=LIGHT[line.style.color], fontsize=9.5, annotation_clip=False, fontweight="bold",
        )  # fmt: skip


def _fit_time(axes: Axes, lines: Sequence[Line]) -> None:
    """Set the horizontal range and ticks, with room for labels but no ticks beyond the data."""
    values = [x for line in lines for x in line.x]
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = (high - low) or 1.0
    room = 0.34 if any(line.label for line in lines) else 0.06
    axes.set_xlim(low - 0.06 * span, high + room * span)
    ticks = MaxNLocator(nbins=6, integer=True).tick_values(low, high)
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return axis limits around the data that never zoom in on less than ten points."""
    known = [value for value in values if not math.isnan(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin = max(0.12 * (high - low), (0.1 - (high - low)) / 2, 0.015)
    return low - margin, high + margin
