"""DeepWordBug (Gao et al. 2018)."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from lightning_robust.attacks.attacked_text import AttackedText
from lightning_robust.attacks.base import Attack, Search, register
from lightning_robust.attacks.constraints import edit_distance, modifiable_words
from lightning_robust.attacks.goal import UntargetedGoal
from lightning_robust.attacks.search import greedy, rank_words
from lightning_robust.attacks.stop_words import STOP_WORDS
from lightning_robust.attacks.transformations import (
    changed_texts,
    delete_character,
    insert_character,
    substitute_character,
    swap_neighbors,
)
from lightning_robust.data.items import Item
from lightning_robust.errors import ConfigError

_CHANGES = (swap_neighbors, substitute_character, delete_character, insert_character)


@register
@dataclass
class DeepWordBug(Attack):
    """Character typos in the words that matter most.

    Gao, Lanchantin, Soffa and Qi 2018, arXiv:1801.04354, in the form of TextAttack 0.3.11, to which results
    are equal example by example given the same random numbers and stop words. Words are ranked by the score
    with the word replaced by the unknown token; at each word four typos (swap, substitute, delete, insert)
    are tried and the best is kept.

    Args:
        max_edit_distance: Levenshtein distance to the original that a text may reach.
        stop_words: Words never changed, as written; by default the package's own list.
        text_index: Which text of a pair may change; the last one (the hypothesis) by default.
    """

    name: ClassVar[str] = "deepwordbug"
    deterministic: ClassVar[bool] = False

    max_edit_distance: int = 30
    stop_words: Collection[str] | None = None
    text_index: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_edit_distance < 1:
            raise ConfigError(f"Expected `max_edit_distance` to be >= 1, but got {self.max_edit_distance}.")

    def search(self, item: Item, rng: random.Random) -> Search:
        text = AttackedText(item.text, self.text_index)
        goal = UntargetedGoal(self, item, text)
        if not (yield from goal.start()):
            return goal.result(goal.original)
        stop_words = STOP_WORDS if self.stop_words is None else frozenset(self.stop_words)

        def candidates(current: AttackedText, index: int) -> list[AttackedText]:
            changed = changed_texts(current, index, _CHANGES, rng)
            return [c for c in changed if edit_distance(text.attacked, c.attacked) <= self.max_edit_distance]

        order = yield from rank_words(goal, modifiable_words(text, stop_words))
        return (yield from greedy(goal, order, candidates))
