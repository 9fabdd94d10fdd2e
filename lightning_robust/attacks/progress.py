"""A progress bar for attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    if show is False:
        yield _ignore
        return
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, force_terminal=show)
    if show is None and not console.is_terminal:
        yield _ignore
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("accuracy under attack {task.fields[accuracy]:.3f} · {task.fields[queries]} queries"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    try:
        bar.start()
    except LiveError:
        # A trainer's own rich bar is on the screen, and there can be only one.
        yield _ignore
        return
    task = bar.add_task(name, total=total, accuracy=1.0, queries=0)
    counts = {"finished": 0, "robust": 0, "queries": 0}

    def advance(result: AttackResult) -> None:
        counts["finished"] += 1
        counts["robust"] += result.status == "failed"
        counts["queries"] += result.queries
        accuracy = counts["robust"] / counts["finished"]
        bar.update(task, advance=1, accuracy=accuracy, queries=counts["queries"])

    try:
        yield advance
    finally:
        bar.stop()


def _ignore(_result: AttackResult) -> None:
    """Show nothing."""
