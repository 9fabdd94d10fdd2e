"""Finding the classification head and the linear layers of any Hugging Face classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_robust.errors import BackboneError, did_you_mean


def head_modules(model: PreTrainedModel) -> list[str]:
    """Return the dotted names of the modules that make up the classification head.

    They are the modules with parameters outside the transformer itself, and its pooler: a pooler feeds
    nothing but the head, and many pretrained checkpoints come without weights for it.

    Raises:
        BackboneError: If the model has no head of its own.
    """
    prefix = model.base_model_prefix
    names = [
        name
        for name, child in model.named_children()
        if name != prefix and any(True for _ in child.parameters())
    ]
    if not hasattr(model, prefix) or not names:
        raise BackboneError(
            f"Expected a transformer with a classification head, but {type(model).__name__} has"
            f" {', '.join(name for name, _ in model.named_children())}. Use a model that"
            " AutoModelForSequenceClassification supports."
        )
    poolers = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.")
        and name.endswith(".pooler")
        and any(True for _ in module.parameters())
    ]
    return poolers + names


def block_linears(model: PreTrainedModel) -> list[str]:
    """Return the names of all linear layers of the transformer blocks: what LoRA and quantization act on.

    Blocks are whatever stands in a ``nn.ModuleList``; where there is none, every linear layer outside the
    head counts.
    """
    heads = tuple(f"{name}." for name in head_modules(model))
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not f"{name}.".startswith(heads)
    ]
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return [name for name in linears if name.startswith(blocks)] or linears


def lora_targets(model: PreTrainedModel, wanted: Sequence[str] | None = None) -> list[str]:
    """Return the full names of the linear layers that get an adapter.

    Args:
        model: The model, not yet wrapped.
        wanted: Names or endings of names (``"q_proj"``, ``"attn.c_proj"``); by default every linear layer
            of the transformer blocks. The head is never among them: it is trained as a whole.

    Raises:
        BackboneError: If a wanted name matches nothing; it lists the names there are.
    """
    available = block_linears(model)
    if wanted is None:
        if available:
            return available
        raise BackboneError(
            f"Expected linear layers to adapt with LoRA, but {type(model).__name__} has none outside its head."
            ' Use adaptation="full" or "head".'
        )
    short = sorted({name.rpartition(".")[2] for name in available})
    if not wanted:
        raise BackboneError(
            f"Expected `lora_targets` to name layers, but got []. There are: {', '.join(short)}."
        )
    for target in wanted:
        if not any(_ends_with(name, target) for name in available):
            raise BackboneError(
                f"Expected `lora_targets` to name linear layers of {type(model).__name__}, but {target!r} matches"
                f" none.{did_you_mean(target, [*short, *available])} There are: {', '.join(short) or 'none'}."
            )
    return [name for name in available if any(_ends_with(name, target) for target in wanted)]


def keep_in_float32(module: nn.Module) -> None:
    """Turn a head into float32 and make it accept whatever dtype the transformer hands over.

    A step of a small learning rate is lost in bfloat16's 8 bits, so what trains stays in float32.
    """
    module.float()
    module.register_forward_pre_hook(_inputs_to_float32, with_kwargs=False)


def _inputs_to_float32(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in inputs)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
