"""Walk-forward: every forecast made with what was known at its origin, by models fitted before it.

Time is cut at dates common to all tickers. At each cut every model is fitted anew on the days before it (or
once, at the first), leaving out ``horizon`` days whose targets reach past the cut and another ``horizon`` as
an embargo, and forecasts from every day until the next cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from stocklora.backtest.results import REFERENCE, TickerForecasts
from stocklora.baselines.classical import peer_quantiles, require_peer
from stocklora.baselines.settings import HORIZON, TrainSettings
from stocklora.cli.console import UserError
from stocklora.cli.settings import restored
from stocklora.prices.store import PerTicker, returns_ahead
from stocklora.prices.tables import log_returns_ahead
from stocklora.runtime.distributed import wait_for_everyone
from stocklora.volatility.market import Markets, markets_of
from stocklora.volatility.prior import MarketPrior
from stocklora.volatility.random_walk import QuantileBaseline, fit_baselines
from stocklora.volatility.scales import SCALES

LEAST_FITTED_ORIGINS = 100
BASELINES = ("naive", "drift", *SCALES)


def models_compared(asked_for: Sequence[str]) -> list[str]:
    """The names of all models, each once: the last close, then those asked for."""
    return list(dict.fromkeys([REFERENCE, *asked_for]))


@dataclass(frozen=True)
class Plan:
    """When to fit and what to score.

    Attributes:
        cuts: increasing dates of the fits; the first is the first origin.
        end: last origin, at most.
        train_days: rolling window of training days; None expands from the first day.
    """

    cuts: tuple[pd.Timestamp, ...]
    end: pd.Timestamp
    window_size: int
    horizon: int
    train_days: int | None = None

    def training(self, index: pd.DatetimeIndex, cut: pd.Timestamp) -> range:
        """Training origins of one ticker at a cut: purged of targets past it, less an embargo of ``horizon`` days."""
        stop = int(index.searchsorted(cut)) - 2 * self.horizon
        first = self.window_size if self.train_days is None else max(self.window_size, stop - self.train_days)
        return range(first, max(first, stop))

    def origins(self, index: pd.DatetimeIndex, cut: int) -> range:
        """Origins of one ticker between a cut and the next, targets known or not."""
        stop = index.searchsorted(self.cuts[cut + 1]) if cut + 1 < len(self.cuts) else len(index)
        last = int(index.searchsorted(self.end, side="right"))
        first = max(self.window_size, int(index.searchsorted(self.cuts[cut])))
        return range(first, max(first, min(int(stop), last)))


class Model(Protocol):
    """A forecaster that can be fitted at a cut."""

    def fit(self, prices: Mapping[str, pd.DataFrame], plan: Plan, cut: pd.Timestamp) -> None:
        """Learn from days before ``cut`` alone; ``prices`` may hold later ones."""

    def quantiles(self, ticker: str, frame: pd.DataFrame, origins: range) -> Mapping[str, np.ndarray]:
        """Model name -> (origins, horizon, levels) quantiles of the log return."""


class Baselines:
    """Last close, drift and the volatility scales, all on the same training origins.

    Attributes:
        fitted: by name, after ``fit``.
        prior: what ``prior`` starts from.
    """

    def __init__(self, names: Sequence[str], levels: np.ndarray, prior: MarketPrior | None = None) -> None:
        self.names, self.levels, self.prior = list(names), levels, prior
        self.fitted: dict[str, QuantileBaseline] = {}
        self._markets: dict[str, Markets] = {}

    def fit(self, prices: Mapping[str, pd.DataFrame], plan: Plan, cut: pd.Timestamp) -> None:
        training = {name: plan.training(pd.DatetimeIndex(frame.index), cut) for name, frame in prices.items()}
        known = {name: rows for name, rows in training.items() if rows}
        count = sum(map(len, known.values()))
        if count < LEAST_FITTED_ORIGINS:
            raise UserError(
                f"only {count} days to fit on before {cut:%Y-%m-%d} (at least {LEAST_FITTED_ORIGINS} needed); give a "
                f"later --from or older prices"
            )
        before = known_before(prices, list(known), cut)
        kinds = [name for name in self.names if name in SCALES]
        returns = returns_ahead(before, plan.horizon)
        self.fitted = fit_baselines(before, known, returns, self.levels, kinds, prior=self.prior)
        # Fitted on the past alone; the market goes on, each day of it known at that day's close.
        scales = {kind: self.fitted[kind].scale for kind in kinds}
        self._markets = {kind: scale.markets_of(prices) for kind, scale in scales.items() if scale is not None}

    def quantiles(self, ticker: str, frame: pd.DataFrame, origins: range) -> Mapping[str, np.ndarray]:
        result = {}
        for name in self.names:
            baseline = self.fitted[name]
            if baseline.scale is None:
                scale = np.ones((len(origins), len(baseline.location)))
            else:
                scale = baseline.scale.at(frame, self._markets[name].of(ticker))[list(origins)]
            result[name] = baseline.quantiles(scale)
        return result


def known_before(
    prices: Mapping[str, pd.DataFrame], names: Sequence[str], cut: pd.Timestamp
) -> Mapping[str, pd.DataFrame]:
    """The named tickers, each without the rows from ``cut`` on."""
    return PerTicker(names, lambda ticker: prices[ticker].iloc[: int(prices[ticker].index.searchsorted(cut))])


class Peer:
    """One of ``peers.PEERS``: fitted to each ticker by itself, refitted every 60 days on its own."""

    def __init__(self, name: str, levels: np.ndarray) -> None:
        require_peer(name)
        self.name, self.levels = name, levels
        self.horizon = 0
        self._warned_of: set[str] = set()

    def fit(self, prices: Mapping[str, pd.DataFrame], plan: Plan, cut: pd.Timestamp) -> None:
        self.horizon = plan.horizon

    def quantiles(self, ticker: str, frame: pd.DataFrame, origins: range) -> Mapping[str, np.ndarray]:
        close = frame["Close"].to_numpy()[: origins.stop]
        forecast = peer_quantiles(
            self.name, close, origins, self.horizon, self.levels, ticker=ticker, quiet=self._warned_of
        )
        if forecast.fallbacks:
            self._warned_of.add(ticker)
        return {self.name: forecast.quantiles}


class Simple:
    """``train.py``'s network, trained anew at every cut (a part of the days before it validates)."""

    def __init__(self, window_size: int, seed: int, device: str) -> None:
        self.window_size, self.seed, self.device = window_size, seed, device
        self.forecaster: Any = None

    def fit(self, prices: Mapping[str, pd.DataFrame], plan: Plan, cut: pd.Timestamp) -> None:
        from stocklora.baselines.simple_fit import fit_simple

        if plan.horizon > HORIZON:
            raise UserError(f"--models simple forecasts {HORIZON} days; lower --horizon or leave it out")
        known = training_prices(prices, plan, cut)
        # The latest date that leaves a test part of one origin: training wants one, and nothing of it is used.
        last = max(frame.index[-1 - HORIZON] for frame in known.values())
        settings = TrainSettings(
            window_size=self.window_size, seed=self.seed, device=self.device, test_from=f"{last:%Y-%m-%d}"
        )
        self.forecaster = fit_simple(known, settings, quiet=True).forecaster

    def quantiles(self, ticker: str, frame: pd.DataFrame, origins: range) -> Mapping[str, np.ndarray]:
        return {"simple": self.forecaster.quantiles(frame, origins)}


def training_prices(
    prices: Mapping[str, pd.DataFrame], plan: Plan, cut: pd.Timestamp, after: int = 0
) -> dict[str, pd.DataFrame]:
    """The rows a training script may see at a cut: up to ``horizon`` days before it, in the rolling window.

    Args:
        prices: ticker -> its table.
        plan: the window, the days ahead and the rolling window of training days.
        cut: the day before which everything is known.
        after: rows at and after the cut that are kept as well (a test part to be scored, never learned from).
    """
    result = {}
    for name, frame in prices.items():
        place = int(frame.index.searchsorted(cut))
        stop = place - plan.horizon if after == 0 else place + after
        first = 0 if plan.train_days is None else max(0, place - plan.horizon - plan.train_days - plan.window_size)
        part = frame.iloc[first : max(0, stop)]
        if len(part) > plan.window_size + 4 * (plan.horizon + 1):
            result[name] = part
    if not result:
        raise UserError(f"no ticker has days enough before {cut:%Y-%m-%d} to train on; give a later --from")
    return result


class LanguageModel:
    """Trained weights, one file or several that forecast together; trained anew at each cut if asked to.

    Args:
        ensemble: of one or more weights files.
        refit_folder: where the weights of each cut go; None keeps the given ones throughout.
    """

    def __init__(self, ensemble: Any, refit_folder: Path | None = None, is_main: bool = True) -> None:
        self.ensemble, self.refit_folder, self.is_main = ensemble, refit_folder, is_main
        self._markets: list[tuple[Markets, Markets]] = []

    def fit(self, prices: Mapping[str, pd.DataFrame], plan: Plan, cut: pd.Timestamp) -> None:
        if self.refit_folder is not None:
            self._refit(prices, plan, cut, self.refit_folder)
        days = markets_of(prices)  # for the day line
        self._markets = self.ensemble.each(lambda forecaster: (forecaster.scale.markets_of(prices), days))

    def _refit(self, prices: Mapping[str, pd.DataFrame], plan: Plan, cut: pd.Timestamp, folder: Path) -> None:
        """The same training again, on what was known at the cut; kept on disk, so that a resumed run has it."""
        from stocklora.finetune.fit import finetune
        from stocklora.finetune.report import WEIGHTS_NAME
        from stocklora.finetune.settings import TrainLoraSettings
        from stocklora.forecaster.ensemble import Ensemble

        members = []
        for number, (_, model_path) in enumerate(self.ensemble.members):
            home = folder / f"{cut:%Y-%m-%d}-{number}"
            if self.is_main and not (home / WEIGHTS_NAME).is_file():
                known = training_prices(prices, plan, cut, after=2 * plan.horizon + 1)
                kept = self.ensemble.weights[number].training["settings"]
                # Weights from before there was a prior are trained again without one.
                saved = restored({"prior": "none", **kept}, TrainLoraSettings)
                again = replace(
                    saved, data=[], tickers=[], model_path=model_path, save_dir=home, validation_from=None,
                    test_from=f"{cut:%Y-%m-%d}", device=str(self.ensemble.device.type),
                )  # fmt: skip
                finetune(known, again)
            members.append((home / WEIGHTS_NAME, model_path))
        wait_for_everyone()
        given = self.ensemble
        self.ensemble = Ensemble(members, given.how, given.device, given.dtype, given.trust_remote_code, keep=True)

    def quantiles(self, ticker: str, frame: pd.DataFrame, origins: range) -> Mapping[str, np.ndarray]:
        from stocklora.forecaster.ensemble import combine

        markets = iter(self._markets)

        def forecast(forecaster: Any) -> np.ndarray:
            surprised, market = next(markets)
            scales = {ticker: forecaster.scale.at(frame, surprised.of(ticker))}
            examples = forecaster.packed_examples({ticker: frame}, {ticker: origins}, scales, market)
            return np.asarray(forecaster.quantiles(examples))

        return {"llm": combine(self.ensemble.each(forecast), self.ensemble.how)}


def score_ticker(
    ticker: str, frame: pd.DataFrame, parts: Sequence[tuple[range, Mapping[str, np.ndarray]]], plan: Plan
) -> TickerForecasts | None:
    """Forecasts of one ticker from all cuts, with what came; None where no target is known yet.

    Args:
        ticker: its name.
        frame: its prices.
        parts: for each cut its origins and their quantiles by model.
        plan: how many days ahead.
    """
    close = frame["Close"].to_numpy()
    returns = log_returns_ahead(close, plan.horizon)
    dates = frame.index.to_numpy().astype("datetime64[D]")
    rows = np.array([row for origins, _ in parts for row in origins], dtype=np.int64)
    known = rows < len(frame) - plan.horizon
    if not known.any():
        return None
    names = list(parts[0][1])
    quantiles = {name: np.concatenate([part[name] for _, part in parts])[known] for name in names}
    rows = rows[known]
    before = close[: rows[0] + 1]
    naive = [float(np.abs(before[step:] - before[:-step]).mean()) for step in range(1, plan.horizon + 1)]
    return TickerForecasts(
        ticker=ticker,
        origins=dates[rows],
        targets=dates[rows[:, None] + np.arange(1, plan.horizon + 1)],
        last_close=close[rows],
        returns=returns[rows],
        quantiles=quantiles,
        naive_mae=np.maximum(naive, 1e-12 * close[rows[0]]),
    )


def choose_cuts(
    calendar: pd.DatetimeIndex, first: pd.Timestamp, end: pd.Timestamp, refit: str
) -> tuple[pd.Timestamp, ...]:
    """Dates of the fits: only ``first``, then each year's first day, or every so many trading days.

    Args:
        calendar: every date that any ticker has.
        first, end: first and last day to forecast from.
        refit: ``never``, ``yearly`` or a number of days.

    Raises:
        UserError: none of these.
    """
    days = calendar[(calendar >= first) & (calendar <= end)]
    if not len(days):
        raise UserError(
            f"no prices between {first:%Y-%m-%d} and {end:%Y-%m-%d}: they go from {calendar[0]:%Y-%m-%d} to "
            f"{calendar[-1]:%Y-%m-%d}; change --from or --to"
        )
    if refit == "never":
        return (days[0],)
    if refit == "yearly":
        years = pd.Series(days, index=days).groupby(days.year).first()
        return tuple(years)
    if not refit.isdigit() or int(refit) < 1:
        raise UserError(f"--refit {refit}: give never, yearly, or a number of trading days such as 60")
    return tuple(days[:: int(refit)])
