"""What an evaluation found, as a table on the terminal beside Lightning's progress bars."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from lightning_robust.callbacks.context import live_bar
from lightning_robust.results import Record, groups
from lightning_robust.results.statistics import Effect, accuracy
from lightning_robust.results.tables import (
    Group as Part,
)
from lightning_robust.results.tables import (
    Parts,
    answers_constantly,
    change,
    headline,
    headline_attacks,
    paired_change,
    worst_case,
)

# Columns below which numbers move together, and below which intervals go to a line of their own.
_CLOSE, _NARROW = 72, 56
_CONSTANT = (
    "The first evaluation was hardly better on clean items than a constant answer, which no attack changes: changes "
    "since then say little."
)


class Row(NamedTuple):
    """One line: an accuracy, and its change since the first evaluation, where there was one."""

    name: str
    accuracy: Effect
    change: Effect | None


class Terminal(Console):
    """A console that does not end the process when nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def show_evaluation(
    trainer: Trainer,
    progress: bool | None,
    predictor: str,
    records: Sequence[Record],
    reference: Sequence[Record] | None = None,
) -> None:
    """Print an evaluation as a table on a terminal, else as one line into the log; for rank zero.

    Args:
        trainer: Which has just evaluated.
        progress: None for a table on a terminal only, False for none, True for one anywhere.
        predictor: Name of the defended predictor; empty for the plain one.
        records: Of the evaluation.
        reference: See `rows`.
    """
    title = f"Epoch {trainer.current_epoch}, accuracy{f' of {predictor}' if predictor else ''}"
    bar = live_bar(trainer)
    console = _console(bar, progress)
    if console is not None:
        constant = reference is not None and answers_constantly(groups(reference))
        _print(console, render(title, rows(records, reference), console.width, _CONSTANT if constant else ""))
        return
    scores = headline(groups(records))
    line = f"{title}: {' · '.join(f'{kind} {score.accuracy:.3f}' for kind, score in scores.items())}"
    if bar is None:
        rank_zero_info(line)
    else:
        # Written past the bar, it would be drawn over.
        bar.console.print(line, highlight=False)


def rows(records: Sequence[Record], reference: Sequence[Record] | None = None) -> list[Row]:
    """Return a line for each part of an evaluation, called as in the metrics' keys.

    Args:
        records: Of the evaluation.
        reference: Of the run's first evaluation, which changes are counted from; None leaves them out.
    """
    after, before = groups(records), None if reference is None else groups(reference)
    found = [
        _row(_key(kind, name), group, None if before is None else before.get((kind, name)))
        for (kind, name), group in after.items()
        if kind in ("clean", "attack")
    ]
    attacks = headline_attacks(after)
    if len(attacks) > 1:
        survived = list(worst_case(attacks.values()).values())
        found.append(Row("adv (worst case)", accuracy(survived), _change(before, after, "adv")))
    for kind in ("adversarial", "ood"):
        members = {name: group for (its_kind, name), group in after.items() if its_kind == kind}
        found += [
            _row(_key(kind, name), group, None if before is None else before.get((kind, name)))
            for name, group in members.items()
        ]
        if len(members) > 1 and not (kind == "adversarial" and attacks):
            found.append(_mean(kind, list(members.values()), before, after))
    return found


def render(title: str, found: Sequence[Row], width: int = 80, note: str = "") -> RenderableType:
    """Return lines as a table for a terminal of that many columns, and a note below.

    Names and title are shown as they are, without markup and control characters.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        title=_plain(title),
        title_justify="left",
        title_style="bold",
        padding=(0, 0 if width < _CLOSE else 1),
        pad_edge=False,
        show_edge=False,
    )
    space = "\n" if width < _NARROW else " "
    changes = any(row.change is not None for row in found)
    table.add_column("", overflow="fold", min_width=8)
    table.add_column("accuracy, %", no_wrap=True, justify="right")
    if changes:
        table.add_column("change, points", no_wrap=True, justify="right")
    table.add_column("items", no_wrap=True, justify="right")
    for row in found:
        cells = [_plain(row.name), _plain(_with_interval(row.accuracy, "{:.1f}", space), space)]
        if changes:
            changed = "" if row.change is None else _with_interval(row.change, "{:+.1f}", space)
            cells.append(_plain(changed, space))
        table.add_row(*cells, _plain(f"{row.accuracy.num_items:,}"))
    caption = _plain(_caption(found))
    caption.stylize("dim")
    return Group(table, caption, *([Text(note, style="yellow")] if note else []), "")


def _console(bar: Progress | None, progress: bool | None) -> Console | None:
    """Return where a table is shown: where the rich bar on the screen is, else on the first terminal."""
    if progress is False:
        return None
    consoles: list[Console] = [Terminal(), Terminal(stderr=True)] if bar is None else [bar.console]
    seen = [console for console in consoles if console.is_terminal]
    return next(iter(seen), consoles[-1] if progress else None)


def _print(console: Console, table: RenderableType) -> None:
    """Print above the progress bars: tqdm's are cleared for it and drawn again, rich sees to its own."""
    # A terminal that is gone, or that cannot spell a name, is no reason to end a training.
    with suppress(OSError, UnicodeError), Tqdm.external_write_mode(file=console.file):
        console.print(table)


def _row(name: str, group: Part, before: Part | None) -> Row:
    changed = None if before is None else paired_change([(worst_case([before]), worst_case([group]))])
    return Row(name, accuracy(group.correct), changed)


def _mean(kind: str, members: Sequence[Part], before: Parts | None, after: Parts) -> Row:
    correct = [right for group in members for right in group.correct.tolist()]
    strata = [number for number, group in enumerate(members) for _ in group.correct]
    measure = "adv" if kind == "adversarial" else kind
    return Row(f"{measure} (mean)", accuracy(correct, strata=strata), _change(before, after, measure))


def _change(before: Parts | None, after: Parts, measure: str) -> Effect | None:
    return None if before is None else change(before, after, measure)


def _key(kind: str, name: str) -> str:
    prefix = {"attack": "adv/", "adversarial": "adv/", "ood": "ood/"}.get(kind)
    return kind if prefix is None else prefix + name


def _with_interval(one: Effect, number: str, space: str) -> str:
    if not one.num_items:
        return "no common items"
    low, high = (number.format(100 * end) for end in (one.low, one.high))
    interval = f"[{low}, {high}]" if one.known else "no interval"
    return f"{number.format(100 * one.delta)}{space}{interval}"


def _caption(found: Sequence[Row]) -> str:
    """Return what the intervals are of, or why there are none."""
    effects = [one for row in found for one in (row.accuracy, row.change) if one is not None]
    known = [f"95 % intervals of {one.scope}" for one in effects if one.known][:1]
    changed = (
        ["changes since the first evaluation, paired by item"]
        if any(row.change is not None for row in found)
        else []
    )
    reasons = dict.fromkeys(one.reason for one in effects if one.reason and one.num_items)
    absent = [f"no interval where {reason}" for reason in reasons]
    return "; ".join([*known, *changed, *absent])


def _plain(text: str, space: str = " ") -> Text:
    shown = (one if one.isprintable() or one == space else "\N{REPLACEMENT CHARACTER}" for one in text)
    return Text("".join(shown))
