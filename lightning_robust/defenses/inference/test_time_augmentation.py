"""TestTimeAugmentation: the mean probability over a text and noisy copies of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar, Literal

from lightning_robust.attacks.oracle import VictimLike
from lightning_robust.attacks.transformations import (
    delete_character,
    insert_character,
    substitute_character,
    swap_neighbors,
)
from lightning_robust.data.items import Text
from lightning_robust.defenses.checks import expect, expect_seed
from lightning_robust.defenses.inference.base import (
    Combine,
    InferenceDefense,
    expect_option,
    generator,
    like,
    parts_of,
)
from lightning_robust.errors import ConfigError

Augment = Callable[[str, random.Random], str]
"""A text and a generator to a changed text. It may depend on nothing else."""

_CHARACTER_CHANGES = (swap_neighbors, substitute_character, delete_character, insert_character)


class TestTimeAugmentation(InferenceDefense):
    """Averages the probabilities of a text and of randomly changed copies of it.

    The text itself counts as one copy. ``characters`` changes one character of each word with probability
    ``rate`` (two neighbours swapped, a character replaced, deleted or inserted); ``words`` deletes each word or
    swaps it with the next one, with probability ``rate`` together. Neither needs any resource.

    Args:
        victim: Anything from texts to probabilities.
        augment: ``characters``, ``words``, or a function of a text and a ``random.Random``; of pairs each text
            is changed by itself.
        num_copies: Changed copies.
        rate: Share of the words that are changed, where `augment` is named.
        combine: ``mean`` of the probabilities, or ``vote``.
        seed: Of the changes.

    Raises:
        ConfigError: If a setting is out of range.
    """

    __test__ = False  # pytest collects classes by their first letters
    aim: ClassVar[Literal["adversarial", "ood", "both"]] = "both"

    def __init__(
        self,
        victim: VictimLike,
        augment: str | Augment = "characters",
        num_copies: int = 8,
        rate: float = 0.1,
        combine: Combine = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__(victim)
        self.num_copies = expect("num_copies", num_copies, at_least=1, whole=True)
        self.rate = expect("rate", rate, at_least=0.0, at_most=1.0)
        self._combine = expect_option("combine", combine, Combine)
        self.seed = expect_seed(seed)
        self.augment = self._named(augment) if isinstance(augment, str) else augment
        if not callable(self.augment):
            raise ConfigError(
                f"Expected `augment` to be characters, words or a function, but got {augment!r}."
            )

    def copies(self, text: Text) -> list[Text]:
        rng = generator(self.seed, "augmentation", text)
        changed = [
            like(text, [self.augment(part, rng) for part in parts_of(text)]) for _ in range(self.num_copies)
        ]
        return [text, *changed]

    def _named(self, name: str) -> Augment:
        known: dict[str, Augment] = {
            "characters": lambda text, rng: change_characters(text, rng, self.rate),
            "words": lambda text, rng: change_words(text, rng, self.rate),
        }
        if name not in known:
            raise ConfigError(f"Expected `augment` to be {', '.join(known)} or a function, but got {name!r}.")
        return known[name]


def change_characters(text: str, rng: random.Random, rate: float) -> str:
    """Change one character of each word (of two characters or more) with probability ``rate``."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if rng.random() < rate:
            changed = rng.choice(_CHARACTER_CHANGES)(word, rng)
            words[i] = word if changed is None else changed
    return " ".join(words)


def change_words(text: str, rng: random.Random, rate: float) -> str:
    """Delete each word, or swap it with the next one, with probability ``rate``; one word at least stays."""
    words = text.split(" ")
    kept: list[str] = []
    for i in range(len(words)):
        change = rng.random() < rate
        if change and i + 1 < len(words) and rng.random() < 0.5:
            words[i], words[i + 1] = words[i + 1], words[i]
        elif change and (any(kept) or any(words[i + 1 :])):
            continue
        kept.append(words[i])
    return " ".join(kept)
