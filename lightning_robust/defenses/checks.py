"""Checks of the defenses' settings and of what they work on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_robust.errors import ConfigError

if TYPE_CHECKING:
    from lightning_robust.defenses.base import Defense

Number = TypeVar("Number", int, float)


def expect(
    name: str,
    value: Number,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    above: float = -math.inf,
    whole: bool = False,
) -> Number:
    """Return ``value`` if it is a finite number in a range, and a whole one where that is asked.

    >>> expect("num_steps", 3, at_least=1)
    3

    Raises:
        ConfigError: Otherwise.
    """
    kind = int if whole else (int, float)
    if (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and at_least <= value <= at_most
        and value > above
    ):
        return value
    lowest = f">= {at_least}" if above == -math.inf else f"> {above}"
    limits = lowest if at_most == math.inf else f"from {at_least} to {at_most}"
    what = "whole number" if whole else "number"
    raise ConfigError(f"Expected `{name}` to be a {what} {limits}, but got {value!r}.")


def expect_seed(value: int) -> int:
    """Return ``value`` if it is a whole number.

    Raises:
        ConfigError: Otherwise.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"Expected `seed` to be a whole number, but got {value!r}.")
    return value


def check_names(settings: Mapping[str, Any]) -> None:
    """Check what many of the package's training-time defenses take: names of submodules.

    Raises:
        ConfigError: If one is something else.
    """
    for name in ("embeddings", "head"):
        value = settings.get(name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"Expected `{name}` to be the name of a submodule, but got {value!r}.")
    layers = settings.get("layers")
    if layers is not None and (
        isinstance(layers, str)
        or not isinstance(layers, Sequence)
        or not all(isinstance(n, str) for n in layers)
    ):
        raise ConfigError(f"Expected `layers` to be a list of names of submodules, but got {layers!r}.")


def check_epochs(trainer: Trainer, first: int, what: str) -> None:
    """Check that training, if there is any, goes on for more than its ``first`` epochs, as far as they are bounded.

    Args:
        trainer: That of the fit that starts; a dry run (``fast_dev_run``) may be shorter.
        first: Epochs after which something is to happen.
        what: Says which epochs these are and what for.

    Raises:
        ConfigError: If training ends before.
    """
    epochs = trainer.max_epochs
    if epochs is not None and 0 < epochs <= first and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ConfigError(f"Expected `max_epochs` to be more than {what}, but got {epochs}.")


def check_trainable(module: LightningModule, names: str) -> None:
    """Check that a module trains by a step that defenses can wrap.

    Args:
        module: The module.
        names: Of the defenses, for messages.

    Raises:
        ConfigError: If it takes its optimizer steps itself, has no step on a batch, or nothing to train.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ConfigError(
            f"Expected {name} to use automatic optimization, but it sets automatic_optimization=False. "
            f"Defenses ({names}) change the loss, so Lightning must take the optimizer steps."
        )
    if not is_overridden("training_step", module):
        raise ConfigError(f"Expected {name} to define training_step, which {names} wrap.")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ConfigError(
            f"Expected {name}.training_step to take a batch, but it takes `dataloader_iter`. "
            f"{names} need the batch."
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(
            f"Expected {name} to have a trainable parameter, but all are frozen: nothing to defend."
        )


def check_inner_gradients(defense: Defense, module: nn.Module) -> None:
    """Check that gradients with respect to activations can be had inside the training step.

    Raises:
        ConfigError: If the module uses reentrant gradient checkpointing, which cannot give them.
    """
    for submodule in module.modules():
        checkpoint = getattr(submodule, "_gradient_checkpointing_func", None)
        reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", True)
        if getattr(submodule, "gradient_checkpointing", False) and checkpoint is not None and reentrant:
            raise ConfigError(
                f"{type(defense).__name__} needs gradient checkpointing that is not reentrant: "
                'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )
