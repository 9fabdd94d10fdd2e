"""DANN: features from which the training domain cannot be told."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from lightning_robust.defenses.base import starts_anew
from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.features import FeatureDefense
from lightning_robust.defenses.head import Pass
from lightning_robust.errors import ConfigError


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(values: Tensor, strength: float = 1.0) -> Tensor:
    """Return ``values``, whose gradient is multiplied by ``-strength`` on its way back."""
    reversed_: Tensor = _Reversal.apply(values, strength)  # type: ignore[no-untyped-call]
    return reversed_


class DANN(FeatureDefense):
    """Minimise L − λ · D with the module's weights, and D with those of a domain classifier on pooled features.

    D is the cross-entropy of the domain, over one hidden layer of ReLU. The features reach it through a gradient
    reversal, so both happen in one backward pass. λ is ``weight · (2 / (1 + exp(−10 p)) − 1)``, p the share of the fit
    that is over: it ramps from 0 to ``weight``. The classifier has its own AdamW, which steps when
    the trainer does, on the mean over all rows since its last step, of all processes. A batch with one domain
    trains on its plain loss; rows of unknown domain (-1) count in the plain loss only.

    Source: Ganin et al. 2016, arXiv 1505.07818, for a source and a target domain; there, one optimizer (SGD) for all
    weights. Pairs of training domains are DomainBed's, which takes turns between the two sides.

    Args:
        weight: λ at the end of the fit; 0 is training without the defense.
        num_domains: Number of training domains, where the data module has no list of ``domains``.
        hidden_size: Of the domain classifier.
        learning_rate: Of the domain classifier.
        domain_key: Where a batch holds its rows' domains: a dict key or a tuple index.
        head: Name of the submodule whose output is the logits, where it cannot be found.
        seed: Of the domain classifier's first weights.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no features, the number of
            domains is not known or 1, the fit has no end, or a defense around this one splits batches by domain; at
            the first batch, if there are no domains.
    """

    cost = 1.0

    def __init__(
        self,
        weight: float = 1.0,
        num_domains: int | None = None,
        hidden_size: int = 128,
        learning_rate: float = 1e-3,
        domain_key: str | int = "domain",
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight=weight, domain_key=domain_key, head=head)
        self.num_domains = num_domains
        if num_domains is not None:
            expect("num_domains", num_domains, at_least=2, whole=True)
        self.hidden_size = expect("hidden_size", hidden_size, at_least=1, whole=True)
        self.learning_rate = expect("learning_rate", learning_rate, at_least=0)
        self.seed = seed
        self._number = 0
        self._steps = math.inf
        self._forget()

    def _forget(self) -> None:
        self._classifier: nn.Module | None = None
        self._optimizer: AdamW | None = None
        self._loaded: dict[str, Any] = {}
        self._gradients: list[Tensor] = []
        self._rows = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            state = {} if starts_anew(trainer) else self.state_dict()
            self._forget()
            self._loaded = state

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        domains = getattr(getattr(trainer, "datamodule", None), "domains", None)
        if self.num_domains is None and domains is None:
            raise ConfigError(
                "Expected to know the number of training domains, which DANN's classifier tells apart, but the data "
                "module has no list of `domains`. Say it: num_domains=3 if they are 0, 1 and 2 in the batches."
            )
        self._number = self.num_domains or len(domains or ())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not when fit starts: that would load the training data before others can change it.
        self._steps = trainer.estimated_stepping_batches
        if self.weight and not math.isfinite(self._steps):
            raise ConfigError(
                "Expected a fit with an end, over which DANN's λ ramps up, but it has none. "
                "Give Trainer max_steps, or max_epochs with training data that has a length."
            )

    @property
    def strength(self) -> float:
        """λ, by which features are moved away from what tells domains apart."""
        progress = min(1.0, self.chain.trainer.global_step / self._steps)
        return self.weight * (2 / (1 + math.exp(-10 * progress)) - 1)

    def penalty(self, features: Tensor, domains: Tensor) -> Tensor:
        assert self._classifier is not None
        if int(domains.max()) >= self._number or int(domains.min()) < 0:
            raise ConfigError(
                f"Expected domains from 0 to {self._number - 1}, and -1 for unknown ones, but a batch holds "
                f"{sorted(set(domains.tolist()))}. Set DANN(num_domains=...) to the number that there are."
            )
        guesses = self._classifier(reverse_gradient(features, self.strength))
        total = F.cross_entropy(guesses, domains.long(), reduction="sum")
        # Its own gradient is taken here: what the trainer back-propagates may be scaled, weighted or repeated.
        found = torch.autograd.grad(total, list(self._classifier.parameters()), retain_graph=True)
        self._gradients = [old + new for old, new in zip(self._gradients, found, strict=True)]
        self._rows += len(domains)
        return total / len(domains)

    def _penalty(self, seen: Pass, domains: Tensor) -> Tensor:
        # On each process at its first batch, even if that has nothing to tell apart: they step together.
        if self._classifier is None:
            self._build(seen.features)
        return super()._penalty(seen, domains)

    def _build(self, features: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        hidden = _linear(features.shape[1], self.hidden_size, generator)
        output = _linear(self.hidden_size, self._number, generator)
        classifier = nn.Sequential(hidden, nn.ReLU(), output).to(features)
        optimizer = AdamW(classifier.parameters(), lr=self.learning_rate)
        if self._loaded:
            classifier.load_state_dict(self._loaded["classifier"])
            optimizer.load_state_dict(self._loaded["optimizer"])
        self._classifier, self._optimizer = classifier, optimizer
        self._clear()

    def _clear(self) -> None:
        assert self._classifier is not None
        self._gradients = [torch.zeros_like(p) for p in self._classifier.parameters()]
        self._rows = 0
        self._classifier.zero_grad()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._classifier is None or self._optimizer is None:
            return
        sums = torch.cat(
            [g.flatten() for g in (*self._gradients, self._gradients[0].new_tensor([self._rows]))]
        )
        if trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        if sums[-1] > 0:
            parameters = list(self._classifier.parameters())
            parts = torch.split(sums[:-1] / sums[-1], [p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
            self._optimizer.step()
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        if self._classifier is None or self._optimizer is None:
            return self._loaded
        return {
            "classifier": dict(self._classifier.state_dict()),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        self._classifier = self._optimizer = None


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A layer with PyTorch's usual first weights, from a generator of its own."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer
