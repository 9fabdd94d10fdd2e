"""Finding the input embeddings of any module."""

from __future__ import annotations

from torch import nn

from lightning_robust.errors import ConfigError, did_you_mean


def input_embeddings(module: nn.Module, name: str | None = None) -> nn.Module:
    """Return the submodule that turns token ids into embeddings ``(batch, seq, hidden)``.

    Hugging Face models (also inside PEFT) name theirs; any other module may hold exactly one
    ``nn.Embedding``.

    Args:
        module: The module to search, for instance a LightningModule.
        name: Dotted name of the submodule, where it cannot be found.

    Raises:
        ConfigError: If ``name`` does not exist, or nothing or more than one candidate is found.
    """
    modules: dict[str, nn.Module] = dict(module.named_modules())
    if name is not None:
        if name in modules:
            return modules[name]
        raise ConfigError(
            f"Expected `embeddings` to name a submodule of {type(module).__name__}, but got {name!r}."
            f"{did_you_mean(name, modules)} Embedding layers there are: {_list(_embedding_names(modules))}."
        )
    found = {id(layer): layer for layer in map(_from_hugging_face, modules.values()) if layer is not None}
    if not found:
        found = {id(modules[n]): modules[n] for n in _embedding_names(modules)}
    if len(found) == 1:
        return next(iter(found.values()))
    raise ConfigError(
        f"Expected one input embedding layer in {type(module).__name__}, but found {len(found)}: "
        f'{_list(_embedding_names(modules))}. Name it: embeddings="path.to.submodule".'
    )


def _from_hugging_face(module: nn.Module) -> nn.Module | None:
    getter = getattr(module, "get_input_embeddings", None)
    if not callable(getter):
        return None
    try:
        layer = getter()
    except (NotImplementedError, AttributeError):
        return None
    return layer if isinstance(layer, nn.Module) else None


def _embedding_names(modules: dict[str, nn.Module]) -> list[str]:
    return [name for name, layer in modules.items() if isinstance(layer, nn.Embedding)]


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"
