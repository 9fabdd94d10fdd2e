"""Backbones, the LightningModule around them, and victims."""

from __future__ import annotations

import importlib
import logging
from typing import Any

_NAMES = {
    "Backbone": "lightning_robust.modules.backbone",
    "RobustClassifier": "lightning_robust.modules.classifier",
    "Victim": "lightning_robust.modules.victim",
}
__all__ = list(_NAMES)

# PEFT imports bitsandbytes, which then complains about an optional kernel that is never used here
# (see quantization.finish_quantized).
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in str(record.msg))


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
