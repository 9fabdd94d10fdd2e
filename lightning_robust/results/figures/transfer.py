"""Changes against a baseline: the transfer matrix as a heat map, and adversarial against OOD changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from lightning_robust.results.figures.drawing import empty
from lightning_robust.results.figures.palette import LIGHT, Style, heat_name

_LONGEST = 34
_NAME: dict[str, Any] = {"color": LIGHT["ink"], "fontsize": 9, "parse_math": False}


class Point(NamedTuple):
    """A point with the ends of its intervals, as fractions; NaN where there is no interval."""

    x: float
    y: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    style: Style
    label: str = ""


class Cell(NamedTuple):
    """One cell of a heat map: its value as a fraction (NaN: missing) and whether it stands out."""

    value: float
    marked: bool


def changes(points: Sequence[Point]) -> Figure:
    """Draw OOD (y) against adversarial changes (x) with their intervals, and where neither changed.

    Labels that would cover each other are left out.
    """
    figure, axes = empty((3.9, 3.4))
    for line in (axes.axhline, axes.axvline):
        line(0, color=LIGHT["muted"], linewidth=1, zorder=1)
    for point in points:
        _errors(axes, point)
    _fit_points(axes, points)
    axes.grid(True, axis="x", color=LIGHT["line"], linewidth=0.8)
    axes.set_xlabel("change of adversarial accuracy, in points →")
    axes.set_ylabel("change of OOD accuracy →")
    _place_labels(figure, axes, points)
    return figure


def predicted(points: Sequence[Point], line: tuple[Sequence[float], Sequence[float]], y_label: str) -> Figure:
    """Draw a robust accuracy (y) against clean accuracy (x), and the line that clean accuracy predicts.

    Args:
        points: Accuracies as fractions.
        line: The prediction's points ``(x, y)``.
        y_label: Names the accuracy.
    """
    figure, axes = empty((3.4, 2.9))
    axes.plot(*line, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    for point in points:
        _errors(axes, point)
    for axis, values in (
        (axes.xaxis, [point.x for point in points]),
        (axes.yaxis, [value for point in points for value in (point.y, *point.y_ends)]),
    ):
        known = [value for value in values if not math.isnan(value)]
        margin = max(0.1 * (max(known, default=1) - min(known, default=0)), 0.01)
        axis.set_view_interval(min(known, default=0) - margin, max(known, default=1) + margin, ignore=True)
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    axes.set_xlabel("clean accuracy →")
    axes.set_ylabel(y_label)
    _place_labels(figure, axes, points)
    return figure


def heat_map(
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[Cell]]]]],
    columns: Sequence[str],
    scale: float,
) -> Figure:
    """Draw a transfer matrix: a row for each defense, by groups; a column for each environment or attack.

    Args:
        groups: Titles with rows, each a name with its cells, one for each column.
        columns: Names of the columns.
        scale: The difference that gets the strongest colour, as a fraction.
    """
    num_rows = sum(len(rows) + 1 for _, rows in groups)
    beside = max((len(_shorten(name)) for _, rows in groups for name, _ in rows), default=0)
    above = max((len(_shorten(name)) for name in columns), default=0)
    # In inches for each letter; column names stand at an angle.
    width = max(0.5 + 0.085 * beside + 0.72 * len(columns) + 0.05 * above, 4.0)
    figure, axes = empty((width, 0.4 + 0.06 * above + 0.3 * num_rows))
    y = 0.0
    for title, rows in groups:
        axes.text(0, y + 0.6, _shorten(title), va="center", **{**_NAME, "color": LIGHT["muted"]})
        y += 1
        for name, cells in rows:
            for x, cell in enumerate(cells):
                _draw_cell(axes, x, y, cell, scale)
            axes.text(-0.15, y + 0.5, _shorten(name), ha="right", va="center", **_NAME)
            y += 1
    for x, name in enumerate(columns):
        axes.text(x + 0.4, -0.2, _shorten(name), rotation=40, ha="left", va="bottom", **_NAME)
    axes.grid(False)
    axes.set(xlim=(0, len(columns)), ylim=(y, 0), xticks=[], yticks=[])
    return figure


def _draw_cell(axes: Axes, x: float, y: float, cell: Cell, scale: float) -> None:
    if math.isnan(cell.value):
        axes.add_patch(
            Rectangle((x, y), 1, 1, facecolor=LIGHT["card"], edgecolor=LIGHT["strong-line"], hatch="////", linewidth=0)
        )  # fmt: skip
        return
    color = LIGHT[heat_name(cell.value, scale)]
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor=LIGHT["card"], linewidth=1.5))
    mark = ("▲" if cell.value > 0 else "▼") if cell.marked else ""
    axes.text(
        x + 0.5, y + 0.52, f"{100 * cell.value:+.1f}{mark}".replace("-0.0", "0.0").replace("+0.0", "0.0"), color=LIGHT["ink"], fontsize=8.5, ha="center",
        va="center", fontweight="bold" if cell.marked else "normal",
    )  # fmt: skip


def _errors(axes: Axes, point: Point) -> None:
    color, strong = LIGHT[point.style.color], point.style.strong
    for xs, ys in (
        (point.x_ends, (point.y, point.y)),
        ((point.x, point.x), point.y_ends),
    ):
        axes.plot(xs, ys, color=color, linewidth=1.4 if strong else 0.9, alpha=0.55, zorder=2)
    axes.plot(
        [point.x], [point.y], point.style.marker or "o", color=color, markersize=7.5 if strong else 5,
        markeredgecolor=LIGHT["card"], markeredgewidth=0.8, zorder=3,
    )  # fmt: skip


def _fit_points(axes: Axes, points: Sequence[Point]) -> None:
    """Keep 0 and every interval in view, on both axes alike where they are of one size."""
    for axis, values in (
        (axes.xaxis, [value for point in points for value in (point.x, *point.x_ends)]),
        (axes.yaxis, [value for point in points for value in (point.y, *point.y_ends)]),
    ):
        known = [0.0, *(value for value in values if not math.isnan(value))]
        margin = max(0.08 * (max(known) - min(known)), 0.005)
        axis.set_view_interval(min(known) - margin, max(known) + margin, ignore=True)
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(lambda value, _: f"{100 * value:+.4g}" if abs(value) > 1e-9 else "0")


def _place_labels(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write labels beside their points, where there is room."""
    if not any(point.label for point in points):
        return
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in (_display(axes, point) for point in points)]
    for point in points:
        for dx, dy, across, along in ((7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 6, "center", "bottom"), (0, -6, "center", "top")):  # fmt: skip
            text = axes.annotate(
                point.label, (point.x, point.y), xytext=(dx, dy), textcoords="offset points", ha=across, va=along,
                color=LIGHT["ink"], fontsize=8.5, parse_math=False, annotation_clip=False, zorder=5,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _display(axes: Axes, point: Point) -> tuple[float, float]:
    x, y = axes.transData.transform((point.x, point.y))
    return float(x), float(y)


def _shorten(name: str) -> str:
    # SVG cannot hold control characters.
    shown = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in name)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
