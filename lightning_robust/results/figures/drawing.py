"""What all figures share: an empty drawing, and the ways out of it."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_robust.results.figures.palette import LIGHT

_VARIABLES = {value: name for name, value in LIGHT.items()}
_COLOR = re.compile("|".join(_VARIABLES))
_STYLE = re.compile(r'style="[^"]*"')
PNG_DPI = 160


def empty(size: tuple[float, float], title: str = "") -> tuple[Figure, Axes]:
    """Return a figure of ``size`` inches without frame, ticks or global state."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(
        title, loc="left", fontsize=10.5, color=LIGHT["ink"], pad=8, fontweight="bold", parse_math=False
    )
    axes.tick_params(colors=LIGHT["muted"], labelsize=9.5, length=0, pad=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=LIGHT["muted"], fontsize=9.5)
    axes.grid(True, axis="y", color=LIGHT["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def to_svg_file(figure: Figure, prefix: str) -> str:
    """Return a figure as an SVG file in light colours; equal figures give equal files.

    Args:
        figure: From this package.
        prefix: Goes before every id in the drawing, so that several fit on one page.
    """
    buffer = io.StringIO()
    # Text stays text: it takes the page's font, can be selected, and the file is smaller.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}), _any_glyph():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)


def to_svg(file: str, label: str) -> str:
    """Return an SVG file as an element to be put into a page, whose colours it then follows.

    Args:
        file: What `to_svg_file` returned.
        label: What a screen reader says; escaped here.
    """
    body = file[file.index("<svg") :]
    view = re.search(r'viewBox="([^"]*)"', body)
    head = f'<svg role="img" aria-label="{html.escape(label)}" viewBox="{view.group(1) if view else ""}">'
    body = head + body[body.index(">") + 1 :]
    # Only inside of style attributes: a label that reads like a colour stays as it is.
    return _STYLE.sub(lambda style: _COLOR.sub(_variable, style[0]), body).strip()


def on_white(file: str) -> str:
    """Return an SVG file with a background, to be seen outside of a page."""
    start = file.index(">", file.index("<svg")) + 1
    return f'{file[:start]}\n <rect width="100%" height="100%" style="fill: #ffffff"/>{file[start:]}'


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG on white."""
    buffer = io.BytesIO()
    with _any_glyph():
        figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="#ffffff", metadata={"Software": None})
    return buffer.getvalue()


def _variable(found: re.Match[str]) -> str:
    return f"var(--{_VARIABLES[found[0]]})"


@contextmanager
def _any_glyph() -> Iterator[None]:
    """Let names be in any script: a letter that matplotlib's font lacks is no matter for a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield
