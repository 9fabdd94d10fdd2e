"""Inference defenses by name and settings, as recipes give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning_robust.attacks.oracle import VictimLike
from lightning_robust.defenses import inference
from lightning_robust.defenses.inference.base import InferenceDefense
from lightning_robust.errors import ConfigError, did_you_mean

Wrapper = Callable[[VictimLike], VictimLike]
"""Makes a defended victim of a plain one."""


def get_inference_defense(name: str, **settings: Any) -> Wrapper:
    """Return what puts a defense around a victim.

    >>> get_inference_defense("TestTimeAugmentation", num_copies=2)(print).num_copies
    2

    Args:
        name: Of the class in `lightning_robust.defenses.inference`.
        **settings: Its arguments but the victim.

    Raises:
        ConfigError: If there is no such defense or setting, or a value is wrong.
    """
    cls = inference_defense_class(name)
    known = [one for one in inspect.signature(cls.__init__).parameters if one not in ("self", "victim")]
    for setting in settings:
        if setting not in known:
            raise ConfigError(
                f"Expected settings of {name} to be among {', '.join(known)}, but got {setting!r}."
                f"{did_you_mean(setting, known)}"
            )
    cls.check_settings(**settings)
    return partial(cls, **settings)


def inference_defense_class(name: str) -> type[InferenceDefense]:
    """Return the class behind a name.

    Raises:
        ConfigError: If there is no such defense.
    """
    classes = {
        one.__name__: one
        for one in map(inference.__dict__.get, inference.__all__)
        if inspect.isclass(one) and issubclass(one, InferenceDefense) and not inspect.isabstract(one)
    }
    if name not in classes:
        raise ConfigError(
            f"Expected the `name` of an inference defense, one of {', '.join(classes)}, but got {name!r}."
            f"{did_you_mean(str(name), classes)}"
        )
    return classes[name]


def as_wrapper(spec: Any) -> Wrapper:
    """Return what puts a defense around a victim, from its name, settings with a ``name``, or a function.

    Raises:
        ConfigError: If it is none of these, or unknown.
    """
    if isinstance(spec, str):
        return get_inference_defense(spec)
    if isinstance(spec, Mapping) and "name" in spec:
        return get_inference_defense(**spec)
    if callable(spec) and not isinstance(spec, InferenceDefense):
        wrapper: Wrapper = spec
        return wrapper
    raise ConfigError(
        "Expected an inference defense's name, its settings with a `name`, or a function from a victim to a victim, "
        f"but got {spec!r:.120}."
    )
