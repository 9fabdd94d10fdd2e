"""8-bit and 4-bit weights through bitsandbytes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lightning_robust.errors import BackboneError

Quantization = Literal["none", "8bit", "4bit"]


def quantization_config(
    quantization: Quantization, dtype: torch.dtype, keep: Sequence[str]
) -> BitsAndBytesConfig:
    """Return the configuration for NF4 (arXiv 2305.14314) or LLM.int8 (arXiv 2208.07339) weights.

    The outlier threshold of LLM.int8 is 0: outlier columns are found over a whole batch, so that every text's
    logits would depend on its neighbours (by 1e-2 on a 6-layer Llama). What is left is rare: noise of 1e-7
    between batch shapes that tips a rounding to 8 bits (3e-3 in one of 64 texts). 4-bit has neither.

    Args:
        quantization: ``"8bit"`` or ``"4bit"``.
        dtype: What 4-bit weights are multiplied in.
        keep: Names of modules that stay as they are: the head.

    Raises:
        BackboneError: If bitsandbytes is missing or cannot run here.
    """
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise BackboneError(
            f"Expected bitsandbytes for quantization={quantization!r}, but it cannot be imported: {error}."
            ' Install it with: pip install "bitsandbytes>=0.49", or set quantization: none.'
        ) from error
    # It warns at every forward pass of every 8-bit layer.
    _say_once("bitsandbytes.autograd._functions")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=list(keep))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(keep),
    )


def quantized_device() -> str:
    """Return where quantized weights are put at once: this process's GPU, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def finish_quantized(model: PreTrainedModel) -> None:
    """Freeze the quantized weights and keep one way of computing for training and evaluation.

    On CPUs with AVX-512 bitsandbytes repacks 4-bit weights at the first call in eval mode. That path asserts
    that a layer's width is a multiple of 32, which not all are, and rounds differently from training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if is_quantized_linear(module):
            module.requires_grad_(False)


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' layers (told by name, so that it need not be imported)."""
    return any(cls.__name__ in ("Linear4bit", "Linear8bitLt") for cls in type(module).__mro__)


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.msg not in self.seen
        self.seen.add(str(record.msg))
        return new


def _say_once(name: str) -> None:
    logger = logging.getLogger(name)
    if not any(isinstance(f, _Once) for f in logger.filters):
        logger.addFilter(_Once())
