"""R3F: the same predictions under small random noise."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.consistency import ConsistencyDefense
from lightning_robust.errors import ConfigError, did_you_mean

Noise = Literal["uniform", "normal"]


class R3F(ConsistencyDefense):
    """Minimise L(e) + weight · symKL(f(e), f(e + z)), z random noise, no ascent.

    z is uniform in ±epsilon or N(0, epsilon²), drawn for each element. symKL is KL in both directions, added.

    Source: Aghajanyan et al. 2020, arXiv 2008.03156. Its code adds noise to special tokens and padding, too,
    and the noisy pass gives the embeddings no gradient; here it does. Noise of 1e-5 needs embeddings in float32: in
    bfloat16 (``bf16-true``, not ``bf16-mixed``) most of it is rounded away, of which fit warns.

    Args:
        weight: Of symKL (λ); 0 is training without the defense.
        epsilon: Half the width, or the standard deviation, of the noise; 0 is training without the defense.
        noise: ``uniform`` or ``normal``.
        embeddings: Name of the embedding submodule, where it cannot be found.
        head: Name of the submodule whose output is the logits, where it cannot be found.
        seed: Of the noise.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no embeddings or no logits; at the
            first batch, if there is one class only.
    """

    cost = 1.95

    def __init__(
        self,
        weight: float = 1.0,
        epsilon: float = 1e-5,
        noise: Noise = "uniform",
        embeddings: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight=weight, embeddings=embeddings, head=head, seed=seed)
        self.epsilon = expect("epsilon", epsilon, at_least=0)
        if noise not in get_args(Noise):
            raise ConfigError(
                f"Expected `noise` to be one of {', '.join(get_args(Noise))}, but got {noise!r}."
                f"{did_you_mean(str(noise), get_args(Noise))}"
            )
        self.noise = noise

    @property
    def is_off(self) -> bool:
        return self.epsilon == 0 or super().is_off

    def noise_size(self, embeddings: Tensor) -> float:
        return self.epsilon

    def start(self, embedded: Tensor, mask: Tensor) -> Tensor:
        if self.noise == "normal":
            return self.epsilon * self.normal(embedded, mask)
        generator = self.chain.generator(self.seed, embedded.device)
        drawn = torch.rand(embedded.shape, generator=generator, device=embedded.device, dtype=mask.dtype)
        return self.epsilon * (2 * drawn - 1)
