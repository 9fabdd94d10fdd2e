"""IRM: one classifier that is the best one in all training domains."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_robust.defenses.base import Batch, Step
from lightning_robust.defenses.batches import UNLABELLED, domains_of
from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.domains import UNKNOWN, DomainDefense
from lightning_robust.defenses.head import ClassifierHead, Pass
from lightning_robust.defenses.row_losses import classes_of


class IRM(DomainDefense):
    """Minimise ``mean_d R_d + λ · mean_d (∂R_d(w · f) / ∂w)²`` at w = 1, R_d a domain's mean loss, f the logits.

    The derivative is that of cross-entropy, the mean over the domain's rows of ``Σ_c p_c f_c − f_label``; R_d is
    the module's own loss. A batch with one domain has that domain's penalty only. Rows of unknown domain (-1)
    train on their plain loss; domains without a labelled row in the batch do not count in it. Mix the domains in
    every batch.

    Source: Arjovsky et al. 2019, arXiv 1907.02893 (IRMv1). As in its code, the penalty is squared on the same rows
    and, where λ > 1, the loss is divided by λ. DomainBed multiplies the derivatives of two halves of the rows, does not
    divide, and resets Adam's state after the warm-up; here it goes on.

    Args:
        penalty_weight: λ after the warm-up.
        warmup_weight: λ during the warm-up. Where both are 0, training is as without the defense; where only one
            is, the loss is the mean over domains meanwhile.
        warmup_steps: Optimizer steps of the warm-up.
        domain_key: Where a batch holds its rows' domains: a dict key or a tuple index.
        label_key: Where a batch holds its rows' classes: a dict key or a tuple index.
        head: Name of the submodule whose output is the logits, where it cannot be found.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no logits or one domain only; at the
            first batch, if there are no labels or no domains.
    """

    needs = ("domains", "logits", "labels")
    cost = 1.1

    def __init__(
        self,
        penalty_weight: float = 100.0,
        warmup_weight: float = 1.0,
        warmup_steps: int = 100,
        domain_key: str | int = "domain",
        label_key: str | int = "labels",
        head: str | None = None,
    ) -> None:
        super().__init__(domain_key)
        self.penalty_weight = expect("penalty_weight", penalty_weight, at_least=0)
        self.warmup_weight = expect("warmup_weight", warmup_weight, at_least=0)
        self.warmup_steps = expect("warmup_steps", warmup_steps, at_least=0, whole=True)
        self.label_key = label_key
        self.head = head
        self._head: ClassifierHead | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        self._head = ClassifierHead(pl_module, self.head)

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if self.penalty_weight == self.warmup_weight == 0:
            return step(batch)
        assert self._head is not None
        labels = classes_of(batch, self.label_key)
        domains = domains_of(batch, self.domain_key).to(labels.device)
        with self._head.watch(self.chain) as seen:
            loss = super().training_loss(step, batch)
        penalty = torch.stack([_penalty(each, labels, domains) for each in seen.passes()]).mean()
        weight = self.warmup_weight
        if self.chain.trainer.global_step >= self.warmup_steps:
            weight = self.penalty_weight
        return (loss + weight * penalty) / max(1.0, weight)

    def combine(self, risks: dict[int, Tensor]) -> Tensor:
        return torch.stack(list(risks.values())).mean()


def _penalty(seen: Pass, labels: Tensor, domains: Tensor) -> Tensor:
    rows = seen.rows.to(labels.device)
    labels, domains = labels[rows].to(seen.logits.device), domains[rows].to(seen.logits.device)
    counted = (labels != UNLABELLED) & (domains != UNKNOWN)
    logits, labels, domains = seen.logits[counted], labels[counted], domains[counted]
    if not len(logits):
        return seen.logits.new_zeros(())
    expected = (logits.softmax(-1) * logits).sum(-1)
    derivatives = expected - logits.gather(1, labels[:, None]).squeeze(1)
    return torch.stack(
        [derivatives[domains == domain].mean() ** 2 for domain in torch.unique(domains)]
    ).mean()
