"""Defenses that train one set of weights and evaluate another, made from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_robust.defenses.base import Defense, starts_anew, take_turns
from lightning_robust.errors import ConfigError

Weights = dict[str, Tensor]


class EvaluatedWeights(Defense):
    """Base of the defenses whose `evaluated` weights stand in for the trained ones wherever these are judged or kept.

    Training goes on with its own weights. Validation, the end of an epoch and of fit, checkpoints and exports see
    the evaluated ones; a checkpoint holds the training weights too, in the callback's state, so that a run that
    resumes goes on exactly as if it had not stopped. The sanity check sees the weights as they are, and so does
    the user after an exception. Only weights that train are touched or copied; buffers are not.

    Several of them compose: averages first, whatever their order among the callbacks. They move to the
    front of the trainer's callbacks, so that every other one sees the same weights wherever it stands.
    """

    aim = "ood"
    turn = 1

    def __init__(self) -> None:
        super().__init__()
        self._training: Weights | None = None
        """The leader's: training weights that differ from the evaluated ones, while those are in the module."""
        self._followed: set[str] = set()

    def reset(self) -> None:
        """Forget the last fit."""
        raise NotImplementedError

    def follow(self, pl_module: LightningModule, weights: Mapping[str, Tensor]) -> None:
        """Look at weights that begin to train now; called once with each, before its first step."""

    def evaluated(self, weights: Weights) -> Weights:
        """Return what is evaluated in place of ``weights``, for each name; the same tensor where it is the same."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._training = state_dict.get("training_weights")

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:
            raise ConfigError(
                f"Expected each process to hold all weights, which {type(self).__name__} copies, but "
                f"{type(trainer.strategy).__name__} divides them. Use one device or strategy='ddp'."
            )

    # Lightning's hooks --------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and starts_anew(trainer):
            self._training, self._followed = None, set()
            self.reset()
        take_turns(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._move(pl_module.device)
        if self._leads(trainer):
            self._to_training(pl_module)
            self._follow(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leads(trainer):
            self._to_training(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._leads(trainer):
            self._to_training(pl_module)
            self._follow(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._leads(trainer) and _saves_bare_weights(trainer):
            self._to_evaluated(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._leads(trainer):
            self._to_evaluated(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leads(trainer):
            self._to_evaluated(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leads(trainer):
            self._to_evaluated(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        if self._leads(trainer):
            # Still to do where there was nothing left to train.
            self._to_evaluated(trainer, pl_module)
        self._move(torch.device("cpu"))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if trainer.state.fn == "fit" and self._leads(trainer):
            self._to_training(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._leads(trainer):
            return
        training = self._training
        if training is None:
            weights = _parameters(pl_module)
            values = self._evaluate(trainer, weights)
            training = {name: weights[name] for name in values}
            _replace(checkpoint["state_dict"], training, values)
        checkpoint.setdefault("callbacks", {}).setdefault(self.state_key, {})["training_weights"] = training

    # Which weights the module holds -------------------------------------------------------------

    def _leads(self, trainer: Trainer) -> bool:
        return _all(trainer)[0] is self

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Each batch anew: layers may be unfrozen at any time.
        new = {
            name: p.detach()
            for name, p in pl_module.named_parameters()
            if p.requires_grad and name not in self._followed
        }
        if new:
            self._followed.update(new)
            for one in _all(trainer):
                one.follow(pl_module, new)

    def _evaluate(self, trainer: Trainer, weights: Weights) -> Weights:
        """The evaluated weights, where they differ from ``weights``."""
        values = weights
        for one in _all(trainer):
            values = one.evaluated(values)
        return {name: value for name, value in values.items() if value is not weights[name]}

    @torch.no_grad()
    def _to_evaluated(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is not None:
            return
        weights = _parameters(pl_module)
        values = self._evaluate(trainer, weights)
        self._training = {name: weights[name].clone() for name in values}
        for name, value in values.items():
            weights[name].copy_(value)

    def _to_training(self, pl_module: LightningModule) -> None:
        training, self._training = self._training, None
        if not training:
            return
        weights = _parameters(pl_module)
        for name, value in training.items():
            if name not in weights or weights[name].shape != value.shape:
                raise ConfigError(
                    f"Expected a checkpoint of this module, but its training weights hold {name} of shape "
                    f"{tuple(value.shape)}, which {type(pl_module).__name__} does not have."
                )
            weights[name].copy_(value)

    def _move(self, device: torch.device) -> None:
        state = self.state_dict() | {"training_weights": self._training}
        self.load_state_dict(move_data_to_device(state, device))


def _all(trainer: Trainer) -> list[EvaluatedWeights]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EvaluatedWeights)]  # type: ignore[attr-defined]


def _parameters(module: torch.nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _replace(state: dict[str, Any], weights: Weights, values: Weights) -> None:
    """Put ``values`` into a state dict, whatever it calls the ``weights`` and however often it names them."""
    names = {weight.data_ptr(): name for name, weight in weights.items() if weight.numel()}
    for key, value in state.items():
        name = names.get(value.data_ptr(), key) if isinstance(value, Tensor) else key
        if name in values and values[name].shape == value.shape:
            state[key] = values[name]


def _saves_bare_weights(trainer: Trainer) -> bool:
    """Whether a checkpoint is due now that no callback can edit: only what the module holds goes into it."""
    return any(
        isinstance(callback, ModelCheckpoint)
        and callback.save_weights_only
        and (
            callback._train_time_interval is not None
            or (
                callback._every_n_train_steps > 0 and trainer.global_step % callback._every_n_train_steps == 0
            )
        )
        for callback in trainer.checkpoint_callbacks
    )
