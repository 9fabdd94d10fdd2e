"""Simulated studies whose true effects are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats


class World(NamedTuple):
    """What accuracies are made of, on the logit scale.

    Items differ in difficulty (``item``) and in how a defense changes them (``change``), training runs in luck
    (``seed``); the rest is a single answer's logistic noise.
    """

    level: float = 0.5
    gain: float = 0.0
    item: float = 1.5
    change: float = 0.5
    seed: float = 0.15

    def effect(self) -> float:
        """The true difference in accuracy, over all items and seeds."""
        rng = np.random.default_rng(12)
        draws = rng.normal(size=(3, 1_000_000))
        before = self.level + draws[0] * self.item + draws[1] * self.seed
        after = before + self.gain + draws[2] * self.change
        return float(np.mean(stats.logistic.cdf(after) - stats.logistic.cdf(before)))

    def runs(self, rng: np.random.Generator, num_seeds: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``(treated, baseline)``, each bool ``(seeds, items)``."""
        items = self.level + rng.normal(0, self.item, num_items)
        changed = items + self.gain + rng.normal(0, self.change, num_items)

        def answers(logits: np.ndarray) -> np.ndarray:
            luck = rng.normal(0, self.seed, (num_seeds, 1))
            return logits + luck + rng.logistic(size=(num_seeds, num_items)) > 0

        return answers(changed), answers(items)
