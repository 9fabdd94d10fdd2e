from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from lightning_robust.results.statistics import (
    StatisticsError,
    effective_robustness,
    expected_accuracy,
    probit,
    trajectory_p_value,
    transfer_correlation,
)
from lightning_robust.results.statistics.correlation import LEAST_DEFENSES


def effects(number, seed=0):
    return (
        np.random.default_rng(seed)
        .multivariate_normal([0, 0, 0], [[1, 0.6, 0.4], [0.6, 1, 0.5], [0.4, 0.5, 1]], number)
        .T
    )


def test_pearson_equals_scipy():
    adv, ood, clean = effects(12)
    found = transfer_correlation(adv, ood, clean).pearson
    expected = stats.pearsonr(adv, ood)
    assert found.value == pytest.approx(expected.statistic)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_spearman_and_partial_equal_independent_ways():
    adv, ood, clean = effects(15)
    found = transfer_correlation(adv, ood, clean)
    assert found.spearman.value == pytest.approx(stats.spearmanr(adv, ood).statistic)
    rest = [sm.OLS(y, sm.add_constant(clean)).fit().resid for y in (adv, ood)]
    assert found.partial.value == pytest.approx(np.corrcoef(*rest)[0, 1])
    reach = 1.959964 / math.sqrt(15 - 4)
    assert found.partial.high == pytest.approx(math.tanh(math.atanh(found.partial.value) + reach), rel=1e-5)


@pytest.mark.parametrize("name", list(LEAST_DEFENSES))
def test_too_few_defenses_give_the_reason(name):
    least = LEAST_DEFENSES[name]
    assert math.isnan(getattr(transfer_correlation(*effects(least - 1)), name).value)
    assert f"({least} are needed)" in getattr(transfer_correlation(*effects(least - 1)), name).reason
    assert not getattr(transfer_correlation(*effects(least)), name).reason


def test_noise_that_could_move_a_correlation_gives_the_reason():
    adv, ood, clean = effects(12)
    spread = float(adv.std(ddof=1))
    # A quarter of the standard error, 1/3: noise may be a twelfth of the variance.
    fine = transfer_correlation(adv, ood, adv_errors=np.full(12, 0.28 * spread), ood_errors=np.zeros(12))
    assert fine.reliability == pytest.approx({"adversarial": 1 - 0.28**2, "OOD": 1.0})
    assert not fine.pearson.reason
    noisy = transfer_correlation(adv, ood, adv_errors=np.full(12, 0.3 * spread), ood_errors=np.zeros(12))
    assert "9 %" in noisy.pearson.reason
    assert "at most 8 %" in noisy.pearson.reason
    assert math.isnan(noisy.pearson.low)
    # Noise in clean effects leaves in the partial correlation what it should take out, and harms that one only.
    harmed = transfer_correlation(adv, ood, clean, clean_errors=np.full(12, 0.5 * clean.std(ddof=1)))
    assert "clean" in harmed.partial.reason
    assert not harmed.pearson.reason


def test_constant_effects_and_wrong_lengths():
    assert "same effect" in transfer_correlation(np.zeros(12), np.arange(12)).pearson.reason
    with pytest.raises(StatisticsError, match="lengths"):
        transfer_correlation(np.zeros(5), np.zeros(6))
    with pytest.raises(StatisticsError, match="NaN"):
        transfer_correlation([math.nan] * 5, np.zeros(5))


def test_intervals_cover():
    rng = np.random.default_rng(1)
    covariance = [[1, 0.5], [0.5, 1]]
    found = [
        transfer_correlation(*rng.multivariate_normal([0, 0], covariance, 8).T).pearson for _ in range(600)
    ]
    assert 0.93 <= np.mean([one.low <= 0.5 <= one.high for one in found]) <= 0.97


def test_trajectories_that_drift_apart_are_no_evidence():
    # Two independent random walks correlate often; against the shifted null they do not.
    rng = np.random.default_rng(2)
    found = [
        trajectory_p_value(
            [rng.normal(size=10).cumsum() for _ in range(3)], [rng.normal(size=10).cumsum() for _ in range(3)],
            permutations=300, seed=i,
        )
        for i in range(200)
    ]  # fmt: skip
    assert np.mean(np.array(found) < 0.05) <= 0.09
    walks = [rng.normal(size=10).cumsum() for _ in range(4)]
    assert trajectory_p_value(walks, walks) < 0.01
    assert math.isnan(trajectory_p_value([[1, 2, 3]], [[3, 4, 5]]))
    assert math.isnan(trajectory_p_value([[1] * 9], [[1] * 9]))


def test_effective_robustness_equals_least_squares():
    rng = np.random.default_rng(3)
    clean = np.linspace(0.6, 0.9, 9)
    robust = stats.norm.cdf(probit(clean) * 0.8 - 0.4 + rng.normal(0, 0.05, 9))
    found = effective_robustness(0.8, 0.75, clean, robust, robust_error=0.0)
    fit = sm.OLS(probit(robust), sm.add_constant(probit(clean))).fit()
    line = fit.get_prediction([[1.0, float(probit([0.8])[0])]])
    expected = float(stats.norm.cdf(line.predicted_mean[0]))
    assert found.delta == pytest.approx(0.75 - expected)
    low, high = stats.norm.cdf(line.conf_int(obs=True)[0])
    assert (0.75 - high, 0.75 - low) == pytest.approx((found.low, found.high), abs=0.006)
    wider = effective_robustness(0.8, 0.75, clean, robust, robust_error=0.05)
    assert wider.low < found.low
    assert effective_robustness(0.8, 0.75, clean, robust, robust_error=0.0, clean_error=0.05).low < found.low
    few = effective_robustness(0.8, 0.75, clean, robust, robust_error=0.0, num_seeds=2)
    reach = (found.delta - found.low) * stats.t.isf(0.025, 1) / stats.t.isf(0.025, 7)
    assert few.delta - few.low == pytest.approx(reach)
    assert few.delta + reach > 1 - expected
    assert few.high == pytest.approx(1 - expected)  # no accuracy is above 1
    assert expected_accuracy([0.8], clean, robust) == pytest.approx([expected])


def test_undefended_models_do_not_stand_out():
    rng, out = np.random.default_rng(4), 0
    for _ in range(200):
        clean = rng.uniform(0.7, 0.95, 9)
        robust = stats.norm.cdf(0.9 * probit(clean) - 0.5 + rng.normal(0, 0.08, 9))
        inside = np.argsort(clean)[4]  # a model like the others, between them
        rest = np.delete(np.arange(9), inside)
        found = effective_robustness(
            clean[inside], robust[inside], clean[rest], robust[rest], robust_error=0.0
        )
        out += found.sign != 0
    assert out <= 18  # 5 % of 200 are 10


@pytest.mark.parametrize(
    ("clean", "baselines", "words"),
    [
        (0.8, [0.7, 0.9, 0.8], "too few"),
        (0.95, [0.6, 0.7, 0.8, 0.85, 0.9], "outside"),
        (0.7, [0.7] * 9, "1 undefended"),
    ],
)
def test_effective_robustness_needs_baselines_around(clean, baselines, words):
    found = effective_robustness(clean, 0.5, baselines, baselines, robust_error=0.01)
    assert words in found.reason
    assert math.isnan(found.delta)


def test_one_seed_gives_no_correlation():
    effects = np.random.default_rng(0).normal(0, 0.05, 12)
    errors = np.full(12, 0.001)
    for seeds, known in ((1, False), (2, True)):
        found = transfer_correlation(
            effects,
            effects,
            effects,
            adv_errors=errors,
            ood_errors=errors,
            clean_errors=errors,
            num_seeds=seeds,
        )
        assert math.isnan(found.pearson.value) is not known
        assert ("luck of training runs" in found.spearman.reason) is not known


def test_baselines_that_are_all_nearly_perfect_make_no_line():
    found = effective_robustness(
        0.9995, 0.5, [0.9991, 0.9993, 0.9995, 0.9997, 0.9999], [0.5] * 5, robust_error=0.01
    )
    assert "too few for a line" in found.reason
