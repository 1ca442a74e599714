"""How good a forecast was: point, direction and interval measures.

Shapes throughout: ``n`` origins (all tickers together), ``horizon`` days ahead, ``levels`` quantiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stocklora.cli.console import print_table

# The seven columns of predictions.csv and two more around the median, where most of a year's days fall.
QUANTILE_LEVELS = (0.05, 0.10, 0.25, 0.40, 0.50, 0.60, 0.75, 0.90, 0.95)
BASIS_POINTS = 1e4
# The columns of predictions.csv with the quantile at each of these levels.
INTERVAL_COLUMNS = {0.05: "P05", 0.10: "P10", 0.25: "P25", 0.50: "P50", 0.75: "P75", 0.90: "P90", 0.95: "P95"}
FORECASTERS = {
    "naive": "last close (random walk)",
    "drift": "last close + drift",
    "ewma": "random walk, EWMA volatility",
    "har": "random walk, HAR-range volatility",
    "harx": "random walk, HAR-X volatility",
    "prior": "random walk, market prior",
    "model": "this model",
}


@dataclass(frozen=True)
class Scores:
    """Averages over origins and horizons.

    Attributes:
        mae, rmse: of the close, in its currency.
        mape: of the close, percent.
        mae_bp: of the log return, basis points: comparable between tickers.
        direction: share of origins whose sign the forecast got right, percent; days without a move and
            forecasts of no move are left out; NaN when that leaves none.
        pinball_bp: mean quantile loss of the log return, basis points.
        coverage_80: share of closes inside P10..P90, percent.
    """

    mae: float
    rmse: float
    mape: float
    mae_bp: float
    direction: float
    pinball_bp: float
    coverage_80: float
    origins: int


def pinball_loss(returns: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Quantile loss (Koenker and Bassett, Econometrica 46, 1978) averaged over levels.

    Args:
        returns: (n, horizon).
        quantiles: (n, horizon, levels).
        levels: (levels,) in (0, 1).

    Returns:
        (n, horizon) in the unit of ``returns``.
    """
    error = returns[..., None] - quantiles
    return np.maximum(levels * error, (levels - 1.0) * error).mean(axis=-1)


def median_index(levels: np.ndarray) -> int:
    """Where the median stands among the levels."""
    return int(np.argmin(np.abs(np.asarray(levels) - 0.5)))


def level_index(levels: np.ndarray, level: float) -> int:
    """Where a level stands among the levels.

    Raises:
        ValueError: it does not.
    """
    near = int(np.argmin(np.abs(np.asarray(levels) - level)))
    if abs(levels[near] - level) > 1e-6:
        raise ValueError(f"no quantile at level {level:.3f} among {np.asarray(levels).tolist()}")
    return near


def inside_interval(returns: np.ndarray, quantiles: np.ndarray, levels: np.ndarray, share: float) -> np.ndarray:
    """(...) whether each return is inside the central interval that should hold ``share`` of them.

    Raises:
        ValueError: the two levels at its ends are not among ``levels``.
    """
    low, high = (quantiles[..., level_index(levels, end)] for end in ((1.0 - share) / 2.0, (1.0 + share) / 2.0))
    return np.asarray((returns >= low) & (returns <= high))


def coverage(returns: np.ndarray, quantiles: np.ndarray, levels: np.ndarray, share: float) -> float:
    """Percent of returns inside that interval."""
    return 100.0 * float(inside_interval(returns, quantiles, levels, share).mean())


def width_explained(quantiles: np.ndarray, wanted: np.ndarray, start: np.ndarray) -> float:
    """R² of the log width of forecasts against that of others, both over the width that the start has.

    1: wider and narrower than the start where the others are, by as much; 0: no better than their mean over these days.

    Args:
        quantiles, wanted, start: (n, horizon, levels).
    """
    width, other, begun = (np.log(each[..., -1] - each[..., 0]) for each in (quantiles, wanted, start))
    total = ((other - begun) - (other - begun).mean(axis=0)) ** 2
    return float(1.0 - ((width - other) ** 2).sum() / total.sum())


def score(last_close: np.ndarray, returns: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> Scores:
    """Score forecasts against what came.

    Args:
        last_close: (n,) close at the origin.
        returns: (n, horizon) log returns that came.
        quantiles: (n, horizon, levels) forecasts of them.
        levels: (levels,) in (0, 1).
    """
    levels = np.asarray(levels)
    median = quantiles[..., median_index(levels)]
    close, forecast = last_close[:, None] * np.exp(returns), last_close[:, None] * np.exp(median)
    error = forecast - close
    moved = (returns != 0.0) & (np.abs(median) > 1e-12)
    right = np.sign(median[moved]) == np.sign(returns[moved])
    return Scores(
        mae=float(np.abs(error).mean()),
        rmse=float(np.sqrt((error**2).mean())),
        mape=100.0 * float((np.abs(error) / close).mean()),
        mae_bp=BASIS_POINTS * float(np.abs(median - returns).mean()),
        direction=100.0 * float(right.mean()) if right.size else float("nan"),
        pinball_bp=BASIS_POINTS * float(pinball_loss(returns, quantiles, levels).mean()),
        coverage_80=coverage(returns, quantiles, levels, 0.80),
        origins=len(returns),
    )


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
