"""What evaluations found, compactly: six bytes for each record."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_robust.results.records import STATUSES

Bools = NDArray[np.bool_]
Key = tuple[str, str]

WRONG_STATUSES = frozenset({"unparsed", "error", "skipped", "success"})
"""Whatever else a record says, an item of such a status is wrong."""


class Items:
    """The items of an environment or attack; parts on the same items share one object.

    Args:
        ids: ``(items,)``, all different.
        labels: ``(items,)``, the right classes.
        own_ids: ``(items,)``, those of their environments, where ``ids`` tell several environments apart.
    """

    def __init__(
        self, ids: Sequence[str], labels: NDArray[np.int32], own_ids: Sequence[str] | None = None
    ) -> None:
        self.ids = tuple(ids)
        self.labels = labels
        self._own_ids = self.ids if own_ids is None else tuple(own_ids)

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, kept: Bools) -> Items:
        """Return some of the items."""
        places = np.flatnonzero(kept).tolist()
        ids, own_ids = ([names[i] for i in places] for names in (self.ids, self._own_ids))
        return Items(ids, self.labels[kept], own_ids)

    @cached_property
    def majority(self) -> float:
        """Accuracy of always answering the most frequent label; NaN without items."""
        return (
            float(np.unique(self.labels, return_counts=True)[1].max() / len(self)) if len(self) else math.nan
        )

    @cached_property
    def half(self) -> Bools:
        """``(items,)``: a fixed half of all items, by a hash of their ids that every run and machine shares."""
        # Not a checksum: those are linear, and could follow a pattern in numbered ids.
        digests = (
            hashlib.blake2b(i.encode("utf-8", "replace"), digest_size=1).digest() for i in self._own_ids
        )
        return np.array([digest[0] & 1 for digest in digests], dtype=bool)


class Part(NamedTuple):
    """One environment or attack in one evaluation.

    Args:
        items: What was evaluated.
        correct: ``(items,)``; items without a usable answer, skipped and broken ones are wrong.
        codes: ``(items,)``, places in ``STATUSES``, or its length for any other status.
        queries: ``(items,)``.
        seconds: Of all items together.
        environment: What was attacked, where a study's attacks ran on several environments; else empty.
    """

    items: Items
    correct: Bools
    codes: NDArray[np.uint8]
    queries: NDArray[np.int32]
    seconds: float
    environment: str = ""

    @property
    def statuses(self) -> dict[str, int]:
        """Number of items by status, those of ``STATUSES`` that there are."""
        counts = np.bincount(self.codes, minlength=len(STATUSES)).tolist()
        return {name: number for name, number in zip(STATUSES, counts, strict=False) if number}

    def only(self, kept: Bools) -> Part:
        """Return the part on some of its items.

        Args:
            kept: ``(items,)``. Seconds, which are not known by item, stay those of all.
        """
        return self._replace(
            items=self.items.only(kept),
            correct=self.correct[kept],
            codes=self.codes[kept],
            queries=self.queries[kept],
        )

    def joined(self, other: Part) -> Part:
        """Return this part and another one, on other items."""
        return Part(
            Items(self.items.ids + other.items.ids, np.concatenate([self.items.labels, other.items.labels])),
            np.concatenate([self.correct, other.correct]),
            np.concatenate([self.codes, other.codes]),
            np.concatenate([self.queries, other.queries]),
            self.seconds + other.seconds,
        )

    @property
    def accuracy(self) -> float:
        """Share of right items; NaN without items."""
        return float(self.correct.mean()) if len(self.correct) else math.nan

    @property
    def success_rate(self) -> float:
        """Successes among attacked items that were first classified correctly; NaN where there are none."""
        successes, failures = self.statuses.get("success", 0), self.statuses.get("failed", 0)
        return successes / (successes + failures) if successes + failures else math.nan

    @property
    def mean_queries(self) -> float:
        """Mean over all items; NaN without items."""
        return float(self.queries.mean()) if len(self.items) else math.nan

    @property
    def majority(self) -> float:
        """Accuracy of always answering the most frequent label."""
        return self.items.majority

    @property
    def unusable(self) -> int:
        """Items without a usable answer: ``unparsed`` or ``error``. They count as wrong."""
        return self.statuses.get("unparsed", 0) + self.statuses.get("error", 0)


class Evaluated(NamedTuple):
    """One evaluation of a run.

    Args:
        epoch: Of training.
        global_step: Of training.
        parts: By kind and name, as in `lightning_robust.results.groups`; attacks on several environments are told
            apart as «pwws on imdb».
        shared: What ``adv`` and ``ood`` summaries are made from: what all conditions that stand side by side
            measured (see `lightning_robust.results.summaries`). Without an entry, whatever was measured.
    """

    epoch: int | None
    global_step: int | None
    parts: dict[Key, Part]
    shared: Mapping[str, frozenset[Key]] = MappingProxyType({})

    @property
    def queries(self) -> int:
        """Victim calls counted by the attacks."""
        return sum(int(part.queries.sum()) for (kind, _), part in self.parts.items() if kind == "attack")

    @property
    def seconds(self) -> float:
        """Time that the items took, attacks and static environments together."""
        return sum(part.seconds for part in self.parts.values())
