"""Weight averaging: EMA or SWA of the weights that train."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_robust.defenses.checks import check_epochs, expect
from lightning_robust.defenses.evaluated_weights import EvaluatedWeights, Weights, _all, _parameters
from lightning_robust.errors import ConfigError, did_you_mean

Mode = Literal["ema", "swa"]


class WeightAveraging(EvaluatedWeights):
    """Evaluate and keep an average of the weights along training: exponential (EMA) or equal (SWA).

    Training goes on with its own weights; validation, checkpoints and the end of fit see the average (see
    `EvaluatedWeights`). Until the first update they are the same. The first update copies the weights; then
    EMA is w̄ ← d w̄ + (1 − d) w, and SWA is the mean of all copies.

    Source: Izmailov et al. 2018, arXiv 1803.05407 (SWA), which starts after about 75 % of the training and
    takes one copy per epoch. EMA's warm-up is TensorFlow's: without it, d = 0.999 still
    gives the first step's weights 37 % after 1000 steps. Only weights that train are copied, in float32 where
    they are of half precision; Lightning's callback copies the whole model. Buffers (statistics of batch normalisation)
    stay those of training. The two factors of a LoRA adapter are averaged each by itself, as is the custom;
    their product is not the average of the products. An EMA with ``decay=0``, updated after each step, is training
    without the defense.

    Args:
        decay: d of the EMA.
        mode: ``ema`` or ``swa``.
        start_epoch: The first epoch that counts.
        every_n_steps: Optimizer steps between updates; None is each step for EMA, the end of each epoch for SWA.
        warmup: Whether the n-th update of the EMA uses at most d = (1 + n) / (10 + n).

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there is another one, or training ends before
            the first update.
    """

    turn = 0
    cost = 0.99

    def __init__(
        self,
        decay: float = 0.999,
        mode: Mode = "ema",
        start_epoch: int = 0,
        every_n_steps: int | None = None,
        warmup: bool = True,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ConfigError(
                f"Expected `mode` to be ema or swa, but got {mode!r}.{did_you_mean(str(mode), get_args(Mode))}"
            )
        self.decay = expect("decay", decay, at_least=0, at_most=1)
        self.mode = mode
        self.start_epoch = expect("start_epoch", start_epoch, at_least=0, whole=True)
        self.every_n_steps = (
            None if every_n_steps is None else expect("every_n_steps", every_n_steps, at_least=1, whole=True)
        )
        self.warmup = warmup
        self._last_step = 0
        self.reset()

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        start = self.start_epoch
        check_epochs(trainer, start, f"start_epoch={start}, the first one that WeightAveraging counts")
        others = sum(isinstance(one, WeightAveraging) for one in _all(trainer))
        if others > 1:
            raise ConfigError(
                f"Expected one WeightAveraging, but got {others}: only one average can be evaluated. Keep one of them."
            )

    def reset(self) -> None:
        self._average: Weights = {}
        self._num_updates = 0

    def evaluated(self, weights: Weights) -> Weights:
        return {
            name: self._average[name].to(weight) if name in self._average else weight
            for name, weight in weights.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "num_updates": self._num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._average, self._num_updates = state_dict["average"], state_dict["num_updates"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due(trainer, batch_idx):
            self._update(pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if trainer.current_epoch < self.start_epoch:
            return False
        if self.every_n_steps is None and self.mode == "swa":
            # Not when the epoch ends: its validation comes before that.
            ends = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
            return ends or trainer.global_step == trainer.max_steps
        return stepped and trainer.global_step % (self.every_n_steps or 1) == 0

    @torch.no_grad()
    def _update(self, pl_module: LightningModule) -> None:
        trainable = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        weights = {
            name: weight.to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in _parameters(pl_module).items()
            if name in trainable or name in self._average
        }
        known = list(self._average)
        if known:
            share = 1 / (self._num_updates + 1) if self.mode == "swa" else 1 - self._decay_now()
            torch._foreach_lerp_(
                [self._average[name] for name in known], [weights[name] for name in known], share
            )
        for name in weights.keys() - self._average.keys():
            self._average[name] = weights[name].clone()
        self._num_updates += 1

    def _decay_now(self) -> float:
        n = self._num_updates
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
