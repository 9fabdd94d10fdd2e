"""ls, cp and show."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from lightning_robust.assets import KINDS, find_asset, headline, list_assets
from lightning_robust.errors import ConfigError

_TITLES = {
    "recipes": "Recipes: lightning-robust fit -c NAME",
    "callbacks": "Fragments: put -c NAME behind a recipe",
}


def ls(console: Console) -> None:
    """List recipes and fragments with what each does."""
    for kind in KINDS:
        table = Table(title=_TITLES[kind], title_justify="left", box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True, style="bold")
        table.add_column()
        for name, path in list_assets(kind).items():
            table.add_row(name, headline(path))
        console.print(table)
        console.print()


def show(console: Console, name: str) -> None:
    """Print a recipe or fragment."""
    text = find_asset(name).read_text(encoding="utf-8")
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        console.out(text, end="", highlight=False)


def cp(console: Console, name: str, destination: str | None, force: bool) -> None:
    """Copy a recipe or fragment to edit it.

    Raises:
        ConfigError: If the destination exists and ``force`` is not given, or cannot be written.
    """
    source = find_asset(name)
    target = Path(destination) if destination else Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not force:
        raise ConfigError(f"{target} exists. Name another file, or replace it with --force.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Could not write {target}: {error.strerror or error}.") from error
    console.print(
        f"Copied to {target}. Run it: lightning-robust fit -c {target}", highlight=False, soft_wrap=True
    )
