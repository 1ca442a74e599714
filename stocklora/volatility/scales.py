"""What a day's return should be measured in: volatility known at the close of the origin.

Four scales. ``ewma`` has nothing to fit. ``har`` is a log-linear regression on past ranges. ``harx`` adds
the inputs of ``harx.py``, as many as the training days can bear, and follows the regime by the market's
running surprise. ``prior`` is that regression as hundreds of other stocks have it (``prior.py``), moved by the
training days as far as they deserve. Anything fitted is fitted on the training origins that the caller passes in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from stocklora.volatility.harx import (
    AHEAD_INPUTS,
    ALIKE_INPUTS,
    centre_and_spread,
    harx_features,
    standardized,
    time_blocks,
)
from stocklora.volatility.market import RANGE_FLOOR, SURPRISE_LIMIT, Market, Markets, garman_klass_variance, markets_of

EWMA_LAMBDA = 0.94  # RiskMetrics Technical Document (J.P. Morgan, 1996): daily data
SCALE_FLOOR = RANGE_FLOOR  # keeps a ticker that never moves from dividing by zero
RANGE_DAYS = (1, 5, 22, 66)  # a day, a week, a month, a quarter
OWN_SCALES = ("ewma", "har", "harx")  # what the training days alone give
SCALES = (*OWN_SCALES, "prior")
FURTHEST = 3.0  # from the EWMA scale, either way: more than any regime needs

# How many days the regression's pull toward plain HAR is worth; cross-validation on training days chooses.
RIDGE_DAYS = (400.0, 1600.0, 6400.0, 25600.0)
CROSS_VALIDATION_BLOCKS = 4
LEAST_HARX_ORIGINS = 250
TRUST_ORIGINS = 1500.0  # with so many training origins half of what harx adds to har is believed
MOST_FITTED_ORIGINS = 50_000  # more add time and memory, not accuracy
# A prior's coefficients and level are worth so many training origins; chosen on the tickers and years that the prior
# was made from, each forecast by a prior of the others: from 200 origins to 46,000 one number is best or near it.
PRIOR_ORIGINS = 6400.0


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
    return np.maximum(np.sqrt(variance.fillna(0.0).to_numpy()), SCALE_FLOOR)


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


RANGE_INPUTS = ("one", "log_ewma", *[f"log_range_{days}" for days in RANGE_DAYS], "last_move", "last_move_size")
HARX_INPUTS = (*RANGE_INPUTS, *ALIKE_INPUTS, *AHEAD_INPUTS)  # the columns of ``regression_inputs``


@dataclass(frozen=True)
class VolatilityScale:
    """How far the h-day log return usually goes, known at the origin.

    ``ewma``: the EWMA volatility times sqrt(h), nothing fitted. ``har``: a log-linear regression on
    past ranges, one for each h, after Corsi's heterogeneous autoregressive model (Journal of Financial
    Econometrics 7, 2009) with ranges for realised variance. ``harx``: the same with the inputs of ``harx.py``,
    times the running surprise of all tickers over ``usual``: when closes have lately gone further than the
    regression expected, it draws wider, in the manner of adaptive conformal inference (Gibbs and Candès,
    NeurIPS 2021), with the size of past errors in place of a count of misses. ``prior``: as ``harx``, with numbers
    of other tickers; the mean surprise of m tickers a day is believed to the power m / (m + 1).

    Attributes:
        coefficients: (horizon, inputs); empty for ``ewma``.
        centre, spread: (horizon, inputs) of the training days, for ``harx`` and ``prior``.
        usual: mean surprise on training days, for ``harx`` and ``prior``.
        ridge_days: the pull toward ``har`` that cross-validation chose; infinite where it chose ``har`` itself.
        trust: the share of what ``harx`` adds to ``har`` that is believed: n / (n + TRUST_ORIGINS).
    """

    kind: str
    horizon: int
    coefficients: tuple[tuple[float, ...], ...] = ()
    centre: tuple[tuple[float, ...], ...] = ()
    spread: tuple[tuple[float, ...], ...] = ()
    usual: float = 1.0
    ridge_days: float = 0.0
    trust: float = 1.0

    @property
    def adapts(self) -> bool:
        return self.kind in ("harx", "prior")

    def at(self, frame: pd.DataFrame, market: Market, before: np.ndarray | None = None) -> np.ndarray:
        """The scale at every day of ``frame``: (days, horizon), at least ``SCALE_FLOOR``.

        Args:
            market: of all tickers of its exchange that are forecast together, from ``markets_of``.
            before: what ``before_adapting`` gives, where it is known.
        """
        fitted = self.before_adapting(frame, market) if before is None else before
        if not self.adapts:
            return fitted
        return np.maximum(fitted * self.surprise_factor(frame, market)[:, None], SCALE_FLOOR)

    def surprise_factor(self, frame: pd.DataFrame, market: Market) -> np.ndarray:
        """(days,) by how much the market's recent surprises widen or narrow a scale that adapts."""
        surprise, tickers = market.running_surprise(pd.DatetimeIndex(frame.index), self.usual)
        trust = tickers / (tickers + 1.0) if self.kind == "prior" else self.trust
        return np.clip((surprise / self.usual) ** trust, 1.0 / FURTHEST, FURTHEST)

    def on(self, prices: Mapping[str, pd.DataFrame], others: Mapping[str, pd.DataFrame] = {}) -> dict[str, np.ndarray]:
        """The scale at every day of every ticker, forecast together with ``others``: ticker -> (days, horizon)."""
        before: dict[str, np.ndarray] = {}
        markets = self.markets_of({**prices, **others}, before=before)
        return {name: self.at(frame, markets.of(name), before.get(name)) for name, frame in prices.items()}

    def markets_of(
        self, prices: Mapping[str, pd.DataFrame], plain: Markets | None = None, before: dict[str, Any] | None = None
    ) -> Markets:
        """The markets as this scale reads them, with surprises where it adapts.

        Args:
            prices: ticker -> its table.
            plain: what ``markets_of`` made of these prices, if it has been called already.
            before: filled, where the scale adapts, with ``before_adapting`` of every ticker.
        """
        if not self.adapts:
            return Markets()
        markets = (plain or markets_of(prices)).without_surprises()
        for name, frame in prices.items():
            market = markets.of(name)
            fitted = self.before_adapting(frame, market)
            market.add_surprise(frame, fitted[:, 0])
            if before is not None:
                before[name] = fitted
        return markets

    def before_adapting(self, frame: pd.DataFrame, market: Market) -> np.ndarray:
        """The scale without the running surprise: (days, horizon)."""
        plain = ewma_volatility(frame["Close"])[:, None] * np.sqrt(np.arange(1, self.horizon + 1))[None, :]
        if self.kind == "ewma":
            return plain
        # Summed row by row: a matrix product's last bit depends on how many rows stand below.
        fitted = self.terms(frame, market).sum(axis=2).T
        # exp of a line can run away on inputs far outside the training days.
        anchor = np.log(plain)
        return np.exp(np.clip(fitted, anchor - math.log(FURTHEST), anchor + math.log(FURTHEST)))

    def terms(self, frame: pd.DataFrame, market: Market) -> np.ndarray:
        """(horizon, days, inputs) what each of ``HARX_INPUTS``, or the first of them, adds to the log of the scale.

        A scale far from the EWMA's is clipped after their sum; see ``before_adapting``.
        """
        if self.kind == "ewma":
            ewma = np.log(ewma_volatility(frame["Close"]))
            steps = 0.5 * np.log(np.arange(1, self.horizon + 1))
            return np.stack([np.stack([np.full_like(ewma, step), ewma], axis=1) for step in steps])
        if self.kind == "har":
            inputs = np.broadcast_to(base := range_features(frame), (self.horizon, *base.shape))
        else:
            parts = zip(regression_inputs(frame, market, self.horizon), self.centre, self.spread, strict=True)
            inputs = np.stack(
                [standardized(step, np.array(centre), np.array(spread)) for step, centre, spread in parts]
            )
        return inputs * np.array(self.coefficients)[:, None, :]

    def to_dict(self) -> dict[str, Any]:
        return {
            name: [list(row) for row in value] if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> VolatilityScale:
        fields: dict[str, Any] = {
            name: tuple(tuple(float(cell) for cell in row) for row in value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        return VolatilityScale(**fields)


def regression_inputs(frame: pd.DataFrame, market: Market, horizon: int) -> np.ndarray:
    """(horizon, days, inputs) of ``harx``: first those of ``range_features``; not to be written into."""

    def compute() -> np.ndarray:
        alike, ahead = harx_features(frame, market, horizon)
        base = np.concatenate([range_features(frame), alike], axis=1)
        return np.concatenate([np.broadcast_to(base, (horizon, *base.shape)), ahead], axis=2)

    return market.remembered(frame, horizon, compute)


def fit_scale(
    kind: str,
    prices: Mapping[str, pd.DataFrame],
    origins: Mapping[str, range],
    returns: Mapping[str, np.ndarray],
    prior: VolatilityScale | None = None,
    markets: Markets | None = None,
) -> VolatilityScale:
    """Fit a scale on the given origins of each ticker, pooled.

    ``har`` minimises the Laplace quasi-likelihood ``mean(log s + |r| / s)``, ``log s = x'b``, by Newton's
    method: convex in ``b``, and a day without any move does no harm, as it would in a regression of log |r|.
    ``harx`` minimises the same with a ridge toward the ``har`` solution, ``prior`` with one toward ``prior``.

    Args:
        kind: one of ``SCALES``.
        prices: ticker -> its table.
        origins: ticker -> training rows.
        returns: ticker -> (days, horizon) log returns ahead.
        prior: where the scale ``prior`` starts, of the same horizon; without any training origin it stays there.
        markets: what ``markets_of`` made of these prices, if it has been called already.
    """
    horizon = next(iter(returns.values())).shape[1]
    if kind == "ewma":
        return VolatilityScale("ewma", horizon)
    rows = thinned(origins, MOST_FITTED_ORIGINS)
    if kind == "prior" and not any(rows.values()):
        assert prior is not None
        return prior
    sizes = np.abs(np.concatenate([returns[name][rows[name]] for name in prices]))
    sizes = np.maximum(sizes, 0.1 * SCALE_FLOOR)  # a ticker that never moved would pull log s to minus infinity
    if kind == "har":
        inputs = np.concatenate([range_features(prices[name])[rows[name]] for name in prices])
        fitted = [_numbers(_har_regression(inputs, sizes[:, step])) for step in range(horizon)]
        return VolatilityScale("har", horizon, tuple(fitted))
    markets = markets or markets_of(prices)
    inputs = _stacked_inputs(prices, rows, horizon, markets)
    if kind == "prior":
        assert prior is not None
        return _moved(prior, inputs, sizes)
    return _fit_harx(prices, rows, inputs, sizes, markets)


def thinned(origins: Mapping[str, range], most: int) -> dict[str, list[int]]:
    """Every k-th origin of each ticker, k the least that leaves at most ``most`` in all."""
    every = max(1, math.ceil(sum(map(len, origins.values())) / most))
    return {name: list(rows[::every]) for name, rows in origins.items()}


def _stacked_inputs(
    prices: Mapping[str, pd.DataFrame], rows: Mapping[str, list[int]], horizon: int, markets: Markets
) -> np.ndarray:
    """(horizon, n, inputs) of the regression at the given rows of all tickers."""
    return np.concatenate(
        [regression_inputs(frame, markets.of(name), horizon)[:, rows[name]] for name, frame in prices.items()], axis=1
    )


def _moved(prior: VolatilityScale, inputs: np.ndarray, sizes: np.ndarray) -> VolatilityScale:
    """The prior's coefficients, its level among them, moved by training origins: a ridge toward the prior.

    Args:
        inputs: (horizon, n, inputs). sizes: (n, horizon) absolute returns.
    """
    ridge = np.full(inputs.shape[2], PRIOR_ORIGINS / len(sizes))
    coefficients = []
    for step, (raw, *row) in enumerate(zip(inputs, prior.coefficients, prior.centre, prior.spread, strict=True)):
        start, centre, spread = map(np.array, row)
        fitted = _laplace_regression(standardized(raw, centre, spread), sizes[:, step], start, ridge, start)
        coefficients.append(_numbers(fitted))
    return replace(prior, coefficients=tuple(coefficients))


def _fit_harx(
    prices: Mapping[str, pd.DataFrame],
    rows: Mapping[str, list[int]],
    inputs: np.ndarray,
    sizes: np.ndarray,
    markets: Markets,
) -> VolatilityScale:
    horizon = len(inputs)
    dates = np.concatenate([prices[name].index.to_numpy()[rows[name]] for name in prices])
    centre, spread = zip(*[centre_and_spread(step) for step in inputs], strict=True)
    for row, width in zip(centre, spread, strict=True):
        row[:2], width[:2] = 0.0, 1.0  # the constant, and log EWMA, whose coefficient starts at one
    inputs = np.stack([standardized(*parts) for parts in zip(inputs, centre, spread, strict=True)])
    # Chosen two days ahead, where noise is least against what is to be found, and used for every day ahead.
    ridge_days = _choose_ridge(inputs[min(1, horizon - 1)], sizes[:, min(1, horizon - 1)], dates)
    # One ticker's few years choose a ridge by luck as often as by right; a mean of both forecasts is never far off.
    trust = len(sizes) / (len(sizes) + TRUST_ORIGINS)
    fitted = []
    for step in range(horizon):
        plain = harx_regression(inputs[step], sizes[:, step], math.inf)
        fitted.append(plain + trust * (harx_regression(inputs[step], sizes[:, step], ridge_days) - plain))
    tables = {"coefficients": fitted, "centre": centre, "spread": spread}
    fields: dict[str, Any] = {name: tuple(map(_numbers, part)) for name, part in tables.items()}
    scale = VolatilityScale("harx", horizon, **fields, ridge_days=ridge_days, trust=trust)
    surprises = []
    for name, frame in prices.items():
        expected = scale.before_adapting(frame, markets.of(name))[rows[name], 0]
        moves = np.abs(np.diff(np.log(frame["Close"].to_numpy()), append=np.nan))[rows[name]]
        surprises.append(np.minimum(moves / expected, SURPRISE_LIMIT))
    pooled = np.concatenate(surprises)
    known = pooled[np.isfinite(pooled)]
    return replace(scale, usual=max(float(known.mean()), 1e-3) if len(known) else 1.0)


def _choose_ridge(inputs: np.ndarray, sizes: np.ndarray, dates: np.ndarray) -> float:
    """The strength with the lowest loss on held-out blocks of training days; infinity is plain HAR."""
    if len(inputs) < LEAST_HARX_ORIGINS:
        return math.inf
    strengths = (math.inf, *RIDGE_DAYS[::-1])
    loss = dict.fromkeys(strengths, 0.0)
    for block in time_blocks(dates, CROSS_VALIDATION_BLOCKS):
        if not block.any() or block.all():
            continue
        warm = None
        for strength in strengths:
            warm = harx_regression(inputs[~block], sizes[~block], strength, warm)
            line = inputs[block] @ warm
            loss[strength] += float(np.sum(line + sizes[block] * np.exp(-line)))
    return min(strengths, key=lambda strength: loss[strength])


def _har_regression(inputs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """HAR coefficients; a ridge worth 25 days pulls toward the EWMA scale alone, which only short tables feel.

    Args:
        inputs: (n, k), first column ones, second log EWMA.
        sizes: (n,) absolute returns.
    """
    prior = np.zeros(inputs.shape[1])
    prior[1] = 1.0
    ridge = np.full(len(prior), 25.0 / len(inputs))
    ridge[0] = 0.0
    # Start with the constant that fits when the rest is the EWMA scale.
    start = prior.copy()
    start[0] = math.log(max(float(np.mean(sizes * np.exp(-(inputs @ prior)))), 1e-6))
    return _laplace_regression(inputs, sizes, prior, ridge, start)


def harx_regression(
    inputs: np.ndarray, sizes: np.ndarray, ridge_days: float, start: np.ndarray | None = None
) -> np.ndarray:
    har_inputs = len(RANGE_DAYS) + 4
    prior = np.zeros(inputs.shape[1])
    prior[:har_inputs] = _har_regression(inputs[:, :har_inputs], sizes)
    if math.isinf(ridge_days):
        return prior
    ridge = np.full(len(prior), ridge_days / len(inputs))
    ridge[0] = 0.0
    return _laplace_regression(inputs, sizes, prior, ridge, prior if start is None else start)


def _laplace_regression(
    inputs: np.ndarray, sizes: np.ndarray, prior: np.ndarray, ridge: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Newton's method on ``mean(x'b + |r| exp(-x'b)) + ridge/2 (b - prior)^2``."""

    def objective(point: np.ndarray) -> float:
        line = inputs @ point
        return float(np.mean(line + sizes * np.exp(-line)) + 0.5 * np.sum(ridge * (point - prior) ** 2))

    point, best = start.copy(), objective(start)
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


def _numbers(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
