"""Figures, drawn without global state: for pages as SVG that follows their colours, and as files."""

from lightning_robust.results.figures.drawing import on_white, to_png, to_svg, to_svg_file
from lightning_robust.results.figures.lines import Line, curves, has_whiskers, plane
from lightning_robust.results.figures.palette import (
    BACKGROUND,
    BASELINE,
    DARK,
    LIGHT,
    Style,
    heat_name,
    slot_style,
)
from lightning_robust.results.figures.transfer import Cell, Point, changes, heat_map, predicted

__all__ = [
    "BACKGROUND",
    "BASELINE",
    "DARK",
    "LIGHT",
    "Cell",
    "Line",
    "Point",
    "Style",
    "changes",
    "curves",
    "has_whiskers",
    "heat_map",
    "heat_name",
    "on_white",
    "plane",
    "predicted",
    "slot_style",
    "to_png",
    "to_svg",
    "to_svg_file",
]
