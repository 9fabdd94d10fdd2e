from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from lightning_robust.results import Record, evaluations, metrics, to_table, transfer_deltas
from lightning_robust.results.statistics import effect, transfer_ratio
from lightning_robust.results.tables import classification_scores, groups
from tests.results.synthetic import evaluation, record


def static(kind: str, name: str, rights: str, **changes: object) -> list[Record]:
    """One record per character: ``1`` right, ``0`` wrong; the label is always 1."""
    return [
        record(kind=kind, environment=name, item_id=str(i), predicted=int(c), correct=c == "1", **changes)
        for i, c in enumerate(rights)
    ]


def attack(name: str, statuses: str) -> list[Record]:
    """One record per character: s(uccess), f(ailed), k (skipped), e(rror)."""
    names = {"s": "success", "f": "failed", "k": "skipped", "e": "error"}
    return [
        record(
            kind="attack", attack=name, item_id=str(i), status=names[c], correct=c == "f",
            predicted=int(c == "f"), queries=10 * (i + 1),
        )
        for i, c in enumerate(statuses)
    ]  # fmt: skip


def test_every_key_against_values_by_hand() -> None:
    rows = [
        *static("clean", "clean", "1110"),
        *attack("deepwordbug", "fsfk"),
        *attack("pwws", "ffsk"),
        *attack("embedding_pgd", "sssk"),
        *static("adversarial", "advglue", "1000"),
        *static("ood", "yelp", "1100"),
        *static("ood", "imdb", "11111110"),
    ]
    assert metrics(rows) == pytest.approx(
        {
            "clean/accuracy": 0.75, "clean/f1": (2 * 3 / 7) / 2, "clean/precision": 0.5,
            "clean/recall": 0.375,
            "adv/deepwordbug/accuracy": 0.5, "adv/deepwordbug/success_rate": 1 / 3,
            "adv/deepwordbug/queries": 25.0,
            "adv/pwws/accuracy": 0.5, "adv/pwws/success_rate": 1 / 3, "adv/pwws/queries": 25.0,
            "adv/embedding_pgd/accuracy": 0.0, "adv/embedding_pgd/success_rate": 1.0,
            "adv/embedding_pgd/queries": 25.0,
            "adv/advglue/accuracy": 0.25,
            "ood/yelp/accuracy": 0.5, "ood/yelp/f1": (2 * 2 / 6) / 2, "ood/yelp/precision": 0.5,
            "ood/yelp/recall": 0.25,
            "ood/imdb/accuracy": 0.875, "ood/imdb/f1": (2 * 7 / 15) / 2, "ood/imdb/precision": 0.5,
            "ood/imdb/recall": 0.4375,
            "adv/accuracy": 0.25,  # item 0 alone survives both text attacks
            "ood/accuracy": 0.6875, "ood/worst_accuracy": 0.5,
            "joint/harmonic": 3 / (1 / 0.75 + 1 / 0.25 + 1 / 0.6875), "joint/min": 0.25,
        }
    )  # fmt: skip


def test_adversarial_accuracy_without_text_attacks() -> None:
    assert metrics(attack("embedding_pgd", "fsss"))["adv/accuracy"] == 0.25
    rows = static("adversarial", "a", "1110") + static("adversarial", "b", "10")
    assert metrics(rows)["adv/accuracy"] == pytest.approx((0.75 + 0.5) / 2)
    assert "adv/accuracy" not in metrics(static("clean", "clean", "1"))


def test_items_without_an_answer_are_wrong() -> None:
    rows = static("clean", "clean", "11")
    rows += [record(item_id="9", status="unparsed", predicted=None, probability=None, correct=True)]
    assert metrics(rows)["clean/accuracy"] == pytest.approx(2 / 3)
    assert groups(rows)["clean", "clean"].unusable == 1
    found = metrics(attack("deepwordbug", "fse"))
    assert found["adv/deepwordbug/accuracy"] == pytest.approx(1 / 3)
    assert found["adv/deepwordbug/success_rate"] == 0.5


def test_success_rate_is_nan_where_nothing_was_right_before() -> None:
    found = metrics(attack("deepwordbug", "kk"))
    assert math.isnan(found["adv/deepwordbug/success_rate"])
    assert found["adv/accuracy"] == found["joint/min"] == found["joint/harmonic"] == 0


def test_no_records_make_no_metrics() -> None:
    assert metrics([]) == {}
    assert evaluations([]) == []


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_scores_equal_torchmetrics(num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    label, predicted = rng.integers(num_classes, size=(2, 60))
    # One class that is never the label, and one that is never predicted, for more than two classes.
    label, predicted = np.where(label == 2, 0, label), np.where(predicted == 1, 0, predicted)
    ours = classification_scores(label, predicted)
    theirs = {"f1": multiclass_f1_score, "precision": multiclass_precision, "recall": multiclass_recall}
    for name, function in theirs.items():
        value = function(torch.tensor(predicted), torch.tensor(label), num_classes, average="macro")
        assert ours[name] == pytest.approx(value.item(), abs=1e-6), name


def test_order_of_rows_does_not_matter() -> None:
    rows = evaluation(
        "run", 0, 1, {"clean/clean": 0.7, "attack/deepwordbug": 0.3, "ood/a": 0.6}, num_items=30
    )
    assert metrics(rows[::-1]) == metrics(to_table(rows)) == metrics(rows)


def test_majority_baseline() -> None:
    rows = [record(item_id=str(i), label=label) for i, label in enumerate([0, 2, 2, 2, 1])]
    assert groups(rows)["clean", "clean"].majority == 0.6


def test_evaluations_are_split_and_in_order() -> None:
    rows = [
        *static("clean", "clean", "10", epoch=2, global_step=30),
        *static("clean", "clean", "11", epoch=None, global_step=None),
        *static("clean", "clean", "1", epoch=1, global_step=20),
        *static("ood", "a", "1", epoch=1, global_step=20),
        *static("clean", "clean", "1", run_id="a", epoch=5, global_step=50),
    ]
    found = [(e.run_id, e.epoch, e.global_step, e.table.num_rows) for e in evaluations(rows)]
    assert found == [("a", 5, 50, 1), ("run", None, None, 2), ("run", 1, 20, 2), ("run", 2, 30, 2)]


def test_transfer_is_paired_over_common_items_and_parts() -> None:
    before = [*attack("deepwordbug", "ffss"), *static("ood", "a", "1100"), *static("ood", "gone", "0")]
    after = [
        *attack("deepwordbug", "fffss"),  # item 4 is new
        *attack("pwws", "sssss"),  # an attack that did not run before
        *static("ood", "a", "111"),  # item 3 is gone
        *static("ood", "new", "1"),
    ]
    found = transfer_deltas(before, after)
    assert found["transfer/adv_delta"] == pytest.approx(1 / 4)
    assert found["transfer/ood_delta"] == pytest.approx(1 / 3)
    assert math.isnan(found["transfer/ratio"])  # four items are too few for an interval


def test_transfer_has_the_intervals_of_one_training_run() -> None:
    before = attack("deepwordbug", "s" * 40 + "f" * 20) + static("ood", "a", "10" * 30)
    after = attack("deepwordbug", "f" * 55 + "s" * 5) + static("ood", "a", "110" * 20)
    before += static("ood", "b", "0" * 200)
    after += static("ood", "b", "1" * 20 + "0" * 180)
    found = transfer_deltas(before, after)
    adv = effect([1] * 55 + [0] * 5, [0] * 40 + [1] * 20)
    ood = effect(
        [1, 1, 0] * 20 + [1] * 20 + [0] * 180, [1, 0] * 30 + [0] * 200, strata=["a"] * 60 + ["b"] * 200
    )
    assert (adv.num_seeds, adv.sign) == (1, 1)
    assert ood.delta == pytest.approx((1 / 6 + 1 / 10) / 2)  # environments count equally
    for name, one in (("adv", adv), ("ood", ood)):
        for end, value in (("delta", one.delta), ("low", one.low), ("high", one.high)):
            assert found[f"transfer/{name}_{end}"] == pytest.approx(value), (name, end)
    assert found["transfer/ratio"] == pytest.approx(ood.delta / adv.delta)
    assert transfer_deltas(after, before)["transfer/ratio"] == pytest.approx(ood.delta / adv.delta)


def test_transfer_ratio_is_not_estimable_where_the_adversarial_change_may_be_nothing() -> None:
    before = attack("deepwordbug", "sf" * 50) + static("ood", "a", "10" * 50)
    after = attack("deepwordbug", "ff" + "sf" * 49) + static("ood", "a", "11" * 50)
    found = transfer_deltas(before, after)
    assert found["transfer/adv_low"] < 0 < found["transfer/adv_delta"] < found["transfer/adv_high"]
    assert found["transfer/ood_low"] > 0
    assert math.isnan(found["transfer/ratio"])


def test_transfer_ratio_is_nan_without_an_adversarial_change() -> None:
    rows = attack("deepwordbug", "fs") + static("ood", "a", "10")
    assert math.isnan(transfer_deltas(rows, rows)["transfer/ratio"])
    only_ood = transfer_deltas(static("ood", "a", "10"), static("ood", "a", "11"))
    assert only_ood["transfer/ood_delta"] == 0.5
    assert math.isnan(only_ood["transfer/adv_delta"])
    assert math.isnan(only_ood["transfer/ratio"])


def test_transfer_falls_back_to_static_environments() -> None:
    before, after = static("adversarial", "advglue", "0000"), static("adversarial", "advglue", "1000")
    assert transfer_deltas(before, after)["transfer/adv_delta"] == 0.25


def test_an_evaluation_compared_with_itself_has_changed_by_nothing():
    rows = evaluation("run", 0, 1, {"clean/clean": 0.8, "attack/deepwordbug": 0.5}, num_items=60)
    found = transfer_deltas(rows, rows)
    assert [found[f"transfer/adv_{name}"] for name in ("delta", "low", "high")] == [0, 0, 0]
    assert math.isnan(found["transfer/ood_delta"])
    assert math.isnan(found["transfer/ood_low"])
    again = transfer_deltas(rows, list(rows))
    assert again["transfer/adv_low"] < 0 < again["transfer/adv_high"]


def test_attacks_that_reached_no_item_in_common_make_no_worst_case() -> None:
    rows = [*static("clean", "clean", "1110"), *attack("pwws", "fs"), *static("ood", "a", "10")]
    rows += [replace(row, attack="deepwordbug", item_id=f"other-{row.item_id}") for row in attack("x", "ff")]
    found = metrics(rows)
    assert found["adv/pwws/accuracy"] == 0.5
    assert math.isnan(found["adv/accuracy"])
    assert math.isnan(found["joint/harmonic"])
    assert math.isnan(found["joint/min"])


def test_the_transfer_ratio_has_fiellers_interval() -> None:
    def rows(adv: float, ood: float) -> list[Record]:
        return evaluation("run", 0, 1, {"clean/clean": 0.9, "attack/pwws": adv, "ood/a": ood}, num_items=400)

    before, after = rows(0.2, 0.5), rows(0.7, 0.7)
    found = transfer_deltas(before, after)
    adv, ood = (
        (groups(after)[key].correct, groups(before)[key].correct)
        for key in (("attack", "pwws"), ("ood", "a"))
    )
    expected = transfer_ratio(adv, ood)
    assert found["transfer/ratio"] == pytest.approx(expected.value)
    assert found["transfer/ratio_low"] == pytest.approx(expected.low)
    assert found["transfer/ratio_high"] == pytest.approx(expected.high)
    assert expected.low < expected.value < expected.high
