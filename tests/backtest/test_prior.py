"""The market prior in a backtest: its row, and what a reader must know of the days it was made from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from price_tables import random_prices
from source_tree import RunScript

from stocklora.prices.tables import write_prices
from stocklora.volatility.prior import fit_prior, load_prior

pytestmark = pytest.mark.usefixtures("undrawn")

META = {"source": "test", "adjust": "all", "interval": "1d"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prices of 2020 and 2021, and a prior made from days before September 2021."""
    home = tmp_path_factory.mktemp("prices")
    frames = {f"T{seed}": random_prices(500, seed) for seed in range(2)}
    write_prices(frames, home / "p.csv", META)
    others = {f"S{seed}": random_prices(500, 10 + seed) for seed in range(2)}
    fit_prior({"one": others}, pd.Timestamp("2021-09-01")).save(home / "mine.json")
    return home


def test_the_note_stands_in_the_report_and_is_said(folder: Path, call_script: RunScript, tmp_path: Path) -> None:
    result = call_script(
        "backtest.py", "--data", folder / "p.csv", "--models", "ewma", "prior", "--from", "2021-07-01", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    prior = load_prior().made_from
    note = (
        f"The market prior was made from {prior['tickers']} tickers, {prior['first_day']} to {prior['last_day']}: all"
    )
    assert f"note: {note}" in result.stdout
    assert "may be flattered" in result.stdout
    assert note in (tmp_path / "backtest" / "report.html").read_text(encoding="utf-8")
    assert "market prior" in result.stdout.split("note:")[0]  # its row in the table
    assert set(pd.read_csv(tmp_path / "backtest" / "metrics.csv")["Model"]) == {"naive", "ewma", "prior"}


@pytest.mark.parametrize(("first", "says"), [("2021-08-25", "of the"), ("2021-09-01", "none of the")])
def test_days_inside_an_own_prior_are_counted(
    first: str, says: str, folder: Path, call_script: RunScript, tmp_path: Path
) -> None:
    options = ["--models", "prior", "--prior", folder / "mine.json", "--forecasts_format", "csv"]
    result = call_script("backtest.py", "--data", folder / "p.csv", *options, "--from", first, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "backtest" / "forecasts.csv.gz")
    days = table.loc[table["Day"] == 1, "Date"].unique()
    inside = int((days <= "2021-08-31").sum())
    assert (inside > 0) == (says == "of the")
    (note,) = [line for line in result.stdout.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: The market prior was made from 2 tickers, 2020-01-01 to 2021-08-31: ")
    assert f"{inside or ''} {says} {len(days)} days scored".strip() in note


def test_without_it_nothing_is_noted(folder: Path, call_script: RunScript, tmp_path: Path) -> None:
    result = call_script("backtest.py", "--data", folder / "p.csv", "--models", "ewma", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "market prior" not in result.stdout


def test_no_forecast_of_it_sees_the_future(folder: Path, call_script: RunScript, tmp_path: Path) -> None:
    result = call_script(
        "backtest.py", "--data", folder / "p.csv", "--models", "prior", "--check-leakage", "--leakage_cuts", 1,
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no leak" in result.stdout
    assert "The market prior was made from" in result.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prior", "none"], "--prior none: leave the model prior out of --models instead"),
        (["--prior", "nowhere.json"], "--prior nowhere.json: No such file"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], says: str, folder: Path, call_script: RunScript, tmp_path: Path
) -> None:
    result = call_script("backtest.py", "--data", folder / "p.csv", "--models", "prior", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert says in result.stderr
