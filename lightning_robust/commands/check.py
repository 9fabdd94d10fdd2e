"""All faults of a recipe at once, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_robust.commands.check_settings import check_class, check_keys
from lightning_robust.errors import ConfigError, did_you_mean

_TOP_LEVEL = (
    "seed_everything",
    "trainer",
    "model",
    "data",
    "ckpt_path",
    "weights_only",
    "verbose",
    "optimizer",
    "lr_scheduler",
)


def check_recipe(paths: Sequence[Path]) -> list[str]:
    """Return all faults of the recipe that ``paths``, one behind the other, make up; empty if there are none.

    Checked are the YAML itself, the sections, every class and every setting's name, also of nested ones,
    that required settings are given, and the values of defenses. Other values are checked when they are used.
    """
    faults: list[str] = []
    merged: dict[str, Any] = {}
    for path in paths:
        try:
            loaded = load_yaml(path)
        except ConfigError as error:
            return [str(error)]
        unknown = [str(key) for key in loaded if key not in _TOP_LEVEL]
        faults += [f"{path.name}: there is no section {k!r}.{did_you_mean(k, _TOP_LEVEL)}" for k in unknown]
        merged = merge(merged, loaded)
    for section in ("model", "data"):
        if section in merged:
            faults += check_class(merged[section], section)
    trainer = merged.get("trainer") or {}
    faults += _check_trainer(trainer)
    faults += _check_monitors(trainer.get("callbacks"), alone="model" not in merged)
    return faults


def load_yaml(path: Path) -> dict[str, Any]:
    """Return a recipe's content.

    Raises:
        ConfigError: If it cannot be read or is no mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"Expected {path} to hold sections such as `model:`, but it holds {type(loaded).__name__}."
        )
    return loaded


def merge(base: Any, update: Any) -> Any:
    """Return two recipes merged as the command line does: mappings by key, `key+` appends to a list, the rest replaces."""
    if not isinstance(update, dict):
        return update
    merged = dict(base) if isinstance(base, dict) else {}
    for key, value in update.items():
        if isinstance(key, str) and key.endswith("+"):
            merged[key[:-1]] = [*(merged.get(key[:-1]) or []), *(value or [])]
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def _check_trainer(settings: Mapping[str, Any]) -> Iterator[str]:
    from lightning.pytorch import Trainer

    yield from check_keys(settings, Trainer, "trainer")
    for group in ("callbacks", "logger"):
        given = settings.get(group)
        for number, entry in enumerate(
            given if isinstance(given, list) else [given] if isinstance(given, dict) else []
        ):
            yield from check_class(entry, f"trainer.{group}[{number}]")


def _check_monitors(callbacks: Any, *, alone: bool) -> Iterator[str]:
    """Check that there is one monitor at most, and one where a callback waits for its metrics."""
    from lightning_robust.callbacks.monitor import KEY_PREFIXES

    entries = [entry for entry in callbacks if isinstance(entry, dict)] if isinstance(callbacks, list) else []
    monitors = [e for e in entries if str(e.get("class_path")).endswith("RobustnessMonitor")]
    if len(monitors) > 1:
        yield f"trainer.callbacks: expected one RobustnessMonitor, but got {len(monitors)}."
    for number, entry in enumerate(entries):
        if entry in entries[:number]:
            yield f"trainer.callbacks: {entry.get('class_path')} is there twice with the same settings. Leave one out."
    for entry in entries:
        settings = entry.get("init_args")
        key = settings.get("monitor") if isinstance(settings, dict) else None
        if str(key).startswith(KEY_PREFIXES) and not monitors and not alone:
            yield f"trainer.callbacks: {key!r} is measured by a monitor, and there is none. Add: -c monitor."
