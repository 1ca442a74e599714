"""Several weights files, one forecast: how quantiles are combined, and what members may differ in."""

from __future__ import annotations

import gc
import statistics
import weakref
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from price_tables import random_prices
from scipy.optimize import brentq
from scipy.stats import gmean, norm
from tuned_models import make_weights

import framework_llm as script
import stocklora.forecaster.ensemble
import stocklora.forecaster.forecaster
from stocklora.cli.console import UserError
from stocklora.dataset.prepare import prepare
from stocklora.forecaster.ensemble import Ensemble, combine, trainable_parameters
from stocklora.forecaster.forecaster import load_forecaster
from stocklora.forecaster.predictions import PREDICTION_COLUMNS, write_predictions
from stocklora.forecaster.settings import ForecastSettings
from stocklora.metrics.scores import INTERVAL_COLUMNS, QUANTILE_LEVELS
from stocklora.prices.calendar import sessions_between
from stocklora.prices.tables import read_prices, write_prices

CPU = torch.device("cpu")
META = {"source": "test", "adjust": "all", "interval": "1d"}


def fresh_rows(weights: Path, model: Path, prices: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The forecast of one weights file by itself, loaded anew."""
    return pd.DataFrame(load_forecaster(weights, model, CPU, torch.float32)[0].forecast(prices))


@pytest.fixture(scope="module")
def prices() -> dict[str, pd.DataFrame]:
    days = sessions_between("AAPL", "2024-01-01", "2024-12-31")
    return {f"T{seed}": random_prices(len(days), seed).set_index(days) for seed in range(3)}


@pytest.fixture(scope="module")
def members(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], prices
) -> dict[str, tuple[Path, Path]]:
    """Weights files that differ in everything they may differ in, each with its base model."""
    folder = tmp_path_factory.mktemp("members")
    qwen3, gpt2 = tiny_models["qwen3"], tiny_models["gpt2"]
    har = prepare(prices, window_size=20, horizon=3).baselines["har"].scale.to_dict()
    rank4 = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    kinds: dict[str, tuple[Path, dict[str, Any]]] = {
        "plain": (qwen3, {}),
        "seed": (qwen3, {}),
        "prompt": (qwen3, {"prompt": "ohlcv", "window_size": 8, "targets_per_sequence": 1}),
        "scale": (qwen3, {"scale": har, "window_size": 40, "calibration": {"shrinkage": 0.3, "interval_scale": 1.4}}),
        "layers": (qwen3, {"backbone_layers": 1}),
        "lora": (qwen3, {"lora": rank4}),
        "base": (gpt2, {"window_size": 25}),
    }
    return {
        name: (make_weights(folder / f"{name}.pth", model, seed, **changes), model)
        for seed, (name, (model, changes)) in enumerate(kinds.items())
    }


def ensemble_of(members: dict[str, tuple[Path, Path]], *names: str, how: str = "mean") -> Ensemble:
    return Ensemble([members[name] for name in names], how, CPU, torch.float32)


# ------------------------------------------------------------------------------------------------- combine

FORECASTS = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-1e6, 1e6, allow_subnormal=False))
)


@given(FORECASTS.map(lambda raw: np.sort(raw, axis=-1)), st.sampled_from(["mean", "median"]))
def test_combining_goes_cell_by_cell_and_levels_stay_sorted(quantiles: np.ndarray, how: str) -> None:
    combined = combine(list(quantiles), how)
    assert combined.shape == quantiles.shape[1:]
    assert (np.diff(combined, axis=-1) >= 0).all()  # exactly: rounding must not cross two levels either
    reference = statistics.fmean if how == "mean" else statistics.median
    by_hand = [reference(quantiles[(slice(None), *cell)].tolist()) for cell in np.ndindex(combined.shape)]
    np.testing.assert_allclose(combined.ravel(), by_hand, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(combine(list(quantiles[::-1]), how), combined, rtol=1e-12, atol=1e-9)


@given(arrays(np.float64, (3, 9), elements=st.floats(allow_nan=False)), st.sampled_from(["mean", "median"]))
def test_one_member_is_unchanged_bit_for_bit(quantiles: np.ndarray, how: str) -> None:
    assert combine([quantiles], how).tobytes() == quantiles.tobytes()


def test_the_mean_of_normal_forecasts_is_normal_and_no_wider_than_they_are() -> None:
    """A location-scale family stays one (Lichtendahl et al., 2013); averaged probabilities would be wider."""
    centres, spreads = np.array([-3.0, 0.5, 2.0]), np.array([0.5, 1.0, 1.5])
    levels = np.array(QUANTILE_LEVELS)
    combined = combine([norm.ppf(levels, m, s) for m, s in zip(centres, spreads, strict=True)], "mean")
    np.testing.assert_allclose(combined, norm.ppf(levels, centres.mean(), spreads.mean()), atol=1e-12)
    pooled = [brentq(lambda x, p=level: norm.cdf(x, centres, spreads).mean() - p, -20, 20) for level in levels]
    assert np.ptp(combined) < 0.7 * np.ptp(pooled)


def test_a_member_that_strays_pulls_the_mean_but_not_the_median() -> None:
    level = np.array(QUANTILE_LEVELS)
    good = [norm.ppf(level), norm.ppf(level, 0.1), norm.ppf(level, 0.2)]
    assert combine([*good, norm.ppf(level, 50.0)], "mean")[4] > 10.0
    assert combine([*good, norm.ppf(level, 50.0)], "median")[4] == pytest.approx(0.15)


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="no member"):
        combine([], "mean")
    with pytest.raises(ValueError, match="differ in shape"):
        combine([np.zeros((2, 9)), np.zeros((3, 9))], "mean")
    with pytest.raises(ValueError, match="'mode'"):
        combine([np.zeros(9)], "mode")
    assert np.isnan(combine([np.array([0.0, np.nan]), np.zeros(2)], "median")).tolist() == [False, True]


# ------------------------------------------------------------------------------------------------ ensembles


@pytest.mark.parametrize("how", ["mean", "median"])
def test_an_ensemble_is_its_members_combined(members, prices, how) -> None:
    """The reference: each file loaded by itself; a mean of log returns is a geometric mean of closes, and the
    median of an odd number does not care in which of the two it is taken."""
    names = list(members)
    assert len(names) % 2
    rows = pd.DataFrame(ensemble_of(members, *names, how=how).forecast(prices))
    alone = [fresh_rows(*members[name], prices) for name in names]
    columns = [*INTERVAL_COLUMNS.values(), "Predicted_Close"]
    closes = np.stack([each[columns].to_numpy() for each in alone])
    expected = gmean(closes, axis=0) if how == "mean" else np.median(closes, axis=0)
    np.testing.assert_allclose(rows[columns].to_numpy(), expected, rtol=1e-12)
    shared = ["Ticker", "Origin", "Date", "Day", "Last_Close"]
    pd.testing.assert_frame_equal(rows[shared], alone[0][shared])
    assert tuple(rows.columns) == PREDICTION_COLUMNS
    # no two members alike, or the test would prove little
    assert all(np.abs(closes[i] / closes[j] - 1).max() > 1e-4 for i in range(len(names)) for j in range(i))


def test_only_one_model_is_in_memory_and_a_single_one_stays(members, prices, monkeypatch) -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load = stocklora.forecaster.forecaster.load_backbone

    def counted(*options: Any) -> torch.nn.Module:
        assert not [one for one in loaded if one() is not None], "two base models in memory at once"
        backbone = load(*options)
        loaded.append(weakref.ref(backbone))
        return backbone

    monkeypatch.setattr(stocklora.forecaster.forecaster, "load_backbone", counted)
    single = ensemble_of(members, "plain")
    assert single.forecast(prices) == single.forecast(prices)
    assert len(loaded) == 1
    del single
    gc.collect()
    several = ensemble_of(members, "plain", "seed", "layers", "base")
    assert several.forecast(prices) == several.forecast(prices)
    assert len(loaded) == 1 + 2 * 4
    # what a backtest needs: any work, member by member
    assert several.each(lambda forecaster: forecaster.spec.window_size) == [20, 20, 20, 25]


@pytest.mark.parametrize("names", [("plain",), ("plain", "seed", "layers")])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_weights_file_is_read_once_for_one_forecast(members, prices, monkeypatch, names, averaged) -> None:
    if averaged and len(names) > 1:
        names = ("plain", "seed")  # of one base model, and from one start
    read: list[Path] = []
    load = stocklora.forecaster.ensemble.load_weights
    monkeypatch.setattr(stocklora.forecaster.ensemble, "load_weights", lambda path: read.append(path) or load(path))
    paths = [members[name][0] for name in names]
    shares = [1.0] * len(names) if averaged else None
    ensemble = Ensemble([members[name] for name in names], "mean", CPU, torch.float32, shares=shares)
    ensemble.forecast(prices)
    assert read == paths
    read.clear()
    ensemble.forecast(prices)
    # One model stays in memory; several are loaded again, and may have been trained again since.
    assert read == ([] if averaged or len(names) == 1 else paths)


def test_a_member_trained_again_in_between_is_read_again(members, prices, tmp_path) -> None:
    plain, model = members["plain"]
    other = make_weights(tmp_path / "other.pth", model, 1)
    ensemble = Ensemble([(plain, model), (other, model)], "mean", CPU, torch.float32)
    before = ensemble.forecast(prices)
    make_weights(other, model, 2)
    assert ensemble.forecast(prices) != before
    make_weights(other, model, 2, horizon=5)
    with pytest.raises(UserError, match=r"plain\.pth forecasts 3 days ahead and .*other\.pth 5;"):
        ensemble.forecast(prices)


def test_adapters_that_do_not_fit_are_named(members, prices, tmp_path) -> None:
    content = torch.load(members["seed"][0], weights_only=True)
    content["adapters"].popitem()
    torch.save(content, tmp_path / "cut.pth")
    ensemble = Ensemble([members["plain"], (tmp_path / "cut.pth", members["plain"][1])], "mean", CPU, torch.float32)
    with pytest.raises(UserError, match=r"cut\.pth does not fit"):
        ensemble.forecast(prices)


def test_the_base_model_of_each_member_is_checked(members, prices) -> None:
    ensemble = Ensemble([members["plain"], (members["seed"][0], members["base"][1])], "mean", CPU, torch.float32)
    with pytest.raises(UserError, match=r"seed\.pth was trained on qwen3, but .*gpt2 is another model"):
        ensemble.forecast(prices)


def test_members_must_forecast_the_same(members, tmp_path) -> None:
    plain, model = members["plain"]
    five = make_weights(tmp_path / "five.pth", model, 1, horizon=5)
    with pytest.raises(UserError, match=r"plain\.pth forecasts 3 days ahead and .*five\.pth 5;"):
        Ensemble([(plain, model), members["seed"], (five, model)], "mean", CPU, torch.float32)
    other = make_weights(tmp_path / "other.pth", model, 1, levels=(0.1, 0.5, 0.9))
    with pytest.raises(UserError, match=r"plain\.pth forecasts the quantile levels 0\.05 .*other\.pth 0\.1 0\.5 0\.9;"):
        Ensemble([(plain, model), (other, model)], "mean", CPU, torch.float32)


def test_the_longest_window_decides_who_is_forecast(members, prices, capsys) -> None:
    tables = {**prices, "NEW": prices["T0"].iloc[-30:], "EDGE": prices["T0"].iloc[-41:]}
    rows = ensemble_of(members, "plain", "scale").forecast(tables)  # windows of 20 and 40 days
    assert {row["Ticker"] for row in rows} == {"T0", "T1", "T2", "EDGE"}
    assert "a forecast needs 41 rows" in (warning := capsys.readouterr().err)
    assert "NEW (30); left out" in warning
    with pytest.raises(UserError, match=r"NEW \(30\); download more days"):
        ensemble_of(members, "plain", "scale").forecast({"NEW": tables["NEW"]})


def test_parameters_are_counted_as_the_optimizer_does(members) -> None:
    for name in ("plain", "lora", "base"):
        forecaster, content = load_forecaster(*members[name], CPU, torch.float32)
        trained = sum(p.numel() for p in forecaster.model.parameters() if p.requires_grad)
        assert trainable_parameters(content) == trained


# --------------------------------------------------------------------------------------------------- script


@pytest.fixture
def table(in_folder: Path, prices) -> Path:
    write_prices(prices, in_folder / "prices.csv", META)
    return in_folder / "prices.csv"


def test_one_weights_file_gives_the_bytes_it_always_gave(members, table, capsys) -> None:
    weights, model = members["plain"]
    options = ["--test_csv", str(table), "--model_path", str(model), "--dtype", "float32", "--device", "cpu"]
    assert script.main([*options, "--lora_weights", str(weights)]) == 0
    assert "test pinball loss of this model: 60.00 bp (in training's 30 test days)" in capsys.readouterr().out
    write_predictions(Path("reference.csv"), fresh_rows(weights, model, read_prices(table)).to_dict("records"))
    assert Path("predictions.csv").read_bytes() == Path("reference.csv").read_bytes()


def test_the_script_forecasts_with_several(members, table, call_script) -> None:
    names = ("plain", "scale", "base")
    weights, models = zip(*[members[name] for name in names], strict=True)
    result = call_script("framework_llm.py", "--test_csv", table, "--lora_weights", *weights, "--model_path", *models,
                        "--ensemble", "median", "--dtype", "float32", "--device", "cpu", cwd=table.parent)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "median of the quantiles of 3 models:" in result.stdout
    assert f"{weights[2]}: gpt2, window 25, prompt returns, " in result.stdout
    assert "test pinball loss 63.00 bp, of the last close 62.50 bp (in training's 30 test days)" in result.stdout
    assert "80% from" in result.stdout
    rows = ensemble_of(members, *names, how="median").forecast(read_prices(table))
    write_predictions(Path("reference.csv"), rows)
    assert Path("predictions.csv").read_bytes() == Path("reference.csv").read_bytes()


def test_a_window_that_one_member_was_not_trained_with_names_it(members, table, capsys) -> None:
    weights = [str(members[name][0]) for name in ("plain", "scale")]
    options = ["--test_csv", str(table), "--model_path", str(members["plain"][1]), "--window_size", "20"]
    assert script.main([*options, "--lora_weights", *weights]) == 2
    assert "scale.pth was trained with a window of 40 days" in capsys.readouterr().err
    assert not Path("predictions.csv").exists()


def test_base_models_are_one_for_all_or_one_each() -> None:
    files, one, two = [Path("a"), Path("b")], [Path("m")], [Path("m"), Path("n")]
    assert ForecastSettings(lora_weights=files, model_path=one).members == [
        (Path("a"), Path("m")),
        (Path("b"), Path("m")),
    ]
    assert ForecastSettings(lora_weights=files, model_path=two).members == [
        (Path("a"), Path("m")),
        (Path("b"), Path("n")),
    ]
    with pytest.raises(UserError, match="names 2 base models and --lora_weights 1 file; give one"):
        ForecastSettings(lora_weights=files[:1], model_path=two)
    with pytest.raises(UserError, match="names 2 base models and --lora_weights 3 files; give one"):
        ForecastSettings(lora_weights=[*files, Path("c")], model_path=two)
