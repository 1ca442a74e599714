"""Tests of forecasts: hand-computed figures, other libraries, and simulations of what each test promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sign_tests import pesaran_timmermann

from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.metrics.significance import (
    crps_from_quantiles,
    diebold_mariano,
    directional_skill,
    holm,
    long_run_variance,
    pit,
    relative_mean_interval,
)

LEVELS = np.array(QUANTILE_LEVELS)


def overlapping(draw, days, horizon):
    """Sums of ``horizon`` consecutive normal draws, one a day: MA(horizon - 1) with mean zero."""
    return np.convolve(draw.standard_normal(days + horizon - 1), np.ones(horizon), "valid")


def persistent(draw, days, memory=0.95):
    """A normal AR(1) series: a forecast that seldom changes its mind."""
    values = draw.standard_normal(days)
    for day in range(1, days):
        values[day] = memory * values[day - 1] + math.sqrt(1 - memory**2) * values[day]
    return values


def rejections(p_values, level=0.05):
    p_values = np.array(p_values)
    assert not np.isnan(p_values).any()
    return float((p_values < level).mean())


# Diebold and Mariano


def test_one_day_ahead_it_is_the_t_test_of_the_mean():
    # With h = 1 the correction turns the variance over n into that over n - 1.
    difference = np.random.default_rng(0).standard_normal(40) + 0.3
    expected = stats.ttest_1samp(difference, 0.0)
    assert diebold_mariano(difference, 1) == pytest.approx((expected.statistic, expected.pvalue))


@pytest.mark.parametrize(("horizon", "kernel"), [(3, "uniform"), (2, "bartlett")])
def test_further_ahead_it_is_a_regression_on_a_constant_with_robust_errors(horizon, kernel):
    import statsmodels.api as sm

    difference = overlapping(np.random.default_rng(1), 60, horizon) + 0.2
    if kernel == "bartlett":  # differences that alternate make the rectangular sum negative
        difference = 0.2 + (-1.0) ** np.arange(60) + 0.1 * difference
    options = {"maxlags": horizon - 1, "kernel": kernel, "use_correction": False}
    fit = sm.OLS(difference, np.ones(60)).fit(cov_type="HAC", cov_kwds=options)
    correction = math.sqrt((60 + 1 - 2 * horizon + horizon * (horizon - 1) / 60) / 60)
    statistic, p_value = diebold_mariano(difference, horizon)
    assert statistic == pytest.approx(float(fit.tvalues[0]) * correction)
    assert p_value == pytest.approx(2 * stats.t.sf(abs(statistic), 59))


def test_the_rectangular_sum_of_alternating_differences_is_indeed_not_positive():
    deviations = (-1.0) ** np.arange(40)
    by_hand = 1.0 + 2 * (-39 / 40)
    assert by_hand < 0
    assert long_run_variance(deviations, 1) == pytest.approx(1.0 + 2 * 0.5 * (-39 / 40))  # Bartlett
    assert long_run_variance(np.abs(deviations), 1) == pytest.approx(1.0 + 2 * 39 / 40)


@pytest.mark.parametrize("horizon", [1, 3])
def test_equal_accuracy_is_rejected_about_as_often_as_promised(horizon):
    draw = np.random.default_rng(2)
    series = [overlapping(draw, 150, horizon) for _ in range(800)]
    assert 0.03 < rejections([diebold_mariano(d, horizon)[1] for d in series]) < 0.08
    if horizon > 1:  # what not allowing for the overlap would do
        assert rejections([diebold_mariano(d, 1)[1] for d in series]) > 0.15


def test_a_better_forecaster_is_found_and_the_sign_says_which():
    draw = np.random.default_rng(3)
    results = [diebold_mariano(overlapping(draw, 500, 3) - 0.6, 3) for _ in range(100)]
    assert rejections([p for _, p in results]) > 0.9
    assert all(statistic < 0 for statistic, _ in results)


@pytest.mark.parametrize(
    ("difference", "horizon"),
    [
        (np.zeros(100), 1),
        (np.full(100, 0.1), 1),  # varies by rounding at most
        (np.random.default_rng(0).standard_normal(9), 1),
        (np.random.default_rng(0).standard_normal(29), 3),
        (np.array([]), 1),
        (np.array([1.0]), 3),
    ],
    ids=["zero", "constant", "nine days", "29 days, 3 ahead", "none", "one"],
)
def test_nothing_is_said_where_there_is_nothing_to_test(difference, horizon):
    assert np.isnan(diebold_mariano(difference, horizon)).all()


@pytest.mark.parametrize("difference", [np.zeros((5, 2)), np.array([1.0, np.nan]), np.array([np.inf])])
def test_a_difference_must_be_one_finite_series(difference):
    with pytest.raises(ValueError, match="loss_difference"):
        diebold_mariano(difference, 1)


def test_a_horizon_must_be_positive():
    for call in (lambda: diebold_mariano(np.ones(20), 0), lambda: pesaran_timmermann(np.ones(20), np.ones(20), 0)):
        with pytest.raises(ValueError, match="horizon"):
            call()


finite_series = arrays(float, st.integers(30, 80), elements=st.floats(-1e6, 1e6, allow_subnormal=False))


@given(finite_series, st.integers(1, 3), st.floats(1e-3, 1e3))
def test_swapping_the_forecasters_swaps_the_sign_and_the_unit_does_not_matter(difference, horizon, unit):
    statistic, p_value = diebold_mariano(difference, horizon)
    assert math.isnan(p_value) or 0.0 <= p_value <= 1.0
    for other, sign in ((-difference, -1.0), (unit * difference, 1.0)):
        assert diebold_mariano(other, horizon) == pytest.approx((sign * statistic, p_value), rel=1e-6, nan_ok=True)


# Holm


def test_holm_by_hand():
    # Sorted: 0.01 * 4, then 0.02 * 3, 0.03 * 2 (not below the one before), 0.5 * 1.
    np.testing.assert_allclose(holm(np.array([0.03, 0.01, 0.5, 0.02])), [0.06, 0.04, 0.5, 0.06])


@pytest.mark.parametrize("count", [1, 2, 30])
def test_holm_agrees_with_statsmodels(count):
    from statsmodels.stats.multitest import multipletests

    p_values = np.random.default_rng(count).random(count).round(1) / 4  # with ties and zeros
    np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1])


def test_holm_does_not_count_what_was_not_tested():
    adjusted = holm(np.array([np.nan, 0.01, np.nan, 0.04]))
    np.testing.assert_allclose(adjusted, [np.nan, 0.02, np.nan, 0.04])
    assert np.isnan(holm(np.array([np.nan, np.nan]))).all()
    assert len(holm(np.array([]))) == 0


# Pesaran and Timmermann


def test_pesaran_timmermann_by_the_formula_of_the_paper():
    draw = np.random.default_rng(4)
    forecast, actual = draw.standard_normal(60) + 0.2, draw.standard_normal(60) + 0.4
    rises_forecast, rises = (forecast > 0).mean(), (actual > 0).mean()
    right = ((forecast > 0) == (actual > 0)).mean()
    chance = rises * rises_forecast + (1 - rises) * (1 - rises_forecast)
    variance = chance * (1 - chance) / 60
    variance_chance = (
        (2 * rises - 1) ** 2 * rises_forecast * (1 - rises_forecast) / 60
        + (2 * rises_forecast - 1) ** 2 * rises * (1 - rises) / 60
        + 4 * rises * rises_forecast * (1 - rises) * (1 - rises_forecast) / 60**2
    )
    expected = (right - chance) / math.sqrt(variance - variance_chance)
    assert pesaran_timmermann(forecast, actual) == pytest.approx((expected, stats.norm.sf(expected)))


def test_its_square_is_a_chi_square_of_the_contingency_table():
    table = np.array([[30, 20], [15, 35]])  # rows: forecast up, down; columns: came up, down
    forecast = np.repeat([1.0, 1.0, -1.0, -1.0], table.ravel())
    actual = np.repeat([1.0, -1.0, 1.0, -1.0], table.ravel())
    chi_square = stats.chi2_contingency(table, correction=False).statistic
    assert pesaran_timmermann(forecast, actual)[0] == pytest.approx(math.sqrt(chi_square * 100 / 99))


def test_three_days_ahead_by_hand():
    draw = np.random.default_rng(5)
    forecast, actual = persistent(draw, 90), overlapping(draw, 90, 3)
    x, y = np.sign(forecast), np.sign(actual)
    products = (x - x.mean()) * (y - y.mean())
    variance = sum(products[s] * products[t] for s in range(90) for t in range(90) if abs(s - t) <= 2)
    expected = products.sum() / math.sqrt(variance)
    assert pesaran_timmermann(forecast, actual, 3) == pytest.approx((expected, stats.t.sf(expected, 89)))


def test_guessing_is_called_skill_about_as_often_as_promised():
    draw = np.random.default_rng(6)
    for horizon, most in ((1, 0.08), (3, 0.08)):
        pairs = [(persistent(draw, 250), overlapping(draw, 250, horizon) + 0.2) for _ in range(500)]
        assert 0.02 < rejections([pesaran_timmermann(f, a, horizon)[1] for f, a in pairs]) < most
    # the test for independent days, asked of overlapping ones
    assert rejections([pesaran_timmermann(f, a, 1)[1] for f, a in pairs]) > 0.09


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_forecast_that_is_right_on_60_percent_of_days_has_skill(horizon):
    draw = np.random.default_rng(7)
    p_values = []
    for _ in range(60):
        actual = overlapping(draw, 700, horizon)
        p_values.append(pesaran_timmermann(actual * np.where(draw.random(700) < 0.6, 1, -1), actual, horizon)[1])
    assert rejections(p_values) > 0.95


def test_a_forecast_that_is_always_wrong_is_not_better_than_chance():
    actual = np.random.default_rng(8).standard_normal(100)
    statistic, p_value = pesaran_timmermann(-actual, actual)
    assert statistic < -9
    assert p_value > 0.999
    assert pesaran_timmermann(actual, actual)[1] < 1e-6
    assert 0.0 < pesaran_timmermann(actual, actual, 3)[1] < 1e-3  # no division by a residual of zero


def test_days_without_a_move_are_left_out():
    draw = np.random.default_rng(9)
    forecast, actual = draw.standard_normal(60), draw.standard_normal(60)
    padded = [np.concatenate([forecast, [0.0, 1.0, 0.0]]), np.concatenate([actual, [1.0, 0.0, 0.0]])]
    assert pesaran_timmermann(*padded) == pytest.approx(pesaran_timmermann(forecast, actual))


@pytest.mark.parametrize("forecast", [np.ones(50), -np.ones(50), np.zeros(50), np.r_[np.ones(5), np.zeros(45)]])
def test_skill_is_undefined_for_a_forecast_of_one_sign(forecast):
    actual = np.random.default_rng(10).standard_normal(50)
    assert np.isnan(pesaran_timmermann(forecast, actual)).all()
    assert np.isnan(pesaran_timmermann(actual, np.abs(forecast) + 1.0, 3)).all()


def test_series_of_different_length_are_refused():
    with pytest.raises(ValueError, match="20 dates, denominator 21"):
        relative_mean_interval(np.ones(20), np.ones(21))


def test_tickers_that_move_as_one_are_one_observation_a_date():
    draw = np.random.default_rng(11)
    x, y = np.sign(draw.standard_normal(200)), np.sign(overlapping(draw, 200, 3) + 0.1)
    alone = directional_skill(np.ones(200), x, y, x * y, 3)
    assert directional_skill(np.full(200, 50.0), 50 * x, 50 * y, 50 * x * y, 3) == pytest.approx(alone)
    assert alone == pytest.approx(pesaran_timmermann(x, y, 3))


def test_a_panel_with_a_common_market_keeps_its_size():
    # 20 tickers, all forecast alike, outcomes with a strong common part: by ticker-day it would look like skill.
    draw = np.random.default_rng(12)
    by_date, stacked = [], []
    for _ in range(300):
        market = draw.standard_normal((200, 1))
        y = np.sign(market + 0.5 * draw.standard_normal((200, 20)))
        x = np.broadcast_to(np.sign(draw.standard_normal((200, 1))), y.shape)
        sums = np.full(200, 20.0), x.sum(axis=1), y.sum(axis=1), (x * y).sum(axis=1)
        by_date.append(directional_skill(*sums, 1)[1])
        stacked.append(pesaran_timmermann(x.ravel(), y.ravel())[1])
    assert 0.02 < rejections(by_date) < 0.09
    assert rejections(stacked) > 0.2


def test_a_panel_whose_tickers_cancel_on_every_date_says_nothing():
    zeros, x = np.zeros(40), np.tile([2.0, -2.0], 20)
    assert np.isnan(directional_skill(np.full(40, 2.0), x, zeros, zeros, 1)).all()


# Block bootstrap


def test_the_interval_agrees_with_the_arch_package():
    from arch.bootstrap import CircularBlockBootstrap

    draw = np.random.default_rng(13)
    below = np.abs(overlapping(draw, 403, 3)) + 0.1  # 403: the last block of 10, and of 202, is cut short
    above = below * 0.97 + 0.2 * overlapping(draw, 403, 3)
    for block_days in (1, 10, 202):
        ratios = CircularBlockBootstrap(block_days, above, below, seed=1).apply(lambda a, b: a.mean() / b.mean(), 4000)
        low, high = np.quantile(ratios, [0.05, 0.95])
        found = relative_mean_interval(above, below, block_days, repeats=4000, confidence=0.9)
        assert found == pytest.approx((low, high), abs=0.06 * (high - low))


def test_the_block_length_is_the_optimal_one_and_at_least_the_horizon():
    from arch.bootstrap import optimal_block_length

    draw = np.random.default_rng(19)
    below = 2.0 + persistent(draw, 400, 0.6)
    above = 1.5 * below + persistent(draw, 400, 0.6)
    difference = above - above.mean() / below.mean() * below
    best = math.ceil(optimal_block_length(difference)["circular"].iloc[0])
    assert 3 < best < 40
    chosen = relative_mean_interval(above, below)
    assert chosen == relative_mean_interval(above, below, best)
    assert chosen == relative_mean_interval(above, below, least_block_days=3)
    assert relative_mean_interval(above, below, least_block_days=40) == relative_mean_interval(above, below, 40)


def test_every_resample_has_as_many_dates_as_the_series():
    # A block's sum of ones is its length: any other number of dates would move the ratio off its value.
    assert relative_mean_interval(np.full(101, 3.0), np.full(101, 2.0), 7) == pytest.approx((1.5, 1.5))
    ends = relative_mean_interval(np.arange(50.0), np.ones(50), 50)  # one block, the whole circle
    assert ends == pytest.approx((24.5, 24.5))


def test_the_interval_holds_the_truth_about_as_often_as_promised():
    draw = np.random.default_rng(14)
    held, held_without_blocks = [], []
    for _ in range(400):
        common = np.abs(overlapping(draw, 400, 5))
        below, above = common + 1.0, 0.9 * common + 0.9 + 0.3 * overlapping(draw, 400, 5)  # the means' ratio is 0.9
        low, high = relative_mean_interval(above, below, repeats=400, least_block_days=5)
        held.append(low <= 0.9 <= high)
        low, high = relative_mean_interval(above, below, 1, repeats=400)
        held_without_blocks.append(low <= 0.9 <= high)
    assert 0.90 < np.mean(held) < 0.98
    assert np.mean(held_without_blocks) < 0.75


def test_the_seed_decides():
    draw = np.random.default_rng(15)
    above, below = np.abs(draw.standard_normal((2, 200)))
    assert relative_mean_interval(above, below, seed=3) == relative_mean_interval(above, below, seed=3)
    assert relative_mean_interval(above, below, seed=3) != relative_mean_interval(above, below, seed=4)


def test_equal_series_have_a_ratio_of_exactly_one():
    losses = np.abs(np.random.default_rng(16).standard_normal(100))
    assert relative_mean_interval(losses, losses.copy()) == (1.0, 1.0)


def test_no_interval_from_too_few_dates_or_over_zero():
    losses = np.abs(np.random.default_rng(17).standard_normal(29))
    assert np.isnan(relative_mean_interval(losses, 2 * losses, least_block_days=3)).all()
    assert np.isnan(relative_mean_interval(np.ones(50), np.zeros(50))).all()
    assert np.isnan(relative_mean_interval(np.array([]), np.array([]))).all()


@pytest.mark.parametrize("option", [{"block_days": 0}, {"repeats": 0}, {"confidence": 1.0}, {"least_block_days": 0}])
def test_numbers_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match="at least 1"):
        relative_mean_interval(np.ones(20), np.ones(20), **option)


@given(st.integers(10, 90), st.integers(0, 100), st.sampled_from([None, 1, 4, 200]))
def test_the_interval_is_ordered_and_within_the_ratios_that_came(count, seed, block_days):
    above, below = np.random.default_rng(seed).uniform(0.5, 2.0, (2, count))
    low, high = relative_mean_interval(above, below, block_days, repeats=50)
    assert 0.25 <= low <= high <= 4.0


# Distributions


def normal_crps(value, mean, spread):
    """Gneiting and Raftery (2007), equation 21."""
    z = (value - mean) / spread
    return spread * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (0.4, 1.0), (0.0, 0.6), (-0.2, 1.6)])
def test_crps_of_a_normal_forecast(mean, spread):
    returns = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)  # every return of a standard normal, evenly
    quantiles = np.broadcast_to(mean + spread * stats.norm.ppf(LEVELS), (4000, len(LEVELS)))
    found = crps_from_quantiles(returns, quantiles, LEVELS)
    assert found.mean() == pytest.approx(normal_crps(returns, mean, spread).mean(), rel=0.02)
    np.testing.assert_allclose(found, normal_crps(returns, mean, spread), rtol=0.12, atol=0.02 * spread)


@pytest.mark.parametrize("distribution", [stats.norm(), stats.t(3)])
def test_crps_of_exact_quantiles_is_within_half_a_percent(distribution):
    fine = (np.arange(1000) + 0.5) / 1000
    returns = distribution.ppf((np.arange(2000) + 0.5) / 2000)

    def mean_score(levels):
        return crps_from_quantiles(returns, np.tile(distribution.ppf(levels), (2000, 1)), levels).mean()

    assert mean_score(LEVELS) == pytest.approx(mean_score(fine), rel=0.005)


def test_crps_by_hand():
    # Levels 0.25, 0.5, 0.75 weigh 3/8, 2/8, 3/8; the losses of a return of 2 are 0.75, 1.0 and 0.75.
    found = crps_from_quantiles(np.array([[2.0]]), np.array([[[-1.0, 0.0, 1.0]]]), np.array([0.25, 0.5, 0.75]))
    assert found.shape == (1, 1)
    assert found[0, 0] == pytest.approx(2 * (3 / 8 * 0.75 + 2 / 8 * 1.0 + 3 / 8 * 0.75))


def test_crps_of_a_point_forecast_is_the_absolute_error():
    assert crps_from_quantiles(np.array([3.0]), np.full((1, 9), 1.0), LEVELS)[0] == pytest.approx(2.0)


@pytest.mark.parametrize("distribution", [stats.norm(), stats.t(3), stats.t(5, loc=0.1, scale=0.02)])
def test_pit_of_the_right_distribution_is_uniform(distribution):
    returns = distribution.rvs(8000, random_state=np.random.default_rng(18))
    transformed = pit(returns, np.broadcast_to(distribution.ppf(LEVELS), (8000, len(LEVELS))), LEVELS)
    assert stats.kstest(transformed, "uniform").statistic < 0.025  # 0.015 is chance, the rest straight lines
    wrong = pit(returns, np.broadcast_to(0.7 * distribution.ppf(LEVELS), (8000, len(LEVELS))), LEVELS)
    assert stats.kstest(wrong, "uniform").statistic > 0.05


def test_pit_at_between_and_beyond_the_quantiles():
    levels, quantiles = np.array([0.1, 0.2, 0.5, 0.9]), np.array([-2.0, -1.0, 0.0, 2.0])
    # below: the tail through (-2, 0.1) and (-1, 0.2) halves with every unit; above: from 0.5 to 0.1 within 2 units
    cases = {
        -2.0: 0.1, -1.0: 0.2, 0.0: 0.5, 2.0: 0.9, -1.5: 0.15, 1.0: 0.7,
        -3.0: 0.05, -4.0: 0.025, 4.0: 1 - 0.1 / 5, -1e9: 0.0, 1e9: 1.0,
    }  # fmt: skip
    returns = np.array(list(cases))
    found = pit(returns, np.broadcast_to(quantiles, (len(returns), 4)), levels)
    np.testing.assert_allclose(found, list(cases.values()), atol=1e-12)


@given(
    arrays(float, 9, elements=st.one_of(st.floats(-1, 1), st.sampled_from([0.0, 0.5]))),
    arrays(float, 20, elements=st.one_of(st.floats(-2, 2), st.sampled_from([0.0, 0.5]))),
)
def test_pit_rises_from_0_to_1_whatever_the_quantiles(quantiles, returns):
    # also where quantiles are equal, as those of a price that never moves
    found = pit(np.sort(returns), np.broadcast_to(np.sort(quantiles), (20, 9)), LEVELS)
    assert ((found >= 0.0) & (found <= 1.0)).all()
    assert (np.diff(found) >= -1e-12).all()


def test_pit_has_the_shape_of_the_returns():
    assert pit(np.zeros((4, 3)), np.broadcast_to(LEVELS, (4, 3, 9)), LEVELS).shape == (4, 3)
