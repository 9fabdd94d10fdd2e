"""Texts to right-padded batches of token ids, without touching a tokenizer's own settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_robust.data.items import Text
from lightning_robust.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = ("pad", "bos", "eos", "cls", "sep", "mask")


class TokenSpan(NamedTuple):
    """The characters that a token stands for: ``start`` to before ``end`` of a text, or of one text of a pair."""

    text_index: int
    start: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text, which of them are special, and segment ids where the model has them.

    ``spans`` are there where they were asked for and the tokenizer knows them; None at special tokens.
    """

    input_ids: list[int]
    special: list[bool]
    token_type_ids: list[int] | None
    spans: list[TokenSpan | None] | None = None


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int, *, spans: bool = False
) -> list[Encoded]:
    """Tokenize texts and pairs, truncated to ``max_length`` and unpadded.

    Args:
        tokenizer: Its own padding and truncation settings are neither used nor changed.
        texts: Texts or pairs.
        max_length: Tokens to keep, special tokens included.
        spans: Whether to say which characters each token stands for, which only fast tokenizers know.

    Raises:
        ConfigError: If a tuple holds other than one or two texts.
    """
    encoded: list[Encoded | None] = [None] * len(texts)
    with _own_settings_kept(tokenizer):
        for size in (1, 2):
            where = [i for i, text in enumerate(texts) if len(_parts(text)) == size]
            if where:
                columns = [list(column) for column in zip(*(_parts(texts[i]) for i in where), strict=True)]
                for i, one in zip(where, _encode_columns(tokenizer, columns, max_length, spans), strict=True):
                    encoded[i] = one
    return [one for one in encoded if one is not None]


def pack(
    lengths: Sequence[int], max_tokens: int, max_rows: int | None = None, max_padding: int | None = None
) -> Iterator[list[int]]:
    """Yield batches of indices, longest first, of at most ``max_tokens`` padded tokens each.

    A text longer than ``max_tokens`` makes a batch of its own. Longest first, so that memory that does not
    suffice shows at once.

    Args:
        lengths: Tokens of each text.
        max_tokens: Rows times the longest of a batch.
        max_rows: Texts in a batch.
        max_padding: Padding in a batch: where another pass costs less than this many tokens, it pays to
            begin one.

    >>> list(pack([3, 9, 4, 1], max_tokens=10))
    [[1], [2, 0], [3]]
    """
    batch: list[int] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batch[0]] if batch else lengths[i]
        padding += longest - lengths[i]
        full = batch and (len(batch) + 1) * longest > max_tokens
        wasteful = max_padding is not None and padding > max_padding
        if full or wasteful or (max_rows is not None and len(batch) >= max_rows):
            yield batch
            batch, padding = [], 0
        batch.append(i)
    if batch:
        yield batch


def collate(encoded: Sequence[Encoded], pad_token_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return a model's inputs and the mask of special tokens, ``(batch, longest)`` each."""
    input_ids, mask = padded([e.input_ids for e in encoded], pad_token_id)
    inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
    if any(e.token_type_ids is not None for e in encoded):
        segments = [e.token_type_ids or [0] * len(e.input_ids) for e in encoded]
        inputs["token_type_ids"], _ = padded(segments, 0)
    special, _ = padded([e.special for e in encoded], 1)
    return inputs, special.bool()


def padded(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Return rows padded on the right with ``value``, and where they are real; ``(rows, longest)`` each."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    real = np.arange(lengths.max(initial=0)) < lengths[:, None]
    filled = np.full(real.shape, value, np.int64)
    filled[real] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    return torch.from_numpy(filled), torch.from_numpy(real)


def token_limit(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens that a model and its tokenizer allow; those without a limit say 1e30."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    return int(min(tokenizer.model_max_length, positions))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that stand for no part of a text.

    The unknown token stands for a word, unless it is another special token as well (GPT-2's, or padding with it).
    """
    unknown = tokenizer.unk_token_id
    others = [getattr(tokenizer, f"{name}_token_id", None) for name in _MARKS]
    return frozenset(i for i in tokenizer.all_special_ids if i != unknown or unknown in others)


def _parts(text: Text) -> tuple[str, ...]:
    parts = (text,) if isinstance(text, str) else tuple(text)
    if len(parts) not in (1, 2):
        raise ConfigError(f"Expected one text or a pair, but got {len(parts)} texts: {str(parts)[:120]}.")
    return parts


def _encode_columns(
    tokenizer: PreTrainedTokenizerBase, columns: list[list[str]], max_length: int, spans: bool
) -> Iterator[Encoded]:
    spans = spans and bool(tokenizer.is_fast)
    batch: Any = tokenizer(
        *columns,
        padding=False,
        truncation=True,
        max_length=max_length,
        return_special_tokens_mask=True,
        return_offsets_mapping=spans,
    )
    specials = special_ids(tokenizer)
    segments = batch.get("token_type_ids")
    for row, ids in enumerate(batch["input_ids"]):
        if not ids:
            # A decoder's tokenizer may turn an empty text into no token at all.
            yield Encoded([_filler(tokenizer)], [True], None, [None] if spans else None)
            continue
        marked = batch["special_tokens_mask"][row]
        special = [bool(mark) or token in specials for token, mark in zip(ids, marked, strict=True)]
        found = _spans(batch, row) if spans else None
        yield Encoded(list(ids), special, None if segments is None else list(segments[row]), found)


def _spans(batch: Any, row: int) -> list[TokenSpan | None]:
    return [
        None if text_index is None else TokenSpan(text_index, *offsets)
        for text_index, offsets in zip(batch.sequence_ids(row), batch["offset_mapping"][row], strict=True)
    ]


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    return 0


@contextmanager
def _own_settings_kept(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Give a fast tokenizer the padding and truncation back that its file or its owner had set."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "no_padding"):
        yield
        return
    padding, truncation = backend.padding, backend.truncation
    try:
        yield
    finally:
        backend.enable_padding(**padding) if padding else backend.no_padding()
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
