"""EDA: train on texts with words replaced, inserted, swapped or deleted at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_robust.attacks import wordnet
from lightning_robust.attacks.attacked_text import word_spans
from lightning_robust.attacks.neighbors import in_case_of
from lightning_robust.attacks.stop_words import STOP_WORDS
from lightning_robust.data.items import Text
from lightning_robust.defenses.base import Batch, Defense, Step
from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.synonyms import Synonyms, load_synonyms
from lightning_robust.defenses.texts import (
    encode_like,
    length_limit,
    needed_tokenizer,
    row_limit,
    row_randoms,
    texts_of,
    training_texts,
)

SynonymsOf = Callable[[str], Sequence[str] | None]
_MOST_SYNONYMS = 50


class EDA(Defense):
    """Minimise L on texts of which a ``share`` is changed by one of four operations, drawn anew each time.

    With n words and a rate r, in max(1, ⌊r·n⌋) places: replace a word by a synonym, insert a synonym of one of the
    words, or swap two words; or delete each word with probability r. Each text of a pair is changed by itself.

    Source: Wei and Zou 2019, arXiv 1901.11196. There up to 16 changed copies join each text before training,
    in lower case and without punctuation; here a row is changed in place, so that an epoch costs the same
    and no two see the same changes, and case and punctuation stay. Synonyms are single words. With
    RandomMask, name EDA first: masks are not words.

    Args:
        share: Probability that a row is changed; 0 is training without the defense.
        synonym_rate: Share of the words to replace; 0 leaves the operation out, as for the others.
        insertion_rate: Insertions relative to the number of words.
        swap_rate: Swaps relative to the number of words.
        deletion_rate: Probability of deleting a word; one is always kept.
        synonyms: ``{"word": ["synonym", ...]}``, or a JSON file of that; by default WordNet.
        text_key: Where a batch may hold a list of its texts. Without it they are those of our data module's
            examples, else decoded from the tokens.
        tokenizer: By default that of the module or its data module; a name or path is loaded.
        seed: Of rows and changes.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there is no tokenizer, or the synonyms
            cannot be had; at the first batch, if its texts cannot be had.
    """

    aim = "both"
    needs: ClassVar[tuple[str, ...]] = ("tokenizer", "texts", "synonyms")
    cost = 1.02

    def __init__(
        self,
        share: float = 0.5,
        synonym_rate: float = 0.1,
        insertion_rate: float = 0.1,
        swap_rate: float = 0.1,
        deletion_rate: float = 0.1,
        synonyms: Synonyms = None,
        text_key: str = "text",
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.share = expect("share", share, at_least=0, at_most=1)
        self.synonym_rate = expect("synonym_rate", synonym_rate, at_least=0, at_most=1)
        self.insertion_rate = expect("insertion_rate", insertion_rate, at_least=0, at_most=1)
        self.swap_rate = expect("swap_rate", swap_rate, at_least=0, at_most=1)
        self.deletion_rate = expect("deletion_rate", deletion_rate, at_least=0, at_most=1)
        self.synonyms = synonyms
        self.text_key = text_key
        self.tokenizer = tokenizer
        self.seed = seed
        self._tokenizer: Any = None
        self._max_length = 0
        self._training: dict[str, Text] = {}
        self._synonyms_of: SynonymsOf = wordnet.synonyms

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.share == 0:
            return
        self._tokenizer = needed_tokenizer(self, pl_module, self.tokenizer)
        self._max_length = length_limit(trainer, pl_module, self._tokenizer)
        self._training = training_texts(trainer)
        if self.synonyms is not None:
            neighbors = load_synonyms(self.synonyms)
            self._synonyms_of = lambda word: neighbors.nearest(word, _MOST_SYNONYMS)
        elif self.synonym_rate or self.insertion_rate:
            wordnet.load_wordnet()

    @property
    def hands_loss_on(self) -> bool:
        return True

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        operations = self._operations()
        if self.share == 0 or not operations:
            return step(batch)
        texts = texts_of(batch, self._tokenizer, self._training, self.text_key)
        changed = list(texts)
        for row, rng in enumerate(row_randoms(self.chain, self.seed, len(texts))):
            if rng.random() < self.share:
                changed[row] = _changed(texts[row], operations, rng)
        if changed == texts:
            return step(batch)
        limit = row_limit(batch, texts, self._tokenizer, self._max_length)
        with self.chain.perturbing():
            return step(encode_like(batch, changed, self._tokenizer, limit, self.text_key))

    def _operations(self) -> list[Operation]:
        rated: list[tuple[float, Operation]] = [
            (self.synonym_rate, lambda t, rng: replace(t, self.synonym_rate, self._synonyms_of, rng)),
            (self.insertion_rate, lambda t, rng: insert(t, self.insertion_rate, self._synonyms_of, rng)),
            (self.swap_rate, lambda t, rng: swap(t, self.swap_rate, rng)),
            (self.deletion_rate, lambda t, rng: delete(t, self.deletion_rate, rng)),
        ]
        return [operation for rate, operation in rated if rate]


Operation = Callable[[str, random.Random], str]


def _changed(text: Text, operations: Sequence[Operation], rng: random.Random) -> Text:
    if isinstance(text, str):
        return rng.choice(operations)(text, rng)
    return tuple(rng.choice(operations)(part, rng) for part in text)


def replace(text: str, rate: float, synonyms_of: SynonymsOf, rng: random.Random) -> str:
    """Return the text with words replaced by synonyms, all occurrences of a word alike; no stop words.

    >>> replace("a good film", 0.1, {"good": ["fine"]}.get, random.Random(0))
    'a fine film'
    """
    words, gaps = _split(text)
    candidates = sorted({word.lower() for word in words} - STOP_WORDS)
    rng.shuffle(candidates)
    left = _places(rate, words)
    for candidate in candidates:
        if left and (found := synonyms_of(candidate)):
            synonym = rng.choice(found)
            words = [in_case_of(word, synonym) if word.lower() == candidate else word for word in words]
            left -= 1
    return _joined(words, gaps)


def insert(text: str, rate: float, synonyms_of: SynonymsOf, rng: random.Random) -> str:
    """Return the text with synonyms of its words, but of no stop words, before words at random.

    >>> insert("a good film", 0.1, {"good": ["fine"]}.get, random.Random(0))
    'a fine good film'
    """
    words, gaps = _split(text)
    sources = [
        (word, found) for word in words if word.lower() not in STOP_WORDS and (found := synonyms_of(word))
    ]
    if not sources:
        return text
    for _ in range(_places(rate, words)):
        word, found = rng.choice(sources)
        place = rng.randrange(len(words))
        words[place] = f"{in_case_of(word, rng.choice(found))} {words[place]}"
    return _joined(words, gaps)


def swap(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with pairs of words swapped.

    >>> swap("good film", 0.1, random.Random(0))
    'film good'
    """
    words, gaps = _split(text)
    if len(words) < 2:
        return text
    for _ in range(_places(rate, words)):
        i, j = rng.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    return _joined(words, gaps)


def delete(text: str, rate: float, rng: random.Random) -> str:
    """Return the text with each word, and a space beside it, deleted with probability ``rate``; one is kept.

    >>> delete("a good film", 1.0, random.Random(0))
    'good'
    """
    words, gaps = _split(text)
    kept = [word if rng.random() >= rate else "" for word in words]
    if words and not any(kept):
        survivor = rng.randrange(len(words))
        kept[survivor] = words[survivor]
    return _joined(kept, gaps)


def _places(rate: float, words: Sequence[str]) -> int:
    return max(1, int(rate * len(words)))


def _split(text: str) -> tuple[list[str], list[str]]:
    """Return the words and what stands before each of them and at the end."""
    spans = word_spans(text)
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return [text[start:end] for start, end in spans], [text[e:s] for e, s in zip(ends, starts, strict=True)]


def _joined(words: Sequence[str], gaps: Sequence[str]) -> str:
    text = ""
    for word, gap in zip((*words, None), gaps, strict=True):
        # A word that is gone takes the space before it along, at the beginning that behind it.
        text += gap.removeprefix(" ") if not text else gap
        text = text.removesuffix(" ") if word == "" else text + (word or "")
    return text
