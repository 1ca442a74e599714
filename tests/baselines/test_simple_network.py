"""train.py and framework.py: run as a user runs them, and held to what they claim."""

from __future__ import annotations

import csv
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from source_tree import RunScript

from stocklora.baselines.settings import TrainSettings
from stocklora.baselines.simple_fit import fit_simple, forecast_simple
from stocklora.baselines.simple_network import (
    CLOSE,
    VOLUME,
    Scaling,
    SimpleForecaster,
    SimpleStockPredictor,
    load_simple,
    relative,
    residual_quantiles,
    roll_forward,
    save_simple,
    train_network,
    windows_at,
)
from stocklora.cli.console import UserError
from stocklora.prices.calendar import next_sessions
from stocklora.prices.csv_columns import PRICE_COLUMNS
from stocklora.prices.tables import read_prices

CPU = torch.device("cpu")
COLUMNS = ["Ticker", "Origin", "Date", "Day", "Last_Close", "Predicted_Close"]
COLUMNS += ["P05", "P10", "P25", "P50", "P75", "P90", "P95"]


def history(close: np.ndarray, first: str = "2020-01-02", volume: float = 1e6) -> pd.DataFrame:
    index = pd.bdate_range(first, periods=len(close), name="Date")
    opened = np.concatenate([close[:1], close[:-1]])
    columns = [opened, np.maximum(opened, close) * 1.01, np.minimum(opened, close) * 0.99, close]
    return pd.DataFrame(dict(zip(PRICE_COLUMNS, [*columns, np.full(len(close), volume)], strict=True)), index=index)


def random_walk(days: int, seed: int = 0) -> pd.DataFrame:
    moves = np.random.default_rng(seed).normal(0, 0.015, days)
    return history(100.0 * np.exp(np.cumsum(moves)))


def quick(**changes: Any) -> TrainSettings:
    return dataclasses.replace(TrainSettings(window_size=10, epochs=3, device="cpu"), **changes)


@pytest.fixture(scope="module")
def trained(sample_csv: Path, run_script: RunScript, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the documented training command was run, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(sample_csv, folder / "sample_test.csv")
    result = run_script("train.py", "--data", "sample_test.csv", "--epochs", 100, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return folder, result.stdout


def test_training_says_what_it_did_and_compares_with_the_random_walk(trained: tuple[Path, str]) -> None:
    folder, out = trained
    assert "trainable parameters: 9,729" in out  # 150 * 64 + 64 + 64 + 1
    assert "peak memory" in out
    for text in ("to train on", "to validate from", "to test from", "none seen in training"):
        assert text in out
    for text in ("last close (random walk)", "this model", "MAE", "RMSE", "MAPE", "direction", "80% covers"):
        assert text in out
    content = torch.load(folder / "model.pth", weights_only=True)
    assert content["window_size"] == 30
    assert len(content["scaling"]["mean"]) == 5
    assert content["training"]["test_scores"]["naive"]["mae"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["model.pth", "sample_test.csv"]


def test_the_documented_forecast_command(trained: tuple[Path, str], call_script: RunScript) -> None:
    folder, _ = trained
    result = call_script("framework.py", "--model_path", "model.pth", "--test_csv", "sample_test.csv", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "trainable parameters: 9,729" in result.stdout
    assert "peak memory:" in result.stdout
    with (folder / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == COLUMNS
    (ticker, frame), *_ = read_prices(folder / "sample_test.csv").items()
    last = frame.index[-1]
    assert [row["Date"] for row in rows] == [f"{day:%Y-%m-%d}" for day in next_sessions(ticker, last, 3)]
    assert [row["Day"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert row["Ticker"] == ticker
        assert row["Origin"] == f"{last:%Y-%m-%d}"
        assert float(row["Last_Close"]) == pytest.approx(frame["Close"].iloc[-1], rel=1e-6)
        levels = [float(row[name]) for name in COLUMNS[6:]]
        assert levels == sorted(set(levels))
        assert row["P50"] == row["Predicted_Close"]
        assert abs(float(row["Predicted_Close"]) / float(row["Last_Close"]) - 1) < 0.05
        assert row["Date"] in result.stdout
    widths = [float(row["P90"]) - float(row["P10"]) for row in rows]
    assert widths[0] < widths[2]


def test_a_missing_model_is_said_and_nothing_is_written(
    sample_csv: Path, call_script: RunScript, tmp_path: Path
) -> None:
    shutil.copy(sample_csv, tmp_path / "sample_test.csv")
    result = call_script("framework.py", "--test_csv", "sample_test.csv", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == ("error: no model file model.pth; train one with: python train.py --data sample_test.csv\n")
    assert not (tmp_path / "predictions.csv").exists()


def test_another_window_is_refused(trained: tuple[Path, str], call_script: RunScript, tmp_path: Path) -> None:
    folder, _ = trained
    result = call_script("framework.py", "--window_size", 20, "--output", tmp_path / "p.csv", cwd=folder)
    assert result.returncode == 2
    assert "trained with a window of 30 days" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "-1"], "--epochs must be 0 or more, got -1"),
        (["--window_size", "1"], "--window_size must be at least 2"),
        (["--batch_size", "0"], "--batch_size must be above 0"),
        (["--seed", "-1"], "--seed must be between"),
        (["--test_fraction", "0.7"], "--test_fraction must be between 0 and 0.5"),
        (["--tickers", "NONE"], "no prices of NONE in the files"),
        (["--window_size", "240"], "too few days"),
    ],
)
def test_wrong_settings_are_one_line_and_keep_the_old_model(
    sample_csv: Path, call_script: RunScript, tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "model.pth").write_bytes(b"the old model")
    result = call_script("train.py", "--data", sample_csv, *flags, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "model.pth").read_bytes() == b"the old model"


def test_same_seed_same_model_other_seed_another() -> None:
    prices = {"A": random_walk(150), "B": random_walk(150, seed=1)}
    first, again = fit_simple(prices, quick(seed=7)), fit_simple(prices, quick(seed=7))
    other = fit_simple(prices, quick(seed=8))
    assert forecast_simple(first.forecaster, prices) == forecast_simple(again.forecaster, prices)
    for name, tensor in first.forecaster.network.state_dict().items():
        assert torch.equal(tensor, again.forecaster.network.state_dict()[name])
    assert first.history == again.history
    assert first.history[1:] != other.history[1:]


def test_it_learns_what_can_be_learned() -> None:
    """Returns that turn their sign every day: nothing to a random walk, everything to this network."""
    noise = np.random.default_rng(0).normal(0, 0.002, 400)
    prices = {"ZIGZAG": history(100 * np.exp(np.cumsum(0.01 * (-1.0) ** np.arange(400) + noise)))}
    run = fit_simple(prices, quick(epochs=40))
    assert run.best.number > 0
    assert run.test_scores["model"].mae < 0.6 * run.test_scores["naive"].mae
    assert run.test_scores["model"].direction > 75  # two days ahead there is nothing to know


def test_the_untrained_model_is_the_last_close() -> None:
    prices = {"A": random_walk(150)}
    run = fit_simple(prices, quick(epochs=0))
    assert run.best.number == 0
    for row in forecast_simple(run.forecaster, prices):
        assert row["Predicted_Close"] == pytest.approx(row["Last_Close"], rel=1e-9)
    assert run.test_scores["model"].mae == pytest.approx(run.test_scores["naive"].mae, rel=1e-6)


def test_nothing_is_fitted_on_later_days() -> None:
    frame = random_walk(200)
    before = fit_simple({"A": frame}, quick())
    changed = frame.copy()
    in_test = changed.index >= before.data.dates.test
    changed.loc[in_test, PRICE_COLUMNS[:4]] *= 1.5
    after = fit_simple({"A": changed}, quick())
    assert np.array_equal(before.forecaster.scaling.mean, after.forecaster.scaling.mean)
    assert np.array_equal(before.forecaster.scaling.std, after.forecaster.scaling.std)
    assert np.array_equal(before.forecaster.residuals, after.forecaster.residuals)
    changed = frame.copy()
    changed.loc[changed.index >= before.data.dates.validation, PRICE_COLUMNS[:4]] *= 1.5
    after = fit_simple({"A": changed}, quick())
    assert np.array_equal(before.forecaster.scaling.mean, after.forecaster.scaling.mean)
    assert before.forecaster.scaling.return_std == after.forecaster.scaling.return_std


def test_forecasts_do_not_see_the_future() -> None:
    frame = random_walk(150)
    forecaster = fit_simple({"A": frame}, quick()).forecaster
    changed = frame.copy()
    changed.iloc[101:] *= 3.0
    origins = range(50, 101)
    assert np.array_equal(forecaster.quantiles(frame, origins), forecaster.quantiles(changed, origins))
    assert np.array_equal(forecaster.quantiles(frame, [100])[0], forecaster.quantiles(frame.iloc[:101], [100])[0])


def test_splits_are_by_date_across_tickers_and_purged() -> None:
    prices = {"A": random_walk(200), "LATE": history(random_walk(120, 1)["Close"].to_numpy(), first="2020-05-01")}
    run = fit_simple(prices, quick(epochs=1))
    for name, frame in prices.items():
        parts = run.data.origins[name]
        last_target = frame.index[parts["train"].stop - 1 + 3]
        assert last_target < run.data.dates.validation
        assert frame.index[parts["test"].start] >= run.data.dates.test


def test_windows_hold_the_right_days() -> None:
    frame = random_walk(40)
    windows = windows_at(frame, [9, 39], 10)
    assert windows.shape == (2, 10, 5)
    assert np.array_equal(windows[0], frame.to_numpy()[:10])
    assert np.array_equal(windows[1], frame.to_numpy()[30:])
    assert windows_at(frame, [], 10).shape == (0, 10, 5)


def test_features_do_not_depend_on_the_price_level_or_the_share_count() -> None:
    windows = windows_at(random_walk(40), [20, 39], 10)
    scaled = windows.copy()
    scaled[:, :, : CLOSE + 1] *= 1000.0
    assert np.allclose(relative(scaled), relative(windows), atol=1e-12)
    assert np.all(relative(windows)[:, -1, CLOSE] == 0.0)
    scaled[:, :, VOLUME] = 0.0
    assert np.isfinite(relative(scaled)).all()


class ConstantMove(SimpleStockPredictor):
    """Forecasts +1 scaled return whatever it sees, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__(window_size=4)
        self.seen: list[torch.Tensor] = []

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        self.seen.append(windows)
        return torch.ones(len(windows))


def test_rolling_forward_feeds_each_forecast_back() -> None:
    network, scaling = ConstantMove(), Scaling(np.zeros(5), np.ones(5), 0.02)
    windows = windows_at(random_walk(20), [10, 19], 4)
    ahead = roll_forward(network, scaling, windows, 3)
    assert ahead == pytest.approx(np.tile([0.02, 0.04, 0.06], (2, 1)))
    assert len(network.seen) == 3
    third = network.seen[2].numpy()
    # the last two days are forecasts: the day before closed one move lower, and the last opened there
    assert third[:, -1, CLOSE] == pytest.approx(0.0, abs=1e-6)
    assert third[:, -2, CLOSE] == pytest.approx(-0.02, abs=1e-6)
    assert third[:, -1, 0] == pytest.approx(-0.02, abs=1e-6)
    known = np.log(windows[:, -1, CLOSE] / (windows[:, -1, CLOSE] * math.exp(0.04)))
    assert third[:, 1, CLOSE] == pytest.approx(known, abs=1e-6)


def test_residual_quantiles_are_symmetric_and_calibrated() -> None:
    levels = np.array([0.05, 0.10, 0.25, 0.5, 0.75, 0.90, 0.95])
    errors = np.random.default_rng(0).normal(0.3, 1.0, (5000, 3)) * [1.0, 2.0, 3.0]
    table = residual_quantiles(errors - errors.mean(axis=0), np.array([[1.0, 2.0, 3.0]]), levels)
    assert table.shape == (3, 7)
    assert np.all(table[:, 3] == 0)
    assert table[:, ::-1] == pytest.approx(-table, abs=2e-2)
    assert table[:, 5] == pytest.approx(1.2816, abs=0.05)


def test_early_stopping_keeps_the_best_epoch_and_stops() -> None:
    torch.manual_seed(0)
    network = SimpleStockPredictor(5)
    inputs, validation = torch.randn(200, 5, 5), torch.randn(100, 5, 5)
    train, held_out = (inputs, torch.randn(200)), (validation, torch.randn(100))  # nothing to learn
    epochs = list(train_network(network, train, held_out, 200, 16, 0.01, patience=4, seed=0))
    best = min(epochs, key=lambda epoch: epoch.validation_loss)
    assert epochs[-1].number == best.number + 4
    with torch.no_grad():
        assert float(torch.nn.HuberLoss()(network(validation), held_out[1])) == pytest.approx(best.validation_loss)


def test_a_loss_that_explodes_ends_the_training_with_the_last_good_weights() -> None:
    network = SimpleStockPredictor(5)
    train = (torch.randn(64, 5, 5), torch.randn(64))
    epochs = list(train_network(network, train, train, 10, 16, 1e38, patience=10, seed=0))
    assert len(epochs) < 11
    assert all(math.isfinite(epoch.validation_loss) for epoch in epochs)
    assert all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())


@pytest.mark.parametrize("volume", [0.0, 1e6])
def test_a_stock_that_never_moves(volume: float) -> None:
    frame = history(np.full(120, 5.0), volume=volume)
    frame[["High", "Low"]] = 5.0
    run = fit_simple({"FLAT": frame}, quick())
    for row in forecast_simple(run.forecaster, {"FLAT": frame}):
        assert row["Predicted_Close"] == pytest.approx(5.0, rel=1e-3)


def test_too_few_rows_to_forecast_names_the_ticker() -> None:
    forecaster = fit_simple({"A": random_walk(120)}, quick(epochs=1)).forecaster
    with pytest.raises(UserError, match="NEW has 9 rows; a forecast needs the 10 days of the window"):
        forecast_simple(forecaster, {"NEW": random_walk(9)})
    assert len(forecast_simple(forecaster, {"NEW": random_walk(10)})) == 3


@pytest.fixture(scope="module")
def forecaster() -> SimpleForecaster:
    return fit_simple({"A": random_walk(120)}, quick(epochs=1)).forecaster


def test_a_saved_model_forecasts_the_same(forecaster: SimpleForecaster, tmp_path: Path) -> None:
    save_simple(tmp_path / "m.pth", forecaster)
    again = load_simple(tmp_path / "m.pth", CPU)
    prices = {"B": random_walk(50, seed=3)}
    assert forecast_simple(again, prices) == forecast_simple(forecaster, prices)
    assert again.training["data"]["tickers"] == ["A"]


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read|damaged"),
        (b"not a model at all", "damaged"),
        ({"format": "stocklora-forecaster"}, "was not written by train.py"),
        ({"hidden.weight": torch.zeros(3)}, "was not written by train.py"),
        ([1, 2], "was not written by train.py"),
        (Malicious(), "damaged or holds code"),
        ("format_version=99", "written by a newer version"),
        ("window_size=20", "is incomplete"),
        ("-scaling", "is incomplete .*scaling"),
        ("-network", "is incomplete"),
        ("truncated", "cannot be read|damaged"),
    ],
)
def test_damaged_and_foreign_model_files(
    forecaster: SimpleForecaster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: Any,
    message: str,
) -> None:
    path = tmp_path / "m.pth"
    save_simple(path, forecaster)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif isinstance(content, str):
        good = torch.load(path, weights_only=True)
        name, _, value = content.partition("=")
        if value:
            good[name] = int(value)
        else:
            del good[name[1:]]
        torch.save(good, path)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_simple(path, CPU)
    assert "code was run" not in capsys.readouterr().out


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_simple(tmp_path, CPU)


def test_several_files_are_pooled(call_script: RunScript, tmp_path: Path) -> None:
    for number, name in enumerate(("AAA", "BBB")):
        random_walk(160, seed=number).to_csv(tmp_path / f"{name}.csv", date_format="%Y-%m-%d")
    options = ["--window_size", 12, "--epochs", 2, "--save_path", "out/m.pth"]
    result = call_script("train.py", "--data", "AAA.csv", "BBB.csv", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "tickers: 2 (AAA, BBB)" in result.stdout
    result = call_script("framework.py", "--model_path", "out/m.pth", "--test_csv", ".", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["AAA"] * 3 + ["BBB"] * 3
