"""--paths, --above and --below: joint paths whose days are the forecast's own, and what they say of a price."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from price_tables import random_prices
from source_tree import RunScript

from stocklora.forecaster.paths import LEVELS, joint_paths
from stocklora.prices.tables import write_prices
from stocklora.volatility.prior import fit_prior, load_prior

META = {"source": "test", "adjust": "all", "interval": "1d"}
BY_PRIOR = ["--model_path", "prior", "--test_csv", "prices.csv"]
QUANTILES = ["P05", "P10", "P25", "P50", "P75", "P90", "P95"]


def skewed(horizon: int) -> np.ndarray:
    """(horizon, levels) quantiles that are no copy of history's: shifted, and wider below than above."""
    shape = np.array([-2.6, -1.8, -0.8, 0.1, 0.7, 1.4, 2.0])
    return 0.01 * np.sqrt(np.arange(1, horizon + 1))[:, None] * shape


class TestJointPaths:
    def test_quantiles_are_those_given(self) -> None:
        history, target = load_prior().paths, skewed(5)
        paths = joint_paths(history, target, LEVELS, len(history), seed=0)
        # To within the gap between two neighbours: a quantile of a sample lies somewhere between them.
        np.testing.assert_allclose(
            np.quantile(paths, LEVELS, axis=0).T, target, atol=5e-3 * (target[0, -1] - target[0, 0])
        )

    def test_a_sample_of_them_nearly(self) -> None:
        paths = joint_paths(load_prior().paths, skewed(3), LEVELS, 1000, seed=0)
        beyond = np.array([[(paths[:, step] < limit).mean() for limit in row] for step, row in enumerate(skewed(3))])
        np.testing.assert_allclose(beyond, np.tile(LEVELS, (3, 1)), atol=4 * 0.5 / np.sqrt(1000))

    def test_days_follow_each_other_as_in_history(self) -> None:
        """A close three days ahead is where two days ahead was, and one more move: not drawn anew."""
        history = load_prior().paths
        paths = joint_paths(history, skewed(3), LEVELS, len(history), seed=0)
        for one, other in ((0, 1), (1, 2), (0, 2)):
            expected = np.corrcoef(history[:, one], history[:, other])[0, 1]
            assert np.corrcoef(paths[:, one], paths[:, other])[0, 1] == pytest.approx(expected, abs=0.05)
            assert expected > 0.4

    def test_more_than_history_has(self) -> None:
        history = load_prior().paths
        paths = joint_paths(history, skewed(2), LEVELS, 2 * len(history) + 7, seed=0)
        assert paths.shape == (2 * len(history) + 7, 2)
        assert np.isfinite(paths).all()

    def test_the_seed_decides(self) -> None:
        first, again, other = (joint_paths(load_prior().paths, skewed(2), LEVELS, 50, seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_prices({"AAA": random_prices(300, 1), "BBB": random_prices(300, 2)}, tmp_path / "prices.csv", META)
    return tmp_path


def test_the_file_of_paths(folder: Path, call_script: RunScript) -> None:
    result = call_script("framework.py", *BY_PRIOR, "--horizon", 4, "--paths", 2000, cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    paths = pd.read_csv(folder / "paths.csv")
    assert list(paths) == ["Ticker", "Path", "Date", "Day", "Close"]
    assert len(paths) == 2 * 2000 * 4
    forecast = pd.read_csv(folder / "predictions.csv").set_index(["Ticker", "Day"])
    for (ticker, day), closes in paths.groupby(["Ticker", "Day"])["Close"]:
        row = forecast.loc[(ticker, day)]
        width = row["P95"] - row["P05"]
        np.testing.assert_allclose(closes.quantile(LEVELS), row[QUANTILES].to_numpy(float), atol=0.05 * width)
    assert set(zip(paths["Day"], paths["Date"], strict=True)) == set(
        zip(forecast.index.get_level_values("Day"), forecast["Date"], strict=True)
    )


def test_probabilities_of_a_price(folder: Path, call_script: RunScript) -> None:
    asked = ["framework.py", *BY_PRIOR, "--tickers", "AAA"]
    assert call_script(*asked, cwd=folder).returncode == 0
    last_day = pd.read_csv(folder / "predictions.csv").iloc[-1]
    result = call_script(*asked, "--above", last_day["P90"], "--below", last_day["P25"], cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    for word, expected in (("above", 10), ("below", 25)):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"AAA closes {word}")]
        shares = [int(share) for share in re.findall(r"(\d+)%", line)]
        assert len(shares) == 4  # three days, and any of them
        assert shares[2] == pytest.approx(expected, abs=2)
        assert max(shares[:3]) <= shares[3] <= sum(shares[:3])


@pytest.mark.parametrize("flag", ["--above", "--below"])
def test_a_price_of_several_tickers_is_refused_before_anything_is_written(
    flag: str, folder: Path, call_script: RunScript
) -> None:
    result = call_script("framework.py", *BY_PRIOR, flag, 100, cwd=folder)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --above and --below are a price of one ticker; choose it with --tickers")
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "predictions.csv").exists()


def test_a_prior_of_ones_own_has_its_own_paths(folder: Path, call_script: RunScript) -> None:
    """Made of days that follow a trend: its paths go on as they begin."""
    draw = np.random.default_rng(0)
    frame = random_prices(300, 5, volatility=0.004)
    drift = np.exp(np.cumsum(0.02 * np.sign(np.sin(np.arange(300) / 8.0)) + 0.001 * draw.standard_normal(300)))
    frame[["Open", "High", "Low", "Close"]] = frame[["Open", "High", "Low", "Close"]].mul(drift, axis=0)
    fit_prior({"one": {"T": frame}}, horizon=3).save(folder / "mine.json")
    followed = []
    for prior in ("builtin", "mine.json"):
        asked = ["framework.py", *BY_PRIOR, "--tickers", "AAA", "--prior", prior, "--paths", 400]
        result = call_script(*asked, cwd=folder)
        assert (result.returncode, result.stderr) == (0, "")
        closes = pd.read_csv(folder / "paths.csv").pivot_table(index="Path", columns="Day", values="Close")
        followed.append(np.corrcoef(closes[1], closes[3])[0, 1])
    assert followed[1] > followed[0] + 0.2
