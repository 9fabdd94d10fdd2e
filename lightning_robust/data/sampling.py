"""Choices that depend on a seed and on what is chosen from, never on its order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")


def stable_hash(*parts: object) -> str:
    """Return 16 hexadecimal digits that are the same on every machine and in every run.

    >>> stable_hash("a fine film")
    'a465d39f9730cfe7'
    """
    data = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(data.encode("ascii")).hexdigest()[:16]


def seeded_order(keys: Sequence[Hashable], seed: int) -> list[int]:
    """Return the positions of ``keys`` in a random order that depends on the keys and ``seed`` only."""
    return sorted(range(len(keys)), key=lambda index: (stable_hash(seed, keys[index]), index))


def seeded_sample(values: Sequence[T], keys: Sequence[Hashable], size: int, seed: int) -> list[T]:
    """Return ``size`` of ``values``, in an order that does not depend on theirs.

    A smaller sample of the same seed is the beginning of a larger one.
    """
    return [values[index] for index in seeded_order(keys, seed)[:size]]
