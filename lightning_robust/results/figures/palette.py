"""The colours of pages and figures: one table for light, one for dark."""

from __future__ import annotations

from typing import NamedTuple

NUM_COLORS = 8
HEAT_STEPS = 4
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖")

# Every light colour is used once: `to_svg` tells by it which CSS variable a figure's colour is.
LIGHT = {
    "page": "#f6f7f9", "card": "#ffffff", "ink": "#1b2330", "muted": "#5c6675", "line": "#e1e5eb",
    "strong-line": "#b3bbc7", "link": "#1f57c3", "new": "#fde7b0", "new-ink": "#4a3200", "old": "#b3261e",
    "note": "#fff7e6", "note-line": "#d99a1c",
    "run-0": "#2a5fd0", "run-1": "#c2500f", "run-2": "#13805a", "run-3": "#7f46c4",
    "run-4": "#8a6500", "run-5": "#00758a", "run-6": "#bd2f78", "run-7": "#5a6473",
    "heat-n4": "#ee9f4f", "heat-n3": "#f6bf85", "heat-n2": "#fbdcbb", "heat-n1": "#fdf0e3", "heat-0": "#f7f7f8",
    "heat-p1": "#e8f1fb", "heat-p2": "#c9dff5", "heat-p3": "#9cc4ec", "heat-p4": "#6ba4df",
    "good": "#0d6b47", "bad": "#a5300f",
}  # fmt: skip
DARK = {
    "page": "#12161c", "card": "#1a2028", "ink": "#e6eaf0", "muted": "#9ba6b5", "line": "#2c343f",
    "strong-line": "#4a5563", "link": "#8db4ff", "new": "#57430f", "new-ink": "#ffe6a8", "old": "#ff9a90",
    "note": "#2a2415", "note-line": "#b98a2a",
    "run-0": "#7faaff", "run-1": "#ff9a5c", "run-2": "#4fce9b", "run-3": "#c09bff",
    "run-4": "#e3bd4a", "run-5": "#4fcbe0", "run-6": "#ff8dc0", "run-7": "#b2bcc9",
    "heat-n4": "#7c521f", "heat-n3": "#5f431f", "heat-n2": "#45321d", "heat-n1": "#2e251c", "heat-0": "#20262e",
    "heat-p1": "#1a2a39", "heat-p2": "#1e3c56", "heat-p3": "#234f74", "heat-p4": "#2a6394",
    "good": "#5fd3a3", "bad": "#ff9a78",
}  # fmt: skip


class Style(NamedTuple):
    """How a run or condition is drawn, the same in every figure and legend.

    Args:
        color: Name in the palettes.
        marker: matplotlib's; empty for none.
        glyph: The character that looks like the marker, for legends in text.
        dashed: For the baseline.
        strong: False for what is only background.
    """

    color: str
    marker: str = "o"
    glyph: str = "●"
    dashed: bool = False
    strong: bool = True


BASELINE = Style("ink", "o", "●", dashed=True)
BACKGROUND = Style("strong-line", "", "–", strong=False)


def slot_style(slot: int) -> Style:
    """Return one of 56 styles that differ in colour or marker."""
    index = slot % len(MARKERS)
    return Style(f"run-{slot % NUM_COLORS}", MARKERS[index], GLYPHS[index])


def heat_name(value: float, scale: float) -> str:
    """Return the name of the colour of a difference, where ``scale`` gets the strongest one.

    >>> heat_name(-0.03, 0.04)
    'heat-n3'
    """
    step = round(max(-1.0, min(1.0, value / scale)) * HEAT_STEPS) if scale else 0
    return f"heat-{'n' if step < 0 else 'p' if step else ''}{abs(step)}"
