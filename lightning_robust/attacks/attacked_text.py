"""A text as words that can be replaced while everything between them stays."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from lightning_robust.data.items import Text
from lightning_robust.errors import ConfigError

# Word characters as TextAttack sees them: besides \w the marks that may stand inside a word, and the three
# homoglyphs of its list that \w does not cover (modifier minus, multiplication sign, backtick).
_WORD = re.compile("[\\w'\\-*@`\u02d7\u00d7]+")
_INSIDE_ONLY = "'-_*@"


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return start and end of each word.

    Words are runs of word characters; apostrophes, hyphens, underscores, asterisks and at signs belong to a
    word where they do not begin or end it. Chinese is not segmented (TextAttack uses jieba).

    >>> text = "It's a 'must-see', isn't it?"
    >>> [text[start:end] for start, end in word_spans(text)]
    ["It's", 'a', 'must-see', "isn't", 'it']
    """
    spans = []
    for match in _WORD.finditer(text):
        word = match.group()
        start = match.start() + len(word) - len(word.lstrip(_INSIDE_ONLY))
        end = match.start() + len(word.rstrip(_INSIDE_ONLY))
        if start < end:
            spans.append((start, end))
    return spans


@dataclass(frozen=True)
class AttackedText:
    """A text, which of its words were modified, and for pairs which of the texts may change.

    Args:
        text: One text or a tuple of them.
        part: Index of the text that may change, where ``text`` is a tuple.
        modified: Indices of the modified words.
    """

    text: Text
    part: int = -1
    modified: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) and not -len(self.text) <= self.part < len(self.text):
            raise ConfigError(
                f"Expected `text_index` to be from {-len(self.text)} to {len(self.text) - 1} for "
                f"{len(self.text)} texts, but got {self.part}."
            )

    @property
    def attacked(self) -> str:
        """The text that may change."""
        return self.text if isinstance(self.text, str) else self.text[self.part]

    @property
    def joined(self) -> str:
        """All texts in one string, which candidates are told apart and sorted by."""
        return self.text if isinstance(self.text, str) else "\n".join(self.text)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each word of the text that may change."""
        return word_spans(self.attacked)

    @cached_property
    def words(self) -> list[str]:
        """The words of the text that may change."""
        return [self.attacked[start:end] for start, end in self.spans]

    def replace_word(self, index: int, word: str) -> AttackedText:
        """Return a copy with one word replaced, by several words or by none where ``word`` has so many.

        A removed word takes one neighbouring space with it.
        """
        start, end = self.spans[index]
        before, after = self.attacked[:start], self.attacked[end:]
        count = len(word_spans(word))
        if count == 0 and index == 0:
            after = after.removeprefix(" ")
        elif count == 0 and after:
            before = before.removesuffix(" ")
        return replace(self, text=self._with(before + word + after), modified=self._modified(index, count))

    def _with(self, attacked: str) -> Text:
        if isinstance(self.text, str):
            return attacked
        part = self.part % len(self.text)
        return (*self.text[:part], attacked, *self.text[part + 1 :])

    def _modified(self, index: int, count: int) -> frozenset[int]:
        shifted = {i + count - 1 if i > index else i for i in self.modified - {index}}
        return frozenset(shifted | set(range(index, index + count)))
