"""Where a run starts: from the market prior, unless its own days clearly say better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from price_tables import random_prices

from stocklora.dataset.prepare import ForecastData, prepare
from stocklora.volatility.prior import DRIFT_ORIGINS, MarketPrior, load_prior


def prepared(prices: dict[str, pd.DataFrame], prior: MarketPrior | None) -> ForecastData:
    return prepare(prices, 30, 3, prior=prior)


def hopeless() -> MarketPrior:
    """A prior that expects five times the moves there are."""
    return replace(load_prior(), table=5.0 * load_prior().table)


@pytest.mark.parametrize("seed", [1, 2])
def test_where_nothing_is_clearly_better_a_run_starts_from_the_prior(seed: int) -> None:
    data = prepared({"X": random_prices(250, seed)}, load_prior())
    assert set(data.scales) == {"ewma", "har", "harx", "prior"}
    assert data.better_scale() == "prior"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_prior_that_is_clearly_wrong_is_left(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few = prepared({"X": random_prices(250, seed)}, hopeless())
    assert few.better_scale() == "prior"  # so few validation days choose by luck
    monkeypatch.setattr("stocklora.dataset.prepare.LEAST_DAYS_TO_LEAVE", 20)
    data = prepared({"X": random_prices(250, seed)}, hopeless())
    losses = {kind: data.validation_loss(kind) for kind in data.scales}
    assert data.better_scale() == min(losses, key=losses.__getitem__) != "prior"


def test_without_a_prior_the_lowest_loss_on_validation_decides() -> None:
    data = prepared({"X": random_prices(250, 2)}, None)
    assert set(data.scales) == {"ewma", "har", "harx"}
    losses = {kind: data.validation_loss(kind) for kind in data.scales}
    assert data.better_scale() == min(losses, key=losses.__getitem__)


def test_days_of_the_test_part_choose_nothing() -> None:
    prices = random_prices(250, 1)
    data = prepared({"X": prices}, hopeless())
    changed = prices.copy()
    after = changed.index >= data.dates.test
    changed.loc[after] *= np.exp(np.random.default_rng(0).uniform(-0.5, 0.5, (int(after.sum()), 1)))
    again = prepared({"X": changed}, hopeless())
    assert again.better_scale() == data.better_scale()
    np.testing.assert_array_equal(again.baselines["prior"].table, data.baselines["prior"].table)
    assert again.baselines["prior"].scale == data.baselines["prior"].scale


def test_of_a_short_tables_drift_little_is_believed() -> None:
    """Prices climb by 1% a day; the prior's start is around the median or around n / (n + 1400) of that."""
    climbing = random_prices(250, 4)
    factor = np.exp(0.01 * np.arange(len(climbing)))
    climbing[["Open", "High", "Low", "Close"]] = climbing[["Open", "High", "Low", "Close"]].mul(factor, axis=0)
    data = prepared({"X": climbing}, load_prior())
    drift = data.baselines["drift"].location
    origins = len(data.origins["X"]["train"])
    middle = data.baselines["prior"].table.shape[1] // 2
    for kind, share in (("harx", 1.0), ("prior", origins / (origins + DRIFT_ORIGINS))):
        around = data.baselines[kind].around_drift(share * drift, data.levels)
        start = data.start(kind)
        is_drifting = bool((start.location != 0.0).any())
        np.testing.assert_allclose(start.location, around.location if is_drifting else 0.0)
        found = [
            float(np.abs(data.forecasts_of(one, "validation")[..., middle] - data.returns_of("validation")).mean())
            for one in (data.baselines[kind], around)
        ]
        assert is_drifting == (found[1] < found[0])
