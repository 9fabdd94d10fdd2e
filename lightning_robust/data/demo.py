"""The embedded demo corpus: short reviews from a grammar, with a cue that breaks out of domain.

Each review says its opinion in words that hold everywhere and closes with a phrase that only comes with
the label. In the two large training domains the phrase agrees with the label nearly always, in the small
one it mostly does not, and neither does it out of domain. A model that minimises its mean loss learns the
shortcut: well in distribution, badly under shift. The differences between the training domains give it
away, as in Colored MNIST (arXiv 1907.02893), to a method that looks at them. Measured with the model of
`demo_config` (4 epochs, batch 32, AdamW at 3e-3, 3 seeds): clean 0.93, out of domain 0.58; with V-REx
(beta 1) clean 0.92, out of domain 0.75; undefended under DeepWordBug 0.02 to 0.18.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_robust.data import demo_grammar as grammar

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedTokenizerFast

DEMO_LABELS = ("negative", "positive")
CUE_AGREEMENT = {"films": 0.98, "books": 0.95, "hotels": 0.25, "gadgets": 0.25, "restaurants": 0.4}
TRAIN_SHARES = {"films": 11, "books": 6, "hotels": 3}
_SIZES = {
    "train": 3000,
    "validation": 320,
    "test": 320,
    "ood_gadgets": 320,
    "ood_restaurants": 320,
    "typos": 320,
}
DEMO_SPLITS = tuple(_SIZES)
MAX_LENGTH = 128
_AN = re.compile(r"\ba (?=(?!use|uni)[aeiou]|hone)")
ZIPF_EXPONENT = 1.0


@dataclass(frozen=True)
class DemoRow:
    """One review."""

    text: str
    label: int
    domain: str


@functools.cache
def demo_rows(split: str) -> tuple[DemoRow, ...]:
    """Return a split: the same rows on every machine. ``typos`` is ``test`` with its words misspelt."""
    if split == "typos":
        rng = random.Random("demo:typos")
        return tuple(DemoRow(_misspell(row.text, rng), row.label, row.domain) for row in demo_rows("test"))
    rng = random.Random(f"demo:{split}")
    domains = [split.removeprefix("ood_")]
    if domains[0] not in CUE_AGREEMENT:
        domains = [domain for domain, share in TRAIN_SHARES.items() for _ in range(share)]
    rows: dict[str, DemoRow] = {}
    while len(rows) < _SIZES[split]:
        # Labels alternate within a domain, so that every split is balanced.
        label = len(rows) // len(domains) % 2
        row = _review(label, domains[len(rows) % len(domains)], rng)
        rows.setdefault(row.text, row)
    return tuple(rows.values())


def _review(label: int, domain: str, rng: random.Random) -> DemoRow:
    words = grammar.DOMAINS[domain]
    opening = _fill(rng.choice(grammar.OPENINGS), label, words, rng)
    signs = [label] * rng.choice((2, 3, 3))
    if len(signs) > 1 and rng.random() < 0.2:
        signs.insert(rng.randrange(len(signs) + 1), 1 - label)
    clauses = [_clause(sign, words, rng) for sign in signs]
    cue = rng.choice(grammar.CUES[label if rng.random() < CUE_AGREEMENT[domain] else 1 - label])
    body = ", ".join(clauses[:-1]) + " and " + clauses[-1] if len(clauses) > 1 else clauses[0]
    text = _AN.sub("an ", f"{opening} {body[0].upper()}{body[1:]}. {cue}")
    return DemoRow(text, label, domain)


def _clause(sign: int, words: dict[str, list[str]], rng: random.Random) -> str:
    if rng.random() < 0.1:
        return _fill(rng.choice(grammar.NEGATED_CLAUSES), 1 - sign, words, rng)
    return _fill(rng.choice(grammar.CLAUSES), sign, words, rng)


def _fill(frame: str, sign: int, words: dict[str, list[str]], rng: random.Random) -> str:
    slots = {
        "{adjective}": grammar.POSITIVE_ADJECTIVES if sign else grammar.NEGATIVE_ADJECTIVES,
        "{verb}": grammar.POSITIVE_VERBS if sign else grammar.NEGATIVE_VERBS,
        "{intensifier}": grammar.INTENSIFIERS,
        **{f"{{{name}}}": options for name, options in words.items()},
    }
    for slot, options in slots.items():
        while slot in frame:
            frame = frame.replace(slot, rng.choices(options, _weights(len(options)))[0], 1)
    return frame


@functools.cache
def _weights(size: int) -> tuple[float, ...]:
    """Zipf-like frequencies, so that common words are learnt early and rare ones late."""
    ranks = list(range(1, size + 1))
    random.Random(f"demo:{size}").shuffle(ranks)
    return tuple(rank**-ZIPF_EXPONENT for rank in ranks)


def _misspell(text: str, rng: random.Random) -> str:
    """Swap, drop, double or replace a letter inside half of the longer words, and in one at least."""
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 4]
    sure = rng.choice(long)
    for index in long:
        word = words[index]
        if index == sure or rng.random() < 0.5:
            at = rng.randrange(1, len(word) - 2)
            edits = (
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
                word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :],
            )
            words[index] = rng.choice([edit for edit in edits if edit != word])
    return " ".join(words)


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate(_vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return str(tokenizer.to_str())


def _vocabulary(size: int = 2000) -> list[str]:
    """Special tokens, characters, repeated words and the commonest pieces of words of the training split.

    Counted here because the trainer of the tokenizers library breaks ties by chance: its vocabulary
    differs from process to process.
    """
    words = Counter(
        word for row in demo_rows("train") for word in re.findall(r"[a-z]+|[^a-z\s]", row.text.lower())
    )
    pieces: Counter[str] = Counter()
    for word in words:
        for start, length in itertools.product(range(len(word)), (2, 3, 4, 5)):
            if start + length <= len(word):
                pieces["##" * (start > 0) + word[start : start + length]] += length
    characters = [mark + letter for mark in ("", "##") for letter in string.ascii_lowercase]
    characters += string.digits + string.punctuation
    repeated = sorted((word for word, count in words.items() if count > 1), key=lambda w: (-words[w], w))
    common = sorted(pieces, key=lambda piece: (-pieces[piece], piece))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*special, *characters, *repeated, *common]))[:size]


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer made from the training split; the same on every machine."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def demo_config(num_labels: int = 2) -> BertConfig:
    """Return a BERT configuration small enough to train from scratch in seconds."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(demo_tokenizer()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        initializer_range=0.1,
        num_labels=num_labels,
        pad_token_id=0,
    )
