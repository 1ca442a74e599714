"""Prices that come with the project; ``scripts/make_sample.py`` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stocklora.cli.console import UserError
from stocklora.prices.sources.request import period_start
from stocklora.runtime.files import BUNDLED_PRICES, bundled_folder

if TYPE_CHECKING:
    import pandas as pd


def bundled_prices() -> dict[str, pd.DataFrame]:
    """Every bundled day, one frame a ticker."""
    from stocklora.prices.tables import read_table

    return read_table(bundled_folder() / BUNDLED_PRICES)


def sample_prices(
    ticker: str | Sequence[str], period: str = "1y", start: str | None = None, end: str | None = None
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Bundled prices of one or several tickers, and the sidecar's beginning (source, adjustment, interval).

    ``period`` counts back from the last day the bundle holds for a ticker, not from today.

    Raises:
        UserError: a ticker or range that the bundle does not hold; an unreadable period.
    """
    from stocklora.prices.tables import read_meta

    bundled = bundled_prices()
    origins = (read_meta(bundled_folder() / BUNDLED_PRICES) or {}).get("origins", {})
    symbols = [one.upper() for one in ([ticker] if isinstance(ticker, str) else ticker)]
    parts: dict[str, pd.DataFrame] = {}
    for symbol in symbols:
        if symbol not in bundled:
            tickers = ", ".join(f"{name} ({days_of(frame)})" for name, frame in bundled.items())
            raise UserError(
                f"the bundled sample has no ticker {symbol}; it has {tickers}; for any other, leave out --source sample"
            )
        parts[symbol] = within(bundled[symbol], period, start, end)
        if not len(parts[symbol]):
            raise UserError(f"the bundled sample has no {symbol} in that range; it has {days_of(bundled[symbol])}")
    meta = {"source": "sample", "origins": {symbol: str(origins.get(symbol, BUNDLED_PRICES)) for symbol in symbols}}
    return parts, {**meta, "adjust": "all", "interval": "1d"}


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
