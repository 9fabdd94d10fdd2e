"""Label smoothing: a share of the label goes to all classes alike."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_robust.defenses.base import Batch, Defense, Step
from lightning_robust.defenses.batches import labelled_rows
from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.head import ClassifierHead, Pass


class LabelSmoothing(Defense):
    """Minimise (1 − smoothing) · L + smoothing · U, where U is the cross-entropy with the uniform distribution.

    Where the loss L of the training step is a cross-entropy, this is the cross-entropy with smoothed labels;
    whatever else L is made of is kept. U is the mean over rows and classes of −log p; unlabelled rows do not count
    where the batch holds ``labels``, which it need not.

    Source: Szegedy et al. 2016, arXiv 1512.00567. Class weights in L do not apply to U.

    Args:
        smoothing: Share of the label that is spread over all classes; 0 is training without the defense.
        head: Name of the submodule whose output is the logits, where it cannot be found.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no logits; at the first batch, if
            there is one class only.
    """

    aim = "ood"
    needs = ("logits",)
    place = "last"
    cost = 0.99

    def __init__(self, smoothing: float = 0.1, head: str | None = None) -> None:
        super().__init__()
        self.smoothing = expect("smoothing", smoothing, at_least=0, at_most=1)
        self.head = head
        self._head: ClassifierHead | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._head = ClassifierHead(pl_module, self.head)

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if self.smoothing == 0:
            return step(batch)
        assert self._head is not None
        with self._head.watch(self.chain) as seen:
            loss = step(batch)
        labelled = labelled_rows(batch)
        uniform = torch.stack([_uniform_cross_entropy(each, labelled) for each in seen.passes()]).mean()
        return (1 - self.smoothing) * loss + self.smoothing * uniform


def _uniform_cross_entropy(seen: Pass, labelled: Tensor | None) -> Tensor:
    logits = seen.logits
    if labelled is not None:
        logits = logits[labelled[seen.rows].to(logits.device)]
    return -logits.log_softmax(-1).sum() / max(1, logits.numel())
