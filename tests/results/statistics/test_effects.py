from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import contingency_tables, multitest, proportion

from lightning_robust.results.statistics import (
    MIN_ITEMS,
    Simulation,
    StatisticsError,
    accuracy,
    effect,
    holm,
    is_constant,
    mcnemar,
    wilson,
)


def test_many_seeds_and_negligible_items_are_the_t_test():
    # Items that all answer alike leave only the seeds' spread.
    rng = np.random.default_rng(0)
    means = rng.random(12) / 2
    treated = np.repeat(means[:, None] + 0.3, 20_000, axis=1)
    found = effect(treated, np.full_like(treated, 0.3))
    interval = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=1e-4)
    assert found.p_value == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=0.01)


def test_one_seed_is_the_paired_interval_of_agresti_and_min():
    treated = np.array([1] * 70 + [0] * 30)
    baseline = np.array([1] * 50 + [0] * 40 + [1] * 10)
    found = effect(treated, baseline)
    gained, lost, number = 20, 10, 100
    delta = (gained - lost) / number
    variance = (gained + lost - (gained - lost) ** 2 / number) / (number - 1) / number + 1 / 102**2
    assert found.delta == pytest.approx(delta)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * math.sqrt(variance))
    assert found.scope == "this training run"
    table = [[50, lost], [gained, 20]]
    assert found.p_value == pytest.approx(contingency_tables.mcnemar(table, exact=True).pvalue)
    assert mcnemar(treated, baseline) == found.p_value


def test_a_constant_answer_finds_labels_no_better_than_guessing():
    labels = np.array([0] * 90 + [1] * 10)
    for answers, expected in (
        (np.zeros(100), True),  # 90 % right
        (np.ones(100), True),
        (labels, False),
        (np.where(np.arange(100) < 96, 0, 1), False),  # 94 % right, and 4 of 10 found
        (np.where(np.arange(100) < 99, 0, 1), False),
        (np.arange(100) % 2, True),
    ):
        correct = answers == labels
        informedness = np.mean(answers[labels == 1] == 1) - np.mean(answers[labels == 0] == 1)  # Youden 1950
        assert is_constant(correct, labels) is expected is bool(informedness < 0.1 - 1e-9)
    assert not is_constant([], [])
    assert not is_constant([True, True], [1, 1])  # of one label nothing can be said


def test_mcnemar_without_a_change():
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_wilson_equals_statsmodels(share):
    expected = proportion.proportion_confint(share * 200, 200, method="wilson")
    assert wilson(share, 200) == pytest.approx(expected)


def test_holm_equals_statsmodels_and_leaves_out_what_was_not_tested():
    p = np.array([[0.01, 0.04, 0.03], [0.005, math.nan, 0.5]])
    known = p[~np.isnan(p)]
    expected = multitest.multipletests(known, method="holm")[1]
    assert holm(p)[~np.isnan(p)] == pytest.approx(expected)
    assert math.isnan(holm(p)[1, 1])
    assert holm([]).shape == (0,)


def test_accuracy_of_one_run_is_wilsons():
    found = accuracy([1] * 190 + [0] * 10)
    assert (found.low, found.high) == pytest.approx(wilson(0.95, 200))
    assert math.isnan(found.p_value)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_all_right_or_all_wrong_still_has_an_interval(value, num_seeds):
    found = accuracy(np.full((num_seeds, 200), value))
    assert found.delta == value
    assert 0 <= found.low < found.high <= 1
    same = effect(np.full((num_seeds, 200), value), np.full((num_seeds, 200), value))
    assert same.low < 0 < same.high
    assert same.p_value == pytest.approx(1)


def test_no_interval_without_enough_items_and_the_reason_says_so():
    few = effect([1] * (MIN_ITEMS - 1), [0] * (MIN_ITEMS - 1))
    assert few.delta == 1
    assert not few.known
    assert f"{MIN_ITEMS} are needed" in few.reason
    strata = [0] * 100 + [1] * 5
    assert "5 items" in effect([1] * 105, [0] * 105, strata=strata).reason
    assert not effect(np.zeros((0, 50)), np.zeros((0, 50))).known
    assert not effect(np.zeros((3, 0)), np.zeros((3, 0))).known


@pytest.mark.parametrize(
    ("treated", "baseline", "words"),
    [
        ([[1, 0]], [[1, 0, 1]], "one shape"),
        ([1.0, math.nan], [1, 0], "count as wrong"),
        ([2, 0], [1, 0], "between 0 and 1"),
        ([[[1]]], [[[1]]], "3 dimensions"),
    ],
)
def test_bad_arrays(treated, baseline, words):
    with pytest.raises(StatisticsError, match=words):
        effect(treated, baseline)


def test_bad_settings():
    with pytest.raises(StatisticsError, match="confidence"):
        effect([1] * 50, [0] * 50, confidence=95)
    with pytest.raises(StatisticsError, match="one stratum"):
        effect([1] * 50, [0] * 50, strata=[0] * 49)


def test_the_bootstrap_repeats_and_resamples_both_ways():
    rng = np.random.default_rng(5)
    (baseline, treated), _ = Simulation(seed=0.6).answers(rng, [0.0], 8, 300)
    one = effect(treated, baseline, method="bootstrap", resamples=500)
    assert one == effect(treated, baseline, method="bootstrap", resamples=500)
    assert one != effect(treated, baseline, method="bootstrap", resamples=500, seed=1)
    # Resampling eight seeds gives about what Student's t does, but for the factor sqrt(7/8) and the quantile.
    width = (one.high - one.low) / (effect(treated, baseline).high - effect(treated, baseline).low)
    assert 0.65 < width < 1.0


def test_simulated_truth_is_what_many_answers_show():
    world = Simulation(seed=0.4)
    answers, luck = world.answers(np.random.default_rng(9), [0.7], 30, 20_000)
    shown = answers.mean(axis=2)
    assert shown[0, 0] == pytest.approx(world.accuracy(luck=luck[0, 0]), abs=0.015)
    assert shown[1, 3] == pytest.approx(world.accuracy(0.7, luck[1, 3]), abs=0.015)
    assert shown[1].mean() - shown[0].mean() == pytest.approx(world.effect(0.7), abs=0.05)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_spread", [0.0, 0.15, 0.5])
def test_intervals_cover(num_seeds, seed_spread):
    """A fast version of benchmarks/calibration.py: 300 studies, so 91 % to 98.9 % is chance."""
    world = Simulation(seed=seed_spread)
    truth, rng = world.effect(0.3), np.random.default_rng(6)
    found = [effect(*world.answers(rng, [0.3], num_seeds, 200)[0][::-1]) for _ in range(300)]
    assert 0.91 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.989
