"""Defenses that make the training domains' pooled features alike."""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_robust.defenses.base import Batch, Step
from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.domains import UNKNOWN, ComparesDomains, check_sees_several_domains
from lightning_robust.defenses.head import ClassifierHead, Pass


class FeatureDefense(ComparesDomains):
    """Base of the defenses that add to the loss what tells the domains' pooled features apart.

    Features are what the layer that puts out the logits is given, in the pass whose loss counts. A
    batch with one domain trains on its plain loss; rows of unknown domain (-1) count in the plain loss only.

    Args:
        weight: Of what is added; 0 is training without the defense.
        domain_key: Where a batch holds its rows' domains: a dict key or a tuple index.
        head: Name of the submodule whose output is the logits, where it cannot be found.
    """

    aim = "ood"
    needs: ClassVar[tuple[str, ...]] = ("domains", "features")

    def __init__(self, *, weight: float, domain_key: str | int = "domain", head: str | None = None) -> None:
        super().__init__()
        self.weight = expect("weight", weight, at_least=0)
        self.domain_key = domain_key
        self.head = head
        self._head: ClassifierHead | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        self._head = ClassifierHead(pl_module, self.head)
        check_sees_several_domains(self)

    def penalty(self, features: Tensor, domains: Tensor) -> Tensor:
        """Return what to add to the loss, weighted, a scalar.

        Args:
            features: ``(n, hidden)``, of rows whose domain is known.
            domains: Domain of each ``(n,)``; there are two or more.
        """
        raise NotImplementedError

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if self.weight == 0:
            return step(batch)
        assert self._head is not None
        domains = self.read_domains(batch)
        with self._head.watch(self.chain, least_classes=1) as seen:
            loss = step(batch)
        penalties = [self._penalty(each, domains[each.rows]) for each in seen.passes()]
        return loss + torch.stack(penalties).mean()

    def _penalty(self, seen: Pass, domains: Tensor) -> Tensor:
        known = domains != UNKNOWN
        if len(torch.unique(domains[known])) < 2:
            return seen.features.new_zeros(())
        features = seen.features[known.to(seen.features.device)]
        # Products of features would be rounded to bfloat16, and what differs between domains with them.
        with torch.autocast(features.device.type, enabled=False):
            return self.penalty(features, domains[known].to(features.device))


class MatchingDefense(FeatureDefense):
    """Base of the defenses that add the distance of two domains' features, the mean over pairs of domains."""

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of the features ``(rows, hidden)`` of two domains, a scalar."""
        raise NotImplementedError

    def penalty(self, features: Tensor, domains: Tensor) -> Tensor:
        parts = [features[domains == domain] for domain in torch.unique(domains)]
        return self.weight * torch.stack([self.distance(a, b) for a, b in combinations(parts, 2)]).mean()
