"""Turns the requests of many searches into few calls of the victim and of services, and checks the answers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_robust.attacks.requests import READABLE, Ask, Service
from lightning_robust.data.items import Item, Text
from lightning_robust.errors import AttackError, RobustError
from lightning_robust.modules.encoding import pack
from lightning_robust.modules.gradients import EmbeddingAnswer, EmbeddingQuery

_Call = Callable[[list[Any]], Sequence[Any]]
"""Takes different queries and returns an answer for each."""

_UNKNOWN = object()
_UNASKED = object()  # the time was over before the victim was asked
_TEXTS_IN_TIME = 256  # in one call, where time is limited

logger = logging.getLogger(__name__)

_KEPT_ANSWERS = 1 << 17
_KEPT_CHARACTERS = 1 << 26
_KEPT_OF_A_SERVICE = 1 << 14  # answers such as sentence vectors are a hundred times a victim's
_TEXTS_PER_CALL = 4096  # of a victim that packs batches itself: bounds what it holds at once


class VictimLike(Protocol):
    """Anything that turns texts into probabilities ``(n, classes)``.

    One that packs batches itself may have ``predict_packed(texts, max_batch_tokens, max_batch_size)``, and
    one whose weights may change ``state_key()``, which names their present state. One that cuts long texts
    off may say where by ``readable_characters(texts)``, so that attacks leave the rest alone. One that proves
    something about its predictions may have ``certificates(texts, answers, max_batch_tokens, max_batch_size)``,
    where the answers are those that it gave. See `lightning_robust.modules.victim.Victim` and
    `lightning_robust.defenses.inference`.
    """

    def __call__(self, texts: list[Text], /) -> Tensor: ...


@dataclass(frozen=True)
class Failure:
    """The victim or a service raised on a query; the items that asked for it end with this message."""

    message: str


class Oracle:
    """Answers requests from what it knows, or in batches.

    Args:
        victim: Called with lists of texts.
        max_batch_tokens: Padded tokens in one call, estimated where the victim does not count them itself.
        max_batch_size: Texts in one call.
        autocast: Data type that the victim computes in, such as ``bfloat16``; None leaves it as it is.
    """

    def __init__(
        self,
        victim: VictimLike,
        max_batch_tokens: int,
        max_batch_size: int | None,
        autocast: str | None = None,
    ) -> None:
        self.victim = victim
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.autocast = autocast
        self.num_classes: int | None = None
        self._state: str | None = None
        self._texts = _Known(_KEPT_ANSWERS)
        self._services: dict[int, _Served] = {}

    def refresh(self) -> None:
        """Forget the victim's answers where its weights may have changed since they were given."""
        state_key = getattr(self.victim, "state_key", None)
        state = state_key() if callable(state_key) else None
        if state is None or state != self._state:
            self._texts.forget()
        self._state = state

    def answer(self, requests: Sequence[Any], deadline: float | None = None) -> list[Any]:
        """Return for each request its answers, or a `Failure`.

        Texts are answered by probabilities ``(n, classes)``, embedding queries and `Ask` by lists.

        Args:
            requests: Lists of texts, lists of embedding queries, and `Ask`.
            deadline: Of ``time.perf_counter``. Once it is past, the victim is not asked any more, and requests
                get fewer answers than queries; services are asked nevertheless. None means no limit.
        """
        texts: list[Text] = []
        gradients: list[EmbeddingQuery] = []
        asks: dict[int, list[Hashable]] = {}
        for request in requests:
            if isinstance(request, Ask):
                asks.setdefault(self._known_by(request.service), []).extend(request.queries)
            elif request and isinstance(request[0], EmbeddingQuery):
                gradients += request
            else:
                texts += request
        with _autocast(self.autocast):
            probabilities = self._texts.answers(texts, lambda new: self._probabilities(new, deadline))
            found = self._embedded(gradients, deadline)
        embedded = {id(query): answer for query, answer in zip(gradients, found, strict=True)}
        served = {key: self._services[key].answers(queries) for key, queries in asks.items()}
        answers: list[Any] = []
        for request in requests:
            if isinstance(request, Ask):
                known = served[id(request.service)]
                answers.append(_whole([known[query] for query in request.queries]))
            elif request and isinstance(request[0], EmbeddingQuery):
                answers.append(_whole([embedded[id(query)] for query in request]))
            else:
                answers.append(self._rows([probabilities[text] for text in request]))
        return answers

    def certificates(self, answered: Sequence[tuple[Text, Tensor]]) -> list[Any]:
        """Return what a victim that can prove something about its predictions proves, else None, for each text.

        Args:
            answered: Texts, each with the probabilities ``(1, classes)`` that it was answered by. One that the
                victim raises on gets a `Failure`.
        """
        certify = getattr(self.victim, "certificates", None)
        if not callable(certify) or not answered:
            return [None] * len(answered)

        def call(some: list[tuple[Text, Tensor]]) -> list[Any]:
            answers = torch.cat([answer for _, answer in some])
            found = certify([text for text, _ in some], answers, self.max_batch_tokens, self.max_batch_size)
            return list(found)

        with _autocast(self.autocast):
            return _halved_on_error(call, list(answered), "the victim")

    def check_label(self, item: Item) -> None:
        """Raise where an item's label is none of the victim's classes."""
        if self.num_classes is not None and not 0 <= item.label < self.num_classes:
            raise AttackError(
                f"Expected labels from 0 to {self.num_classes - 1}, as the victim has {self.num_classes} "
                f"classes, but item {item.id!r} has {item.label}. Check the label map."
            )

    def _known_by(self, service: Service) -> int:
        key = id(service)
        if key not in self._services and service is READABLE:
            # A foreign victim does not say how far it reads.
            victim_says = getattr(self.victim, "readable_characters", service)
            self._services[key] = _Served(victim_says)
        if key not in self._services:
            # The service is kept there, so that its id stays its own.
            self._services[key] = _Served(service)
        return key

    def _rows(self, rows: list[Any]) -> Tensor | Failure:
        for number, row in enumerate(rows):
            if isinstance(row, Failure):
                return row
            if row is _UNASKED:
                rows = rows[:number]
                break
        return torch.tensor(rows, dtype=torch.float32) if rows else torch.empty(0, self.num_classes or 0)

    def _probabilities(self, texts: list[Text], deadline: float | None) -> list[Any]:
        """Return a list of probabilities, or a `Failure`, for each text."""
        packed = getattr(self.victim, "predict_packed", None)
        if callable(packed):
            size = _TEXTS_PER_CALL if deadline is None else _TEXTS_IN_TIME
            chunks = [texts[i : i + size] for i in range(0, len(texts), size)]

            def call(chunk: list[Text]) -> list[Any]:
                return self._checked(packed(chunk, self.max_batch_tokens, self.max_batch_size), chunk)

            return [row for chunk in chunks for row in _in_time(call, chunk, deadline)]
        rows: list[Any] = [None] * len(texts)
        lengths = [_estimated_tokens(text) for text in texts]
        most = self.max_batch_size
        if deadline is not None:
            most = min(most or _TEXTS_IN_TIME, _TEXTS_IN_TIME)
        for batch in pack(lengths, self.max_batch_tokens, most):
            asked = [texts[i] for i in batch]
            answered = _in_time(lambda t: self._checked(self.victim(t), t), asked, deadline)
            for i, row in zip(batch, answered, strict=True):
                rows[i] = row
        return rows

    def _checked(self, answer: Any, texts: list[Text]) -> list[Any]:
        probabilities = checked_probabilities(answer, texts, self.num_classes)
        self.num_classes = probabilities.shape[1]
        rows: list[Any] = probabilities.tolist()
        return rows

    def _embedded(self, queries: list[EmbeddingQuery], deadline: float | None) -> list[Any]:
        answers: list[Any] = [None] * len(queries)
        lengths = [_estimated_tokens(query.text) for query in queries]
        for batch in pack(lengths, self.max_batch_tokens, self.max_batch_size):
            asked = [queries[i] for i in batch]
            for i, found in zip(batch, _in_time(self._gradients, asked, deadline), strict=True):
                answers[i] = found
        return answers

    def _gradients(self, queries: list[EmbeddingQuery]) -> list[EmbeddingAnswer]:
        victim: Any = self.victim
        answers: list[EmbeddingAnswer] = victim.embedding_gradients(queries)
        if len(answers) != len(queries):
            raise AttackError(
                f"Expected {len(queries)} answers from `embedding_gradients`, but got {len(answers)}."
            )
        self._checked(torch.stack([a.probabilities for a in answers]), [q.text for q in queries])
        for query, answer in zip(queries, answers, strict=True):
            if not answer.gradient.isfinite().all():
                raise AttackError(
                    f"Expected finite gradients, but got NaN or infinity for the text {_shown(query.text)}."
                )
        return answers


def checked_probabilities(answer: Any, texts: Sequence[Text], classes: int | None = None) -> Tensor:
    """Return a victim's answer to texts as probabilities ``(len(texts), classes)``, float32 on the CPU.

    Rows of half precision are made to sum to 1.

    Args:
        answer: A tensor, an array or a list of rows.
        texts: What the victim was asked.
        classes: Their number, where it is known.

    Raises:
        AttackError: If it is something else.
    """
    try:
        is_rows = isinstance(answer, list | tuple) and any(isinstance(row, Tensor) for row in answer)
        probabilities = torch.stack(list(answer)) if is_rows else torch.as_tensor(answer)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AttackError(
            f"Expected the victim to return probabilities of shape ({len(texts)}, classes), as a tensor, an "
            f"array or a list of rows, but got {type(answer).__name__} {_shown(answer)}: {error}."
        ) from error
    exact = probabilities.dtype not in (torch.bfloat16, torch.float16)
    probabilities = probabilities.detach().float().cpu()
    _check_rows(probabilities, texts, classes, 1e-3 if exact else 2e-2)
    return probabilities if exact else probabilities / probabilities.sum(dim=1, keepdim=True)


def _check_rows(answer: Tensor, texts: Sequence[Text], classes: int | None, tolerance: float) -> None:
    classes = classes or (answer.shape[1] if answer.ndim == 2 else 0)
    if classes < 2 or tuple(answer.shape) != (len(texts), classes):
        raise AttackError(
            f"Expected the victim to return probabilities of shape ({len(texts)}, {classes or 'classes'}) "
            f"for {len(texts)} texts, with two or more classes, but got {tuple(answer.shape)}."
        )
    for fault, rows in (
        ("finite probabilities", ~answer.isfinite().all(dim=1)),
        ("probabilities that are not negative", (answer < 0).any(dim=1)),
        ("probabilities that sum to 1", (answer.sum(dim=1) - 1).abs() > tolerance),
    ):
        if rows.any():
            row = int(rows.nonzero()[0])
            raise AttackError(
                f"Expected {fault} from the victim, but got {answer[row].tolist()} in row {row} of "
                f"{len(texts)}, for the text {_shown(texts[row])}."
            )


class _Known:
    """Answers of one victim or service; the oldest go when they grow too many.

    Args:
        limit: Answers that are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[Hashable, Any] = {}
        self._characters = 0

    def forget(self) -> None:
        """Forget every answer."""
        self._kept.clear()
        self._characters = 0

    def answers(self, queries: Iterable[Any], ask: _Call) -> dict[Any, Any]:
        """Return an answer for each query; those that are not known, each once, go to ``ask``."""
        kept = self._kept
        answers = {query: kept.get(query, _UNKNOWN) for query in queries}
        new = [query for query, answer in answers.items() if answer is _UNKNOWN]
        if new:
            for query, answer in zip(new, ask(new), strict=True):
                answers[query] = answer
                if not isinstance(answer, Failure) and answer is not _UNASKED:
                    kept[query] = answer
                    self._characters += _characters(query)
            self._make_room()
        return answers

    def _make_room(self) -> None:
        while self._kept and (len(self._kept) > self._limit or self._characters > _KEPT_CHARACTERS):
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._characters -= _characters(oldest)


class _Served:
    """A service and what it answered."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._known = _Known(_KEPT_OF_A_SERVICE)

    def answers(self, queries: Iterable[Any]) -> dict[Any, Any]:
        """Return an answer or a `Failure` for each query."""
        return self._known.answers(queries, self._ask)

    def _ask(self, queries: list[Any]) -> list[Any]:
        return _halved_on_error(self._call, queries, type(self.service).__name__)

    def _call(self, queries: list[Any]) -> Sequence[Any]:
        answers = list(self.service(queries))
        if len(answers) != len(queries):
            name = type(self.service).__name__
            raise AttackError(f"Expected {len(queries)} answers from {name}, but got {len(answers)}.")
        return answers


@contextmanager
def _autocast(dtype: str | None) -> Iterator[None]:
    """Compute in another data type on every kind of device there is: victims do not say where they are."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda") if dtype is not None else ():
            if device == "cpu" or torch.cuda.is_available():
                stack.enter_context(torch.autocast(device, dtype=getattr(torch, str(dtype))))
        yield


def _in_time(call: _Call, queries: list[Any], deadline: float | None) -> list[Any]:
    if deadline is not None and perf_counter() > deadline:
        return [_UNASKED] * len(queries)
    return _halved_on_error(call, queries, "the victim")


def _halved_on_error(call: _Call, queries: list[Any], name: str) -> list[Any]:
    """Return the answers to all queries that can be answered, and failures for the others."""
    try:
        return list(call(queries))
    except RobustError:
        raise
    except Exception as error:
        if len(queries) == 1:
            logger.debug("%s failed", name, exc_info=True)
            return [Failure(f"{name} raised {type(error).__name__}: {error}")]
    half = len(queries) // 2
    return [*_halved_on_error(call, queries[:half], name), *_halved_on_error(call, queries[half:], name)]


def _whole(answers: list[Any]) -> list[Any] | Failure:
    answers = list(itertools.takewhile(lambda answer: answer is not _UNASKED, answers))
    return next((answer for answer in answers if isinstance(answer, Failure)), answers)


def _characters(query: Any) -> int:
    if isinstance(query, str):
        return len(query)
    return sum(map(_characters, query)) if isinstance(query, tuple) else 1


def _estimated_tokens(text: Text) -> int:
    return _characters(text) // 3 + 3


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 120 else shown[:120] + "…"
