"""SynonymSmoothing: a vote over copies with random synonyms, with a certified radius."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_robust.attacks.attacked_text import word_spans
from lightning_robust.attacks.oracle import VictimLike
from lightning_robust.data.items import Text
from lightning_robust.defenses.checks import expect, expect_seed
from lightning_robust.defenses.inference.base import (
    Certificate,
    Combine,
    InferenceDefense,
    expect_option,
    generator,
    like,
    lower_bound,
    parts_of,
)
from lightning_robust.defenses.synonyms import Synonyms, load_synonyms


class SynonymSmoothing(InferenceDefense):
    """Votes over copies in which every word is a random one of itself and its synonyms.

    SAFER (Ye et al. 2020, arXiv 2005.14424): each word w is drawn uniformly from its set P(w), itself and its
    nearest synonyms, n times; each class's probability is its share of the votes, or the mean probability.

    **Certificate.** Let an attacker replace a word w by a synonym v of P(w). The copies' word there then comes
    from P(v), and the two distributions overlap by q(w, v) = |P(w) ∩ P(v)| / max(|P(w)|, |P(v)|). With q(w) the
    least over all v, replacing d words changes any class's probability by at most 1 - q₁ · … · q_d, with the d
    words that overlap least. The radius is the largest d with which the one-sided Clopper-Pearson bound of the
    probability of the class that was voted for, from copies that were not used for the prediction, stays above
    1/2; None (abstention) where the bound itself is not. It is about the vote over all copies, and about
    replacements *from these sets* only: an attack with other synonyms is not covered. The paper certifies all
    words at once and by the class that comes second, too; the majority suffices here, which is no less safe.

    Args:
        victim: Anything from texts to probabilities.
        synonyms: Words to their synonyms, nearest first; or a file of them, by default the counter-fitted
            neighbours (see `lightning_robust.defenses.synonyms.load_synonyms`).
        num_neighbors: Synonyms of a word at most.
        num_copies: Copies of the prediction.
        combine: ``vote``, or ``mean`` of the probabilities, for which there is no certificate.
        certificate_copies: Copies that a certificate is estimated from; 0 makes none.
        alpha: A certificate is wrong with this probability at most.
        seed: Of the copies.

    Raises:
        ConfigError: If a setting is out of range, or there are no synonyms.
    """

    aim: ClassVar[Literal["adversarial", "ood", "both"]] = "adversarial"
    needs: ClassVar[tuple[str, ...]] = ("synonyms",)

    def __init__(
        self,
        victim: VictimLike,
        synonyms: Synonyms = None,
        num_neighbors: int = 8,
        num_copies: int = 100,
        combine: Combine = "vote",
        certificate_copies: int = 100,
        alpha: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(victim)
        self.num_neighbors = expect("num_neighbors", num_neighbors, at_least=0, whole=True)
        self.num_copies = expect("num_copies", num_copies, at_least=1, whole=True)
        self._combine = expect_option("combine", combine, Combine)
        self.certificate_copies = expect("certificate_copies", certificate_copies, at_least=0, whole=True)
        self.alpha = expect("alpha", alpha, at_least=1e-12, at_most=0.5)
        self.seed = expect_seed(seed)
        self._neighbors = load_synonyms(synonyms)
        self._sets: dict[str, tuple[str, ...]] = {}
        self._overlaps: dict[str, float] = {}

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        """See `InferenceDefense.check_settings`."""
        synonyms = settings.get("synonyms")
        in_a_file = synonyms is None or isinstance(synonyms, str)
        super().check_settings(**settings | {"synonyms": {"word": ["synonym"]} if in_a_file else synonyms})

    def copies(self, text: Text) -> list[Text]:
        return self._drawn(text, self.num_copies, "prediction")

    def certificates(
        self,
        texts: Sequence[Text],
        answers: Tensor | None = None,
        max_batch_tokens: int | None = None,
        max_batch_size: int | None = None,
    ) -> list[Certificate | None]:
        """Return how many words of each text may be replaced by their synonyms; None where none are made.

        Args:
            texts: Texts and pairs, whose words are counted together.
            answers: What this defense answers to them ``(len(texts), classes)``, where it was asked before.
            max_batch_tokens: As in `predict_packed`.
            max_batch_size: As in `predict_packed`.
        """
        if self._combine != "vote" or not self.certificate_copies:
            return [None] * len(texts)
        confirmed = self._confirmed(texts, answers, self._independent, max_batch_tokens, max_batch_size)
        return [self._certificate(text, count) for text, count in confirmed]

    def _independent(self, text: Text) -> list[Text]:
        return self._drawn(text, self.certificate_copies, "certificate")

    def _certificate(self, text: Text, confirmed: int) -> Certificate:
        bound = lower_bound(confirmed, self.certificate_copies, self.alpha)
        overlaps = [self._overlap(word) for part in parts_of(text) for word in _words(part)]
        return Certificate(certified_radius(bound, overlaps), 1 - self.alpha)

    def _drawn(self, text: Text, number: int, purpose: str) -> list[Text]:
        rng = generator(self.seed, purpose, text)
        parts = [(part, [self._set(word) for word in _words(part)]) for part in parts_of(text)]
        return [
            like(text, [_replaced(part, [rng.choice(one) for one in sets]) for part, sets in parts])
            for _ in range(number)
        ]

    def _set(self, word: str) -> tuple[str, ...]:
        """The word and its synonyms, without those that would change the number of words."""
        if word not in self._sets:
            near = self._neighbors.nearest(word, self.num_neighbors)
            self._sets[word] = tuple(dict.fromkeys([word, *(one for one in near if _words(one) == [one])]))
        return self._sets[word]

    def _overlap(self, word: str) -> float:
        if word not in self._overlaps:
            own = self._set(word)
            others = [self._set(other) for other in own]
            shares = (len({*own} & {*other}) / max(len(own), len(other)) for other in others)
            self._overlaps[word] = min(shares)
        return self._overlaps[word]


def certified_radius(bound: float, overlaps: Sequence[float]) -> int | None:
    """Return the number of words that may be replaced by synonyms; None where ``bound`` is not above 1/2.

    Args:
        bound: Lower bound of the probability that a random copy gives the class.
        overlaps: Of each word's distribution with its synonyms', the least.

    >>> certified_radius(0.9, [0.8, 1.0, 0.8, 0.9])
    2
    """
    if bound <= 0.5:
        return None
    least = sorted(overlaps)
    kept = [math.prod(least[:d]) for d in range(1, len(least) + 1)]
    return sum(bound - (1 - one) > 0.5 for one in kept)


def _words(text: str) -> list[str]:
    return [text[start:end] for start, end in word_spans(text)]


def _replaced(text: str, words: Sequence[str]) -> str:
    pieces, end = [], 0
    for (start, stop), word in zip(word_spans(text), words, strict=True):
        pieces += [text[end:start], word]
        end = stop
    return "".join([*pieces, text[end:]])
