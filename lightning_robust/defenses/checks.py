"""Checks of the defenses' settings."""

from __future__ import annotations

import math
from typing import TypeVar

from lightning_robust.errors import ConfigError

Number = TypeVar("Number", int, float)


def expect(name: str, value: Number, *, at_least: float) -> Number:
    """Return ``value`` if it is a finite number that is not below ``at_least``.

    >>> expect("num_steps", 3, at_least=1)
    3

    Raises:
        ConfigError: Otherwise.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < at_least
    ):
        raise ConfigError(f"Expected `{name}` to be a number >= {at_least}, but got {value!r}.")
    return value
