"""SAM: the gradient at the worst weights nearby."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_robust.defenses.base import Batch, Defense, Step
from lightning_robust.defenses.checks import check_inner_gradients, expect
from lightning_robust.defenses.weight_space import check_alone, inner_gradients


class SAM(Defense):
    """Step with the gradient at θ + ρ g/‖g‖, where g is the gradient at θ (sharpness-aware minimisation).

    ‖g‖ is the L2 norm over all trainable weights. Each batch moves them by ε = ρ g/‖g‖ between its two
    passes and puts them back, bit for bit, after the second one's backward pass; optimizer, clipping and
    precision then do as they always do. What is logged is the first pass.

    Each batch of an accumulation, and each process of a distributed training, has its own ε (the paper's
    m-sharpness, its section 4.1); the gradients are averaged as always, so processes keep equal weights.
    Dropout draws anew in the second pass. Under a gradient scaler g is that of the scaled loss, which has
    the same direction; where it overflows, so does the second one, and the scaler skips the step.

    Source: Foret et al. 2021, arXiv 2010.01412. ``rho=0`` is training without the defense.

    Args:
        rho: Length of the move.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if another defense moves the weights
            too, or gradient checkpointing is reentrant.
    """

    aim = "both"
    place = "first"
    cost = 1.98

    def __init__(self, rho: float = 0.05) -> None:
        super().__init__()
        self.rho = expect("rho", rho, at_least=0)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_alone(self)
        if self.rho > 0:
            check_inner_gradients(self, pl_module)

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if self.rho == 0:
            return step(batch)
        self._move(step(batch))
        try:
            with self.chain.perturbing():
                return step(batch)
        except BaseException:  # a skipped batch among them: no backward pass follows
            self._put_back()
            raise

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back()

    def on_train_batch_end(self, *_: Any) -> None:
        # Lightning's StochasticWeightAveraging ends with an epoch without backward passes.
        self._put_back()

    @torch.no_grad()
    def offsets(self, weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return ε for each of the weights; ``gradients`` may be overwritten."""
        scale = self.rho / _norm(gradients)
        return [gradient.mul_(scale.to(gradient.device)) for gradient in gradients]

    def _move(self, loss: Tensor) -> None:
        trainable = [p for p in self.chain.module.parameters() if p.requires_grad]
        found = inner_gradients(self.chain, loss, trainable)
        weights: list[Tensor] = [
            p for p, gradient in zip(trainable, found, strict=True) if gradient is not None
        ]
        offsets = self.offsets(weights, [gradient for gradient in found if gradient is not None])
        self._kept = [(p, p.detach().clone()) for p in weights]
        with torch.no_grad():
            torch._foreach_add_(weights, offsets)  # type: ignore[arg-type]

    def _put_back(self) -> None:
        kept, self._kept = self._kept, []
        if kept:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in kept], [value for _, value in kept])

    def _unwrap(self) -> None:
        self._put_back()
        super()._unwrap()


def _norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm over all of them, never 0 so that it can divide."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)
