"""SMART: smoothness-inducing regularization on the worst nearby embeddings."""

from __future__ import annotations

from torch import Tensor

from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.consistency import ConsistencyDefense
from lightning_robust.defenses.perturbation import norm_per_example


class SMART(ConsistencyDefense):
    """Minimise L(e) + weight · symKL(f(e), f(e + δ)), δ by ``num_steps`` normalised ascent steps on symKL.

    δ starts at N(0, ``noise``²) and moves by ``step_size`` along its gradient, divided by that gradient's L2 norm
    per example. symKL is KL in both directions, added.

    Source: Jiang et al. 2020, arXiv 1911.03437. Its code climbs KL(f(e) ‖ f(e + δ)) and divides the gradient by
    each token's largest absolute value; here the steps climb what is minimised and are normalised in L2, and δ is
    as long as noise and steps make it. Its Bregman proximal point part is not included. Noise of 1e-5 needs
    embeddings in float32: in bfloat16 (``bf16-true``, not ``bf16-mixed``) most of it is rounded away, of which fit warns.

    Args:
        weight: Of symKL; 0 is training without the defense.
        num_steps: Ascent steps; each costs one forward pass and a backward pass to the embeddings.
        step_size: Length of one ascent step (L2).
        noise: Standard deviation of the random start; at 0 symKL has no gradient.
        embeddings: Name of the embedding submodule, where it cannot be found.
        head: Name of the submodule whose output is the logits, where it cannot be found.
        seed: Of the random start.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no embeddings or no logits; at the
            first batch, if there is one class only.
    """

    cost = 2.6

    def __init__(
        self,
        weight: float = 1.0,
        num_steps: int = 1,
        step_size: float = 1e-3,
        noise: float = 1e-5,
        embeddings: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        expect("num_steps", num_steps, at_least=1, whole=True)
        super().__init__(weight=weight, num_steps=num_steps, embeddings=embeddings, head=head, seed=seed)
        self.step_size = expect("step_size", step_size, at_least=0)
        self.noise = expect("noise", noise, above=0)

    def noise_size(self, embeddings: Tensor) -> float:
        return self.noise

    def start(self, embedded: Tensor, mask: Tensor) -> Tensor:
        return self.noise * self.normal(embedded, mask)

    def ascend(self, delta: Tensor, gradient: Tensor, embedded: Tensor) -> Tensor:
        return delta + self.step_size * gradient / norm_per_example(gradient)
