"""All defenses of one fit, nested around one module's training step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from lightning_robust.defenses.checks import check_trainable
from lightning_robust.defenses.tracing import StepTrace, _restore_attribute
from lightning_robust.errors import ConfigError

if TYPE_CHECKING:
    from lightning_robust.defenses.base import Defense

Batch = Any
Step = Callable[[Batch], Tensor]


class _SkipBatch(Exception):
    """The user's step returned None: Lightning's way to skip a batch."""


class DefenseChain:
    """All defenses of one fit around one module's ``training_step``."""

    def __init__(self, trainer: Trainer, module: LightningModule, defenses: list[Defense]) -> None:
        self.trainer = trainer
        self.module = module
        # Those that have hooks only are no part of the nesting.
        wrapping = [defense for defense in defenses if defense.wraps_step]
        self.defenses = sorted(wrapping, key=lambda d: ("data", "first", "anywhere", "last").index(d.place))
        self.batch: Batch = None
        """What the user's step is being called on."""
        self.calls = 0
        """How many times the user's step was called, this call included."""
        self.row_stack: list[Tensor] = []
        self._whole: Batch = None
        self._perturbations = 0
        self._installed = False
        self._shadowed: Any = None
        self._held_back: list[tuple[torch.nn.Parameter, Tensor]] = []
        self._backed = False
        names = ", ".join(type(defense).__name__ for defense in defenses)
        check_trainable(module, names)
        if self._scaler is None and any(p.dtype == torch.float16 for p in self._trainable()):
            raise ConfigError(
                f"Expected float16 weights to be trained with a loss scaler, but the trainer's precision is "
                f"{trainer.precision}. Without one, the gradients that defenses ({names}) take vanish: use "
                'precision="16-mixed", "bf16-mixed" or "32-true".'
            )

    def install(self) -> None:
        """Put the defenses around the module's ``training_step``."""
        if not self.defenses:
            return
        original = self.module.training_step

        @functools.wraps(original)
        def training_step(batch: Batch, *args: Any, **kwargs: Any) -> Any:
            return self._run(lambda b: original(b, *args, **kwargs), batch)

        self._shadowed = self.module.__dict__.get("training_step")
        self.module.__dict__["training_step"] = training_step
        self._installed = True

    def restore(self) -> None:
        """Give the module its own ``training_step`` back; may be called again."""
        if self._installed:
            _restore_attribute(self.module, "training_step", self._shadowed)
            self._installed = False
            self._held_back = []

    def _run(self, user_step: Callable[[Batch], Any], batch: Batch) -> Any:
        trace = StepTrace(self.module)
        self._whole = batch
        self._backed, self._held_back = False, []
        # On the first of the batches that are accumulated, Lightning zeroes what is there after this step.
        accumulates = self.trainer.fit_loop.batch_idx % self.trainer.accumulate_grad_batches != 0
        accumulated = [(p, p.grad if accumulates else None) for p in self._trainable()]

        def innermost(b: Batch) -> Tensor:
            plain = not self._perturbations and (b is self._whole or bool(self.row_stack))
            rows = None if not self.row_stack else self._absolute_rows(0).tolist()
            outer, self.batch = self.batch, b
            self.calls += 1
            try:
                with trace.call(plain=plain, rows=rows) as keep:
                    # A copy: steps that pop entries would not find them at the next call.
                    output = user_step(copy.copy(b) if isinstance(b, Mapping | list) else b)
                    keep(output)
            finally:
                self.batch = outer
            if output is None:
                raise _SkipBatch
            return self._loss_of(output)

        step: Step = innermost
        for defense in reversed(self.defenses):
            step = functools.partial(defense.training_loss, step)
        try:
            loss = step(batch)
        except _SkipBatch:
            trace.close()
            return None
        finally:
            self._stash_gradients(accumulated)
            self.row_stack, self._perturbations, self.batch, self._whole = [], 0, None, None
        output = trace.close()
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _loss_of(self, output: Any) -> Tensor:
        loss = output.get("loss") if isinstance(output, dict) else output
        if isinstance(loss, Tensor):
            return loss
        there = (
            f"a dict with {', '.join(map(str, output))}"
            if isinstance(output, dict)
            else type(output).__name__
        )
        raise ConfigError(
            f"Expected {type(self.module).__name__}.training_step to return a loss tensor or a dict with `loss`, "
            f"but got {there}."
        )

    # Rows and perturbations ---------------------------------------------------------------------

    @contextmanager
    def on_rows(self, rows: Tensor) -> Iterator[None]:
        """Say that calls inside this context are on ``rows`` ``(n,)`` of the batch that is being handled.

        Perturbations that were made for the whole batch then apply to these rows, and what is logged
        counts as a part of one pass.
        """
        self.row_stack.append(rows.cpu())
        try:
            yield
        finally:
            self.row_stack.pop()

    @contextmanager
    def replacing(self, batch: Batch) -> Iterator[None]:
        """Say that inside this context ``batch`` stands for the one that was loaded: a call on it is a plain pass."""
        whole, self._whole = self._whole, batch
        try:
            yield
        finally:
            self._whole = whole

    @contextmanager
    def perturbing(self) -> Iterator[None]:
        """Say that calls inside this context see a perturbed model or input: they are no plain passes."""
        self._perturbations += 1
        try:
            yield
        finally:
            self._perturbations -= 1

    @property
    def perturbations(self) -> int:
        """How many `perturbing` contexts are open."""
        return self._perturbations

    def _absolute_rows(self, depth: int) -> Tensor:
        rows = self.row_stack[depth]
        for inner in self.row_stack[depth + 1 :]:
            rows = rows[inner]
        return rows

    def rows_since(self, depth: int) -> tuple[int, ...] | None:
        """Rows of the current call, relative to the batch handled ``depth`` splits deep; None: all of it."""
        return tuple(self._absolute_rows(depth).tolist()) if len(self.row_stack) > depth else None

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """A generator for this training batch and rank: the same after a resume, apart from the global one."""
        trainer = self.trainer
        mixed = 0
        for part in (seed, trainer.current_epoch, trainer.fit_loop.batch_idx, trainer.global_rank):
            mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 1)
        return torch.Generator(device).manual_seed(mixed)

    # Gradients of extra passes ------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a part of this batch's loss now, so that its graph need not be kept.

        Only for the outermost defense. The gradients join those of the loss that Lightning
        back-propagates: Lightning zeroes gradients between the training step and its backward, so
        they are held back until then.
        """
        if not self._backed:
            for parameter in self._trainable():
                parameter.grad = None
            self._backed = True
        loss = loss / self.trainer.accumulate_grad_batches
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        strategy = self.trainer.strategy
        local = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        with local, torch.autocast(loss.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]

    def _stash_gradients(self, accumulated: list[tuple[torch.nn.Parameter, Tensor | None]]) -> None:
        if self._backed:
            self._held_back = [(p, p.grad) for p, _ in accumulated if p.grad is not None]
            for parameter, gradient in accumulated:
                parameter.grad = gradient

    def release_gradients(self) -> None:
        """Add the gradients of the early backward passes; called right before Lightning's own backward."""
        held_back, self._held_back = self._held_back, []
        for parameter, gradient in held_back:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)

    @property
    def loss_scale(self) -> float:
        """What a loss in float16 is multiplied with before its gradient is taken; 1 elsewhere."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]
