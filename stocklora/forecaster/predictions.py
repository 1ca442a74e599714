"""``predictions.csv``: one row a ticker and day ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import print_table, say
from stocklora.metrics.scores import INTERVAL_COLUMNS
from stocklora.prices.calendar import next_sessions
from stocklora.runtime.files import write_csv

PREDICTION_COLUMNS = (
    "Ticker", "Origin", "Date", "Day", "Last_Close", "Predicted_Close",
    "P05", "P10", "P25", "P50", "P75", "P90", "P95",
)  # fmt: skip


def prediction_rows(
    ticker: str, frame: pd.DataFrame, quantiles: np.ndarray, levels: np.ndarray
) -> list[dict[str, Any]]:
    """Rows of ``predictions.csv`` for one ticker.

    Args:
        quantiles: (horizon, levels) of the log return from the last row's close.
    """
    origin, last_close = frame.index[-1], float(frame["Close"].iloc[-1])
    dates = next_sessions(ticker, origin, len(quantiles))
    columns = {int(np.argmin(np.abs(levels - level))): name for level, name in INTERVAL_COLUMNS.items()}
    rows = []
    for step, (date, row) in enumerate(zip(dates, quantiles, strict=True), start=1):
        closes = last_close * np.exp(row)
        cells = {name: float(closes[index]) for index, name in columns.items()}
        rows.append(
            {"Ticker": ticker, "Origin": origin, "Date": date, "Day": step, "Last_Close": last_close,
             "Predicted_Close": cells["P50"], **cells}
        )  # fmt: skip
    return rows


def write_predictions(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``predictions.csv``: one row a ticker and day, prices with enough digits for a penny stock."""
    frame = pd.DataFrame(rows, columns=list(PREDICTION_COLUMNS))
    for name in PREDICTION_COLUMNS[4:]:
        frame[name] = [float(f"{value:.7g}") for value in frame[name]]
    write_csv(path, frame, date_format="%Y-%m-%d")


MOST_ROWS = 30  # more than a screen is for the file


def print_forecast(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of ``predictions.csv`` as a table: the closes with their 80% intervals."""
    print_table(
        "Forecast",
        ("ticker", "date", "day", "last close", "forecast", "80% from", "to", "change"),
        [
            (
                row["Ticker"],
                f"{row['Date']:%Y-%m-%d}",
                row["Day"],
                f"{row['Last_Close']:,.2f}",
                f"{row['Predicted_Close']:,.2f}",
                f"{row['P10']:,.2f}",
                f"{row['P90']:,.2f}",
                f"{100 * (row['Predicted_Close'] / row['Last_Close'] - 1):+.2f}%",
            )
            for row in rows[:MOST_ROWS]
        ],
    )
    if len(rows) > MOST_ROWS:
        say(f"... and {len(rows) - MOST_ROWS} more rows")
