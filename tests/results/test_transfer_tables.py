"""The matrix, verdicts and correlations of a study, from records to numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_robust.results import (
    effect,
    holm,
    load_study,
    study_correlations,
    study_effective_robustness,
    study_verdicts,
    transfer_matrix,
    transfer_verdict,
)
from lightning_robust.results.study import columns, pair
from lightning_robust.results.transfer import Together, _unless_they_differ, is_collapsed
from tests.results.studies import make_run
from tests.results.synthetic import record, write_run

PLAIN = {"clean/clean": 0.85, "attack/deepwordbug": 0.2, "attack/pwws": 0.3, "ood/yelp": 0.7, "ood/imdb": 0.6}
ROBUST = {**PLAIN, "attack/deepwordbug": 0.8, "attack/pwws": 0.8}
BOTH = {**ROBUST, "ood/yelp": 0.95, "ood/imdb": 0.95}


def write(folder, name, levels, *aims, seeds=(0, 1, 2), num_items=150, backbone="mini", inference=None):
    defenses = [{"name": f"{name}{n}", "aim": aim, "settings": {}} for n, aim in enumerate(aims)]
    for seed in seeds:
        info = {"seed": seed, "defenses": defenses, "hyperparameters": {"backbone": {"path": backbone}}}
        name_of_run = f"{name}-seed{seed}"
        write_run(folder / name_of_run, name_of_run, [levels], num_items=num_items, **info)


def cell(matrix, row, key):
    names = [condition.name for condition in matrix.conditions]
    return matrix.cells[names.index(row)][[column.key for column in matrix.columns].index(key)]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "erm", PLAIN)
    write(tmp_path, "fgm", ROBUST, "adversarial")
    write(tmp_path, "coral", PLAIN, "ood")
    write(tmp_path, "hybrid", BOTH, "adversarial", "ood")
    return tmp_path


def test_cells_are_effects_paired_by_seed_and_item(folder):
    study = load_study(folder)
    matrix = transfer_matrix(study)
    assert [condition.name for condition in matrix.conditions] == ["fgm", "hybrid", "coral"]
    assert {one.name for one in matrix.baselines} == {"erm"}
    erm, fgm = (next(one for one in study.conditions if one.name == name) for name in ("erm", "fgm"))
    by_hand = []
    for condition in (fgm, erm):
        parts = [run.evaluations[-1].parts["attack", "pwws"] for run in condition.runs]
        order = np.argsort(parts[0].items.ids)
        by_hand.append(np.array([part.correct[order] for part in parts]))
    found = cell(matrix, "fgm", "attack/pwws")
    assert found == effect(*by_hand)
    assert found.low > 0.3
    assert found.num_seeds == 3
    # Summaries: the worst case over attacks of each item, and environments that count equally.
    worst = []
    for condition in (fgm, erm):
        parts = [run.evaluations[-1].parts for run in condition.runs]
        both = [[one["attack", name].correct for name in ("deepwordbug", "pwws")] for one in parts]
        worst.append(np.array(both).all(axis=1))
    assert cell(matrix, "fgm", "adv").delta == pytest.approx(worst[0].mean() - worst[1].mean())
    means = [cell(matrix, "hybrid", f"ood/{name}").delta for name in ("yelp", "imdb")]
    assert cell(matrix, "hybrid", "ood_mean").delta == pytest.approx(np.mean(means))


def test_p_values_are_corrected_over_the_whole_matrix(folder):
    matrix = transfer_matrix(load_study(folder))
    p_values = [[one.p_value for one in row] for row in matrix.cells]
    assert matrix.adjusted == pytest.approx(holm(p_values))
    assert matrix.adjusted.min() > np.min(p_values)


def test_verdicts_judge_the_mean_of_each_aims_defenses(folder):
    write(folder, "pgd", ROBUST, "adversarial")
    study = load_study(folder)
    verdicts = {one.aim: one for one in study_verdicts(study)}
    assert [one.name for one in verdicts["adv"].conditions] == [
        "fgm",
        "pgd",
    ]  # the hybrid has no off-target side
    assert [one.name for one in verdicts["ood"].conditions] == ["coral"]
    found = verdicts["adv"].verdict
    effects = [cell(transfer_matrix(study), name, "adv").delta for name in ("fgm", "pgd")]
    assert found.on_target.delta == pytest.approx(np.mean(effects))
    assert found.on_target.num_seeds == 3
    assert found.label == "inconclusive"
    assert found.spread is not None
    assert "no gain" in verdicts["ood"].verdict.reason


def test_defenses_that_cancel_each_other_are_not_neutral(tmp_path):
    shifted = {**PLAIN, "ood/yelp": 0.5, "ood/imdb": 0.5}
    write(tmp_path, "erm", shifted, seeds=range(6), num_items=300)
    for name, level in (("up", 0.75), ("down", 0.25)):
        levels = {**ROBUST, "ood/yelp": level, "ood/imdb": level}
        write(tmp_path, name, levels, "adversarial", seeds=range(6), num_items=300)
    (found,) = study_verdicts(load_study(tmp_path), margin=0.1)
    assert abs(found.verdict.off_target.delta) < 0.05
    assert found.verdict.label == "inconclusive"
    assert found.verdict.reason == "the defenses differ: up raised the other kind, down lowered it"
    assert found.verdict.needed is None
    # One that moves beyond the margin is enough: the mean over it and others that do nothing is not «no change».
    write(
        tmp_path,
        "none",
        {**shifted, **{"attack/deepwordbug": 0.8, "attack/pwws": 0.8}},
        "adversarial",
        seeds=range(6),
        num_items=300,
    )
    (found,) = study_verdicts(load_study(tmp_path), margin=0.1)
    assert found.verdict.label == "inconclusive"


def test_one_defenses_verdict_is_that_of_its_arrays(folder):
    study = load_study(folder)
    found = next(one for one in study_verdicts(study, margin=0.02) if one.aim == "adv").verdict
    erm, fgm = (next(one for one in study.conditions if one.name == name) for name in ("erm", "fgm"))
    adv, ood = (pair(fgm, erm, column) for column in columns(study) if column.key in ("adv", "ood_mean"))
    expected = transfer_verdict(
        (adv.treated, adv.baseline), (ood.treated, ood.baseline), ood_strata=ood.strata, margin=0.02
    )
    assert (found.label, found.on_target, found.off_target, found.ratio) == (
        expected.label,
        expected.on_target,
        expected.off_target,
        expected.ratio,
    )


def test_a_constant_answer_counts_in_no_verdict_and_no_correlation(folder):
    for name in ("mmd", "irm"):
        write(folder, name, dict.fromkeys(PLAIN, 0.5), "ood")
    study = load_study(folder)
    matrix = transfer_matrix(study)
    assert dict(zip([one.name for one in matrix.conditions], matrix.collapsed, strict=True)) == {
        "fgm": False, "hybrid": False, "coral": False, "irm": True, "mmd": True,
    }  # fmt: skip
    assert cell(matrix, "mmd", "adv").low > 0  # no attack changes it
    ood = next(one for one in study_verdicts(study) if one.aim == "ood")
    assert [one.name for one in ood.conditions] == ["coral"]
    assert {one.name for one in ood.left_out} == {"mmd", "irm"}
    (correlation,) = study_correlations(study)
    assert {one.condition.name for one in correlation.points} == {"fgm", "coral", "hybrid"}
    assert {one.name for one in correlation.left_out} == {"mmd", "irm"}


def test_a_collapsed_baseline_is_no_baseline(tmp_path):
    write(tmp_path, "erm", dict.fromkeys(PLAIN, 0.5))
    write(tmp_path, "fgm", ROBUST, "adversarial")
    study = load_study(tmp_path)
    assert is_collapsed(next(one for one in study.conditions if one.name == "erm"))
    (found,) = study_verdicts(study)
    assert found.verdict is None
    assert "baseline is hardly better" in found.reason
    assert study_correlations(study) == []


def test_correlation_over_defenses(folder):
    rng = np.random.default_rng(0)
    for number in range(8):
        level = float(rng.uniform(0.25, 0.95))
        levels = {
            **PLAIN,
            "attack/deepwordbug": level,
            "attack/pwws": level,
            "ood/yelp": level,
            "ood/imdb": level,
        }
        write(folder, f"mixed{'abcdefgh'[number]}", levels, "both")
    (found,) = study_correlations(load_study(folder))
    assert found.correlation.pearson.num_defenses == len(found.points) == 11
    assert min(found.correlation.reliability[kind] for kind in ("adversarial", "OOD")) > 0.95
    assert found.correlation.pearson.low > 0
    assert found.correlation.spearman.low > 0
    assert "clean effects differ" in found.correlation.partial.reason  # all of them are noise here
    assert math.isnan(found.trajectory_p)  # one evaluation each


def test_what_was_not_measured_is_no_number(tmp_path):
    only_clean = {"clean/clean": 0.85, "ood/yelp": 0.7}
    write(tmp_path, "erm", only_clean)
    write(tmp_path, "fgm", only_clean, "adversarial")
    study = load_study(tmp_path)
    assert [column.key for column in transfer_matrix(study).columns] == ["clean", "ood_mean", "ood/yelp"]
    (found,) = study_verdicts(study)
    assert found.verdict is None
    assert found.reason == "adversarial accuracy was measured in no run"
    assert study_correlations(study) == []


def test_too_few_common_items_give_the_reason(tmp_path):
    write(tmp_path, "erm", PLAIN, num_items=20)
    write(tmp_path, "fgm", ROBUST, "adversarial")
    study = load_study(tmp_path)
    found = cell(transfer_matrix(study), "fgm", "adv")
    assert found.num_items == 20
    assert not found.known
    assert "20" in found.reason
    assert "20 common items are too few" in study_verdicts(study)[0].reason
    assert "too few" not in study_verdicts(load_study(tmp_path, min_items=10))[0].reason


def test_backbones_are_judged_apart(folder):
    write(folder, "erm_large", PLAIN, backbone="large")
    write(folder, "fgm_large", ROBUST, "adversarial", backbone="large")
    study = load_study(folder)
    found = {one.backbone: one for one in study_verdicts(study) if one.aim == "adv"}
    assert set(found) == {"mini", "large"}
    assert [one.name for one in found["large"].conditions] == ["fgm_large"]
    assert found["large"].baseline.name == "erm_large"


def test_effective_robustness_needs_undefended_models(folder):
    found = study_effective_robustness(load_study(folder))
    assert {one.kind for one in found} == {"adv", "ood"}
    assert all("1 undefended" in one.beyond.reason for one in found)
    for number, level in enumerate((0.7, 0.75, 0.8, 0.9, 0.95)):
        levels = {**PLAIN, "clean/clean": level, "ood/yelp": level - 0.15, "ood/imdb": level - 0.2}
        write(folder, f"plain{'abcde'[number]}", levels, backbone=f"other{number}")
    found = {
        (one.condition.name, one.kind): one.beyond for one in study_effective_robustness(load_study(folder))
    }
    assert found["hybrid", "ood"].low > 0.05
    assert not found["fgm", "ood"].sign


@pytest.mark.parametrize(("label", "moved", "expected"), [
    ("positive", -0.2, "inconclusive"), ("negative", 0.2, "inconclusive"), ("neutral", 0.2, "inconclusive"),
    ("positive", 0.2, "positive"), ("negative", -0.2, "negative"), ("neutral", 0.0, "neutral"),
])  # fmt: skip
def test_a_mean_that_the_only_defense_that_moved_contradicts_is_inconclusive(label, moved, expected):
    rng = np.random.default_rng(0)
    baseline = (rng.random((10, 500)) < 0.5).astype(float)
    changed = (rng.random((10, 500)) < 0.5 + moved).astype(float) if moved else baseline
    off = Together(np.stack([baseline, baseline, changed]), baseline, None)
    mean = transfer_verdict((baseline, baseline), (baseline, baseline))
    found = _unless_they_differ(replace(mean, label=label), ["a", "b", "moved"], off)
    assert found.label == expected
    assert ("moved" in found.reason) is (expected == "inconclusive")


def test_only_seeds_that_all_have_count_and_that_is_said(folder):
    write(folder, "pgd", ROBUST, "adversarial", seeds=(0,))
    verdict = next(one for one in study_verdicts(load_study(folder)) if one.aim == "adv")
    assert verdict.verdict.on_target.num_seeds == 1
    assert verdict.note == "Only 1 of 3 seeds count, those that all have: pgd lacks 2."


def test_few_clean_items_do_not_make_a_constant_answer(tmp_path):
    for size, expected in ((20, False), (200, True)):
        write(tmp_path / str(size), "erm", dict.fromkeys(PLAIN, 0.5), num_items=size)
        (erm,) = load_study(tmp_path / str(size)).conditions
        assert is_collapsed(erm) is expected


def test_the_line_of_effective_robustness_is_of_models_measured_alike(tmp_path):
    for number in range(6):
        parts = {**PLAIN, "clean/clean": 0.7 + 0.04 * number}
        del parts["attack/pwws"]
        write(tmp_path, f"erm{number}", parts, backbone=f"b{number}", num_items=600)
    write(tmp_path, "fgm", PLAIN | {"clean/clean": 0.8}, "adversarial", backbone="b9", num_items=600)
    found = {one.kind: one for one in study_effective_robustness(load_study(tmp_path))}
    assert found["adv"].line == []
    assert "0 undefended models" in found["adv"].beyond.reason
    assert len(found["ood"].line) == 6
    assert found["ood"].beyond.known


def test_effective_robustness_of_few_items_gives_the_reason(tmp_path):
    for number in range(6):
        write(
            tmp_path,
            f"erm{number}",
            {**PLAIN, "clean/clean": 0.7 + 0.04 * number},
            backbone=f"b{number}",
            num_items=20,
        )
    write(tmp_path, "fgm", PLAIN | {"clean/clean": 0.8}, "adversarial", backbone="b9", num_items=20)
    for one in study_effective_robustness(load_study(tmp_path)):
        assert "20 items are too few" in one.beyond.reason
        assert math.isnan(one.beyond.delta)


def test_an_imbalanced_task_s_good_model_is_no_constant_answer(tmp_path):
    for name, right in (("good", lambda i: i % 10 or i % 20), ("constant", lambda i: i % 10)):
        rows = [record(item_id=str(i), label=int(i % 10 == 0), correct=bool(right(i))) for i in range(200)]
        make_run(tmp_path / name, f"{name}-seed0", rows=[rows])
        (condition,) = load_study(tmp_path / name).conditions
        assert is_collapsed(condition) is (name == "constant")


def test_without_clean_items_those_under_shift_tell_a_constant_answer(tmp_path):
    parts = {"attack/pwws": 0.2, "ood/a": 0.9}
    write(tmp_path, "erm", parts, num_items=300)
    write(tmp_path, "fgm", {"attack/pwws": 0.5, "ood/a": 0.5}, "adversarial", num_items=300)
    (found,) = study_verdicts(load_study(tmp_path))
    assert found.reason == "all defenses are hardly better than a constant answer"
