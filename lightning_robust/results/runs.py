"""Runs as a report needs them: read from their folders and named apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from lightning_robust.results import figures
from lightning_robust.results.examples import Example, choose_examples
from lightning_robust.results.files import PathLike, RecordsError, read_run_json
from lightning_robust.results.records import find_runs, read_records, record_files
from lightning_robust.results.tables import Group, Score, evaluations, groups, headline

NUM_EXAMPLES = 8
_NARROW = [
    "run_id", "epoch", "global_step", "kind", "environment", "attack", "item_id", "label", "predicted",
    "correct", "status", "queries", "seconds", "words_changed",
]  # fmt: skip


class Evaluated(NamedTuple):
    """One evaluation: its parts by ``(kind, name)`` and the three scores made from them."""

    epoch: int | None
    global_step: int | None
    parts: dict[tuple[str, str], Group]
    scores: dict[str, Score]

    @property
    def queries(self) -> int:
        """Victim calls counted by the attacks."""
        return sum(int(g.queries.sum()) for (kind, _), g in self.parts.items() if kind == "attack")

    @property
    def seconds(self) -> float:
        """Time that the items took, attacks and static environments together."""
        return float(sum(group.seconds.sum() for group in self.parts.values()))

    @property
    def worst_ood(self) -> Score | None:
        """The worst OOD environment; ``None`` without any."""
        found = [group for (kind, _), group in self.parts.items() if kind == "ood"]
        worst = min(found, key=lambda group: group.accuracy, default=None)
        return worst and Score(worst.accuracy, len(worst.label), worst.majority)


class Run(NamedTuple):
    """A run as the page shows it; ``evaluations`` are in the order of the steps."""

    name: str
    folder: Path
    slot: int
    info: dict[str, Any]
    evaluations: list[Evaluated]
    examples: list[Example]

    @property
    def first(self) -> Evaluated:
        """The earliest evaluation."""
        return self.evaluations[0]

    @property
    def last(self) -> Evaluated:
        """The evaluation that the page reports: the last, never the best."""
        return self.evaluations[-1]

    @property
    def color(self) -> int:
        """Number of the page's colour."""
        return self.slot % figures.NUM_COLORS

    @property
    def glyph(self) -> str:
        """The marker of the figures, as a character."""
        return figures.glyph_of(self.slot)

    def label_name(self, label: int) -> str:
        """Return the name of a class where ``run.json`` has it, else its number."""
        if label < 0:
            return "no answer"
        names = self.info.get("label_names")
        if isinstance(names, Mapping):
            return str(names.get(str(label), label))
        return str(names[label]) if isinstance(names, list) and label < len(names) else f"class {label}"


def load_runs(paths: Sequence[PathLike]) -> list[Run]:
    """Read the runs that ``paths`` stand for.

    Raises:
        RecordsError: Where there are no records.
    """
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in find_runs(path)))
    found: list[tuple[str, Path, dict[str, Any], list[Evaluated], list[Example]]] = []
    for folder in folders:
        info = read_run_json(folder) if (folder / "run.json").is_file() else {}
        by_run: dict[str, list[Evaluated]] = {}
        for one in evaluations(read_records(folder, columns=_NARROW)):
            parts = groups(one.table)
            by_run.setdefault(one.run_id, []).append(
                Evaluated(one.epoch, one.global_step, parts, headline(parts))
            )
        for run_id, evaluated in by_run.items():
            name = run_id if len(by_run) > 1 else str(info.get("name") or run_id or folder.name)
            found.append((name, folder, info, evaluated, _load_examples(folder, run_id, evaluated[-1])))
    if not found:
        raise RecordsError(f"The records under {', '.join(map(str, paths))} hold no rows: nothing to report.")
    names = _distinct([(name, folder) for name, folder, *_ in found])
    return [
        Run(name, one[1], slot, *one[2:]) for slot, (name, one) in enumerate(zip(names, found, strict=True))
    ]


def _load_examples(folder: Path, run_id: str, last: Evaluated) -> list[Example]:
    """Read the texts of the last evaluation only: those of all would not fit for long trainings."""
    for file in reversed(record_files(folder)):
        try:
            table = read_records(file)
        except RecordsError:
            continue  # cut short: already named in a warning
        rows = [
            row
            for row in table.filter(pc.equal(table["status"], "success")).to_pylist()
            if (row["run_id"], row["epoch"], row["global_step"]) == (run_id, last.epoch, last.global_step)
        ]
        if rows:
            return choose_examples(rows, NUM_EXAMPLES)
    return []


def _distinct(named: Sequence[tuple[str, Path]]) -> list[str]:
    """Return names that differ: by folder where two runs share one, else by number."""
    names = [name for name, _ in named]
    folders = [folder.name for _, folder in named]
    first = [
        name if names.count(name) == 1 or folder == name else f"{name} ({folder})"
        for name, folder in zip(names, folders, strict=True)
    ]
    return [
        name if first.count(name) == 1 else f"{name} [{first[: index + 1].count(name)}]"
        for index, name in enumerate(first)
    ]
