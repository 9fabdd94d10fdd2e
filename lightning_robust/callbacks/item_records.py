"""Records of items: what a victim, or an attack on it, made of each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import Tensor

from lightning_robust.attacks import AttackResult
from lightning_robust.attacks.goal import predicted_class
from lightning_robust.attacks.oracle import Failure, Oracle
from lightning_robust.attacks.progress import item_progress
from lightning_robust.data.items import Environment, Item
from lightning_robust.errors import AttackError
from lightning_robust.results import Record, encode_text

logger = logging.getLogger(__name__)

LOGIT_NOISE = 1e-5  # as the attacks' default
_CHUNK = 256  # items between two steps of the progress bar


@dataclass(frozen=True)
class When:
    """Which run, and which moment of it, an evaluation belongs to."""

    run_id: str
    epoch: int | None = None
    global_step: int | None = None


def prediction(answer: Tensor) -> int:
    """Return the class that a victim's answer ``(1, classes)`` predicts."""
    return predicted_class(answer[0], LOGIT_NOISE)


def environment_records(
    oracle: Oracle,
    when: When,
    environment: Environment,
    items: Sequence[Item],
    *,
    progress: bool | None = None,
) -> Iterator[Record]:
    """Yield what the victim predicts for items of a static environment; those that it raises on count as wrong.

    Args:
        oracle: Asks the victim.
        when: What the records say about run and time.
        environment: Of the items.
        items: Its items, or this process's share of them.
        progress: Whether to show a progress bar; None shows it on a terminal.

    Raises:
        AttackError: If the victim raises on all of them.
    """
    failures: list[str] = []
    uncertified: list[str] = []
    with item_progress(environment.name, len(items), progress) as advance:
        for start in range(0, len(items), _CHUNK):
            chunk = items[start : start + _CHUNK]
            begun = perf_counter()
            answers = oracle.answer([[item.text] for item in chunk])
            failures += [answer.message for answer in answers if isinstance(answer, Failure)]
            certificates = _certificates(oracle, chunk, answers)
            uncertified += [one.message for one in certificates if isinstance(one, Failure)]
            seconds = (perf_counter() - begun) / len(chunk)
            for item, answer, certificate in zip(chunk, answers, certificates, strict=True):
                oracle.check_label(item)
                yield _certified(static_record(when, environment, item, answer, seconds), certificate)
            advance(len(chunk))
    _tell(failures, environment, len(items))
    if uncertified:
        logger.warning(
            "%d of %d items of «%s» have no certificate; the first: %s.",
            len(uncertified),
            len(items),
            environment.name,
            uncertified[0],
        )


def static_record(
    when: When, environment: Environment, item: Item, answer: Tensor | Failure, seconds: float
) -> Record:
    """Return the record of one item of a static environment."""
    predicted = None if isinstance(answer, Failure) else prediction(answer)
    return Record(
        **vars(when),
        kind=environment.role,
        environment=environment.name,
        attack="",
        item_id=item.id,
        label=item.label,
        predicted=predicted,
        probability=None if isinstance(answer, Failure) else float(answer[0, item.label]),
        correct=predicted == item.label,
        status="error" if predicted is None else "evaluated",
        seconds=seconds,
        text=encode_text(item.text) or "",
    )


def attack_record(when: When, result: AttackResult) -> Record:
    """Return the record of one attack on one item."""
    failed = result.status == "error"
    return Record(
        **vars(when),
        kind="attack",
        environment="clean",
        attack=result.attack,
        item_id=result.item_id,
        label=result.label,
        predicted=None if failed else result.predicted,
        probability=None if failed else result.probability,
        correct=result.status == "failed",
        status=result.status,
        queries=result.queries,
        seconds=result.seconds,
        words_changed=result.words_changed,
        text=encode_text(result.original_text) or "",
        perturbed_text=encode_text(result.perturbed_text),
        warm_started=result.warm_started,
    )


def _certificates(oracle: Oracle, items: Sequence[Item], answers: Sequence[Any]) -> list[Any]:
    """Return a certificate, None or a failure for each item; None for those that the victim raised on before."""
    pairs = zip(items, answers, strict=True)
    answered = [(item.text, answer) for item, answer in pairs if not isinstance(answer, Failure)]
    proven = iter(oracle.certificates(answered))
    return [None if isinstance(answer, Failure) else next(proven) for answer in answers]


def _certified(record: Record, certificate: Any) -> Record:
    if certificate is None or isinstance(certificate, Failure):
        return record
    return replace(record, certified_radius=certificate.radius, certificate_confidence=certificate.confidence)


def _tell(failures: Sequence[str], environment: Environment, num_items: int) -> None:
    if failures and len(failures) == num_items:
        raise AttackError(f"No item of «{environment.name}» could be predicted: {failures[0]}.")
    if failures:
        logger.warning(
            "%d of %d items of «%s» could not be predicted and count as wrong; the first: %s.",
            len(failures),
            num_items,
            environment.name,
            failures[0],
        )
