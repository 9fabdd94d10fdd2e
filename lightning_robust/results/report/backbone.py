"""What a page shows of the conditions on one backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_robust.results import figures
from lightning_robust.results.correlations import StudyCorrelation
from lightning_robust.results.figures import Style
from lightning_robust.results.report import accuracies, comparison, pictures, wording
from lightning_robust.results.report.measures import Moment, Score, moments
from lightning_robust.results.report.pictures import Drawing
from lightning_robust.results.selection import Rule
from lightning_robust.results.study import Column, Condition, Study
from lightning_robust.results.transfer import TransferMatrix, is_collapsed


class Backbone(NamedTuple):
    """What the page shows of the conditions on one backbone."""

    name: str
    conditions: list[Condition]
    styles: dict[str, Style]
    legend: list[tuple[Style, str]]
    traces: dict[str, list[Moment]]
    curves: list[Drawing]
    plane: Drawing | None
    heat: comparison.Heat | None
    heat_drawing: Drawing | None
    changes: Drawing | None
    changes_legend: list[tuple[Style, str]]
    correlation: list[str]
    grid: accuracies.Grid
    collapsed: list[Condition]

    @property
    def _upright(self) -> dict[str, Style]:
        collapsed = {one.name for one in self.collapsed}
        return {name: style for name, style in self.styles.items() if name not in collapsed}

    @property
    def attacked(self) -> bool:
        """Whether an attack ran."""
        moments = (one for condition in self.conditions for run in condition.runs for one in run.evaluations)
        return any(kind == "attack" for one in moments for kind, _ in one.parts)

    @property
    def averaged(self) -> bool:
        """Whether a condition has several runs."""
        return any(len(one.runs) > 1 for one in self.conditions)

    @property
    def hidden(self) -> bool:
        """Whether some conditions are drawn as background, other than as collapsed."""
        return any(not style.strong for style in self._upright.values())

    @property
    def paths(self) -> bool:
        """Whether the plane shows how a condition moved, rather than points only."""
        return any(len(self.traces[name]) > 1 for name in self._upright)

    @property
    def plane_legend(self) -> list[tuple[Style, str]]:
        """The legend without what the plane leaves out."""
        return [entry for entry in self.legend if entry[1] in self._upright]

    @property
    def collapsed_names(self) -> str:
        """Conditions that answer like a constant, for a sentence."""
        return wording.names_of(self.collapsed)

    @property
    def grey_names(self) -> str:
        """Those of them that are drawn grey; empty without any."""
        grey = [one for one in self.collapsed if not self.styles[one.name].strong]
        return wording.names_of(grey) if grey else ""

    @property
    def whiskers(self) -> bool:
        """Whether the curves show their intervals at their ends."""
        return len(self.conditions) > 1 and figures.has_whiskers(len(self.legend))


def backbone(
    study: Study,
    name: str,
    suffix: str,
    axis: str,
    rule: Rule,
    matrix: TransferMatrix,
    correlations: Sequence[StudyCorrelation],
    scores: dict[tuple[str, str], Score],
    found: Sequence[Column],
) -> Backbone:
    """Work out what a page shows of the conditions on the backbone ``name``.

    Args:
        study: What was loaded.
        name: Of the backbone.
        suffix: Of its figures' file names.
        axis: What evaluations are told apart by.
        rule: Which evaluation of each run is reported.
        matrix: Of the study.
        correlations: Of the study.
        scores: At the reported evaluation, by condition and column.
        found: The study's columns.
    """
    conditions = [one for one in study.conditions if one.backbone == name]
    baselines = {one.name for one in (study.baseline(other) for other in conditions) if one is not None}
    traces = {one.name: moments(one, axis, rule) for one in conditions}
    plain = [one.name for one in conditions if one.name in baselines]
    collapsed = [one for one in conditions if is_collapsed(one, rule)]
    styles = pictures.styles_of(conditions, plain, [one.name for one in collapsed], traces)
    upright = {one.name: traces[one.name] for one in conditions if one not in collapsed}
    heat = comparison.heat(matrix, name, styles)
    together = [one for one in correlations if one.backbone == name]
    numbers = {row.name: row.number for _, rows in heat.groups for row in rows} if heat else {}
    changes = comparison.changes(together[0], styles, numbers, suffix) if together else None
    legend = pictures.legend(styles)
    return Backbone(
        name,
        conditions,
        styles,
        legend,
        traces,
        pictures.curves(traces, styles, axis, suffix),
        pictures.plane(upright, styles, suffix),
        heat,
        comparison.heat_figure(heat, suffix) if heat else None,
        changes,
        _changes_legend(together, styles, legend),
        [sentence for one in together for sentence in wording.correlation_sentences(one)],
        accuracies.grid(conditions, found, scores),
        collapsed,
    )


def _changes_legend(
    found: Sequence[StudyCorrelation], styles: Mapping[str, Style], legend: list[tuple[Style, str]]
) -> list[tuple[Style, str]]:
    members = [point.condition for one in found for point in one.points]
    if any(not styles[one.name].strong for one in members):
        return comparison.aims_legend(members)
    names = {one.name for one in members}
    return [entry for entry in legend if entry[1] in names]
