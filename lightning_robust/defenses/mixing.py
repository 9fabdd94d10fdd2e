"""Mixing the hidden states and the labels of a batch's rows with those of partners in the batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_robust.defenses.base import Batch, Defense, Step
from lightning_robust.defenses.chain import DefenseChain
from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.head import ClassifierHead, Pass, _pooled
from lightning_robust.defenses.perturbation import _hidden, _with_hidden
from lightning_robust.defenses.row_losses import classes_of, cross_entropies, mean_over_rows
from lightning_robust.errors import ConfigError


@dataclass
class Mixture:
    """Whom each row of a batch is mixed with, and how much.

    Args:
        partners: Row ``(batch,)`` of the partner.
        shares: 1 − λ ``(batch,)``, how much of the partner there is in the mixture; 0 leaves a row as it is.
    """

    partners: Tensor
    shares: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Return the mixture of ``values`` ``(batch, ...)``."""
        if len(values) != len(self.partners):
            raise ConfigError(
                f"Expected the layer whose rows are mixed to see the batch's {len(self.partners)} rows, but it saw "
                f'{len(values)}. Name layers that see each row once: layers=["path.to.submodule"].'
            )
        shares = self.shares.to(values).view(-1, *[1] * (values.ndim - 1))
        mixed: Tensor = _Mix.apply(values, self.partners.to(values.device), shares)  # type: ignore[no-untyped-call]
        return mixed


class _Mix(torch.autograd.Function):
    """values + shares · (values[partners] − values).

    Its own function because it must save no tensors: after a block, gradient checkpointing counts those that the
    block saved, and computes them again without hooks.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
        ctx.partners, ctx.shares = partners, shares
        return values + shares * (values[partners] - values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        given = ctx.shares * gradients[0]
        return (gradients[0] - given).index_add(0, ctx.partners, given), None, None


class MixingDefense(Defense):
    """Base of the defenses that train on mixtures of rows: L + (1 − λ)(CE(partner's label) − CE(own label)).

    L is the loss of the training step, and CE are cross-entropies, all of the mixed states; where L is the mean
    cross-entropy, this is the one with mixed labels. A subclass says who is mixed with whom (`draw`) and where.

    Args:
        alpha: λ ~ Beta(alpha, alpha), for each row.
        share: Probability that a batch is mixed; 0 is training without the defense.
        label_key: Where a batch holds its rows' classes: a dict key or a tuple index.
        head: Name of the submodule that maps pooled features to logits, where it cannot be found.
        seed: Of what is drawn.
    """

    aim = "ood"
    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    place = "last"

    def __init__(
        self, *, alpha: float, share: float, label_key: str | int, head: str | None, seed: int
    ) -> None:
        super().__init__()
        self.alpha = expect("alpha", alpha, above=0)
        self.share = expect("share", share, at_least=0, at_most=1)
        self.label_key = label_key
        self.head = head
        self.seed = seed
        self.input_layer: nn.Module | None = None
        self._head: ClassifierHead | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._head = ClassifierHead(pl_module, self.head)

    def draw(self, batch: Batch, labels: Tensor, rng: random.Random) -> Mixture | None:
        """Return the mixture of this batch's rows; None leaves the batch as it is."""
        raise NotImplementedError

    def choose_layer(self, rng: random.Random) -> nn.Module | None:
        """Return the layer whose output is mixed; None: the pooled features are."""
        return None

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if self.share == 0:
            return step(batch)
        assert self._head is not None
        labels = classes_of(batch, self.label_key)
        rng = self._rng()
        mixed = rng.random() < self.share
        layer = self.choose_layer(rng)
        mixture = self.draw(batch, labels, rng) if mixed else None
        if mixture is None:
            return step(batch)
        with self.chain.perturbing(), self._mixing(mixture, layer), self._head.watch(self.chain) as seen:
            loss = step(batch)
        others = labels[mixture.partners.to(labels.device)]

        def correction(each: Pass) -> Tensor:
            shares = mixture.shares[each.rows].to(each.logits)
            return shares * (cross_entropies(each, others) - cross_entropies(each, labels))

        return loss + mean_over_rows(seen, labels, correction)

    def _rng(self) -> random.Random:
        # The same for every call on these rows of this batch: a defense around this one sees one function.
        generator = self.chain.generator(self.seed, torch.device("cpu"))
        return random.Random(f"{generator.initial_seed()}:{self.chain.rows_since(0)}")

    @contextmanager
    def _mixing(self, mixture: Mixture, layer: nn.Module | None) -> Iterator[None]:
        assert self._head is not None
        hooks = _Hooks(self.chain, mixture, every_call=layer is self.input_layer)
        with ExitStack() as stack:
            if layer is None:
                hook = self._head.layer.register_forward_pre_hook(hooks.features, with_kwargs=True)
            else:
                hook = layer.register_forward_hook(hooks.output)
                stack.callback(self._head.layer.register_forward_pre_hook(hooks.end).remove)
            stack.callback(hook.remove)
            yield
        if not hooks.used:
            raise ConfigError(f"Expected the training step to call the layer {layer}, but it did not.")


class _Hooks:
    """Mix what passes a layer; once in a pass, where a model calls one layer again and again (ALBERT)."""

    def __init__(self, chain: DefenseChain, mixture: Mixture, *, every_call: bool) -> None:
        self.used = False
        self._chain = chain
        self._mixture = mixture
        self._every_call = every_call
        self._done = False

    def output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._done and not self._every_call:
            return output
        self._done = self.used = True
        return _with_hidden(output, self._mixture.of(_hidden(layer, output)))

    def end(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._done = False

    def features(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.used = True
        if args:
            return (self._mix_pooled(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: self._mix_pooled(kwargs[name])}

    def _mix_pooled(self, values: Tensor) -> Tensor:
        if values.ndim != 3:
            return self._mixture.of(values)
        # A decoder's head sees all tokens, of which the last one counts: another in each row.
        pooled = _pooled(values, self._chain.batch)
        return values + (self._mixture.of(pooled) - pooled).unsqueeze(1)
