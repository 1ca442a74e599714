"""The simple forecasters every report stands beside, and the volatility scales the model starts from.

All of them forecast quantiles of the h-day log return, h = 1..horizon. A *scale* is what a day's
return should be measured in: known at the close of the origin, computed from that day and earlier
ones only. Anything fitted here is fitted on the training days that the caller passes in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stocklora.metrics import median_index

EWMA_LAMBDA = 0.94  # RiskMetrics Technical Document (J.P. Morgan, 1996): daily data
SCALE_FLOOR = 1e-4  # one basis point a day: keeps a ticker that never moves from dividing by zero
RANGE_DAYS = (1, 5, 22, 66)  # a day, a week, a month, a quarter
SCALES = ("ewma", "har")


def ewma_volatility(close: pd.Series) -> np.ndarray:
    """Daily volatility by exponentially weighted squared returns, lambda 0.94.

    Weights are normalised over the days there are (no start value, so no look at later days).

    Args:
        close: (days,) closes.

    Returns:
        (days,) standard deviation of the daily log return; the floor on the first day.
    """
    squared = np.log(close).diff() ** 2
    variance = squared.ewm(alpha=1.0 - EWMA_LAMBDA, adjust=True).mean()
    return np.maximum(
        np.sqrt(variance.to_numpy()),
        SCALE_FLOOR,
        where=variance.notna().to_numpy(),
        out=np.full(len(close), SCALE_FLOOR),
    )


def garman_klass_variance(frame: pd.DataFrame) -> pd.Series:
    """A day's variance from its four prices (Garman and Klass, Journal of Business 53, 1980), at least 0."""
    high_low = np.log(frame["High"] / frame["Low"])
    close_open = np.log(frame["Close"] / frame["Open"])
    return (0.5 * high_low**2 - (2.0 * math.log(2.0) - 1.0) * close_open**2).clip(lower=0.0)


def range_features(frame: pd.DataFrame) -> np.ndarray:
    """Inputs of the HAR-range regression.

    Returns:
        (days, 8): 1, log EWMA volatility, log Garman-Klass range over 1, 5, 22 and 66 days, the last return in
        units of the EWMA volatility and its size (clipped at 6, so that a crash does not decide the next days).
    """
    ewma = ewma_volatility(frame["Close"])
    variance = garman_klass_variance(frame)
    columns = [np.ones(len(frame)), np.log(ewma)]
    for days in RANGE_DAYS:
        mean = variance.rolling(days, min_periods=1).mean().to_numpy()
        columns.append(np.log(np.maximum(np.sqrt(np.maximum(mean, 0.0)), SCALE_FLOOR)))
    last = np.log(frame["Close"]).diff().fillna(0.0).to_numpy() / ewma
    columns += [np.clip(last, -6.0, 6.0), np.clip(np.abs(last), 0.0, 6.0)]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class VolatilityScale:
    """How far the h-day log return usually goes, known at the origin.

    ``ewma``: the EWMA volatility times sqrt(h), nothing fitted. ``har``: a log-linear regression on
    past ranges, one for each h, after Corsi's heterogeneous autoregressive model (Journal of Financial
    Econometrics 7, 2009) with ranges for realised variance.

    Attributes:
        coefficients: (horizon, 8) for ``har``; empty for ``ewma``.
    """

    kind: str
    horizon: int
    coefficients: tuple[tuple[float, ...], ...] = ()

    def at(self, frame: pd.DataFrame) -> np.ndarray:
        """The scale at every day of ``frame``: (days, horizon), positive."""
        if self.kind == "ewma":
            steps = np.sqrt(np.arange(1, self.horizon + 1))
            return ewma_volatility(frame["Close"])[:, None] * steps[None, :]
        fitted = range_features(frame) @ np.array(self.coefficients).T
        # exp of a line can run away on inputs far outside the training days; three times in either
        # direction from the EWMA scale is more than any regime needs.
        anchor = np.log(VolatilityScale("ewma", self.horizon).at(frame))
        return np.exp(np.clip(fitted, anchor - math.log(3.0), anchor + math.log(3.0)))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "horizon": self.horizon, "coefficients": [list(row) for row in self.coefficients]}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> VolatilityScale:
        rows = tuple(tuple(float(value) for value in row) for row in content["coefficients"])
        return VolatilityScale(str(content["kind"]), int(content["horizon"]), rows)


def fit_scale(
    kind: str, prices: Mapping[str, pd.DataFrame], origins: Mapping[str, range], returns: Mapping[str, np.ndarray]
) -> VolatilityScale:
    """Fit a scale on the given origins of each ticker, pooled.

    ``har`` minimises the Laplace quasi-likelihood ``mean(log s + |r| / s)``, ``log s = x'b``, by Newton's
    method: convex in ``b``, and a day without any move does no harm, as it would in a regression of log |r|.

    Args:
        returns: ticker -> (days, horizon) log returns ahead.
    """
    horizon = next(iter(returns.values())).shape[1]
    if kind == "ewma":
        return VolatilityScale("ewma", horizon)
    inputs = np.concatenate([range_features(prices[name])[list(origins[name])] for name in prices])
    sizes = np.abs(np.concatenate([returns[name][list(origins[name])] for name in prices]))
    sizes = np.maximum(sizes, 0.1 * SCALE_FLOOR)  # a ticker that never moved would pull log s to minus infinity
    rows = [tuple(float(value) for value in _laplace_regression(inputs, sizes[:, h])) for h in range(horizon)]
    return VolatilityScale("har", horizon, tuple(rows))


def _laplace_regression(inputs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Newton's method on ``mean(x'b + |r| exp(-x'b)) + ridge``; the ridge pulls toward the EWMA scale alone.

    Args:
        inputs: (n, k), first column ones, second log EWMA.
        sizes: (n,) absolute returns.
    """
    count = inputs.shape[1]
    prior = np.zeros(count)
    prior[1] = 1.0
    ridge = np.full(count, 25.0 / len(inputs))  # worth 25 days: only tables of a few months feel it
    ridge[0] = 0.0

    def objective(point: np.ndarray) -> float:
        line = inputs @ point
        return float(np.mean(line + sizes * np.exp(-line)) + 0.5 * np.sum(ridge * (point - prior) ** 2))

    point = prior.copy()
    # Start with the constant that fits when the rest is the EWMA scale.
    point[0] = math.log(max(float(np.mean(sizes * np.exp(-(inputs @ prior)))), 1e-6))
    best = objective(point)
    for _ in range(100):
        pull = sizes * np.exp(-(inputs @ point))
        gradient = inputs.T @ (1.0 - pull) / len(sizes) + ridge * (point - prior)
        curvature = (inputs * pull[:, None]).T @ inputs / len(sizes) + np.diag(ridge + 1e-9)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while objective(point - size * step) > best and size > 1e-6:
            size /= 2.0
        point = point - size * step
        improved = best - objective(point)
        best -= improved
        if improved < 1e-12:
            break
    return point


def empirical_quantiles(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Quantiles down each column, made strictly increasing.

    Args:
        values: (n, horizon). Returns: (horizon, levels).
    """
    table = np.quantile(values, levels, axis=0).T
    # Ties (a short table, a price that never moves) would leave no room between quantiles.
    spread = np.maximum(table[:, -1:] - table[:, :1], 1e-3)
    return table + spread * 1e-4 * np.arange(len(levels))[None, :]


@dataclass(frozen=True)
class QuantileBaseline:
    """A baseline that knows only scale and past distribution: quantile = scale(origin, h) * table[h, level].

    ``naive``: last close as the point forecast, unscaled empirical quantiles around it. ``drift``: the same,
    moved by the mean training return. ``ewma``, ``har``: quantiles of the scaled returns, with their median.
    """

    name: str
    scale: VolatilityScale | None
    table: np.ndarray  # (horizon, levels)

    def quantiles(self, frame: pd.DataFrame, origins: range) -> np.ndarray:
        """(origins, horizon, levels) quantiles of the h-day log return."""
        if self.scale is None:
            return np.broadcast_to(self.table, (len(origins), *self.table.shape)).copy()
        return self.scale.at(frame)[list(origins)][:, :, None] * self.table[None]


def fit_baselines(
    prices: Mapping[str, pd.DataFrame],
    origins: Mapping[str, range],
    returns: Mapping[str, np.ndarray],
    levels: np.ndarray,
) -> dict[str, QuantileBaseline]:
    """Fit ``naive``, ``drift``, ``ewma`` and ``har`` on the training origins of all tickers, pooled."""
    pooled = np.concatenate([returns[name][list(origins[name])] for name in prices])
    median = median_index(levels)
    raw = empirical_quantiles(pooled, levels)
    centred = raw - raw[:, median : median + 1]
    baselines = {
        "naive": QuantileBaseline("naive", None, centred),
        "drift": QuantileBaseline("drift", None, centred + pooled.mean(axis=0)[:, None]),
    }
    for kind in SCALES:
        scale = fit_scale(kind, prices, origins, returns)
        scaled = np.concatenate(
            [returns[name][list(origins[name])] / scale.at(prices[name])[list(origins[name])] for name in prices]
        )
        baselines[kind] = QuantileBaseline(kind, scale, empirical_quantiles(scaled, levels))
    return baselines
