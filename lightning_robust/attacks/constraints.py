"""What a perturbation may not do."""

from __future__ import annotations

from collections.abc import Collection

from lightning_robust.attacks.attacked_text import AttackedText


def modifiable_words(text: AttackedText, stop_words: Collection[str]) -> list[int]:
    """Return the indices of words that are no stop word and were not modified yet.

    Stop words are compared as they are written, in the manner of TextAttack: «The» is none.
    """
    return [i for i, word in enumerate(text.words) if word not in stop_words and i not in text.modified]


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance.

    Bit-parallel (Myers 1999, in the form of Hyyrö 2003): one column of the table is two integers, so that a
    long text costs a few integer operations per character.

    >>> edit_distance("kitten", "sitting")
    3
    """
    a, b = _without_common_ends(a, b)
    if not a or not b:
        return len(a) + len(b)
    positions: dict[str, int] = {}
    for i, character in enumerate(a):
        positions[character] = positions.get(character, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    increases, decreases, distance = full, 0, len(a)
    for character in b:
        match = positions.get(character, 0)
        diagonal = ((((match & increases) + increases) ^ increases) | match | decreases) & full
        up = decreases | (full & ~(diagonal | increases))
        down = increases & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & full, down << 1 & full
        increases, decreases = down | (full & ~(diagonal | up)), up & diagonal
    return distance


def _without_common_ends(a: str, b: str) -> tuple[str, str]:
    shortest, start, end = min(len(a), len(b)), 0, 0
    while start < shortest and a[start] == b[start]:
        start += 1
    while end < shortest - start and a[-1 - end] == b[-1 - end]:
        end += 1
    return a[start : len(a) - end], b[start : len(b) - end]
