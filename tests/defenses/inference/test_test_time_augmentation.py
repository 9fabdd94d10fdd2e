from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lightning_robust.attacks import AttackEngine
from lightning_robust.defenses.inference import TestTimeAugmentation
from lightning_robust.defenses.inference.test_time_augmentation import change_characters, change_words
from tests.attacks.tiny import NgramVictim, items_for, sentences, tiny_victim

TEXT = "a charming film with a vivid story and much humor"


def test_the_text_itself_counts() -> None:
    defense = TestTimeAugmentation(print, num_copies=4, rate=0.5)
    copies = defense.copies(TEXT)
    assert len(copies) == 5
    assert copies[0] == TEXT
    assert len(set(copies)) == 5


def test_a_function_of_ones_own() -> None:
    drawn: list[float] = []

    def shout(text: str, rng: random.Random) -> str:
        drawn.append(rng.random())
        return text.upper()

    victim = NgramVictim(0.3)
    defense = TestTimeAugmentation(victim, shout, num_copies=2)
    expected = victim([TEXT, TEXT.upper(), TEXT.upper()]).mean(dim=0).float()
    torch.testing.assert_close(defense([TEXT])[0], expected)
    assert len(set(drawn)) == 2
    assert defense.copies(("a b", "c"))[1] == ("A B", "C")


@pytest.mark.parametrize("augment", ["characters", "words"])
def test_no_change_is_the_victim_itself(augment: str) -> None:
    victim: Any = tiny_victim()
    texts = [*sentences(5), "two  spaces", ""]
    defense = TestTimeAugmentation(victim, augment, rate=0.0)
    torch.testing.assert_close(defense(texts), victim(texts), rtol=0, atol=1e-6)
    assert {copy for text in texts for copy in defense.copies(text)} == set(texts)


def test_one_character_of_a_word_changes() -> None:
    rng = random.Random(0)
    lengths = set()
    for _ in range(200):
        changed = change_characters(TEXT, rng, 1.0).split(" ")
        assert len(changed) == len(TEXT.split(" "))
        for before, after in zip(TEXT.split(" "), changed, strict=True):
            assert abs(len(after) - len(before)) <= 1
            assert len(before) > 1 or after == before
            lengths.add(len(after) - len(before))
    assert lengths == {-1, 0, 1}
    shares = [
        sum(a != b for a, b in zip(TEXT.split(), change_characters(TEXT, rng, 0.3).split(), strict=True))
        for _ in range(500)
    ]
    assert 2.0 < sum(shares) / 500 < 3.0  # of 8 words that can change, less what was replaced by itself


def test_words_are_deleted_or_swapped() -> None:
    rng = random.Random(0)
    found = [change_words("one two three four five", rng, 0.3).split() for _ in range(300)]
    assert {len(words) for words in found} >= {2, 3, 4, 5}
    assert any(
        len(words) == 5 and words != sorted(words, key="one two three four five".index) for words in found
    )
    assert all(len(set(words)) == len(words) for words in found)
    for _ in range(50):
        assert change_words("one two three", rng, 1.0)
        assert change_words("one", rng, 1.0) == "one"
        assert change_words("one ", rng, 1.0).strip() == "one"
        assert change_words(" one two", rng, 1.0).strip()


def test_it_can_be_attacked() -> None:
    victim = TestTimeAugmentation(NgramVictim(0.05), num_copies=3)
    items = items_for(victim, sentences(6, shortest=6))
    first, second = (
        AttackEngine(victim, progress=False, max_batch_tokens=size).run("deepwordbug", items)
        for size in (16384, 50)
    )
    assert [(r.status, r.perturbed_text, r.queries) for r in first] == [
        (r.status, r.perturbed_text, r.queries) for r in second
    ]
