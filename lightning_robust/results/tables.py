"""Metrics of evaluations, as pure functions of their records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lightning_robust.results.records import Record, to_table
from lightning_robust.results.statistics import MIN_ITEMS, Effect, Ratio, effect, is_constant, transfer_ratio

NON_TEXT_ATTACKS = frozenset({"embedding_pgd"})
"""White-box attacks on embeddings: no text, so no part of the worst case over texts."""

Records: TypeAlias = "pa.Table | Iterable[Record]"
Parts: TypeAlias = "Mapping[tuple[str, str], Group]"
Pair: TypeAlias = "tuple[Mapping[str, bool], Mapping[str, bool]]"
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


class Evaluation(NamedTuple):
    """The records of one evaluation of one run."""

    run_id: str
    epoch: int | None
    global_step: int | None
    table: pa.Table


class Score(NamedTuple):
    """An accuracy, the number of items behind it, and what the most frequent label would score."""

    accuracy: float
    num_items: int
    majority: float


class Group(NamedTuple):
    """Rows of one environment or attack, every array of shape ``(items,)``.

    ``predicted`` is -1 where there is no usable answer, which makes it wrong for every class.
    """

    item_id: list[str]
    label: Ints
    predicted: Ints
    correct: Bools
    status: NDArray[np.str_]
    queries: Ints
    seconds: NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Share of right items; NaN without items."""
        return float(self.correct.mean()) if len(self.correct) else math.nan

    @property
    def success_rate(self) -> float:
        """Successes among attacked items, which were first classified correctly; NaN where there are none.

        Items on which the search broke off count in neither; they are wrong in the accuracy.
        """
        successes, failures = int((self.status == "success").sum()), int((self.status == "failed").sum())
        return successes / (successes + failures) if successes + failures else math.nan

    @property
    def mean_queries(self) -> float:
        """Mean over all items; NaN without items."""
        return float(self.queries.mean()) if len(self.queries) else math.nan

    @property
    def majority(self) -> float:
        """Accuracy of always answering the most frequent label."""
        return _majority(self.label.tolist())

    @property
    def unusable(self) -> int:
        """Items without a usable answer: ``unparsed`` or ``error``. They count as wrong."""
        return int(np.isin(self.status, ["unparsed", "error"]).sum())


def evaluations(records: Records) -> list[Evaluation]:
    """Split records by run, epoch and step, in the order of the steps."""
    table = as_table(records)
    moment = ["run_id", "epoch", "global_step"]
    numbered = table.select(moment).append_column("row", pa.array(np.arange(table.num_rows)))
    # Without threads: they would not keep the order of rows.
    split = numbered.group_by(moment, use_threads=False).aggregate([("row", "list")])
    found = [
        Evaluation(key["run_id"], key["epoch"], key["global_step"], _take(table, rows.values))
        for key, rows in zip(split.select(moment).to_pylist(), split["row_list"], strict=True)
    ]
    return sorted(found, key=lambda one: (one.run_id, _order(one.global_step), _order(one.epoch)))


def metrics(records: Records) -> dict[str, float]:
    """Return the metrics of one evaluation, by the keys that are logged.

    Every item counts: unparsed, failed and skipped ones are wrong. ``adv/accuracy`` is the per-item
    worst case over the attacks that ran; attacks on embeddings join it only where nothing else ran,
    and without any attack it is the macro mean of the static adversarial environments. ``joint/*``
    combine those of clean, adv and ood accuracy that there are.
    """
    parts = groups(records)
    found: dict[str, float] = {}
    for (kind, name), group in parts.items():
        if kind == "attack":
            found[f"adv/{name}/accuracy"] = group.accuracy
            found[f"adv/{name}/success_rate"] = group.success_rate
            found[f"adv/{name}/queries"] = group.mean_queries
            continue
        prefix = {"clean": "clean", "adversarial": f"adv/{name}", "ood": f"ood/{name}"}[kind]
        found[f"{prefix}/accuracy"] = group.accuracy
        if kind != "adversarial":
            scores = classification_scores(group.label, group.predicted)
            found.update({f"{prefix}/{score}": value for score, value in scores.items()})
    found.update(_summaries(parts))
    return found


def groups(records: Records) -> dict[tuple[str, str], Group]:
    """Split one evaluation by ``(kind, name)``: the environment's name, or the attack's.

    Several clean environments are one group.
    """
    table = as_table(records)
    kinds = np.array(table["kind"].to_pylist(), dtype=object)
    names = np.where(
        kinds == "attack",
        np.array(table["attack"].to_pylist(), dtype=object),
        np.array(table["environment"].to_pylist(), dtype=object),
    )
    rows: dict[tuple[str, str], list[int]] = {}
    for index, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        rows.setdefault((kind, "clean" if kind == "clean" else name), []).append(index)
    order = {"clean": 0, "attack": 1, "adversarial": 2, "ood": 3}
    keys = sorted(rows, key=lambda key: order[key[0]])
    return {key: _group(table.take(pa.array(rows[key]))) for key in keys}


def worst_case(attacks: Iterable[Group]) -> dict[str, bool]:
    """Return for every item that all of ``attacks`` reached whether it stayed right under each."""
    groups = list(attacks)
    reached = set.intersection(*(set(group.item_id) for group in groups)) if groups else set()
    survived = dict.fromkeys((i for group in groups[:1] for i in group.item_id if i in reached), True)
    for group in groups:
        for item_id, right in zip(group.item_id, group.correct.tolist(), strict=True):
            if item_id in reached:
                survived[item_id] &= right
    return survived


def headline_attacks(parts: Parts) -> dict[str, Group]:
    """Return the attacks that make ``adv/accuracy``: those on texts, else whatever ran."""
    attacks = {name: group for (kind, name), group in parts.items() if kind == "attack"}
    texts = {name: group for name, group in attacks.items() if name not in NON_TEXT_ATTACKS}
    return texts or attacks


def classification_scores(label: Ints, predicted: Ints) -> dict[str, float]:
    """Return macro ``f1``, ``precision`` and ``recall`` over the classes in labels or predictions.

    A class never predicted has precision 0 and one without items recall 0, as in scikit-learn and
    torchmetrics. Predictions below 0 are wrong answers of no class.
    """
    classes = np.union1d(label, predicted[predicted >= 0])
    if not len(label):
        return {"f1": math.nan, "precision": math.nan, "recall": math.nan}
    hits = np.array([np.sum((label == k) & (predicted == k)) for k in classes], dtype=float)
    said = np.array([np.sum(predicted == k) for k in classes], dtype=float)
    true = np.array([np.sum(label == k) for k in classes], dtype=float)
    return {
        "f1": float(np.mean(2 * hits / (said + true))),
        "precision": float(np.mean(hits / np.maximum(said, 1))),
        "recall": float(np.mean(hits / np.maximum(true, 1))),
    }


def transfer_deltas(reference: Records, records: Records) -> dict[str, float]:
    """Return how adversarial and OOD accuracy changed since a reference evaluation of the same run.

    Only items and parts present in both count, so a changed sample changes nothing. Returns
    ``transfer/adv_delta`` and ``transfer/ood_delta`` (NaN without common items), the ends of their 95 %
    intervals for this training run, ``transfer/adv_low`` to ``transfer/ood_high`` (NaN where `effect` gives
    none), and ``transfer/ratio``, OOD change per adversarial change, with ``transfer/ratio_low`` and ``_high``: NaN, as
    not estimable, unless the latter's interval leaves out 0, and where one evaluation is a constant answer. An
    evaluation compared with itself has changed by exactly 0.
    """
    before, after = groups(reference), groups(records)
    sides = {name: _paired(_of(before, after, name)) for name in ("adv", "ood")}
    found: dict[str, float] = {}
    for name, side in sides.items():
        one = _effect(side)
        itself = reference is records and one.num_items > 0
        found[f"transfer/{name}_delta"] = one.delta
        found[f"transfer/{name}_low"] = 0.0 if itself else one.low
        found[f"transfer/{name}_high"] = 0.0 if itself else one.high
    ratio = _ratio(**sides)
    if answers_constantly(before) or answers_constantly(after):
        ratio = Ratio(math.nan, math.nan, math.nan)
    return found | {
        "transfer/ratio": ratio.value,
        "transfer/ratio_low": ratio.low,
        "transfer/ratio_high": ratio.high,
    }


def change(before: Parts, after: Parts, measure: str) -> Effect:
    """Return the change of a headline score between two evaluations of one run.

    Args:
        before: The earlier evaluation.
        after: The later one.
        measure: ``clean``, ``adv`` (the worst case over the attacks that both ran, else the mean of the static
            adversarial environments) or ``ood`` (the mean of the environments).
    """
    return paired_change(_of(before, after, measure))


def answers_constantly(parts: Parts) -> bool:
    """Return whether an evaluation is hardly better on clean items than a constant answer; a few do not say."""
    clean = parts.get(("clean", "clean"))
    return clean is not None and len(clean.label) >= MIN_ITEMS and is_constant(clean.correct, clean.label)


def paired_change(pairs: Iterable[Pair]) -> Effect:
    """Return the change within one training run of what was right, paired by item.

    Args:
        pairs: For each environment what was right before and after, by item id. Environments count equally, and
            only items in both count.
    """
    return _effect(_paired(pairs))


class _Side(NamedTuple):
    """What was right after and before, ``(items,)``, and each item's environment."""

    now: list[bool]
    was: list[bool]
    strata: list[int] | None


def _of(before: Parts, after: Parts, measure: str) -> list[Pair]:
    """Return for each environment of a measure what was right before and after; see `change`."""
    if measure == "adv":
        first, last = headline_attacks(before), headline_attacks(after)
        common = [name for name in first if name in last]
        was, now = (worst_case(side[name] for name in common) for side in (first, last))
        if was.keys() & now.keys():
            return [(was, now)]
    kind = "adversarial" if measure == "adv" else measure
    keys = [key for key in before if key[0] == kind and key in after]
    return [(worst_case([before[key]]), worst_case([after[key]])) for key in keys]


def _paired(pairs: Iterable[Pair]) -> _Side:
    was: list[bool] = []
    now: list[bool] = []
    strata: list[int] = []
    for number, (before, after) in enumerate(pairs):
        common = [item_id for item_id in before if item_id in after]
        was += [before[item_id] for item_id in common]
        now += [after[item_id] for item_id in common]
        strata += [number] * len(common)
    return _Side(now, was, strata if len(set(strata)) > 1 else None)


def _effect(side: _Side) -> Effect:
    return effect(side.now, side.was, strata=side.strata)


def _ratio(adv: _Side, ood: _Side) -> Ratio:
    return transfer_ratio((adv.now, adv.was), (ood.now, ood.was), on_strata=adv.strata, off_strata=ood.strata)


def as_table(records: Records) -> pa.Table:
    """Return records as a table, whichever way they come."""
    return records if isinstance(records, pa.Table) else to_table(records)


def headline(parts: Parts) -> dict[str, Score]:
    """Return the scores ``clean``, ``adv`` and ``ood``, those of them that were measured."""
    found: dict[str, Score] = {}
    attacks = headline_attacks(parts).values()
    for name, kind in (("clean", "clean"), ("adv", "adversarial"), ("ood", "ood")):
        members = [group for (its_kind, _), group in parts.items() if its_kind == kind]
        if name == "adv" and attacks:
            survived = worst_case(attacks)
            labels = {i: k for g in attacks for i, k in zip(g.item_id, g.label.tolist(), strict=True)}
            # Within a budget of time there may be no item that all attacks reached.
            accuracy = sum(survived.values()) / len(survived) if survived else math.nan
            found[name] = Score(accuracy, len(survived), _majority(list(labels.values())))
        elif members:
            found[name] = Score(
                float(np.mean([group.accuracy for group in members])),
                sum(len(group.label) for group in members),
                float(np.mean([group.majority for group in members])),
            )
    return found


def _summaries(parts: Parts) -> dict[str, float]:
    scores = headline(parts)
    found = {f"{name}/accuracy": score.accuracy for name, score in scores.items() if name != "clean"}
    if "ood" in scores:
        found["ood/worst_accuracy"] = min(g.accuracy for (kind, _), g in parts.items() if kind == "ood")
    present = [score.accuracy for score in scores.values()]
    if any(map(math.isnan, present)):
        found["joint/harmonic"] = found["joint/min"] = math.nan
    elif present:
        found["joint/harmonic"] = len(present) / sum(1 / p for p in present) if min(present) > 0 else 0.0
        found["joint/min"] = min(present)
    return found


def _majority(labels: list[int]) -> float:
    return max(Counter(labels).values()) / len(labels) if labels else math.nan


def _group(table: pa.Table) -> Group:
    status = np.array(table["status"].to_pylist(), dtype=str)
    usable = ~np.isin(status, ["unparsed", "error"])
    predicted = pc.fill_null(table["predicted"], -1).to_numpy().astype(np.int64)
    right = table["correct"].to_numpy().astype(bool)
    return Group(
        item_id=table["item_id"].to_pylist(),
        label=table["label"].to_numpy().astype(np.int64),
        predicted=np.where(usable, predicted, -1),
        correct=right & usable & (status != "skipped") & (status != "success"),
        status=status,
        queries=table["queries"].to_numpy().astype(np.int64),
        seconds=table["seconds"].to_numpy().astype(np.float64),
    )


def _take(table: pa.Table, rows: pa.Array) -> pa.Table:
    first, size = rows[0].as_py(), len(rows)
    # Rows that are neighbours need no copy.
    return table.slice(first, size) if rows[-1].as_py() - first + 1 == size else table.take(rows)


def _order(value: int | None) -> float:
    return -1.0 if value is None else float(value)
