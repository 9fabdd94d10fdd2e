"""Parameter groups and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any, Literal

from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedModel,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lightning_robust.errors import ConfigError
from lightning_robust.modules.layers import head_modules

Schedule = Literal["linear", "cosine", "constant"]


def parameter_groups(
    model: PreTrainedModel | PeftModel,
    learning_rate: float,
    head_learning_rate: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Group what trains into body and head, each with and without weight decay.

    Biases and norms are the parameters with one dimension; they are not decayed.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = {id(p) for name in head_modules(base) for p in base.get_submodule(name).parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = []
    for in_head in (False, True):
        rate = head_learning_rate if in_head and head_learning_rate is not None else learning_rate
        for decayed in (True, False):
            group = [p for p in trained if (id(p) in head) == in_head and (p.ndim > 1) == decayed]
            if group:
                groups.append({"params": group, "lr": rate, "weight_decay": weight_decay if decayed else 0.0})
    return groups


def learning_rate_schedule(
    optimizer: Optimizer, schedule: Schedule, num_steps: float, warmup_ratio: float
) -> LRScheduler:
    """Return a schedule over optimizer steps: linear warm-up, then ``schedule``.

    Raises:
        ConfigError: If the length of training is not known and the schedule needs it.
    """
    endless = math.isinf(num_steps)
    if endless and (schedule != "constant" or warmup_ratio > 0):
        raise ConfigError(
            f"Expected a training of known length for schedule={schedule!r} with warmup_ratio={warmup_ratio}, but"
            " max_epochs and max_steps are both unlimited. Set one of them, or schedule: constant and warmup_ratio: 0."
        )
    warmup = 0 if endless else math.ceil(warmup_ratio * num_steps)
    if schedule == "constant":
        result: LRScheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    elif schedule == "cosine":
        result = get_cosine_schedule_with_warmup(optimizer, warmup, int(num_steps))
    else:
        result = get_linear_schedule_with_warmup(optimizer, warmup, int(num_steps))
    return result
