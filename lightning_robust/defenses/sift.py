"""SIFT: SMART on layer-normalised embeddings, whatever their scale."""

from __future__ import annotations

from torch import Tensor

from lightning_robust.defenses.perturbation import norm_per_example
from lightning_robust.defenses.smart import SMART

_EPSILON = 1e-7  # of the normalisation, as in DeBERTa: rows of zeros stay finite


class SIFT(SMART):
    """Minimise L(e) + weight · symKL(f(e), f(e + σ·δ)), δ by normalised ascent, σ each token's standard deviation.

    δ moves the layer-normalised embedding (e − μ) / σ, with μ and σ over a token's hidden dimensions, and is mapped
    back: the model gets μ + σ · ((e − μ) / σ + δ) = e + σ · δ. So a step is as large relative to the embeddings
    in any model, and clean passes, the weights and inference stay as they are. δ starts at N(0, ``noise``²) and
    moves by ``step_size`` along its gradient, divided by that gradient's L2 norm per example.

    Source: He et al. 2021, arXiv 2006.03654. Its code leaves the normalisation in front of the model's own, cuts
    the noise at two standard deviations, divides the gradient by each token's largest absolute value, and stops
    the gradients of the probabilities that symKL weighs by; here symKL is differentiated whole.

    Args:
        weight: Of symKL; 0 is training without the defense.
        num_steps: Ascent steps; each costs one forward pass and a backward pass to the embeddings.
        step_size: Length of one ascent step of δ (L2), in standard deviations of the embeddings.
        noise: Standard deviation of the random start, in the same unit.
        embeddings: Name of the embedding submodule, where it cannot be found.
        head: Name of the submodule whose output is the logits, where it cannot be found.
        seed: Of the random start.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no embeddings or no logits; at the
            first batch, if there is one class only.
    """

    cost = 2.62

    def __init__(
        self,
        weight: float = 1.0,
        num_steps: int = 1,
        step_size: float = 1e-4,
        noise: float = 1e-2,
        embeddings: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight, num_steps, step_size, noise, embeddings, head, seed)

    def noise_size(self, embeddings: Tensor) -> float:
        return self.noise * float(embeddings.std())

    def start(self, embedded: Tensor, mask: Tensor) -> Tensor:
        return _deviation(embedded, mask) * super().start(embedded, mask)

    def ascend(self, delta: Tensor, gradient: Tensor, embedded: Tensor) -> Tensor:
        deviation = _deviation(embedded, delta)
        gradient = deviation * gradient  # with respect to the δ of the normalised embedding
        return delta + deviation * self.step_size * gradient / norm_per_example(gradient)


def _deviation(embedded: Tensor, like: Tensor) -> Tensor:
    variance = embedded.to(like.dtype).var(-1, correction=0, keepdim=True)
    deviation: Tensor = (variance + _EPSILON).sqrt()
    return deviation
