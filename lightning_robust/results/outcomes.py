"""Values of evaluations in the columns that conditions are compared in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_robust.results.parts import Bools, Evaluated, Items, Key, Part
from lightning_robust.results.tables import NON_TEXT_ATTACKS, Score

Floats = NDArray[np.float64]
Positions = NDArray[np.int64]
Keep = Callable[[Items], Bools]


class Column(NamedTuple):
    """A measure that conditions are compared in.

    Args:
        key: ``clean``, ``attack/<name>``, ``adversarial/<name>``, ``ood/<name>``, or a summary: ``adv`` (right
            under every text attack; without attacks the macro mean of the static adversarial environments),
            ``adv_mean`` (an item's mean over the text attacks) or ``ood_mean`` (macro mean of the environments).
            Attacks on several environments are summarised in each, and the environments' macro mean is taken.
        label: For people.
        kind: What kind of robustness it measures.
        summary: Whether it is made from other columns.
    """

    key: str
    label: str
    kind: Literal["clean", "adv", "ood"]
    summary: bool = False


class Outcomes(NamedTuple):
    """Values of several evaluations on the items that all of them have.

    Args:
        ids: ``(items,)``; where there are strata, an id may be in several.
        labels: ``(items,)``.
        values: ``(evaluations, items)``: right or wrong, or shares between 0 and 1.
        strata: ``(items,)``: each item's environment, for macro means; None where there is one.
        dropped: Items that not all evaluations have, or whose labels differ.
    """

    ids: tuple[str, ...]
    labels: NDArray[np.int32]
    values: Floats
    strata: Positions | None
    dropped: int


CLEAN = Column("clean", "Clean", "clean")
ADV = Column("adv", "Adversarial", "adv", True)
ADV_MEAN = Column("adv_mean", "Attacks (mean)", "adv", True)
OOD_MEAN = Column("ood_mean", "OOD (mean)", "ood", True)


def columns_of(keys: Sequence[Key], several: bool) -> list[Column]:
    """Return the columns that parts of these kinds and names fill: clean, adversarial and OOD ones.

    Args:
        keys: Of all parts.
        several: Whether there is a summary of several attacks, whose mean and worst case differ.
    """
    names = {kind: [n for k, n in keys if k == kind] for kind in ("clean", "attack", "adversarial", "ood")}
    every = [name for group in names.values() for name in group]

    def column(kind: str, name: str) -> Column:
        shown = "OOD" if kind == "ood" else kind
        label = name if every.count(name) == 1 else f"{name} ({shown})"
        return Column(f"{kind}/{name}", label, "ood" if kind == "ood" else "adv")

    found = [CLEAN] if names["clean"] else []
    found += [ADV] if names["attack"] or names["adversarial"] else []
    found += [ADV_MEAN] if several else []
    found += [column(kind, name) for kind in ("attack", "adversarial") for name in names[kind]]
    found += [OOD_MEAN] if names["ood"] else []
    return found + [column("ood", name) for name in names["ood"]]


def combine(evaluated: Sequence[Evaluated], column: Column, keep: Keep | None = None) -> Outcomes | None:
    """Return the values of evaluations in one column, on the attacks, environments and items that all of them have.

    Args:
        evaluated: One or more.
        column: What to compare.
        keep: Returns ``(items,)``, which of the items count; by default all.

    Returns:
        None where not all of them measured it, or no item is left.
    """
    if not evaluated:
        return None
    keep = None if keep is everything else keep
    parts = [[[one.parts[key] for key in keys] for one in evaluated] for keys in made_from(evaluated, column)]
    found = [_stratum(rows, column.key == "adv_mean", keep) for rows in parts]
    strata = [one for one in found if len(one.ids)]
    dropped = sum(one.dropped for one in found)
    if len(strata) < 2:
        return strata[0]._replace(dropped=dropped) if strata else None
    sizes = [len(one.ids) for one in strata]
    return Outcomes(
        tuple(i for one in strata for i in one.ids),
        np.concatenate([one.labels for one in strata]),
        np.concatenate([one.values for one in strata], axis=1),
        np.repeat(np.arange(len(strata)), sizes),
        dropped,
    )


def measured(evaluated: Evaluated, column: Column) -> bool:
    """Return whether an evaluation has anything that a column is made from."""
    return bool(made_from([evaluated], column))


def made_from(evaluated: Sequence[Evaluated], column: Column) -> list[list[Key]]:
    """Return the parts that a column is made from in evaluations that stand side by side.

    Returns:
        Groups that count equally, each of one environment, or of the attacks on one. None of them where an evaluation
        lacks one that a summary is to be made from: over fewer attacks it would be another measure.
    """
    first = evaluated[0].parts
    parts = {key: part for key, part in first.items() if all(key in one.parts for one in evaluated)}
    side = {"adv": "adv", "adv_mean": "adv", "ood_mean": "ood"}.get(column.key, "")
    asked = [one.shared[side] for one in evaluated if side in one.shared]
    if asked:
        wanted = frozenset.intersection(*asked)
        parts = {key: parts[key] for key in parts if key in wanted} if wanted <= parts.keys() else {}
    return _strata(parts, column.key)


def everything(items: Items) -> Bools:
    """Keep all items."""
    return np.ones(len(items), dtype=bool)


def scores(evaluated: Evaluated, keep: Keep | None = None) -> dict[str, Score]:
    """Return the scores ``clean``, ``adv`` and ``ood``, those of them that were measured.

    The numbers are those of `lightning_robust.results.metrics`.
    """
    found = {}
    for name, column in (("clean", CLEAN), ("adv", ADV), ("ood", OOD_MEAN)):
        outcomes = combine([evaluated], column, keep)
        if outcomes is not None:
            found[name] = _score(outcomes)
    return found


def _score(outcomes: Outcomes) -> Score:
    strata = np.zeros(len(outcomes.ids), np.int64) if outcomes.strata is None else outcomes.strata
    sizes = np.bincount(strata)
    accuracy = (np.bincount(strata, outcomes.values[0]) / sizes).mean()
    most = [np.unique(outcomes.labels[strata == k], return_counts=True)[1].max() for k in range(len(sizes))]
    return Score(float(accuracy), len(outcomes.ids), float((most / sizes).mean()))


def _headline(parts: Mapping[Key, Part]) -> list[list[Key]]:
    """Return the attacks that summaries are made from, by environment: those on texts, else whatever ran."""
    attacks = {key: part for key, part in parts.items() if key[0] == "attack"}
    names = {key: key[1].removesuffix(f" on {part.environment}") for key, part in attacks.items()}
    found: dict[str, list[Key]] = {}
    for key in [key for key in attacks if names[key] not in NON_TEXT_ATTACKS] or list(attacks):
        found.setdefault(attacks[key].environment, []).append(key)
    return list(found.values())


def _strata(parts: Mapping[Key, Part], column: str) -> list[list[Key]]:
    """Return the parts that a column is made from: groups that count equally, each of one part or several attacks."""
    attacks = _headline(parts)
    if column in ("adv", "adv_mean") and attacks:
        return attacks
    if column in ("adv", "ood_mean"):
        kind = "adversarial" if column == "adv" else "ood"
        return [[key] for key in parts if key[0] == kind]
    kind, _, name = column.partition("/")
    key = (kind, name or kind)
    return [[key]] if key in parts else []


def _stratum(parts: Sequence[Sequence[Part]], mean: bool, keep: Keep | None) -> Outcomes:
    """Return one value for each evaluation and common item: under all of its parts, or their mean."""
    different = tuple(dict.fromkeys(part.items for row in parts for part in row))
    taken, dropped = _align(different)
    first = different[0]
    places = dict(zip(different, taken, strict=True))
    if keep is not None:
        chosen = keep(first)[places[first]]
        places = {items: where[chosen] for items, where in places.items()}
    whole = len(different) == 1 and keep is None
    values = np.array(
        [[part.correct if whole else part.correct[places[part.items]] for part in row] for row in parts]
    )
    where = places[first]
    return Outcomes(
        first.ids if whole else tuple(first.ids[i] for i in where.tolist()),
        first.labels if whole else first.labels[where],
        values.mean(axis=1) if mean else values.min(axis=1).astype(np.float64),
        None,
        dropped,
    )


@lru_cache(maxsize=1024)
def _align(different: tuple[Items, ...]) -> tuple[list[Positions], int]:
    """Return where the common items are in each of ``different``, and how many are not common.

    Items whose labels differ are not common: which label is right cannot be known.
    """
    first, *others = different
    if not others:
        return [np.arange(len(first))], 0
    tables = [dict(zip(one.ids, range(len(one)), strict=True)) for one in others]
    common = [
        [index, *(table[i] for table in tables)]
        for index, i in enumerate(first.ids)
        if all(i in table for table in tables)
    ]
    places = np.array(common, dtype=np.int64).reshape(len(common), len(different))
    labels = np.stack([one.labels[places[:, k]] for k, one in enumerate(different)], axis=1)
    places = places[(labels == labels[:, :1]).all(axis=1)]
    total = len(set(first.ids).union(*tables))
    return list(places.T), total - len(places)


def known_labels(items: Sequence[Items]) -> Mapping[str, set[int]]:
    """Return every item's labels in ``items``; more than one where they disagree."""
    found: dict[str, set[int]] = {}
    for one in items:
        for i, label in zip(one.ids, one.labels.tolist(), strict=True):
            found.setdefault(i, set()).add(label)
    return found
