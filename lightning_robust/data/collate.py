"""From items to padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_robust.data.items import Item
from lightning_robust.errors import ConfigError, DataError

DEFAULT_MAX_LENGTH = 512
# Tokenizers that know no limit state about 1e30.
_LARGEST_SANE_LENGTH = 1_000_000


class ItemDataset(Dataset[Item]):
    """Items as a map-style data set."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def resolve_max_length(given: int | None, module: object, tokenizer: Any) -> int:
    """Return the first limit in tokens that is stated: given, the module's, the tokenizer's, else 512.

    Raises:
        ConfigError: If it is below 1.
    """
    for limit in (given, getattr(module, "max_length", None), getattr(tokenizer, "model_max_length", None)):
        if isinstance(limit, int) and limit < _LARGEST_SANE_LENGTH:
            if limit < 1:
                raise ConfigError(f"Expected `max_length` to be >= 1, but got {limit}.")
            return limit
    return DEFAULT_MAX_LENGTH


class TextCollator:
    """Turns items into a batch, padded to its longest text; see `TextDataModule` for the keys.

    Raises:
        ConfigError: If the tokenizer has no padding token.
    """

    def __init__(self, tokenizer: Any, max_length: int, domains: Sequence[str] = ()) -> None:
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"The tokenizer {type(tokenizer).__name__} has no padding token. Set one, for example "
                "`tokenizer.pad_token = tokenizer.eos_token`, and the model's `config.pad_token_id` with it."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.domains = {name: index for index, name in enumerate(domains)}

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return a batch of tensors ``(batch, seq)`` and ``(batch,)``.

        Raises:
            DataError: If an item has more than two texts, or the batch mixes pairs and single texts.
        """
        # Stated per call: some tokenizer files hold fixed padding and truncation of their own.
        encoded = self.tokenizer(
            *_columns(items),
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            pad_to_multiple_of=None,
            return_tensors="pt",
        )
        return {
            **encoded,
            "labels": torch.tensor([item.label for item in items], dtype=torch.long),
            "domain": torch.tensor([self.domains.get(item.domain, -1) for item in items], dtype=torch.long),
            "ids": [item.id for item in items],
        }


def _columns(items: Sequence[Item]) -> list[list[str]]:
    rows = [(item.text,) if isinstance(item.text, str) else item.text for item in items]
    sizes = {len(row) for row in rows}
    if sizes not in ({1}, {2}):
        raise DataError(
            f"Expected single texts or pairs in a batch, but got {' and '.join(map(str, sorted(sizes)))} texts "
            f"per example (item {items[0].id}). Choose one or two `text_columns`, the same for every source."
        )
    return [list(column) for column in zip(*rows, strict=True)]
