"""Cross-entropy row by row, for the defenses that correct a loss that they do not know."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.defenses.batches import UNLABELLED, labels_of
from lightning_robust.defenses.head import Pass, Seen
from lightning_robust.errors import ConfigError


def classes_of(batch: object, key: str | int) -> Tensor:
    """Return each row's class number ``(batch,)`` as long, found under ``key``.

    Raises:
        ConfigError: If the batch has no such entry, or not one class number for each row.
    """
    labels = labels_of(batch, key)
    if labels.is_floating_point():
        raise ConfigError(f"Expected class numbers under {key!r}, but got {labels.dtype} values.")
    return labels.long()


def cross_entropies(seen: Pass, labels: Tensor) -> Tensor:
    """Return the cross-entropy ``(n,)`` of each row of a pass in nats, 0 for unlabelled rows.

    Args:
        seen: What the classifier put out.
        labels: Classes ``(batch,)`` of all rows of the batch that the pass was made on.
    """
    own = labels.to(seen.logits.device)[seen.rows.to(seen.logits.device)]
    return F.cross_entropy(seen.logits, own, ignore_index=UNLABELLED, reduction="none")


def mean_over_rows(seen: Seen, labels: Tensor, values: Callable[[Pass], Tensor]) -> Tensor:
    """Return the mean over labelled rows of ``values(pass)`` ``(n,)``, averaged over the passes that were seen."""
    passes = seen.passes()
    means = []
    for each in passes:
        labelled = int((labels.cpu()[each.rows] != UNLABELLED).sum())
        means.append(values(each).sum() / max(1, labelled))
    return torch.stack(means).mean()
