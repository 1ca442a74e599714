"""Prices that come with the project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stocklora.cli.console import UserError

if TYPE_CHECKING:
    import pandas as pd

from stocklora.prices.sources.request import period_start
from stocklora.runtime.files import BUNDLED_PRICES, bundled_folder

# Newest first: a ticker that stands in several is taken from the newest that has days in the range.
SAMPLE_TABLES = ("AAPL_2024_2025.csv.gz", "us_large_2012_2017.csv.gz", BUNDLED_PRICES)


def sample_prices(
    ticker: str | Sequence[str], period: str = "1y", start: str | None = None, end: str | None = None
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Bundled prices of one or several tickers, and the sidecar's beginning (source, adjustment, interval).

    ``period`` counts back from the last day the bundle holds for a ticker, not from today.

    Raises:
        UserError: a ticker or range that the bundle does not hold; an unreadable period.
    """
    from stocklora.prices.tables import read_meta, read_table

    folder = bundled_folder()
    wanted = [one.upper() for one in ([ticker] if isinstance(ticker, str) else ticker)]
    found: dict[str, pd.DataFrame] = {}
    held: dict[str, list[str]] = {}
    origins: dict[str, str] = {}
    for name in SAMPLE_TABLES:
        meta = read_meta(folder / name) or {}
        # A sidecar lists the tickers, so that only a table that is needed gets unpacked.
        if meta.get("tickers") and not (set(wanted) - set(found)) & set(meta["tickers"]):
            for symbol in meta["tickers"]:
                held.setdefault(symbol, [])
            continue
        for symbol, frame in read_table(folder / name, meta).items():
            held.setdefault(symbol, []).append(days_of(frame))
            if symbol not in wanted or symbol in found:
                continue
            part = within(frame, period, start, end)
            if len(part):
                found[symbol] = part
                origins[symbol] = str(meta.get("origins", {}).get(symbol, name))
    for symbol in wanted:
        if symbol not in held:
            raise UserError(
                f"the bundled sample has no ticker {symbol}; it has {', '.join(sorted(held))}; "
                "for any other, leave out --source sample"
            )
        if symbol not in found:
            raise UserError(f"the bundled sample has no {symbol} in that range; it has {', '.join(held[symbol])}")
    meta = {"source": "sample", "origins": {symbol: origins[symbol] for symbol in wanted}}
    return {symbol: found[symbol] for symbol in wanted}, {**meta, "adjust": "all", "interval": "1d"}


def days_of(frame: pd.DataFrame) -> str:
    return f"{frame.index[0]:%Y-%m-%d} to {frame.index[-1]:%Y-%m-%d}"


def within(frame: pd.DataFrame, period: str, start: str | None, end: str | None) -> pd.DataFrame:
    """The rows from ``start`` (or one ``period`` back) up to, not including, ``end``."""
    import pandas as pd

    if end is not None:
        frame = frame[frame.index < pd.Timestamp(end)]
    if start is not None:
        return frame[frame.index >= pd.Timestamp(start)]
    if not len(frame) or period == "max":
        return frame
    return frame[frame.index > period_start(period, frame.index[-1])]
