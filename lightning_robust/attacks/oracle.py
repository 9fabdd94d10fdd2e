"""Turns the requests of many searches into few calls of the victim, and checks its answers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_robust.data.items import Item, Text
from lightning_robust.errors import AttackError, RobustError
from lightning_robust.modules.encoding import pack
from lightning_robust.modules.gradients import EmbeddingAnswer, EmbeddingQuery

logger = logging.getLogger(__name__)

_CACHED_ANSWERS = 1 << 17


class VictimLike(Protocol):
    """Anything that turns texts into probabilities ``(n, classes)``."""

    def __call__(self, texts: list[Text], /) -> Tensor: ...


@dataclass(frozen=True)
class Failure:
    """The victim raised on a text; the items that asked for it end with this message."""

    message: str


class Oracle:
    """Answers lists of requests from the cache or in packed batches.

    Args:
        victim: Called with lists of texts.
        max_batch_tokens: Estimated padded tokens in one call.
        max_batch_size: Texts in one call.
    """

    def __init__(self, victim: VictimLike, max_batch_tokens: int, max_batch_size: int | None) -> None:
        self.victim = victim
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.num_classes: int | None = None
        self._cache: dict[Text, Tensor] = {}

    def answer(self, requests: Sequence[list[Any]]) -> list[Any]:
        """Return for each request probabilities ``(n, classes)``, embedding answers, or a `Failure`."""
        gradients = [query for request in requests for query in request if isinstance(query, EmbeddingQuery)]
        texts = [text for request in requests for text in request if not isinstance(text, EmbeddingQuery)]
        known: dict[int, Any] = {}
        for query, found in zip(gradients, self._ask(gradients, self._gradients), strict=True):
            known[id(query)] = found
        answers = self._texts(texts)
        return [
            self._assembled([known[id(q)] if isinstance(q, EmbeddingQuery) else answers[q] for q in request])
            for request in requests
        ]

    def check_label(self, item: Item) -> None:
        """Raise where an item's label is none of the victim's classes."""
        if self.num_classes is not None and not 0 <= item.label < self.num_classes:
            raise AttackError(
                f"Expected labels from 0 to {self.num_classes - 1}, as the victim has {self.num_classes} "
                f"classes, but item {item.id!r} has {item.label}. Check the label map."
            )

    def _texts(self, texts: list[Text]) -> dict[Text, Tensor | Failure]:
        answers: dict[Text, Tensor | Failure] = {}
        new: dict[Text, None] = {}
        for text in texts:
            if text in self._cache:
                answers[text] = self._cache[text]
            else:
                new[text] = None
        for text, answer in zip(new, self._ask(list(new), self._probabilities), strict=True):
            answers[text] = answer
            if isinstance(answer, Tensor):
                self._cache[text] = answer
        for oldest in list(itertools.islice(self._cache, max(0, len(self._cache) - _CACHED_ANSWERS))):
            del self._cache[oldest]
        return answers

    def _ask(self, queries: list[Any], call: Callable[[list[Any]], list[Any]]) -> list[Any]:
        lengths = [_estimated_tokens(q.text if isinstance(q, EmbeddingQuery) else q) for q in queries]
        answers: dict[int, Any] = {}
        for batch in pack(lengths, self.max_batch_tokens, self.max_batch_size):
            asked = [queries[i] for i in batch]
            answers.update(zip(batch, _one_by_one_on_error(call, asked), strict=True))
        return [answers[i] for i in range(len(queries))]

    def _probabilities(self, texts: list[Text]) -> list[Tensor]:
        answer = torch.as_tensor(self.victim(texts)).detach().float().cpu()
        self._check(answer, texts)
        return list(answer)

    def _gradients(self, queries: list[EmbeddingQuery]) -> list[EmbeddingAnswer]:
        victim: Any = self.victim
        answers: list[EmbeddingAnswer] = victim.embedding_gradients(queries)
        if len(answers) != len(queries):
            raise AttackError(
                f"Expected {len(queries)} answers from `embedding_gradients`, but got {len(answers)}."
            )
        self._check(torch.stack([a.probabilities for a in answers]), [q.text for q in queries])
        for query, answer in zip(queries, answers, strict=True):
            if not answer.gradient.isfinite().all():
                raise AttackError(
                    f"Expected finite gradients, but got NaN or infinity for {_shown(query.text)}."
                )
        return answers

    def _check(self, answer: Tensor, texts: Sequence[Text]) -> None:
        classes = self.num_classes or (answer.shape[1] if answer.ndim == 2 else 0)
        if classes < 2 or tuple(answer.shape) != (len(texts), classes):
            raise AttackError(
                f"Expected the victim to return probabilities of shape ({len(texts)}, {classes or 'classes'}) "
                f"for {len(texts)} texts, with two or more classes, but got {tuple(answer.shape)}."
            )
        self.num_classes = classes
        for fault, rows in (
            ("finite probabilities", ~answer.isfinite().all(dim=1)),
            ("probabilities that are not negative", (answer < 0).any(dim=1)),
            ("probabilities that sum to 1", (answer.sum(dim=1) - 1).abs() > 1e-3),
        ):
            if rows.any():
                row = int(rows.nonzero()[0])
                raise AttackError(
                    f"Expected {fault} from the victim, but got {answer[row].tolist()} in row {row} of "
                    f"{len(texts)}, for {_shown(texts[row])}."
                )

    def _assembled(self, answers: list[Any]) -> Any:
        for answer in answers:
            if isinstance(answer, Failure):
                return answer
        if answers and isinstance(answers[0], EmbeddingAnswer):
            return answers
        return torch.stack(answers) if answers else torch.empty(0, self.num_classes or 0)


def _one_by_one_on_error(call: Callable[[list[Any]], list[Any]], queries: list[Any]) -> list[Any]:
    try:
        return call(queries)
    except RobustError:
        raise
    except Exception as error:
        if len(queries) == 1:
            logger.debug("The victim failed", exc_info=True)
            return [Failure(f"the victim raised {type(error).__name__}: {error}")]
    return [answer for query in queries for answer in _one_by_one_on_error(call, [query])]


def _estimated_tokens(text: Text) -> int:
    characters = len(text) if isinstance(text, str) else sum(map(len, text))
    return characters // 3 + 3


def _shown(text: Text) -> str:
    shown = repr(text)
    return f"the text {shown if len(shown) <= 120 else shown[:120] + '…'}"
