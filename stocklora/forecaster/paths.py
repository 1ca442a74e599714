"""Joint paths of the days ahead by filtered historical simulation, and probabilities read from them.

Barone-Adesi, Giannopoulos and Vosper (Journal of Futures Markets 19, 1999): past returns, each in units of the scale
known before it, are put on today's scale. Here a path is the scaled returns over 1, 2, ... days that came together
from one origin of the market prior, so that how days follow each other is history's; each day is then stretched such
that the paths' quantiles are the forecast's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import say
from stocklora.metrics.scores import INTERVAL_COLUMNS
from stocklora.runtime.files import write_csv
from stocklora.volatility.prior import MarketPrior, load_prior

LEVELS = np.array(list(INTERVAL_COLUMNS))
PATHS_FOR_PROBABILITIES = 4000
SEED = 42


def joint_paths(history: np.ndarray, quantiles: np.ndarray, levels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Paths whose quantiles on each day are those given.

    Between two levels a day's value keeps its place among history's; beyond the outermost ones the distances to the
    median are stretched as the outermost quantile's is, so that the tails keep history's form.

    Args:
        history: (paths, at least horizon) scaled log returns.
        quantiles: (horizon, levels) of the log return, increasing.
        levels: (levels,) with 0.5 among them.
        count: paths to draw; each of history's is drawn equally often, up to one.
        seed: of the draw.

    Returns:
        (count, horizon) log returns from the last close.
    """
    draw = np.random.default_rng(seed)
    whole, rest = divmod(count, len(history))
    chosen = np.concatenate([np.tile(np.arange(len(history)), whole), draw.choice(len(history), rest, replace=False)])
    middle = int(np.argmin(np.abs(levels - 0.5)))
    result = np.empty((count, len(quantiles)))
    for step, target in enumerate(quantiles):
        knots = np.quantile(history[:, step], levels)
        values = history[chosen, step]
        moved = np.interp(values, knots, target)
        for end, outside in ((0, values < knots[0]), (-1, values > knots[-1])):
            stretch = (target[end] - target[middle]) / (knots[end] - knots[middle])
            moved[outside] = target[end] + (values[outside] - knots[end]) * stretch
        result[:, step] = moved
    return result


def paths_of(rows: Sequence[Mapping[str, Any]], count: int, prior: MarketPrior | None = None) -> dict[str, np.ndarray]:
    """(count, horizon) closes of every ticker.

    Args:
        rows: of ``predictions.csv``.
        count: of each.
        prior: whose paths say how days follow each other; by default the one that comes along.
    """
    history = (prior or load_prior()).paths
    result = {}
    for name in dict.fromkeys(row["Ticker"] for row in rows):
        own = [row for row in rows if row["Ticker"] == name]
        last = float(own[0]["Last_Close"])
        quantiles = np.log(np.array([[row[column] for column in INTERVAL_COLUMNS.values()] for row in own]) / last)
        result[name] = last * np.exp(joint_paths(history, quantiles, LEVELS, count, SEED))
    return result


def write_paths(path: Path, rows: Sequence[Mapping[str, Any]], paths: Mapping[str, np.ndarray]) -> None:
    """Write one row a ticker, path and day: ``Ticker,Path,Date,Day,Close``."""
    dates = {(row["Ticker"], row["Day"]): row["Date"] for row in rows}
    tables = []
    for name, closes in paths.items():
        count, horizon = closes.shape
        days = np.arange(1, horizon + 1)
        tables.append(pd.DataFrame({
            "Ticker": name, "Path": np.repeat(np.arange(1, count + 1), horizon),
            "Date": np.tile([dates[name, day] for day in days], count), "Day": np.tile(days, count),
            "Close": closes.reshape(-1),
        }))  # fmt: skip
    write_csv(path, pd.concat(tables), date_format="%Y-%m-%d", float_format="%.7g")


def print_probabilities(
    rows: Sequence[Mapping[str, Any]], above: float | None, below: float | None, prior: MarketPrior | None = None
) -> None:
    """Say how probable closes of the one ticker above and below a price are, day by day and on any of the days."""
    ((name, closes),) = paths_of(rows, PATHS_FOR_PROBABILITIES, prior).items()
    for word, price in (("above", above), ("below", below)):
        if price is None:
            continue
        beyond = closes > price if word == "above" else closes < price
        shares = zip(rows, beyond.mean(axis=0), strict=True)
        days = ", ".join(f"{row['Date']:%Y-%m-%d} {100 * share:.0f}%" for row, share in shares)
        ever = f"on at least one of these days {100 * beyond.any(axis=1).mean():.0f}%"
        say(f"{name} closes {word} {price:,.6g}: {days}; {ever}")
