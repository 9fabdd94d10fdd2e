"""The texts of a batch's rows, and a batch with other texts in place of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_robust.data.collate import resolve_max_length
from lightning_robust.data.items import Text
from lightning_robust.defenses.base import Batch, Defense
from lightning_robust.defenses.chain import DefenseChain
from lightning_robust.errors import ConfigError
from lightning_robust.modules.encoding import _own_settings_kept, encode, special_ids
from lightning_robust.modules.finding import find_tokenizer

_REMADE = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")


def needed_tokenizer(defense: Defense, module: LightningModule, tokenizer: Any = None) -> Any:
    """Return ``tokenizer``, loaded where it is a name or a path, else that of the module or its data module.

    Raises:
        ConfigError: If there is none, or it cannot be loaded.
    """
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"The `tokenizer` {tokenizer!r} could not be loaded: {str(error).splitlines()[0]}"
            ) from error
    if tokenizer is not None:
        return tokenizer
    try:
        return find_tokenizer(module)
    except ConfigError as error:
        raise ConfigError(f"{type(defense).__name__} works on words. {error}") from error


def training_texts(trainer: Trainer) -> dict[str, Text]:
    """Return the texts of the training examples by id, where the data module lists them (ours does)."""
    items = getattr(getattr(trainer, "datamodule", None), "train_items", None) or ()
    return {item.id: item.text for item in items}


def length_limit(trainer: Trainer, module: LightningModule, tokenizer: Any) -> int:
    """Return the number of tokens that the data module, the module and the tokenizer allow in a row."""
    stated = resolve_max_length(
        getattr(getattr(trainer, "datamodule", None), "max_length", None), module, tokenizer
    )
    configs = (getattr(part, "config", None) for part in module.modules())
    positions = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min([stated, *(limit for limit in positions if isinstance(limit, int) and limit > 0)])


def row_limit(batch: Batch, texts: Sequence[Text], tokenizer: Any, max_length: int) -> int:
    """Return the number of tokens that a row of this batch may have, given what was cut when it was made.

    Where a row holds only the beginning of its text, that is the longest row's; else ``max_length``.
    """
    rows = _token_rows(batch, tokenizer.pad_token_id)
    whole = [one.input_ids for one in encode(tokenizer, texts, max_length)]
    return max(map(len, rows)) if rows != whole and _are_tokens_of(rows, texts, tokenizer) else max_length


def longest_rows(batch: Batch, tokenizer: Any) -> list[list[int]]:
    """Return the tokens of the batch's rows that are as long as its longest one, without padding.

    Raises:
        ConfigError: If the batch is no dict with ``input_ids``.
    """
    ids, mask = _ids_and_mask(batch, tokenizer.pad_token_id)
    real = mask != 0
    lengths = real.sum(1)
    return [ids[row][real[row]].tolist() for row in torch.nonzero(lengths == lengths.max()).flatten()]


def cut_at(rows: list[list[int]], texts: Sequence[Text], tokenizer: Any, max_length: int) -> int | None:
    """Return the length of ``rows`` where one of them is but the beginning of a text; None where nothing shows a cut.

    Args:
        rows: Tokens of the longest rows that a data loader made of the texts, all of one length.
        texts: All that it may have made rows of.
        tokenizer: That of the rows.
        max_length: Tokens that a row may have.
    """
    if not rows:
        return None
    length = len(rows[0])
    begun: dict[tuple[int, ...], list[Text]] = {tuple(row): [] for row in rows}
    for text, one in zip(texts, encode(tokenizer, texts, length), strict=True):
        begun.get(tuple(one.input_ids), []).append(text)
    for sources in begun.values():
        whole = [len(one.input_ids) for one in encode(tokenizer, sources, max_length)]
        if whole and min(whole) > length:
            return length
    return None


def texts_of(
    batch: Batch, tokenizer: Any, training: Mapping[str, Text] | None = None, text_key: str = "text"
) -> list[Text]:
    """Return the text of each row: what ``batch["ids"]`` name, else a list in the batch, else decoded tokens.

    The first two count only where the batch still holds these texts' tokens: another defense may have put
    others there. Decoded texts are as the tokenizer left them, for instance in lower case and truncated.

    Args:
        batch: A dict with ``input_ids``.
        tokenizer: That of the batch.
        training: The texts of the training examples by id, see `training_texts`.
        text_key: Where a batch may hold a list of its texts.

    Raises:
        ConfigError: If the batch is no dict with ``input_ids``, or pairs would have to be decoded.
    """
    rows = _token_rows(batch, tokenizer.pad_token_id)
    ids = batch.get("ids")
    if training and isinstance(ids, list | tuple) and all(i in training for i in map(str, ids)):
        known = [training[str(i)] for i in ids]
        if _are_tokens_of(rows, known, tokenizer):
            return known
    listed = batch.get(text_key)
    if _are_texts(listed, len(rows)):
        known = [text if isinstance(text, str) else tuple(text) for text in listed]
        if _are_tokens_of(rows, known, tokenizer):
            return known
    return [_decoded(row, tokenizer) for row in rows]


def encode_like(
    batch: Batch, texts: Sequence[Text], tokenizer: Any, max_length: int, text_key: str = "text"
) -> Batch:
    """Return a copy of a dict batch that holds ``texts`` in place of its own, padded to the longest.

    The tokenizer's fields are made anew, on the same device; labels, domains, ids and all else are kept.

    Args:
        batch: A dict with ``input_ids``; it is not changed.
        texts: One for each row.
        tokenizer: That of the batch. Its padding side is used.
        max_length: Tokens to keep of a text.
        text_key: Where a batch may hold a list of its texts.

    Raises:
        ConfigError: If the tokenizer has no padding token and the texts differ in length.
    """
    columns = [list(column) for column in zip(*map(_parts, texts), strict=True)]
    if (
        tokenizer.pad_token_id is None
        and len({len(e.input_ids) for e in encode(tokenizer, texts, max_length)}) > 1
    ):
        raise ConfigError(
            f"The tokenizer {type(tokenizer).__name__} has no padding token. Set one, for example "
            "`tokenizer.pad_token = tokenizer.eos_token`, and the model's `config.pad_token_id` with it."
        )
    with _own_settings_kept(tokenizer):
        encoded = tokenizer(
            *columns,
            padding=tokenizer.pad_token_id is not None and "longest",
            truncation=True,
            max_length=max_length,
            pad_to_multiple_of=None,
            return_special_tokens_mask="special_tokens_mask" in batch,
            return_tensors="pt",
        )
    copy = dict(batch.items())
    for name in _REMADE:
        if name in copy and name in encoded:
            copy[name] = encoded[name].to(copy[name])
    if _are_texts(copy.get(text_key), len(texts)):
        copy[text_key] = list(texts)
    return copy if type(batch) is dict else type(batch)(copy)


def row_randoms(chain: DefenseChain, seed: int, size: int) -> list[random.Random]:
    """Return a random source for each of the ``size`` rows of the call that is being handled.

    The same for a row in every call on it within a training batch, after a resume, and whatever an outer
    defense splits the batch into; others in each epoch, batch and rank.
    """
    trainer = chain.trainer
    rows = chain.rows_since(0) or range(size)
    place = f"{seed}:{trainer.current_epoch}:{trainer.fit_loop.batch_idx}:{trainer.global_rank}"
    return [random.Random(f"{place}:{row}") for row in rows]


def _token_rows(batch: Batch, pad_token_id: int | None) -> list[list[int]]:
    """The ids of each row without its padding."""
    pairs = zip(*(part.tolist() for part in _ids_and_mask(batch, pad_token_id)), strict=True)
    return [[token for token, real in zip(*pair, strict=True) if real] for pair in pairs]


def _ids_and_mask(batch: Batch, pad_token_id: int | None) -> tuple[Tensor, Tensor]:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        there = f"with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise ConfigError(
            "Expected each training batch to be a dict with `input_ids` (batch, seq), but got a "
            f"{type(batch).__name__} {there}".rstrip()
            + '. Collate the tokenizer\'s output: {"input_ids": ..., "attention_mask": ..., "labels": ...}.'
        )
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        mask = ids != pad_token_id if pad_token_id is not None else torch.ones_like(ids)
    return ids, mask


def _are_texts(value: Any, size: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == size
        and all(
            isinstance(part, str)
            for text in value
            for part in (text if isinstance(text, list | tuple) else [text])
        )
    )


def _are_tokens_of(rows: list[list[int]], texts: Sequence[Text], tokenizer: Any) -> bool:
    # Truncated rows are the longest ones: this limit cuts the texts as they were cut.
    limit = max(map(len, rows))
    return rows == [one.input_ids for one in encode(tokenizer, texts, limit)]


def _decoded(row: list[int], tokenizer: Any) -> str:
    special = special_ids(tokenizer) - {tokenizer.mask_token_id}  # masks stand for words
    words = [i for i, token in enumerate(row) if token not in special]
    if words and any(token in special for token in row[words[0] : words[-1]]):
        raise ConfigError(
            "Expected batches from which the rows' texts can be had, but pairs of texts cannot be decoded from tokens. "
            'Train with TextDataModule, or put the texts into each batch: batch["text"] = [(first, second), ...].'
        )
    # Tokenizer files without a decoder leave WordPiece's marks.
    return str(tokenizer.decode([row[i] for i in words])).replace(" ##", "")


def _parts(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else tuple(text)
