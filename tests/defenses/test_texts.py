from __future__ import annotations

import json

import pytest
import torch
from transformers import BatchEncoding, PreTrainedTokenizerFast

from lightning_robust.data import TextDataModule, TextSource
from lightning_robust.defenses.base import Defense
from lightning_robust.defenses.perturbation import special_token_ids
from lightning_robust.defenses.texts import (
    cut_at,
    encode_like,
    length_limit,
    needed_tokenizer,
    row_randoms,
    texts_of,
    training_texts,
)
from lightning_robust.defenses.vocabulary import Vocabulary
from lightning_robust.defenses.vrex import VREx
from lightning_robust.errors import ConfigError
from lightning_robust.modules.encoding import encode
from tests.defenses.toy_words import Reader, text_batch, text_loader, toy_tokenizer
from tests.defenses.training import fit
from tests.foreign import PlainEncoder


@pytest.fixture
def tokenizer():
    return toy_tokenizer()


class Reading(Defense):
    """Keeps the texts and the random numbers of each row."""

    def __init__(self):
        super().__init__()
        self.read = []

    def check(self, trainer, pl_module):
        self.training = training_texts(trainer)
        self.tokenizer = needed_tokenizer(self, pl_module)
        self.limit = length_limit(trainer, pl_module, self.tokenizer)

    def training_loss(self, step, batch):
        texts = texts_of(batch, self.tokenizer, self.training)
        draws = [rng.random() for rng in row_randoms(self.chain, 0, len(texts))]
        self.read.append(list(zip(texts, draws, strict=True)))
        return step(batch)


def data_module(folder, rows):
    file = folder / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    columns = [key for key in rows[0] if key != "label"]
    source = TextSource(path=str(file), text_columns=columns, label_column="label")
    return TextDataModule(train=source, batch_size=2, max_length=5, validation_fraction=0)


def test_texts_of_our_data_module_are_the_untouched_ones(tmp_path):
    texts = ["Good FILM", "the  film is good a plot", "bad", "a  Fine movie"]
    reading = Reading()
    data = data_module(tmp_path, [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    fit(Reader(), [reading], data, max_epochs=1)
    assert {text for batch in reading.read for text, _ in batch} == set(texts)
    assert reading.limit == 5


def test_pairs_of_our_data_module(tmp_path):
    rows = [{"a": "good film", "b": f"a {word}", "label": i % 2} for i, word in enumerate(["plot", "bad"])]
    reading = Reading()
    fit(Reader(), [reading], data_module(tmp_path, rows), max_epochs=1)
    assert {text for batch in reading.read for text, _ in batch} == {
        ("good film", "a plot"),
        ("good film", "a bad"),
    }


def test_listed_texts(tokenizer):
    texts = ["Good   film", "a plot"]
    batch = text_batch(texts, [0, 1]) | {"text": texts}
    assert texts_of(batch, tokenizer) == texts
    batch["sentence"] = batch.pop("text")
    assert texts_of(batch, tokenizer, text_key="sentence") == texts


def test_decoded_texts(tokenizer):
    batch = text_batch(["a good film", "slowly , slower [MASK]"], [0, 1])
    assert texts_of(batch, tokenizer)[0] == "a good film"
    again = encode_like(batch, texts_of(batch, tokenizer), tokenizer, 32)
    assert torch.equal(again["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("where", ["ids", "text"])
def test_tokens_that_another_defense_put_there_win(where, tokenizer):
    batch = text_batch(["a [MASK] film", "the plot"], [0, 1])
    known = ["a good film", "the plot"]
    batch |= {"ids": ["x", "y"]} if where == "ids" else {"text": known}
    found = texts_of(batch, tokenizer, dict(zip("xy", known, strict=True)))
    assert found == ["a [MASK] film", "the plot"]


def test_pairs_cannot_be_decoded(tokenizer):
    batch = dict(tokenizer(["good film"], ["a plot"], return_tensors="pt"))
    with pytest.raises(ConfigError, match=r"pairs of texts cannot be decoded.*TextDataModule"):
        texts_of(batch, tokenizer)


@pytest.mark.parametrize("batch", [(torch.ones(2, 3), torch.ones(2)), {"pixels": torch.ones(2, 3)}])
def test_batches_without_tokens(batch, tokenizer):
    with pytest.raises(ConfigError, match="dict with `input_ids`"):
        texts_of(batch, tokenizer)


@pytest.mark.parametrize("side", ["right", "left"])
def test_encode_like_makes_the_tokenizers_fields_anew_and_keeps_the_rest(side):
    tokenizer = toy_tokenizer(side)
    batch = text_batch(["a good film", "the plot"], [0, 1], padding_side=side) | {
        "ids": ["x", "y"],
        "text": ["", ""],
    }
    before = {key: value.clone() if hasattr(value, "clone") else value for key, value in batch.items()}
    texts = ["good", "the plot was slow , a film"]
    made = encode_like(batch, texts, tokenizer, 6)
    expected = tokenizer(texts, padding=True, truncation=True, max_length=6, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(made[name], expected[name])
    assert made["input_ids"].shape == (2, 6)
    assert made["text"] == texts
    assert all(made[name] is batch[name] for name in ("labels", "domain", "ids"))
    assert all(torch.equal(batch[k], v) if hasattr(v, "clone") else batch[k] == v for k, v in before.items())


def test_encode_like_adds_no_field_and_keeps_the_type(tokenizer):
    batch = BatchEncoding({"input_ids": torch.ones(1, 3, dtype=torch.int32), "labels": torch.ones(1)})
    made = encode_like(batch, ["a good film"], tokenizer, 9)
    assert isinstance(made, BatchEncoding)
    assert set(made) == {"input_ids", "labels"}
    assert made["input_ids"].dtype == torch.int32


def test_encode_like_needs_a_padding_token(tokenizer):
    tokenizer.pad_token = None
    batch = text_batch(["a", "a"], [0, 1])
    assert encode_like(batch, ["good", "bad"], tokenizer, 9)["input_ids"].shape == (2, 3)
    with pytest.raises(ConfigError, match="no padding token"):
        encode_like(batch, ["good film", "bad"], tokenizer, 9)


def test_a_missing_tokenizer_is_said_at_fit_start(tmp_path):
    with pytest.raises(ConfigError, match=r"Reading works on words.*tokenizer=AutoTokenizer"):
        fit(PlainEncoder(), [Reading()])
    with pytest.raises(ConfigError, match="could not be loaded"):
        needed_tokenizer(Reading(), PlainEncoder(), str(tmp_path / "nowhere"))
    toy_tokenizer().save_pretrained(tmp_path)
    assert (
        needed_tokenizer(Reading(), PlainEncoder(), str(tmp_path)).get_vocab() == toy_tokenizer().get_vocab()
    )


def test_a_row_draws_the_same_numbers_whatever_the_batch_is_split_into():
    whole, split = Reading(), Reading()
    fit(Reader(), [whole], text_loader())
    fit(Reader(), [VREx(), split], text_loader())
    assert len(split.read) == 2 * len(whole.read)
    assert sorted(row for batch in whole.read for row in batch) == sorted(
        row for batch in split.read for row in batch
    )
    draws = [draw for batch in whole.read for _, draw in batch]
    assert len(set(draws)) == len(draws) == 16  # other ones in each of the two epochs


def words_by_hand(tokens, continues):
    numbers, current, open_word = [], -1, False
    for token in tokens:
        if token.startswith("<"):
            numbers.append(-1)
            open_word = False
            continue
        current += not (open_word and continues(token))
        open_word = True
        numbers.append(current)
    return numbers


@pytest.mark.parametrize(
    ("tokens", "continues"),
    [
        (["good", "film", "##s", "##er", ",", "##"], lambda t: t in ("##s", "##er")),
        (["Ġgood", "film", "s", "Ġfilm", ",", "Ċ", "é"], lambda t: t[0] not in "ĠĊ"),
        (["▁good", "film", "s", "▁film", ",", "▁"], lambda t: t[0] != "▁"),
        (["good", "film", "s", ","], lambda t: False),
    ],
)
def test_words_of_each_kind_of_vocabulary(tokens, continues):
    from tokenizers import Tokenizer, models

    names = ["<pad>", "<s>", "<unk>", *tokens]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(names)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )
    vocabulary = Vocabulary(tokenizer)
    ids = torch.randint(0, len(names), (20, 12), generator=torch.Generator().manual_seed(0))
    numbers = vocabulary.word_numbers(ids)
    for row, found in zip(ids.tolist(), numbers.tolist(), strict=True):
        marked = tokens[0][0] in "Ġ▁"  # where the unknown token, that has no mark, continues a word
        spelled = ["unk" if i == 2 else names[i] for i in row]
        assert marked or not continues("unk")
        assert found == words_by_hand(spelled, continues)
    assert "good" in vocabulary.words
    assert vocabulary.words["good"] == 3
    assert not {"##s", "s"} & set(vocabulary.words) or tokens == ["good", "film", "s", ","]


@pytest.mark.parametrize("role", ["pad", "eos"])
def test_an_unknown_token_that_marks_something_else_is_no_word(role, tokenizer):
    unknown = tokenizer.unk_token_id
    module = PlainEncoder()
    module.tokenizer = tokenizer
    assert unknown not in special_token_ids(module, None)
    assert not Vocabulary(tokenizer).special[unknown]
    setattr(tokenizer, f"{role}_token", tokenizer.unk_token)
    assert unknown in special_token_ids(module, None)
    assert Vocabulary(tokenizer).special[unknown]
    assert encode(tokenizer, ["qqqq"], 8)[0].special.count(False) == 0


def test_only_the_beginning_of_a_longer_text_shows_a_cut(tokenizer):
    texts = ["good film", "good film indeed", "a bad film", "a good film and a bad one"]

    def rows(length):
        found = [one.input_ids for one in encode(tokenizer, texts, length)]
        longest = max(map(len, found))
        return [row for row in found if len(row) == longest]

    longest = len(rows(50)[0])
    assert cut_at(rows(50), texts, tokenizer, 50) is None
    assert cut_at(rows(longest - 1), texts, tokenizer, 50) == longest - 1
    whole = encode(tokenizer, texts[:1], 50)[0].input_ids
    assert cut_at([whole], texts, tokenizer, 50) is None  # also of «good film indeed» the beginning
    assert cut_at([], texts, tokenizer, 50) is None
