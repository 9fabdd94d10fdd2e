"""The contract of defenses at inference time: a victim around other victims."""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from scipy.stats import beta
from torch import Tensor
from typing_extensions import Self

from lightning_robust.attacks.goal import noise
from lightning_robust.attacks.oracle import VictimLike, checked_probabilities
from lightning_robust.data.items import Text
from lightning_robust.data.sampling import stable_hash
from lightning_robust.defenses.settings import settings_of
from lightning_robust.errors import AttackError, ConfigError
from lightning_robust.modules.encoding import pack
from lightning_robust.modules.finding import find_tokenizer

Combine = Literal["mean", "vote"]

_COPIES_AT_ONCE = 1 << 16  # bounds what is held at once
_BATCH_TOKENS = 16384  # in one call of a victim that does not pack batches itself, as in AttackEngine
_LOGIT_NOISE = 1e-5  # as the attacks' default: a vote may not depend on the batch


@dataclass(frozen=True)
class Certificate:
    """What is proven about a prediction.

    Args:
        radius: Words that may change without changing it; None where nothing could be shown (abstention).
        confidence: That the statement is true, over the random copies that it is estimated from.
    """

    radius: int | None
    confidence: float


class InferenceDefense(ABC):
    """A victim that answers for a text by what another victim says to several copies of it.

    It is a victim itself: callable with texts, for attacks, evaluations and further defenses. Random choices
    are drawn for each text from a generator seeded by the text, so that the answer to a text depends neither on
    the others, nor on batches, order or processes. The victim inside is asked for all copies of all texts in one
    call, without duplicates.

    A subclass says which `copies` are asked for; `_combine` is ``vote`` or ``mean``.
    """

    aim: ClassVar[Literal["adversarial", "ood", "both"]] = "both"
    """The kind of robustness that it was made for."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What it needs besides a victim."""

    settings: dict[str, Any]
    """The arguments that it was made with but the victim, defaults included."""
    _combine: Combine = "mean"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self.settings = settings_of(cls.__init__, args, kwargs, without=("victim",))
        return self

    def __init__(self, victim: VictimLike) -> None:
        if not callable(victim):
            raise ConfigError(
                f"Expected `victim` to be callable with texts, but got {type(victim).__name__} {victim!r:.80}."
            )
        self.victim = victim

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        """Raise what is wrong with the arguments but the victim, without a victim and without loading anything.

        A subclass that loads something when it is made, or that asks the victim for something, puts a stand-in
        there.

        Raises:
            ConfigError: If a value is wrong.
            TypeError: If there is no such setting.
        """
        cls(stand_in, **settings)

    @abstractmethod
    def copies(self, text: Text) -> list[Text]:
        """Return what the victim inside is asked in place of ``text``: one copy or more."""

    def __call__(self, texts: Sequence[Text]) -> Tensor:
        """Return probabilities ``(len(texts), classes)``, float32 on the CPU, rows summing to 1."""
        return self.predict_packed(texts)

    predict_proba = __call__

    def predict_packed(
        self, texts: Sequence[Text], max_batch_tokens: int | None = None, max_batch_size: int | None = None
    ) -> Tensor:
        """Return what a call does.

        Args:
            texts: Texts and pairs.
            max_batch_tokens: Padded tokens in one forward pass.
            max_batch_size: Copies in one forward pass.
        """
        limits = (max_batch_tokens, max_batch_size)
        asked = ((text, self.copies(text)) for text in texts)
        found = [combined(answers, self._combine) for _, answers in self._answers(asked, *limits)]
        return torch.stack(found) if found else ask(self.victim, [], *limits)

    def state_key(self) -> str | None:
        """Return a string that changes whenever answers may change; None where the victim does not say."""
        keys = [_state_key(one) for one in self._victims()]
        return None if None in keys else stable_hash(type(self).__name__, repr(self.settings), keys)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the victim inside, or of the module that it asks; None where there is none."""
        module = getattr(self.victim, "module", None)
        found = getattr(self.victim, "tokenizer", None)
        if found is None and module is not None:
            with suppress(ConfigError):
                return find_tokenizer(module)
        return found

    def around(self, victim: VictimLike) -> Self:
        """Return the same defense around another victim."""
        defense = copy.copy(self)
        defense.victim = victim
        return defense

    def _victims(self) -> list[VictimLike]:
        return [self.victim]

    def _confirmed(
        self,
        texts: Sequence[Text],
        answers: Tensor | None,
        independent: Callable[[Text], list[Text]],
        max_batch_tokens: int | None,
        max_batch_size: int | None,
    ) -> Iterator[tuple[Text, int]]:
        """Yield each text with the number of its independent copies that get the class that it is answered by."""
        if not texts:
            return
        limits = (max_batch_tokens, max_batch_size)
        predicted = (self.predict_packed(texts, *limits) if answers is None else answers).argmax(dim=1)
        asked = ((text, independent(text)) for text in texts)
        for label, (text, found) in zip(predicted.tolist(), self._answers(asked, *limits), strict=True):
            yield text, votes(found).tolist().count(label)

    def _answers(
        self,
        asked: Iterator[tuple[Text, list[Text]]],
        max_batch_tokens: int | None,
        max_batch_size: int | None,
    ) -> Iterator[tuple[Text, Tensor]]:
        """Yield each text with the answers ``(copies, classes)`` to its copies."""
        for group in _groups(asked):
            place = {one: 0 for _, copies in group for one in copies}
            place = {one: number for number, one in enumerate(place)}
            answers = ask(self.victim, list(place), max_batch_tokens, max_batch_size)
            for text, copies in group:
                yield text, answers[[place[one] for one in copies]]


def stand_in(texts: Sequence[Text]) -> Tensor:
    """Stand for a victim where nothing is asked."""
    raise AttackError(
        f"Expected a victim to answer {len(texts)} texts, but there is only what stands for one."
    )


def ask(
    victim: VictimLike,
    texts: list[Text],
    max_batch_tokens: int | None = None,
    max_batch_size: int | None = None,
) -> Tensor:
    """Return any victim's probabilities ``(len(texts), classes)``, float32 on the CPU.

    One that does not pack batches itself is called with batches by estimated length.

    Raises:
        AttackError: If it answers with something else.
    """
    packed = getattr(victim, "predict_packed", None)
    if not texts:
        return packed(texts).float().cpu() if callable(packed) else torch.empty(0, 0)
    if callable(packed):
        return checked_probabilities(packed(texts, max_batch_tokens, max_batch_size), texts)
    lengths = [sum(map(len, text)) // 3 + 3 for text in texts]
    order: list[int] = []
    rows: list[Tensor] = []
    for batch in pack(lengths, max_batch_tokens or _BATCH_TOKENS, max_batch_size):
        order += batch
        asked = [texts[i] for i in batch]
        rows.append(checked_probabilities(victim(asked), asked))
    answers = torch.cat(rows)
    return torch.empty_like(answers).index_copy_(0, torch.tensor(order), answers)


def combined(answers: Tensor, combine: Combine) -> Tensor:
    """Return the share of each class ``(classes,)`` in votes, or the mean probability, of ``(n, classes)``.

    Probabilities that differ by no more than the noise between batches tie, and the first class gets the vote.
    """
    if combine == "vote":
        answers = torch.nn.functional.one_hot(votes(answers), answers.shape[1])
    # In double precision the order of summation does not show.
    return answers.double().mean(dim=0).float()


def votes(answers: Tensor) -> Tensor:
    """Return the most probable class of each row of ``(n, classes)``; among ties the first."""
    highest = answers.max(dim=1, keepdim=True).values
    least = [[value - noise(value, _LOGIT_NOISE)] for value in highest.flatten().tolist()]
    return (answers >= torch.tensor(least)).int().argmax(dim=1)


def lower_bound(successes: int, trials: int, alpha: float) -> float:
    """Return the one-sided Clopper-Pearson bound: a share is below it with probability ``alpha`` at most.

    >>> round(lower_bound(100, 100, 0.05), 4)
    0.9705
    """
    return float(beta.ppf(alpha, successes, trials - successes + 1)) if successes else 0.0


def generator(seed: int, purpose: str, text: Text) -> random.Random:
    """Return the generator that is the text's own for this seed and purpose."""
    return random.Random(f"{seed}:{purpose}:{text!r}")


def expect_option(name: str, value: Any, kind: Any) -> Any:
    """Return ``value`` if it is one of the options of a ``Literal``.

    Raises:
        ConfigError: Otherwise.
    """
    options = get_args(kind)
    if value not in options:
        raise ConfigError(f"Expected `{name}` to be {' or '.join(options)}, but got {value!r}.")
    return value


def parts_of(text: Text) -> tuple[str, ...]:
    """Return the texts of an item as a tuple."""
    return (text,) if isinstance(text, str) else text


def like(text: Text, parts: Sequence[str]) -> Text:
    """Return ``parts`` as one text where ``text`` is one, else as a tuple."""
    return parts[0] if isinstance(text, str) else tuple(parts)


def _groups(asked: Iterator[tuple[Text, list[Text]]]) -> Iterator[list[tuple[Text, list[Text]]]]:
    group: list[tuple[Text, list[Text]]] = []
    size = 0
    for text, copies in asked:
        group.append((text, copies))
        size += len(copies)
        if size >= _COPIES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _state_key(victim: VictimLike) -> str | None:
    own = getattr(victim, "state_key", None)
    key: str | None = own() if callable(own) else None
    return key
