"""What callbacks that evaluate share."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_robust.callbacks.evaluation import Shard
from lightning_robust.errors import RobustError
from lightning_robust.modules.unseen import leaving_no_trace, live_bar
from lightning_robust.results import Record

__all__ = ["gather", "is_dry", "leaving_no_trace", "live_bar"]


def gather(records: list[Record], shard: Shard, error: RobustError | None = None) -> list[Record]:
    """Return the records of all processes on each of them.

    Args:
        records: This process's.
        shard: This process's.
        error: What this process ran into instead. It is raised on all: others would wait for its records for ever.

    Raises:
        RobustError: That of the first process that has one.
    """
    if shard.world_size == 1:
        return records
    gathered: list[Any] = [None] * shard.world_size
    torch.distributed.all_gather_object(gathered, (records, error))
    for _, one in gathered:
        if one is not None:
            raise one
    return [record for part, _ in gathered for record in part]


def is_dry(trainer: Trainer) -> bool:
    """Whether the trainer only tries everything out, and nothing is to be kept."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
