"""What a checkpoint stores, and the check that it belongs to the module that reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.errors import BackboneError


def stored_keys(module: nn.Module) -> set[str]:
    """Return the state-dict keys that training can change: trainable parameters and buffers.

    A frozen transformer, quantized or not, is read from its own folder again.
    """
    state = set(module.state_dict())
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return state & (trained | {name for name, _ in module.named_buffers(remove_duplicate=False)})


def base_fingerprint(module: nn.Module) -> str:
    """Return a hash of the frozen vectors (norms, biases), or "" where nothing is frozen.

    Adapters fit every model of the same shape; this tells two of them apart without reading them whole.
    Different precisions of one model differ in the part before the colon.
    """
    vectors = [
        parameter
        for name, parameter in sorted(module.named_parameters())
        if not parameter.requires_grad
        and parameter.ndim == 1
        and "original_module" not in name  # PEFT's unused copy of the untrained head
    ]
    if not vectors:
        return ""
    digest = hashlib.sha256()
    for vector in vectors:
        digest.update(vector.detach().float().cpu().numpy().tobytes())
    return f"{'+'.join(sorted({str(v.dtype) for v in vectors}))}:{digest.hexdigest()}"


def same_base(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints agree, or are of different precisions and cannot tell."""
    return fingerprint == other or fingerprint.split(":")[0] != other.split(":")[0]


def check_state(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, same_base: bool, ours: str, theirs: str
) -> None:
    """Check that a checkpoint holds every value that the module needs, in the same shape, and nothing else.

    Args:
        own: What of the module's state dict is stored.
        state: The checkpoint's state dict.
        same_base: Whether the frozen parts are known to agree.
        ours: What the module is, for the message.
        theirs: What the checkpoint is of.

    Raises:
        BackboneError: If it is a checkpoint of another backbone, adaptation or number of labels.
    """
    faults = [f"lacks {key}" for key in sorted(set(own) - set(state))]
    faults += [f"has {key} in excess" for key in sorted(set(state) - set(own))]
    faults += [
        f"has {key} of shape {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(set(own) & set(state))
        if state[key].shape != own[key].shape
    ]
    if not faults and not same_base:
        faults = ["was trained on a frozen transformer with other weights"]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise BackboneError(
            f"Expected a checkpoint of {ours}, but this one is of {theirs}: it {'; '.join(faults[:3])}{more}."
            " Load it with the settings it was trained with."
        )


def random_states() -> list[dict[str, Tensor]]:
    """Return the state of the global generators, one entry per process."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, state)
    return gathered


def restore_random_state(states: list[dict[str, Tensor]], rank: int) -> None:
    """Set the global generators as they were in process ``rank``; does nothing for one that was not there."""
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["torch"].cpu())
    if torch.cuda.is_available() and "cuda" in states[rank]:
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())
