"""Two runs, or two sets of seeds, side by side in the terminal."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_robust.commands.reading import reading
from lightning_robust.errors import ConfigError
from lightning_robust.results.outcomes import Column
from lightning_robust.results.problems import different_attacks, named
from lightning_robust.results.report.measures import final
from lightning_robust.results.selection import WORDS, Rule
from lightning_robust.results.statistics import Effect, accuracy, effect, holm, transfer_verdict
from lightning_robust.results.study import Condition, Paired, Study, columns, load_study, pair
from lightning_robust.results.summaries import like_for_like
from lightning_robust.results.transfer import AIMS, is_collapsed


def compare(out: Console, options: argparse.Namespace) -> None:
    """Print what changes from ``options.baseline`` to ``options.treated``, paired by item and seed.

    Raises:
        RobustError: If either is not one condition, or they have nothing in common.
    """
    (before, study), (after, other) = _one(options.baseline), _one(options.treated)
    notes = _notes(before, after)
    before, after = _paired_by_seed(before, after)
    both = Study([before, after])
    notes += [*like_for_like(both.conditions), *different_attacks(both)]
    found = [(column, pair(after, before, column, options.select)) for column in columns(both)]
    pairs = [(column, paired) for column, paired in found if paired is not None]
    dropped = [column.label for column, paired in found if paired is None]
    if not pairs:
        raise ConfigError(
            "Expected runs that measured something in common, but these have no item in common."
        )
    names = [_name(options.baseline, before), _name(options.treated, after)]
    seeds = max(len(paired.treated) for _, paired in pairs)
    out.print(Text(f"A  {names[0]}\nB  {names[1]}\n{_basis(seeds, options.select)}"))
    table, reasons = _table(pairs, seeds)
    out.print(table)
    notes += reasons
    out.print(Text(_majorities(after, [column for column, _ in pairs], options.select)))
    collapsed = [
        name
        for condition, name in zip((before, after), names, strict=True)
        if is_collapsed(condition, options.select)
    ]
    for name in collapsed:
        out.print(Text(f"{name} is hardly better on clean items than a constant answer: what it gains "
                       "under attack is that of a constant answer."))  # fmt: skip
    if collapsed:
        out.print(Text("No verdict on transfer: a constant answer is not robust."))
    else:
        out.print(Text(_verdict({column.key: paired for column, paired in pairs}, after, options.margin)))
    if dropped:
        notes.append(f"Not in the table, as A and B have no items in common there: {named(dropped, 20)}.")
    for problem in dict.fromkeys([*notes, *study.problems, *other.problems]):
        out.print(Text(f"Note: {problem}"))


def _one(path: Path) -> tuple[Condition, Study]:
    with reading("Comparing") as progress:
        study = load_study(path, progress=progress)
    if len(study.conditions) != 1:
        found = ", ".join(condition.name for condition in study.conditions)
        raise ConfigError(
            f"Expected {path} to be one run, or runs that differ in seeds only, but it holds: {found}. Name the "
            "folder of one, or make a report of all: lightning-robust report."
        )
    return study.conditions[0], study


def _paired_by_seed(before: Condition, after: Condition) -> tuple[Condition, Condition]:
    """Forget seeds that the two do not share: their runs are then paired in order."""
    if set(before.seeds) & set(after.seeds):
        return before, after
    forgotten = [replace(one, runs=[replace(run, seed=None) for run in one.runs]) for one in (before, after)]
    return forgotten[0], forgotten[1]


def _notes(before: Condition, after: Condition) -> list[str]:
    """Say which runs are the same, and whether they are paired by seed."""
    found, ids = [], {run.run_id for run in before.runs if run.run_id}
    same = [run.name for run in after.runs if run.run_id in ids]
    if same:
        found.append(f"A and B share {named(same)}: a run does not differ from itself.")
    if None in before.seeds or None in after.seeds:
        found.append("Not all seeds are known: runs are paired in order.")
    elif not set(before.seeds) & set(after.seeds):
        found.append(
            f"A and B have no seed in common ({_seeds(before)}; {_seeds(after)}): runs are paired in order."
        )
    elif set(before.seeds) != set(after.seeds):
        found.append(
            f"Only runs of seeds that A and B share are compared ({_seeds(before)}; {_seeds(after)})."
        )
    return found


def _seeds(condition: Condition) -> str:
    return ", ".join(str(seed) for seed in condition.seeds)


def _name(path: Path, condition: Condition) -> str:
    runs = len(condition.runs)
    return f"{condition.name} ({path})" + (f", {runs} seeds" if runs > 1 else "")


def _basis(seeds: int, rule: Rule) -> str:
    if seeds == 1:
        scope = "One training run each: intervals are about these two runs, not about the method."
    else:
        scope = f"{seeds} pairs of training runs: intervals are about the method, over seeds and items."
    return f"{scope} {WORDS[rule]}"


def _table(pairs: list[tuple[Column, Paired]], seeds: int) -> tuple[Table, list[str]]:
    """Return the comparison, and why some of its numbers are absent or are of fewer runs than the others."""
    notes = []
    effects = [effect(paired.treated, paired.baseline, strata=paired.strata) for _, paired in pairs]
    adjusted = holm([one.p_value for one in effects])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("accuracy, %")
    for heading in ("A", "B", "B - A, points", "p (Holm)", "items"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (column, paired), change, p in zip(pairs, effects, adjusted.tolist(), strict=True):
        if not change.known:
            notes.append(f"{column.label}: no interval, as {change.reason}.")
        elif change.num_seeds < seeds:
            notes.append(
                f"{column.label}: of {change.num_seeds} of {seeds} pairs of runs only, as others did not measure it."
            )
        levels = [accuracy(side, strata=paired.strata) for side in (paired.baseline, paired.treated)]
        table.add_row(
            Text(column.label),
            *(_level(one) for one in levels),
            _interval(change),
            _p_value(p) if change.known else "",
            f"{change.num_items:,}",
            end_section=column.key == "clean",
            style="bold" if change.known and p < 0.05 else "",
        )
    return table, notes


def _majorities(condition: Condition, columns: list[Column], rule: Rule) -> str:
    shares: dict[str, list[str]] = {}
    for column in columns:
        score = final(condition, column, rule)
        if score is not None:
            shares.setdefault(f"{100 * score.majority:.1f}", []).append(column.label)
    told = "; ".join(f"{share} ({named(labels, 20)})" for share, labels in shares.items())
    return f"Always answering the most frequent label would score {told}."


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _interval(change: Effect) -> str:
    if not change.known:
        return "–"
    return f"{100 * change.delta:+.1f}\n[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def _level(one: Effect) -> str:
    return f"{100 * one.delta:.1f}\n[{100 * one.low:.1f}, {100 * one.high:.1f}]" if one.known else ""


def _verdict(pairs: dict[str, Paired], after: Condition, margin: float) -> str:
    aim = AIMS.get(after.aim)
    if aim is None or not {"adv", "ood_mean"} <= pairs.keys():
        return "No verdict on transfer: B needs defenses of one aim, and both adversarial and OOD accuracy."
    adv, ood = pairs["adv"], pairs["ood_mean"]
    found = transfer_verdict(
        (adv.treated, adv.baseline),
        (ood.treated, ood.baseline),
        aim=aim,
        margin=margin / 100,
        adv_strata=adv.strata,
        ood_strata=ood.strata,
    )
    target, other = ("adversarial", "OOD") if aim == "adv" else ("OOD", "adversarial")
    needed = found.needed
    more = (
        f" At least about {needed.num_seeds} seeds and {needed.num_items:,} items are needed."
        if needed
        else ""
    )
    reason = f" ({found.reason})" if found.reason else ""
    return f"Transfer from {target} to {other} robustness: {found.label}{reason}.{more}"
