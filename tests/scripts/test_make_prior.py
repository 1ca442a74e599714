"""scripts/make_prior.py as a user runs it: the same prices give the same file, and mistakes are a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from price_tables import random_prices
from source_tree import RunScript

from stocklora.prices.tables import write_prices
from stocklora.volatility.prior import load_prior

META = {"source": "test", "adjust": "all", "interval": "1d"}


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    """A folder with two files of prices: two tickers, and one in a compressed file."""
    write_prices({f"T{seed}": random_prices(240, seed) for seed in range(2)}, tmp_path / "us.csv", META)
    write_prices({"600519.SS": random_prices(200, 3)}, tmp_path / "ashares.csv.gz", META)
    return tmp_path


def made_from(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["made_from"]


def test_the_same_prices_give_the_same_file(prices: Path, call_script: RunScript) -> None:
    for name in ("one.json", "two.json"):
        result = call_script(
            "scripts/make_prior.py", "--data", "us.csv", "ashares.csv.gz", "--output", name, cwd=prices
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"{name}: 3 tickers of 2 markets, 680 rows, 2020-01-01 to 2020-12-01\n"
    assert (prices / "one.json").read_bytes() == (prices / "two.json").read_bytes()
    assert {name: market["tickers"] for name, market in made_from(prices / "one.json")["markets"].items()} == {
        "us": ["T0", "T1"], "ashares": ["600519.SS"],
    }  # fmt: skip
    assert load_prior(prices / "one.json").scale.horizon == 20


def test_days_and_tickers_are_left_out(prices: Path, call_script: RunScript) -> None:
    options = ["--from", "2020-02-03", "--before", "2020-10-01", "--without", "T1", "600519.SS"]
    result = call_script(
        "scripts/make_prior.py", "--data", "us.csv", "ashares.csv.gz", *options, "--output", "p.json", cwd=prices
    )
    assert result.returncode == 0, result.stderr
    known = made_from(prices / "p.json")
    assert {name: market["tickers"] for name, market in known["markets"].items()} == {"us": ["T0"]}
    assert (known["first_day"], known["last_day"]) == ("2020-02-03", "2020-09-30")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--data names no file"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--data", "us.csv", "--before", "soon"], "--before"),
        (["--data", "us.csv", "--from", "soon"], "--from"),
        (["--data", "us.csv", "--before", "2020-03-02"], "no ticker has the 100 days"),
        (["--data", "us.csv", "--before", "2000-01-03"], "no ticker has the 100 days"),
        (["--data", "us.csv", "--without", "T0", "T1"], "no ticker has the 100 days"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    options: list[str], says: str, prices: Path, call_script: RunScript
) -> None:
    before = sorted(prices.iterdir())
    result = call_script("scripts/make_prior.py", *options, "--output", "p.json", cwd=prices)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert says in result.stderr
    assert sorted(prices.iterdir()) == before
