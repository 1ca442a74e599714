"""Tables that several scripts print."""

from __future__ import annotations

from collections.abc import Mapping

from stocklora.cli.console import print_table
from stocklora.metrics.scores import Scores

FORECASTERS = {
    "naive": "last close (random walk)",
    "drift": "last close + drift",
    "ewma": "random walk, EWMA volatility",
    "har": "random walk, HAR-range volatility",
    "harx": "random walk, HAR-X volatility",
    "model": "this model",
}


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
