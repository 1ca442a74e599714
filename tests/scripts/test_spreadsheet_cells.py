"""No CSV that a script writes holds a cell that a spreadsheet would run, and tickers come back as they were."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest
from price_tables import random_prices
from source_tree import RunScript

from stocklora.prices.tables import read_prices, write_prices

TICKERS = ["=HYPERLINK(9)", "+1", "-2", "@SUM(A1)", "AAPL", "'quoted"]
META = {"source": "test", "adjust": "all", "interval": "1d"}


def cells_of(path: Path) -> set[str]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return {cell for row in csv.reader(text.splitlines()) for cell in row}


def runs(cell: str) -> bool:
    """Whether a spreadsheet may take it for a formula: numbers below zero are none."""
    try:
        float(cell)
    except ValueError:
        return cell[:1] in ("=", "+", "-", "@", "\t", "\r")
    return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    frames = {name: random_prices(300, seed) for seed, name in enumerate(TICKERS)}
    write_prices(frames, tmp_path / "prices.csv", META)
    return tmp_path


def test_tickers_come_back(folder: Path) -> None:
    assert list(read_prices(folder / "prices.csv")) == TICKERS
    assert not any(map(runs, cells_of(folder / "prices.csv")))


def test_what_scripts_write(folder: Path, call_script: RunScript) -> None:
    forecast = ["framework.py", "--model_path", "prior", "--test_csv", "prices.csv", "--explain", "--paths", 5]
    assert call_script(*forecast, cwd=folder).returncode == 0
    backtest = ["backtest.py", "--data", "prices.csv", "--models", "naive", "ewma", "--output_dir", "back"]
    backtest += ["--forecasts_format", "csv"]
    result = call_script(*backtest, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert call_script("ledger.py", "export", cwd=folder).returncode == 0
    written = [path for path in folder.rglob("*.csv*") if path.suffix != ".json"]
    assert len(written) >= 7, written
    for path in written:
        cells = cells_of(path)
        assert not [cell for cell in cells if runs(cell)], path
        assert "'=HYPERLINK(9)" in cells, path
