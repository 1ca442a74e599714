"""Technical indicators for the day line (``--indicators``), as whole numbers.

Each is computed from its own day and earlier ones alone, so a line never depends on where a sequence starts
or on what comes later. While a table is too short for an indicator's full window, it is taken over the
days there are. Units are chosen for short lines: digits are tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from stocklora.volatility.market import garman_klass_variance

LIMIT = 9999  # four digits keep the line short

# name -> what its numbers are called in the prompt that names its numbers
INDICATORS = {
    # Mean log return and (geometric) mean Garman-Klass range of the tickers that have the day, basis points.
    "market": ("Market", "MarketRange"),
    "returns": ("Return5", "Return22"),  # basis points
    "sma": ("SMA20", "SMA50"),  # close above its simple moving average, basis points
    "ema": ("EMA12", "EMA26"),  # close above its exponential moving average, basis points
    "rsi": ("RSI14",),  # 0 to 100
    "macd": ("MACD",),  # MACD (12, 26) less its signal (9), basis points of the close
    "bollinger": ("Bollinger",),  # width of the 20-day band of two standard deviations, basis points of its middle
    "atr": ("ATR14",),  # average true range, basis points of the close
    "range": ("Range1", "Range5", "Range22"),  # Garman-Klass volatility a day, basis points
}


def indicator_table(frame: pd.DataFrame, names: Sequence[str], market: pd.DataFrame | None = None) -> np.ndarray:
    """The numbers of the named indicators at every row of ``frame``, those beyond ``LIMIT`` cut to it.

    What is not known on a day (the market on its first one) is 0.

    Args:
        market: ``Market.days``; only ``market`` needs it.

    Returns:
        (days, numbers) int64, the numbers in the order of ``names`` and of ``INDICATORS``.

    Raises:
        ValueError: an unknown name, or ``market`` without a market.
    """
    unknown = [name for name in names if name not in INDICATORS]
    if unknown:
        raise ValueError(f"unknown indicator {unknown[0]!r}; there are {', '.join(INDICATORS)}")
    if "market" in names and market is None:
        raise ValueError("the indicator 'market' needs the market's days")
    columns: list[pd.Series] = []
    for name in names:
        columns += market_day(frame, market) if name == "market" else COMPUTED[name](frame)
    if not columns:
        return np.zeros((len(frame), 0), dtype=np.int64)
    table = np.stack([column.to_numpy(dtype=np.float64) for column in columns], axis=1)
    return np.clip(np.rint(np.nan_to_num(table)), -LIMIT, LIMIT).astype(np.int64)


def number_names(names: Sequence[str]) -> list[str]:
    """What each column of ``indicator_table`` is called."""
    return [number for name in names for number in INDICATORS[name]]


def market_day(frame: pd.DataFrame, market: pd.DataFrame | None) -> list[pd.Series]:
    """The market's mean return and mean Garman-Klass range of the day, basis points."""
    assert market is not None
    days = market.reindex(frame.index)
    return [1e4 * days["market_return"], 1e4 * np.exp(days["market_log_range"])]


def moves(frame: pd.DataFrame) -> list[pd.Series]:
    """Returns over 5 and 22 days, basis points."""
    close = frame["Close"]
    return [1e4 * (close / close.shift(days).fillna(close.iloc[0]) - 1.0) for days in (5, 22)]


def simple_averages(frame: pd.DataFrame) -> list[pd.Series]:
    """How far the close is above its mean over 20 and 50 days, basis points."""
    close = frame["Close"]
    return [1e4 * (close / close.rolling(days, min_periods=1).mean() - 1.0) for days in (20, 50)]


def exponential_averages(frame: pd.DataFrame) -> list[pd.Series]:
    """How far the close is above its exponential averages of 12 and 26 days, basis points."""
    close = frame["Close"]
    return [1e4 * (close / close.ewm(span=days).mean() - 1.0) for days in (12, 26)]


def relative_strength(frame: pd.DataFrame) -> list[pd.Series]:
    """Wilder's RSI over 14 days (New Concepts in Technical Trading Systems, 1978); 50 where nothing moved."""
    change = frame["Close"].diff()
    up = change.clip(lower=0.0).ewm(alpha=1 / 14).mean()
    down = (-change).clip(lower=0.0).ewm(alpha=1 / 14).mean()
    total = up + down
    return [(100.0 * up / total.where(total > 0)).fillna(50.0)]


def macd(frame: pd.DataFrame) -> list[pd.Series]:
    """The histogram: Appel's MACD less its signal line, in units of the close, so that tickers compare."""
    close = frame["Close"]
    line = close.ewm(span=12).mean() - close.ewm(span=26).mean()
    return [1e4 * (line - line.ewm(span=9).mean()) / close]


def bollinger_width(frame: pd.DataFrame) -> list[pd.Series]:
    """Bollinger's BandWidth (Bollinger on Bollinger Bands, 2001), with his standard deviation of the population."""
    band = frame["Close"].rolling(20, min_periods=1)
    return [1e4 * 4.0 * band.std(ddof=0) / band.mean()]


def average_true_range(frame: pd.DataFrame) -> list[pd.Series]:
    """Wilder's ATR over 14 days (1978)."""
    previous = frame["Close"].shift(1).fillna(frame["Open"])
    true_range = np.maximum(frame["High"], previous) - np.minimum(frame["Low"], previous)
    return [1e4 * true_range.ewm(alpha=1 / 14).mean() / frame["Close"]]


def ranges(frame: pd.DataFrame) -> list[pd.Series]:
    """Root mean Garman-Klass variance over 1, 5 and 22 days, basis points."""
    variance = garman_klass_variance(frame)
    return [1e4 * np.sqrt(variance.rolling(days, min_periods=1).mean().clip(lower=0.0)) for days in (1, 5, 22)]


COMPUTED: dict[str, Callable[[pd.DataFrame], list[pd.Series]]] = {
    "returns": moves,
    "sma": simple_averages,
    "ema": exponential_averages,
    "rsi": relative_strength,
    "macd": macd,
    "bollinger": bollinger_width,
    "atr": average_true_range,
    "range": ranges,
}
