"""scripts/make_sample.py: the bundled table comes from a package, to the last byte."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from source_tree import RunScript

from stocklora.prices.sources.fetch import bundled_prices
from stocklora.prices.tables import meta_path, read_meta
from stocklora.runtime.files import BUNDLED_PRICES, bundled_folder

SCRIPT = "scripts/make_sample.py"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ``bokeh_sampledata``: prices as quoted are four times the adjusted ones."""
    folder = tmp_path / "packages" / "bokeh_sampledata"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    stocks = {}
    for ticker, frame in bundled_prices().items():
        quoted = {name.lower(): (4 * frame[name]).tolist() for name in ("Open", "High", "Low", "Close")}
        volume = frame["Volume"].astype(int).tolist()
        dates = frame.index.strftime("%Y-%m-%d").tolist()
        stocks[ticker] = {"date": dates, **quoted, "volume": volume, "adj_close": frame["Close"].tolist()}
    (folder / "stocks.py").write_text("".join(f"{name} = {json.dumps(days)}\n" for name, days in stocks.items()))
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    return folder


def test_it_makes_the_very_table_that_is_bundled(package: Path, run_script: RunScript, tmp_path: Path) -> None:
    path = tmp_path / "data" / "sample" / BUNDLED_PRICES
    result = run_script(SCRIPT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("12,154 rows of AAPL, FB, GOOG, IBM, MSFT, written\n")
    bundled = bundled_folder() / BUNDLED_PRICES
    assert gzip.decompress(path.read_bytes()) == gzip.decompress(bundled.read_bytes())
    made, kept = read_meta(path), read_meta(bundled)
    assert {key: made[key] for key in kept if key not in {"time", "sha256"}} == {
        key: kept[key] for key in kept if key not in {"time", "sha256"}
    }


def test_a_table_that_has_these_prices_is_left_alone(package: Path, run_script: RunScript, tmp_path: Path) -> None:
    run_script(SCRIPT, "--output", "prices.csv", cwd=tmp_path)
    side = meta_path(tmp_path / "prices.csv")
    before = side.read_bytes()
    result = run_script(SCRIPT, "--output", "prices.csv", cwd=tmp_path)
    assert result.stdout == "prices.csv: 12,154 rows of AAPL, FB, GOOG, IBM, MSFT, as the package has them\n"
    assert side.read_bytes() == before


def test_a_missing_package_is_one_line(run_script: RunScript, tmp_path: Path) -> None:
    result = run_script(SCRIPT, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: No module named 'bokeh_sampledata'; install the package: pip install bokeh_sampledata"
    ]
    assert list(tmp_path.iterdir()) == []
