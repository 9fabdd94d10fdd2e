"""Progress bars for evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_robust.attacks.base import AttackResult

Show = Callable[[AttackResult], None]


@contextmanager
def attack_progress(name: str, total: int, show: bool | None) -> Iterator[Show]:
    """Yield a function that takes each result into a transient bar.

    Args:
        name: The attack's name.
        total: How many results to expect.
        show: Whether to show the bar; None shows it on a terminal.
    """
    counts = {"finished": 0, "robust": 0, "queries": 0}
    with _bar(name, total, show) as update:

        def advance(result: AttackResult) -> None:
            counts["finished"] += 1
            counts["robust"] += result.status == "failed"
            counts["queries"] += result.queries
            accuracy = counts["robust"] / counts["finished"]
            update(1, f"accuracy under attack {accuracy:.3f} · {counts['queries']} queries")

        yield advance


@contextmanager
def item_progress(name: str, total: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves a transient bar on by a number of items."""
    with _bar(name, total, show) as update:
        yield lambda number: update(number, "")


@contextmanager
def _bar(name: str, total: int, show: bool | None) -> Iterator[Callable[[int, str], None]]:
    def ignore(number: int, note: str) -> None:
        """Show nothing."""

    if show is False:
        yield ignore
        return
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if show is None and not console.is_terminal:
        yield ignore
        return
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[note]}"), TimeRemainingColumn()]
    # In a log file only the last state is written, so it stays.
    bar = Progress(*columns, console=console, transient=console.is_terminal)
    try:
        bar.start()
    except LiveError:
        # Another rich bar is on the screen, and there can be only one.
        yield ignore
        return
    task = bar.add_task(name, total=total, note="")
    try:
        yield lambda number, note: bar.update(task, advance=number, note=note)
    finally:
        bar.stop()
