"""Recipes and fragments by bare name, wherever the package is installed."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_robust.errors import ConfigError, did_you_mean

KINDS = ("recipes", "callbacks")


def asset_folder(kind: str) -> Path:
    """Return the folder of ``recipes`` or ``callbacks``: the packaged copy, else the repository's."""
    package = Path(__file__).resolve().parent
    packaged = package / "_assets" / kind
    return packaged if packaged.is_dir() else package.parent / kind


def list_assets(kind: str) -> dict[str, Path]:
    """Return files of ``recipes`` or ``callbacks`` by bare name, such as ``sentiment/freelb``."""
    root = asset_folder(kind)
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_asset(name: str) -> Path:
    """Return the file that ``name`` stands for: a path, or the bare name of a recipe or fragment.

    Raises:
        ConfigError: If there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {key: file for kind in KINDS for key, file in list_assets(kind).items()}
    bare = name.removesuffix(".yaml")
    if bare in known:
        return known[bare]
    is_path = path.suffix in (".yaml", ".yml") or name.startswith((".", os.sep))
    what = f"the file {name}, but it does not exist" if is_path else f"a recipe or fragment, but got {name!r}"
    raise ConfigError(
        f"Expected {what}.{did_you_mean(bare, known)} There are: {', '.join(known)}. "
        "`lightning-robust ls` says what each does."
    )


def headline(path: Path) -> str:
    """Return a YAML file's first comment line: what it does."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
