"""V-REx: equal risk in all training domains."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.defenses.base import Batch, Step
from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.domains import DomainDefense


class VREx(DomainDefense):
    """Minimise ``mean_d R_d + β · Var_d R_d`` over the mean losses R_d of the training domains.

    The variance is that of the domains in the batch (divided by their number), so a batch with a
    single domain trains on its plain loss. Mix the domains in every batch. Rows of unknown domain (-1) train
    on their plain loss; domains without a labelled row in the batch do not count in it.

    Source: Krueger et al. 2021, arXiv 2003.00688; the warm-up and the population variance are those
    of DomainBed, which also resets Adam's state after the warm-up; here it goes on.

    Args:
        beta: Weight of the variance after the warm-up.
        warmup_beta: Weight of the variance during the warm-up. Where both are 0, training is as without the
            defense; where only one is, the loss is the mean over domains meanwhile.
        warmup_steps: Optimizer steps of the warm-up.
        domain_key: Where a batch holds its rows' domains: a dict key or a tuple index.
        label_key: Where a batch may hold its rows' classes, in the same way; it need not.

    Raises:
        ConfigError: If a setting is out of range; when fit starts or at the first batch, if there are
            no domains.
    """

    cost = 1.09

    def __init__(
        self,
        beta: float = 10.0,
        warmup_beta: float = 1.0,
        warmup_steps: int = 100,
        domain_key: str | int = "domain",
        label_key: str | int = "labels",
    ) -> None:
        super().__init__(domain_key, label_key)
        self.beta = expect("beta", beta, at_least=0)
        self.warmup_beta = expect("warmup_beta", warmup_beta, at_least=0)
        self.warmup_steps = expect("warmup_steps", warmup_steps, at_least=0, whole=True)

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if self.beta == self.warmup_beta == 0:
            return step(batch)
        return super().training_loss(step, batch)

    def combine(self, risks: dict[int, Tensor]) -> Tensor:
        values = torch.stack(list(risks.values()))
        beta = self.warmup_beta if self.chain.trainer.global_step < self.warmup_steps else self.beta
        return values.mean() + beta * values.var(correction=0)
