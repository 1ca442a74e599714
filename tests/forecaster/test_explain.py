"""--explain: factors whose product is the scale, and so the width, of every forecast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from price_tables import random_prices
from source_tree import RunScript

from stocklora.forecaster.explain import (
    FACTORS,
    LIMIT,
    MARKET,
    MODEL,
    SURPRISES,
    YEAR_DAYS,
    explain,
    inputs_of_factors,
    width_factors,
)
from stocklora.forecaster.predictions import prediction_rows
from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.prices.tables import log_returns_ahead, write_prices
from stocklora.volatility.harx import AHEAD_INPUTS
from stocklora.volatility.prior import load_prior
from stocklora.volatility.random_walk import QuantileBaseline, fit_baselines
from stocklora.volatility.scales import HARX_INPUTS, SCALES

HORIZON = 3
PRICES = {name: random_prices(420, seed) for seed, name in enumerate(("AAA", "BBB", "CCC"))}


@pytest.fixture(scope="module")
def fitted() -> dict[str, QuantileBaseline]:
    origins = {name: range(60, len(frame) - HORIZON) for name, frame in PRICES.items()}
    returns = {name: log_returns_ahead(frame["Close"].to_numpy(), HORIZON) for name, frame in PRICES.items()}
    return fit_baselines(PRICES, origins, returns, np.array(QUANTILE_LEVELS), SCALES, prior=load_prior())


def wilder(frame: pd.DataFrame, rows: int, times: float) -> pd.DataFrame:
    """The last rows with ranges and moves that many times as large."""
    logs = np.log(frame[["Open", "High", "Low", "Close"]])
    before = logs["Close"].shift().bfill()
    changes = logs.sub(before, axis=0)
    changes.iloc[-rows:] *= times
    closes = changes["Close"].cumsum() + logs["Close"].iloc[0]
    result = frame.copy()
    result[changes.columns] = np.exp(changes.add(closes.shift().bfill(), axis=0))
    return result


@pytest.mark.parametrize("one_ticker", [False, True])
def test_every_input_has_one_place(one_ticker: bool) -> None:
    placed = [name for names in inputs_of_factors(one_ticker).values() for name in names]
    assert len(placed) == len(set(placed))
    assert {*HARX_INPUTS, *AHEAD_INPUTS} - {"one"} == set(placed)


@pytest.mark.parametrize("kind", SCALES)
def test_level_times_factors_is_the_scale(kind: str, fitted: dict[str, QuantileBaseline]) -> None:
    scale = fitted[kind].scale
    assert scale is not None
    markets = scale.markets_of(PRICES)
    for name, frame in PRICES.items():
        at_origin = scale.at(frame, markets.of(name))[-1]
        for step, row in enumerate(width_factors(scale, frame, markets.of(name))):
            factors = [row[column] for column in (*FACTORS, SURPRISES, LIMIT)]
            assert row["Scale"] == pytest.approx(at_origin[step], rel=1e-12)
            assert row["Level"] * np.prod(factors) == pytest.approx(row["Scale"], rel=1e-12)
            assert all(0.2 < factor < 5.0 for factor in factors)


def test_the_level_is_the_years_own(fitted: dict[str, QuantileBaseline]) -> None:
    """Where no surprise and no limit is at work, it is the geometric mean of the scale over the last year."""
    scale = fitted["har"].scale
    assert scale is not None
    frame = PRICES["AAA"]
    market = scale.markets_of(PRICES).of("AAA")
    year = np.exp(np.log(scale.at(frame, market)[-YEAR_DAYS:]).mean(axis=0))
    levels = [row["Level"] for row in width_factors(scale, frame, market)]
    assert levels == pytest.approx(year.tolist(), rel=0.02)


@pytest.mark.parametrize("one_ticker", [False, True])
def test_a_wild_last_day_is_told_as_such(one_ticker: bool, fitted: dict[str, QuantileBaseline]) -> None:
    scale = fitted["prior"].scale
    assert scale is not None
    factors = []
    for own in (PRICES["AAA"], wilder(PRICES["AAA"], rows=1, times=6.0)):
        prices = {"AAA": own} if one_ticker else {**PRICES, "AAA": own}
        factors.append(width_factors(scale, own, scale.markets_of(prices).of("AAA"))[0])
    calm, wild = factors
    growth = {name: wild[name] / calm[name] for name in (*FACTORS, SURPRISES)}
    assert wild["Scale"] > 1.2 * calm["Scale"]
    assert max(growth, key=lambda name: growth[name]) == "Last_Days"
    assert np.log(growth["Last_Days"]) > 0.6 * np.log(wild["Scale"] / calm["Scale"])
    assert (growth[MARKET] == 1.0) == one_ticker  # of one ticker it would be its own days told again


def test_the_language_model_is_a_factor_of_its_own(fitted: dict[str, QuantileBaseline]) -> None:
    """Of a forecast 1.5 times as wide as its start, the model's share is 150%."""
    own = fitted["har"]
    assert own.scale is not None
    markets = own.scale.markets_of(PRICES)
    levels = np.array(QUANTILE_LEVELS)
    low, high = (int(np.argmin(np.abs(levels - level))) for level in (0.1, 0.9))
    rows = []
    for name, frame in PRICES.items():
        quantiles = own.quantiles(own.scale.at(frame, markets.of(name))[-1:])[0]
        rows += prediction_rows(name, frame, 1.5 * quantiles, levels)
    explained = explain(rows, PRICES, own.scale, markets, own.table[:, [low, high]])
    assert len(explained) == HORIZON * len(PRICES)
    for row in explained:
        assert row[f"{MODEL}_%"] == pytest.approx(150.0, rel=1e-6)
        factors = [row[f"{column}_%"] / 100.0 for column in (*FACTORS, SURPRISES, LIMIT, MODEL)]
        assert row["Level_%"] * np.prod(factors) == pytest.approx(row["Scale_%"], rel=1e-9)


def test_the_script_writes_what_it_says(call_script: RunScript, tmp_path: Path) -> None:
    write_prices(PRICES, tmp_path / "prices.csv", {"source": "test", "adjust": "all", "interval": "1d"})
    result = call_script("framework.py", "--model_path", "prior", "--test_csv", "prices.csv", "--explain", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    table = pd.read_csv(tmp_path / "explanation.csv")
    assert table["Ticker"].tolist() == [name for name in PRICES for _ in range(HORIZON)]
    shares = table[[f"{name}_%" for name in (*FACTORS, SURPRISES, LIMIT)]].to_numpy() / 100.0
    np.testing.assert_allclose(table["Level_%"] * shares.prod(axis=1), table["Scale_%"], rtol=1e-9)
    forecast = pd.read_csv(tmp_path / "predictions.csv")
    np.testing.assert_allclose(table["P90"], forecast["P90"], rtol=1e-6)
    for name in PRICES:
        assert f"why this wide: {name} by " in result.stdout
