"""What a reader must know before believing a study's numbers, in sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_robust.results.outcomes import known_labels
from lightning_robust.results.pairing import seed_pairs
from lightning_robust.results.parts import Items, Key

if TYPE_CHECKING:
    from lightning_robust.results.conditions import Run
    from lightning_robust.results.study import Study

_SHOWN = 5


def problems_of(study: Study) -> list[str]:
    """Return sentences on runs that stopped early, seeds, baselines, and what was not measured alike."""
    return [
        *_stopped(study.runs),
        *_unread(study.runs),
        *_seeds(study),
        *_baselines(study),
        *_absent(study.runs),
        *different_attacks(study),
        *_items(study),
        *_constant(study.runs),
    ]


def _stopped(runs: Sequence[Run]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for run in runs:
        epochs = [one.epoch for one in run.evaluations if one.epoch is not None]
        planned, finished = run.info.get("max_epochs"), bool(run.info.get("finished"))
        if not epochs or "max_epochs" not in run.info:
            continue
        last = 1 + max(epochs + [epoch for epoch in run.lost if epoch is not None])
        short = isinstance(planned, int) and 0 < last < planned and None not in run.lost
        if short or not finished:
            how = "Stopped early" if finished else "Not finished (run.json has no `finished`)"
            of = f" of {planned}" if short else ""
            found.setdefault(
                f"{how}, last evaluated after {last}{of} epoch{'s' if short or last != 1 else ''}", []
            ).append(run.name)
    for what, names in found.items():
        yield f"{what}, counted as they are: {named(names)}."


def _unread(runs: Sequence[Run]) -> Iterator[str]:
    """Tell of runs whose last evaluation is in a file that cannot be read: another one stands in for it."""
    found: dict[tuple[str, int], list[str]] = {}
    for run in runs:
        epochs = [one.epoch for one in run.evaluations if one.epoch is not None]
        if not epochs or not run.lost:
            continue
        read, lost = max(epochs), max([epoch for epoch in run.lost if epoch is not None], default=-1)
        if lost > read:
            found.setdefault((f"is that of epoch {lost}, which", read), []).append(run.name)
        elif None in run.lost and read + 1 != run.info.get("max_epochs"):
            found.setdefault(("may be in a file that", read), []).append(run.name)
    for (which, read), names in found.items():
        yield f"The last evaluation of {named(names)} {which} could not be read; that of epoch {read} stands in for it."


def _seeds(study: Study) -> Iterator[str]:
    single = [one.name for one in study.conditions if len(one.runs) == 1]
    if single:
        yield (
            f"One seed only: {named(single)}. What is said of {'it' if len(single) == 1 else 'them'} is about a "
            "training run, not about the method."
        )
    for condition in study.conditions:
        baseline = study.baseline(condition)
        if baseline is None:
            continue
        if None in condition.seeds or None in baseline.seeds:
            if len(condition.runs) + len(baseline.runs) > 2:
                yield f"{condition.name} and {baseline.name}: not all seeds are known; runs are paired in order."
            if len(condition.runs) == len(baseline.runs):
                continue
        pairs = seed_pairs(condition, baseline)
        paired = {run for both in pairs for run in both}
        left = [run.name for run in condition.runs if run not in paired]
        if not pairs:
            yield f"{condition.name} and {baseline.name} have no seed in common: they are not compared."
        elif left:
            yield f"{condition.name}: {named(left)} left out of comparisons, as {baseline.name} has no such run."


def _baselines(study: Study) -> Iterator[str]:
    seen = set()
    for condition in study.conditions:
        place = (condition.backbone, condition.stage)
        if place in seen or study.baseline(condition) is not None:
            continue
        others = [one for one in study.conditions if (one.backbone, one.stage) == place]
        if len(others) < 2 or any(study.baseline(one) is not None for one in others):
            continue
        seen.add(place)
        names = [one.name for one in study.candidates(condition)]
        on = f" on {condition.backbone}" if condition.backbone else ""
        if names:
            yield f"Which condition{on} is the baseline cannot be told. Name one (--baseline NAME): {named(names, 20)}."
        else:
            yield (
                f"No condition{on} is without defenses: {named([one.name for one in others])} have nothing to be "
                "compared with. Add a run without defenses, or name a baseline (--baseline NAME)."
            )


def _absent(runs: Sequence[Run]) -> Iterator[str]:
    kinds = {"adversarial": ("attack", "adversarial"), "OOD": ("ood",), "clean": ("clean",)}
    for name, members in kinds.items():
        lacking = [
            run.name for run in runs if not any(kind in members for kind, _ in run.evaluations[-1].parts)
        ]
        what = "no clean items" if name == "clean" else f"no {name} environment"
        what += " or attack" if name == "adversarial" else ""
        if len(lacking) == len(runs):
            yield f"The last evaluations hold {what}: nothing can be said about it."
        elif lacking:
            yield f"The last evaluation of {named(lacking)} holds {what}."


def different_attacks(study: Study) -> Iterator[str]:
    """Tell of attacks that ran with other settings or budgets in one condition than in another of its backbone."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for condition in study.conditions:
        groups.setdefault((condition.backbone, condition.stage), []).extend(condition.runs)
    for runs in groups.values():
        known = [run for run in runs if isinstance(run.info.get("attacks"), dict) and run.info["attacks"]]
        for name in dict.fromkeys(name for run in known for name in run.info["attacks"]):
            settings = [(run, run.info["attacks"][name]) for run in known if name in run.info["attacks"]]
            keys = dict.fromkeys(key for _, one in settings if isinstance(one, dict) for key in one)
            for key in keys:
                values = [(run, one.get(key) if isinstance(one, dict) else None) for run, one in settings]
                yield from _differ(f"Attack {name}: `{key}`", values)
        for budget in ("query_budget", "total_query_budget", "time_budget"):
            yield from _differ(f"Attacks: `{budget}`", [(run, run.info.get(budget)) for run in known])


def _differ(what: str, values: Sequence[tuple[Run, object]]) -> Iterator[str]:
    by_value: dict[str, list[str]] = {}
    for run, value in values:
        by_value.setdefault(json.dumps(value, sort_keys=True, default=str), []).append(run.name)
    if len(by_value) > 1:
        parts = [f"{value} in {named(names, 2)}" for value, names in by_value.items()]
        yield (
            f"{what} is {'; '.join(parts)}. A weaker attack leaves more items right: what these runs have under "
            "attack must not be compared."
        )


def _items(study: Study) -> Iterator[str]:
    """Compare every condition's items with its baseline's and tell of parts on which all do not agree."""
    parts: dict[Key, dict[Items, list[Run]]] = {}
    for run in study.runs:
        for key, part in run.evaluations[-1].parts.items():
            parts.setdefault(key, {}).setdefault(part.items, []).append(run)
    for key, by_items in parts.items():
        measured = sum(len(runs) for runs in by_items.values())
        if len(by_items) > 1:
            yield from _different_items(key, list(by_items), measured, study.min_items)
        elif len(next(iter(by_items))) < study.min_items:
            few = len(next(iter(by_items)))
            yield f"{title(key)}: {few} items; below {study.min_items} nothing is estimated."
        if measured < len(study.runs):
            having = {run for runs in by_items.values() for run in runs}
            lacking = [run.name for run in study.runs if run not in having]
            if any(
                kind == key[0]
                for run in study.runs
                if run not in having
                for kind, _ in run.evaluations[-1].parts
            ):
                yield f"{title(key)}: not measured in the last evaluation of {named(lacking)}."


def _different_items(key: Key, different: list[Items], measured: int, least: int) -> Iterator[str]:
    labels = known_labels(different)
    common = set(different[0].ids).intersection(*(one.ids for one in different[1:]))
    doubtful = {i for i, known in labels.items() if len(known) > 1}
    if doubtful:
        yield (
            f"{title(key)}: {len(doubtful)} items have different labels in different runs, such as "
            f"{min(doubtful)!r}; they are left out of comparisons of these runs."
        )
    usable = len(common - doubtful)
    if usable < len(labels):
        few = f" Below {least} nothing is estimated." if usable < least else ""
        yield (
            f"{title(key)}: {measured} runs on different items: {usable} items are common to all, "
            f"{len(labels) - usable} are not. Each comparison keeps the items that its runs share.{few}"
        )


def _constant(runs: Sequence[Run]) -> Iterator[str]:
    found: dict[tuple[Key, str], list[str]] = {}
    for run in runs:
        for key, part in run.evaluations[-1].parts.items():
            if part.accuracy in (0.0, 1.0):
                found.setdefault((key, "right" if part.accuracy else "wrong"), []).append(run.name)
    for (key, word), names in found.items():
        yield f"{title(key)}: every item is {word} in the last evaluation of {named(names)}."


def title(key: Key) -> str:
    """Return what a part is called in a sentence."""
    kind, name = key
    return (
        "Clean items" if kind == "clean" else f"{kind.upper() if kind == 'ood' else kind.capitalize()} {name}"
    )


def named(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Return names for a sentence, not more than ``shown`` of them."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
