"""ALUM (virtual adversarial training): the prediction's most sensitive direction."""

from __future__ import annotations

from torch import Tensor

from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.consistency import ConsistencyDefense
from lightning_robust.defenses.divergences import kl
from lightning_robust.defenses.perturbation import norm_per_example


class ALUM(ConsistencyDefense):
    """Minimise L(e) + weight · KL(f(e) ‖ f(e + δ)), δ = epsilon · g / ‖g‖, g = ∇KL(f(e) ‖ f(e + xi·d)).

    d is a random direction of unit length: one power iteration towards the direction in which the prediction
    changes fastest. ‖·‖ is the L2 norm per example over (seq, hidden). f(e) is a fixed target of KL: the
    divergence moves the perturbed prediction only, and no labels are used.

    Virtual adversarial training (VAT) is its older name. Source: Miyato et al. 2017, arXiv 1704.03976, whose rule,
    with the fixed target, this is, on embeddings; and Liu et al. 2020, arXiv 2004.08994. There δ starts at small
    noise, takes K projected steps in an L∞ ball, and in the code KL(f(e + δ) ‖ f(e)) with fixed f(e + δ) is added.

    Args:
        weight: Of KL; 0 is training without the defense.
        epsilon: Length of δ (L2); 0 is training without the defense.
        xi: Length at which the random direction is probed (L2).
        embeddings: Name of the embedding submodule, where it cannot be found.
        head: Name of the submodule whose output is the logits, where it cannot be found.
        seed: Of the random direction.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no embeddings or no logits; at the
            first batch, if there is one class only.
    """

    moves_clean = False
    cost = 2.63

    def __init__(
        self,
        weight: float = 1.0,
        epsilon: float = 1.0,
        xi: float = 0.1,
        embeddings: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight=weight, num_steps=1, embeddings=embeddings, head=head, seed=seed)
        self.epsilon = expect("epsilon", epsilon, at_least=0)
        self.xi = expect("xi", xi, above=0)

    @property
    def is_off(self) -> bool:
        return self.epsilon == 0 or super().is_off

    def start(self, embedded: Tensor, mask: Tensor) -> Tensor:
        direction = self.normal(embedded, mask) * mask
        return self.xi * direction / norm_per_example(direction)

    def ascend(self, delta: Tensor, gradient: Tensor, embedded: Tensor) -> Tensor:
        return self.epsilon * gradient / norm_per_example(gradient)

    def divergence(self, clean: Tensor, moved: Tensor) -> Tensor:
        return kl(clean, moved)
