"""One self-contained HTML page on one or more runs."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lightning_robust.results import figures
from lightning_robust.results.examples import Example
from lightning_robust.results.files import PathLike, RecordsError, write_text
from lightning_robust.results.runs import NUM_EXAMPLES, Run, load_runs
from lightning_robust.results.tables import NON_TEXT_ATTACKS, Group
from lightning_robust.results.wording import opening, summary

MEASURES = {"clean": "Clean", "adv": "Adversarial", "ood": "OOD"}
KINDS = {
    "clean": "In distribution",
    "attack": "Under attack",
    "adversarial": "Static adversarial benchmarks",
    "ood": "Under distribution shift (OOD)",
}


def write_report(runs: PathLike | Sequence[PathLike], output: PathLike) -> Path:
    """Write what was measured in ``runs`` to one HTML file that needs no network.

    The file appears complete or not at all. No intervals, tests or verdicts are computed: the page
    shows accuracies with the number of items behind each.

    Args:
        runs: Run folders, or folders that hold some.
        output: The file to write; a folder that exists gets ``report.html``.

    Returns:
        The path written.

    Raises:
        RecordsError: Where there are no records, or the file cannot be written.
    """
    paths = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    if not paths:
        raise RecordsError("Expected at least one run to report, but got none. Name a run's folder.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_runs(paths)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    left_out = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    target = Path(output)
    target = target / "report.html" if target.is_dir() else target
    return write_text(target, render(loaded, left_out))


def render(runs: Sequence[Run], left_out: Sequence[str] = ()) -> str:
    """Return the page as HTML; every text from records or recipes is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, count=_count, duration=_duration, pretty=_pretty)
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        opening=opening(runs),
        summaries=[summary(run) for run in runs],
        smallest=min((s.num_items for run in runs for s in run.last.scores.values()), default=0),
        left_out=left_out,
        measures=MEASURES,
        panels=_panels(runs),
        plane=_plane(runs),
        parts=_part_rows(runs),
        attacks=_attack_rows(runs),
        examples=_examples(runs),
        non_text=NON_TEXT_ATTACKS,
    )


def _time_axis(runs: Sequence[Run]) -> tuple[str, list[list[float]]]:
    """Return what the horizontal axis counts and each run's positions on it."""
    for label, name in (("epoch", "epoch"), ("step", "global_step")):
        columns = [[getattr(one, name) for one in run.evaluations] for run in runs]
        if all(None not in column and len(set(column)) == len(column) for column in columns):
            return label, [[float(value) for value in column] for column in columns]
    return "evaluation", [[float(i + 1) for i in range(len(run.evaluations))] for run in runs]


def _accuracies(run: Run, measure: str) -> list[float]:
    return [one.scores[measure].accuracy if measure in one.scores else math.nan for one in run.evaluations]


def _panels(runs: Sequence[Run]) -> list[Markup]:
    """Draw the curves: one panel for a single run, else one panel for each measure."""
    if all(len(run.evaluations) < 2 for run in runs):
        return []
    x_label, positions = _time_axis(runs)
    present = [
        measure
        for measure in MEASURES
        if any(measure in one.scores for run in runs for one in run.evaluations)
    ]
    if len(runs) == 1:
        lines = [
            figures.Series(positions[0], _accuracies(runs[0], measure), slot, MEASURES[measure])
            for slot, measure in enumerate(MEASURES)
            if measure in present
        ]
        figure = figures.curves("", x_label, lines, wide=True)
        label = f"Line chart of accuracy by {x_label}; the same numbers are in the table of evaluations."
        return [Markup(figures.to_svg(figure, "curves", label))]
    panels = []
    for measure in present:
        lines = [
            figures.Series(x, _accuracies(run, measure), run.slot)
            for x, run in zip(positions, runs, strict=True)
        ]
        figure = figures.curves(MEASURES[measure], x_label, lines, baseline=_baseline(runs, measure))
        label = f"Line chart of {MEASURES[measure]} accuracy by {x_label}, one line per run."
        panels.append(Markup(figures.to_svg(figure, f"curve-{measure}", label)))
    return panels


def _baseline(runs: Sequence[Run], measure: str) -> float:
    """Return the majority baseline where all runs share it, else NaN."""
    values = {round(run.last.scores[measure].majority, 6) for run in runs if measure in run.last.scores}
    return values.pop() if len(values) == 1 else math.nan


def _plane(runs: Sequence[Run]) -> Markup | None:
    shown = [run for run in runs if any({"adv", "ood"} <= set(one.scores) for one in run.evaluations)]
    if not shown:
        return None
    lines = [figures.Series(_accuracies(run, "adv"), _accuracies(run, "ood"), run.slot) for run in shown]
    label = "Adversarial against OOD accuracy, one path per run; the numbers are in the table of evaluations."
    return Markup(figures.to_svg(figures.plane(lines), "plane", label))


def _part_rows(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of the table of environments and attacks, by kind."""
    keys = list(dict.fromkeys(key for run in runs for key in run.last.parts))
    rows = []
    for kind, title in KINDS.items():
        members = []
        for key in (key for key in keys if key[0] == kind):
            cells = [run.last.parts.get(key) for run in runs]
            known = [cell for cell in cells if cell is not None]
            sizes = {len(cell.label) for cell in known}
            shares = {round(cell.majority, 6) for cell in known}
            members.append(
                {
                    "name": key[1],
                    "cells": cells,
                    "size": sizes.pop() if len(sizes) == 1 else None,
                    "majority": shares.pop() if len(shares) == 1 else None,
                    "unusable": sum(cell.unusable for cell in known),
                }
            )
        if members:
            rows.append((title, members))
    return rows


def _attack_rows(runs: Sequence[Run]) -> list[tuple[Run, str, Group, dict[str, int]]]:
    rows = []
    for run in runs:
        for (kind, name), group in run.last.parts.items():
            if kind == "attack":
                statuses = {
                    s: int((group.status == s).sum()) for s in ("success", "failed", "skipped", "error")
                }
                rows.append((run, name, group, statuses))
    return rows


def _examples(runs: Sequence[Run]) -> list[tuple[Run, Example]]:
    """Let the runs take turns until the page has enough."""
    turns = [
        (run, run.examples[index])
        for index in range(NUM_EXAMPLES)
        for run in runs
        if index < len(run.examples)
    ]
    return turns[:NUM_EXAMPLES]


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _count(value: float) -> str:
    # A narrow no-break space groups thousands without looking like a decimal mark anywhere.
    return "–" if math.isnan(value) else f"{value:,.0f}".replace(",", "\u202f")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _pretty(value: Any) -> str:
    """Return an entry of ``run.json`` for reading: plain values as they are, others as JSON."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False, default=str)
