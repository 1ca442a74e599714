"""What a backtest hands on: one ticker's forecasts, and the sums over all tickers that the report shows.

Shapes: ``n`` origins of one ticker, ``days`` distinct origin dates over all tickers, ``horizon`` days
ahead, ``levels`` quantiles. Returns are log returns; ``_bp`` is basis points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

REFERENCE = "naive"  # the last close, which every model stands beside
INTERVALS = (0.50, 0.80, 0.90)
PIT_BINS = 20
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
        last_close: (n,). returns: (n, horizon) log returns that came.
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


@dataclass(frozen=True)
class DailySeries:
    """Means over the tickers forecast on each date; ``dates`` increase.

    Attributes:
        dates: (days,) datetime64[D] origins. counts: (days,) tickers forecast.
        abs_error_bp, pinball_bp: model -> (days, horizon).
        inside: model -> (days, horizon, 3), shares inside the 50, 80 and 90% interval.
    """

    dates: np.ndarray
    counts: np.ndarray
    abs_error_bp: Mapping[str, np.ndarray]
    pinball_bp: Mapping[str, np.ndarray]
    inside: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class WorstDay:
    """A forecast that missed badly: one of a model's largest one-day quantile losses.

    Attributes:
        forecast_bp: (P05, P50, P95) of the one-day log return. came_bp: what came.
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
        facts: (name, text) lines on what was run. notes: warnings the reader must see first.
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
