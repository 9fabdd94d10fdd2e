"""How runs were made: what all share is said once, then what is a condition's own, then a run's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

LEFT_OUT = frozenset({"run_id", "name", "evaluations", "plain_run_id"})
_TITLES = {"label_names": "Label names", "max_epochs": "Epochs", "git": "Git"}

Facts = dict[str, str]


class Made(NamedTuple):
    """One level of facts, grouped by their first name, each group as lines of text."""

    title: str
    groups: list[tuple[str, str]]


def flatten(value: Any, path: str = "") -> Facts:
    """Return nested values as one level: ``{"a": {"b": [1]}}`` as ``{"a.b.0": "1"}``."""
    if isinstance(value, Mapping) and value:
        members: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        members = enumerate(value)
    else:
        return {path: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}
    found: Facts = {}
    for name, member in members:
        found.update(flatten(member, f"{path}.{name}" if path else str(name)))
    return found


def facts_of(info: Mapping[str, Any]) -> Facts:
    """Return what ``run.json`` says on how a run was made."""
    return flatten({name: value for name, value in info.items() if name not in LEFT_OUT}) if info else {}


def shared(facts: Sequence[Facts]) -> Facts:
    """Return the facts that all have with one value."""
    if not facts:
        return {}
    first, *others = facts
    return {path: value for path, value in first.items() if all(other.get(path) == value for other in others)}


def without(facts: Facts, known: Facts) -> Facts:
    """Return the facts that are not known yet."""
    return {path: value for path, value in facts.items() if known.get(path) != value}


def grouped(facts: Facts) -> list[tuple[str, str]]:
    """Return titles with lines, such as ``("Versions", "python: 3.11\\ntorch: 2.13")``."""
    groups: dict[str, list[str]] = {}
    for path, value in facts.items():
        top, _, rest = path.partition(".")
        groups.setdefault(top, []).append(f"{rest}: {value}" if rest else value)
    return [
        (_TITLES.get(top) or top.replace("_", " ").capitalize(), "\n".join(lines))
        for top, lines in groups.items()
    ]


def one_line(facts: Facts) -> str:
    """Return a run's own facts, short enough for a list."""
    return "; ".join(f"{path}: {value}" for path, value in facts.items())
