"""How many items and seeds are needed to see an effect."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_robust.commands.reading import reading
from lightning_robust.errors import ConfigError
from lightning_robust.results.outcomes import Column
from lightning_robust.results.statistics import (
    GUARD,
    MIN_ITEMS,
    Components,
    components,
    minimal_detectable_effect,
    needed_items,
)
from lightning_robust.results.study import Study, columns, load_study, pair

SEEDS = (2, 3, 5, 10, 20)
ITEMS = (100, 200, 500, 1000, 2000, 5000)
KEYS = ("clean", "adv", "ood_mean")


def power(out: Console, options: argparse.Namespace) -> None:
    """Print the effects that sizes of a study can see, and the sizes that ``options.effect`` needs.

    Raises:
        RobustError: If a number makes no sense, or the runs named have no baseline or one seed only.
    """
    for name, value, low, high in (
        ("--effect", options.effect, 0, 100),
        ("--power", options.power, 50, 100),
        ("--changed", options.changed, 0, 100),
        ("--seed-spread", options.seed_spread, -1e-9, 100),
    ):
        if not low < value < high:
            raise ConfigError(f"Expected {name} to be between {max(low, 0)} and {high}, but got {value}.")
    found, notes = _spreads(options)
    for label, parts in found:
        out.print(Text(label))
        out.print(_table(parts, options.power / 100))
        out.print(Text(_sentence(parts, options.effect, options.power)))
        out.print()
    for note in notes:
        out.print(Text(f"Note: {note}"))


def _spreads(options: argparse.Namespace) -> tuple[list[tuple[str, Components]], list[str]]:
    if not options.runs:
        changed = options.changed / 100
        # A change that a defense makes is half the item's (every seed makes it) and half chance.
        assumed = Components(2 * (options.seed_spread / 100) ** 2, changed / 2, changed / 2)
        return [
            (
                f"Assumed: a training run's accuracy varies by {_points(options.seed_spread)} from seed to seed "
                f"(standard deviation), and a defense changes {options.changed:g} % of the answers. Name runs to measure both.",
                assumed,
            )
        ], []
    with reading("Counting") as progress:
        study = load_study(options.runs, baseline=options.baseline, progress=progress)
    found = [_measured(study, column) for column in columns(study) if column.key in KEYS]
    known = [one for one in found if one is not None]
    if not known:
        raise ConfigError(
            f"Expected a defense and its baseline with two seeds or more, {MIN_ITEMS} items or more and some answers "
            "that differ, but no two conditions have them. Without runs the spread is assumed: leave them out."
        )
    return known, study.problems


def _measured(study: Study, column: Column) -> tuple[str, Components] | None:
    """Return the mean of the components over the study's defenses."""
    found = []
    for condition in study.conditions:
        baseline = study.baseline(condition)
        paired = None if baseline is None else pair(condition, baseline, column)
        if paired is None or len(paired.treated) < 2:
            continue
        changes = paired.treated - paired.baseline
        strata = np.zeros(changes.shape[1], int) if paired.strata is None else paired.strata
        # Where nothing changed there is no spread to plan from.
        if np.bincount(strata).min() >= MIN_ITEMS and changes.any():
            found.append(components(changes, paired.strata, guard=GUARD))
    if not found:
        return None
    mean = Components(*(math.fsum(column) / len(found) for column in zip(*found, strict=True)))
    return (
        f"{column.label}: spread as measured, mean of {_count(len(found), 'defense')}; that of seeds as its upper "
        f"{100 * GUARD:.0f} % bound, as a few often agree by luck. Items are counted over all environments."
    ), mean


def _table(parts: Components, power: float) -> Table:
    table = Table(title="Smallest effect that is seen, in points", title_justify="left", title_style="")
    table.add_column("items", justify="right")
    for seeds in SEEDS:
        table.add_column(f"{seeds} seeds", justify="right")
    for items in ITEMS:
        effects = [minimal_detectable_effect(parts, seeds, items, power=power) for seeds in SEEDS]
        table.add_row(f"{items:,}", *(f"{100 * one:.1f}" for one in effects))
    return table


def _sentence(parts: Components, effect: float, power: float) -> str:
    sizes = {seeds: needed_items(parts, effect / 100, seeds, power=power / 100) for seeds in SEEDS}
    enough = [f"{seeds} seeds with {items:,} items" for seeds, items in sizes.items() if items is not None]
    seen = f"An effect of {_points(effect)} is seen with a probability of {power:g} % by"
    if not enough:
        return f"{seen} no number of items with up to {SEEDS[-1]} seeds: training runs differ too much."
    return f"{seen} {_listed(enough)}."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _points(value: float) -> str:
    return f"{value:g} point{'s' if value != 1 else ''}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
