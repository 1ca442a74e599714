"""The ledger as a table: a row a forecast and day ahead, with what became of it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.ledger.chain import Entry
from stocklora.ledger.record import BASELINES
from stocklora.metrics.scores import INTERVAL_COLUMNS
from stocklora.prices.calendar import is_complete
from stocklora.runtime.files import write_csv

LEVELS = np.array(list(INTERVAL_COLUMNS))
COLUMNS = list(INTERVAL_COLUMNS.values())
FORECASTS = {"model": "quantiles", **{name: name for name in BASELINES}}  # whose quantiles, and their key in an entry

# What becomes of a forecast of one close, in the order in which it is decided.
RUNNING = "running"  # made before the close that it starts from
LATE = "late"  # the close was known
REPEATED = "repeated"  # said before, by the same forecaster from the same origin
PENDING = "pending"  # the day is not over
NO_CLOSE = "no close"  # the prices given have no row of the origin, or of the day
SCORED = "scored"


def table_of(entries: Sequence[Entry]) -> pd.DataFrame:
    """A row a forecast and day ahead, in the order of the entries.

    Returns:
        Columns ``number``, ``made``, ``ticker``, ``origin``, ``date``, ``day``, ``last_close``, ``model`` (its name),
        ``sha256``, ``prior_last_day``, ``data_sha256``, ``late``, ``running``, and ``P05`` to ``P95`` of the forecast,
        ``naive_P05`` and ``ewma_P05`` and so on of the baselines (NaN where there were too few days for them).
    """
    rows = []
    for entry in entries:
        content = entry.content
        for day in content["days"]:
            row = {
                "number": entry.number, "made": content["made"], "ticker": content["ticker"],
                "origin": content["origin"], "date": day["date"], "day": day["day"],
                "last_close": content["last_close"], "model": content["model"]["name"],
                "sha256": content["model"]["sha256"], "prior_last_day": content["model"]["prior_last_day"],
                "data_sha256": content["data_sha256"], "late": day["late"], "running": content["running"],
            }  # fmt: skip
            for name, key in FORECASTS.items():
                closes = day.get(key, [np.nan] * len(LEVELS))
                row |= dict(zip(columns_of(name), closes, strict=True))
            rows.append(row)
    columns = [*FACTS, *(column for name in FORECASTS for column in columns_of(name))]
    table = pd.DataFrame(rows, columns=columns)
    for name in ("origin", "date"):
        table[name] = pd.to_datetime(table[name])
    return table


FACTS = (
    "number", "made", "ticker", "origin", "date", "day", "last_close", "model", "sha256", "prior_last_day",
    "data_sha256", "late", "running",
)  # fmt: skip


def columns_of(name: str) -> list[str]:
    """The columns with the quantiles of ``model``, ``naive`` or ``ewma``."""
    return [column if name == "model" else f"{name}_{column}" for column in COLUMNS]


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write the table as CSV."""
    write_csv(path, table, date_format="%Y-%m-%d")


def judged(table: pd.DataFrame, now: dt.datetime) -> pd.DataFrame:
    """The table with ``state``: what may be counted, as far as can be said without prices.

    Of the forecasts of one forecaster (by the hash of its weights) from one origin for one day, the first that was made
    in time is counted, whatever came after it: nobody chooses the best of several.
    """
    state = pd.Series(PENDING, index=table.index)
    over: dict[tuple[str, pd.Timestamp], bool] = {}
    for ticker, date in set(zip(table["ticker"], table["date"], strict=True)):
        over[ticker, date] = is_complete(ticker, date, now)
    due = [over[key] for key in zip(table["ticker"], table["date"], strict=True)]
    state[due] = NO_CLOSE
    excluded = table["late"].astype(bool) | table["running"].astype(bool)
    repeated = table[~excluded].duplicated(["sha256", "ticker", "origin", "date"])
    state[repeated.index[repeated]] = REPEATED
    state[table["late"].astype(bool)] = LATE
    state[table["running"].astype(bool)] = RUNNING
    return table.assign(state=state)


def with_closes(table: pd.DataFrame, prices: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The table with ``came``, the log return from the origin's close to the day's, and ``origin_close``, as far as
    ``prices`` know them; what was due is then ``SCORED``.

    Prices change afterwards, by the factor of every split and dividend since. A return does not, so both closes are
    taken from the same prices of today, and the forecast's quantiles are taken from the close that it knew.
    """
    origin_close, close = np.full(len(table), np.nan), np.full(len(table), np.nan)
    for ticker, rows in table.groupby("ticker", sort=False).indices.items():
        if ticker in prices:
            known = prices[str(ticker)]["Close"]
            origin_close[rows] = known.reindex(table["origin"].iloc[rows]).to_numpy()
            close[rows] = known.reindex(table["date"].iloc[rows]).to_numpy()
    came = np.log(close / origin_close)
    state = table["state"].mask((table["state"] == NO_CLOSE) & np.isfinite(came), SCORED)
    return table.assign(state=state, came=came, origin_close=origin_close)


def returns_of(table: pd.DataFrame, name: str) -> np.ndarray:
    """(rows, 1, levels) quantiles of the log return of ``model``, ``naive`` or ``ewma``."""
    closes: Any = table[columns_of(name)].to_numpy(dtype=float)
    return np.asarray(np.log(closes / table["last_close"].to_numpy(dtype=float)[:, None])[:, None, :])
