from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_robust.attacks import AttackEngine, Item, get_attack
from lightning_robust.attacks.attacked_text import AttackedText
from lightning_robust.attacks.constraints import edit_distance, modifiable_words
from lightning_robust.attacks.goal import descending, predicted_class
from lightning_robust.attacks.stop_words import STOP_WORDS
from lightning_robust.data import Text
from lightning_robust.errors import ConfigError
from tests.attacks.tiny import NgramVictim, items_for, sentences


@pytest.fixture(scope="module")
def textattack(shared: Path) -> Iterator[Any]:
    nltk = pytest.importorskip("nltk", reason="parity needs the textattack extra")
    with pytest.MonkeyPatch.context() as patch:
        # NLTK may have been imported already, so that NLTK_DATA would come too late.
        patch.setattr(nltk.data, "path", [str(shared / "lexical" / "nltk_data"), *nltk.data.path])
        yield pytest.importorskip("textattack", reason="parity needs the textattack extra")


def sst2(shared: Path, count: int) -> list[str]:
    with (shared / "data" / "sst2" / "dev.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row["sentence"].strip() for row, _ in zip(rows, range(count), strict=False)]


AWKWARD = [
    "",
    "film",
    "...!?",
    "the of and",
    "It's a 'must-see', isn't it? ``Well'' - x*y @home",
    "so-so 😀😀 فيلم رائع جدا brilliant",
    "naïve  café\twith   spaces\nand lines",
    "word word word word again word a-b -- c--d",
]


def theirs(textattack: Any, victim: NgramVictim, items: Sequence[Item], budget: int | None) -> list[Any]:
    """TextAttack's own recipe on each item, fed with the item's generator instead of the global ones."""
    import numpy as np
    from textattack.attack_recipes import DeepWordBugGao2018
    from textattack.models.wrappers import ModelWrapper
    from textattack.transformations.word_swaps import word_swap

    class Wrapper(ModelWrapper):
        model = victim

        def __call__(self, texts: list[Text]) -> torch.Tensor:
            return victim(texts)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        for item in items:
            rng = random.Random(f"0:deepwordbug:{item.id}")
            patch.setattr(np.random, "randint", rng.randrange)
            patch.setattr(word_swap.random, "choice", rng.choice)
            attack = DeepWordBugGao2018.build(Wrapper())
            if budget is not None:
                attack.goal_function.query_budget = budget
            results.append(attack.attack(item.text, item.label))
    return results


@pytest.mark.parametrize("budget", [None, 25])
def test_parity_with_textattack(textattack: Any, shared: Path, budget: int | None) -> None:
    from nltk.corpus import stopwords

    victim = NgramVictim(scale=0.7)
    items = items_for(victim, [*AWKWARD, *sst2(shared, 60)], wrong_every=11)
    attack = get_attack("deepwordbug", stop_words=stopwords.words("english"))
    ours = AttackEngine(victim).run(attack, items, budget)
    status = {
        "SuccessfulAttackResult": "success",
        "FailedAttackResult": "failed",
        "SkippedAttackResult": "skipped",
    }
    for our, their in zip(ours, theirs(textattack, victim, items, budget), strict=True):
        assert our.status == status[type(their).__name__], our
        assert our.queries == their.perturbed_result.num_queries, our
        assert our.predicted == their.perturbed_result.output, our
        assert our.probability == pytest.approx(1 - float(their.perturbed_result.score), abs=1e-5)
        if our.status == "success":
            assert our.perturbed_text == their.perturbed_result.attacked_text.text
            changed = their.perturbed_result.attacked_text.attack_attrs["modified_indices"]
            assert our.words_changed == len(changed)
    assert {our.status for our in ours} == {"success", "failed", "skipped"}


def test_words_and_replacement_equal_textattacks(textattack: Any, shared: Path) -> None:
    from textattack.shared import AttackedText as Theirs

    for text in [*AWKWARD, *sst2(shared, 100), "ο`κ×2 ˗x˗ O'Neil's __init__ *** a*b*"]:
        ours, other = AttackedText(text), Theirs(text)
        assert ours.words == other.words
        for i in range(len(ours.words)):
            for word in ("[UNK]", "", "two words"):
                assert ours.replace_word(i, word).text == other.replace_word_at_index(i, word).text


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts(text: str) -> None:
    victim = NgramVictim()
    (item,) = items_for(victim, [text])
    (result,) = AttackEngine(victim).run("deepwordbug", [item])
    assert result.status in ("success", "failed")
    attackable = modifiable_words(AttackedText(text), STOP_WORDS)
    if not attackable:
        assert (result.status, result.queries) == ("failed", 1)


def test_stop_words_are_never_changed_and_can_be_replaced() -> None:
    victim = NgramVictim(scale=0.05)
    texts = ["the film of the actor and a moving story", "charming and bleak with the music"]
    items = items_for(victim, texts, wrong_every=0)
    asked: list[Text] = []

    def watched(texts: Sequence[Text]) -> torch.Tensor:
        asked.extend(texts)
        return victim(texts)

    AttackEngine(watched).run("deepwordbug", items)
    for text in asked:
        kept = [w for w in str(text).split() if w in STOP_WORDS]
        assert kept in [[w for w in t.split() if w in STOP_WORDS] for t in texts]
    everything = {word for text in texts for word in text.split()}
    for result in AttackEngine(victim).run(get_attack("deepwordbug", stop_words=everything), items):
        assert (result.status, result.queries) == ("failed", 1)


def test_edit_distance_bounds_what_is_asked() -> None:
    victim = NgramVictim(scale=0.02)
    texts = sentences(6, shortest=10, longest=14)
    for limit in (1, 4):
        asked: list[Text] = []

        def watched(texts: Sequence[Text], asked: list[Text] = asked) -> torch.Tensor:
            asked.extend(t for t in texts if "[UNK]" not in t)
            return victim(texts)

        AttackEngine(watched).run(
            get_attack("deepwordbug", max_edit_distance=limit), items_for(victim, texts, wrong_every=0)
        )
        distances = [min(edit_distance(str(text), original) for original in texts) for text in asked]
        assert max(distances) == limit


@pytest.mark.parametrize(("index", "attacked"), [(-1, 1), (1, 1), (0, 0)])
def test_only_one_text_of_a_pair_changes(index: int, attacked: int) -> None:
    victim = NgramVictim()
    pairs: list[Text] = list(zip(sentences(12), sentences(12, seed=1), strict=True))
    items = items_for(victim, pairs, wrong_every=0)
    results = AttackEngine(victim).run(get_attack("deepwordbug", text_index=index), items)
    changed = [r for r in results if r.status == "success"]
    assert changed
    for result in changed:
        assert isinstance(result.perturbed_text, tuple)
        assert result.perturbed_text[1 - attacked] == result.original_text[1 - attacked]
        assert result.perturbed_text[attacked] != result.original_text[attacked]
    with pytest.raises(ConfigError, match=r"`text_index` to be from -2 to 1 for 2 texts, but got 2"):
        AttackEngine(victim).run(get_attack("deepwordbug", text_index=2), items)


def levenshtein(a: str, b: str) -> int:
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def test_edit_distance_equals_the_table() -> None:
    rng = random.Random(0)
    for _ in range(500):
        a, b = ("".join(rng.choices("ab c", k=rng.randrange(14))) for _ in range(2))
        assert edit_distance(a, b) == levenshtein(a, b)


def test_ties_keep_their_order() -> None:
    chain = [0.5 + 2e-6 * i for i in range(4)]
    assert descending([0.1, *chain, 0.9], 1e-5) == [5, 1, 2, 3, 4, 0]
    assert descending([0.1, 0.2, 0.3], 0) == [2, 1, 0]
    assert predicted_class(torch.tensor([0.5 - 1e-7, 0.5 + 1e-7]), 1e-5) == 0
    assert predicted_class(torch.tensor([0.4, 0.6]), 1e-5) == 1
