"""framework.py --model_path prior: forecasts without any training, as a user asks for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from price_tables import random_prices
from source_tree import REPO_ROOT, RunScript

from stocklora.baselines.by_prior import forecast_by_prior, move_prior
from stocklora.forecaster.predictions import PREDICTION_COLUMNS
from stocklora.prices.calendar import next_sessions
from stocklora.prices.tables import read_prices, write_prices
from stocklora.volatility.prior import LEAST_ROWS, fit_prior, load_prior

META = {"source": "test", "adjust": "all", "interval": "1d"}
QUANTILES = ["P05", "P10", "P25", "P50", "P75", "P90", "P95"]
BY_PRIOR = ["--model_path", "prior", "--test_csv"]


@pytest.fixture(scope="module")
def own_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two made-up tickers, far calmer than stocks."""
    path = tmp_path_factory.mktemp("prior") / "mine.json"
    fit_prior({"one": {f"T{seed}": random_prices(300, seed, volatility=0.004) for seed in range(2)}}).save(path)
    return path


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


def predictions(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "predictions.csv", parse_dates=["Origin", "Date"])


def width_of(table: pd.DataFrame) -> pd.Series:
    return np.log(table["P90"] / table["P10"])


def test_the_documented_command(sample_csv: Path, call_script: RunScript, tmp_path: Path) -> None:
    result = call_script("framework.py", *BY_PRIOR, sample_csv, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"forecast by the market prior ({load_prior()}), moved by" in result.stdout
    assert "saved: predictions.csv" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.csv", "forecasts.db"}
    table = predictions(tmp_path)
    assert list(table) == list(PREDICTION_COLUMNS)
    ((ticker, frame),) = read_prices(sample_csv).items()
    assert (table["Ticker"] == ticker).all()
    assert (table["Origin"] == frame.index[-1]).all()
    assert table["Date"].tolist() == list(next_sessions(ticker, frame.index[-1], 3))
    assert table["Day"].tolist() == [1, 2, 3]
    assert table["Last_Close"].to_numpy() == pytest.approx(frame["Close"].iloc[-1], rel=1e-6)
    assert (np.diff(table[QUANTILES], axis=1) > 0).all()
    assert (table["Predicted_Close"] == table["P50"]).all()
    assert ((table["Predicted_Close"] / table["Last_Close"] - 1).abs() < 0.02).all()
    assert (np.diff(width_of(table)) > 0).all()  # days further ahead are less certain
    assert 0.02 < width_of(table)[0] < 0.08  # a large stock's usual day
    for date in table["Date"]:
        assert f"{date:%Y-%m-%d}" in result.stdout


def test_a_process_does_not_import_torch(sample_csv: Path, tmp_path: Path) -> None:
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = ['framework.py', *{[*BY_PRIOR, str(sample_csv)]!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(REPO_ROOT / 'framework.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "print(json.dumps([code, [name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules]]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert json.loads(result.stdout.splitlines()[-1]) == [0, []], result.stderr
    assert len(predictions(tmp_path)) == 3


def test_as_many_days_ahead_as_any_forecast(sample_csv: Path, call_script: RunScript, tmp_path: Path) -> None:
    result = call_script("framework.py", *BY_PRIOR, sample_csv, "--horizon", 20, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = predictions(tmp_path)
    ((ticker, frame),) = read_prices(sample_csv).items()
    assert table["Date"].tolist() == list(next_sessions(ticker, frame.index[-1], 20))
    assert (np.diff(table[QUANTILES], axis=1) > 0).all()
    assert width_of(table)[19] > 3 * width_of(table)[0]
    assert "--horizon" in error_line(call_script("framework.py", *BY_PRIOR, sample_csv, "--horizon", 21, cwd=tmp_path))


def test_the_fewest_days(call_script: RunScript, tmp_path: Path) -> None:
    write_prices({"LONG": random_prices(LEAST_ROWS, 1)}, tmp_path / "long.csv", META)
    write_prices({"SHORT": random_prices(LEAST_ROWS - 1, 2)}, tmp_path / "short.csv", META)
    for horizon in (3, 20):
        result = call_script("framework.py", *BY_PRIOR, "long.csv", "--horizon", horizon, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert len(predictions(tmp_path)) == horizon
    (tmp_path / "predictions.csv").unlink()
    says = error_line(call_script("framework.py", *BY_PRIOR, "short.csv", cwd=tmp_path))
    assert "needs 60 days of prices: SHORT (59) rows" in says
    assert not (tmp_path / "predictions.csv").exists()
    result = call_script("framework.py", *BY_PRIOR, "long.csv", "short.csv", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == "warning: fewer than 60 rows, left out: SHORT (59)\n"
    assert set(predictions(tmp_path)["Ticker"]) == {"LONG"}


def test_another_prior_gives_another_forecast(call_script: RunScript, own_prior: Path, tmp_path: Path) -> None:
    write_prices({"X": random_prices(80, 5)}, tmp_path / "x.csv", META)
    widths = []
    for options in ([], ["--prior", own_prior]):
        result = call_script("framework.py", *BY_PRIOR, "x.csv", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        widths.append(width_of(predictions(tmp_path)).to_numpy())
    assert "forecast by the market prior (2 tickers, 2020-01-01 to 2021-02-23)" in result.stdout
    assert (np.abs(np.log(widths[1] / widths[0])) > 0.01).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--horizon", "5"], "--horizon is for --model_path prior"),
        (["--prior", "mine.json"], "--prior is for --model_path prior"),
        (["--model_path", "prior", "--prior", "none"], "--prior none: leave --model_path prior out instead"),
        (["--model_path", "prior", "--prior", "nowhere.json"], "--prior nowhere.json: No such file"),
        (["--model_path", "prior", "--prior", "x.csv"], "--prior x.csv: "),
        (["--model_path", "prior", "--window_size", "30"], "--window_size is a model file's"),
        (["--model_path", "prior", "--tickers", "TSLA"], "no prices of TSLA in the files"),
        (["--model_path", "prior", "--horizon", "0"], "--horizon must be above 0"),
        (["--model_path", "Prior"], "no model file Prior"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    options: list[str], says: str, call_script: RunScript, tmp_path: Path
) -> None:
    write_prices({"X": random_prices(80, 5)}, tmp_path / "x.csv", META)
    assert says in error_line(call_script("framework.py", "--test_csv", "x.csv", *options, cwd=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"x.csv", "x.csv.meta.json"}


def test_a_file_called_prior_is_a_model_file(sample_csv: Path, call_script: RunScript, tmp_path: Path) -> None:
    result = call_script("train.py", "--data", sample_csv, "--epochs", 1, "--save_path", "prior", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = call_script("framework.py", *BY_PRIOR, sample_csv, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "trainable parameters: 9,729" in result.stdout
    assert "market prior" not in result.stdout
    assert len(predictions(tmp_path)) == 3
    says = error_line(call_script("framework.py", *BY_PRIOR, sample_csv, "--horizon", 5, cwd=tmp_path))
    assert "--horizon is for --model_path prior" in says


def test_tickers_of_a_file_are_each_others_market() -> None:
    prices = {f"T{seed}": random_prices(120, seed) for seed in range(4)}
    together = forecast_by_prior(prices, *move_prior(prices, load_prior(), 3))
    assert [(row["Ticker"], row["Day"]) for row in together] == [(name, day) for name in prices for day in (1, 2, 3)]
    alone = forecast_by_prior({"T2": prices["T2"]}, *move_prior({"T2": prices["T2"]}, load_prior(), 3))
    found = np.array([[row[name] for name in QUANTILES] for row in together if row["Ticker"] == "T2"])
    expected = np.array([[row[name] for name in QUANTILES] for row in alone])
    assert not (found == expected).all()
    np.testing.assert_allclose(np.log(found / expected), 0.0, atol=0.02)


def test_a_wild_week_widens_tomorrow() -> None:
    calm = random_prices(200, 3)
    wild = calm.copy()
    draw = np.random.default_rng(0)
    moves = np.log(calm["Close"]).diff().fillna(0.0).to_numpy().copy()
    moves[-5:] = draw.choice([-0.08, 0.08], 5)
    wild["Close"] = 50.0 * np.exp(np.cumsum(moves))
    wild["Open"] = np.r_[50.0, wild["Close"].to_numpy()[:-1]]
    for name, end in (("High", np.maximum), ("Low", np.minimum)):
        wild[name] = end(wild["Open"], wild["Close"])
    rows = [
        forecast_by_prior({"X": frame}, *move_prior({"X": frame}, load_prior(), 1))[0]
        for frame in (calm, wild, wild.iloc[:-5])
    ]
    widths = [np.log(row["P90"] / row["P10"]) for row in rows]
    assert widths[1] > 1.5 * max(widths[0], widths[2])
