"""RandomMaskVote: a vote over randomly masked copies, with a certified radius."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import comb
from typing import Any, ClassVar, Literal

from torch import Tensor

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
from lightning_robust.errors import ConfigError


class RandomMaskVote(InferenceDefense):
    """Votes over randomly masked copies, with a certified number of words that may change.

    RanMASK (Zeng et al. 2021, arXiv 2105.03743): of the h words of a text (runs without white space) a fixed
    number, ``share`` of them, is masked at random, n times; each class's probability is its share of the votes.
    Best with a model that was trained on masked texts (`RandomMask`), with the same share.

    **Certificate.** Let p be the probability that a random mask gives the class that was voted for, and k the
    words that are kept. Whoever replaces d words touches none that is kept with probability
    C(h - d, k) / C(h, k); so p falls by at most Δ(d) = 1 - C(h - d, k) / C(h, k), and the class stays the
    majority while p - Δ(d) > 1/2. p is replaced by its one-sided Clopper-Pearson bound from masks that were not
    used for the prediction (Cohen et al. 2019, arXiv 1902.02918). The radius is the largest such d; it is about
    the vote over all masks, against any replacement of words by words (neither inserted nor removed). Where the
    bound is not above 1/2 the vote abstains: its radius is None. A radius above 0 needs p > 1/2 + k/h: a share
    of one half or less never gives one.

    The paper multiplies Δ by an estimate β < 1 of how likely touched copies are to have voted for the class,
    which depends on the words that the attacker chooses; here β = 1, as in Levine and Feizi (arXiv 1911.09272),
    which makes it a guarantee.

    Args:
        victim: Anything from texts to probabilities.
        share: Of the words that are masked; at least one word is kept.
        num_copies: Masks of the prediction.
        combine: ``vote``, or ``mean`` of the probabilities, for which there is no certificate.
        mask_token: By default the tokenizer's mask token, else its unknown token.
        certificate_copies: Masks that a certificate is estimated from; 0 makes none.
        alpha: A certificate is wrong with this probability at most.
        seed: Of the masks.

    Raises:
        ConfigError: If a setting is out of range, or there is no mask token.
    """

    aim: ClassVar[Literal["adversarial", "ood", "both"]] = "adversarial"
    needs: ClassVar[tuple[str, ...]] = ("mask token",)

    def __init__(
        self,
        victim: VictimLike,
        share: float = 0.7,
        num_copies: int = 100,
        combine: Combine = "vote",
        mask_token: str | None = None,
        certificate_copies: int = 100,
        alpha: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(victim)
        self.share = expect("share", share, at_least=0.0, at_most=1.0)
        self.num_copies = expect("num_copies", num_copies, at_least=1, whole=True)
        self._combine = expect_option("combine", combine, Combine)
        self.certificate_copies = expect("certificate_copies", certificate_copies, at_least=0, whole=True)
        self.alpha = expect("alpha", alpha, at_least=1e-12, at_most=0.5)
        self.seed = expect_seed(seed)
        if mask_token is not None and not isinstance(mask_token, str):
            raise ConfigError(f"Expected `mask_token` to be a text, but got {mask_token!r}.")
        self.mask_token = mask_token if mask_token is not None else _mask_token(self.tokenizer)

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        """See `InferenceDefense.check_settings`."""
        token = settings.get("mask_token")
        # Without one it is the tokenizer's.
        super().check_settings(**settings | {"mask_token": "[MASK]" if token is None else token})

    def copies(self, text: Text) -> list[Text]:
        return self._masked(text, self.num_copies, generator(self.seed, "prediction", text))

    def certificates(
        self,
        texts: Sequence[Text],
        answers: Tensor | None = None,
        max_batch_tokens: int | None = None,
        max_batch_size: int | None = None,
    ) -> list[Certificate | None]:
        """Return how many words of each text may be replaced by any others; None where none are made.

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
        return self._masked(text, self.certificate_copies, generator(self.seed, "certificate", text))

    def _certificate(self, text: Text, confirmed: int) -> Certificate:
        bound = lower_bound(confirmed, self.certificate_copies, self.alpha)
        words = sum(len(part.split()) for part in parts_of(text))
        return Certificate(certified_radius(bound, words, self._kept(words)), 1 - self.alpha)

    def _kept(self, words: int) -> int:
        return max(words - round(self.share * words), min(words, 1))

    def _masked(self, text: Text, number: int, rng: random.Random) -> list[Text]:
        words = [part.split() for part in parts_of(text)]
        total = sum(map(len, words))
        hidden = total - self._kept(total)
        if not hidden:
            return [text] * number
        return [self._mask(text, words, set(rng.sample(range(total), hidden))) for _ in range(number)]

    def _mask(self, text: Text, words: list[list[str]], hidden: set[int]) -> Text:
        parts, start = [], 0
        for part in words:
            parts.append(
                " ".join(self.mask_token if i in hidden else word for i, word in enumerate(part, start))
            )
            start += len(part)
        return like(text, parts)


def certified_radius(bound: float, words: int, kept: int) -> int | None:
    """Return the number of words that may change: the largest d with ``bound - Δ(d) > 1/2``.

    Args:
        bound: Lower bound of the probability that a random mask gives the class.
        words: Words of the text.
        kept: Words that a mask keeps.

    Returns:
        0 where the class is the majority's but no change is covered, None where not even that is shown.

    >>> certified_radius(0.97, words=20, kept=4)
    2
    """
    if bound <= 0.5:
        return None
    radius = 0
    while radius < words and bound - _touched(radius + 1, words, kept) > 0.5:
        radius += 1
    return radius


def _touched(changed: int, words: int, kept: int) -> float:
    """The probability Δ that a mask keeps at least one of the changed words."""
    return 1 - comb(words - changed, kept) / comb(words, kept)


def _mask_token(tokenizer: Any) -> str:
    for name in ("mask_token", "unk_token"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return str(token)
    has = "has no tokenizer" if tokenizer is None else "has a tokenizer without a mask or unknown token"
    raise ConfigError(
        f"Expected `mask_token`, the text that stands for a masked word, as the victim {has}. For example: mask_token=[MASK]."
    )
