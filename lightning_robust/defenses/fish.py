"""Fish: a step along which the domains' gradients agree."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_robust.defenses.base import Batch, Step
from lightning_robust.defenses.batches import labelled_rows, take_rows
from lightning_robust.defenses.checks import check_inner_gradients, expect
from lightning_robust.defenses.domains import DomainDefense
from lightning_robust.defenses.lp_ft import LPFT
from lightning_robust.defenses.weight_space import check_alone, inner_gradients
from lightning_robust.errors import ConfigError


class Fish(DomainDefense):
    """Take one optimizer step per domain, from θ to θ̃, then go only part of the way: θ + ε(θ̃ − θ).

    The domains of the batch come in random order, and each step is with the module's own optimizer and the
    trainer's gradient clipping; the last one is Lightning's. To first order this follows the mean gradient plus
    the gradient of the inner products between the domains' gradients. Momentum and Adam's moments see
    every step; learning-rate schedules, ``global_step`` and the hooks around the optimizer see one per batch,
    but for LPFT's. A batch with one domain is a plain step of which ε is kept. Mix the domains in every batch.
    Rows of unknown domain (-1) are one more domain; domains without a labelled row take no step.

    Under DDP the gradient of each domain's step is the mean over that domain's rows on all processes,
    whichever of them hold it.

    Source: Shi et al. 2022, arXiv 2104.09937 (algorithm 1); there, each domain has its own batch. As in
    DomainBed, the optimizer's state goes on from batch to batch. Taken literally, ``epsilon=0`` would
    never learn: here it is training without the defense.

    Args:
        epsilon: ε, the share of the way that is kept.
        domain_key: Where a batch holds its rows' domains: a dict key or a tuple index.
        label_key: Where a batch may hold its rows' classes, in the same way; it need not.
        seed: Of the domains' order.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if gradients are accumulated or scaled
            (fp16), or another defense moves the weights too; at the first batch, if there are no domains.
    """

    place = "first"
    cost = 1.31

    def __init__(
        self,
        epsilon: float = 0.5,
        domain_key: str | int = "domain",
        label_key: str | int = "labels",
        seed: int = 0,
    ) -> None:
        super().__init__(domain_key, label_key)
        self.epsilon = expect("epsilon", epsilon, at_least=0, at_most=1)
        self.seed = seed
        self._start: list[tuple[Tensor, Tensor]] = []
        self._hook: RemovableHandle | None = None
        self._inside = False

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        check_alone(self)
        if self.epsilon == 0:
            return
        check_inner_gradients(self, pl_module)
        _check_trainer(trainer)
        # Not in Lightning's on_train_batch_end: what others do there (averaging the weights) is to see θ + ε(θ̃ − θ).
        self._hook = trainer.optimizers[0].register_step_post_hook(self._interpolate)

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if self.epsilon == 0:
            return step(batch)
        domains = self.read_domains(batch)
        sizes = self.sizes(batch, domains)
        shares = self._shares(sizes)
        if not shares:  # no label in the batch
            return step(batch)
        self._start = [(p, p.detach().clone()) for p in self._weights()]
        rows = {domain: (domains == domain) & (sizes[domain] > 0) for domain in shares}
        *others, last = shares
        try:
            for domain in others:
                self._step(step, batch, rows[domain], shares[domain])
            return self._loss(step, batch, rows[last], shares[last] * self.chain.trainer.world_size)
        except BaseException:  # a skipped batch among them: no optimizer step follows
            self._put_back()
            raise

    def _weights(self) -> list[nn.Parameter]:
        groups = self.chain.trainer.optimizers[0].param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _shares(self, mine: Counter[int]) -> dict[int, float]:
        """The domains in their order, the same on all processes, each with the share of its rows that is here."""
        seed = self.chain.generator(self.seed, torch.device("cpu")).initial_seed()
        everyone: list[Any] = [(mine, seed)]
        if self.chain.trainer.world_size > 1:
            everyone *= self.chain.trainer.world_size
            torch.distributed.all_gather_object(everyone, (mine, seed))
        total: Counter[int] = sum((counts for counts, _ in everyone), Counter())
        present = sorted(total)
        order = torch.randperm(len(present), generator=torch.Generator().manual_seed(everyone[0][1]))
        return {domain: mine[domain] / total[domain] for domain in (present[i] for i in order.tolist())}

    def _loss(self, step: Step, batch: Batch, here: Tensor, share: float) -> Tensor:
        """The mean loss of the rows that are ``here``, times ``share``; of another row and 0 where there are none."""
        if bool(here.all()):
            return step(batch) if share == 1 else step(batch) * share
        if not bool(here.any()):
            labelled = labelled_rows(batch, self.label_key)
            other = torch.tensor([0]) if labelled is None else labelled.int().argmax().reshape(1)
            with self.chain.perturbing(), self.chain.on_rows(other):
                return step(take_rows(batch, other)) * 0.0
        rows = torch.nonzero(here).flatten()
        with self.chain.on_rows(rows):
            loss = step(take_rows(batch, rows))
        return loss if share == 1 else loss * share

    def _step(self, step: Step, batch: Batch, here: Tensor, share: float) -> None:
        trainer, weights = self.chain.trainer, self._weights()
        optimizer = trainer.optimizers[0]
        found = inner_gradients(self.chain, self._loss(step, batch, here, share), weights)
        for weight, gradient in zip(weights, found, strict=True):
            if gradient is not None and trainer.world_size > 1:
                torch.distributed.all_reduce(gradient)
            weight.grad = gradient
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LPFT):
                callback.on_before_optimizer_step(trainer, self.chain.module, optimizer)
        self.chain.module.configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        )
        self._inside = True
        try:
            optimizer.step()
        finally:
            self._inside = False
        optimizer.zero_grad()

    def _interpolate(self, *_: Any) -> None:
        if self._inside or not self._start:
            return
        weights, starts = [p for p, _ in self._start], [start for _, start in self._start]
        self._start = []
        with torch.no_grad():
            torch._foreach_lerp_(starts, weights, self.epsilon)
            torch._foreach_copy_(weights, starts)

    def _put_back(self) -> None:
        for weight, start in self._start:
            weight.data.copy_(start)
        self._start = []

    def _unwrap(self) -> None:
        self._put_back()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        super()._unwrap()


def _check_trainer(trainer: Trainer) -> None:
    accumulates = trainer.accumulate_grad_batches > 1 or any(
        isinstance(c, GradientAccumulationScheduler) and c.going_to_accumulate_grad_batches()
        for c in trainer.callbacks  # type: ignore[attr-defined]
    )
    faults = {
        "accumulate_grad_batches=1": accumulates,
        "precision bf16-mixed or 32-true instead of fp16 with a gradient scaler": getattr(
            trainer.precision_plugin, "scaler", None
        )
        is not None,
        "an optimizer that computes one gradient per step, not LBFGS": isinstance(
            trainer.optimizers[0], torch.optim.LBFGS
        ),
        "one process or DDP": trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy),
    }
    found = [needed for needed, missing in faults.items() if missing]
    if found:
        raise ConfigError(
            f"Expected a Trainer with {'; '.join(found)}, because Fish takes several optimizer steps per batch. "
            "Change it, or leave Fish out."
        )
