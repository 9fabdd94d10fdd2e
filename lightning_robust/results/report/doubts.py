"""What evaluations themselves found doubtful, said once for all runs that it is true of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lightning_robust.results.report.formats import counted
from lightning_robust.results.selection import Rule, select
from lightning_robust.results.study import Run, Study

_NAMED = 3
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


class _Doubt(NamedTuple):
    run: str
    message: str


def doubts(study: Study, rule: Rule) -> list[str]:
    """Return one sentence for each kind of doubt, with the runs that have it.

    Sentences that differ in their numbers only are one kind: the numbers of the first run stand for all.

    Args:
        study: Whose runs noted doubts in ``run.json``.
        rule: Which evaluation of each run counts.
    """
    found: dict[str, list[_Doubt]] = {}
    for run in study.runs:
        for message in _messages(run, rule):
            found.setdefault(_NUMBER.sub("#", message), []).append(_Doubt(run.name, message))
    return [_sentence(group) for group in found.values()]


def _sentence(group: list[_Doubt]) -> str:
    names, first = list(dict.fromkeys(one.run for one in group)), group[0]
    messages = list(dict.fromkeys(one.message for one in group))
    if len(names) == 1:
        return f"{first.run}: {' '.join(messages)}"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    who = f"{counted(len(names), 'run')} ({', '.join(names[:_NAMED])}{more})"
    if len(messages) == 1:
        return f"{who}: {first.message}"
    return f"{who}, each with numbers of its own. {first.run}: {first.message}"


def _messages(run: Run, rule: Rule) -> Iterator[str]:
    chosen = select(run, rule).evaluation
    evaluations = [
        one
        for one in _dicts(run.info.get("evaluations"))
        if (one.get("epoch"), one.get("global_step")) == (chosen.epoch, chosen.global_step)
    ]
    for note in (run.info, *evaluations):
        for doubt in _dicts(note.get("doubts")):
            yield str(doubt.get("message") or doubt)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
