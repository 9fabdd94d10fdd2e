"""Everything that a page shows, worked out from a study once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lightning_robust.results.correlations import (
    EffectiveRobustness,
    StudyCorrelation,
    study_correlations,
    study_effective_robustness,
)
from lightning_robust.results.figures import Style
from lightning_robust.results.report import accuracies, comparison, made, verdicts, wording
from lightning_robust.results.report.backbone import Backbone, backbone
from lightning_robust.results.report.doubts import doubts
from lightning_robust.results.report.examples import Example, load_examples
from lightning_robust.results.report.measures import Moment, Score, time_axis
from lightning_robust.results.report.pictures import Drawing
from lightning_robust.results.selection import WORDS, Rule
from lightning_robust.results.study import Column, Condition, Run, Study, columns
from lightning_robust.results.transfer import (
    StudyVerdict,
    TransferMatrix,
    study_verdicts,
    transfer_matrix,
)

NUM_EXAMPLES = 8
MOST_STATES = 8


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
    statements: list[verdicts.Statement]
    small_print: str
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
    matrix, judged = transfer_matrix(study, rule=rule), study_verdicts(study, rule=rule, margin=margin)
    correlations, beyond = study_correlations(study, rule=rule), study_effective_robustness(study, rule=rule)
    scores = accuracies.final_scores(study.conditions, found, rule)
    names = list(dict.fromkeys(one.backbone for one in study.conditions))
    backbones = [
        backbone(
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
    statements = verdicts.statements(study, judged, WORDS[rule])
    answered = any(one.verdict is not None for one in judged)
    facts = {run.name: made.facts_of(run.info) for run in study.runs}
    shared = made.shared(list(facts.values()))
    return Content(
        study, rule, WORDS[rule], axis, found, judged, statements, verdicts.asked_in_advance(judged),
        [] if answered else _states(backbones),
        [*study.problems, *(verdicts.silent(study) if judged else []), *doubts(study, rule)],
        matrix, correlations, beyond, comparison.effective(beyond, styles), scores, backbones,
        accuracies.attack_rows(study.conditions, scores, rule),
        accuracies.coverage_rows(study.conditions, rule),
        accuracies.cost_rows(study.conditions),
        load_examples(study.conditions, NUM_EXAMPLES, rule),
        made.grouped(shared),
        [_made(one, facts, shared) for one in study.conditions],
    )  # fmt: skip


def _states(backbones: Sequence[Backbone]) -> list[tuple[Style, str]]:
    """Return one sentence on each condition where there is no verdict to open with."""
    found = [
        (one.styles[condition.name], wording.state(condition.name, trace, _whole(condition, trace)))
        for one in backbones
        for condition, trace in zip(one.conditions, one.traces.values(), strict=True)
    ]
    return found[:MOST_STATES]


def _whole(condition: Condition, trace: Sequence[Moment]) -> bool:
    return all(len(run.evaluations) <= len(trace) for run in condition.runs)


def _made(condition: Condition, facts: Mapping[str, made.Facts], known: made.Facts) -> Made:
    own = [facts[run.name] for run in condition.runs]
    common = made.without(made.shared(own), known)
    rest = [made.without(made.without(one, known), common) for one in own]
    runs = [
        (run.name, run.folder.name, made.one_line(one) if run.info else "no run.json")
        for run, one in zip(condition.runs, rest, strict=True)
    ]
    return Made(condition.name, made.grouped(common), runs)
