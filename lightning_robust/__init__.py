"""Train language-model classifiers that are robust, and prove it.

Names are imported on first use, so that ``import lightning_robust`` stays fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "Backbone": "lightning_robust.modules.backbone",
    "RobustClassifier": "lightning_robust.modules.classifier",
    "Victim": "lightning_robust.modules.victim",
    "TextDataModule": "lightning_robust.data.datamodule",
    "TextSource": "lightning_robust.data.sources",
    "RobustnessMonitor": "lightning_robust.callbacks.monitor",
    "AdapterCheckpoint": "lightning_robust.callbacks.adapter_checkpoint",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
