"""Writing a model as a folder that plain transformers or PEFT loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_robust import __version__
from lightning_robust.errors import BackboneError, ConfigError
from lightning_robust.modules.loading import hushed

MARKER = "lightning_robust.json"
"""Marks a folder as an export, so that it may be replaced, and tells how the model was made."""


def find_pretrained(module: nn.Module) -> PeftModel | PreTrainedModel:
    """Return the PEFT model that a module holds, or else its Hugging Face model.

    Raises:
        BackboneError: If it holds none, or several.
    """
    outermost: list[nn.Module] = []
    for kind in (PeftModel, PreTrainedModel):
        found = [m for m in module.modules() if isinstance(m, kind)]
        inner = {id(m) for outer in found for m in outer.modules() if m is not outer}
        outermost = [m for m in found if id(m) not in inner]
        if outermost:
            break
    if len(outermost) == 1:
        return outermost[0]
    names = ", ".join(type(m).__name__ for m in outermost) or "none"
    raise BackboneError(
        f"Expected one PEFT or Hugging Face model in {type(module).__name__}, but found {len(outermost)}: {names}."
    )


def export_pretrained(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    *,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write a model and its tokenizer to ``directory``, whole or not at all.

    A PEFT model is written as its adapter, head included; anything else as a full model. Only an empty
    folder or an earlier export is replaced.

    Args:
        model: The model to write.
        tokenizer: Its tokenizer, if there is one.
        directory: The folder to make.
        settings: Plain values to keep beside it, in ``lightning_robust.json``.

    Raises:
        ConfigError: If ``directory`` holds something else, or cannot be written.
    """
    target = Path(directory).expanduser()
    if target.exists() and not _replaceable(target):
        raise ConfigError(
            f"Expected {target} to be empty or an earlier export, but it holds other files, which are left alone."
            " Choose another folder."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"Cannot write to {target.parent}: {error}. Choose another folder.") from error
    try:
        with hushed():
            _write(model, tokenizer, temporary, settings or {})
        _swap(temporary, target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"Cannot write {target}: {error}. Nothing was changed.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the vocabulary grew.
        embeddings = model.get_input_embeddings()
        trained = any(p.requires_grad for p in embeddings.parameters())
        model.save_pretrained(folder, save_embedding_layers=trained)
    else:
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    marker = {"lightning_robust": __version__, **settings}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    # mkdtemp makes folders that only their owner can read.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)


def _replaceable(target: Path) -> bool:
    return target.is_dir() and ((target / MARKER).is_file() or not any(target.iterdir()))


def _swap(temporary: Path, target: Path) -> None:
    """Rename into place; the earlier export is deleted only once the new one stands."""
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
