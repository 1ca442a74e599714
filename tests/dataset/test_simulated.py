"""Made-up stocks: bars that can be, and quantiles that what comes falls below as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from stocklora.dataset.simulated import QUARTER_DAYS, SimulatedStock, simulated_stock
from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.prices.tables import log_returns_ahead


@pytest.fixture(scope="module")
def stocks() -> list[SimulatedStock]:
    return [simulated_stock(1, number, days=250) for number in range(12)]


def test_what_comes_falls_below_the_quantiles_as_often_as_they_say(stocks) -> None:
    below = []
    for stock in stocks:
        returns = log_returns_ahead(stock.prices["Close"].to_numpy(), 3)[:-3]
        assert (np.diff(stock.quantiles, axis=-1) > 0).all()
        below.append((returns[..., None] < stock.quantiles[:-3]).mean(axis=0))
    assert np.abs(np.mean(below, axis=0) - QUANTILE_LEVELS).max() < 0.04


def test_the_bars_can_be(stocks) -> None:
    for stock in stocks:
        frame = stock.prices
        assert (frame["High"] >= frame[["Open", "Close"]].max(axis=1)).all()
        assert (frame["Low"] <= frame[["Open", "Close"]].min(axis=1)).all()
        assert (frame[["Low", "Volume"]] > 0).all().all()
        assert frame.index.is_monotonic_increasing
        assert frame.notna().all().all()


def test_a_morning_after_results_is_expected_to_be_wild(stocks) -> None:
    apart = []
    for stock in stocks:
        width = np.log(stock.quantiles[:, 0, -1] - stock.quantiles[:, 0, 0])
        apart.append(np.diff(np.flatnonzero(width[1:-1] > (width[:-2] + width[2:]) / 2 + 0.6)))
    found = np.concatenate(apart)
    assert len(found) > len(stocks)
    assert np.mean(np.abs(found - QUARTER_DAYS) <= 4) > 0.8


def test_calm_and_wild_times_follow_each_other(stocks) -> None:
    memory = [np.abs(np.diff(np.log(stock.prices["Close"]))) for stock in stocks]
    near = np.mean([np.corrcoef(moves[:-1], moves[1:])[0, 1] for moves in memory])
    assert near > 0.05


def test_a_series_is_its_seeds_and_its_number(stocks) -> None:
    again, other, of_another_seed = simulated_stock(1, 3, days=250), stocks[4], simulated_stock(2, 3, days=250)
    assert again.prices.equals(stocks[3].prices)
    assert (again.quantiles == stocks[3].quantiles).all()
    assert not again.prices.equals(other.prices)
    assert not again.prices.equals(of_another_seed.prices)


def test_as_many_days_ahead_as_asked_for() -> None:
    assert simulated_stock(0, 0, days=5, horizon=20).quantiles.shape == (5, 20, len(QUANTILE_LEVELS))
