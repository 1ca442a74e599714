"""What a backtest hands on: one ticker's forecasts, the sums over all tickers that the report shows, and their errors.

Shapes: ``n`` origins of one ticker, ``days`` distinct origin dates over all tickers, ``horizon`` days
ahead, ``levels`` quantiles. Returns are log returns; ``_bp`` is basis points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.metrics.significance import long_run_variance
from stocklora.runtime.files import write_csv

REFERENCE = "naive"  # the last close, which every model stands beside
INTERVALS = (0.50, 0.80, 0.90)
PIT_BINS = 20
CHANCE = 1.96  # half-width of a 95% band, in standard errors
ALL_TICKERS = "(all)"  # the Ticker of a row of metrics.csv that pools them; ALL is a company

# metrics.csv: one row a model, ticker (and all together) and day ahead. "Rival" is the last close with EWMA volatility
# where it is among the models, else REFERENCE.
METRIC_COLUMNS = (
    "Model", "Ticker", "Day", "Origins",
    "MAE", "RMSE", "MAPE", "MASE",  # of the close: currency, currency, percent, ratio
    "MAE_bp",  # of the log return
    "Relative_MAE", "Relative_MAE_Low", "Relative_MAE_High",  # MAE_bp over REFERENCE's; 95% block bootstrap
    "Direction", "Direction_Majority", "PT_p",  # percent, percent, Pesaran-Timmermann
    "Pinball_bp", "Relative_Pinball", "CRPS_bp",  # quantile loss, over the rival's
    "Coverage_50", "Coverage_80", "Coverage_90",  # percent
    # Diebold-Mariano; Holm's adjustment runs across tickers, so pooled rows have none.
    "DM", "DM_p", "DM_p_Holm",  # absolute error of the log return against REFERENCE's
    "DM_Pinball", "DM_Pinball_p", "DM_Pinball_p_Holm",  # quantile loss against the rival's
)  # fmt: skip


@dataclass(frozen=True)
class TickerForecasts:
    """Every scored forecast of one ticker.

    Attributes:
        origins: (n,) datetime64[D], increasing: days at whose close a forecast was made.
        targets: (n, horizon) datetime64[D]: the sessions forecast.
        last_close: (n,).
        returns: (n, horizon) log returns that came.
        quantiles: model -> (n, horizon, levels) quantiles of the log return.
        naive_mae: (horizon,) mean absolute h-day change of the close on the training days, in the currency:
            MASE's denominator (Hyndman and Koehler, 2006).
    """

    ticker: str
    origins: np.ndarray
    targets: np.ndarray
    last_close: np.ndarray
    returns: np.ndarray
    quantiles: Mapping[str, np.ndarray]
    naive_mae: np.ndarray

    def check(self, models: Sequence[str], horizon: int, levels: int) -> None:
        """Refuse forecasts that cannot be added up.

        Args:
            models: all that must be there.
            horizon: days ahead.
            levels: how many quantiles each forecast has.

        Raises:
            ValueError: no forecasts, a model missing, shapes that disagree, numbers that are not finite, or origins
                out of order.
        """
        name, count = self.ticker, len(self.origins)
        if count == 0:
            raise ValueError(f"{name} has no forecasts")
        missing = [model for model in models if model not in self.quantiles]
        if missing:
            raise ValueError(f"{name} has no forecasts of {', '.join(missing)}")
        expected = {
            "origins": (self.origins, (count,)),
            "targets": (self.targets, (count, horizon)),
            "last_close": (self.last_close, (count,)),
            "returns": (self.returns, (count, horizon)),
            "naive_mae": (self.naive_mae, (horizon,)),
            **{model: (self.quantiles[model], (count, horizon, levels)) for model in models},
        }
        for what, (values, shape) in expected.items():
            if values.shape != shape:
                raise ValueError(f"{name}: {what} has shape {values.shape}, expected {shape}")
            if values.dtype.kind == "f" and what != "naive_mae" and not np.isfinite(values).all():
                raise ValueError(f"{name}: {what} has numbers that are not finite")
        if not (np.diff(self.origins.astype("datetime64[D]")) > np.timedelta64(0, "D")).all():
            raise ValueError(f"{name}: the origins do not increase")

    def last(self, count: int, models: Sequence[str]) -> TickerForecasts:
        """Copies of the last ``count`` origins, so that the rest of the arrays can go."""
        fields = {name: getattr(self, name)[-count:].copy() for name in ("origins", "targets", "last_close", "returns")}
        quantiles = {model: self.quantiles[model][-count:].copy() for model in models}
        return replace(self, **fields, quantiles=quantiles, naive_mae=self.naive_mae.copy())


@dataclass(frozen=True)
class DailySeries:
    """Means over the tickers forecast on each date; ``dates`` increase.

    Attributes:
        dates: (days,) datetime64[D] origins.
        counts: (days,) tickers forecast.
        abs_error_bp: model -> (days, horizon).
        inside: model -> (days, horizon, 3), shares inside the 50, 80 and 90% interval.
    """

    dates: np.ndarray
    counts: np.ndarray
    abs_error_bp: Mapping[str, np.ndarray]
    inside: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class WorstDay:
    """A forecast that missed badly: one of a model's largest one-day quantile losses.

    Attributes:
        forecast_bp: (P05, P50, P95) of the one-day log return.
        came_bp: what came.
    """

    ticker: str
    origin: np.datetime64
    date: np.datetime64
    forecast_bp: tuple[float, float, float]
    came_bp: float
    pinball_bp: float


@dataclass(frozen=True)
class BacktestResult:
    """All that the report shows.

    Attributes:
        models: in the order asked for, ``REFERENCE`` first.
        tickers: all scored, in order.
        pooled, by_ticker: rows with the keys ``METRIC_COLUMNS`` (NaN where a measure has no meaning: every
            ``*_Holm`` of a pooled row).
        pit: model -> (horizon, PIT_BINS) counts of the probability integral transform.
        fan: the last (at most 60) origins of the ticker shown.
        worst: model -> its ten worst days, worst first.
        verdicts: plain sentences, one for each model but the reference.
        facts: (name, text) lines on what was run.
        notes: warnings the reader must see first.
    """

    models: Sequence[str]
    tickers: Sequence[str]
    horizon: int
    levels: np.ndarray
    pooled: Sequence[Mapping[str, Any]]
    by_ticker: Sequence[Mapping[str, Any]]
    daily: DailySeries
    pit: Mapping[str, np.ndarray]
    fan: TickerForecasts
    worst: Mapping[str, Sequence[WorstDay]]
    verdicts: Sequence[str]
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)


def standard_error(shares: np.ndarray, counts: np.ndarray, day: int) -> float:
    """Standard error of the share of all ticker-days, as the verdicts judge it.

    A date is one draw however many tickers it has, since they move together; days ahead overlap.

    Args:
        shares: (days,) of a date's tickers.
        counts: (days,) tickers.
        day: days ahead.
    """
    if len(shares) < 2:
        return float("nan")
    total = float(counts.sum())
    deviations = counts * (shares - float(shares @ counts) / total)
    return math.sqrt(long_run_variance(deviations, day - 1) * len(shares)) / total


def design_effect(result: BacktestResult, model: str) -> float:
    """How many times the variance of a one-day-ahead share exceeds that of independent draws; at least 1."""
    counts = np.asarray(result.daily.counts, dtype=float)
    effects = []
    for at in range(len(INTERVALS)):
        inside = result.daily.inside[model][:, 0, at]
        share = float(inside @ counts) / float(counts.sum())
        alone = share * (1.0 - share) / float(counts.sum())
        error = standard_error(inside, counts, 1)
        if alone > 0 and math.isfinite(error):
            effects.append(error**2 / alone)
    return max(float(np.mean(effects)), 1.0) if effects else 1.0


def rolling(values: np.ndarray, counts: np.ndarray, window: int) -> np.ndarray:
    """(days,) -> (days - window + 1,): means over ``window`` dates, each weighted by its tickers."""
    sums = [np.convolve(line, np.ones(window), mode="valid") for line in (counts * values, counts)]
    return np.divide(sums[0], sums[1], out=np.full(len(sums[0]), np.nan), where=sums[1] > 0)


def write_metrics(path: Path, result: BacktestResult) -> None:
    """Write ``metrics.csv``: pooled rows, then every ticker's; six significant digits, nothing for a NaN.

    Raises:
        UserError: the file cannot be written.
    """
    table = pd.DataFrame([*result.pooled, *result.by_ticker], columns=METRIC_COLUMNS)
    write_csv(path, table, float_format="%.6g")
