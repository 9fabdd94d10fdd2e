"""The page's HTML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lightning_robust.results.figures import BACKGROUND, BASELINE, DARK, LIGHT, to_svg
from lightning_robust.results.figures.palette import HEAT_STEPS
from lightning_robust.results.report import formats
from lightning_robust.results.report.bundle import files_folder
from lightning_robust.results.report.content import MOST_STATES, Content
from lightning_robust.results.report.pictures import Drawing
from lightning_robust.results.study import Run

_FILTERS = ("percent", "points", "count", "duration", "size", "counted", "change", "accuracy_interval")


def render(content: Content, drawn: Mapping[str, str], target: Path) -> str:
    """Return the page as HTML; every text from records or recipes is escaped.

    Args:
        content: What to show.
        drawn: The figures as SVG files, by name.
        target: Where the page goes.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: getattr(formats, name) for name in _FILTERS})

    def svg(drawing: Drawing) -> Markup:
        return Markup(to_svg(drawn[drawing.name], drawing.label))

    return environment.get_template("report.html.jinja").render(
        **content._asdict(),
        memory_known=content.memory_known,
        svg=svg,
        label_name=label_name,
        light=LIGHT,
        dark=DARK,
        baseline_style=BASELINE,
        background=BACKGROUND,
        heat_names=[f"heat-n{k}" for k in range(HEAT_STEPS, 0, -1)]
        + [f"heat-{'p' if k else ''}{k}" for k in range(HEAT_STEPS + 1)],
        most_states=MOST_STATES,
        files=files_folder(target).name,
    )


def label_name(run: Run, label: int) -> str:
    """Return the name of a class where ``run.json`` has it, else its number."""
    if label < 0:
        return "no answer"
    names = run.info.get("label_names")
    if isinstance(names, Mapping):
        return str(names.get(str(label), label))
    return str(names[label]) if isinstance(names, list) and label < len(names) else f"class {label}"
