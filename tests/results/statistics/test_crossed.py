from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightning_robust.results.statistics import components, crossed_mean
from lightning_robust.results.statistics.crossed import tail, tail_quantile

ERRORS = [(1.0, 0.0), (1.0, 0.05), (1.0, 1.0), (0.2, 1.0), (0.01, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize("df", [1, 2, 4, 9])
@pytest.mark.parametrize(("seed_error", "item_error"), ERRORS)
def test_tail_equals_simulation(df, seed_error, item_error):
    rng = np.random.default_rng(0)
    draws = np.abs(seed_error * rng.standard_t(df, 400_000) + item_error * rng.normal(size=400_000))
    for share in (0.4, 0.05, 0.01):
        quantile = tail_quantile(share, seed_error, item_error, df)
        assert tail(quantile, seed_error, item_error, df) == pytest.approx(share, rel=1e-4)
        assert np.mean(draws >= quantile) == pytest.approx(share, abs=5 * math.sqrt(share / 400_000))


@pytest.mark.parametrize("df", [1, 2, 4])
def test_tail_ends_in_students_and_the_normal_distribution(df):
    assert tail(3.0, 1.0, 1e-6, df) == pytest.approx(2 * stats.t.sf(3.0, df), rel=1e-4)
    assert tail(3.0, 1e-6, 1.0, df) == pytest.approx(2 * stats.norm.sf(3.0), rel=1e-3)
    assert tail(3.0, 1.0, 0.0, df) == pytest.approx(2 * stats.t.sf(3.0, df))
    assert tail(3.0, 0.0, 1.0, df) == pytest.approx(2 * stats.norm.sf(3.0))


def test_small_p_values_are_right():
    # Holm's correction asks for tails that a simulation hardly reaches.
    exact = stats.t.sf(60.0, 2) * 2
    assert tail(60.0, 1.0, 0.5, 2) == pytest.approx(exact, rel=0.01)
    assert tail(60.0, 1.0, 1.5, 2) == pytest.approx(exact, rel=0.01)


def test_errors_are_those_of_the_two_way_layout():
    values = np.random.default_rng(1).random((4, 50))
    rows, columns, mean = values.mean(1), values.mean(0), values.mean()
    residual = ((values - rows[:, None] - columns + mean) ** 2).sum() / (3 * 49)
    found = crossed_mean(values)
    assert found.mean == pytest.approx(mean)
    assert found.seed_error**2 == pytest.approx((rows.var(ddof=1) + 1 / 50**2 / 12) / 4)
    items = (columns.var(ddof=1) - residual / 4) / 50
    assert found.item_error**2 == pytest.approx(max(items, 0) + 1 / 52**2 / 4)
    parts = components(values)
    assert parts.residual == pytest.approx(residual)
    assert parts.item == pytest.approx(max(columns.var(ddof=1) - residual / 4, 0))
    assert parts.seed == pytest.approx(max(rows.var(ddof=1) - residual / 50, 0))


def test_components_are_found_again():
    rng = np.random.default_rng(3)
    shape = (60, 800)
    values = 0.2 * rng.normal(size=(60, 1)) + 0.3 * rng.normal(size=800) + 0.5 * rng.normal(size=shape)
    parts = components(values)
    assert parts.seed == pytest.approx(0.04, rel=0.3)
    assert parts.item == pytest.approx(0.09, rel=0.15)
    assert parts.residual == pytest.approx(0.25, rel=0.05)


def test_strata_count_equally_whatever_their_size():
    rng = np.random.default_rng(4)
    small = (rng.random((3, 40)) + rng.random(40)) / 2
    large = (rng.random((3, 400)) + rng.random(400)) / 4
    strata = np.array([1] * 40 + [7] * 400)
    both = crossed_mean(np.concatenate([small, large], axis=1), strata)
    one, other = crossed_mean(small), crossed_mean(large)
    assert both.mean == pytest.approx((one.mean + other.mean) / 2)
    assert both.item_error == pytest.approx(math.hypot(one.item_error, other.item_error) / 2)
    seeds = (small.mean(1) + large.mean(1)) / 2
    rounding = (1 / 40**2 + 1 / 400**2) / 4 / 12
    assert both.seed_error**2 == pytest.approx((seeds.var(ddof=1) + rounding) / 3)
    parts = components(np.concatenate([small, large], axis=1), strata)
    assert parts.item / 440 == pytest.approx(both.item_error**2 - (1 / 42**2 + 1 / 402**2) / 12, abs=1e-9)


def test_equal_answers_do_not_prove_equality():
    assert crossed_mean(np.zeros((1, 100))).half_width(0.95) == pytest.approx(1.96 / 102, rel=1e-3)
    assert crossed_mean(np.zeros((3, 100))).half_width(0.95) > 0


def test_two_seeds_that_agree_by_chance_prove_nothing():
    rng = np.random.default_rng(5)
    values = rng.choice([0.0, 1.0], size=(1, 100), p=[0.8, 0.2])
    found = crossed_mean(np.concatenate([values, rng.permuted(values, axis=1)]))
    assert found.mean > 0.1
    assert found.p_value() > 0.002
