"""What a run folder's files hold, as it is read."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lightning_robust.results.parts import Evaluated, Items, Key, Part
from lightning_robust.results.sources import Source

_ORDER = {"clean": 0, "attack": 1, "adversarial": 2, "ood": 3}
_EPOCH = re.compile(r"epoch=(\d+)")


class Where(NamedTuple):
    """What a part is of; the environment is told for clean items and attacks, whose name is not that of one."""

    kind: str
    name: str
    environment: str


class Loaded:
    """What a run folder's files hold.

    Args:
        source: Where it is from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.runs: dict[str, dict[tuple[int | None, int | None], dict[Where, Part]]] = {}
        self.not_numbers: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.repeated: Counter[str] = Counter()
        self.left_out: list[tuple[Path, str]] = []
        self._clean: dict[tuple[tuple[str, Items], ...], Items] = {}

    @property
    def attacked(self) -> set[str]:
        """The environments that attacks ran on."""
        moments = (parts for run in self.runs.values() for parts in run.values())
        return {where.environment for parts in moments for where in parts if where.kind == "attack"}

    @property
    def lost(self) -> list[int | None]:
        """The epochs of the files that cannot be read; None where a file's name does not say."""
        found = [_EPOCH.search(path.name) for path, _ in self.left_out]
        return [int(one[1]) if one else None for one in found]

    def evaluations(self, run_id: str, several: bool = False) -> list[Evaluated]:
        """Return a run's evaluations in the order of steps.

        Args:
            run_id: One of ``runs``.
            several: Whether the study's attacks ran on several environments, so that attacks are named with theirs.
        """
        found = [
            Evaluated(epoch, step, self._named(parts, several))
            for (epoch, step), parts in self.runs[run_id].items()
        ]
        return sorted(found, key=lambda one: (_number(one.global_step), _number(one.epoch)))

    def _named(self, parts: dict[Where, Part], several: bool) -> dict[Key, Part]:
        found: dict[Key, Part] = {}
        clean = {where.environment: part for where, part in parts.items() if where.kind == "clean"}
        if clean:
            found["clean", "clean"] = self._together(clean)
        for where, part in sorted(parts.items(), key=lambda part: _ORDER[part[0].kind]):
            if several and where.kind == "attack":
                environment = where.environment or "?"
                name = f"{where.name} on {environment}"
                found[where.kind, name] = part._replace(environment=environment)
            elif where.kind != "clean":
                found[where.kind, where.name] = part
        return found

    def _together(self, clean: dict[str, Part]) -> Part:
        """Return several clean environments as one part; ids that they share are told apart by their environment."""
        first, *others = clean.values()
        if not others:
            return first
        joined = first
        for one in others:
            joined = joined.joined(one)
        key = tuple((name, part.items) for name, part in clean.items())
        if key not in self._clean:
            own = joined.items.ids
            told = [f"{name}: {i}" for name, part in clean.items() for i in part.items.ids]
            self._clean[key] = Items(own if len(set(own)) == len(own) else told, joined.items.labels, own)
        return joined._replace(items=self._clean[key])


def _number(value: int | None) -> float:
    return -1.0 if value is None else float(value)
