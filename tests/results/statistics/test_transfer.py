from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from lightning_robust.results.statistics import (
    Components,
    Simulation,
    StatisticsError,
    components,
    differences,
    effect,
    minimal_detectable_effect,
    needed,
    needed_items,
    transfer_ratio,
    transfer_verdict,
)
from lightning_robust.results.statistics.crossed import crossed_mean

LUCK = Simulation(seed=0.05)
GAIN, NONE, LOSS = (LUCK, 1.2), (Simulation(change=0.0, seed=0.0), 0.0), (LUCK, -1.0)


def draw(rng, world, seeds, items):
    simulation, gain = world
    baseline, treated = simulation.answers(rng, [gain], seeds, items)[0]
    return treated, baseline


def pairs(world, seeds, items, seed=0):
    return draw(np.random.default_rng(seed), world, seeds, items)


def test_one_seeds_ratio_is_fiellers_closed_form():
    on, off = pairs(GAIN, 1, 400), pairs((Simulation(), 0.5), 1, 600, seed=1)
    found = transfer_ratio(on, off)
    x, y = crossed_mean(*differences(*on)), crossed_mean(*differences(*off))
    z = stats.norm.isf(0.025)
    g = (z * x.item_error / x.mean) ** 2
    centre = y.mean / x.mean / (1 - g)
    half = z / x.mean / (1 - g) * math.sqrt((1 - g) * y.item_error**2 + (y.mean / x.mean * x.item_error) ** 2)
    assert found.value == pytest.approx(y.mean / x.mean)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), rel=1e-4)


def test_ratio_covers():
    world, rng = Simulation(seed=0.2), np.random.default_rng(2)
    truth = world.effect(0.5) / world.effect(1.2)
    found = [
        transfer_ratio(draw(rng, (world, 1.2), 4, 200), draw(rng, (world, 0.5), 4, 200)) for _ in range(120)
    ]
    known = [one for one in found if not one.reason]
    assert len(known) > 100
    assert 0.9 <= np.mean([one.low <= truth <= one.high for one in known]) <= 1.0


def test_ratio_is_not_estimable_without_a_gain():
    found = transfer_ratio(pairs(NONE, 3, 300), pairs(GAIN, 3, 300))
    assert math.isnan(found.value)
    assert "contains 0" in found.reason


@pytest.mark.parametrize(
    ("on", "off", "items", "label"),
    [
        (GAIN, GAIN, 400, "positive"),
        (GAIN, LOSS, 400, "negative"),
        (GAIN, (Simulation(level=12.0, item=4.0, change=0.0, seed=0.0), 0.0), 4000, "neutral"),
        (GAIN, NONE, 200, "inconclusive"),
        (NONE, GAIN, 400, "inconclusive"),
        (LOSS, GAIN, 400, "inconclusive"),
    ],
)
def test_labels(on, off, items, label):
    for aim in ("adv", "ood"):
        sides = [pairs(on, 5, items), pairs(off, 5, items, seed=1)]
        adv, ood = sides if aim == "adv" else sides[::-1]
        found = transfer_verdict(adv, ood, aim=aim)
        assert found.label == label
        assert found.on_target == effect(*sides[0])
        assert found.off_target == effect(*sides[1])
        assert bool(found.reason) == (label == "inconclusive")
        assert (found.spread is not None) == (label == "inconclusive")
        assert label == "inconclusive" or found.needed is None


def test_lack_of_evidence_is_never_neutral():
    # Few items: the interval is far wider than the margin, though the estimate is about 0.
    found = transfer_verdict(pairs(GAIN, 3, 400), pairs(NONE, 3, 60), margin=0.05)
    assert found.label == "inconclusive"
    assert found.spread is not None
    assert found.needed is None or found.needed.num_items * found.needed.num_seeds > 3 * 60


def test_one_seed_does_not_speak_for_the_method():
    found = transfer_verdict(pairs(GAIN, 1, 1000), pairs(GAIN, 1, 1000, seed=1))
    assert found.label == "inconclusive"
    assert "one seed" in found.reason
    assert found.needed is None
    assert found.off_target.low > 0


@pytest.mark.parametrize("settings", [{"aim": "both"}, {"margin": 0.0}, {"margin": math.nan}])
def test_bad_settings(settings):
    with pytest.raises(StatisticsError, match="Expected `"):
        transfer_verdict(pairs(GAIN, 2, 50), pairs(GAIN, 2, 50), **settings)


def test_false_verdicts_are_rare():
    """A fast version of benchmarks/calibration.py: 5 % of 150 are 7.5; 14 is chance."""
    rng, off = np.random.default_rng(7), Simulation(change=0.0, seed=0.2)
    assert off.effect(0.0) == 0
    labels = [
        transfer_verdict(draw(rng, GAIN, 3, 200), draw(rng, (off, 0.0), 3, 200)).label for _ in range(150)
    ]
    assert labels.count("positive") + labels.count("negative") <= 14


def test_detectable_effect_is_that_of_the_t_test_where_only_seeds_vary():
    # The sum of two quantiles is the usual approximation of the t-test's power: close, and a little short.
    for seeds in (5, 10, 20):
        found = minimal_detectable_effect(Components(0.01**2, 0.0, 0.0), seeds, 1000)
        exact = 0.01 * TTestPower().solve_power(nobs=seeds, alpha=0.05, power=0.8)
        assert found == pytest.approx(exact, rel=0.08)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_power_is_what_it_says(num_seeds):
    parts = Components(0.015**2, 0.1, 0.2)
    true = minimal_detectable_effect(parts, num_seeds, 300)
    rng = np.random.default_rng(8)
    seen = 0
    for _ in range(400):
        seeds = rng.normal(0, 0.015, (num_seeds, 1))
        values = true + seeds + rng.normal(0, math.sqrt(0.1), 300)
        values = values + rng.normal(0, math.sqrt(0.2), (num_seeds, 300))
        mean = crossed_mean(values)
        seen += abs(mean.mean) > mean.half_width(0.95)
    assert seen / 400 == pytest.approx(0.8, abs=0.07)


def test_a_plan_from_a_few_seeds_is_guarded():
    rng = np.random.default_rng(10)
    world, enough = Simulation(seed=0.1), []
    true = components(np.subtract(*world.answers(rng, [0.0], 200, 3000)[0].astype(float)[::-1]))
    for _ in range(60):
        baseline, treated = world.answers(rng, [0.0], 3, 300)[0].astype(float)
        plan = needed(components(treated - baseline, guard=0.8), 0.03)
        enough.append(plan is None or minimal_detectable_effect(true, *plan) <= 0.031)
    assert np.mean(enough) > 0.7


def test_nothing_is_planned_with_hardly_any_items():
    found = needed(Components(0.0, 0.0, 0.0), 0.01)
    assert found.num_items > 50  # what the interval adds for rounding and for answers not seen


def test_needed_items_and_seeds():
    parts = Components(0.005**2, 0.1, 0.1)
    items = needed_items(parts, 0.03, 5)
    assert (
        minimal_detectable_effect(parts, 5, items) <= 0.03 < minimal_detectable_effect(parts, 5, items - 20)
    )
    assert needed_items(Components(0.1**2, 0.1, 0.1), 0.01, 3) is None  # the seeds alone spread too far
    best = needed(parts, 0.03)
    assert best.num_items == needed_items(parts, 0.03, best.num_seeds) <= 10_000
    assert all((needed_items(parts, 0.03, fewer) or 1e9) > 10_000 for fewer in range(2, best.num_seeds))
    assert needed(parts, 0.03, most_items=items).num_seeds == 5
    assert needed(Components(math.nan, 0.1, 0.0), 0.03) is None
    assert needed_items(Components(math.nan, 0.1, 0.0), 0.03, 1) is not None


def test_the_ratio_holds_nothing_exactly_where_the_effect_does():
    # Seeds that agree exactly: their spread is what rounding leaves.
    on = np.repeat([[1.0] * 40 + [0.0] * 60], 2, axis=0), np.zeros((2, 100))
    for gained in range(3, 9):
        off = np.repeat([[1.0] * gained + [0.0] * (100 - gained)], 2, axis=0), np.zeros((2, 100))
        ratio, other = transfer_ratio(on, off), effect(*off)
        assert (ratio.low > 0) is (other.low > 0), gained
