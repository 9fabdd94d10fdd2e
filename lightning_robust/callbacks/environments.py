"""The environments that a monitor evaluates: those it was given, or the data module's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_robust.data.environments import as_environments
from lightning_robust.data.items import Environment, Role
from lightning_robust.errors import ConfigError


def find_environments(trainer: Trainer, sources: Mapping[Role, Any]) -> list[Environment]:
    """Return the environments of ``sources`` by role; where there are none, the data module's.

    Args:
        trainer: Set up with its module and, where there is one, its data module.
        sources: The monitor's arguments `clean`, `ood` and `adversarial`.

    Raises:
        ConfigError: Where there is nothing to evaluate, or two environments share a name.
    """
    found: list[Environment] = []
    label_names = trainer.lightning_module.hparams.get("label_names")
    for role, given in sources.items():
        named = {"clean": given} if role == "clean" and given is not None else given
        for name, source in (named or {}).items():
            found += as_environments(source, name, role, label_names)
    if found:
        _check_names(found)
        return found
    environments = getattr(getattr(trainer, "datamodule", None), "environments", None)
    if not callable(environments):
        raise ConfigError(
            "RobustnessMonitor has nothing to evaluate. Give it items: RobustnessMonitor(clean=[(text, "
            'label), ...], ood={"name": ...}), or use a data module with `environments()`.'
        )
    return list(environments().values())


def _check_names(environments: Sequence[Environment]) -> None:
    names = [(one.role, one.name) for one in environments]
    twice = sorted({name for role, name in names if names.count((role, name)) > 1})
    if twice:
        raise ConfigError(f"Expected environments with different names, but got {', '.join(twice)} twice.")
