from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter

import nltk
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_robust.defenses import eda
from lightning_robust.defenses.eda import EDA
from lightning_robust.defenses.random_mask import RandomMask
from lightning_robust.errors import ConfigError
from tests.callbacks.test_foreign_project import HuggingFaceProject, batches
from tests.defenses.toy_words import SYNONYMS, TEXTS, Reader, text_loader, toy_tokenizer
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import PlainEncoder

RATES = ("synonym_rate", "insertion_rate", "swap_rate", "deletion_rate")
TEXT = "Good films, a slow plot; the good film is slow (and bad)."
WORDS = ["Good", "films", "a", "slow", "plot", "the", "good", "film", "is", "slow", "and", "bad"]


def only(rate, value=0.5, **settings):
    return EDA(**{"share": 1.0, "synonyms": SYNONYMS, **dict.fromkeys(RATES, 0.0), rate: value, **settings})


def drawn(operation, times=300):
    return [operation(random.Random(i)) for i in range(times)]


def test_replace():
    found = drawn(lambda rng: eda.replace(TEXT, 0.2, SYNONYMS.get, rng))
    for text in found:
        words = re.findall(r"\w+", text.replace("motion picture", "movie"))
        changed = [(old, new) for old, new in zip(WORDS, words, strict=True) if old != new]
        assert len({old.lower() for old, _ in changed}) == 2  # ⌊0.2 · 12⌋ different words, each everywhere
        assert (
            len(
                {old.lower() for old in WORDS}
                & {old.lower() for old, _ in changed}
                & {w.lower() for w in words}
            )
            == 0
        )
        assert all(new.lower() in [*SYNONYMS[old.lower()], "movie"] for old, new in changed)
        assert re.sub(r"[\w ]", "", text) == ",;()."
    assert any(text.startswith(("Fine films,", "Great films,")) for text in found)
    assert any("motion picture is" in text for text in found)
    assert eda.replace("a the is", 1.0, lambda _: ["no"], random.Random(0)) == "a the is"


def test_insert():
    for text in drawn(lambda rng: eda.insert(TEXT, 0.25, SYNONYMS.get, rng)):
        words = Counter(
            text.lower().replace("motion picture", "movie").translate(str.maketrans("", "", ",;().")).split()
        )
        new = words - Counter(word.lower() for word in WORDS)
        assert sum(new.values()) == 3
        assert set(new) <= {"fine", "great", "poor", "movie", "dull", "tardy"}
        assert text.endswith(").")
    assert eda.insert("nothing known", 1.0, SYNONYMS.get, random.Random(0)) == "nothing known"


def test_swap():
    for text in drawn(lambda rng: eda.swap(TEXT, 0.1, rng)):
        words = text.translate(str.maketrans("", "", ",;().")).split()
        assert Counter(words) == Counter(WORDS)
        assert sum(a != b for a, b in zip(words, WORDS, strict=True)) in (0, 2)  # 0: equal words
        assert re.sub(r"\w+", "", text) == re.sub(r"\w+", "", TEXT)
    assert eda.swap("good", 1.0, random.Random(0)) == "good"
    assert eda.swap("", 1.0, random.Random(0)) == ""


def test_delete():
    left = [eda.delete("a b c d e f g h i j", 0.3, random.Random(i)).split() for i in range(1000)]
    assert all(words == sorted(words) and words for words in left)
    assert abs(sum(map(len, left)) / 1000 - 7) < 0.2
    assert eda.delete("good, bad", 0.0, random.Random(0)) == "good, bad"
    assert {eda.delete("one two", 1.0, random.Random(i)) for i in range(20)} == {"one", "two"}
    assert all("  " not in eda.delete(TEXT, 0.5, random.Random(i)) for i in range(50))
    assert eda.delete("", 0.5, random.Random(0)) == ""


def test_each_place_at_least_once():
    assert eda.swap("one two", 0.0001, random.Random(0)) == "two one"


def rows_of(batch):
    decoded = [toy_tokenizer().convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()]
    return [[token for token in row if token not in ("[PAD]", "[CLS]", "[SEP]")] for row in decoded]


def test_changes_a_share_of_the_rows_and_keeps_labels():
    module, data = Reader(), text_loader(TEXTS * 8, batch_size=16)
    fit(module, [only("swap_rate", share=0.25)], data, max_epochs=3)
    changed = total = 0
    for before, after in zip(list(data) * 3, module.seen, strict=True):
        assert torch.equal(before["labels"], after["labels"])
        assert torch.equal(before["domain"], after["domain"])
        pairs = list(zip(rows_of(before), rows_of(after), strict=True))
        assert all(len(a) == len(b) or "##" in str((a, b)) for a, b in pairs)
        changed += sum(a != b for a, b in pairs)
        total += len(pairs)
    assert 0.12 < changed / total < 0.32  # a quarter, less swaps of equal words and of texts of one word


def test_all_four_operations_are_used():
    module = Reader()
    fit(
        module,
        [EDA(share=1.0, synonyms=SYNONYMS)],
        text_loader(["the film is good"] * 60, batch_size=60),
        max_epochs=1,
    )
    original = ["the", "film", "is", "good"]
    kinds = Counter()
    for row in rows_of(module.seen[0]):
        same = Counter(row) == Counter(original)
        kinds["swapped" if same and row != original else "longer" if len(row) > 4 else
              "shorter" if len(row) < 4 else "same" if row == original else "replaced"] += 1  # fmt: skip
    assert min(kinds["swapped"], kinds["longer"], kinds["shorter"], kinds["replaced"]) >= 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_is_plain_training_on_the_changed_batches(accumulate):
    ours = Reader().double()
    theirs = copy.deepcopy(ours)
    fit(
        ours, [EDA(synonyms=SYNONYMS)], text_loader(), precision="64-true", accumulate_grad_batches=accumulate
    )
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for index, batch in enumerate(ours.seen):
        logits = theirs(batch["input_ids"], batch["attention_mask"])
        (torch.nn.functional.cross_entropy(logits, batch["labels"]) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("settings", [{"share": 0.0}, dict.fromkeys(RATES, 0.0)])
def test_zero_strength_is_plain_training(settings):
    plain, defended = Reader(), Reader()
    fit(plain, [], text_loader())
    fit(defended, [EDA(synonyms=SYNONYMS, **settings)], text_loader())
    assert_same_weights(defended, plain, rtol=0, atol=0)


def test_synonyms_of_a_file_and_of_wordnet(tmp_path, shared, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(shared / "lexical" / "nltk_data"), *nltk.data.path])
    file = tmp_path / "synonyms.json"
    file.write_text(json.dumps(SYNONYMS))
    for synonyms in (str(file), None):
        module = Reader()
        fit(module, [only("synonym_rate", synonyms=synonyms)], text_loader(), max_epochs=1)
        assert all(rows_of(a) != rows_of(b) for a, b in zip(text_loader(), module.seen, strict=True))


def test_rows_stay_as_short_as_the_users_truncation_made_them():
    def collate(texts):
        encoded = toy_tokenizer()(texts, padding=True, truncation=True, max_length=5, return_tensors="pt")
        return {**encoded, "labels": torch.arange(len(texts)) % 2, "text": texts}

    module = Reader()
    fit(module, [only("swap_rate")], DataLoader(TEXTS, batch_size=4, collate_fn=collate))
    assert {batch["input_ids"].shape[1] for batch in module.seen} == {5}


def test_missing_synonyms_are_said_at_fit_start(monkeypatch, tmp_path):
    def missing():
        raise ConfigError("NLTK's `wordnet` is not there.")

    monkeypatch.setattr(eda.wordnet, "load_wordnet", missing)
    with pytest.raises(ConfigError, match="wordnet"):
        fit(Reader(), [EDA()], text_loader())
    fit(Reader(), [EDA(synonym_rate=0, insertion_rate=0)], text_loader())
    fit(Reader(), [EDA(share=0)], text_loader())
    with pytest.raises(ConfigError, match="`synonyms` to name a file"):
        fit(Reader(), [EDA(synonyms=str(tmp_path / "none.json"))], text_loader())


@pytest.mark.parametrize("synonyms", [{}, ["good"], {"good": "fine"}, {"good": [1]}])
def test_bad_synonyms(synonyms):
    with pytest.raises(ConfigError, match="Expected `synonyms`"):
        fit(Reader(), [EDA(synonyms=synonyms)], text_loader())


@pytest.mark.parametrize("name", ["share", *RATES])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "much"])
def test_bad_settings(name, value):
    with pytest.raises(ConfigError, match=f"Expected `{name}`"):
        EDA(**{name: value})


def test_no_tokenizer():
    with pytest.raises(ConfigError, match="EDA works on words"):
        fit(PlainEncoder(), [EDA(synonyms=SYNONYMS)])


def test_same_seed_same_texts_and_global_rng_untouched():
    def run(*defenses):
        module = Reader()
        torch.manual_seed(1)
        random.seed(1)
        fit(module, list(defenses), text_loader())
        return [rows_of(batch) for batch in module.seen], (float(torch.rand(1)), random.random())

    first, second, other = (run(EDA(synonyms=SYNONYMS, seed=seed)) for seed in (0, 0, 1))
    assert first == second
    assert first[0] != other[0]
    assert first[1] == other[1] == run()[1]
    assert first[0][:2] != first[0][2:]  # another epoch


def test_changed_texts_can_be_masked():
    module, alone = Reader(), Reader()
    fit(module, [only("insertion_rate", 0.3), RandomMask(share=0.5, seed=1)], text_loader())
    fit(alone, [only("insertion_rate", 0.3)], text_loader())
    for both, changed in zip(module.seen, alone.seen, strict=True):
        for a, b in zip(rows_of(both), rows_of(changed), strict=True):
            words = sum(not token.startswith("##") for token in b)
            assert Counter(a)["[MASK]"] == min(round(words / 2), words - 1)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_hugging_face_projects(kind):
    module = HuggingFaceProject(kind)
    fit(module, [EDA(synonyms={"film": ["drama"], "plot": ["story"]})], batches(module), max_epochs=1)
