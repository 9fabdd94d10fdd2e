"""GroupDRO: more weight for the training domains with the higher losses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_robust.defenses.base import Batch, Step, starts_anew
from lightning_robust.defenses.batches import domains_of
from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.domains import UNKNOWN, DomainDefense


class GroupDRO(DomainDefense):
    """Minimise ``Σ_d q_d R_d`` over the domains' mean losses R_d; before that, q_d becomes ∝ ``q_d · exp(η R_d)``.

    q is over all domains that are known: those of the data module, else those that batches have held. Domains that a
    batch lacks keep their part of q, up to its sum of 1. q moves once per batch, by the losses of the batch's
    first pass; under DDP by the mean loss of a domain's rows on all processes, under accumulation by its share of η.

    Where a batch lacks domains, the sum is that of the others times ``known / present``: parts of a batch, on
    several processes or accumulated, then add up to what the whole gives. Rows of unknown domain (-1) train on
    their plain loss; a domain without a labelled row is absent. The weights are logged as ``group_dro/<domain>``.

    Source: Sagawa et al. 2020, arXiv 1911.08731 (algorithm 1), whose code has no factor for absent domains,
    and an optional adjustment by group size that is left out.

    Args:
        step_size: η. 0 is training without the defense, whatever the domains' sizes.
        domain_key: Where a batch holds its rows' domains: a dict key or a tuple index.
        label_key: Where a batch may hold its rows' classes, in the same way; it need not.

    Raises:
        ConfigError: If a setting is out of range; when fit starts or at the first batch, if there are no domains.
    """

    cost = 1.08

    def __init__(
        self, step_size: float = 0.01, domain_key: str | int = "domain", label_key: str | int = "labels"
    ) -> None:
        super().__init__(domain_key, label_key)
        self.step_size = expect("step_size", step_size, at_least=0)
        # Logarithms: after many steps a weight may be too small for a float, and would never come back.
        self._log_weights: dict[int, float] = {}
        self._names: list[str] = []
        self._moved = False

    @property
    def weights(self) -> dict[int, float]:
        """The weight q of each known domain."""
        return {domain: math.exp(value) for domain, value in self._log_weights.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and starts_anew(trainer):
            self._log_weights = {}

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        self._names = list(map(str, getattr(getattr(trainer, "datamodule", None), "domains", None) or ()))
        self._add(range(len(self._names)))

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        return step(batch) if self.step_size == 0 else super().training_loss(step, batch)

    def domain_risks(self, step: Step, batch: Batch) -> dict[int, Tensor]:
        risks = super().domain_risks(step, batch)
        if not self._moved:
            self._moved = True
            sizes = self.sizes(batch, domains_of(batch, self.domain_key))
            values = torch.stack([risk.detach() for risk in risks.values()]).tolist()
            self._move({d: (value, sizes[d]) for d, value in zip(risks, values, strict=True) if d != UNKNOWN})
        return risks

    def combine(self, risks: dict[int, Tensor]) -> Tensor:
        weights = self.weights
        known_per_present = len(weights) / len(risks)
        return torch.stack([weights[d] * known_per_present * risk for d, risk in risks.items()]).sum()

    def _move(self, mine: dict[int, tuple[float, int]]) -> None:
        trainer = self.chain.trainer
        everyone: list[Any] = [mine]
        if trainer.world_size > 1:  # each process once per batch, whatever domains it has
            everyone *= trainer.world_size
            torch.distributed.all_gather_object(everyone, mine)
        self._add(sorted({domain for risks in everyone for domain in risks}))
        for domain in self._log_weights:
            found = [risks[domain] for risks in everyone if domain in risks]
            risk = sum(value * size for value, size in found) / max(1, sum(size for _, size in found))
            if math.isfinite(risk):  # fp16 may overflow; the step is then skipped
                self._log_weights[domain] += self.step_size * risk / trainer.accumulate_grad_batches
        self._normalise()

    def _add(self, domains: Iterable[int]) -> None:
        """Let new domains in, with the mean weight of the others."""
        new = -math.log(max(1, len(self._log_weights)))
        for domain in domains:
            self._log_weights.setdefault(domain, new)
        self._normalise()

    def _normalise(self) -> None:
        highest = max(self._log_weights.values(), default=0.0)
        total = highest + math.log(sum(math.exp(v - highest) for v in self._log_weights.values()) or 1.0)
        self._log_weights = {domain: value - total for domain, value in self._log_weights.items()}

    def on_train_batch_start(self, *_: Any) -> None:
        self._moved = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for domain, weight in self.weights.items() if self.step_size else ():
            name = self._names[domain] if domain < len(self._names) else domain
            pl_module.log(f"group_dro/{name}", weight)

    def state_dict(self) -> dict[str, Any]:
        return {"log_weights": dict(self._log_weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._log_weights = dict(state_dict["log_weights"])
