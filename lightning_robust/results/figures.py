"""Figures of a report, drawn without global state and as SVG that follows the page's colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

NUM_COLORS = 8
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖")

# Stand-ins that `to_svg` replaces by the page's CSS variables, so that one drawing suits light and dark.
_INK, _MUTED, _GRID, _PAPER = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line", _PAPER: "--card"}
_RUN = "#0500{:02x}"


class Series(NamedTuple):
    """One line: points ``(x, y)``, each list of shape ``(evaluations,)``; NaN leaves a gap.

    ``slot`` picks colour and marker, the same in every figure. ``label`` is written at the line's end.
    """

    x: Sequence[float]
    y: Sequence[float]
    slot: int
    label: str = ""


def marker_of(slot: int) -> str:
    """Return the matplotlib marker of a slot; with the colour it is unique for 56 slots."""
    return MARKERS[slot % len(MARKERS)]


def glyph_of(slot: int) -> str:
    """Return the character that looks like ``marker_of(slot)``, for legends in text."""
    return GLYPHS[slot % len(GLYPHS)]


def curves(
    title: str, x_label: str, series: Sequence[Series], *, baseline: float = math.nan, wide: bool = False
) -> Figure:
    """Draw accuracies over the training.

    Args:
        title: Written above; may be empty.
        x_label: What the horizontal axis counts.
        series: The lines.
        baseline: Accuracy of the most frequent class, drawn dotted; NaN for none.
        wide: For a figure that stands alone and whose lines carry labels.
    """
    figure, axes = _empty((4.7, 3.0) if wide else (3.4, 2.75), title)
    if not math.isnan(baseline):
        axes.axhline(baseline, color=_MUTED, linewidth=1, linestyle=(0, (1.5, 2.5)), zorder=1)
    for line in series:
        _line(axes, line, markersize=5)
    _label_ends(axes, series)
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(x_label)
    _fit_time(axes, series)
    return figure


def plane(series: Sequence[Series]) -> Figure:
    """Draw adversarial (x) against OOD accuracy (y), one path per run from hollow to filled."""
    figure, axes = _empty((4.7, 3.7), "")
    for line in series:
        color = _color(line.slot)
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not math.isnan(x + y)]
        if not points:
            continue
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, color=color, linewidth=1.6, zorder=2, solid_joinstyle="round")
        axes.plot(xs[1:-1], ys[1:-1], marker_of(line.slot), color=color, markersize=3.5, zorder=3)
        for x, y, face in ((xs[0], ys[0], _PAPER), (xs[-1], ys[-1], color)):
            axes.plot(
                [x], [y], marker_of(line.slot), color=color, markerfacecolor=face,
                markeredgewidth=1.8, markersize=8.5, zorder=4,
            )  # fmt: skip
    for axis, values in (
        (axes.xaxis, [x for line in series for x in line.x]),
        (axes.yaxis, [y for line in series for y in line.y]),
    ):
        low, high = _limits(values)
        (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(low, high)
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    axes.grid(True, axis="x", color=_GRID, linewidth=0.8)
    axes.set_xlabel("adversarial accuracy →")
    axes.set_ylabel("OOD accuracy →")
    return figure


def to_svg(figure: Figure, prefix: str, label: str) -> str:
    """Return a figure as an ``<svg>`` element to be put into a page.

    Args:
        figure: What ``curves`` or ``plane`` returned.
        prefix: Goes before every id in the drawing, which must differ within the page.
        label: What a screen reader says; escaped here.
    """
    buffer = io.StringIO()
    # Text stays text: it takes the page's font, can be selected, and the file is smaller.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    body = buffer.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]*)"', body)
    head = f'<svg role="img" aria-label="{_attribute(label)}" viewBox="{view.group(1) if view else ""}">'
    body = head + body[body.index(">") + 1 :]
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    return re.sub(r"#0500([0-9a-f]{2})", lambda found: f"var(--run-{int(found[1], 16)})", body).strip()


def _color(slot: int) -> str:
    return _RUN.format(slot % NUM_COLORS)


def _empty(size: tuple[float, float], title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10, color=_INK, pad=8, fontweight="bold")
    axes.tick_params(colors=_MUTED, labelsize=9, length=0, pad=5)
    axes.xaxis.label.set(color=_MUTED, fontsize=9)
    axes.yaxis.label.set(color=_MUTED, fontsize=9)
    axes.grid(True, axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _line(axes: Axes, line: Series, markersize: float) -> None:
    axes.plot(
        line.x, line.y, color=_color(line.slot), marker=marker_of(line.slot), linewidth=1.8,
        markersize=markersize, markeredgecolor=_PAPER, markeredgewidth=0.8, zorder=3, clip_on=False,
    )  # fmt: skip


def _label_ends(axes: Axes, series: Sequence[Series]) -> None:
    """Write the labels beside the last points, moved apart where they would touch."""
    ends = []
    for line in series:
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not math.isnan(y)]
        if line.label and known:
            ends.append((known[-1][1], known[-1][0], line))
    floor = -1.0
    for y, x, line in sorted(ends, key=lambda end: end[0]):
        floor = max(y, floor + 0.085)
        axes.annotate(
            line.label, (x, floor), xytext=(9, 0), textcoords="offset points", va="center",
            color=_color(line.slot), fontsize=9.5, annotation_clip=False, fontweight="bold",
        )  # fmt: skip


def _fit_time(axes: Axes, series: Sequence[Series]) -> None:
    """Set the horizontal range and ticks, with room for labels but no ticks beyond the data."""
    values = [x for line in series for x in line.x]
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = (high - low) or 1.0
    room = 0.34 if any(line.label for line in series) else 0.06
    axes.set_xlim(low - 0.06 * span, high + room * span)
    ticks = MaxNLocator(nbins=6, integer=True).tick_values(low, high)
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return axis limits around the data that never zoom in on less than ten points."""
    known = [value for value in values if not math.isnan(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin = max(0.12 * (high - low), (0.1 - (high - low)) / 2, 0.015)
    return low - margin, high + margin


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
