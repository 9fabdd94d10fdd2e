"""Defenses that keep predictions the same near each input: L + weight · D(f(e), f(e + δ))."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_robust.defenses.base import Batch, Defense, Step
from lightning_robust.defenses.checks import check_inner_gradients, expect
from lightning_robust.defenses.divergences import over_calls, symmetric_kl
from lightning_robust.defenses.head import ClassifierHead, Seen
from lightning_robust.defenses.perturbation import Perturbation, special_token_ids
from lightning_robust.modules.embeddings import input_embeddings


class ConsistencyDefense(Defense):
    """Base of the defenses that add a divergence between clean and perturbed predictions to the loss.

    A subclass says where δ starts (`start`), how it moves (`ascend`, called ``num_steps`` times with the gradient
    of the divergence) and what the divergence is. The clean
    pass is the one whose loss counts; of the perturbed passes only the predictions do. Ascent steps compute no
    gradient of weights; the last pass gives one to all of them, embeddings included, where the papers' code stops
    at the embeddings. Dropout draws anew in each pass, as there.

    Args:
        weight: Of the divergence; 0 is training without the defense.
        num_steps: Ascent steps of δ; each costs one forward pass and a backward pass to the embeddings.
        embeddings: Name of the embedding submodule, where it cannot be found.
        head: Name of the submodule whose output is the logits, where it cannot be found.
        seed: Of the random start.
    """

    aim = "adversarial"
    needs: ClassVar[tuple[str, ...]] = ("embeddings", "logits")
    moves_clean: ClassVar[bool] = True
    """Whether the divergence also moves the clean prediction, or only the perturbed one towards it."""

    def __init__(
        self,
        *,
        weight: float,
        num_steps: int = 0,
        embeddings: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.weight = expect("weight", weight, at_least=0)
        self.num_steps = expect("num_steps", num_steps, at_least=0, whole=True)
        self.embeddings = embeddings
        self.head = head
        self.seed = seed
        self._layer: nn.Module | None = None
        self._head: ClassifierHead | None = None
        self._special: frozenset[int] = frozenset()

    @property
    def is_off(self) -> bool:
        """Whether the settings leave the divergence no effect, so that training is as without the defense."""
        return self.weight == 0

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layer = input_embeddings(pl_module, self.embeddings)
        self._head = ClassifierHead(pl_module, self.head)
        self._special = special_token_ids(pl_module, self._layer)
        if self.num_steps:
            check_inner_gradients(self, pl_module)
        self._check_resolution(getattr(self._layer, "weight", None))

    def _check_resolution(self, weight: object) -> None:
        half = (torch.float16, torch.bfloat16)
        if self.is_off or not isinstance(weight, Tensor) or weight.dtype not in half:
            return
        values = weight.detach().float()
        smallest = float(values.abs().mean()) * torch.finfo(weight.dtype).eps / 2
        noise = self.noise_size(values)
        if noise < smallest:
            rank_zero_warn(
                f"{type(self).__name__} adds noise of {noise:.1g} to embeddings in {weight.dtype}, where less than "
                f"about {smallest:.1g} is rounded away. Train with embeddings in float32 "
                '(precision="bf16-mixed" or "32-true"), or make the noise larger.'
            )

    def noise_size(self, embeddings: Tensor) -> float:
        """Return the size of the entries of the random start; inf where it is always large enough."""
        return math.inf

    def start(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Return the first δ ``(rows, seq, hidden)`` for ``embedded``; ``mask`` ``(rows, seq, 1)`` is applied after."""
        raise NotImplementedError

    def ascend(self, delta: Tensor, gradient: Tensor, embedded: Tensor) -> Tensor:
        """Return δ after one step along ``gradient`` of the divergence."""
        raise NotImplementedError

    def divergence(self, clean: Tensor, moved: Tensor) -> Tensor:
        """Return how far ``moved`` logits ``(rows, classes)`` are from ``clean`` ones: what δ increases."""
        return symmetric_kl(clean, moved)

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if self.is_off:
            return step(batch)
        loss, clean = self._clean(step, batch)
        fixed = Seen({call: logits.detach() for call, logits in clean.logits.items()})
        perturbation = self._perturbation()
        for _ in range(self.num_steps):
            climbed = over_calls(self.divergence, fixed, self._moved(step, batch, perturbation))
            gradients = perturbation.gradients(climbed, retain_graph=False)
            perturbation.move(self.ascend, gradients)
        perturbation.freeze()
        moved = self._moved(step, batch, perturbation)
        return loss + self.weight * over_calls(self.divergence, clean, moved)

    def _clean(self, step: Step, batch: Batch) -> tuple[Tensor, Seen]:
        assert self._head is not None
        with self._head.watch(self.chain) as clean:
            loss = step(batch)
        if self.moves_clean:
            return loss, clean
        if self.is_outermost:  # nothing else will need this graph
            self.chain.backward(loss)
            loss = loss.detach()
        return loss, Seen({call: logits.detach() for call, logits in clean.logits.items()})

    def _perturbation(self) -> Perturbation:
        assert self._layer is not None
        return Perturbation(self.chain, self._layer, self.start, self._special)

    def _moved(self, step: Step, batch: Batch, perturbation: Perturbation) -> Seen:
        assert self._head is not None
        with perturbation.apply(), self._head.watch(self.chain) as moved:
            step(batch)
        return moved

    def normal(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Draw this batch's random start from N(0, 1), in the shape of ``embedded``."""
        generator = self.chain.generator(self.seed, embedded.device)
        return torch.randn(embedded.shape, generator=generator, device=embedded.device, dtype=mask.dtype)
