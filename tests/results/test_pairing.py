from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lightning_robust.results import (
    Record,
)
from lightning_robust.results.outcomes import ADV, ADV_MEAN, CLEAN, OOD_MEAN, Column
from lightning_robust.results.study import (
    load_study,
    outcomes,
    pair,
    scores,
)
from tests.results.studies import FGM, attacked, condition, make_run, make_study, said, static, two_runs


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
