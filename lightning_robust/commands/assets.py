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
    text = _text(find_asset(name))
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        console.out(text, end="", highlight=False)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}.") from error


def cp(console: Console, name: str, destination: str | None, force: bool) -> None:
    """Copy a recipe or fragment to edit it.

    Raises:
        ConfigError: If the destination exists and ``force`` is not given, or cannot be written.
    """
    from lightning_robust.results.files import write_text

    source = find_asset(name)
    target = Path(destination) if destination else Path(source.name)
    if target.is_dir() or str(destination).endswith("/"):
        target = target / source.name
    if target.exists() and not force:
        raise ConfigError(f"{target} exists. Name another file, or replace it with --force.")
    write_text(target, _text(source))
    console.print(
        f"Copied to {target}. Run it: lightning-robust fit -c {target}", highlight=False, soft_wrap=True
    )
