"""Measures, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from stocklora.metrics.calibration import Calibration, fit_calibration
from stocklora.metrics.scores import QUANTILE_LEVELS, coverage, pinball_loss, score, width_explained

LEVELS = np.array(QUANTILE_LEVELS)


def normal_quantiles(n, spread=1.0, shift=0.0):
    from scipy.stats import norm

    return np.broadcast_to(shift + spread * norm.ppf(LEVELS), (n, 1, len(LEVELS))).copy()


def test_pinball_by_hand():
    loss = pinball_loss(np.array([[1.0]]), np.array([[[0.0, 3.0]]]), np.array([0.1, 0.9]))
    assert loss[0, 0] == pytest.approx((0.1 * 1.0 + 0.1 * 2.0) / 2)


def test_the_true_quantiles_have_the_lowest_pinball_loss():
    returns = np.random.default_rng(0).standard_normal((20_000, 1))
    true = pinball_loss(returns, normal_quantiles(20_000), LEVELS).mean()
    for spread, shift in ((0.8, 0.0), (1.25, 0.0), (1.0, 0.2)):
        assert pinball_loss(returns, normal_quantiles(20_000, spread, shift), LEVELS).mean() > true


def test_coverage_counts_the_share_inside():
    returns = np.random.default_rng(1).standard_normal((20_000, 1))
    assert coverage(returns, normal_quantiles(20_000), LEVELS, 0.8) == pytest.approx(80, abs=1)
    assert coverage(returns, normal_quantiles(20_000), LEVELS, 0.9) == pytest.approx(90, abs=1)
    with pytest.raises(ValueError, match="no quantile"):
        coverage(returns, normal_quantiles(20_000), LEVELS, 0.99)


def test_scores_by_hand():
    # Two origins at 100 and 50; closes 110 and 45; forecasts 105 and 50.
    returns = np.log(np.array([[1.1], [0.9]]))
    quantiles = np.log(np.array([[1.05], [1.0]]))[:, :, None] + np.linspace(-0.2, 0.2, len(LEVELS))
    result = score(np.array([100.0, 50.0]), returns, quantiles, LEVELS)
    assert result.mae == pytest.approx(5.0)
    assert result.rmse == pytest.approx(5.0)
    assert result.mape == pytest.approx(100 * (5 / 110 + 5 / 45) / 2)
    assert result.direction == 100.0  # the forecast of no move has no direction
    assert result.origins == 2


def test_calibration_widens_intervals_that_are_too_narrow():
    returns = np.random.default_rng(2).standard_normal((20_000, 1))
    fitted = fit_calibration(returns, normal_quantiles(20_000, spread=0.5), LEVELS)
    assert fitted.interval_scale == pytest.approx(2.0, rel=0.08)
    repaired = fitted.apply(normal_quantiles(20_000, spread=0.5), LEVELS)
    assert coverage(returns, repaired, LEVELS, 0.8) == pytest.approx(80, abs=2)


def test_calibration_shrinks_a_point_forecast_that_knows_nothing():
    draw = np.random.default_rng(3)
    returns = draw.standard_normal((4_000, 1))
    noise = normal_quantiles(4_000) + draw.standard_normal((4_000, 1, 1))
    assert fit_calibration(returns, noise, LEVELS).shrinkage < 0.1


def test_calibration_of_a_good_forecast_is_left_alone():
    returns = np.random.default_rng(4).standard_normal((4_000, 1))
    fitted = fit_calibration(returns, normal_quantiles(4_000), LEVELS)
    assert fitted.interval_scale == pytest.approx(1.0, abs=0.05)


def test_a_few_validation_days_cannot_swing_the_calibration():
    returns = np.random.default_rng(5).standard_normal((3, 1)) * 0.1
    assert fit_calibration(returns, normal_quantiles(3), LEVELS).interval_scale > 0.7


def test_calibrated_quantiles_keep_their_order():
    draw = np.random.default_rng(6)
    quantiles = np.sort(draw.standard_normal((50, 3, len(LEVELS))), axis=-1)
    assert (np.diff(Calibration(0.3, 1.7).apply(quantiles, LEVELS), axis=-1) >= 0).all()


def test_the_width_explained_is_r2_of_its_log_over_the_starts():
    draw = np.random.default_rng(0)
    size, other = draw.uniform(0.5, 2.0, (2, 500, 1, 1))
    start = normal_quantiles(500) * draw.uniform(0.5, 2.0, (500, 1, 1))
    wanted, noisy = start * size, start * size * other**0.2
    usual = start * np.exp(np.log(size).mean())
    assert width_explained(wanted, wanted, start) == 1.0
    assert width_explained(wanted + 0.3, wanted, start) == pytest.approx(1.0)  # where it stands is not how wide it is
    assert width_explained(usual, wanted, start) == pytest.approx(0.0)
    assert width_explained(start * 2.0, wanted, start) < 0.0
    expected = 1.0 - np.mean((0.2 * np.log(other)) ** 2) / np.log(size).var()
    assert width_explained(noisy, wanted, start) == pytest.approx(expected)
