"""Advances many attack searches together and asks the victim in full batches."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from lightning_robust.attacks.base import Attack, AttackResult, Search, get_attack
from lightning_robust.attacks.oracle import Failure, Oracle, VictimLike
from lightning_robust.attacks.progress import attack_progress
from lightning_robust.attacks.requests import Ask
from lightning_robust.data.items import Item
from lightning_robust.errors import AttackError, ConfigError, RobustError
from lightning_robust.modules.gradients import EmbeddingQuery

logger = logging.getLogger(__name__)

AUTOCAST = (None, "bfloat16", "float16")
_CHARACTERS_AT_ONCE = 1 << 25  # of the candidates that live searches hold
OnResult = Callable[[AttackResult], None]


class AttackEngine:
    """Runs attacks against one victim.

    In each round the engine gathers what every live search asks, removes duplicates, sorts by length, packs
    batches, calls the victim and sends the answers back. Results do not depend on the batch size, on the
    order of items, on how many run together or in how many processes: every item draws from a generator of
    its own, and scores that differ by less than floating-point noise tie.

    Args:
        victim: A callable ``texts -> probabilities (n, classes)``; with ``embedding_gradients`` for
            white-box attacks (see `lightning_robust.modules.victim.Victim`).
        max_batch_tokens: Padded tokens in one call of the victim at most; estimated, where it does not pack
            batches itself.
        max_batch_size: Texts in one call of the victim, where it has a limit of its own.
        max_live: Searches that are advanced together.
        progress: Whether to show a progress bar; None shows it on a terminal.
        keep_answers: Whether the victim stays as it is, so that its answers hold from one run to the next. A
            victim with a `state_key` needs no promise.
        autocast: ``bfloat16`` or ``float16`` makes a torch victim compute in that type: several times faster
            where the hardware has it, with results that depend on the batch by its rounding (see
            `Attack.logit_noise`).
    """

    def __init__(
        self,
        victim: VictimLike,
        max_batch_tokens: int = 16384,
        max_live: int = 256,
        progress: bool | None = None,
        *,
        max_batch_size: int | None = None,
        keep_answers: bool = False,
        autocast: str | None = None,
    ) -> None:
        if autocast not in AUTOCAST:
            raise ConfigError(f"Expected `autocast` to be bfloat16, float16 or None, but got {autocast!r}.")
        if not callable(victim):
            raise ConfigError(
                f"Expected a victim that can be called with texts, but got {type(victim).__name__} {victim!r:.80}."
            )
        limits = {
            "max_batch_tokens": max_batch_tokens,
            "max_live": max_live,
            "max_batch_size": max_batch_size,
        }
        for setting, value in limits.items():
            if value is not None and value < 1:
                raise ConfigError(f"Expected `{setting}` to be >= 1, but got {value}.")
        self.victim = victim
        self.max_live = max_live
        self.progress = progress
        self.keep_answers = keep_answers
        self.oracle = Oracle(victim, max_batch_tokens, max_batch_size, autocast)

    def run(
        self,
        attack: Attack | str,
        items: Iterable[Item],
        query_budget: int | None = None,
        seed: int = 0,
        on_result: OnResult | None = None,
        done: Mapping[str, AttackResult] | None = None,
        *,
        time_budget: float | None = None,
    ) -> list[AttackResult]:
        """Attack every item.

        Args:
            attack: An attack or the name of one.
            items: What to attack; ids must differ.
            query_budget: Queries that one search may make, the original text included.
            seed: Of the items' random generators.
            on_result: Called with each result as soon as it is there, so that an interrupted run keeps it.
            done: Results of an earlier run by item id; those of this attack on the same text and label are
                taken over unasked. That settings, budget and seed were the same is the caller's promise.
            time_budget: Seconds after which no further item is started and the searches under way end with
                what they have (``exhausted``). Which items that hits depends on the machine.

        Returns:
            One result per item that was started, in the items' order. Items whose texts make the victim
            raise have the status ``error``.

        Raises:
            ConfigError: If ids repeat, a budget is not positive or the victim cannot give gradients.
            AttackError: If the victim's answers are no probabilities.
        """
        if isinstance(attack, str):
            attack = get_attack(attack)
        items = list(items)
        _check_ids(items)
        results = {
            item.id: result
            for item in items
            if (result := (done or {}).get(item.id)) is not None
            and (result.attack, result.original_text, result.label) == (attack.name, item.text, item.label)
        }
        left = (item for item in items if item.id not in results)
        with attack_progress(attack.name, len(items), self.progress) as show:
            for result in results.values():
                show(result)
            found = self.stream(attack, left, query_budget, seed, time_budget=time_budget)
            for result in found:
                results[result.item_id] = result
                show(result)
                if on_result is not None:
                    on_result(result)
        _report(results)
        return [results[item.id] for item in items if item.id in results]

    def stream(
        self,
        attack: Attack | str,
        items: Iterable[Item],
        query_budget: int | None = None,
        seed: int = 0,
        *,
        time_budget: float | None = None,
    ) -> Iterator[AttackResult]:
        """Attack items as they come and yield results as they are there, in no particular order.

        Items are taken from the iterable only when a search can be started, and neither they nor results
        are kept, so that memory does not grow with their number; that ids differ is not checked. Arguments
        as for `run`.
        """
        if isinstance(attack, str):
            attack = get_attack(attack)
        self._check(attack, query_budget, time_budget)
        if not self.keep_answers:
            self.oracle.refresh()
        deadline = None if time_budget is None else perf_counter() + time_budget
        return _Rounds(attack, self.oracle, query_budget, seed, deadline).run(iter(items), self.max_live)

    def _check(self, attack: Attack, query_budget: int | None, time_budget: float | None) -> None:
        whole = isinstance(query_budget, int) and not isinstance(query_budget, bool)
        if query_budget is not None and not (whole and query_budget >= 1):
            raise ConfigError(
                f"Expected `query_budget` to be >= 1, but got {query_budget!r}: "
                "the first query asks whether the item is classified correctly. None means no limit."
            )
        if time_budget is not None and not time_budget > 0:
            raise ConfigError(
                f"Expected `time_budget` to be > 0 seconds, but got {time_budget}. None means no limit."
            )
        if attack.needs_gradients and not callable(getattr(self.victim, "embedding_gradients", None)):
            raise ConfigError(
                f"Expected a victim with `embedding_gradients` for `{attack.name}`, which follows gradients, "
                f"but got {type(self.victim).__name__}. Use lightning_robust.modules.victim.Victim, or an "
                "attack that needs probabilities only."
            )


@dataclass
class _Live:
    """A search under way, what it asks now and how much of that counts, and what it has cost."""

    item: Item
    search: Search
    request: Any = ()
    embedded: bool = False
    counted: int = 0
    queries: int = 0
    seconds: float = 0.0
    over: bool = False


class _Rounds:
    """One run: starts searches, and advances all live ones by one answer a round."""

    def __init__(
        self, attack: Attack, oracle: Oracle, query_budget: int | None, seed: int, deadline: float | None
    ) -> None:
        self.attack = attack
        self.oracle = oracle
        self.query_budget = query_budget
        self.seed = seed
        self.deadline = deadline
        self.cut = 0
        self.not_reached = False

    def run(self, waiting: Iterator[Item], max_live: int) -> Iterator[AttackResult]:
        ready: deque[tuple[_Live, Any]] = deque()
        asked: list[_Live] = []
        try:
            while True:
                characters = 0
                # Searches that ask for much hold back those behind them, so that memory stays bounded.
                while characters < _CHARACTERS_AT_ONCE:
                    if ready:
                        one, answer = ready.popleft()
                    elif len(asked) >= max_live or (item := self._next(waiting)) is None:
                        break
                    else:
                        one, answer = self._start(item), None
                    if finished := self._advance(one, answer):
                        yield finished
                    else:
                        asked.append(one)
                        characters += _characters(one.request)
                if not asked:
                    return
                ready.extend(self._answered(asked))
                asked = []
        finally:
            self._tell()
            for one in [*asked, *(one for one, _ in ready)]:
                one.search.close()

    def _next(self, waiting: Iterator[Item]) -> Item | None:
        item = next(waiting, None)
        if item is not None and self.deadline is not None and perf_counter() > self.deadline:
            self.not_reached = True
            return None
        return item

    def _start(self, item: Item) -> _Live:
        _check_item(item)
        search = self.attack.start(item, self.seed)
        if not isinstance(search, Generator):
            raise self._mistaken(f"`search` to be a generator, but it returned {type(search).__name__}")
        return _Live(item, search)

    def _answered(self, asked: list[_Live]) -> Iterator[tuple[_Live, Any]]:
        """Yield searches with their answers; those that got none in time end, or count as not started."""
        for one, answer in zip(asked, self._answers(asked), strict=True):
            missing = 0 if isinstance(answer, Failure) else _size(one.request) - len(answer)
            if missing and one.queries == one.counted and not len(answer):
                self.not_reached = True
                one.search.close()
                continue
            if missing:
                one.queries -= missing if one.counted else 0
                one.over = True
                self.cut += 1
            yield one, answer

    def _answers(self, live: list[_Live]) -> list[Any]:
        began = perf_counter()
        answers = self.oracle.answer([one.request for one in live], self.deadline)
        sizes = [_size(one.request) for one in live]
        share = (perf_counter() - began) / max(1, sum(sizes))
        for one, size in zip(live, sizes, strict=True):
            one.seconds += share * size
            self.oracle.check_label(one.item)
        return answers

    def _tell(self) -> None:
        if self.cut or self.not_reached:
            logger.warning(
                "%s: the time was over before %d searches were, which count as failed%s.",
                self.attack.name,
                self.cut,
                "; items behind them were not reached" if self.not_reached else "",
            )

    def _mistaken(self, expected: str) -> AttackError:
        return AttackError(f"Expected `{self.attack.name}`'s {expected}. Mend the attack.")

    def _advance(self, one: _Live, answer: Any) -> AttackResult | None:
        """Send an answer; return the result, or None where the search goes on."""
        if isinstance(answer, Failure):
            return self._failed(one, answer.message)
        if one.embedded and not one.request:
            answer = []  # and no probabilities of no text
        began = perf_counter()
        try:
            request = one.search.send(answer)
        except StopIteration as stop:
            one.seconds += perf_counter() - began
            result = stop.value
            if not isinstance(result, AttackResult):
                raise self._mistaken(
                    f"`search` to return an AttackResult, but it returned {type(result).__name__}"
                ) from None
            return dataclasses.replace(
                result,
                item_id=one.item.id,
                queries=one.queries,
                seconds=one.seconds,
                exhausted=one.over and result.status == "failed",
            )
        except RobustError:
            raise
        except Exception as error:
            logger.debug("The search on item %r failed", one.item.id, exc_info=True)
            return self._failed(one, f"{type(error).__name__}: {error}")
        one.seconds += perf_counter() - began
        self._take(one, request)
        return None

    def _take(self, one: _Live, request: Any) -> None:
        """Accept a request as far as the query budget goes."""
        if isinstance(request, Ask):
            one.request, one.embedded = request, False
            return
        if one.over:
            raise AttackError(
                f"Expected `{self.attack.name}` to return a result once it got fewer answers than it asked "
                "for (the query budget is spent), but it asked again. Mend its `search`."
            )
        if not isinstance(request, list | tuple) or not all(
            isinstance(query, str | tuple | EmbeddingQuery) for query in request[:1]
        ):
            raise self._mistaken(f"requests to be lists of texts, but got {request!r:.80}")
        one.embedded = bool(request) and isinstance(request[0], EmbeddingQuery)
        if one.embedded and not self.attack.needs_gradients:
            raise AttackError(
                f"Expected `{self.attack.name}`, which asks for gradients, to set `needs_gradients`."
            )
        counted = not one.embedded or request[0].counted
        left = len(request)
        if counted and self.query_budget is not None:
            left = self.query_budget - one.queries
        one.request = list(request[:left])
        one.over = len(one.request) < len(request)
        one.counted = len(one.request) if counted else 0
        one.queries += one.counted

    def _failed(self, one: _Live, message: str) -> AttackResult:
        one.search.close()
        nothing = float("nan")
        return AttackResult(
            item_id=one.item.id,
            attack=self.attack.name,
            status="error",
            label=one.item.label,
            predicted=-1,
            probability=nothing,
            queries=one.queries,
            seconds=one.seconds,
            original_text=one.item.text,
            perturbed_text=None,
            words_changed=0,
            error=message,
            original_predicted=-1,
            original_probability=nothing,
        )


def _characters(request: Any) -> int:
    if isinstance(request, Ask) or (request and isinstance(request[0], EmbeddingQuery)):
        return 0
    return sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in request)


def _size(request: Any) -> int:
    return len(request.queries if isinstance(request, Ask) else request)


def _check_ids(items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ConfigError(
                f"Expected items with different ids, but {item.id!r} occurs more than once. "
                "Results are paired by id: give every item its own."
            )
        seen.add(item.id)


def _check_item(item: Item) -> None:
    texts = (item.text,) if isinstance(item.text, str) else item.text
    if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"Expected item {item.id!r} to have a text, or a tuple of them, but got {item.text!r:.80}."
        )
    if not isinstance(item.label, int):
        raise ConfigError(f"Expected item {item.id!r} to have an integer label, but got {item.label!r}.")


def _report(results: Mapping[str, AttackResult]) -> None:
    failed = [result for result in results.values() if result.status == "error"]
    if failed:
        logger.warning(
            "%d of %d items could not be attacked; first: item %r: %s",
            len(failed),
            len(results),
            failed[0].item_id,
            failed[0].error,
        )
