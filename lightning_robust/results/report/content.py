"""Everything that a page shows, worked out from a study once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_robust.results import figures
from lightning_robust.results.correlations import (
    EffectiveRobustness,
    StudyCorrelation,
    study_correlations,
    study_effective_robustness,
)
from lightning_robust.results.figures import Style
from lightning_robust.results.report import accuracies, comparison, made, pictures, wording
from lightning_robust.results.report.examples import Example, load_examples
from lightning_robust.results.report.measures import Moment, Score, moments, time_axis, title
from lightning_robust.results.report.pictures import Drawing
from lightning_robust.results.selection import WORDS, Rule, select
from lightning_robust.results.study import Column, Condition, Run, Study, columns
from lightning_robust.results.transfer import StudyVerdict, TransferMatrix, study_verdicts, transfer_matrix

NUM_EXAMPLES = 8
MOST_STATES = 8


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

    @property
    def averaged(self) -> bool:
        """Whether a condition has several runs."""
        return any(len(one.runs) > 1 for one in self.conditions)

    @property
    def hidden(self) -> bool:
        """Whether some conditions are drawn as background."""
        return any(not style.strong for style in self.styles.values())

    @property
    def whiskers(self) -> bool:
        """Whether the curves show their intervals at their ends."""
        return len(self.conditions) > 1 and figures.has_whiskers(len(self.legend))


class Made(NamedTuple):
    """How one condition's runs were made, beyond what all runs share; ``runs`` with what is only theirs."""

    condition: str
    facts: list[tuple[str, str]]
    runs: list[tuple[str, str, str]]


class Content(NamedTuple):
    """A page's contents."""

    study: Study
    rule: Rule
    selection: str
    axis: str
    columns: list[Column]
    verdicts: list[StudyVerdict]
    statements: list[wording.Statement]
    states: list[tuple[Style, str]]
    problems: list[str]
    matrix: TransferMatrix
    correlations: list[StudyCorrelation]
    effective: list[EffectiveRobustness]
    effective_drawings: list[Drawing]
    scores: dict[tuple[str, str], Score]
    backbones: list[Backbone]
    attacks: list[accuracies.AttackRow]
    coverage: list[accuracies.CoverageRow]
    costs: list[accuracies.CostRow]
    examples: list[tuple[Run, Example]]
    shared_facts: list[tuple[str, str]]
    made: list[Made]

    @property
    def memory_known(self) -> bool:
        """Whether any run noted the memory that it needed."""
        return any(not math.isnan(one.peak_memory) for one in self.costs)

    @property
    def drawings(self) -> Iterator[Drawing]:
        """All figures, to be written as files."""
        for one in self.backbones:
            yield from one.curves
            yield from (found for found in (one.plane, one.heat_drawing, one.changes) if found is not None)
        yield from self.effective_drawings


def look(study: Study, rule: Rule, margin: float) -> Content:
    """Work out what a page on ``study`` shows.

    Args:
        study: What was loaded.
        rule: Which evaluation of each run is reported.
        margin: The largest change that a verdict calls none, as a fraction.
    """
    found, axis = columns(study), time_axis(study)
    matrix, verdicts = transfer_matrix(study, rule=rule), study_verdicts(study, rule=rule, margin=margin)
    correlations, beyond = study_correlations(study, rule=rule), study_effective_robustness(study, rule=rule)
    scores = accuracies.final_scores(study.conditions, found, rule)
    names = list(dict.fromkeys(one.backbone for one in study.conditions))
    backbones = [
        _backbone(
            study,
            name,
            f"-{number}" if len(names) > 1 else "",
            axis,
            rule,
            matrix,
            correlations,
            scores,
            found,
        )
        for number, name in enumerate(names, 1)
    ]
    styles = {name: style for one in backbones for name, style in one.styles.items()}
    statements = wording.statements(study, verdicts, WORDS[rule])
    judged = any(one.verdict is not None for one in verdicts)
    facts = {run.name: made.facts_of(run.info) for run in study.runs}
    shared = made.shared(list(facts.values()))
    return Content(
        study, rule, WORDS[rule], axis, found, verdicts, statements,
        [] if judged else _states(backbones),
        [*study.problems, *_doubts(study, rule)],
        matrix, correlations, beyond, comparison.effective(beyond, styles), scores, backbones,
        accuracies.attack_rows(study.conditions, scores, rule),
        accuracies.coverage_rows(study.conditions, rule),
        accuracies.cost_rows(study.conditions),
        load_examples(study.conditions, NUM_EXAMPLES, rule),
        made.grouped(shared),
        [_made(one, facts, shared) for one in study.conditions],
    )  # fmt: skip


def _backbone(
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
    conditions = [one for one in study.conditions if one.backbone == name]
    baselines = {one.name for one in (study.baseline(other) for other in conditions) if one is not None}
    traces = {one.name: moments(one, axis, rule) for one in conditions}
    plain = [one.name for one in conditions if one.name in baselines]
    collapsed = [c.name for c, flat in zip(matrix.conditions, matrix.collapsed, strict=True) if flat]
    styles = pictures.styles_of(conditions, plain, collapsed, traces)
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
        pictures.plane(traces, styles, suffix),
        heat,
        comparison.heat_figure(heat, _changes(matrix, name), suffix) if heat else None,
        changes,
        _changes_legend(together, styles, legend),
        [sentence for one in together for sentence in wording.correlation_sentences(one)],
        accuracies.grid(conditions, found, scores),
    )


def _changes(matrix: TransferMatrix, backbone: str) -> dict[tuple[str, str], float]:
    return {
        (condition.name, title(column)): cell.delta
        for condition, row in zip(matrix.conditions, matrix.cells, strict=True)
        for column, cell in zip(matrix.columns, row, strict=True)
        if condition.backbone == backbone and cell is not None and cell.known
    }


def _changes_legend(
    found: Sequence[StudyCorrelation], styles: Mapping[str, Style], legend: list[tuple[Style, str]]
) -> list[tuple[Style, str]]:
    members = [point.condition for one in found for point in one.points]
    if any(not styles[one.name].strong for one in members):
        return comparison.aims_legend(members)
    names = {one.name for one in members}
    return [entry for entry in legend if entry[1] in names]


def _states(backbones: Sequence[Backbone]) -> list[tuple[Style, str]]:
    """Return one sentence on each condition where there is no verdict to open with."""
    found = [
        (one.styles[name], wording.state(name, trace))
        for one in backbones
        for name, trace in one.traces.items()
    ]
    return found[:MOST_STATES]


def _doubts(study: Study, rule: Rule) -> list[str]:
    """Return what the evaluations themselves found doubtful, with the runs that it is true of."""
    found: dict[str, list[str]] = {}
    for run in study.runs:
        chosen = select(run, rule).evaluation
        notes = [run.info] + [
            one
            for one in _list(run.info.get("evaluations"))
            if (one.get("epoch"), one.get("global_step")) == (chosen.epoch, chosen.global_step)
        ]
        for doubt in (doubt for note in notes for doubt in _list(note.get("doubts"))):
            found.setdefault(str(doubt.get("message") or doubt), []).append(run.name)
    return [f"{', '.join(dict.fromkeys(runs))}: {message}" for message, runs in found.items()]


def _list(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _made(condition: Condition, facts: Mapping[str, made.Facts], known: made.Facts) -> Made:
    own = [facts[run.name] for run in condition.runs]
    common = made.without(made.shared(own), known)
    rest = [made.without(made.without(one, known), common) for one in own]
    runs = [
        (run.name, run.folder.name, made.one_line(one) if run.info else "no run.json")
        for run, one in zip(condition.runs, rest, strict=True)
    ]
    return Made(condition.name, made.grouped(common), runs)
