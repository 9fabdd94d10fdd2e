from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_robust.attacks import AttackEngine, get_attack
from lightning_robust.data import Item
from lightning_robust.defenses.inference import Certificate, RandomMaskVote
from lightning_robust.defenses.inference.random_mask_vote import certified_radius
from lightning_robust.errors import ConfigError
from tests.attacks.tiny import sentences, tiny_tokenizer, tiny_victim

VOCABULARY = ("good", "bad", "film")
Classifier = Callable[[Sequence[str]], int]


def majority(words: Sequence[str]) -> int:
    """More good than bad among the words that are not masked."""
    return int(words.count("good") > words.count("bad"))


def hashed(words: Sequence[str]) -> int:
    """An arbitrary function, mostly 1."""
    return int(zlib.crc32(" ".join(words).encode()) % 10 < 9)


def victim_of(classifier: Classifier) -> Callable[[Sequence[Any]], Tensor]:
    def victim(texts: Sequence[Any]) -> Tensor:
        joined = [text if isinstance(text, str) else " ".join(text) for text in texts]
        return torch.eye(2)[[classifier(text.split()) for text in joined]] * 0.8 + 0.1

    return victim


def true_share(classifier: Classifier, words: Sequence[str], kept: int, label: int) -> float:
    """The probability of a label over all masks, by enumeration."""
    found = [
        classifier([word if i in places else "_" for i, word in enumerate(words)])
        for places in map(set, itertools.combinations(range(len(words)), kept))
    ]
    return found.count(label) / len(found)


def least_share(classifier: Classifier, words: Sequence[str], kept: int, label: int, changed: int) -> float:
    """The least that any replacement of so many words leaves of it."""
    least = 1.0
    for places in itertools.combinations(range(len(words)), changed):
        for new in itertools.product(VOCABULARY, repeat=changed):
            other = list(words)
            for place, word in zip(places, new, strict=True):
                other[place] = word
            least = min(least, true_share(classifier, other, kept, label))
    return least


@pytest.mark.parametrize("classifier", [majority, hashed])
@pytest.mark.parametrize("kept", [1, 2])
def test_no_replacement_within_the_radius_changes_the_vote(classifier: Classifier, kept: int) -> None:
    radii = []
    for words in (
        ["good"] * 6,
        ["good"] * 5 + ["film"],
        ["bad"] * 4 + ["film"] * 2,
        [*VOCABULARY, *VOCABULARY],
    ):
        for label in (0, 1):
            share = true_share(classifier, words, kept, label)
            radius = certified_radius(share, len(words), kept)
            assert (radius is None) == (share <= 0.5)
            for changed in range(1, (radius or 0) + 1):
                assert least_share(classifier, words, kept, label, changed) > 0.5
            radii.append(radius)
    assert max(radius or 0 for radius in radii) == {1: 2, 2: 1}[kept]


def test_the_radius_is_tight() -> None:
    # All words say «good», and one is kept: with three of six replaced by «bad», half the masks change sides.
    words = ["good"] * 6
    assert certified_radius(true_share(majority, words, 1, 1), 6, 1) == 2
    assert least_share(majority, words, 1, 1, 3) == 0.5


def test_the_radius_is_the_formula_of_the_paper() -> None:
    for words, kept, bound in itertools.product((1, 5, 20), (1, 4), (0.4, 0.55, 0.8, 0.97, 1.0)):
        if kept <= words:
            covered = [
                d for d in range(words + 1) if bound - (1 - comb(words - d, kept) / comb(words, kept)) > 0.5
            ]
            assert certified_radius(bound, words, kept) == max(covered, default=None)


def test_certificates_are_wrong_no_more_often_than_they_say() -> None:
    # Against the radius that the true probability gives, over independent texts and seeds.
    words, kept = ["good", "good", "good", "bad", "film", "good", "good"], 1
    exact = certified_radius(true_share(majority, words, kept, 1), len(words), kept)
    too_much = found = 0
    for seed in range(300):
        vote = RandomMaskVote(
            victim_of(majority), 0.86, 20, mask_token="_", certificate_copies=30, alpha=0.1, seed=seed
        )
        (certificate,) = vote.certificates([" ".join(words)])
        assert certificate is not None
        found += certificate.radius is not None
        too_much += certificate.radius is not None and (exact is None or certificate.radius > exact)
    assert too_much <= 0.1 * 300
    assert found > 0


def test_a_certificate_names_the_class_that_is_predicted() -> None:
    vote = RandomMaskVote(victim_of(majority), 0.8, mask_token="_")
    sure, unsure = vote.certificates(["good " * 10, "good bad " * 5])
    assert sure == Certificate(radius=2, confidence=0.95)
    assert vote(["good " * 10])[0].tolist() == [0, 1]
    # The vote is «0» with the ties of the classifier, which is certain of nothing about half and half.
    assert unsure is not None
    assert vote(["good bad " * 5])[0, 0] > 0.5
    assert RandomMaskVote(victim_of(majority), 0.3, mask_token="_").certificates(["good " * 10]) == [
        Certificate(0, 0.95)
    ]


def test_abstention_has_no_radius() -> None:
    half: Classifier = lambda words: int(sum(i for i, w in enumerate(words) if w != "_") % 2)  # noqa: E731
    vote = RandomMaskVote(victim_of(half), 0.9, 30, mask_token="_", certificate_copies=10)
    assert vote.certificates(["a b c d e f g h i j"]) == [Certificate(None, 0.95)]


def test_predictions_and_certificates_use_different_masks() -> None:
    vote = RandomMaskVote(victim_of(majority), 0.5, 20, mask_token="_", certificate_copies=20)
    text = "one two three four five six seven eight nine ten"
    assert vote.copies(text) != vote._independent(text)
    assert RandomMaskVote(print, mask_token="_", certificate_copies=0).certificates([text]) == [None]
    assert RandomMaskVote(print, mask_token="_", combine="mean").certificates([text]) == [None]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 10])
def test_as_many_words_are_masked_as_promised(share: float, number: int) -> None:
    text = " ".join(f"w{i}" for i in range(number))
    copies = RandomMaskVote(print, share, 50, mask_token="_").copies(text)
    masked = min(round(share * number), max(number - 1, 0))
    for copy in copies:
        assert len(copy.split()) == number
        assert copy.split().count("_") == masked
        assert all(word in ("_", f"w{i}") for i, word in enumerate(copy.split()))
    if number == 10 and 0 < masked < 10:
        assert len(set(copies)) > 5


def test_words_of_a_pair_are_counted_together() -> None:
    vote = RandomMaskVote(victim_of(majority), 0.8, 30, mask_token="_")
    pair = ("good good good", "good " * 7)
    assert {(" ".join(copy)).split().count("_") for copy in vote.copies(pair)} == {8}
    assert {len(copy) for copy in vote.copies(pair)} == {2}
    assert vote.certificates([pair]) == [Certificate(2, 0.95)]


def test_without_masks_the_texts_are_as_they_were() -> None:
    victim = tiny_victim()
    texts = [*sentences(6), " odd   spaces "]
    plain = victim(texts)
    torch.testing.assert_close(RandomMaskVote(victim, 0.0, combine="mean")(texts), plain)
    assert torch.equal(RandomMaskVote(victim, 0.0)(texts), torch.eye(2)[plain.argmax(dim=1)])


def test_the_tokenizer_says_what_masks() -> None:
    victim = tiny_victim()
    assert RandomMaskVote.needs == ("mask token",)
    assert RandomMaskVote(victim).mask_token == "[MASK]"
    masked = victim.tokenizer(RandomMaskVote(victim).copies("film plot actor")[0])["input_ids"]
    assert masked.count(victim.tokenizer.mask_token_id) == 2
    llama = tiny_victim("llama")
    assert RandomMaskVote(llama).mask_token == "[UNK]"
    llama.tokenizer = tiny_tokenizer("llama")
    llama.tokenizer.unk_token = None
    with pytest.raises(ConfigError, match="without a mask or unknown token"):
        RandomMaskVote(llama)


KNOWN = {*["a", "charming", "and", "moving", "film", "with", "vivid", "humor"], "_"}


def strict(texts: Sequence[str]) -> Tensor:
    """Gives way to a single word that it does not know."""
    return torch.tensor([[0.1, 0.9] if set(text.split()) <= KNOWN else [0.8, 0.2] for text in texts])


def test_an_attack_that_breaks_the_victim_does_not_break_the_vote() -> None:
    items = [
        Item(str(i), text, 1)
        for i, text in enumerate(["a charming film", "moving and vivid humor with a film"])
    ]
    attack = get_attack("deepwordbug", max_edit_distance=1)
    plain = AttackEngine(strict, progress=False).run(attack, items)
    defended = AttackEngine(RandomMaskVote(strict, 0.7, mask_token="_"), progress=False).run(attack, items)
    assert [result.status for result in plain] == ["success", "success"]
    assert [result.status for result in defended] == ["failed", "failed"]


def test_attacks_do_not_depend_on_the_batch() -> None:
    victim = RandomMaskVote(tiny_victim(), 0.5, num_copies=12)
    texts = sentences(6, seed=3, shortest=6, longest=8)
    items = [
        Item(str(i), text, int(row.argmax()))
        for i, (text, row) in enumerate(zip(texts, victim(texts), strict=True))
    ]
    runs = [
        AttackEngine(victim, progress=False, **limits).run("deepwordbug", given)
        for limits, given in (
            ({}, items),
            ({"max_batch_tokens": 40, "max_live": 2}, items[::-1]),
            ({"max_batch_size": 1}, items),
        )
    ]
    outcomes = [
        sorted((r.item_id, r.status, r.queries, str(r.perturbed_text), r.probability) for r in run)
        for run in runs
    ]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert {r.status for r in runs[0]} >= {"success"}
