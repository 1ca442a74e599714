"""Forecasts without any training: the market prior, moved by each file's own days; no torch, about a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.baselines.settings import HORIZON, FrameworkSettings
from stocklora.cli.console import UserError, say
from stocklora.dataset.prepare import with_a_day_to_learn_from
from stocklora.forecaster.explain import explain, say_more
from stocklora.forecaster.predictions import prediction_rows, print_forecast, write_predictions
from stocklora.ledger.record import Maker, record_forecast
from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.prices.tables import log_returns_ahead
from stocklora.runtime.files import sha256_of
from stocklora.volatility.market import Markets
from stocklora.volatility.prior import BUILTIN, LEAST_ROWS, WARM_UP_DAYS, MarketPrior, prior_named
from stocklora.volatility.random_walk import QuantileBaseline, fit_baselines
from stocklora.volatility.scales import VolatilityScale


def forecast_and_save(prices: Mapping[str, pd.DataFrame], settings: FrameworkSettings) -> None:
    """What ``framework.py --model_path prior`` does: forecast every ticker, write and print the forecasts.

    Raises:
        UserError: no ticker with enough days, or a prior that cannot be read.
    """
    prior = prior_named(settings.prior)
    assert prior is not None
    prices = known_to_prior(prices)
    moved, markets = move_prior(prices, prior, settings.horizon or HORIZON)
    rows = forecast_by_prior(prices, moved, markets)
    write_predictions(settings.output, rows)
    say(f"forecast by the market prior ({prior}), moved by {sum(map(len, prices.values())):,} days of the file")
    print_forecast(rows)
    say(f"saved: {settings.output}")
    file = BUILTIN if settings.prior == "builtin" else Path(settings.prior)
    maker = Maker("market prior", sha256_of(file), prior.made_from["last_day"])
    record_forecast(settings.ledger, rows, prices, maker)
    say_more(rows, settings, lambda: explain(rows, prices, scale_of(moved), markets), prior)


def known_to_prior(prices: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tickers with days enough for a forecast by the prior; the others are named and left out.

    Raises:
        UserError: none has enough.
    """
    if all(len(frame) < LEAST_ROWS for frame in prices.values()):
        short = ", ".join(f"{name} ({len(frame)})" for name, frame in prices.items())
        raise UserError(
            f"a forecast by the prior needs {LEAST_ROWS} days of prices: {short} rows; download a longer --period"
        )
    return with_a_day_to_learn_from(prices, LEAST_ROWS)


def move_prior(
    prices: Mapping[str, pd.DataFrame], prior: MarketPrior, horizon: int
) -> tuple[QuantileBaseline, Markets]:
    """The prior as these tickers' own days move it, and their markets as it reads them.

    Args:
        prices: ticker -> its table, of at least ``LEAST_ROWS`` days.
        prior: where it starts.
        horizon: days ahead.
    """
    origins = {name: range(WARM_UP_DAYS, len(frame) - horizon) for name, frame in prices.items()}
    returns = {name: log_returns_ahead(frame["Close"].to_numpy(), horizon) for name, frame in prices.items()}
    moved = fit_baselines(prices, origins, returns, np.array(QUANTILE_LEVELS), ("prior",), prior=prior)["prior"]
    return moved, scale_of(moved).markets_of(prices)


def scale_of(moved: QuantileBaseline) -> VolatilityScale:
    """The scale of a baseline that has one."""
    assert moved.scale is not None
    return moved.scale


def forecast_by_prior(
    prices: Mapping[str, pd.DataFrame], moved: QuantileBaseline, markets: Markets
) -> list[dict[str, Any]]:
    """The next closes of every ticker from its last row; rows of ``predictions.csv``."""
    rows = []
    for name, frame in prices.items():
        scale = scale_of(moved).at(frame, markets.of(name))[-1:]
        rows += prediction_rows(name, frame, moved.quantiles(scale)[0], np.array(QUANTILE_LEVELS))
    return rows
