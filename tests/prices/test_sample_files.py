"""Files of real users' kinds, where they lie beside the project: what each of them says, to the day."""

from __future__ import annotations

import pandas as pd
import pytest
from source_tree import REPO_ROOT

from stocklora.cli.console import UserError
from stocklora.prices.calendar import next_sessions
from stocklora.prices.exchanges import exchange_of
from stocklora.prices.tables import read_prices

SAMPLES = REPO_ROOT.parent / "shared" / "cases" / "prices"
pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no sample files at {SAMPLES}")

# ticker, exchange, rows, first and last day, first and last close; the next three sessions follow from exchange and day
Reading = tuple[str, str, int, str, str, float, float]
AFTER = {
    ("XNYS", "2024-12-31"): ["2025-01-02", "2025-01-03", "2025-01-06"],
    ("XNYS", "2024-07-09"): ["2024-07-10", "2024-07-11", "2024-07-12"],
    ("XLON", "2024-12-31"): ["2025-01-02", "2025-01-03", "2025-01-06"],
    ("XSHG", "2024-09-30"): ["2024-10-08", "2024-10-09", "2024-10-10"],
    ("XTKS", "2024-12-30"): ["2025-01-06", "2025-01-07", "2025-01-08"],
    ("24/7", "2024-11-01"): ["2024-11-02", "2024-11-03", "2024-11-04"],
}
YEAR = (252, "2024-01-02", "2024-12-31")


def qzx(ticker: str = "QZX", first: float = 100.42) -> Reading:
    return (ticker, "XNYS", *YEAR, first, 74.07)


QZY: Reading = ("QZY", "XNYS", *YEAR, 40.09, 38.81)


def moutai(ticker: str) -> Reading:
    return (ticker, "XSHG", 181, "2024-01-02", "2024-09-30", 1639.67, 1735.2)


READINGS: dict[str, list[Reading]] = {
    "600519_akshare.csv": [moutai("600519")],
    "7203.csv": [("7203", "XTKS", 245, "2024-01-04", "2024-12-30", 2476.1, 2262.5)],
    "BTCUSDT.csv": [("BTCUSDT", "24/7", 306, "2024-01-01", "2024-11-01", 60001.85, 23695.83)],
    "SH600519.csv": [moutai("SH600519")],
    "alpaca_daily.csv": [qzx()],
    "alphavantage_adjusted.csv": [qzx("alphavantage_adjusted")],
    "excel_german.csv": [qzx("excel_german")],
    "finrl_tic_interleaved.csv": [qzx(), QZY],
    "folder_ipo": [("NEWCO", "XNYS", 12, "2024-12-13", "2024-12-31", 19.84, 19.96), qzx(), QZY],
    "halts": [
        ("600001.SS", "XSHG", 423, "2023-01-03", "2024-09-30", 20.01, 25.04),
        ("600002.SS", "XSHG", 423, "2023-01-03", "2024-09-30", 20.01, 25.04),
        ("600003.SS", "XSHG", 423, "2023-01-03", "2024-09-30", 20.01, 23.84),
        ("600004.SS", "XSHG", 423, "2023-01-03", "2024-09-30", 20.01, 22.07),
    ],
    "history_symbol_column.csv": [moutai("600519.SS")],
    "index_without_name.csv": [qzx("index_without_name")],
    "kronos_timestamps.csv": [qzx("kronos_timestamps")],
    "nasdaq_HistoricalData.csv": [qzx("nasdaq_HistoricalData")],
    "newest_first.csv": [qzx("newest_first")],
    "odd_tickers.csv": [
        qzx("NA"),
        ("TRUE", *QZY[1:]),
        ("NAN", "XNYS", *YEAR, 30.13, 21.85),
        ("000001", "XNYS", *YEAR, 11.8, 13.55),
        ("1E5", "XNYS", *YEAR, 9.06, 8.53),
    ],
    "pence": [("QZX.L", "XLON", 254, "2024-01-02", "2024-12-31", 607.11, 6.4362)],
    "slash_ticker.csv": [qzx("BRK/B"), QZY],
    "stooq_index_no_volume.csv": [qzx("stooq_index_no_volume")],
    "tushare_daily.csv": [moutai("600519.SH")],
    "two_symbols_one_after_the_other.csv": [
        ("QZX", "XNYS", 130, "2024-01-02", "2024-07-09", 100.42, 90.29),
        ("QZY", "XNYS", 122, "2024-07-10", "2024-12-31", 39.94, 38.81),
    ],
    "yahoo_adj_close.csv": [qzx("yahoo_adj_close", first=90.378)],
    "yf_three_headers.csv": [qzx()],
    "yf_two_tickers.csv": [qzx(), QZY],
}
REFUSALS = {
    "QZX_weekly.csv": "the bars of QZX are weeks, .* --interval 1d",
    "download_interval_1wk.csv": "the bars of QZX are weeks, .* --ticker QZX --interval 1d",
    "close_adjusted_rest_raw.csv": "in 180 of 252 rows the close alone .* is adjusted",
}


def test_none_is_left_out() -> None:
    assert {path.name for path in SAMPLES.iterdir() if path.suffix != ".json"} == {*READINGS, *REFUSALS}


@pytest.mark.parametrize("name", READINGS)
def test_reading(name: str) -> None:
    tables = read_prices(SAMPLES / name)
    found = [
        (ticker, exchange_of(ticker), len(frame), f"{frame.index[0]:%Y-%m-%d}", f"{frame.index[-1]:%Y-%m-%d}")
        for ticker, frame in tables.items()
    ]
    assert found == [expected[:5] for expected in READINGS[name]]
    for (ticker, exchange, _, _, last, *closes), frame in zip(READINGS[name], tables.values(), strict=True):
        assert frame["Close"].iloc[[0, -1]].tolist() == pytest.approx(closes, rel=1e-12)
        following = next_sessions(ticker, pd.Timestamp(last), 3)
        assert [f"{day:%Y-%m-%d}" for day in following] == AFTER[exchange, last]


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    with pytest.raises(UserError, match=REFUSALS[name]):
        read_prices(SAMPLES / name)


def test_a_change_of_unit_is_named_and_mended(capsys: pytest.CaptureFixture[str]) -> None:
    from stocklora.prices.settings import ReadingSettings

    read_prices(SAMPLES / "pence")
    assert "2024-12-12 (times 0.01)" in capsys.readouterr().err
    (frame,) = read_prices(SAMPLES / "pence", reading=ReadingSettings(mend_jumps=True)).values()
    assert frame["Close"].pct_change().abs().max() < 0.2


@pytest.mark.parametrize(("ticker", "rows"), [("600003.SS", 60), ("600004.SS", 250)])
def test_a_suspension_is_told(ticker: str, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    read_prices(SAMPLES / "halts" / f"{ticker}.csv")
    assert f"{ticker} has not moved in its last {rows} rows" in capsys.readouterr().err
