"""Tables of other programs and sites: any clean table written in their layouts and read back is the same table."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stocklora.cli.console import UserError
from stocklora.prices.calendar import next_sessions, sessions_between
from stocklora.prices.exchanges import assign_exchange, exchange_of, named_exchange
from stocklora.prices.settings import ReadingSettings
from stocklora.prices.tables import meta_path, read_prices, write_prices


def prices_of(ticker: str = "AAPL", rows: int = 60, seed: int = 0, start: str = "2024-01-02") -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    index = sessions_between(ticker, pd.Timestamp(start), pd.Timestamp(start) + pd.Timedelta(days=2 * rows))[:rows]
    close = np.round(100.0 * np.exp(np.cumsum(draw.normal(0.0, 0.01, len(index)))), 2)
    opening = np.round(close * np.exp(draw.normal(0.0, 0.005, len(index))), 2)
    high = np.round(np.maximum(close, opening) + draw.uniform(0.01, 1.0, len(index)), 2)
    low = np.round(np.minimum(close, opening) - draw.uniform(0.01, 1.0, len(index)), 2)
    volume = draw.integers(1_000, 9_000_000, len(index)).astype(float)
    table = np.stack([opening, high, low, close, volume], axis=1)
    return pd.DataFrame(table, index=index.rename("Date"), columns=["Open", "High", "Low", "Close", "Volume"])


def rows_of(
    frame: pd.DataFrame,
    line: Callable[[pd.Timestamp, float, float, float, float, int], str],
    newest_first: bool = False,
) -> str:
    lines = [line(day, o, h, lo, c, int(v)) for day, o, h, lo, c, v in frame.itertuples()]
    return "\n".join(lines[::-1] if newest_first else lines) + "\n"


def comma(value: float) -> str:
    """German: 1.234,50"""
    return f"{value:,.2f}".translate(str.maketrans(",.", ".,"))


def in_utc(day: pd.Timestamp) -> pd.Timestamp:
    return day.tz_localize("America/New_York").tz_convert("UTC")


LAYOUTS: dict[str, Callable[[pd.DataFrame], str | bytes]] = {
    "Nasdaq": lambda f: "Date,Close/Last,Volume,Open,High,Low\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%m/%d/%Y},${c:.2f},{v},${o:.2f},${h:.2f},${lo:.2f}", True),
    "Investing.com": lambda f: '"Date","Price","Open","High","Low","Vol.","Change %"\n' + rows_of(
        f, lambda d, o, h, lo, c, v: f'"{d:%m/%d/%Y}","{c:,.2f}","{o:,.2f}","{h:,.2f}","{lo:,.2f}","{v / 1e6:.6f}M",1%',
        True),
    "Investing.com, words": lambda f: '"Date","Price","Open","High","Low","Vol.","Change %"\n' + rows_of(
        f, lambda d, o, h, lo, c, v: f'"{d:%b %d, %Y}",{c:.2f},{o:.2f},{h:.2f},{lo:.2f},{v / 1e3:.3f}K,-'),
    "Stooq": lambda f: "Date,Open,High,Low,Close,Volume\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d},{o},{h},{lo},{c},{v}"),
    "MetaTrader 5": lambda f: "<DATE>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%Y.%m.%d}\t{o}\t{h}\t{lo}\t{c}\t7\t{v}\t3"),
    "MetaTrader 4": lambda f: rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%Y.%m.%d},00:00,{o},{h},{lo},{c},{v}"),
    "Stooq's ASCII": lambda f: "<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>,<OPENINT>\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"AAPL,D,{d:%Y%m%d},000000,{o},{h},{lo},{c},{v},0"),
    "Alpaca": lambda f: "timestamp,symbol,open,high,low,close,volume,trade_count,vwap\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{in_utc(d)},AAPL,{o},{h},{lo},{c},{v},9,{c}"),
    "stamps of the close": lambda f: "time,open,high,low,close,volume\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{int((d + pd.Timedelta(hours=21)).timestamp())},{o},{h},{lo},{c},{v}"),
    "Alpha Vantage": lambda f: "timestamp,open,high,low,close,volume\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d},{o:.4f},{h:.4f},{lo:.4f},{c:.4f},{v}", True),
    "Google Finance": lambda f: "Date,Open,High,Low,Close,Volume\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d.month}/{d.day}/{d.year} 16:00:00,{o},{h},{lo},{c},{v}"),
    "Yahoo's page": lambda f: "Date\tOpen\tHigh\tLow\tClose*\tAdj Close**\tVolume\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%b %d, %Y}\t{o}\t{h}\t{lo}\t{c}\t{c}\t{v:,}", True).replace(
            "\n", "\nFeb 09, 2024\t0.24 Dividend\t\t\t\t\t\n", 1),
    "akshare": lambda f: "日期,股票代码,开盘,收盘,最高,最低,成交量,成交额\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d},AAPL,{o},{c},{h},{lo},{v},1.0"),
    "East Money, GBK": lambda f: ("日期,股票代码,名称,收盘价,最高价,最低价,开盘价,成交量\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d},AAPL,苹果,{c},{h},{lo},{o},{v}", True)).encode("gbk"),
    "baostock": lambda f: "date,code,open,high,low,close,preclose,volume,amount,adjustflag,turn\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d},AAPL,{o},{h},{lo},{c},{c},{v},1.0,3,0.5"),
    "tushare": lambda f: "ts_code,trade_date,open,high,low,close,pre_close,change,pct_chg,vol,amount\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"AAPL,{d:%Y%m%d},{o},{h},{lo},{c},{c},0,0,{v},1", True),
    "Kaggle": lambda f: "date,open,high,low,close,volume,Name\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d},{o},{h},{lo},{c},{v},AAPL"),
    "qlib": lambda f: "instrument,datetime,open,close,high,low,volume\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"AAPL,{d:%Y-%m-%d %H:%M:%S},{o},{c},{h},{lo},{v}"),
    "Excel in German": lambda f: ("Datum;Erster;Hoch;Tief;Schlusskurs;Stück\r\n" + rows_of(
        f, lambda d, *q: f"{d:%d.%m.%Y};" + ";".join(map(comma, q[:4])) + f";{q[4]}")).encode("cp1252"),
    "Excel with a preface and a sum": lambda f: "AAPL Historical Data\n\nDate,Open,High,Low,Close,Volume\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%d-%b-%y},{o},{h},{lo},{c},{v}") + "Average,1,1,1,1,1\n",
    "UTF-16 with tabs": lambda f: ("Date\tOpen\tHigh\tLow\tClose\tVolume\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%Y/%m/%d}\t{o}\t{h}\t{lo}\t{c}\t{v}")).encode("utf-16"),
    "day first": lambda f: "Date,Open,High,Low,Close,Volume\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d:%d/%m/%Y},{o},{h},{lo},{c},{v}"),
    "Chinese days": lambda f: "日期,开盘,最高,最低,收盘,成交量\n" + rows_of(
        f, lambda d, o, h, lo, c, v: f"{d.year}年{d.month}月{d.day}日,{o},{h},{lo},{c},{v}"),
    "pandas, an index without a name": lambda f: f.rename_axis("").to_csv(),
    "yfinance, price first": lambda f: pd.concat({"AAPL": f}, axis=1).swaplevel(axis=1).rename_axis(
        columns=["Price", "Ticker"]).to_csv(),
    "yfinance, ticker first": lambda f: pd.concat({"AAPL": f}, axis=1).rename_axis(
        columns=["Ticker", "Price"]).to_csv(),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), rows=st.integers(20, 70))
def test_a_clean_table_in_any_layout_is_the_same_table(
    name: str, seed: int, rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    frame = prices_of(rows=rows, seed=seed)
    content = LAYOUTS[name](frame)
    path = tmp_path_factory.mktemp("layout") / "AAPL.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    read = read_prices(path)
    assert list(read) == ["AAPL"]
    pd.testing.assert_frame_equal(read["AAPL"], frame, check_freq=False, rtol=1e-12)


def test_binance_klines_without_a_header(tmp_path: Path) -> None:
    frame = prices_of("BTC-USD", 40)
    text = rows_of(frame, lambda d, o, h, lo, c, v: f"{int(d.timestamp() * 1000)},{o},{h},{lo},{c},{v},1,2,3,4,5,0")
    (tmp_path / "BTCUSDT.csv").write_text(text)
    read = read_prices(tmp_path / "BTCUSDT.csv")["BTCUSDT"]
    pd.testing.assert_frame_equal(read, frame, check_freq=False)
    assert exchange_of("BTCUSDT") == "24/7"


def test_two_tickers_of_yfinance_with_holes(tmp_path: Path) -> None:
    one, other = prices_of(seed=1), prices_of(seed=2).iloc[10:]
    table = pd.concat({"AAA": one, "BBB": other}, axis=1).swaplevel(axis=1).rename_axis(columns=["Price", "Ticker"])
    table.to_csv(tmp_path / "two.csv")
    read = read_prices(tmp_path / "two.csv")
    assert list(read) == ["AAA", "BBB"]
    pd.testing.assert_frame_equal(read["BBB"], other, check_freq=False)


def test_an_adjusted_close_adjusts_all_four(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = prices_of()
    raw = frame.copy()
    raw.iloc[:30, :4] *= 2.0
    raw.insert(4, "Adj Close", frame["Close"])
    raw.to_csv(tmp_path / "QZX.csv")
    read = read_prices(tmp_path / "QZX.csv")["QZX"]
    pd.testing.assert_frame_equal(read, frame, check_freq=False)
    assert "adjusted by its column of adjusted closes" in capsys.readouterr().out
    kept = read_prices(tmp_path / "QZX.csv", reading=ReadingSettings(adjust="none"))["QZX"]
    pd.testing.assert_frame_equal(kept, raw.drop(columns="Adj Close"), check_freq=False)


def test_splits_adjust_the_days_before_them(tmp_path: Path) -> None:
    frame = prices_of()
    raw = frame.copy()
    raw.iloc[:20, :4] *= 10.0
    raw["Stock Splits"] = 0.0
    raw.iloc[20, 5] = 10.0
    raw.to_csv(tmp_path / "QZX.csv")
    read = read_prices(tmp_path / "QZX.csv")["QZX"]
    pd.testing.assert_frame_equal(read, frame, check_freq=False)


@pytest.mark.parametrize("factor", [0.1, 0.01, 2.0])
def test_a_jump_is_named_with_its_date_and_mended_when_asked(
    factor: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = prices_of()
    jumped = frame.copy()
    jumped.iloc[40:, :4] *= factor
    jumped.to_csv(tmp_path / "QZX.csv")
    read_prices(tmp_path / "QZX.csv")
    said = capsys.readouterr().err
    assert f"{frame.index[40]:%Y-%m-%d}" in said
    assert "--mend_jumps" in said
    mended = read_prices(tmp_path / "QZX.csv", reading=ReadingSettings(mend_jumps=True))["QZX"]
    np.testing.assert_allclose(mended["Close"], jumped["Close"].iloc[-1] / frame["Close"].iloc[-1] * frame["Close"])


def test_a_close_adjusted_alone_is_recognised(tmp_path: Path) -> None:
    frame = prices_of()
    frame["Close"] *= 0.9
    frame.to_csv(tmp_path / "QZX.csv")
    with pytest.raises(UserError, match="the close alone lies outside"):
        read_prices(tmp_path / "QZX.csv")


def test_halted_days_stand_at_their_close(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = prices_of()
    frame.iloc[5, :3] = 0.0
    frame.iloc[5, 4] = 0.0
    frame.to_csv(tmp_path / "QZX.csv")
    read = read_prices(tmp_path / "QZX.csv")["QZX"]
    assert (read.iloc[5, :4] == frame["Close"].iloc[5]).all()
    assert "1 halted days" in capsys.readouterr().out


def test_no_volume_is_zero(tmp_path: Path) -> None:
    prices_of().drop(columns="Volume").to_csv(tmp_path / "QZX.csv")
    assert (read_prices(tmp_path / "QZX.csv")["QZX"]["Volume"] == 0).all()


def test_dates_in_two_readings_are_asked_about(tmp_path: Path) -> None:
    days = ["01/02/2024", "02/02/2024", "05/02/2024"]
    rows = "".join(f"{day},10,12,9,11,100\n" for day in days[:1])
    (tmp_path / "QZX.csv").write_text("Date,Open,High,Low,Close,Volume\n" + rows)
    with pytest.raises(UserError, match=r"2024-01-02 or 2024-02-01.*--date_format"):
        read_prices(tmp_path / "QZX.csv")
    read = read_prices(tmp_path / "QZX.csv", reading=ReadingSettings(date_format="%d/%m/%Y"))
    assert read["QZX"].index[0] == pd.Timestamp("2024-02-01")


@pytest.mark.parametrize(("rule", "kind"), [("W-MON", "weeks"), ("MS", "months")])
def test_weeks_and_months_are_refused(rule: str, kind: str, tmp_path: Path) -> None:
    frame = prices_of(rows=40)
    frame.index = pd.date_range("2018-01-01", periods=40, freq=rule, name="Date")
    frame.to_csv(tmp_path / "QZX.csv")
    with pytest.raises(UserError, match=f"are {kind}.*--interval 1d"):
        read_prices(tmp_path / "QZX.csv")


def test_several_bars_a_day_are_refused(tmp_path: Path) -> None:
    stamps = pd.date_range("2024-01-02 09:30", periods=60, freq="30min")
    frame = prices_of(rows=60)
    frame.index = stamps.rename("Date")
    frame.to_csv(tmp_path / "QZX.csv")
    with pytest.raises(UserError, match="time of day"):
        read_prices(tmp_path / "QZX.csv")


@pytest.mark.parametrize(
    ("ticker", "exchange"),
    [
        ("SH600519", "XSHG"),
        ("sh.600519", "XSHG"),
        ("600519.XSHG", "XSHG"),
        ("000001.XSHE", "XSHG"),
        ("600519.SH", "XSHG"),
        ("SHSE.600519", "XSHG"),
        ("00700", "XHKG"),
        ("HK00700", "XHKG"),
        ("700 HK Equity", "XHKG"),
        ("7203 JP Equity", "XTKS"),
        ("TYO:7203", "XTKS"),
        ("AAPL US Equity", "XNYS"),
        ("NASDAQ:AAPL", "XNYS"),
        ("AAPL.US", "XNYS"),
        ("VOD LN", "XLON"),
        ("BTCUSDT", "24/7"),
        ("BTC/USDT", "24/7"),
        ("BTCUSD", "24/7"),
        ("ETH_BTC", "24/7"),
        ("BRK/B", "XNYS"),
        ("MSFT", "XNYS"),
    ],
)
def test_codes_of_other_vendors_name_their_exchange(ticker: str, exchange: str) -> None:
    assert named_exchange(ticker) == exchange


@pytest.mark.parametrize(
    ("name", "like", "exchange"),
    [
        ("7203", "7203.T", "XTKS"),
        ("0005", "0005.HK", "XHKG"),
        ("2330", "2330.TW", "XTAI"),
        ("005930", "005930.KS", "XKRX"),
        ("600519", "600519.SS", "XSHG"),
        ("COIN", "BTC-USD", "24/7"),
    ],
)
def test_the_rows_tell_the_exchange(name: str, like: str, exchange: str, tmp_path: Path) -> None:
    frame = prices_of(like, 240)
    frame.to_csv(tmp_path / f"{name}.csv")
    read_prices(tmp_path / f"{name}.csv")
    assert exchange_of(name) == exchange
    last = frame.index[-1]
    assert next_sessions(name, last, 3).equals(next_sessions(like, last, 3))


def test_a_given_exchange_wins(tmp_path: Path) -> None:
    prices_of(rows=240).to_csv(tmp_path / "X.csv")
    read_prices(tmp_path / "X.csv", reading=ReadingSettings(exchange="XTKS"))
    assert exchange_of("X") == "XTKS"
    with pytest.raises(UserError, match="no such calendar"):
        read_prices(tmp_path / "X.csv", reading=ReadingSettings(exchange="MARS"))


def test_days_that_fit_two_exchanges_are_asked_about(tmp_path: Path) -> None:
    prices_of("SAP.DE", 240).to_csv(tmp_path / "SAP.csv")
    with pytest.raises(UserError, match=r"sessions of XETR.*--exchange"):
        read_prices(tmp_path / "SAP.csv")
    assert len(read_prices(tmp_path / "SAP.csv", reading=ReadingSettings(exchange="XETR"))["SAP"]) == 240


def test_an_assigned_exchange_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assign_exchange("QZX", "XTKS")
    assert next_sessions("QZX", dt.date(2024, 2, 22), 1)[0] == pd.Timestamp(
        "2024-02-26"
    )  # the emperor's birthday between


def test_convert_writes_a_table_that_reads_back(tmp_path: Path, call_script: Callable) -> None:
    frame = prices_of("7203.T", 240)
    text = LAYOUTS["Nasdaq"](frame)
    assert isinstance(text, str)
    (tmp_path / "HistoricalData.csv").write_text(text)
    done = call_script(
        "download.py", "--convert", "HistoricalData.csv", "--ticker", "QZX", "--output", "QZX.csv",
        "--exchange", "XTKS", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dates month first" in done.stdout
    read = read_prices(tmp_path / "QZX.csv")
    pd.testing.assert_frame_equal(read["QZX"], frame, check_freq=False)
    assert exchange_of("QZX") == "XTKS"  # as the sidecar says
    again = call_script("download.py", "--convert", "QZX.csv", "--output", "QZX.csv", cwd=tmp_path)
    assert again.returncode == 2
    assert "same file" in again.stderr


@pytest.mark.parametrize(("cell", "ratio"), [("4", 4.0), ("4:1", 4.0), ("4/1", 4.0), ("1:10", 0.1), ("0.1", 0.1)])
def test_a_split_as_it_may_be_written(cell: str, ratio: float, tmp_path: Path) -> None:
    frame = prices_of()
    raw = frame.copy()
    raw.iloc[:30, :4] *= ratio  # what was quoted before the split
    table = raw.reset_index().assign(**{"Stock Splits": [cell if row == 30 else "0" for row in range(len(raw))]})
    table.to_csv(tmp_path / "AAPL.csv", index=False)
    (read,) = read_prices(tmp_path / "AAPL.csv").values()
    np.testing.assert_allclose(read["Close"], frame["Close"], rtol=1e-9)


def test_a_split_that_is_none_is_refused(tmp_path: Path) -> None:
    table = prices_of().reset_index().assign(**{"Stock Splits": "0"})
    table.loc[4, "Stock Splits"] = "four"
    table.to_csv(tmp_path / "AAPL.csv", index=False)
    with pytest.raises(UserError, match=r"row 6, column Split: 'four' is no split; write it like 4, 4:1 or 0, or give"):
        read_prices(tmp_path / "AAPL.csv")
    (read,) = read_prices(tmp_path / "AAPL.csv", reading=ReadingSettings(adjust="none")).values()
    assert len(read) == 60


@pytest.mark.parametrize("rows", [4, 5, 30])
def test_a_share_that_does_not_move_at_the_end_is_told(
    rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = prices_of()
    frame.iloc[-rows:, :4] = frame["Close"].iloc[-rows]
    frame.to_csv(tmp_path / "AAPL.csv")
    read_prices(tmp_path / "AAPL.csv")
    told = capsys.readouterr().err
    assert (f"AAPL has not moved in its last {rows} rows, since {frame.index[-rows]:%Y-%m-%d}" in told) == (rows >= 5)


def test_an_exchange_that_a_sidecar_makes_up_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "AAPL.csv"
    write_prices({"AAPL": prices_of()}, path, {"source": "t", "adjust": "all", "interval": "1d"})
    meta = json.loads(meta_path(path).read_text())
    meta_path(path).write_text(json.dumps({**meta, "exchanges": {"AAPL": "MARS"}}))
    with pytest.raises(UserError, match="AAPL.csv: the exchange MARS of its sidecar: no such calendar; give one of"):
        read_prices(path)


@pytest.mark.parametrize("text", ['Date,Open\n"2024-01-02,1\n' + "2024-01-03,1\n" * 20000, 'a;b\n"' + "x" * 200_000])
def test_a_quotation_mark_that_is_not_closed_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "AAPL.csv").write_text(text)
    with pytest.raises(UserError):
        read_prices(tmp_path / "AAPL.csv")


@pytest.mark.parametrize(
    "flag", [["--exchange", "XSHG"], ["--date_format", "%d"], ["--mend_jumps"], ["--drop_bad_rows"]]
)
def test_how_files_are_read_is_no_word_to_a_download(flag: list[str], tmp_path: Path, call_script: Callable) -> None:
    result = call_script("download.py", "--source", "sample", "--ticker", "AAPL", *flag, cwd=tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert f"{flag[0]} is for --convert, which reads a file" in result.stderr
