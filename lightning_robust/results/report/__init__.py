"""One self-contained HTML page on a run or a study, with its figures and tables as files beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_robust.results.figures import on_white, to_png, to_svg_file
from lightning_robust.results.files import PathLike, RecordsError, clear_errors
from lightning_robust.results.report.bundle import write_bundle
from lightning_robust.results.report.content import look
from lightning_robust.results.report.export import tables
from lightning_robust.results.report.page import render
from lightning_robust.results.selection import Rule, check_rule
from lightning_robust.results.statistics.verdict import check_margin
from lightning_robust.results.study import load_study

__all__ = ["write_report"]


def write_report(
    runs: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    baseline: str | None = None,
    select: Rule = "last",
    margin: float = 0.01,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Write what was measured in ``runs`` to one HTML file that needs no network.

    Beside it, in a folder such as ``report_files``, are its figures as SVG and PNG and its tables as CSV and
    Parquet. All appear complete or not at all. Numbers without an interval that can be stood behind are replaced
    by the reason.

    Args:
        runs: Run folders, or folders that hold some.
        output: The file to write; a folder that exists gets ``report.html``.
        baseline: Name of the condition that others are compared with; found by itself by default.
        select: Which evaluation of each run is reported: ``last``, ``clean``, ``joint`` or ``oracle``.
        margin: The largest change that a verdict calls none, as a fraction.
        progress: Called with the records files read so far and their number.

    Returns:
        The path written.

    Raises:
        RecordsError: Where there are no records, or a file cannot be written.
        ConfigError: If ``select`` is unknown.
        StatisticsError: If ``margin`` is no fraction between 0 and 1.
    """
    paths = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    if not paths:
        raise RecordsError("Expected at least one run to report, but got none. Name a run's folder.")
    check_rule(select)
    check_margin(margin)
    target = Path(output)
    with clear_errors(target):
        target = target / "report.html" if target.is_dir() else target
    content = look(load_study(paths, baseline=baseline, progress=progress), select, margin)
    files, drawn = tables(content), {}
    for drawing in content.drawings:
        drawn[drawing.name] = to_svg_file(drawing.figure, drawing.name)
        files[f"{drawing.name}.svg"] = on_white(drawn[drawing.name]).encode("utf-8", "replace")
        files[f"{drawing.name}.png"] = to_png(drawing.figure)
    return write_bundle(target, render(content, drawn, target), files)
