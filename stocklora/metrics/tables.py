"""Tables that several scripts print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stocklora.cli.console import print_table, say
from stocklora.metrics.scores import Scores

FORECASTERS = {
    "naive": "last close (random walk)",
    "drift": "last close + drift",
    "ewma": "random walk, EWMA volatility",
    "har": "random walk, HAR-range volatility",
    "harx": "random walk, HAR-X volatility",
    "model": "this model",
}
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


def print_scores(scores: Mapping[str, Scores], title: str) -> None:
    """Forecasters beside each other, and what the errors are relative to the last close."""
    base = scores["naive"]
    header = ("forecast", "MAE", "of last close", "RMSE", "MAPE %", "direction %", "pinball bp", "80% covers %")
    rows = []
    for name, entry in scores.items():
        direction = "-" if entry.direction != entry.direction else f"{entry.direction:.1f}"
        relative = f"{entry.mae / base.mae:.4f}" if base.mae else "-"
        rows.append((
            FORECASTERS.get(name, name), f"{entry.mae:.4g}", relative, f"{entry.rmse:.4g}",
            f"{entry.mape:.3f}", direction, f"{entry.pinball_bp:.2f}", f"{entry.coverage_80:.1f}",
        ))  # fmt: skip
    print_table(title, header, rows)
