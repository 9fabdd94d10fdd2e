"""TRADES: the loss on clean inputs, and the same predictions on the worst nearby ones."""

from __future__ import annotations

from torch import Tensor

from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.consistency import ConsistencyDefense
from lightning_robust.defenses.divergences import kl
from lightning_robust.defenses.perturbation import norm_per_example, project_l2


class TRADES(ConsistencyDefense):
    """Minimise L(e) + weight · KL(f(e) ‖ f(e + δ)), δ by K steps of projected ascent on the same KL.

    δ starts at N(0, ``noise``²) and takes steps δ ← Π(δ + step_size · g / ‖g‖). ‖·‖ is the L2 norm per example
    over (seq, hidden), and Π projects onto the ball of radius epsilon. KL's gradient moves both predictions.

    Source: Zhang et al. 2019, arXiv 1901.08573, on images: steps along the gradient's sign in an L∞ ball. Its code
    ascends without dropout; here the ascent is in the mode of training.

    Args:
        weight: Of KL (β); 0 is training without the defense.
        num_steps: K, ascent steps; each costs one forward pass and a backward pass to the embeddings.
        step_size: Length of one ascent step (L2).
        epsilon: Radius of the L2 ball that δ is kept in; 0 is training without the defense.
        noise: Standard deviation of the random start; at 0 KL has no gradient.
        embeddings: Name of the embedding submodule, where it cannot be found.
        head: Name of the submodule whose output is the logits, where it cannot be found.
        seed: Of the random start.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no embeddings or no logits; at the
            first batch, if there is one class only.
    """

    cost = 3.91

    def __init__(
        self,
        weight: float = 1.0,
        num_steps: int = 3,
        step_size: float = 0.3,
        epsilon: float = 1.0,
        noise: float = 1e-3,
        embeddings: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        expect("num_steps", num_steps, at_least=1, whole=True)
        super().__init__(weight=weight, num_steps=num_steps, embeddings=embeddings, head=head, seed=seed)
        self.step_size = expect("step_size", step_size, at_least=0)
        self.epsilon = expect("epsilon", epsilon, at_least=0)
        self.noise = expect("noise", noise, above=0)

    @property
    def is_off(self) -> bool:
        return self.epsilon == 0 or super().is_off

    def noise_size(self, embeddings: Tensor) -> float:
        return self.noise

    def start(self, embedded: Tensor, mask: Tensor) -> Tensor:
        return project_l2(self.noise * self.normal(embedded, mask) * mask, self.epsilon)

    def ascend(self, delta: Tensor, gradient: Tensor, embedded: Tensor) -> Tensor:
        return project_l2(delta + self.step_size * gradient / norm_per_example(gradient), self.epsilon)

    def divergence(self, clean: Tensor, moved: Tensor) -> Tensor:
        return kl(clean, moved)
