"""What the engine does besides asking the victim: services, streams, budgets of time, answers kept."""

from __future__ import annotations

import dataclasses
import gc
import random
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_robust.attacks import Attack, AttackEngine, AttackResult, Item, get_attack
from lightning_robust.attacks.attacked_text import AttackedText
from lightning_robust.attacks.base import Search
from lightning_robust.attacks.goal import UntargetedGoal
from lightning_robust.attacks.requests import Ask
from lightning_robust.data import Text
from lightning_robust.errors import AttackError, ConfigError
from tests.attacks.tiny import NgramVictim, items_for, sentences


class Shout:
    """A service that answers a word in capitals, and cannot pronounce some."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, queries: list[str]) -> list[str]:
        self.calls.append(queries)
        if any("clumsy" in query for query in queries):
            raise ValueError("clumsy")
        return [query.upper() for query in queries]


@dataclasses.dataclass
class Shouting(Attack):
    """Replaces the whole text by what the service makes of it."""

    name: ClassVar[str] = "shouting"
    service: Any = None

    def search(self, item: Item, rng: random.Random) -> Search:
        goal = UntargetedGoal(self, item, AttackedText(item.text))
        yield from goal.start()
        louder = yield Ask(self.service, [item.text, "film"])
        scored = yield from goal.ask([AttackedText(text) for text in louder])
        return goal.result(goal.best(scored) if scored else goal.original)


def test_services_are_asked_for_all_searches_at_once_and_answers_are_kept() -> None:
    victim, service = NgramVictim(), Shout()
    items = items_for(victim, [t for t in sentences(40) if "clumsy" not in t], wrong_every=0)
    engine = AttackEngine(victim)
    results = engine.run(Shouting(service=service), items)
    assert len(service.calls) == 1
    assert sorted(service.calls[0]) == sorted({"film", *(str(item.text) for item in items)})
    assert {result.queries for result in results} == {3}, "a service's answers are no queries of the victim"
    engine.run(Shouting(service=service), items)
    assert len(service.calls) == 1


def test_a_service_that_fails_on_an_item_leaves_the_rest() -> None:
    victim, service = NgramVictim(), Shout()
    items = items_for(victim, [*sentences(20), "a clumsy film"], wrong_every=0)
    results = AttackEngine(victim).run(Shouting(service=service), items)
    for item, result in zip(items, results, strict=True):
        assert (result.status == "error") == ("clumsy" in str(item.text))
    assert results[-1].error == "Shout raised ValueError: clumsy"


def test_a_service_that_answers_too_little_is_named() -> None:
    with pytest.raises(AttackError, match=r"Expected 2 answers from list, but got 0"):
        AttackEngine(NgramVictim()).run(
            Shouting(service=type("list", (), {"__call__": lambda *_: []})()), [Item("a", "x", 0)]
        )


def test_a_service_is_asked_although_the_budget_is_spent() -> None:
    victim, service = NgramVictim(), Shout()
    (result,) = AttackEngine(victim).run(Shouting(service=service), [Item("a", "moving film", 0)], 1)
    assert result.queries == 1
    assert len(service.calls) == 1


class Counting(NgramVictim):
    """Counts texts and has weights that may change."""

    def __init__(self, state: str | None) -> None:
        super().__init__()
        self.state, self.asked = state, 0

    def __call__(self, texts: Any) -> Tensor:
        self.asked += len(texts)
        return super().__call__(texts)

    def state_key(self) -> str | None:
        return self.state


def test_answers_are_kept_as_long_as_the_weights_stay() -> None:
    items = items_for(NgramVictim(), sentences(6))
    victim = Counting("epoch 1")
    engine = AttackEngine(victim)
    first = engine.run("deepwordbug", items)
    asked = victim.asked
    again = engine.run("deepwordbug", items)
    assert victim.asked == asked
    assert [r.perturbed_text for r in again] == [r.perturbed_text for r in first]
    assert [r.queries for r in again] == [r.queries for r in first], "a known answer is still a query"
    victim.state = "epoch 2"
    engine.run("deepwordbug", items)
    assert victim.asked == 2 * asked
    unknown = Counting(None)
    engine = AttackEngine(unknown)
    engine.run("deepwordbug", items)
    engine.run("deepwordbug", items)
    assert unknown.asked == 2 * asked


def test_an_error_costs_few_calls() -> None:
    calls = []

    def victim(texts: list[Text]) -> Tensor:
        calls.append(len(texts))
        if "poison" in texts:
            raise RuntimeError("cannot read this")
        return NgramVictim()(texts)

    items = [*items_for(NgramVictim(), sentences(128), wrong_every=0), Item("bad", "poison", 0)]
    results = AttackEngine(victim, max_batch_size=1024).run(get_attack("deepwordbug"), items, 1)
    assert [r.status for r in results].count("error") == 1
    assert results[-1].error == "the victim raised RuntimeError: cannot read this"
    assert len(calls) < 20


def test_memory_does_not_grow_with_the_number_of_items() -> None:
    def victim(texts: list[Text]) -> Tensor:
        return torch.tensor([[0.1, 0.9]]).expand(len(texts), 2)

    def items(count: int) -> Iterator[Item]:
        return (Item(str(i), f"item {i} of a film", 1) for i in range(count))

    def peak(count: int) -> int:
        engine = AttackEngine(victim, max_live=16)
        gc.collect()
        tracemalloc.start()
        try:
            assert sum(1 for _ in engine.stream("deepwordbug", items(count), query_budget=2)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    import lightning_robust.attacks.oracle as oracle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "_KEPT_ANSWERS", 500)
        patch.setattr(oracle, "_KEPT_OF_A_SERVICE", 100)
        peak(400)
        small, large = peak(400), peak(4000)
    assert large < 1.2 * small + 50_000, (small, large)


def test_items_are_taken_only_as_searches_end() -> None:
    taken = 0

    def items() -> Iterator[Item]:
        nonlocal taken
        for i, text in enumerate(sentences(100)):
            taken += 1
            yield Item(str(i), text, 0)

    found = AttackEngine(NgramVictim(), max_live=8).stream("deepwordbug", items())
    for finished, _ in enumerate(found, start=1):
        assert taken <= finished + 8


def test_time_budget() -> None:
    slow = NgramVictim(scale=0.01)

    def victim(texts: list[Text]) -> Tensor:
        time.sleep(0.05)
        return slow(texts)

    items = items_for(slow, sentences(12, shortest=8, longest=12), wrong_every=0)
    results = AttackEngine(victim, max_live=4).run("deepwordbug", items, time_budget=0.2)
    assert 0 < len(results) < len(items)
    assert {r.item_id for r in results} == {item.id for item in items[: len(results)]}
    cut = [r for r in results if r.exhausted]
    assert cut
    assert {r.status for r in cut} == {"failed"}
    for result in results:
        assert result.queries >= 1
        assert result.original_predicted == result.label
    with pytest.raises(ConfigError, match=r"Expected `time_budget` to be > 0 seconds, but got 0"):
        AttackEngine(victim).run("deepwordbug", items, time_budget=0)


def test_searches_that_ask_for_much_wait_for_each_other() -> None:
    import lightning_robust.attacks.engine as engine

    victim = NgramVictim(scale=0.02)
    items = items_for(victim, sentences(12, shortest=6, longest=8), wrong_every=0)
    expected = AttackEngine(victim).run("pruthi", items)
    largest = 0

    def watched(texts: list[Text]) -> Tensor:
        nonlocal largest
        largest = max(largest, sum(map(len, texts)))
        return victim(texts)

    def run() -> list[AttackResult]:
        return AttackEngine(watched, max_batch_tokens=1 << 20).run("pruthi", items)

    run()
    free, largest = largest, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_CHARACTERS_AT_ONCE", 1000)
        apart = run()
    assert largest < free / 4
    for one, other in zip(apart, expected, strict=True):
        same(one, other)


def same(one: AttackResult, other: AttackResult) -> None:
    assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)


VICTIM = NgramVictim()
ITEMS = items_for(VICTIM, sentences(14))
EXPECTED = {r.item_id: r for r in AttackEngine(VICTIM).run("deepwordbug", ITEMS)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.permutations(ITEMS),
    st.integers(1, 40),
    st.integers(8, 4096),
    st.integers(1, 20),
    st.integers(1, 3),
)
def test_batches_order_concurrency_and_processes_do_not_matter(
    order: list[Item], batch: int, tokens: int, live: int, world_size: int
) -> None:
    for rank in range(world_size):
        engine = AttackEngine(VICTIM, tokens, live, max_batch_size=batch)
        for result in engine.run("deepwordbug", order[rank::world_size]):
            same(result, EXPECTED[result.item_id])


def test_autocast() -> None:
    from tests.attacks.tiny import tiny_victim

    seen = set()

    def victim(texts: list[Text]) -> Tensor:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        seen.add(product.dtype)
        return NgramVictim()(texts)

    (item,) = items_for(NgramVictim(), ["a moving film"], wrong_every=0)
    AttackEngine(victim, autocast="bfloat16").run("deepwordbug", [item])
    assert seen == {torch.bfloat16}
    real = tiny_victim()
    texts = sentences(8)
    low = AttackEngine(real, autocast="bfloat16").oracle.answer([texts])[0]
    full = AttackEngine(real).oracle.answer([texts])[0]
    assert 0 < (low - full).abs().max() < 0.1
    with pytest.raises(ConfigError, match=r"`autocast` to be bfloat16, float16 or None, but got 'int8'"):
        AttackEngine(victim, autocast="int8")


@pytest.mark.parametrize("name", ["deepwordbug", "pruthi", "checklist", "worst_case"])
@pytest.mark.parametrize("pair", [False, True])
def test_what_the_victim_does_not_read_is_never_attacked(name: str, pair: bool) -> None:
    from tests.attacks.tiny import tiny_victim

    victim = tiny_victim(max_length=12)
    head, tail = "film 12 is not brilliant", "plot isn't moving 14 humor scene music story drama camera"
    text: Text = ("a scene", f"{head} {tail}") if pair else f"{head} a {tail}"
    asked: list[Any] = []

    class Watched:
        readable_characters = victim.readable_characters

        def __call__(self, texts: list[Text]) -> Tensor:
            asked.extend(texts)
            return torch.tensor([[0.1, 0.9]]).expand(len(texts), 2)

    further = {"attacks": ["deepwordbug", "pruthi"]} if name == "worst_case" else {}
    (result,) = AttackEngine(Watched()).run(get_attack(name, **further), [Item("a", text, 1)])
    assert result.status == "failed"
    assert len(asked) > 2
    attacked = [one if isinstance(one, str) else one[1] for one in asked]
    assert all(one.endswith(tail[-30:]) for one in attacked), "the last words are beyond the limit"
    assert victim.readable_characters(["a film"]) == [None]


def test_time_ends_within_a_round() -> None:
    slow = NgramVictim(scale=0.01)
    asked = 0

    def victim(texts: list[Text]) -> Tensor:
        nonlocal asked
        asked += len(texts)
        time.sleep(0.001 * len(texts))
        return slow(texts)

    items = items_for(slow, sentences(40, shortest=10, longest=14), wrong_every=0)
    began = time.perf_counter()
    results = AttackEngine(victim).run("pruthi", items, time_budget=0.4)
    everything = sum(r.queries for r in AttackEngine(slow).run("pruthi", items))
    assert asked < everything / 2
    assert time.perf_counter() - began >= 0.4
    assert any(result.exhausted for result in results)
    assert sum(result.queries for result in results) <= asked


def test_a_run_that_is_put_aside_keeps_its_time_limit_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    for module in ("engine", "oracle"):
        monkeypatch.setattr(f"lightning_robust.attacks.{module}.perf_counter", lambda: now)
    victim = NgramVictim(scale=0.01)
    long = sentences(5, shortest=10, longest=12)
    items = items_for(victim, ["film", *reversed(long)], wrong_every=0)
    expected = AttackEngine(victim).run("pruthi", items)
    engine = AttackEngine(victim, max_live=2)
    limited = engine.stream("deepwordbug", items, time_budget=1)
    assert not next(limited).exhausted
    now = 2.0
    (answer,) = engine.oracle.answer([["never asked before"]])
    assert answer.shape == (1, 2)
    for one, other in zip(engine.run("pruthi", items), expected, strict=True):
        same(one, other)
    (rest,) = limited
    assert rest.exhausted, "its own limit holds after another run"


@pytest.mark.parametrize("kind", ["packing", "plain", "gradients"])
def test_an_oracle_asks_nothing_after_the_deadline_of_this_call(kind: str) -> None:
    from lightning_robust.attacks.oracle import Oracle
    from lightning_robust.modules.gradients import EmbeddingQuery
    from tests.attacks.tiny import tiny_victim

    oracle = Oracle(NgramVictim() if kind == "plain" else tiny_victim(), 1024, None)
    request: list[Any] = [EmbeddingQuery("a film", 0)] if kind == "gradients" else ["a film", "a scene"]
    (late,) = oracle.answer([request], time.perf_counter() - 1)
    assert len(late) == 0
    (answer,) = oracle.answer([request])
    assert len(answer) == len(request)
    (known,) = oracle.answer([request], time.perf_counter() - 1)
    assert len(known) == (0 if kind == "gradients" else len(request))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda t: None, "got NoneType None"),
        (lambda t: "abc", "got str 'abc'"),
        (lambda t: [{"label": 1}] * len(t), "got list"),
        (lambda t: [[0.5, 0.5]] * (len(t) - 1) + [[0.3, 0.3, 0.4]], "got list"),
    ],
)
def test_answers_that_are_no_probabilities_are_named(answer: Any, message: str) -> None:
    items = [Item(str(i), f"film {i}", 0) for i in range(3)]
    with pytest.raises(AttackError, match=rf"shape \(3, classes\), .* {message}"):
        AttackEngine(answer).run("deepwordbug", items)
    with pytest.raises(ConfigError, match="a victim that can be called with texts, but got str"):
        AttackEngine("victim")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_victims_may_answer_in_any_precision_and_as_rows(dtype: torch.dtype) -> None:
    items = items_for(VICTIM, sentences(30), wrong_every=0)
    for answer in (lambda t: VICTIM(t).to(dtype), lambda t: list(VICTIM(t).to(dtype))):
        results = AttackEngine(answer).run("deepwordbug", items)
        assert {r.status for r in results} <= {"success", "failed", "skipped"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item("2", ["a", "b"], 1), "item '2' to have a text"),  # type: ignore[arg-type]
        (Item("2", None, 1), "item '2' to have a text"),  # type: ignore[arg-type]
        (Item("2", "a", "1"), "item '2' to have an integer label"),  # type: ignore[arg-type]
    ],
)
def test_items_that_are_none_are_named(item: Item, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackEngine(VICTIM).run("deepwordbug", [item])


@pytest.mark.parametrize("request_", ["a string", None, [1, 2]])
def test_requests_that_are_none_are_named(request_: Any) -> None:
    class Mistaken(Shouting):
        def search(self, item: Item, rng: random.Random) -> Search:
            yield request_
            raise AssertionError

    with pytest.raises(AttackError, match="Expected `shouting`'s requests to be lists of texts"):
        AttackEngine(VICTIM).run(Mistaken(), ITEMS)


def test_searches_that_are_none_are_named() -> None:
    class Nothing(Shouting):
        def search(self, item: Item, rng: random.Random) -> Search:
            yield ["film"]
            return None  # type: ignore[return-value]

    class Plain(Shouting):
        def search(self, item: Item, rng: random.Random) -> Search:
            return None  # type: ignore[return-value]

    for attack, message in (
        (Nothing(), "return an AttackResult, but it returned NoneType"),
        (Plain(), "a generator"),
    ):
        with pytest.raises(AttackError, match=message):
            AttackEngine(VICTIM).run(attack, ITEMS)


def test_results_of_other_texts_are_not_taken_over() -> None:
    done = {item.id: EXPECTED[item.id] for item in ITEMS}
    moved = [Item(ITEMS[0].id, f"also {ITEMS[0].text}", ITEMS[0].label), *ITEMS[1:]]
    results = AttackEngine(VICTIM).run("deepwordbug", iter(moved), done=done)
    assert results[0].original_text == moved[0].text
    assert results[1:] == [EXPECTED[item.id] for item in ITEMS[1:]]
