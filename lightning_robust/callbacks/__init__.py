"""Lightning callbacks that measure and keep; the defenses are in `lightning_robust.defenses`."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "AdapterCheckpoint": "lightning_robust.callbacks.adapter_checkpoint",
    "RobustnessMonitor": "lightning_robust.callbacks.monitor",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
