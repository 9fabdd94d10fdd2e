from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import BertForSequenceClassification

from lightning_robust.data import demo_grammar
from lightning_robust.data.demo import (
    CUE_AGREEMENT,
    DEMO_SPLITS,
    MAX_LENGTH,
    TRAIN_SHARES,
    DemoRow,
    _vocabulary,
    demo_config,
    demo_rows,
    demo_tokenizer,
)
from lightning_robust.data.sources import TextSource

CORPUS_HASH = "ca83946f997ba3bd"
TOKENIZER_HASH = "fff3be45eabf9aa2"


def cue_of(row: DemoRow) -> int:
    return next(label for label, cues in demo_grammar.CUES.items() if row.text.endswith(tuple(cues)))


def corpus_hash() -> str:
    rows = [[row.text, row.label, row.domain] for split in DEMO_SPLITS for row in demo_rows(split)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def tokenizer_hash() -> str:
    vocabulary = sorted(demo_tokenizer().get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def test_corpus_and_tokenizer_are_the_same_everywhere() -> None:
    assert (corpus_hash(), tokenizer_hash()) == (CORPUS_HASH, TOKENIZER_HASH)


def test_vocabulary_does_not_depend_on_hash_seeds() -> None:
    code = "from lightning_robust.data.demo import _vocabulary; print(*_vocabulary())"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
    assert run.stdout.split() == _vocabulary()


def test_splits_are_balanced_and_disjoint() -> None:
    texts = [row.text for split in DEMO_SPLITS for row in demo_rows(split)]
    assert len(set(texts)) == len(texts)
    for split in DEMO_SPLITS:
        counts = Counter((row.domain, row.label) for row in demo_rows(split))
        for domain in {domain for domain, _ in counts}:
            assert counts[domain, 0] == counts[domain, 1]


@pytest.mark.parametrize("domain", CUE_AGREEMENT)
def test_cue_agrees_with_the_label_as_stated(domain: str) -> None:
    split = "train" if domain in TRAIN_SHARES else f"ood_{domain}"
    rows = [row for row in demo_rows(split) if row.domain == domain]
    agreement = sum(cue_of(row) == row.label for row in rows) / len(rows)
    # Three standard errors of a binomial share.
    expected = CUE_AGREEMENT[domain]
    assert abs(agreement - expected) < 3 * (expected * (1 - expected) / len(rows)) ** 0.5


def test_words_of_the_two_opinions_differ() -> None:
    assert not set(demo_grammar.POSITIVE_ADJECTIVES) & set(demo_grammar.NEGATIVE_ADJECTIVES)
    assert not set(demo_grammar.POSITIVE_VERBS) & set(demo_grammar.NEGATIVE_VERBS)


def test_typos_keep_label_and_number_of_words() -> None:
    for typo, row in zip(demo_rows("typos"), demo_rows("test"), strict=True):
        assert typo.label == row.label
        assert typo.text != row.text
        assert len(typo.text.split()) == len(row.text.split())


def test_source_names_domains_and_splits() -> None:
    train = TextSource("demo").items()
    assert {item.domain for item in train} == set(TRAIN_SHARES)
    assert {item.domain for item in TextSource("demo", domain="all").items()} == {"all"}
    assert not {item.id for item in train} & {item.id for item in TextSource("demo", split="test").items()}


def test_every_review_fits_the_model() -> None:
    tokenizer = demo_tokenizer()
    lengths = [len(tokenizer(row.text)["input_ids"]) for split in DEMO_SPLITS for row in demo_rows(split)]
    assert max(lengths) < MAX_LENGTH == tokenizer.model_max_length
    assert demo_config(3).num_labels == 3
    assert demo_config(3).vocab_size == len(tokenizer)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_global_random_state_is_left_alone() -> None:
    before = random.getstate()
    demo_rows.cache_clear()
    demo_rows("typos")
    assert random.getstate() == before


def test_an_undefended_model_learns_the_shortcut_and_breaks() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(demo_config(2))
    rows = demo_rows("train")
    labels = torch.tensor([row.label for row in rows])
    tokenizer = demo_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def logits(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return model(**batch).logits

    for index in [part for _ in range(2) for part in torch.randperm(len(rows)).split(32)]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits([rows[i].text for i in index]), labels[index]).backward()
        optimizer.step()
    model.eval()
    accuracy = {}
    with torch.no_grad():
        for split in ("test", "ood_gadgets", "ood_restaurants", "typos"):
            found = logits([row.text for row in demo_rows(split)]).argmax(-1).tolist()
            accuracy[split] = (
                sum(a == row.label for a, row in zip(found, demo_rows(split), strict=True)) / 320
            )
    assert accuracy["test"] > 0.8, accuracy
    assert accuracy["test"] - accuracy["ood_gadgets"] > 0.1, accuracy
    assert accuracy["test"] - accuracy["ood_restaurants"] > 0.1, accuracy
    assert accuracy["test"] - accuracy["typos"] > 0.02, accuracy
