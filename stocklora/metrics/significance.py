"""Whether a difference between forecasters is more than luck, and how good a whole distribution was.

Pure functions over NumPy arrays. Forecasts of h days ahead made every day share h - 1 of their days, so
their errors are autocorrelated; everything here that tests allows for that.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr, stdtr  # scipy.stats, which has the same, takes a second to import

# Fewer separate stretches of `horizon` days say nothing reliable: with 10, Diebold and Mariano's test at the 5%
# level rejects a true null in 5 to 7% of simulated samples one to three days ahead, with 5 in up to 12%.
LEAST_STRETCHES = 10


def diebold_mariano(loss_difference: np.ndarray, horizon: int) -> tuple[float, float]:
    """Two-sided test of equal accuracy (Diebold and Mariano, Journal of Business & Economic Statistics 13, 1995).

    The variance of the mean counts autocovariances up to lag ``horizon - 1`` in full (the rectangular kernel of the
    paper); where that sum is not positive, which small samples allow, with Bartlett weights instead. Statistic and
    distribution are corrected for small samples (Harvey, Leybourne and Newbold, International Journal of
    Forecasting 13, 1997): Student t with n - 1 degrees of freedom.

    Args:
        loss_difference: (n,) loss of the forecaster less the other's, in time order.
        horizon: days ahead.

    Returns:
        (statistic, p-value); the statistic is negative where the forecaster is better. Both NaN for fewer than
        ``10 * horizon`` days and for differences that don't vary, as those of two equal forecasters.

    Raises:
        ValueError: not one finite series, or a horizon below 1.
    """
    difference = _series(loss_difference, "loss_difference")
    _check_horizon(horizon)
    count = len(difference)
    if count < LEAST_STRETCHES * horizon or np.ptp(difference) <= 1e-12 * np.abs(difference).max():
        return math.nan, math.nan
    mean = float(difference.mean())
    variance = long_run_variance(difference - mean, horizon - 1)
    # Harvey's factor (n + 1 - 2h + h (h - 1) / n) / n, factored: never negative, and zero only for n = h and h - 1.
    correction = math.sqrt((count - horizon) * (count - horizon + 1)) / count
    statistic = correction * mean / math.sqrt(variance / count)
    return statistic, float(2.0 * stdtr(count - 1, -abs(statistic)))


def long_run_variance(deviations: np.ndarray, lag: int) -> float:
    """Sum of the autocovariances from ``-lag`` to ``lag``: n times the variance of the mean of n days.

    Rectangular kernel; Bartlett's (Newey and West, Econometrica 55, 1987) where that sum is not positive.

    Args:
        deviations: (n,) from the mean, or from what a null hypothesis says the mean is.
    """
    count = len(deviations)
    lags = range(1, min(lag, count - 1) + 1)
    covariances = [float(deviations[k:] @ deviations[: count - k]) / count for k in lags]
    own = float(deviations @ deviations) / count
    variance = own + 2.0 * sum(covariances)
    if variance > 1e-12 * own:
        return variance
    return own + 2.0 * sum((1.0 - k / (lag + 1)) * value for k, value in zip(lags, covariances, strict=True))


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    Args:
        p_values: (tests,). A NaN stays one and does not count as a test.
    """
    # By hand: statsmodels' multipletests runs the garbage collector in every call, seconds over a backtest's families.
    given = np.asarray(p_values, dtype=float)
    adjusted = np.full(given.shape, np.nan)
    order = np.argsort(given)[: np.count_nonzero(~np.isnan(given))]  # NaN sorts last
    steps = given[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def directional_skill(
    count: np.ndarray, forecast: np.ndarray, actual: np.ndarray, product: np.ndarray, horizon: int
) -> tuple[float, float]:
    """One-sided test that the signs forecast know something of the signs that come, from a panel's sums by date.

    For one ticker and one day ahead it is the test of Pesaran and Timmermann (Journal of Business & Economic
    Statistics 10, 1992). It takes days for independent, which overlapping forecasts are not: with a forecast whose
    sign seldom changes, it rejects a true null three days ahead in 12% of samples at the 5% level. Otherwise the same
    covariance of the signs is therefore divided by a standard error that allows for autocorrelation up to lag
    ``horizon - 1``, taken under the null (Blaskowitz and Herwartz, International Journal of Forecasting 30, 2014).
    That is the score form of the regression of sign on sign in Pesaran and Timmermann (Journal of the American
    Statistical Association 104, 2009), whose t-ratio rejects too often in short samples.

    Tickers move together, so a date is one observation however many tickers it has: the standard error is clustered
    by date (Driscoll and Kraay, Review of Economics and Statistics 80, 1998).

    Args:
        count: (dates,) ticker-days with a move forecast and a move that came, in time order.
        forecast, actual, product: (dates,) sums over them of the sign forecast, the sign that came, their product.
        horizon: days ahead.

    Returns:
        (statistic, p-value), positive where better than chance. Both NaN for fewer than ``10 * horizon`` dates, or
        where all forecasts or all outcomes have one sign: chance and skill cannot then be told apart.

    Raises:
        ValueError: a horizon below 1.
    """
    _check_horizon(horizon)
    total = float(count.sum())
    if np.count_nonzero(count) < LEAST_STRETCHES * horizon:
        return math.nan, math.nan
    mean_forecast, mean_actual = float(forecast.sum()) / total, float(actual.sum()) / total
    spread = (1.0 - mean_forecast**2) * (1.0 - mean_actual**2)  # variances of two signs
    if spread <= 0.0:
        return math.nan, math.nan
    # (dates,) sums of (forecast - its mean) (actual - its mean); zero on dates without a ticker
    score = product - mean_forecast * actual - mean_actual * forecast + mean_forecast * mean_actual * count
    if horizon == 1 and count.max() <= 1:
        # (P - P*) / sqrt(V(P) - V(P*)) of the paper: P - P* is half the covariance, and the difference of the
        # variances is spread (n - 1) / 4 n^2.
        statistic = float(score.sum()) / math.sqrt(spread * (total - 1.0))
        return statistic, float(ndtr(-statistic))
    variance = len(score) * long_run_variance(score, horizon - 1)
    if not variance > 0.0:  # tickers that cancel on every date
        return math.nan, math.nan
    statistic = float(score.sum()) / math.sqrt(variance)
    return statistic, float(stdtr(np.count_nonzero(count) - 1, -statistic))


def relative_mean_interval(
    numerator: np.ndarray,
    denominator: np.ndarray,
    block_days: int | None = None,
    repeats: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    least_block_days: int = 1,
) -> tuple[float, float]:
    """Interval of ``mean(numerator) / mean(denominator)`` by the circular block bootstrap over dates.

    Dates are drawn in blocks, the same for both series, the last date followed by the first (Politis and Romano, in
    LePage and Billard, Exploring the Limits of Bootstrap, 1992); the interval lies between percentiles of the ratio.
    Without ``block_days`` the length is Politis and White's (Econometric Reviews 23, 2004, as corrected in 28, 2009)
    for ``numerator - ratio * denominator``, whose mean is what makes the ratio uncertain: for a ratio near 1 the
    difference of the two.

    Args:
        numerator, denominator: (n,) losses by date, in time order.
        block_days: length of a block.
        repeats: how many samples are drawn.
        seed: of the draws.
        confidence: the share of samples that the interval holds.
        least_block_days: the shortest block chosen: the horizon, where forecasts overlap.

    Returns:
        (low, high); the same for the same seed. (1, 1) for two equal series. NaN for fewer than ``10 *
        least_block_days`` dates and where the denominator's mean is zero.

    Raises:
        ValueError: not two finite series of one length, or a number out of its range.
    """
    above, below = _series(numerator, "numerator"), _series(denominator, "denominator")
    if above.shape != below.shape:
        raise ValueError(f"numerator has {len(above)} dates, denominator {len(below)}")
    blocks_allowed = least_block_days >= 1 and (block_days is None or block_days >= 1)
    if repeats < 1 or not 0.0 < confidence < 1.0 or not blocks_allowed:
        raise ValueError("repeats and block lengths must be at least 1, confidence between 0 and 1")
    count = len(above)
    if count < LEAST_STRETCHES * least_block_days or below.sum() == 0.0:
        return math.nan, math.nan
    if np.array_equal(above, below):
        return 1.0, 1.0
    if block_days is None:
        block_days = _block_days(above - below * (above.sum() / below.sum()), least_block_days)
    block_days = min(block_days, count)
    starts = np.random.default_rng(seed).integers(count, size=(repeats, math.ceil(count / block_days)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _resampled_sums(above, block_days, starts) / _resampled_sums(below, block_days, starts)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail])
    return float(low), float(high)


def _resampled_sums(values: np.ndarray, block_days: int, starts: np.ndarray) -> np.ndarray:
    """(repeats,) sums of n resampled days each: a block's sum is looked up by its first day in (repeats, blocks).

    The last block of a row is as short as n asks; the last day is followed by the first.
    """
    whole, rest = divmod(len(values), block_days)
    until = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[:block_days]]))])
    sums = (until[block_days:] - until[:-block_days])[starts[:, :whole]].sum(axis=1)
    if rest:
        sums += (until[rest:] - until[:-rest])[starts[:, -1]]
    return np.asarray(sums)


def _block_days(values: np.ndarray, least: int) -> int:
    """The optimal block length of the circular bootstrap, at least ``least`` and at most a third of the dates."""
    count = len(values)
    if count < 30:  # too few for its autocorrelations of some ten lags
        optimal = count ** (1.0 / 3.0)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            from arch.bootstrap import optimal_block_length  # only here: it takes seconds to import

            optimal = float(optimal_block_length(values)["circular"].iloc[0])
    longest = max(1, count // 3)
    return max(least, min(longest, math.ceil(optimal))) if math.isfinite(optimal) else least


def crps_from_quantiles(returns: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score from a few quantiles.

    The score is twice the quantile loss integrated over all levels (Gneiting and Ranjan, Journal of Business &
    Economic Statistics 29, 2011). The integral is the trapezoid rule between the levels; beyond the outer levels
    their loss is taken to stay as it is. The first is a little too low, as the loss bends down between levels, the
    second a little too high: for the nine levels of ``QUANTILE_LEVELS`` and exact quantiles the mean score is within
    0.5% of the true one for normal and for Student t returns with three degrees of freedom. As a weighted sum of
    quantile losses it is itself a proper score.

    Args:
        returns: (...).
        quantiles: (..., levels).
        levels: (levels,) increasing, between 0 and 1.

    Returns:
        (...) in the unit of ``returns``.
    """
    levels = np.asarray(levels, dtype=float)
    between = np.diff(np.concatenate([[0.0], levels, [1.0]]))
    weights = (between[:-1] + between[1:]) / 2.0  # half of the gap on either side
    weights[0] += between[0] / 2.0  # and all of the tail: the weights sum to 1
    weights[-1] += between[-1] / 2.0
    error = returns[..., None] - quantiles
    crps: np.ndarray = 2.0 * (np.maximum(levels * error, (levels - 1.0) * error) @ weights)
    return crps


def pit(returns: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Probability integral transform: the level that the forecast gave to what came.

    Linear between the quantiles. Beyond the outer ones an exponential tail that passes through the outer two:
    below, ``levels[0] * exp((y - q[0]) / s)`` with ``s = (q[1] - q[0]) / log(levels[1] / levels[0])``, and its mirror
    image above. Uniform on [0, 1] where the forecast distributions are right (Diebold, Gunther and Tay,
    International Economic Review 39, 1998).

    Args:
        returns: (...).
        quantiles: (..., levels), not decreasing.
        levels: (levels,) increasing, at least two.

    Returns:
        (...) in [0, 1].
    """
    levels = np.asarray(levels, dtype=float)
    at = np.clip((returns[..., None] >= quantiles).sum(axis=-1), 1, len(levels) - 1)  # the quantile above
    lower = np.take_along_axis(quantiles, at[..., None] - 1, axis=-1)[..., 0]
    upper = np.take_along_axis(quantiles, at[..., None], axis=-1)[..., 0]
    step = np.where(upper > lower, upper - lower, 1.0)
    share = np.clip((returns - lower) / step, 0.0, 1.0)
    inner = levels[at - 1] + share * (levels[at] - levels[at - 1])

    def tail(excess: np.ndarray, outer_gap: np.ndarray, level: float, inner_level: float) -> np.ndarray:
        """(...) probability beyond ``excess`` >= 0 outside the outer quantile."""
        scale = outer_gap / math.log(inner_level / level)
        # two equal outer quantiles leave no room for a tail
        return level * np.exp(-np.divide(excess, scale, out=np.full_like(excess, np.inf), where=scale > 0.0))

    first, second, before_last, last = (quantiles[..., index] for index in (0, 1, -2, -1))
    below = tail(np.maximum(first - returns, 0.0), second - first, levels[0], levels[1])
    above = 1.0 - tail(np.maximum(returns - last, 0.0), last - before_last, 1.0 - levels[-1], 1.0 - levels[-2])
    return np.where(returns < first, below, np.where(returns > last, above, inner))


def _series(values: np.ndarray, name: str) -> np.ndarray:
    series = np.asarray(values, dtype=float)
    if series.ndim != 1 or not np.isfinite(series).all():
        raise ValueError(f"{name} must be one series of finite numbers, not of shape {series.shape} or with NaN")
    return series


def _check_horizon(horizon: int) -> None:
    if horizon < 1:
        raise ValueError(f"a horizon of {horizon} days")
