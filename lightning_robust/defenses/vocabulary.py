"""Facts about token ids: which are special, which begin a word, which are a word by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_robust.modules.encoding import special_ids

_BEGINS = ("Ġ", "▁")  # byte-level BPE, SentencePiece
_BREAKS = ("Ċ", "ĉ")  # line feed and tab in byte-level BPE
_CONTINUES = "##"  # WordPiece


class Vocabulary:
    """What the token ids of a tokenizer stand for.

    Words are what the vocabulary marks as such: what «##» does not continue (WordPiece, where each punctuation mark
    is a word of its own) or what «Ġ» or «▁» begins (byte-level BPE, SentencePiece, where punctuation belongs
    to the word before it). Where it marks neither, each token is a word.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._ids: dict[str, int] = tokenizer.get_vocab()
        size = max(self._ids.values()) + 1
        begins = [token for token in self._ids if token.startswith(_BEGINS)]
        continues = [token for token in self._ids if token.startswith(_CONTINUES) and token != _CONTINUES]
        self._marks_beginnings = len(begins) > len(continues)
        self.begins_word = torch.full((size,), not self._marks_beginnings)
        """Which ids begin a word wherever they stand ``(vocabulary,)``."""
        for token, value in self._ids.items():
            if self._marks_beginnings:
                self.begins_word[value] = token.startswith((*_BEGINS, *_BREAKS))
            elif token.startswith(_CONTINUES):
                self.begins_word[value] = token == _CONTINUES
        self.special = torch.zeros(size, dtype=torch.bool)
        """Which ids stand for no part of a text ``(vocabulary,)``."""
        self.special[list(special_ids(tokenizer))] = True

    @cached_property
    def words(self) -> dict[str, int]:
        """Ids of the tokens that are one whole word, letters only, by the word."""
        found: dict[str, int] = {}
        for token, value in self._ids.items():
            word = token[1:] if self._marks_beginnings else token
            if self.begins_word[value] and not self.special[value] and word.isalpha():
                found[word] = value
        return found

    def word_numbers(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Return which word of its row each token belongs to, from 0 on; -1 at padding and special tokens.

        Args:
            ids: ``(rows, seq)``.
            real: Where ``ids`` are no padding ``(rows, seq)``.
        """
        ordinary = ~self.special.to(ids.device)[ids]
        if real is not None:
            ordinary &= real.bool()
        after_special = torch.ones_like(ordinary)
        after_special[:, 1:] = ~ordinary[:, :-1]
        begins = ordinary & (self.begins_word.to(ids.device)[ids] | after_special)
        return (begins.cumsum(dim=1) - 1).masked_fill(~ordinary, -1)


def real_tokens(batch: Any, ids: Tensor) -> Tensor | None:
    """Return where ``ids`` ``(rows, seq)`` are no padding, if the batch has an attention mask for them."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.shape == ids.shape else None
