"""What all tickers of a file did on a day, as sums that are added up one ticker at a time.

Two sums by date: the market's day (mean return, mean size of the returns, mean range), which is an input
of the ``harx`` scale and of ``--indicators``; and the *surprise*, how large the day's returns were in units
of the scale known the day before, by which the scale follows a regime that its training days did not have.
Nothing here is larger than the number of dates, so a panel of any width streams through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from stocklora.prices.exchanges import exchange_of

MARKET_COLUMNS = ("market_return", "market_size", "market_log_range")
SURPRISE_HALF_LIFE_DAYS = 66.0  # a quarter
SURPRISE_PRIOR_DAYS = 10.0
SURPRISE_LIMIT = 6.0  # one crash is not a new regime
SURPRISE_WARM_UP_DAYS = 10  # a ticker's first scales rest on next to nothing: what they expect surprises nobody
RANGE_FLOOR = 1e-4  # one basis point
REMEMBERED_BYTES = 64 * 2**20  # of what was computed from tables asked for lately


def garman_klass_variance(frame: pd.DataFrame) -> pd.Series:
    """A day's variance from its four prices (Garman and Klass, Journal of Business 53, 1980), at least 0."""
    opened, high, low, close = (frame[name].to_numpy() for name in ("Open", "High", "Low", "Close"))
    variance = 0.5 * np.log(high / low) ** 2 - (2.0 * np.log(2.0) - 1.0) * np.log(close / opened) ** 2
    return pd.Series(np.maximum(variance, 0.0), index=frame.index)


class Market:
    """Sums by date over the tickers added so far.

    Add every ticker (``add``) before asking for ``days``, and its surprises (``add_surprise``) before asking for
    ``running_surprise``. Tickers are to be added in one fixed order: sums of floats depend on it.
    """

    def __init__(self) -> None:
        self._days: dict[np.datetime64, np.ndarray] = {}
        self._surprises: dict[np.datetime64, np.ndarray] = {}
        self._table: pd.DataFrame | None = None
        self._derived: dict[str, pd.DataFrame] = {}
        self._running: tuple[float, pd.DataFrame] | None = None  # and what it started from
        self._remembered: dict[tuple[int, int], tuple[pd.DataFrame, np.ndarray]] = {}

    def without_surprises(self) -> Market:
        """The same days, and what was computed from them, for the surprises of another scale."""
        other = copy.copy(self)
        other._surprises, other._running = {}, None
        return other

    def add(self, frame: pd.DataFrame) -> None:
        """One ticker's days: its log return, the size of it, and its log Garman-Klass range."""
        returns = np.log(frame["Close"]).diff().to_numpy()
        ranges = np.log(np.maximum(np.sqrt(garman_klass_variance(frame).to_numpy()), RANGE_FLOOR))
        dates = frame.index.to_numpy()
        _accumulate(self._days, dates[1:], np.stack([returns, np.abs(returns), ranges], axis=1)[1:])
        self._table = None
        self._derived.clear()
        self._remembered.clear()

    def add_surprise(self, frame: pd.DataFrame, scale: np.ndarray) -> None:
        """One ticker's |return| in units of the one-day scale known the day before, its first days left out.

        Args:
            scale: (days,) one-day scale at every row of ``frame``, before any adaptation.
        """
        sizes = np.abs(np.diff(np.log(frame["Close"].to_numpy())))
        surprise = np.minimum(sizes / scale[:-1], SURPRISE_LIMIT)
        traded = (sizes > 0.0) | (frame["High"].to_numpy() > frame["Low"].to_numpy())[1:]  # a halt says nothing
        traded |= np.isnan(sizes)
        traded[:SURPRISE_WARM_UP_DAYS] = False
        _accumulate(self._surprises, frame.index.to_numpy()[1:][traded], surprise[traded, None])
        self._running = None

    @property
    def days(self) -> pd.DataFrame:
        """One row a date, columns ``MARKET_COLUMNS``: means over the tickers that have the day."""
        if self._table is None:
            self._table = _means(self._days, MARKET_COLUMNS)
        return self._table

    @property
    def is_one_ticker(self) -> bool:
        """Whether no day has a second ticker, so that the market says again what its ticker says."""
        return all(entry[0] == 1.0 for entry in self._days.values())

    def derived(self, name: str, compute: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        """``compute(days)``, once for all tickers that ask; ``name`` tells one computation from another."""
        days = self.days
        if name not in self._derived:
            self._derived[name] = compute(days)
        return self._derived[name]

    def remembered(self, frame: pd.DataFrame, horizon: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """``compute()``, once while ``frame``, the very table, is among the last asked for; not to be written into.

        Each scale that is fitted reads the same inputs of the same tables several times.
        """
        key = id(frame), horizon  # of a table that is kept here, so that no other can take its id
        if key not in self._remembered:
            values = compute()
            values.flags.writeable = False
            self._remembered[key] = frame, values
            held = sum(kept.nbytes for _, kept in self._remembered.values())
            while held > REMEMBERED_BYTES:
                held -= self._remembered.pop(next(iter(self._remembered)))[1].nbytes
            return values
        return self._remembered[key][1]

    def running_surprise(self, index: pd.DatetimeIndex, usual: float) -> tuple[np.ndarray, np.ndarray]:
        """Exponentially weighted means over past days, at every date of ``index``.

        Args:
            usual: the surprise's mean on training days; worth ``SURPRISE_PRIOR_DAYS`` before the first surprise.

        Returns:
            (days,) the surprise, and (days,) how many tickers a day it is the mean of.
        """
        if self._running is None or self._running[0] != usual:
            decay = 0.5 ** (1.0 / SURPRISE_HALF_LIFE_DAYS)
            total, weight, tickers, days, running = usual * SURPRISE_PRIOR_DAYS, SURPRISE_PRIOR_DAYS, 0.0, 0.0, []
            dates = sorted(self._surprises)
            for count, surprises in (self._surprises[date] for date in dates):
                total, weight = decay * total + surprises / count, decay * weight + 1.0
                tickers, days = decay * tickers + count, decay * days + 1.0
                running.append((total / weight, tickers / days))
            table = np.array(running, dtype=np.float64).reshape(len(dates), 2)
            self._running = usual, pd.DataFrame(table, index=pd.DatetimeIndex(dates), columns=["surprise", "tickers"])
        rows = self._running[1].reindex(index, method="ffill")
        return rows["surprise"].fillna(usual).to_numpy(), rows["tickers"].fillna(1.0).to_numpy()


class Markets:
    """A market for each exchange: at one exchange's close another's day of the same date has not been yet."""

    def __init__(self) -> None:
        self._by_exchange: dict[str | None, Market] = {}

    def of(self, ticker: str) -> Market:
        """The market of the ticker's exchange."""
        return self._by_exchange.setdefault(exchange_of(ticker), Market())

    def without_surprises(self) -> Markets:
        """See ``Market.without_surprises``."""
        markets = Markets()
        markets._by_exchange = {name: market.without_surprises() for name, market in self._by_exchange.items()}
        return markets


def market_of(prices: Mapping[str, pd.DataFrame]) -> Market:
    """All tickers as one market, without surprises."""
    market = Market()
    for frame in prices.values():
        market.add(frame)
    return market


def markets_of(prices: Mapping[str, pd.DataFrame]) -> Markets:
    """The markets of a whole file, without surprises."""
    markets = Markets()
    for name, frame in prices.items():
        markets.of(name).add(frame)
    return markets


def _accumulate(sums: dict[np.datetime64, np.ndarray], dates: np.ndarray, values: np.ndarray) -> None:
    for date, row in zip(dates, values, strict=True):
        entry = sums.get(date)
        if entry is None:
            sums[date] = np.array([1.0, *row])
        else:
            entry[0] += 1.0
            entry[1:] += row


def _means(sums: Mapping[np.datetime64, np.ndarray], columns: tuple[str, ...]) -> pd.DataFrame:
    dates = sorted(sums)
    table = np.array([sums[date][1:] / sums[date][0] for date in dates]).reshape(len(dates), len(columns))
    return pd.DataFrame(table, index=pd.DatetimeIndex(dates, name="Date"), columns=list(columns))
