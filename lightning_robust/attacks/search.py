"""Searches that recipes are made of."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from torch import Tensor

from lightning_robust.attacks.attacked_text import AttackedText
from lightning_robust.attacks.base import AttackResult
from lightning_robust.attacks.goal import UntargetedGoal, descending
from lightning_robust.data.items import Text

UNKNOWN_WORD = "[UNK]"


def rank_words(
    goal: UntargetedGoal, indices: Sequence[int], replacement: str = UNKNOWN_WORD
) -> Generator[list[Text], Tensor, list[int]]:
    """Order words by how much the score rises without them, the most important first.

    Args:
        goal: What to reach.
        indices: The words that may be modified.
        replacement: What stands in for a word: the unknown token, or nothing to delete it.

    Returns:
        The ordered indices; none where the query budget did not reach to the end.
    """
    scored = yield from goal.ask([goal.text.replace_word(i, replacement) for i in indices])
    if goal.over:
        return []
    return [indices[i] for i in descending([s.score for s in scored], goal.attack.logit_noise)]


def greedy(
    goal: UntargetedGoal,
    order: Sequence[int],
    candidates: Callable[[AttackedText, int], list[AttackedText]],
) -> Generator[list[Text], Tensor, AttackResult]:
    """Go through the words once; keep at each the best candidate if it improves, until success.

    Args:
        goal: What to reach, already started.
        order: Word indices, the most important first.
        candidates: Texts that differ from the current one at a word index.
    """
    current = goal.original
    for index in order:
        scored = yield from goal.ask(candidates(current.text, index))
        if scored and goal.better(best := goal.best(scored), current):
            current = best
        if goal.reached(current) or goal.over:
            break
    return goal.result(current)
