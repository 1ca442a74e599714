"""Adds up a backtest, one ticker at a time, into what the report shows.

What grows with every ticker is its few rows of metrics.csv; the rest is sums by origin date, so five hundred
tickers need hardly more memory than one. Sums of floating-point numbers depend on their order: callers add tickers
in a fixed order, and the same order gives the same result bit for bit.

Pooled rows treat a date as one observation, however many tickers it has: tickers move together, and to count each
ticker-day as evidence of its own would make luck look like skill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stocklora.backtest.results import (
    ALL_TICKERS,
    INTERVALS,
    METRIC_COLUMNS,
    PIT_BINS,
    REFERENCE,
    BacktestResult,
    DailySeries,
    TickerForecasts,
    WorstDay,
    standard_error,
)
from stocklora.backtest.verdicts import verdict
from stocklora.metrics.scores import BASIS_POINTS, inside_interval, level_index, median_index, pinball_loss
from stocklora.metrics.significance import (
    crps_from_quantiles,
    diebold_mariano,
    directional_skill,
    holm,
    pit,
    relative_mean_interval,
)

LOSS_REFERENCE = "ewma"  # what quantile losses stand beside, where it is among the models
WORST_DAYS = 10
FAN_ORIGINS = 60
NO_MOVE = 1e-12  # a forecast this near the last close has no direction, as in metrics.score
SAME_BP = 1e-9  # losses nearer to each other differ by rounding alone
# column of metrics.csv -> the measure whose mean it is
MEAN_COLUMNS = {
    "MAE": "abs_error", "MAPE": "percent_error", "MAE_bp": "abs_error_bp", "Pinball_bp": "pinball_bp",
    "CRPS_bp": "crps_bp",
}  # fmt: skip


@dataclass
class _Sums:
    """Sums over tickers by origin date: of all tickers, or of one.

    Attributes:
        dates: (days,) increasing.
        counts: (days,) tickers forecast.
        of: measure -> (days, models, horizon).
    """

    dates: np.ndarray
    counts: np.ndarray
    of: dict[str, np.ndarray]

    def add(self, other: _Sums) -> None:
        merged = np.union1d(self.dates, other.dates)

        def both(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            added = np.zeros((len(merged), *mine.shape[1:]), dtype=mine.dtype)
            added[np.searchsorted(merged, self.dates)] = mine
            added[np.searchsorted(merged, other.dates)] += theirs  # no date twice, so += adds them all
            return added

        self.counts = both(self.counts, other.counts)
        self.of = {name: both(values, other.of[name]) for name, values in self.of.items()}
        self.dates = merged

    def at(self, name: str, model: int, step: int) -> np.ndarray:
        """(days,) of one model and day ahead."""
        return self.of[name][:, model, step]

    def total(self, name: str, model: int, step: int) -> float:
        """Over all ticker-days."""
        return float(self.at(name, model, step).sum())


class Aggregate:
    """Takes ``TickerForecasts`` one at a time; ``result`` makes the ``BacktestResult``.

    Args:
        models: all that are compared; the last close (``REFERENCE``) must be among them.
        levels: (levels,) increasing quantile levels, with the ends of ``INTERVALS`` and the median among them.
        show: the ticker of the fan; by default the first added.

    Raises:
        ValueError: models without the reference or one twice, or a level missing.
    """

    def __init__(self, models: Sequence[str], horizon: int, levels: np.ndarray, show: str | None = None) -> None:
        if REFERENCE not in models or len(set(models)) < len(models):
            raise ValueError(f"models must be distinct and hold {REFERENCE!r}: {list(models)}")
        if horizon < 1:
            raise ValueError(f"a horizon of {horizon} days")
        self.models = [REFERENCE, *[model for model in models if model != REFERENCE]]
        self.horizon = horizon
        self.levels = np.asarray(levels, dtype=float)
        if not (np.diff(self.levels) > 0.0).all():
            raise ValueError(f"levels must increase: {self.levels.tolist()}")
        self.show = show
        self.loss_reference = LOSS_REFERENCE if LOSS_REFERENCE in self.models else REFERENCE
        for share in (0.0, *INTERVALS):  # a level that is not there is missed here, not with the first ticker
            level_index(self.levels, (1.0 - share) / 2.0)
            level_index(self.levels, (1.0 + share) / 2.0)
        self._sums: _Sums | None = None
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._pit = np.zeros((len(self.models), horizon, PIT_BINS), dtype=np.int64)
        self._worst: dict[str, list[WorstDay]] = {model: [] for model in self.models}
        self._fan: TickerForecasts | None = None

    def add(self, forecasts: TickerForecasts) -> None:
        """Add one ticker.

        Raises:
            ValueError: no forecasts, a model missing, shapes that disagree, numbers that are not finite, origins
                out of order, or a ticker that was added before.
        """
        if forecasts.ticker in self._rows:
            raise ValueError(f"{forecasts.ticker} was added before")
        forecasts.check(self.models, self.horizon, len(self.levels))
        quantiles = np.stack([forecasts.quantiles[model] for model in self.models], axis=1)  # (n, models, h, levels)
        sums = _Sums(
            forecasts.origins.astype("datetime64[D]"),
            np.ones(len(forecasts.origins), dtype=np.int64),
            self._measures(forecasts, quantiles),
        )
        self._rows[forecasts.ticker] = self._metric_rows(forecasts.ticker, sums)
        for row in self._rows[forecasts.ticker]:
            naive = float(forecasts.naive_mae[row["Day"] - 1])
            row["MASE"] = row["MAE"] / naive if naive > 0.0 else math.nan
        self._count_pit(forecasts, quantiles)
        self._keep_worst(forecasts, sums.of["pinball_bp"][:, :, 0])
        if self._fan is None or forecasts.ticker == self.show:
            self._fan = forecasts.last(FAN_ORIGINS, self.models)
        if self._sums is None:
            self._sums = sums
        else:
            self._sums.add(sums)

    def result(self, facts: Sequence[tuple[str, str]] = (), notes: Sequence[str] = ()) -> BacktestResult:
        """All that the report shows; ``facts`` and ``notes`` are handed through.

        Raises:
            ValueError: no ticker was added.
        """
        if self._sums is None or self._fan is None:
            raise ValueError("no ticker was added")
        notes = tuple(notes)
        if self.show is not None and self._fan.ticker != self.show:
            notes += (f"{self.show} has no forecasts; {self._fan.ticker} is shown instead",)
        by_ticker = [dict(row) for rows in self._rows.values() for row in rows]
        self._adjust(by_ticker)
        pooled = self._metric_rows(ALL_TICKERS, self._sums)
        for row in pooled:
            peers = [peer for peer in _family(by_ticker, row["Model"], row["Day"]) if math.isfinite(peer["MASE"])]
            if peers:
                row["MASE"] = sum(p["MASE"] * p["Origins"] for p in peers) / sum(p["Origins"] for p in peers)
        return BacktestResult(
            models=tuple(self.models),
            tickers=tuple(self._rows),
            horizon=self.horizon,
            levels=self.levels.copy(),
            pooled=pooled,
            by_ticker=by_ticker,
            daily=self._daily(self._sums),
            pit={model: self._pit[index].copy() for index, model in enumerate(self.models)},
            fan=self._fan,
            worst={model: tuple(days) for model, days in self._worst.items()},
            verdicts=tuple(self._verdict(model, pooled, self._sums) for model in self.models[1:]),
            facts=tuple(facts),
            notes=notes,
        )

    def _measures(self, forecasts: TickerForecasts, quantiles: np.ndarray) -> dict[str, np.ndarray]:
        """measure -> (n, models, horizon), one forecast's share of every sum; from (n, models, horizon, levels)."""
        returns = np.broadcast_to(forecasts.returns[:, None, :], quantiles.shape[:-1])
        median = quantiles[..., median_index(self.levels)]
        last_close = forecasts.last_close[:, None, None]
        close = last_close * np.exp(returns)
        error = last_close * np.exp(median) - close
        moved = (returns != 0.0) & (np.abs(median) > NO_MOVE)
        expected, came = moved * np.sign(median), moved * np.sign(returns)
        measures = {
            "abs_error": np.abs(error),
            "squared_error": error**2,
            "percent_error": 100.0 * np.abs(error) / close,
            "abs_error_bp": BASIS_POINTS * np.abs(median - returns),
            "pinball_bp": BASIS_POINTS * pinball_loss(returns, quantiles, self.levels),
            "crps_bp": BASIS_POINTS * crps_from_quantiles(returns, quantiles, self.levels),
            "moves": moved.astype(float),
            "forecast_sign": expected,
            "return_sign": came,
            "sign_product": expected * came,
            "rises": (returns > 0.0).astype(float),
            "falls": (returns < 0.0).astype(float),
        }
        for share in INTERVALS:
            measures[_inside(share)] = inside_interval(returns, quantiles, self.levels, share).astype(float)
        return measures

    def _metric_rows(self, ticker: str, sums: _Sums) -> list[dict[str, Any]]:
        """Rows of metrics.csv but for MASE and Holm's adjustment, models and then days ahead in order."""
        return [
            self._row(ticker, sums, index, step) for index in range(len(self.models)) for step in range(self.horizon)
        ]

    def _row(self, ticker: str, sums: _Sums, index: int, step: int) -> dict[str, Any]:
        origins = int(sums.counts.sum())
        row: dict[str, Any] = dict.fromkeys(METRIC_COLUMNS, math.nan)
        row |= {"Model": self.models[index], "Ticker": ticker, "Day": step + 1, "Origins": origins}
        for column, name in MEAN_COLUMNS.items():
            row[column] = sums.total(name, index, step) / origins
        for share in INTERVALS:
            row[f"Coverage_{100 * share:.0f}"] = 100.0 * sums.total(_inside(share), index, step) / origins
        row["RMSE"] = math.sqrt(sums.total("squared_error", index, step) / origins)
        row |= self._direction(sums, index, step)
        row["Relative_MAE"], row["DM"], row["DM_p"] = _compare(sums, "abs_error_bp", index, 0, step)
        row["Relative_Pinball"], row["DM_Pinball"], row["DM_Pinball_p"] = _compare(
            sums, "pinball_bp", index, self.models.index(self.loss_reference), step
        )
        errors, walk = (sums.at("abs_error_bp", model, step) for model in (index, 0))
        row["Relative_MAE_Low"], row["Relative_MAE_High"] = (
            (1.0, 1.0) if index == 0 else relative_mean_interval(errors, walk, least_block_days=step + 1)
        )
        return row

    def _direction(self, sums: _Sums, index: int, step: int) -> dict[str, float]:
        moves, expected, came, product = (
            sums.at(name, index, step) for name in ("moves", "forecast_sign", "return_sign", "sign_product")
        )
        rises, falls = (sums.total(name, index, step) for name in ("rises", "falls"))
        total = float(moves.sum())
        right = (total + float(product.sum())) / 2.0  # whole numbers, so that a constant guess equals the majority
        return {
            "Direction": 100.0 * right / total if total else math.nan,
            "Direction_Majority": 100.0 * max(rises, falls) / (rises + falls) if rises + falls else math.nan,
            "PT_p": directional_skill(moves, expected, came, product, step + 1)[1],
        }

    def _adjust(self, by_ticker: Sequence[dict[str, Any]]) -> None:
        """Holm's adjustment across tickers, for each model and day ahead."""
        for model in self.models:
            for day in range(1, self.horizon + 1):
                family = _family(by_ticker, model, day)
                for column in ("DM_p", "DM_Pinball_p"):
                    adjusted = holm(np.array([row[column] for row in family]))
                    for row, value in zip(family, adjusted, strict=True):
                        row[f"{column}_Holm"] = float(value)

    def _count_pit(self, forecasts: TickerForecasts, quantiles: np.ndarray) -> None:
        transformed = pit(
            np.broadcast_to(forecasts.returns[:, None, :], quantiles.shape[:-1]), quantiles, self.levels
        )  # (n, models, horizon)
        bins = np.minimum((transformed * PIT_BINS).astype(int), PIT_BINS - 1)
        _, models, steps = np.indices(bins.shape)
        np.add.at(self._pit, (models, steps, bins), 1)

    def _keep_worst(self, forecasts: TickerForecasts, losses: np.ndarray) -> None:
        """``losses``: (n, models) quantile losses one day ahead, basis points."""
        shown = [level_index(self.levels, level) for level in (0.05, 0.5, 0.95)]
        for index, model in enumerate(self.models):
            days = [
                WorstDay(
                    ticker=forecasts.ticker,
                    origin=forecasts.origins[at],
                    date=forecasts.targets[at, 0],
                    forecast_bp=tuple((BASIS_POINTS * forecasts.quantiles[model][at, 0, shown]).tolist()),
                    came_bp=BASIS_POINTS * float(forecasts.returns[at, 0]),
                    pinball_bp=float(losses[at, index]),
                )
                for at in np.argsort(-losses[:, index], kind="stable")[:WORST_DAYS]
            ]
            # A sort keeps the order of equal losses: the earlier stays.
            worst_first = sorted(self._worst[model] + days, key=lambda day: -day.pinball_bp)
            self._worst[model] = worst_first[:WORST_DAYS]

    def _daily(self, sums: _Sums) -> DailySeries:
        errors = sums.of["abs_error_bp"] / sums.counts[:, None, None]
        inside = np.stack([sums.of[_inside(share)] / sums.counts[:, None, None] for share in INTERVALS], axis=-1)
        return DailySeries(
            dates=sums.dates.copy(),
            counts=sums.counts.copy(),
            abs_error_bp={model: errors[:, index] for index, model in enumerate(self.models)},
            inside={model: inside[:, index] for index, model in enumerate(self.models)},
        )

    def _verdict(self, model: str, pooled: Sequence[Mapping[str, Any]], sums: _Sums) -> str:
        index = self.models.index(model)
        rows = [dict(row) for row in pooled if row["Model"] == model]
        for step, row in enumerate(rows):
            difference = sums.at("abs_error_bp", index, step) - sums.at("abs_error_bp", 0, step)
            row["Same"] = bool((np.abs(difference) < SAME_BP * sums.counts).all())
            row["Majority"] = "up" if sums.total("rises", index, step) >= sums.total("falls", index, step) else "down"
            shares = sums.at(_inside(0.80), index, step) / sums.counts
            row["Coverage_Error"] = 100.0 * standard_error(shares, sums.counts, step + 1)
        whose = "EWMA's" if self.loss_reference == LOSS_REFERENCE else "the last close's"
        return verdict(model, rows, None if model == self.loss_reference else whose)


def _family(rows: Sequence[dict[str, Any]], model: str, day: int) -> list[dict[str, Any]]:
    return [row for row in rows if (row["Model"], row["Day"]) == (model, day)]


def _inside(share: float) -> str:
    return f"inside_{100 * share:.0f}"


def _compare(sums: _Sums, name: str, index: int, against: int, step: int) -> tuple[float, float, float]:
    """A model's mean loss over another's, and the Diebold-Mariano test on the series of means by date."""
    if index == against:
        return 1.0, math.nan, math.nan
    losses, others = sums.at(name, index, step), sums.at(name, against, step)
    difference = (losses - others) / sums.counts
    difference[np.abs(difference) < SAME_BP] = 0.0
    total = float(others.sum())
    ratio = float(losses.sum()) / total if total > 0.0 else math.nan
    return (ratio, *diebold_mariano(difference, step + 1))
