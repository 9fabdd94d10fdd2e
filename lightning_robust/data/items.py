"""The atoms of an evaluation: items and the environments that group them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Text = str | tuple[str, ...]
"""One text, or the texts of a pair (premise, hypothesis)."""

Role = Literal["clean", "ood", "adversarial"]
ROLES: tuple[Role, ...] = ("clean", "ood", "adversarial")


@dataclass(frozen=True)
class Item:
    """One labelled example.

    ``id`` is stable across machines and runs; records are paired by it.
    """

    id: str
    text: Text
    label: int
    domain: str = ""


@dataclass(frozen=True)
class Environment:
    """A named set of test items with one role."""

    name: str
    role: Role
    items: Sequence[Item] = field(repr=False)
