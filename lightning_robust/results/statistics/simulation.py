"""Studies whose true effects are known: to check estimates, and to plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from lightning_robust.results.statistics.crossed import Floats
from lightning_robust.results.statistics.effects import Bools


class Simulation(NamedTuple):
    """What right and wrong answers are made of, on the logit scale.

    Args:
        level: Mean of the baseline's logits of a right answer.
        item: How much items differ in difficulty (standard deviation, as the two below).
        change: How differently a defense changes single items.
        seed: How much training runs differ by luck.
    """

    level: float = 0.5
    item: float = 1.5
    change: float = 0.5
    seed: float = 0.15

    def answers(
        self,
        rng: np.random.Generator,
        gains: Sequence[float],
        num_seeds: int,
        num_items: int,
        luck: Floats | None = None,
    ) -> tuple[Bools, Floats]:
        """Return simulated answers and the luck of each training run.

        Args:
            rng: Where randomness comes from.
            gains: Of each defense, in logits.
            num_seeds: Training runs of the baseline and of each defense.
            num_items: Answered by all of them.
            luck: Of the same training runs on other items; by default drawn.

        Returns:
            Right or wrong, ``(1 + defenses, seeds, items)``, the baseline first; and the luck, ``(1 + defenses,
            seeds)``, in logits.
        """
        difficulty = self.level + rng.normal(0, self.item, num_items)
        changed = np.array(
            [difficulty, *(difficulty + g + rng.normal(0, self.change, num_items) for g in gains)]
        )
        luck = rng.normal(0, self.seed, (len(changed), num_seeds)) if luck is None else luck
        logits = changed[:, None, :] + luck[:, :, None]
        return rng.logistic(size=logits.shape) < logits, luck

    def accuracy(self, gain: float | None = None, luck: float | None = None) -> float:
        """Return the true accuracy over all items.

        Args:
            gain: Of a defense, in logits; None for the baseline.
            luck: Of one training run; by default the mean over all.
        """
        spread = self.item**2 + (0.0 if gain is None else self.change**2)
        spread += self.seed**2 if luck is None else 0.0
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        logits = self.level + (gain or 0.0) + (luck or 0.0) + spread**0.5 * nodes
        return float(weights @ stats.logistic.cdf(logits) / weights.sum())

    def effect(self, gain: float) -> float:
        """Return a defense's true effect on accuracy, over all items and training runs."""
        return self.accuracy(gain) - self.accuracy()
