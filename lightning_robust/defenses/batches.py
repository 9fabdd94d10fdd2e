"""Rows of a batch of any shape: their number, a subset of them, their domains."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_robust.errors import ConfigError, did_you_mean

UNLABELLED = -100
"""The label of rows that PyTorch's and Hugging Face's losses leave out."""


def batch_size(batch: Any) -> int:
    """Return the number of rows: the first dimension of most tensors in the batch.

    Raises:
        ConfigError: If the batch holds no tensor.
    """
    sizes = Counter(_sizes(batch))
    if not sizes:
        raise ConfigError(f"Expected a batch that holds a tensor, but got {type(batch).__name__}.")
    return sizes.most_common(1)[0][0]  # of several, the first that comes


def take_rows(batch: Any, rows: Tensor) -> Any:
    """Return the batch restricted to ``rows`` ``(n,)``; tensors and lists of the batch's length follow."""
    return _take(batch, rows, batch_size(batch))


def domains_of(batch: Any, key: str | int) -> Tensor:
    """Return each row's domain ``(batch,)``, found under ``key`` (a dict key or a tuple index).

    Raises:
        ConfigError: If the batch has no such entry, or not one domain for each row.
    """
    hint = f"Put a whole number for each row there, or name the entry: {_NAMING.format(name='domain')}"
    return _one_per_row(batch, key, "domain", hint)


def labels_of(batch: Any, key: str | int) -> Tensor:
    """Return each row's class ``(batch,)``, found under ``key`` (a dict key or a tuple index).

    Raises:
        ConfigError: If the batch has no such entry, or not one class for each row.
    """
    return _one_per_row(batch, key, "label", f"Name the entry: {_NAMING.format(name='label')}")


def labelled_rows(batch: Any, key: str | int = "labels") -> Tensor | None:
    """Return which rows have a label ``(batch,)``, on the CPU; None where the batch holds no class numbers."""
    labels = batch[key] if _holds(batch, key) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    rows = batch_size(batch)
    return (labels.cpu() != UNLABELLED).reshape(rows, -1).any(1) if labels.shape[:1] == (rows,) else None


_NAMING = '{name}_key="name" for a dict, {name}_key=2 for a tuple.'


def _one_per_row(batch: Any, key: str | int, what: str, hint: str) -> Tensor:
    if not _holds(batch, key):
        if isinstance(batch, Mapping):
            there = ", ".join(map(str, batch))
            meant = did_you_mean(str(key), map(str, batch))
            raise ConfigError(
                f"Expected each training batch to hold {key!r}, but it holds: {there}.{meant} {hint}"
            )
        raise ConfigError(
            f"Expected each training batch to hold its rows' {what}s, but got a {type(batch).__name__} without "
            f"{key!r}. {hint}"
        )
    rows = batch_size(batch)
    try:
        values = torch.as_tensor(batch[key])
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"Expected a number for each row's {what} under {key!r}, but got {type(batch[key]).__name__}: "
            f"{reprlib.repr(batch[key])}. Put numbers into the batch, for instance the position in a list of names."
        ) from None
    if values.shape != (rows,):
        raise ConfigError(
            f"Expected one {what} for each of the batch's {rows} rows under {key!r}, but got shape {tuple(values.shape)}."
        )
    return values


def _holds(batch: Any, key: str | int) -> bool:
    if isinstance(batch, Mapping):
        return key in batch
    return isinstance(batch, list | tuple) and isinstance(key, int) and -len(batch) <= key < len(batch)


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch.shape[0]
        return
    values = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    )
    for value in values:
        yield from _sizes(value)


def _take(value: Any, rows: Tensor, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and value.shape[0] == size else value
    if isinstance(value, Mapping):
        taken = {k: _take(v, rows, size) for k, v in value.items()}
        return taken if type(value) is dict else type(value)(taken)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_take(v, rows, size) for v in value))
    if isinstance(value, list | tuple):
        if len(value) == size and not any(isinstance(v, Tensor | Mapping) for v in value):
            return type(value)(value[int(i)] for i in rows)
        return type(value)(_take(v, rows, size) for v in value)
    return value
