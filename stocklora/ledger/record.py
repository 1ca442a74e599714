"""From a forecast to entries of the ledger: what was said, by what, from which prices, and whether in time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import say, warn
from stocklora.ledger.chain import Entry, LedgerError, append
from stocklora.metrics.scores import INTERVAL_COLUMNS
from stocklora.prices.calendar import Clock, is_complete, session_close, utc_now
from stocklora.prices.tables import log_returns_ahead, prices_sha256
from stocklora.volatility.random_walk import fit_baselines

WARM_UP_DAYS = 30  # before the EWMA knows a ticker; of fewer rows, half
LEAST_ORIGINS = 20  # pooled, for the quantiles of the baselines
BASELINES = ("naive", "ewma")


@dataclass(frozen=True)
class Maker:
    """What made a forecast.

    Attributes:
        name: for people.
        sha256: of its weights, whatever they are called; forecasts with one hash are one forecaster's.
        prior_last_day: the last day that its market prior was made from, if it has one.
    """

    name: str
    sha256: str
    prior_last_day: str | None = None


def record_forecast(
    path: Path | None,
    rows: Sequence[Mapping[str, Any]],
    prices: Mapping[str, pd.DataFrame],
    maker: Maker,
    clock: Clock = utc_now,
) -> None:
    """Append a forecast to the ledger and say so; what cannot be recorded is a warning, the forecast stands.

    Args:
        path: the ledger; None for none.
        rows: of ``predictions.csv``.
        prices: of all tickers that were read for it, up to the origins.
        maker: what made it.
    """
    if path is None:
        return
    try:
        entries = append(path, contents_of(rows, prices, maker, clock()), clock)
    except LedgerError as error:
        warn(f"ledger: {path} {error}; the forecast is saved but not on record (--no-ledger for none)")
        return
    first, last = entries[0].number, entries[-1].number
    which = f"entry {first}" if first == last else f"entries {first} to {last}"
    say(f"ledger: {path}, {which}{_not_counted(entries)}")


def _not_counted(entries: Sequence[Entry]) -> str:
    days = [day for entry in entries for day in entry.content["days"]]
    late = sum(day["late"] for day in days)
    running = [entry.content["ticker"] for entry in entries if entry.content["running"]]
    text = ""
    if late:
        which = "its closes were" if late == len(days) else f"{late} of {len(days)} closes were"
        text = f"; {which} known already: late, not counted"
    if running:
        text += f"; made before the close it starts from, not counted: {', '.join(running)}"
    return text


def contents_of(
    rows: Sequence[Mapping[str, Any]], prices: Mapping[str, pd.DataFrame], maker: Maker, now: dt.datetime
) -> list[dict[str, Any]]:
    """One entry a ticker.

    ``days`` has for each day ahead its number, its date, whether it is ``late``, and at ``levels`` the quantiles of the
    close: of the forecast (as ``predictions.csv`` has them), of the last close with the quantiles of past returns
    (``naive``) and of those in units of the EWMA scale (``ewma``), both from the same prices and none later.
    ``running``: the session of the origin was not over.
    """
    horizon = max(row["Day"] for row in rows)
    baselines = baseline_quantiles(prices, horizon)
    data = prices_sha256(prices)
    contents: dict[str, dict[str, Any]] = {}
    for row in rows:
        ticker, origin = row["Ticker"], row["Origin"]
        if ticker not in contents:
            contents[ticker] = {
                "ticker": ticker, "origin": f"{origin:%Y-%m-%d}", "last_close": row["Last_Close"],
                "running": not _surely_over(origin, now) and not is_complete(ticker, origin, now),
                "rows": len(prices[ticker]), "data_sha256": data, "model": asdict(maker),
                "levels": list(INTERVAL_COLUMNS), "days": [],
            }  # fmt: skip
        day = {
            "day": row["Day"], "date": f"{row['Date']:%Y-%m-%d}", "late": is_known(ticker, row["Date"], now),
            "quantiles": _rounded([row[name] for name in INTERVAL_COLUMNS.values()]),
        }  # fmt: skip
        for name in BASELINES if ticker in baselines else ():
            returns = baselines[ticker][name][row["Day"] - 1]
            day[name] = _rounded(row["Last_Close"] * np.exp(returns))
        contents[ticker]["days"].append(day)
    return list(contents.values())


def is_known(ticker: str, day: pd.Timestamp, now: dt.datetime) -> bool:
    """Whether the close of ``day`` is out; where no calendar says, from the midnight (UTC) that the day begins with."""
    if _surely_over(day, now):
        return True
    if day.date() > (now + dt.timedelta(days=1)).date():
        return False
    close = session_close(ticker, day)
    return now >= (day.tz_localize("UTC").to_pydatetime() if close is None else close)


def _surely_over(day: pd.Timestamp, now: dt.datetime) -> bool:
    """Without asking a calendar, which takes a moment to load: most price files are old."""
    return bool(day.date() < (now - dt.timedelta(days=3)).date())


def baseline_quantiles(prices: Mapping[str, pd.DataFrame], horizon: int) -> dict[str, dict[str, np.ndarray]]:
    """What the last close and the EWMA scale would say: the baselines of every report, fitted on all days there are.

    Returns:
        ticker -> ``naive`` and ``ewma`` -> (horizon, levels) quantiles of the log return from the last row, the levels
        those of ``predictions.csv``. Empty where too few days came before.
    """
    origins = {name: range(min(WARM_UP_DAYS, len(frame) // 2), len(frame) - horizon) for name, frame in prices.items()}
    fitted = {name: prices[name] for name, rows in origins.items() if len(rows)}
    if sum(len(origins[name]) for name in fitted) < LEAST_ORIGINS:
        return {}
    returns = {name: log_returns_ahead(frame["Close"].to_numpy(), horizon) for name, frame in fitted.items()}
    scales: dict[str, dict[str, np.ndarray]] = {}
    levels = np.array(list(INTERVAL_COLUMNS))
    baselines = fit_baselines(fitted, origins, returns, levels, ("ewma",), scales)
    return {
        ticker: {name: baselines[name].quantiles(scales["ewma"][ticker][-1:])[0] for name in BASELINES}
        for ticker in fitted
    }


def _rounded(closes: Sequence[float] | np.ndarray) -> list[float]:
    """With the digits of ``predictions.csv``."""
    return [float(f"{close:.7g}") for close in closes]
