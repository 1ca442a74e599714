"""The leakage guard finds leaks that are planted, and none where there are none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from price_tables import random_prices

from stocklora.backtest import walk_forward
from stocklora.backtest.leakage import MUTATIONS, check_backtest, find_leaks, mutated
from stocklora.backtest.settings import BacktestSettings
from stocklora.dataset import indicators
from stocklora.prices.tables import write_prices
from stocklora.volatility import harx
from stocklora.volatility import random_walk as baselines
from stocklora.volatility import scales as volatility

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> BacktestSettings:
    home = tmp_path_factory.mktemp("prices")
    prices = {name: random_prices(420, seed) for seed, name in enumerate(["A", "B"])}
    write_prices(prices, home / "prices.csv", {"source": "test", "adjust": "all", "interval": "1d"})
    return BacktestSettings(
        data=[home / "prices.csv"],
        models=["naive", "drift", "ewma", "har", "harx", "prior"],
        leakage_cuts=1,
        start="2021-03-01",
    )


def test_no_forecast_scale_calibration_or_indicator_sees_the_future(settings, capsys):
    with_simple = dataclasses.replace(settings, models=[*settings.models, "simple"], leakage_cuts=2)
    assert check_backtest(with_simple) == 0
    assert "no leak" in capsys.readouterr().out


def test_nor_does_the_language_model(settings, tiny_model, tmp_path, capsys):
    from stocklora.finetune.fit import finetune
    from stocklora.finetune.settings import TrainLoraSettings
    from stocklora.prices.tables import read_prices

    finetune(
        read_prices(settings.data),
        TrainLoraSettings(
            model_path=tiny_model, save_dir=tmp_path, epochs=1, lora_rank=2, dtype="float32", device="cpu",
            indicators=["market", "rsi", "range"], validation_from="2020-12-01", test_from="2021-03-01",
        ),
    )  # fmt: skip
    weights = [tmp_path / "best_lora_weights.pth"]
    llm = dataclasses.replace(
        settings, models=["llm"], lora_weights=weights, model_path=[tiny_model], device="cpu", dtype="float32"
    )
    assert check_backtest(llm) == 0, capsys.readouterr().out


def centred_volatility(close: pd.Series) -> np.ndarray:
    """A window around the day: half of it has not been yet."""
    moves = np.log(close).diff()
    return moves.rolling(11, center=True, min_periods=1).std().fillna(0.01).clip(lower=1e-4).to_numpy()


def plant_centred_window(monkeypatch):
    monkeypatch.setattr(volatility, "ewma_volatility", centred_volatility)
    return "the forecast ewma"


def plant_scaler_fitted_on_everything(monkeypatch):
    """A drift that is the mean return of the whole file, later days included."""
    real, cut_off, whole = walk_forward.fit_baselines, walk_forward.known_before, {}

    def kept_whole(prices, names, cut):
        whole.clear()
        whole.update(prices)
        return cut_off(prices, names, cut)

    def fitted_on_all(before, known, returns, levels, kinds, prior):
        result = real(before, known, returns, levels, kinds, prior=prior)
        everything = np.concatenate([np.diff(np.log(frame["Close"])) for frame in whole.values()])
        drift = np.full(3, float(np.nanmean(everything)))
        return {**result, "drift": baselines.QuantileBaseline("drift", None, drift, result["drift"].table)}

    monkeypatch.setattr(walk_forward, "known_before", kept_whole)
    monkeypatch.setattr(walk_forward, "fit_baselines", fitted_on_all)
    return "the forecast drift"


def plant_indicator_of_tomorrow(monkeypatch):
    monkeypatch.setitem(indicators.COMPUTED, "returns", lambda frame: [frame["Close"].shift(-1), frame["Close"]])
    return "the indicator returns"


def plant_filled_from_later(monkeypatch):
    """What is not known yet is filled with the mean of what will be."""
    real = harx.harx_features

    def filled(frame, market, horizon):
        alike, ahead = real(frame, market, horizon)
        return np.where(np.isfinite(alike), alike, np.nanmean(alike, axis=0)) + 1e-9 * np.nanmean(alike), ahead

    monkeypatch.setattr(volatility, "harx_features", filled)
    return "the forecast harx"


def plant_split_that_overlaps(monkeypatch):
    """Training targets that reach past the first day to be forecast."""
    real = walk_forward.Plan.training

    def overlapping(self, index, cut):
        rows = real(self, index, cut)
        return range(rows.start, min(rows.stop + 60, len(index) - self.horizon))

    monkeypatch.setattr(walk_forward.Plan, "training", overlapping)
    monkeypatch.setattr(
        walk_forward, "known_before", lambda prices, names, before: {name: prices[name] for name in names}
    )
    return "the fitted quantiles of"


@pytest.mark.parametrize(
    "plant",
    [
        plant_centred_window,
        plant_scaler_fitted_on_everything,
        plant_indicator_of_tomorrow,
        plant_filled_from_later,
        plant_split_that_overlaps,
    ],
)
def test_it_catches_a_planted_leak(plant, settings, monkeypatch, capsys):
    expected = plant(monkeypatch)
    # Just behind the first fit, so that a fit which reaches past it reads changed days.
    near = dataclasses.replace(settings, end="2021-03-16")
    assert check_backtest(near) == 1
    assert f"leak: {expected}" in capsys.readouterr().out


def test_the_script_says_so_and_fails(settings, tmp_path, call_script):
    result = call_script(
        "backtest.py", "--data", settings.data[0], "--models", "ewma", "--check-leakage", "--leakage_cuts", 1,
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "no leak" in result.stdout
    assert not list(tmp_path.iterdir())


def test_mutations_change_every_later_row_and_no_other():
    frame = random_prices(100, 3)
    cut = frame.index[59]
    for mutation in MUTATIONS:
        changed = mutated(frame, cut, mutation, np.random.default_rng(0))
        pd.testing.assert_frame_equal(changed.iloc[:60], frame.iloc[:60])
        later = changed.iloc[60:]
        if mutation == "deleted":
            assert not len(later)
        elif mutation == "shuffled":  # a permutation may leave a row or two where they were
            assert (later.to_numpy() != frame.iloc[60:].to_numpy()).any(axis=1).mean() > 0.9
            assert sorted(later["Close"]) == sorted(frame["Close"].iloc[60:])
        else:
            assert (later.to_numpy() != frame.iloc[60:].to_numpy()).all()


def test_a_number_that_disappears_or_changes_its_last_bit_is_a_leak():
    prices = {"A": random_prices(50, 0)}
    cut = prices["A"].index[30]

    def last_bit(prices, cut):
        value = 1.0 if len(prices["A"]) == 50 else np.nextafter(1.0, 2.0)
        return {("one", "A"): np.array([value])}

    def disappears(prices, cut):
        return {("one", "A"): np.array([1.0])} if len(prices["A"]) == 50 else {}

    for observe in (last_bit, disappears):
        leaks, compared = find_leaks(observe, prices, [cut], seed=0)
        assert [leak.mutation for leak in leaks] == ["deleted"]
        assert compared == 4
