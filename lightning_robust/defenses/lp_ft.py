"""LP-FT: train the classification head first, then everything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_robust.defenses.base import Defense
from lightning_robust.defenses.checks import check_epochs, expect
from lightning_robust.defenses.head import ClassifierHead
from lightning_robust.defenses.jtt import JTT
from lightning_robust.errors import BackboneError, ConfigError
from lightning_robust.modules.finding import huggingface_models, unwrapped


class LPFT(Defense):
    """Train the classification head alone for ``head_epochs``, then everything that trains.

    So the features are not distorted while the head is still random. In the first stage the gradients of all other
    parameters are dropped before each optimizer step: nothing, weight decay included, moves them, and they gather no
    optimizer state. ``requires_grad`` stays as it is, so a step costs as much as any.

    The head is what lies outside of the Hugging Face transformer, and its pooler. With JTT, each of its two stages
    begins with the head.

    Source: Kumar et al. 2022, arXiv 2202.10054. There the head is trained to the end on features without dropout; here
    both stages are one fit, with one optimizer and one learning rate schedule, and dropout as it is.

    Args:
        head_epochs: Of the first stage; 0 is training without the defense.
        head: Name of the submodule that is the head, where it cannot be found.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there is no head, it is frozen, nothing else
            trains, or training ends with the first stage.
    """

    aim = "ood"
    needs: ClassVar[tuple[str, ...]] = ("head",)
    cost = 0.95

    def __init__(self, head_epochs: int = 1, head: str | None = None) -> None:
        super().__init__()
        self.head_epochs = expect("head_epochs", head_epochs, at_least=0, whole=True)
        self.head = head
        self._head: list[nn.Parameter] = []

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.head_epochs == 0:
            return
        self._head = list(_head_parameters(pl_module, self.head))
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        body = [p for p in self._body(pl_module) if p.requires_grad]
        name = type(pl_module).__name__
        if len(body) == len(trained):
            raise ConfigError(
                f"Expected the classification head of {name} to train, but only others do: "
                f"{', '.join(list(trained)[:3])} and so on. Unfreeze the head, or leave LPFT out."
            )
        if not body:
            raise ConfigError(
                f"Expected {name} to train more than its classification head, which LPFT trains first, but nothing "
                "else trains. Unfreeze the transformer or add adapters, or leave LPFT out."
            )
        before = max(_beginnings(trainer))
        of_jtt = f" + identification_epochs={before} of JTT" if before else ""
        what = f"head_epochs={self.head_epochs}{of_jtt}, after which LPFT trains everything"
        check_epochs(trainer, before + self.head_epochs, what)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        epoch = trainer.current_epoch
        if epoch - max(first for first in _beginnings(trainer) if first <= epoch) < self.head_epochs:
            for parameter in self._body(pl_module):
                parameter.grad = None

    def _body(self, module: LightningModule) -> list[nn.Parameter]:
        # Each time anew: layers may be unfrozen at any time.
        head = {id(p) for p in self._head}
        return [p for p in module.parameters() if id(p) not in head]


def _beginnings(trainer: Trainer) -> list[int]:
    """The epochs in which training begins: the first one, and that in which JTT goes back to the start."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [0, *(one.identification_epochs for one in callbacks if isinstance(one, JTT))]


def _head_parameters(module: LightningModule, name: str | None) -> Iterator[nn.Parameter]:
    models = huggingface_models(dict(module.named_modules()))
    if name is not None or not models:
        yield from ClassifierHead(module, name).layer.parameters()
        return
    inside = {id(p) for model in models.values() for p in model.parameters()}
    yield from (p for p in module.parameters() if id(p) not in inside)
    for model in models.values():
        inner: Any = unwrapped(model)
        for part in _head_names(inner):
            yield from inner.get_submodule(part).parameters()


def _head_names(model: Any) -> list[str]:
    from lightning_robust.modules.layers import head_modules

    try:
        return head_modules(model)
    except BackboneError:  # a transformer without a head of its own, behind which the user put one
        return [name for name, _ in model.named_modules() if name.split(".")[-1] == "pooler"]
