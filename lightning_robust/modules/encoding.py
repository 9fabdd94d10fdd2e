"""Texts to right-padded batches of token ids, without touching a tokenizer's own settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_robust.data.items import Text
from lightning_robust.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text, which of them are special, and segment ids where the model has them."""

    input_ids: list[int]
    special: list[bool]
    token_type_ids: list[int] | None


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int) -> list[Encoded]:
    """Tokenize texts and pairs, truncated to ``max_length`` and unpadded.

    Raises:
        ConfigError: If a tuple holds other than one or two texts.
    """
    encoded: list[Encoded | None] = [None] * len(texts)
    with _own_settings_kept(tokenizer):
        for size in (1, 2):
            where = [i for i, text in enumerate(texts) if len(_parts(text)) == size]
            if where:
                columns = [list(column) for column in zip(*(_parts(texts[i]) for i in where), strict=True)]
                for i, one in zip(where, _encode_columns(tokenizer, columns, max_length), strict=True):
                    encoded[i] = one
    return [one for one in encoded if one is not None]


def pack(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> Iterator[list[int]]:
    """Yield batches of indices, longest first, of at most ``max_tokens`` padded tokens each.

    A text longer than ``max_tokens`` makes a batch of its own. Longest first, so that memory that does not
    suffice shows at once.

    >>> list(pack([3, 9, 4, 1], max_tokens=10))
    [[1], [2, 0], [3]]
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens
        if full or (max_rows is not None and len(batch) >= max_rows):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def collate(encoded: Sequence[Encoded], pad_token_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return a model's inputs and the mask of special tokens, ``(batch, longest)`` each."""
    longest = max(len(e.input_ids) for e in encoded)

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    inputs = {
        "input_ids": padded([e.input_ids for e in encoded], pad_token_id),
        "attention_mask": padded([[1] * len(e.input_ids) for e in encoded], 0),
    }
    if any(e.token_type_ids is not None for e in encoded):
        segments = [e.token_type_ids or [0] * len(e.input_ids) for e in encoded]
        inputs["token_type_ids"] = padded(segments, 0)
    return inputs, padded([e.special for e in encoded], True).bool()


def _parts(text: Text) -> tuple[str, ...]:
    parts = (text,) if isinstance(text, str) else tuple(text)
    if len(parts) not in (1, 2):
        raise ConfigError(f"Expected one text or a pair, but got {len(parts)} texts: {str(parts)[:120]}.")
    return parts


def _encode_columns(
    tokenizer: PreTrainedTokenizerBase, columns: list[list[str]], max_length: int
) -> Iterator[Encoded]:
    batch: Any = tokenizer(
        *columns, padding=False, truncation=True, max_length=max_length, return_special_tokens_mask=True
    )
    special_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    segments = batch.get("token_type_ids")
    for row, ids in enumerate(batch["input_ids"]):
        if not ids:
            # A decoder's tokenizer may turn an empty text into no token at all.
            yield Encoded([_filler(tokenizer)], [True], None)
            continue
        marked = batch["special_tokens_mask"][row]
        special = [bool(mark) or token in special_ids for token, mark in zip(ids, marked, strict=True)]
        yield Encoded(list(ids), special, None if segments is None else list(segments[row]))


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
