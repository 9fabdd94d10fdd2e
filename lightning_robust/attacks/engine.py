"""Advances many attack searches together and asks the victim in full batches."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from lightning_robust.attacks.base import Attack, AttackResult, Search, get_attack
from lightning_robust.attacks.oracle import Failure, Oracle, VictimLike
from lightning_robust.attacks.progress import attack_progress
from lightning_robust.data.items import Item
from lightning_robust.errors import AttackError, ConfigError, RobustError
from lightning_robust.modules.gradients import EmbeddingQuery

logger = logging.getLogger(__name__)

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
        max_batch_tokens: Estimated padded tokens in one call of the victim.
        max_batch_size: Texts in one call of the victim, where it has a limit of its own.
        max_live: Searches that are advanced together.
        progress: Whether to show a progress bar; None shows it on a terminal.
    """

    def __init__(
        self,
        victim: VictimLike,
        max_batch_tokens: int = 16384,
        max_live: int = 256,
        progress: bool | None = None,
        *,
        max_batch_size: int | None = None,
    ) -> None:
        limits = {
            "max_batch_tokens": max_batch_tokens,
            "max_live": max_live,
            "max_batch_size": max_batch_size,
        }
        for setting, value in limits.items():
            if value is not None and value < 1:
                raise ConfigError(f"Expected `{setting}` to be >= 1, but got {value}.")
        self.victim = victim
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.max_live = max_live
        self.progress = progress

    def run(
        self,
        attack: Attack | str,
        items: Sequence[Item],
        query_budget: int | None = None,
        seed: int = 0,
        on_result: OnResult | None = None,
        done: Mapping[str, AttackResult] | None = None,
    ) -> list[AttackResult]:
        """Attack every item.

        Args:
            attack: An attack or the name of one.
            items: What to attack; ids must differ.
            query_budget: Queries that one search may make, the original text included.
            seed: Of the items' random generators.
            on_result: Called with each result as soon as it is there, so that an interrupted run keeps it.
            done: Results of an earlier run by item id; those of this attack are taken over unasked.

        Returns:
            One result per item, in the items' order. Items whose texts make the victim raise have the
            status ``error``.

        Raises:
            ConfigError: If ids repeat, the budget is below 1 or the victim cannot give gradients.
            AttackError: If the victim's answers are no probabilities.
        """
        if isinstance(attack, str):
            attack = get_attack(attack)
        self._check(attack, items, query_budget)
        wanted = {item.id for item in items}
        results = {
            key: result
            for key, result in (done or {}).items()
            if key in wanted and result.attack == attack.name
        }
        oracle = Oracle(self.victim, self.max_batch_tokens, self.max_batch_size)
        with attack_progress(attack.name, len(items), self.progress) as show:

            def finish(result: AttackResult) -> None:
                results[result.item_id] = result
                show(result)
                if on_result is not None:
                    on_result(result)

            for result in results.values():
                show(result)
            waiting = deque(item for item in items if item.id not in results)
            _Rounds(attack, oracle, query_budget, seed, finish).run(waiting, self.max_live)
        _report_errors(results.values())
        return [results[item.id] for item in items]

    def _check(self, attack: Attack, items: Sequence[Item], query_budget: int | None) -> None:
        if query_budget is not None and query_budget < 1:
            raise ConfigError(
                f"Expected `query_budget` to be >= 1, but got {query_budget}: "
                "the first query asks whether the item is classified correctly. None means no limit."
            )
        if attack.needs_gradients and not callable(getattr(self.victim, "embedding_gradients", None)):
            raise ConfigError(
                f"Expected a victim with `embedding_gradients` for `{attack.name}`, which follows gradients, "
                f"but got {type(self.victim).__name__}. Use lightning_robust.modules.victim.Victim, or an "
                "attack that needs probabilities only."
            )
        seen: set[str] = set()
        for item in items:
            if item.id in seen:
                raise ConfigError(
                    f"Expected items with different ids, but {item.id!r} occurs more than once. "
                    "Results are paired by id: give every item its own."
                )
            seen.add(item.id)


@dataclass
class _Live:
    """A search under way, what it asks now, and what it has cost."""

    item: Item
    search: Search
    request: list[Any] = dataclasses.field(default_factory=list)
    queries: int = 0
    seconds: float = 0.0
    over: bool = False


class _Rounds:
    """One run: starts searches, and advances all live ones by one answer a round."""

    def __init__(
        self, attack: Attack, oracle: Oracle, query_budget: int | None, seed: int, finish: OnResult
    ) -> None:
        self.attack = attack
        self.oracle = oracle
        self.query_budget = query_budget
        self.seed = seed
        self.finish = finish

    def run(self, waiting: deque[Item], max_live: int) -> None:
        live: list[_Live] = []
        try:
            while waiting or live:
                while waiting and len(live) < max_live:
                    started = self._start(waiting.popleft())
                    if self._advance(started, None):
                        live.append(started)
                answers = self._answers(live)
                live = [one for one, answer in zip(live, answers, strict=True) if self._advance(one, answer)]
        finally:
            for one in live:
                one.search.close()

    def _start(self, item: Item) -> _Live:
        rng = random.Random(f"{self.seed}:{self.attack.name}:{item.id}")
        return _Live(item, self.attack.search(item, rng))

    def _answers(self, live: list[_Live]) -> list[Any]:
        began = perf_counter()
        answers = self.oracle.answer([one.request for one in live])
        share = (perf_counter() - began) / max(1, sum(len(one.request) for one in live))
        for one in live:
            one.seconds += share * len(one.request)
            self.oracle.check_label(one.item)
        return answers

    def _advance(self, one: _Live, answer: Any) -> bool:
        """Send an answer; return whether the search goes on."""
        if isinstance(answer, Failure):
            self._fail(one, answer.message)
            return False
        began = perf_counter()
        try:
            request = list(one.search.send(answer))
        except StopIteration as stop:
            one.seconds += perf_counter() - began
            self.finish(dataclasses.replace(stop.value, queries=one.queries, seconds=one.seconds))
            return False
        except RobustError:
            raise
        except Exception as error:
            logger.debug("The search on item %r failed", one.item.id, exc_info=True)
            self._fail(one, f"{type(error).__name__}: {error}")
            return False
        one.seconds += perf_counter() - began
        self._take(one, request)
        return True

    def _take(self, one: _Live, request: list[Any]) -> None:
        """Accept a request as far as the query budget goes."""
        if one.over:
            raise AttackError(
                f"Expected `{self.attack.name}` to return a result once it got fewer answers than it asked "
                "for (the query budget is spent), but it asked again. Mend its `search`."
            )
        if any(isinstance(q, EmbeddingQuery) for q in request) and not self.attack.needs_gradients:
            raise AttackError(
                f"Expected `{self.attack.name}`, which asks for gradients, to set `needs_gradients`."
            )
        left = len(request) if self.query_budget is None else self.query_budget - one.queries
        one.request = request[:left]
        one.over = len(one.request) < len(request)
        one.queries += len(one.request)

    def _fail(self, one: _Live, message: str) -> None:
        one.search.close()
        nothing = float("nan")
        self.finish(
            AttackResult(
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
        )


def _report_errors(results: Any) -> None:
    failed = [result for result in results if result.status == "error"]
    if failed:
        logger.warning(
            "%d of %d items could not be attacked; first: item %r: %s",
            len(failed),
            len(results),
            failed[0].item_id,
            failed[0].error,
        )
