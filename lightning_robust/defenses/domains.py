"""Losses per training domain."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_robust.defenses.base import Batch, Defense, Step
from lightning_robust.defenses.batches import domains_of, labelled_rows, take_rows
from lightning_robust.errors import ConfigError

UNKNOWN = -1
"""The domain of rows whose domain is not known."""


def check_domains(defense: Defense, trainer: Trainer) -> None:
    """Check that there are domains to compare, as far as can be told before the first batch.

    Raises:
        ConfigError: If the data module lists its domains, as ours does, and they are fewer than 2.
    """
    domains = getattr(getattr(trainer, "datamodule", None), "domains", None)
    if domains is not None and len(domains) < 2:
        raise ConfigError(
            f"Expected training examples from 2 or more domains, which {type(defense).__name__} compares, but the "
            f"training data has {len(domains)}: {', '.join(map(str, domains))}. "
            "Train on several sources, each with its `domain:`, or name a `domain_column:`."
        )


class ComparesDomains(Defense):
    """What the defenses have in common that read each row's domain.

    Warns after the first epoch where no batch had two known domains: there was nothing to compare.
    """

    domain_key: str | int
    _most_domains: int | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        check_domains(self, trainer)
        self._most_domains = None

    def read_domains(self, batch: Batch) -> Tensor:
        """Return each row's domain ``(batch,)``, on the CPU.

        Raises:
            ConfigError: If the batch does not hold domains, or not one for each row.
        """
        domains = domains_of(batch, self.domain_key).cpu()
        self._most_domains = max(self._most_domains or 0, len(torch.unique(domains[domains != UNKNOWN])))
        return domains

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._most_domains in (0, 1) and trainer.current_epoch == 0:
            held = "more than one" if self._most_domains else f"a known one (all are {UNKNOWN})"
            rank_zero_warn(
                f"{type(self).__name__} compares domains, but no batch of this epoch held {held}: it had nothing "
                "to do. Mix the domains in each batch (balance_domains=True of TextDataModule, DomainBalancedSampler)."
            )


def check_sees_several_domains(defense: Defense) -> None:
    """Check that no defense around this one calls the step for one domain at a time.

    Raises:
        ConfigError: If one does.
    """
    defenses = defense.chain.defenses
    for outer in defenses[: defenses.index(defense)]:
        if isinstance(outer, DomainDefense):
            mine, theirs = type(defense).__name__, type(outer).__name__
            movable = outer.place == "anywhere" and not isinstance(defense, DomainDefense)
            raise ConfigError(
                f"Expected {mine} to see several domains at once, but {theirs} around it takes one at a time. "
                + (f"List {mine} before {theirs}." if movable else "Leave one of them out.")
            )


class DomainDefense(ComparesDomains):
    """Base of the defenses that weigh the training domains' losses against each other.

    A subclass says what the loss is, given each domain's (`combine`). Rows of unknown domain (-1) are
    compared with no others: they train on their plain loss, by their share of the batch. Domains of which a batch
    holds no labelled row, whose mean loss would be 0 / 0, are left out of it. One inside another one would see one
    domain at a time, and is refused when fit starts.

    Args:
        domain_key: Where a batch holds its rows' domains: a dict key or a tuple index.
        label_key: Where a batch may hold its rows' classes, in the same way; it need not.
    """

    aim = "ood"
    needs: ClassVar[tuple[str, ...]] = ("domains",)

    def __init__(self, domain_key: str | int = "domain", label_key: str | int = "labels") -> None:
        super().__init__()
        self.domain_key = domain_key
        self.label_key = label_key

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        check_sees_several_domains(self)

    def combine(self, risks: dict[int, Tensor]) -> Tensor:
        """Return the loss, given the mean loss of each known domain in the batch, of which there is at least one."""
        raise NotImplementedError

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        risks = self.domain_risks(step, batch)
        unknown = risks.pop(UNKNOWN, None)
        if unknown is None or not risks:
            return self.combine(risks) if unknown is None else unknown
        sizes = self.sizes(batch, domains_of(batch, self.domain_key))
        share = sizes[UNKNOWN] / sizes.total()
        return (1 - share) * self.combine(risks) + share * unknown

    def domain_risks(self, step: Step, batch: Batch) -> dict[int, Tensor]:
        """Return each domain's mean loss, for the domains that are in this batch, the unknown one (-1) included.

        A batch with one domain is one call of ``step``, on the whole batch, as is one without any label.

        Raises:
            ConfigError: If the batch does not hold domains, or not one for each row.
        """
        domains = self.read_domains(batch)
        counted = sorted(self.sizes(batch, domains))
        if len(torch.unique(domains)) == 1 or not counted:
            return {counted[0] if counted else UNKNOWN: step(batch)}
        risks = {}
        for domain in counted:
            rows = torch.nonzero(domains == domain).flatten()
            with self.chain.on_rows(rows):
                risks[domain] = step(take_rows(batch, rows))
        return risks

    def sizes(self, batch: Batch, domains: Tensor) -> Counter[int]:
        """Return how many labelled rows the batch has of each of the ``domains`` ``(batch,)`` that has any."""
        labelled = labelled_rows(batch, self.label_key)
        return Counter((domains if labelled is None else domains.cpu()[labelled]).tolist())
