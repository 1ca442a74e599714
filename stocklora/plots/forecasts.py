"""Pictures of forecasts: the fan after the last close, and a backtest's intervals. Drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection, PolyCollection

from stocklora.metrics.scores import INTERVAL_COLUMNS
from stocklora.plots.style import DOWN, INK, MODEL, MUTED, UP, WALK, new_figure, save_figure, set_title

BANDS = (("P05", "P95", 0.14, "90%"), ("P10", "P90", 0.22, "80%"), ("P25", "P75", 0.34, "50%"))


def plot_forecast(
    frame: pd.DataFrame, rows: Sequence[Mapping[str, Any]], path: Path, subtitle: str = "", days: int = 60
) -> None:
    """Candles of the last ``days`` and the fan of the forecast after them.

    Args:
        rows: one ticker's rows of ``predictions.csv``.
    """
    recent = frame.iloc[-days:]
    figure, axis = new_figure(height=5.2)
    first, last = rows[0], rows[-1]
    low, high = last["P10"], last["P90"]
    set_title(
        axis,
        f"{first['Ticker']}: next {len(rows)} closes from {first['Origin']:%Y-%m-%d}",
        subtitle
        or f"day {last['Day']}: {last['Predicted_Close']:,.2f}, 80% between {low:,.2f} and {high:,.2f}; "
        f"last close {first['Last_Close']:,.2f}",
    )
    _candles(axis, recent)
    # Days are drawn one step apart, so that weekends leave no holes.
    at = np.arange(len(recent) - 1, len(recent) + len(rows))
    for lower, upper, alpha, label in BANDS:
        bottom = [first["Last_Close"], *[row[lower] for row in rows]]
        top = [first["Last_Close"], *[row[upper] for row in rows]]
        axis.fill_between(at, bottom, top, color=MODEL, alpha=alpha, linewidth=0, label=f"{label} interval")
    median = [first["Last_Close"], *[row["P50"] for row in rows]]
    axis.plot(at, median, color=MODEL, linewidth=1.8, marker="o", markersize=3.5, label="median forecast")
    shown = [max(0, len(recent) - 20), at[-1]]
    axis.plot(
        shown, [first["Last_Close"]] * 2, color=WALK, linewidth=1.0, linestyle="--", label="last close (random walk)"
    )
    _date_ticks(axis, [*recent.index, *[row["Date"] for row in rows]])
    axis.set_xlim(-1, at[-1] + 1)
    axis.set_ylabel("price", color=MUTED)
    bottom_edge, top_edge = axis.get_ylim()
    begins_high = recent["High"].iloc[: len(recent) // 2].max() > (bottom_edge + top_edge) / 2
    _legend(axis, "lower left" if begins_high else "upper left")  # where the oldest candles are not
    save_figure(figure, path)


def _legend(axis: Any, corner: str = "upper left", columns: int = 1) -> None:
    """Intervals first, whatever order they were drawn in."""
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: "interval" not in labels[index])
    axis.legend(
        [handles[index] for index in order], [labels[index] for index in order], loc=corner, fontsize=9,
        labelcolor=INK, ncols=columns, facecolor="white", edgecolor="none", framealpha=0.85,
    )  # fmt: skip


def _candles(axis: Any, frame: pd.DataFrame) -> None:
    at = np.arange(len(frame))
    rises = (frame["Close"] >= frame["Open"]).to_numpy()
    colours = np.where(rises, UP, DOWN)
    wicks = [[(x, low), (x, high)] for x, low, high in zip(at, frame["Low"], frame["High"], strict=True)]
    axis.add_collection(LineCollection(wicks, colors=colours, linewidths=1.0))
    bodies = [
        [(x - 0.32, o), (x + 0.32, o), (x + 0.32, c), (x - 0.32, c)]
        for x, o, c in zip(at, frame["Open"], frame["Close"], strict=True)
    ]
    axis.add_collection(PolyCollection(bodies, facecolors=colours, edgecolors=colours, linewidths=0.8))
    axis.autoscale_view()


def _date_ticks(axis: Any, dates: Sequence[pd.Timestamp]) -> None:
    step = max(1, len(dates) // 8)
    at = list(range(len(dates) - 1, -1, -step))[::-1]
    axis.set_xticks(at, [f"{dates[index]:%d %b\n%Y}" for index in at])


def plot_backtest(
    frame: pd.DataFrame,
    origins: range,
    quantiles: np.ndarray,
    levels: np.ndarray,
    path: Path,
    ticker: str,
    subtitle: str,
) -> None:
    """One-day-ahead intervals over the test days with the closes that came.

    Args:
        quantiles: (origins, horizon, levels) of the log return.
    """
    rows = np.array(origins)
    close = frame["Close"].to_numpy()
    came = close[rows + 1]
    forecast = close[rows][:, None] * np.exp(quantiles[:, 0, :])
    column = {name: forecast[:, int(np.argmin(np.abs(levels - level)))] for level, name in INTERVAL_COLUMNS.items()}
    figure, axis = new_figure(height=5.0)
    set_title(axis, f"{ticker}: every close of the test days, forecast the day before", subtitle)
    # Days are drawn one step apart, so that a Friday's interval is as wide as any other day's.
    at = np.arange(len(rows))
    for lower, upper, alpha, label in BANDS:
        axis.bar(
            at, column[upper] - column[lower], bottom=column[lower], width=0.92, color=MODEL, alpha=alpha,
            linewidth=0, label=f"{label} interval",
        )  # fmt: skip
    inside = (came >= column["P10"]) & (came <= column["P90"])
    axis.plot(at, came, color=INK, linewidth=0.8, alpha=0.5)
    axis.plot(at[inside], came[inside], "o", color=INK, markersize=3.5, label="close, inside 80%")
    axis.plot(at[~inside], came[~inside], "o", color=DOWN, markersize=4.5, label="close, outside 80%")
    _date_ticks(axis, list(frame.index[rows + 1]))
    low, high = min(column["P05"].min(), came.min()), max(column["P95"].max(), came.max())
    axis.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    axis.set_ylabel("price", color=MUTED)
    _legend(axis, columns=5)  # one line, in the room above the highest interval
    save_figure(figure, path)
