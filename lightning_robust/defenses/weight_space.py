"""What the defenses share that move the weights themselves during a training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_robust.defenses.base import Defense
from lightning_robust.defenses.chain import DefenseChain
from lightning_robust.errors import ConfigError


def check_alone(defense: Defense) -> None:
    """Check that no other defense of the composition moves the weights during the step.

    Raises:
        ConfigError: If one does.
    """
    movers = [type(one).__name__ for one in defense.chain.defenses if one.place == "first"]
    if len(movers) > 1:
        raise ConfigError(
            f"Expected one defense that moves the weights during a training step, but got {len(movers)}: "
            f"{', '.join(movers)}. Each would undo the other's move. Keep one of them."
        )


def inner_gradients(chain: DefenseChain, loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Return a loss's gradient, apart from those that training accumulates; its graph is freed.

    ``None`` stands for weights that the loss does not depend on. Under a gradient scaler, the
    gradient is that of the scaled loss.
    """
    with torch.autocast(loss.device.type, enabled=False):
        return list(torch.autograd.grad(loss * chain.loss_scale, list(weights), allow_unused=True))
