from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from lightning_robust.defenses import inference
from lightning_robust.defenses.inference import (
    Certificate,
    Ensemble,
    InferenceDefense,
    RandomMaskVote,
    SynonymSmoothing,
    TestTimeAugmentation,
    as_wrapper,
    base,
    get_inference_defense,
)
from lightning_robust.defenses.inference.base import ask, combined, lower_bound, votes
from lightning_robust.errors import AttackError, ConfigError
from tests.attacks.tiny import NgramVictim, sentences, tiny_victim

SYNONYMS = {"film": ["movie", "picture"], "charming": ["lovely"], "story": ["tale"]}
TEXTS: list[Any] = [
    *sentences(8, seed=2),
    ("a charming film", "the story is bleak"),
    "",
    "film",
    "  two  spaces ",
]


class Watched:
    """A victim that remembers what it was asked."""

    def __init__(self, victim: Any) -> None:
        self.victim = victim
        self.calls: list[list[Any]] = []

    def predict_packed(self, texts: list[Any], *_: Any) -> Tensor:
        self.calls.append(list(texts))
        return self.victim(texts)

    def __call__(self, texts: list[Any]) -> Tensor:
        return self.predict_packed(texts)

    def state_key(self) -> str:
        return "same"


def defenses(victim: Any) -> list[InferenceDefense]:
    return [
        RandomMaskVote(victim, share=0.5, num_copies=7, mask_token="[MASK]"),
        RandomMaskVote(victim, share=0.5, num_copies=7, mask_token="[MASK]", combine="mean"),
        SynonymSmoothing(victim, SYNONYMS, num_copies=7),
        TestTimeAugmentation(victim, num_copies=5, rate=0.5),
        TestTimeAugmentation(victim, "words", num_copies=5, rate=0.5, combine="vote"),
        Ensemble(victim, [NgramVictim(0.1)]),
    ]


@pytest.mark.parametrize("number", range(6))
def test_answers_depend_on_the_text_alone(number: int) -> None:
    defense = defenses(NgramVictim(0.3))[number]
    state, torch_state = random.getstate(), torch.get_rng_state()
    together = defense(TEXTS)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.sum(dim=1), torch.ones(len(TEXTS)))
    assert torch.equal(torch.cat([defense([text]) for text in TEXTS]), together)
    assert torch.equal(defense(TEXTS[::-1]), together.flip(0))
    assert torch.equal(defense.predict_packed(TEXTS, 32, 2), together)
    assert torch.equal(defenses(NgramVictim(0.3))[number].predict_proba(TEXTS), together)


@pytest.mark.parametrize("number", range(5))
def test_the_answer_is_that_to_the_copies(number: int) -> None:
    victim = NgramVictim(0.3)
    defense = defenses(victim)[number]
    for text, answer in zip(TEXTS, defense(TEXTS), strict=True):
        each = torch.stack([victim([copy])[0] for copy in defense.copies(text)])
        if defense._combine == "vote":
            each = torch.eye(2, dtype=torch.float64)[each.argmax(dim=1)]
        torch.testing.assert_close(answer, each.mean(dim=0).float())


@pytest.mark.parametrize("number", range(5))
def test_the_victim_is_asked_once_and_nothing_twice(number: int) -> None:
    watched = Watched(NgramVictim(0.3))
    defense = defenses(watched)[number]
    defense([*TEXTS, *TEXTS])
    (asked,) = watched.calls
    assert len(asked) == len(set(asked))
    assert set(asked) == {copy for text in TEXTS for copy in defense.copies(text)}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(NgramVictim(0.3))
    defense = defenses(watched)[0]
    expected = defense(TEXTS)
    watched.calls.clear()
    monkeypatch.setattr(base, "_COPIES_AT_ONCE", 14)
    assert torch.equal(defense(TEXTS), expected)
    assert len(watched.calls) == len(TEXTS) // 2
    assert max(map(len, watched.calls)) <= 14


def test_other_seeds_draw_other_copies() -> None:
    for one, other in (
        (RandomMaskVote(print, mask_token="_"), RandomMaskVote(print, mask_token="_", seed=1)),
        (SynonymSmoothing(print, SYNONYMS), SynonymSmoothing(print, SYNONYMS, seed=1)),
        (TestTimeAugmentation(print, rate=0.9), TestTimeAugmentation(print, rate=0.9, seed=1)),
    ):
        assert one.copies("a charming film and its story") != other.copies("a charming film and its story")


def test_copies_are_the_same_in_every_process() -> None:
    # Written down from another process: `hash` of strings must play no part.
    defense = RandomMaskVote(print, share=0.5, num_copies=3, mask_token="_")
    assert defense.copies("one two three four") == COPIES


COPIES = ["one two _ _", "one two _ _", "one _ _ four"]


def test_state_keys_tell_settings_and_weights_apart() -> None:
    victim = tiny_victim()
    made = defenses(victim)[:5]
    keys = [one.state_key() for one in made]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert [one.state_key() for one in defenses(victim)[:5]] == keys
    assert RandomMaskVote(victim, 0.5, 7, mask_token="[MASK]", seed=1).state_key() not in keys
    with torch.no_grad():
        victim.model.classifier.weight += 0.1
    assert not set(keys) & {one.state_key() for one in made}
    assert RandomMaskVote(NgramVictim(), mask_token="_").state_key() is None


def test_defenses_can_be_nested_and_moved_to_another_victim() -> None:
    inner = SynonymSmoothing(NgramVictim(0.3), SYNONYMS, num_copies=3)
    nested = RandomMaskVote(inner, num_copies=3, mask_token="_")
    texts = TEXTS[:3]
    each = [torch.stack([inner([c])[0] for c in nested.copies(text)]) for text in texts]
    expected = torch.stack([torch.eye(2)[rows.argmax(dim=1)].mean(dim=0) for rows in each])
    torch.testing.assert_close(nested(texts), expected)
    other = nested.around(NgramVictim(-0.3))
    assert other.copies("a film") == nested.copies("a film")
    assert torch.equal(other(texts), RandomMaskVote(NgramVictim(-0.3), num_copies=3, mask_token="_")(texts))
    assert nested.victim is inner


def test_votes_do_not_hang_on_rounding() -> None:
    answers = torch.tensor([[0.5 - 1e-7, 0.5 + 1e-7], [0.4, 0.6], [0.7, 0.3]])
    assert votes(answers).tolist() == [0, 1, 0]
    torch.testing.assert_close(combined(answers, "vote"), torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(combined(answers, "mean"), answers.mean(dim=0))


@pytest.mark.parametrize("successes", [0, 1, 37, 99, 100])
def test_lower_bound_is_that_of_scipy(successes: int) -> None:
    interval = binomtest(successes, 100).proportion_ci(confidence_level=0.9, method="exact")
    assert lower_bound(successes, 100, 0.05) == pytest.approx(interval.low)


def test_foreign_victims_are_asked_in_batches() -> None:
    victim = NgramVictim()
    texts = sentences(40)
    whole = victim(texts).float()
    victim.batches.clear()
    torch.testing.assert_close(ask(victim, texts, max_batch_tokens=100), whole)
    assert max(victim.batches) <= 10
    victim.batches.clear()
    ask(victim, texts, max_batch_size=3)
    assert max(victim.batches) == 3
    torch.testing.assert_close(ask(lambda batch: list(victim(batch)), texts), whole)
    torch.testing.assert_close(ask(lambda batch: victim(batch).numpy(), texts), whole)
    with pytest.raises(AttackError, match=r"of shape \(2, 2\) for 2 texts.* but got \(1, 2\)"):
        ask(lambda batch: victim(batch[:1]), texts[:2])


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([-3.0, 3.0], "not negative"),
        ([0.5, 3.0], "that sum to 1"),
        ([float("nan"), 0.5], "finite"),
        ([1.0], "two or more classes"),
    ],
)
def test_what_is_no_probabilities_gets_no_vote(number: int, row: list[float], message: str) -> None:
    defense = defenses(lambda texts: torch.tensor([row] * len(texts)))[number]
    with pytest.raises(AttackError, match=message):
        defense(TEXTS[:2])


def test_probabilities_of_half_precision_may_be_rounded() -> None:
    answer = torch.tensor([[0.3, 0.71]])
    with pytest.raises(AttackError, match="that sum to 1"):
        ask(lambda texts: answer, ["a"])
    torch.testing.assert_close(ask(lambda texts: answer.half(), ["a"]).sum(dim=1), torch.ones(1))


@pytest.mark.parametrize("number", [0, 2])
def test_certificates_ask_only_for_independent_copies_where_the_answers_are_known(number: int) -> None:
    watched = Watched(NgramVictim(0.3))
    defense: Any = defenses(watched)[number]
    expected = defense.certificates(TEXTS)
    answers = defense(TEXTS)
    watched.calls.clear()
    assert defense.certificates(TEXTS, answers) == expected
    (asked,) = watched.calls
    assert set(asked) == {copy for text in TEXTS for copy in defense._independent(text)}
    assert defense.certificates([]) == []


def test_no_text_is_no_error() -> None:
    victim = tiny_victim()
    for defense in (RandomMaskVote(victim), Ensemble([victim, victim])):
        assert defense([]).shape == (0, 2)


def test_defenses_by_name() -> None:
    victim = NgramVictim()
    vote = as_wrapper({"name": "RandomMaskVote", "share": 0.4, "mask_token": "_"})(victim)
    assert isinstance(vote, RandomMaskVote)
    assert (vote.victim, vote.share) == (victim, 0.4)
    assert isinstance(as_wrapper("TestTimeAugmentation")(victim), TestTimeAugmentation)
    assert as_wrapper(TestTimeAugmentation) is TestTimeAugmentation
    with pytest.raises(ConfigError, match="Did you mean «RandomMaskVote»"):
        get_inference_defense("RandomMaskVotes")
    with pytest.raises(
        ConfigError, match=r"among share, num_copies, .* but got 'shar'.*Did you mean «share»"
    ):
        get_inference_defense("RandomMaskVote", shar=0.3)
    for spec in (3, {"share": 0.4}, vote):
        with pytest.raises(ConfigError, match="inference defense's name"):
            as_wrapper(spec)


CLASSES = [RandomMaskVote, SynonymSmoothing, TestTimeAugmentation, Ensemble]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("RandomMaskVote", {}),
        ("RandomMaskVote", {"mask_token": None, "share": 1}),
        ("SynonymSmoothing", {"num_copies": 3}),
        ("SynonymSmoothing", {"synonyms": "nowhere.json"}),
        ("TestTimeAugmentation", {"augment": "words"}),
        ("Ensemble", {"members": ["nobody/nothing", "another/one"]}),
        ("Ensemble", {"members": "nobody/nothing", "combine": "vote"}),
    ],
)
def test_settings_are_checked_without_loading_anything(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> Any:
        raise AssertionError("something is loaded")

    monkeypatch.setattr("lightning_robust.modules.victim_loading.load_victim", loaded)
    monkeypatch.setattr("lightning_robust.defenses.synonyms.load_neighbors", loaded)
    get_inference_defense(name, **settings)


WRONG = [
    ({"combine": "sum"}, "`combine` to be mean or vote"),
    ({"seed": "1"}, "`seed` to be a whole number, but got '1'"),
    ({"num_copies": 0}, "`num_copies`"),
    ({"alpha": 2}, "`alpha`"),
    ({"share": 3}, "`share`"),
    ({"mask_token": 3}, "`mask_token` to be a text, but got 3"),
    ({"synonyms": 3}, "`synonyms` to be"),
    ({"augment": "noise"}, "`augment` to be"),
    ({"members": [3]}, "victims or paths, but got int 3"),
    ({"members": None}, "victims or paths, but got NoneType None"),
    ({"members": []}, "two or more victims"),
]


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        pytest.param(cls, settings, message, id=f"{cls.__name__}-{settings}")
        for cls in CLASSES
        for settings, message in WRONG
        if settings.keys() <= inspect.signature(cls.__init__).parameters.keys()
    ],
)
def test_wrong_settings_are_found_before_there_is_a_victim(
    cls: type[InferenceDefense], settings: dict[str, Any], message: str
) -> None:
    needed = {"members": [NgramVictim()]} if cls is Ensemble else {}
    with pytest.raises(ConfigError, match=message):
        get_inference_defense(cls.__name__, **needed | settings)


def test_every_defense_that_can_be_named_is_tried_here() -> None:
    named = {one for one in vars(inference).values() if inspect.isclass(one)} - {
        InferenceDefense,
        Certificate,
    }
    assert named == set(CLASSES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomMaskVote(3), "`victim` to be callable"),
        (lambda: RandomMaskVote(print), "`mask_token`.*no tokenizer"),
        (lambda: RandomMaskVote(print, -0.1, mask_token="_"), "`share`"),
        (lambda: RandomMaskVote(print, float("nan"), mask_token="_"), "`share`"),
        (lambda: RandomMaskVote(print, num_copies=0, mask_token="_"), "`num_copies`"),
        (lambda: RandomMaskVote(print, alpha=0.0, mask_token="_"), "`alpha`"),
        (lambda: RandomMaskVote(print, certificate_copies=-1, mask_token="_"), "`certificate_copies`"),
        (lambda: RandomMaskVote(print, combine="sum", mask_token="_"), "`combine` to be mean or vote"),
        (lambda: SynonymSmoothing(print, SYNONYMS, num_neighbors=-1), "`num_neighbors`"),
        (lambda: SynonymSmoothing(print, "nowhere.json"), "nowhere.json"),
        (lambda: SynonymSmoothing(print, {"film": "movie"}), "list words for 'film'"),
        (lambda: TestTimeAugmentation(print, "noise"), "`augment` to be characters, words"),
        (lambda: TestTimeAugmentation(print, 3), "`augment`"),
        (lambda: TestTimeAugmentation(print, rate=1.5), "`rate`"),
        (lambda: TestTimeAugmentation(print, num_copies=0), "`num_copies`"),
        (lambda: Ensemble(print), "two or more victims"),
        (lambda: Ensemble(print, [3]), "victims or paths"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
