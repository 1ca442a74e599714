"""Bars out of range: a few by a little are mended and told, others refused with their line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from price_tables import random_prices

from stocklora.cli.console import UserError
from stocklora.prices import store as price_store
from stocklora.prices.bars import MENDED_GAP, MENDED_SHARE
from stocklora.prices.store import spool
from stocklora.prices.tables import read_prices, write_prices

ROWS = 400
ALLOWED = int(MENDED_SHARE * ROWS)


def with_faults(count: int, gap: float, rows: int = ROWS, seed: int = 0) -> pd.DataFrame:
    """Days whose higher end stands ``gap`` of its price above the high, by turns with such below the low."""
    frame = random_prices(rows, seed)
    for place in range(count):
        day = frame.index[10 + 7 * place]
        if place % 2:
            frame.loc[day, "Low"] = frame.loc[day, ["Open", "Close"]].min() * (1 + gap)
            frame.loc[day, "High"] = frame.loc[day, ["High", "Low"]].max()
        else:
            frame.loc[day, "High"] = frame.loc[day, ["Open", "Close"]].max() / (1 + gap)
            frame.loc[day, "Low"] = frame.loc[day, ["High", "Low"]].min()
    return frame


def written(path: Path, frames: dict[str, pd.DataFrame]) -> Path:
    """As others write tables: no check, no sidecar."""
    parts = [frame.reset_index().assign(Ticker=name) for name, frame in frames.items()]
    pd.concat(parts).to_csv(path, index=False)
    return path


def outcome(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """What it returned or which error it raised, and what it warned of."""
    try:
        result: object = call()
    except UserError as error:
        result = str(error)
    return result, capsys.readouterr().err


def test_a_few_bars_are_mended_counted_and_dated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = with_faults(2, 0.013)
    read = read_prices(written(tmp_path / "p.csv", {"A": broken}))["A"]
    days = [f"{broken.index[place]:%Y-%m-%d}" for place in (10, 17)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'p.csv'}: 2 of {ROWS} rows had an open or close up to 1.3% outside")
    assert f"({days[0]}, {days[1]})" in line
    np.testing.assert_allclose(read["High"], broken[["Open", "High", "Close"]].max(axis=1), rtol=1e-12)
    np.testing.assert_allclose(read["Low"], broken[["Open", "Low", "Close"]].min(axis=1), rtol=1e-12)
    np.testing.assert_allclose(read[["Open", "Close", "Volume"]], broken[["Open", "Close", "Volume"]], rtol=1e-12)
    write_prices({"A": read}, tmp_path / "again.csv", {"adjust": "all"})
    read_prices(tmp_path / "again.csv")
    assert capsys.readouterr().err == ""


def test_of_many_mended_days_three_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_prices(written(tmp_path / "p.csv", {"A": with_faults(4, 0.01, rows=800)}))
    (line,) = capsys.readouterr().err.splitlines()
    assert "4 of 800 rows" in line
    assert line.count("2020-") == 3
    assert ", ...); their range was widened" in line


def test_a_good_table_is_read_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = read_prices(written(tmp_path / "p.csv", {"A": random_prices(50)}))["A"]
    np.testing.assert_allclose(read, random_prices(50), rtol=1e-15)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "gap", "says"),
    [
        (ALLOWED, 0.95 * MENDED_GAP, None),
        (
            ALLOWED + 1,
            0.001,
            f"row 12, column (Open|Close): .* is outside the day's range .*; {ALLOWED + 1} broken rows in all: .*",
        ),
        (1, 1.05 * MENDED_GAP, "row 12, column (Open|Close): .* is outside the day's range [^(]*; correct or delete"),
    ],
)
def test_limits(count: int, gap: float, says: str | None, tmp_path: Path) -> None:
    path = written(tmp_path / "p.csv", {"A": with_faults(count, gap)})
    if says is None:
        assert len(read_prices(path)["A"]) == ROWS
    else:
        with pytest.raises(UserError, match=says):
            read_prices(path)


def test_a_high_below_its_low_is_never_mended(tmp_path: Path) -> None:
    frame = random_prices(ROWS)
    frame.iloc[20, [1, 2]] = frame.iloc[20, [2, 1]].to_numpy()
    with pytest.raises(UserError, match="row 22, column High: high .* is below low"):
        read_prices(written(tmp_path / "p.csv", {"A": frame}))


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param((0, 0, 0), id="none"),
        pytest.param((1, 1, 1), id="a few of each ticker"),
        pytest.param((0, 5, 0), id="few of the file, many of one ticker"),
        pytest.param((2, 2, 3), id="too many of the file, few of each ticker"),
    ],
)
def test_a_large_file_that_is_read_in_pieces_is_mended_as_a_whole(
    faults: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = {f"T{seed}": with_faults(count, 0.01, seed=seed) for seed, count in enumerate(faults)}
    path = written(tmp_path / "p.csv", frames)
    whole, told = outcome(lambda: read_prices(path), capsys)
    assert isinstance(whole, str) == (sum(faults) > MENDED_SHARE * ROWS * len(faults))
    monkeypatch.setattr(price_store, "LARGE_FILE_BYTES", 0)
    pieces, told_of_pieces = outcome(lambda: dict(spool([path], tmp_path / "store")), capsys)
    assert told_of_pieces == told
    if isinstance(whole, str):
        assert pieces == whole
        return
    assert list(pieces) == list(whole)
    for name, frame in whole.items():
        pd.testing.assert_frame_equal(pieces[name], frame, check_exact=True)


def test_a_script_goes_on_with_one_line(tmp_path: Path, call_script: Callable) -> None:
    written(tmp_path / "p.csv", {"A": with_faults(2, 0.01)})
    result = call_script("download.py", "--check", "p.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert f"2 of {ROWS} rows had an open or close" in result.stderr
