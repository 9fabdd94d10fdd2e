"""Numbers as text, the same on the page and in its figures' descriptions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_robust.results.statistics import Effect


class Shown(NamedTuple):
    """A number for a table's cell: with its interval, or with the mark of a note that says why there is none."""

    value: str
    interval: str = ""
    note: str = ""


class Notes:
    """The reasons below a table, each with a letter that cells refer to."""

    def __init__(self) -> None:
        self._marks: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._marks)

    def mark(self, reason: str) -> str:
        """Return the letter of a reason: a, b, …, z, aa, …"""
        return self._marks.setdefault(reason, _letters(len(self._marks)))

    @property
    def items(self) -> list[tuple[str, str]]:
        """Letters with their reasons, in the order of their first use."""
        return [(mark, reason) for reason, mark in self._marks.items()]


def percent(value: float) -> str:
    """Return a fraction as percent, such as ``71.2``."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """Return a difference of fractions as percentage points with a sign, such as ``+2.1``.

    >>> points(-0.0004)
    '0.0'
    """
    if math.isnan(value):
        return "–"
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def change(effect: Effect) -> str:
    """Return a difference with its interval, such as ``+2.1 [-0.4, +4.6]``; the reason where there is none."""
    return f"{points(effect.delta)} {points_interval(effect)}" if effect.known else effect.reason


def points_interval(effect: Effect) -> str:
    """Return the interval of a difference."""
    return f"[{points(effect.low)}, {points(effect.high)}]"


def show_change(effect: Effect, notes: Notes) -> Shown:
    """Return the cell of a difference; without an interval only the note's letter is shown."""
    if not effect.known:
        return Shown("", note=notes.mark(effect.reason or "no interval can be given"))
    return Shown(points(effect.delta), points_interval(effect))


def show_accuracy(effect: Effect, notes: Notes) -> Shown:
    """Return the cell of an accuracy; without an interval only the note's letter is shown."""
    if not effect.known:
        return Shown("", note=notes.mark(effect.reason or "no interval can be given"))
    return Shown(percent(effect.delta), accuracy_interval(effect))


def accuracy_interval(effect: Effect) -> str:
    """Return the interval of an accuracy."""
    return f"[{percent(effect.low)}, {percent(effect.high)}]"


def estimate(effect: Effect) -> float:
    """Return the number that may be shown: NaN where no interval can be stood behind."""
    return effect.delta if effect.known else math.nan


def count(value: float) -> str:
    """Return a number with its thousands apart."""
    # A narrow no-break space groups thousands without looking like a decimal mark anywhere.
    return "–" if math.isnan(value) else f"{value:,.0f}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """Return an amount of memory."""
    return "–" if math.isnan(num_bytes) else f"{num_bytes / 2**30:.1f} GiB"


def counted(number: int, word: str, plural: str = "") -> str:
    """Return a number with its noun, such as ``1 run`` or ``2 runs``."""
    return f"{count(number)} {word if number == 1 else plural or word + 's'}"


def listed(parts: Sequence[str], word: str = "and") -> str:
    """Return texts as a list in a sentence."""
    return "".join(parts) if len(parts) < 2 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def _letters(number: int) -> str:
    before = _letters(number // 26 - 1) if number >= 26 else ""
    return before + chr(ord("a") + number % 26)
