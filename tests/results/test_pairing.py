from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_robust.results import (
    Record,
)
from lightning_robust.results.outcomes import ADV, ADV_MEAN, CLEAN, OOD_MEAN, Column
from lightning_robust.results.selection import select
from lightning_robust.results.study import (
    Condition,
    columns,
    load_study,
    outcomes,
    pair,
    scores,
)
from lightning_robust.results.transfer import condition_accuracy
from tests.results.studies import (
    FGM,
    VREX,
    attacked,
    condition,
    make_run,
    make_study,
    said,
    static,
    two_runs,
)


def ints(values: Any) -> list[list[int]]:
    return np.asarray(values).astype(int).tolist()


def test_pairs_by_hand(tmp_path: Path) -> None:
    treated = [
        *static("clean", "clean", "1101"), *attacked("pwws", "110"), *attacked("deepwordbug", "011"),
        *attacked("embedding_pgd", "000"), *static("ood", "imdb", "11"), *static("ood", "yelp", "0101"),
    ]  # fmt: skip
    baseline = [
        *static("clean", "clean", "0011"), *attacked("pwws", "100"), *attacked("deepwordbug", "101"),
        *static("ood", "yelp", "0000"), *static("ood", "imdb", "10"), *static("ood", "gone", "1"),
    ]  # fmt: skip
    fgm, erm = two_runs(tmp_path, treated, baseline)
    clean = pair(fgm, erm, CLEAN)
    assert clean is not None
    assert (ints(clean.treated), ints(clean.baseline)) == ([[1, 1, 0, 1]], [[0, 0, 1, 1]])
    assert (clean.strata, clean.seeds, clean.dropped) == (None, [0], 0)
    worst = pair(fgm, erm, ADV)
    assert worst is not None
    assert (ints(worst.treated), ints(worst.baseline)) == ([[0, 1, 0]], [[1, 0, 0]])
    mean = pair(fgm, erm, ADV_MEAN)
    assert mean is not None
    assert mean.treated.tolist() == [[0.5, 1.0, 0.5]]
    assert mean.baseline.tolist() == [[1.0, 0.0, 0.5]]
    ood = pair(fgm, erm, OOD_MEAN)
    assert ood is not None
    assert ood.strata is not None
    by_environment = {
        tuple(ints(side[0, ood.strata == k])) for k in (0, 1) for side in (ood.treated, ood.baseline)
    }
    assert by_environment == {(1, 1), (1, 0), (0, 1, 0, 1), (0, 0, 0, 0)}
    assert pair(fgm, erm, Column("ood/gone", "gone", "ood")) is None
    assert pair(fgm, erm, Column("attack/embedding_pgd", "embedding_pgd", "adv")) is None


def test_the_worst_case_is_over_the_attacks_that_both_ran(tmp_path: Path) -> None:
    clean = static("clean", "clean", "11")
    fgm, erm = two_runs(
        tmp_path, clean + attacked("pwws", "11") + attacked("a", "00"), clean + attacked("pwws", "01")
    )
    both = pair(fgm, erm, ADV)
    assert both is not None
    assert (ints(both.treated), ints(both.baseline)) == ([[1, 1]], [[0, 1]])


def levels(condition: Condition, column: Column) -> float:
    found = condition_accuracy(condition, column)
    assert found is not None
    return found.delta


def test_summaries_side_by_side_are_made_from_the_same_attacks(tmp_path: Path) -> None:
    clean = static("clean", "clean", "10" * 20)
    more = clean + attacked("pwws", "1100" * 10) + attacked("a", "0" * 40) + static("ood", "yelp", "0" * 40)
    imdb = static("ood", "imdb", "10" * 20)
    make_run(tmp_path, "erm-seed0", rows=[more + imdb])
    make_run(tmp_path, "pgd-seed0", rows=[more + imdb], defenses=[VREX])
    fgm = clean + attacked("pwws", "1110" * 10) + imdb
    make_run(tmp_path, "fgm-seed0", rows=[fgm], defenses=[FGM])
    study = load_study(tmp_path)
    assert [levels(condition(study, name), ADV) for name in ("erm", "pgd", "fgm")] == [0.5, 0.5, 0.75]
    assert [levels(condition(study, name), OOD_MEAN) for name in ("erm", "pgd", "fgm")] == [0.5] * 3
    assert scores(condition(study, "erm").runs[0].evaluations[0])["adv"].accuracy == 0.5
    assert "adv_mean" not in [column.key for column in columns(study)]
    assert said(study, "Adversarial accuracy on minilm") == (
        "Adversarial accuracy on minilm is made from pwws; it leaves out a (not measured in all runs of fgm)."
    )
    said(
        study,
        "OOD accuracy on minilm is made from imdb; it leaves out yelp (not measured in all runs of fgm).",
    )
    alone = load_study(tmp_path / "erm-seed0")
    assert levels(condition(alone, "erm"), ADV) == 0
    assert "adv_mean" in [column.key for column in columns(alone)]
    assert not [problem for problem in alone.problems if "leaves out" in problem]


def test_other_backbones_have_no_say_in_a_summary(tmp_path: Path) -> None:
    both = attacked("pwws", "1100" * 10) + attacked("a", "0" * 40)
    make_run(tmp_path, "erm-seed0", rows=[both])
    make_run(tmp_path, "fgm-seed0", rows=[both], defenses=[FGM])
    make_run(
        tmp_path, "bert-seed0", rows=[attacked("pwws", "1100" * 10)], hyperparameters={"backbone": "bert"}
    )
    study = load_study(tmp_path)
    assert [levels(condition(study, name), ADV) for name in ("erm", "fgm", "bert")] == [0, 0, 0.5]
    assert not [problem for problem in study.problems if "leaves out" in problem]


def test_without_a_common_attack_pairs_share_what_they_can(tmp_path: Path) -> None:
    pwws, a = attacked("pwws", "1100" * 10), attacked("a", "10" * 20)
    make_run(tmp_path, "erm-seed0", rows=[pwws + a])
    make_run(tmp_path, "fgm-seed0", rows=[pwws], defenses=[FGM])
    make_run(tmp_path, "vrex-seed0", rows=[a], defenses=[VREX])
    study = load_study(tmp_path)
    assert [levels(condition(study, name), ADV) for name in ("erm", "fgm", "vrex")] == [0.25, 0.5, 0.5]
    both = pair(condition(study, "fgm"), condition(study, "erm"), ADV)
    assert both is not None
    assert both.baseline.mean() == 0.5
    assert said(study, "no attack or environment was measured in all").endswith(
        "are of different ones: erm (pwws, a), fgm (pwws), vrex (a)."
    )


def test_an_evaluation_of_fewer_attacks_has_no_summary(tmp_path: Path) -> None:
    clean, pwws = static("clean", "clean", "10" * 20), attacked("pwws", "1" * 40)
    both = clean + pwws + attacked("a", "10" * 20)
    make_run(tmp_path, "erm-seed0", rows=[
        [replace(row, epoch=epoch, global_step=epoch) for row in rows] for epoch, rows in enumerate([clean + pwws, both])
    ])  # fmt: skip
    study = load_study(tmp_path)
    first, last = study.runs[0].evaluations
    assert "adv" not in scores(first)
    assert scores(last)["adv"].accuracy == 0.5
    assert select(study.runs[0], "joint").index == 1
    said(study, "Adversarial accuracy on minilm is not told of 1 evaluations of erm-seed0")


def test_one_attack_on_two_environments_is_two(tmp_path: Path) -> None:
    def on(environment: str, name: str, rights: str) -> list[Record]:
        return [replace(row, environment=environment) for row in attacked(name, rights)]

    # Item ids are the same in both: nothing but the environment tells them apart.
    rows = on("sst2", "pwws", "1110" * 10) + on("imdb", "pwws", "0" * 39 + "1") + on("sst2", "a", "1011" * 10)
    rows += on("imdb", "embedding_pgd", "0" * 40)
    fgm, erm = two_runs(tmp_path, rows, rows)
    parts = fgm.runs[0].evaluations[0].parts
    assert [(name, part.accuracy) for (_, name), part in parts.items()] == [
        ("pwws on sst2", 0.75), ("pwws on imdb", 1 / 40), ("a on sst2", 0.75), ("embedding_pgd on imdb", 0.0)
    ]  # fmt: skip
    both = pair(fgm, erm, ADV)
    assert both is not None
    assert both.strata is not None
    assert np.bincount(both.strata).tolist() == [40, 40]
    assert levels(fgm, ADV) == pytest.approx((0.5 + 1 / 40) / 2)
    assert levels(fgm, ADV_MEAN) == pytest.approx((0.75 + 1 / 40) / 2)
    study = load_study(tmp_path)
    said(study, "Attacks ran on 2 environments, imdb, sst2: each attack is named with its environment")
    assert not [problem for problem in study.problems if "repeat" in problem]


def test_attacks_on_other_environments_in_other_runs_are_not_compared(tmp_path: Path) -> None:
    rows = attacked("pwws", "10" * 20)
    fgm, erm = two_runs(tmp_path, [replace(row, environment="imdb") for row in rows], rows)
    assert pair(fgm, erm, ADV) is None
    assert pair(fgm, erm, Column("attack/pwws on imdb", "pwws on imdb", "adv")) is None
    said(load_study(tmp_path), "Attacks ran on 2 environments, clean, imdb")


def test_adversarial_environments_stand_in_for_attacks(tmp_path: Path) -> None:
    rows = static("adversarial", "x", "10") + static("adversarial", "y", "1110")
    fgm, erm = two_runs(tmp_path, rows, rows)
    both = pair(fgm, erm, ADV)
    assert both is not None
    assert both.strata is not None
    assert np.bincount(both.strata).tolist() == [2, 4]
    found = outcomes(fgm.runs[0], ADV)
    assert found is not None
    assert found.values.shape == (6,)
    assert scores(fgm.runs[0].evaluations[-1])["adv"].accuracy == (0.5 + 0.75) / 2


def test_items_are_paired_whatever_their_order(tmp_path: Path) -> None:
    rows = static("clean", "clean", "1100110")
    fgm, erm = two_runs(tmp_path, rows[2:][::-1], rows[:6])
    both = pair(fgm, erm, CLEAN)
    assert both is not None
    assert ints(both.treated) == ints(both.baseline)
    assert sorted(ints(both.treated)[0]) == [0, 0, 1, 1]
    assert both.dropped == 3
    assert pair(fgm, erm, CLEAN, min_items=5) is None


def test_runs_are_paired_by_seed(tmp_path: Path) -> None:
    def right(count: int) -> list[list[Record]]:
        return [static("clean", "clean", "1" * count + "0" * (40 - count))]

    for seed in (0, 1, 2):
        make_run(tmp_path, f"erm-seed{seed}", rows=right(seed))
    for seed in (3, 2, 1):
        make_run(tmp_path, f"fgm-seed{seed}", rows=right(10 * seed), defenses=[FGM])
    study = load_study(tmp_path)
    both = pair(condition(study, "fgm"), condition(study, "erm"), CLEAN)
    assert both is not None
    assert both.seeds == [1, 2]
    assert both.baseline.sum(axis=1).tolist() == [1, 2]
    assert both.treated.sum(axis=1).tolist() == [10, 20]
    said(study, "fgm: fgm-seed3 left out of comparisons")


def test_runs_without_seeds_are_paired_in_order(tmp_path: Path) -> None:
    for letter in "abc":
        make_run(tmp_path / letter, "erm", run_id=letter)
    for letter in "de":
        make_run(tmp_path / letter, "fgm", run_id=letter, defenses=[FGM])
    study = load_study(tmp_path)
    assert [len(one.runs) for one in study.conditions] == [3, 2]
    both = pair(condition(study, "fgm"), condition(study, "erm"), CLEAN)
    assert both is not None
    assert both.treated.shape == (2, 60)
    said(study, "fgm and erm", "paired in order")


def test_a_run_that_did_not_measure_a_column_costs_its_pair_only(tmp_path: Path) -> None:
    make_study(tmp_path, seeds=3)
    make_run(tmp_path, "fgm-seed1", rows=[static("clean", "clean", "10" * 30)], defenses=[FGM], max_epochs=2)
    (tmp_path / "fgm-seed1" / "records" / "epoch=001.parquet").unlink()
    study = load_study(tmp_path)
    both = pair(condition(study, "fgm"), condition(study, "erm"), OOD_MEAN)
    assert both is not None
    assert both.seeds == [0, 2]
    said(study, "fgm-seed1", "no OOD environment")
