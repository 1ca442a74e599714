"""Price tables: what is read, what is refused and in which words, and that nothing changes on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from price_files import BAD_FILES, GOOD, GOOD_FILES, HEADER
from price_tables import random_prices
from source_tree import RunScript

import download
from stocklora.cli.console import UserError
from stocklora.prices.csv_columns import PRICE_COLUMNS
from stocklora.prices.reading import ticker_of
from stocklora.prices.settings import ReadingSettings
from stocklora.prices.tables import meta_path, read_meta, read_prices, validated, write_prices


def frame_of(days: int = 3, start: str = "2024-01-02") -> pd.DataFrame:
    index = pd.bdate_range(start, periods=days, name="Date", unit="ns")
    close = 100.0 + np.arange(days)
    columns = {"Open": close - 0.5, "High": close + 1, "Low": close - 1, "Close": close, "Volume": 1000.0 + close}
    return pd.DataFrame(columns, index=index, dtype="float64")


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_and_exit_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = BAD_FILES[name]
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_prices(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)

    assert download.main(["--check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_bad_file_in_a_script_as_a_user_runs_it(tmp_path: Path, call_script: Callable) -> None:
    (tmp_path / "bad.csv").write_text(BAD_FILES["text in a number"][0])
    result = call_script("download.py", "--check", "bad.csv", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: bad.csv, row 3, column Close: 'abc' is not a number; write it like 1234.56\n"


@pytest.mark.parametrize("name", GOOD_FILES)
def test_harmless_differences_are_read(name: str, tmp_path: Path) -> None:
    content = GOOD_FILES[name]
    path = tmp_path / "AAPL.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (ticker, frame), *rest = read_prices(path).items()
    assert not rest
    assert ticker == "AAPL"
    assert list(frame.columns) == PRICE_COLUMNS
    assert (frame.dtypes == "float64").all()
    assert frame.index.name == "Date"
    assert frame.index.tz is None
    assert list(frame.index.strftime("%Y-%m-%d")) == ["2024-01-02", "2024-01-03", "2024-01-04"]
    assert frame["Close"].tolist() == [11, 12, 13]
    assert frame["Volume"].tolist() == [100, 200, 0]


def test_rounding_of_adjusted_prices_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "2024-01-02,10,11.999999999,9,12,100\n")
    assert read_prices(path)["a"]["Close"].tolist() == [12]


def test_several_tickers_keep_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    rows = [f"{t},2024-01-0{d},10,12,9,11,{d}" for d in (2, 3) for t in ("MSFT", "AAPL")]
    path.write_text("Ticker," + HEADER + "\n".join(rows) + "\n")
    frames = read_prices(path)
    assert list(frames) == ["MSFT", "AAPL"]
    assert [len(frame) for frame in frames.values()] == [2, 2]
    assert frames["AAPL"]["Volume"].tolist() == [2, 3]


def test_too_few_rows_names_the_ticker_and_both_numbers(tmp_path: Path) -> None:
    write_prices({"AAPL": frame_of(40), "NEW": frame_of(5)}, tmp_path / "p.csv", {})
    with pytest.raises(UserError, match=r"p\.csv: NEW has 5 rows, but 34 are needed"):
        read_prices(tmp_path / "p.csv", min_rows=34)


def test_a_folder_is_all_its_tables(tmp_path: Path) -> None:
    write_prices({"AAPL": frame_of()}, tmp_path / "AAPL.csv", {"adjust": "all"})
    write_prices({"MSFT": frame_of()}, tmp_path / "m.csv.gz", {"adjust": "all"})
    (tmp_path / "notes.txt").write_text("not a table")
    assert list(read_prices(tmp_path)) == ["AAPL", "MSFT"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no .csv"):
        read_prices(tmp_path / "empty")


def test_the_same_ticker_in_two_files(tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):
        write_prices({"AAPL": frame_of()}, tmp_path / name, {})
    with pytest.raises(UserError, match=r"two\.csv: ticker AAPL is also in .*one\.csv"):
        read_prices([tmp_path / "one.csv", tmp_path / "two.csv"])


def test_the_same_file_twice_is_once(tmp_path: Path) -> None:
    write_prices({"AAPL": frame_of()}, tmp_path / "one.csv", {})
    assert list(read_prices([tmp_path / "one.csv", tmp_path / "one.csv"])) == ["AAPL"]


def test_no_such_file_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "sample_test.csv").write_text(GOOD)
    with pytest.raises(UserError, match=r"sample_tset\.csv: no such file; did you mean .*sample_test\.csv"):
        read_prices(tmp_path / "sample_tset.csv")
    with pytest.raises(UserError, match=r"run: python download\.py --output"):
        read_prices(tmp_path / "qqq.csv")


@pytest.mark.parametrize(
    ("name", "ticker"),
    [
        ("AAPL_2024_2025.csv.gz", "AAPL"),
        ("BRK-B_2020.csv", "BRK-B"),
        ("600519.SS.csv", "600519.SS"),
        ("600519.SS_2001_2020.csv", "600519.SS"),
        ("sample_test.csv", "sample_test"),
        ("QZX_weekly.csv", "QZX"),
        ("BTCUSDT-1d-2024-01.csv", "BTCUSDT"),
        ("BTC-USD_1d.csv", "BTC-USD"),
        ("BRK-B.csv", "BRK-B"),
        ("^spx_d.csv", "^spx"),
        ("600519_20240101.csv", "600519_20240101"),
        ("^GSPC.csv", "^GSPC"),
        ("MSFT.CSV", "MSFT"),
    ],
)
def test_ticker_from_the_name(name: str, ticker: str) -> None:
    assert ticker_of(Path(name)) == ticker
    assert ticker_of(Path(name), {"tickers": ["X"]}) == "X"


def test_sidecar_says_what_the_table_is(tmp_path: Path) -> None:
    path = tmp_path / "sample_test.csv"
    written = write_prices({"AAPL": frame_of()}, path, {"source": "yahoo", "adjust": "all", "interval": "1d"})
    assert read_meta(path) == written
    assert {name: written[name] for name in ("source", "adjust", "interval", "rows", "tickers")} == {
        "source": "yahoo",
        "adjust": "all",
        "interval": "1d",
        "rows": 3,
        "tickers": ["AAPL"],
    }
    assert (written["first_date"], written["last_date"]) == ("2024-01-02", "2024-01-04")
    assert len(written["sha256"]) == 64
    assert list(read_prices(path)) == ["AAPL"]
    assert read_meta(tmp_path / "other.csv") is None


def test_a_sidecar_of_another_table_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sample_test.csv"
    write_prices({"AAPL": frame_of()}, path, {"adjust": "all"})
    path.write_text(GOOD)
    assert list(read_prices(path)) == ["sample_test"]
    assert "has changed since" in capsys.readouterr().err


def test_a_broken_sidecar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(GOOD)
    meta_path(path).write_text("{")
    with pytest.raises(UserError, match="not a readable sidecar"):
        read_prices(path)
    meta_path(path).write_text("[]")
    with pytest.raises(UserError, match="not a sidecar"):
        read_prices(path)


def test_files_of_different_adjustment_are_not_mixed(tmp_path: Path) -> None:
    write_prices({"AAPL": frame_of()}, tmp_path / "a.csv", {"adjust": "all"})
    write_prices({"MSFT": frame_of()}, tmp_path / "m.csv", {"adjust": "splits"})
    with pytest.raises(UserError, match=r"m\.csv is adjusted for 'splits' but .*a\.csv for 'all'"):
        read_prices(tmp_path)


def test_a_sidecar_that_says_mixed_is_refused(tmp_path: Path) -> None:
    write_prices({"AAPL": frame_of(), "MSFT": frame_of()}, tmp_path / "a.csv", {"adjust": "mixed"})
    with pytest.raises(UserError, match="different adjustment are mixed"):
        read_prices(tmp_path / "a.csv")


def test_a_failed_write_leaves_the_old_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_prices({"AAPL": frame_of()}, path, {})
    before = path.read_bytes(), meta_path(path).read_bytes()
    broken = frame_of()
    broken.iloc[1, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        write_prices({"AAPL": broken}, path, {})
    assert (path.read_bytes(), meta_path(path).read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.csv.meta.json"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.drop(columns="Low"),
        lambda f: f.iloc[::-1],
        lambda f: pd.concat([f, f.iloc[-1:]]),
        lambda f: f.set_axis(f.index.tz_localize("UTC")),
        lambda f: f.set_axis(f.index + pd.Timedelta(hours=9)),
        lambda f: f.set_axis(range(len(f))),
        lambda f: f.assign(Close=0.0),
        lambda f: f.assign(High=f["Low"] / 2),
        lambda f: f.assign(Volume=-1.0),
    ],
)
def test_frames_that_break_the_contract_are_not_written(spoil: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AAPL"):
        validated(spoil(frame_of()), "AAPL")


def test_compressed_tables_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.csv.gz", "b.csv.gz"):
        write_prices({"AAPL": frame_of()}, tmp_path / name, {})
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


price = st.floats(1e-6, 1e9, allow_subnormal=False)
volume = st.one_of(st.integers(0, 2**60).map(float), st.floats(0, 1e15, allow_subnormal=False))
name = st.from_regex(r"[A-Z0-9^][A-Z0-9.=-]{0,8}", fullmatch=True)


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    """Any history that the contract allows."""
    days = draw(st.lists(st.dates(pd.Timestamp("1900-01-01").date(), pd.Timestamp("2200-01-01").date()), unique=True,
                         min_size=1, max_size=12))  # fmt: skip
    rows = []
    for _ in days:
        low, one, two, high = sorted(draw(st.tuples(price, price, price, price)))
        opens, close = draw(st.permutations([one, two]))
        rows.append([opens, high, low, close, draw(volume)])
    index = pd.DatetimeIndex(sorted(map(pd.Timestamp, days)), name="Date").as_unit("ns")
    return pd.DataFrame(rows, index=index, columns=PRICE_COLUMNS, dtype="float64")


@given(frames=st.dictionaries(name, tables(), min_size=1, max_size=4), suffix=st.sampled_from([".csv", ".csv.gz"]))
def test_any_valid_table_survives_write_and_read(
    frames: dict[str, pd.DataFrame], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("round") / f"prices{suffix}"
    write_prices(frames, path, {"adjust": "all"})
    back = read_prices(path)
    assert list(back) == list(frames)
    for ticker, frame in frames.items():
        pd.testing.assert_frame_equal(back[ticker], frame, check_exact=True, check_freq=False)
    again = write_prices(back, path.with_name(f"again{suffix}"), {"adjust": "all"})
    assert again["sha256"] == json.loads(meta_path(path).read_text())["sha256"]


def broken_table(tmp_path: Path, rows: int = 120) -> tuple[Path, pd.DataFrame]:
    """One file with a fault of each kind in rows 5 to 11, and what is whole in it."""
    lines = random_prices(rows).round(4).to_csv(date_format="%Y-%m-%d", lineterminator="\n").splitlines()
    whole = [line for number, line in enumerate(lines, start=1) if number not in range(5, 12)]
    cells = {number: lines[number - 1].split(",") for number in range(5, 12)}
    cells[5][0] = "2020-02-31"
    cells[6][4] = "abc"
    cells[7][1] = ""
    cells[8] = cells[8][:-1]
    cells[9][2] = cells[9][3]
    cells[9][3] = str(2 * float(cells[9][2]))
    cells[10][5] = "-3"
    cells[11] = [cells[11][0], *[str(2 * float(cell)) for cell in cells[11][1:]]]
    lines[4:11] = [",".join(row) for row in cells.values()]
    lines.insert(11, lines[10].replace(cells[11][4], str(float(cells[11][3]))))  # the day again, with another close
    path = tmp_path / "QZX.csv"
    path.write_text("\n".join(lines) + "\n")
    (tmp_path / "whole.csv").write_text("\n".join(whole) + "\n")
    return path, read_prices(tmp_path / "whole.csv")["whole"]


def test_all_broken_rows_are_told_in_one_line(tmp_path: Path) -> None:
    path, _ = broken_table(tmp_path)
    with pytest.raises(UserError) as caught:
        read_prices(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, row 5, column Date: '2020-02-31' is no day of the calendar; write it as")
    assert "; 8 broken rows in all: " in message
    assert "\n" not in message
    for kind in (
        "1 with a Date that is none (5)",
        "1 with a Close that is no number (6)",
        "1 with an empty Open (7)",
        "1 with another number of cells than the header (8)",
        "1 with a high below the low (9)",
        "1 with a Volume that is negative (10)",
        "2 with other prices than another row of their day (11, 12)",
    ):
        assert kind in message
    assert message.endswith(f"python download.py --convert {path} --output clean.csv --drop_bad_rows")


def test_broken_rows_are_left_out_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, whole = broken_table(tmp_path)
    (frame,) = read_prices(path, reading=ReadingSettings(drop_bad_rows=True)).values()
    pd.testing.assert_frame_equal(frame, whole)
    assert "8 broken rows left out" in capsys.readouterr().out


def test_not_more_than_a_tenth_is_left_out(tmp_path: Path) -> None:
    path, _ = broken_table(tmp_path, rows=40)
    with pytest.raises(UserError, match=r"8 of \d+ rows are broken, more than --drop_bad_rows leaves out \(10%\)"):
        read_prices(path, reading=ReadingSettings(drop_bad_rows=True))


def test_the_advice_works(tmp_path: Path, call_script: RunScript) -> None:
    """The command at the end of the message writes the table that the next command reads."""
    path, whole = broken_table(tmp_path)
    refused = call_script("framework.py", "--model_path", "prior", "--test_csv", path, cwd=tmp_path)
    assert refused.returncode == 2
    command = refused.stderr.strip().rpartition("python ")[2].split()
    assert call_script(*command, cwd=tmp_path).returncode == 0
    (frame,) = read_prices(tmp_path / "clean.csv").values()
    pd.testing.assert_frame_equal(frame, whole, rtol=1e-6)
