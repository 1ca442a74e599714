"""Files as vendors write them, each with its name, encoding and odd columns: the table behind them is what is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stocklora.cli.console import UserError
from stocklora.prices.calendar import sessions_between
from stocklora.prices.exchanges import exchange_of
from stocklora.prices.tables import read_prices

Row = Callable[[pd.Timestamp, float, float, float, float, int], str]
NEW_YORK = "America/New_York"


def prices_of(ticker: str, rows: int = 45) -> pd.DataFrame:
    draw = np.random.default_rng(7)
    index = sessions_between(ticker, pd.Timestamp("2024-01-02"), pd.Timestamp("2024-06-01"))[:rows]
    close = np.round(1200.0 * np.exp(np.cumsum(draw.normal(0.0, 0.01, rows))), 2)
    opening = np.round(close * np.exp(draw.normal(0.0, 0.005, rows)), 2)
    high = np.round(np.maximum(close, opening) + draw.uniform(0.01, 9.0, rows), 2)
    low = np.round(np.minimum(close, opening) - draw.uniform(0.01, 9.0, rows), 2)
    volume = draw.integers(1_000, 9_000_000, rows).astype(float)
    table = np.stack([opening, high, low, close, volume], axis=1)
    return pd.DataFrame(table, index=index.rename("Date"), columns=["Open", "High", "Low", "Close", "Volume"])


def comma(value: float) -> str:
    """1.234,50"""
    return f"{value:,.2f}".translate(str.maketrans(",.", ".,"))


def seconds(day: pd.Timestamp, hours: float = 0.0, zone: str = "UTC") -> int:
    return int((day + pd.Timedelta(hours=hours)).tz_localize(zone).timestamp())


# name -> ticker whose days they are, file name, encoding, header and what stands before it, row, newest first
VENDORS: dict[str, tuple[str, str, str, str, Row, bool]] = {
    "Bloomberg": ("AAPL", "AAPL.csv", "utf-8",
        "Security,AAPL US Equity\nStart,1/2/2024\nCurrency,USD\n\nDates,PX_OPEN,PX_HIGH,PX_LOW,PX_LAST,PX_VOLUME\n",
        lambda d, o, h, lo, c, v: f"{d.month}/{d.day}/{d.year},{o},{h},{lo},{c},{v}", True),
    "Polygon": ("AAPL", "AAPL.csv", "utf-8", "v,vw,o,c,h,l,t,n\n",
        lambda d, o, h, lo, c, v: f"{v},{c},{o},{c},{h},{lo},{1000 * seconds(d, zone=NEW_YORK)},100", False),
    "Finnhub": ("AAPL", "AAPL.csv", "utf-8", "c,h,l,o,s,t,v\n",
        lambda d, o, h, lo, c, v: f"{c},{h},{lo},{o},ok,{seconds(d)},{v}", False),
    "Tiingo": ("AAPL", "AAPL.csv", "utf-8",
        "date,close,high,low,open,volume,adjClose,adjHigh,adjLow,adjOpen,adjVolume\n",
        lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d}T00:00:00.000Z,{2 * c},{2 * h},{2 * lo},{2 * o},{v},{c},{h},{lo},{o},1",
        False),
    "Refinitiv": ("AAPL", "AAPL.csv", "utf-8",
        "Exchange Date,Close,Net,%Chg,Open,Low,High,Volume,Turnover - USD,Flow\n",
        lambda d, o, h, lo, c, v: f"{d:%d-%b-%Y},{c},0.1,+0.2%,{o},{lo},{h},{v},1,1", True),
    "TradingView": ("AAPL", "AAPL.csv", "utf-8", "time,open,high,low,close,Volume,Volume MA\n",
        lambda d, o, h, lo, c, v: f"{seconds(d, 9.5, NEW_YORK)},{o},{h},{lo},{c},{v},1", False),
    "Dukascopy": ("AAPL", "AAPL.csv", "utf-8", "Gmt time,Open,High,Low,Close,Volume\n",
        lambda d, o, h, lo, c, v: f"{d:%d.%m.%Y} 00:00:00.000,{o},{h},{lo},{c},{v}", False),
    "MetaTrader 5": ("AAPL", "AAPL.csv", "utf-8",
        "<DATE>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>\n",
        lambda d, o, h, lo, c, v: f"{d:%Y.%m.%d}\t{o}\t{h}\t{lo}\t{c}\t{v}\t0\t1", False),
    "Stooq, bulk": ("AAPL", "aapl.us.txt", "utf-8",
        "<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>,<OPENINT>\n",
        lambda d, o, h, lo, c, v: f"AAPL.US,D,{d:%Y%m%d},000000,{o},{h},{lo},{c},{v},0", False),
    "HistData": ("AAPL", "AAPL.csv", "utf-8", "",
        lambda d, o, h, lo, c, v: f"{d:%Y%m%d} 000000;{o};{h};{lo};{c};{v}", False),
    "Kibot": ("AAPL", "AAPL.txt", "utf-8", "", lambda d, o, h, lo, c, v: f"{d:%m/%d/%Y},{o},{h},{lo},{c},{v}", False),
    "FirstRate": ("AAPL", "AAPL.txt", "utf-8", "",
        lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d} 00:00:00,{o},{h},{lo},{c},{v}", False),
    "printed by pandas": ("AAPL", "AAPL.txt", "utf-8", "      Date    Open    High     Low   Close   Volume\n",
        lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d}  {o:8.2f}  {h:8.2f}  {lo:8.2f}  {c:8.2f}  {v:9d}", False),
    "CRSP": ("AAPL", "crsp.csv", "utf-8", "PERMNO,date,TICKER,BIDLO,ASKHI,PRC,VOL,OPENPRC\n",
        lambda d, o, h, lo, c, v: f"14593,{d:%Y%m%d},AAPL,{lo},{h},{c},{v},{o}", False),
    "NSE": ("RELIANCE.NS", "RELIANCE.NS.csv", "utf-8",
        '"Date ","series ","OPEN ","HIGH ","LOW ","PREV. CLOSE ","ltp ","close ","vwap ","VOLUME ","VALUE "\n',
        lambda d, o, h, lo, c, v:
        f'"{d:%d-%b-%Y}","EQ","{o:,}","{h:,}","{lo:,}","9","{c:,}","{c:,}","9","{v:,}","1"', True),
    "BSE": ("RELIANCE.BO", "RELIANCE.BO.csv", "utf-8",
        "Date,Open Price,High Price,Low Price,Close Price,WAP,No.of Shares,No. of Trades,Total Turnover (Rs.)\n",
        lambda d, o, h, lo, c, v: f"{d.day}-{d:%B}-{d.year},{o},{h},{lo},{c},{c},{v},3,4", True),
    "CryptoDataDownload": ("BTC-USD", "Bitstamp_BTCUSD_d.csv", "utf-8",
        "https://www.CryptoDataDownload.com\nunix,date,symbol,open,high,low,close,Volume BTC,Volume USD\n",
        lambda d, o, h, lo, c, v: f"{seconds(d)},{d:%Y-%m-%d} 00:00:00,BTC/USD,{o},{h},{lo},{c},{v},9", True),
    "CoinMarketCap": ("BTC-USD", "Bitcoin.csv", "utf-8",
        "timeOpen;timeClose;timeHigh;timeLow;name;open;high;low;close;volume;marketCap;timestamp\n",
        lambda d, o, h, lo, c, v: f'"{d:%Y-%m-%d}T00:00:00.000Z";"9";"9";"9";"2781";{o};{h};{lo};{c};{v};1;'
        f'"{d:%Y-%m-%d}T23:59:59.999Z"', True),
    "Coinbase": ("BTC-USD", "BTC-USD.csv", "utf-8", "time,low,high,open,close,volume\n",
        lambda d, o, h, lo, c, v: f"{seconds(d)},{lo},{h},{o},{c},{v}", True),
    "J-Quants": ("7203.T", "7203.csv", "utf-8",
        "Date,Open,High,Low,Close,UpperLimit,LowerLimit,Volume,AdjustmentFactor,AdjustmentOpen,AdjustmentClose\n",
        lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d},{2 * o},{2 * h},{2 * lo},{2 * c},0,0,{v},1.0,{o},{c}", False),
    "KRX": ("005930.KS", "005930.csv", "cp949", "일자,종가,대비,등락률,시가,고가,저가,거래량,거래대금\n",
        lambda d, o, h, lo, c, v: f'"{d:%Y/%m/%d}","{c}","1","1","{o}","{h}","{lo}","{v}","1"', True),
    "TWSE": ("2330.TW", "2330.TW.csv", "big5", "日期,成交股數,成交金額,開盤價,最高價,最低價,收盤價,漲跌價差,成交筆數\n",
        lambda d, o, h, lo, c, v: f'{d.year - 1911}/{d:%m/%d},"{v:,}",1,"{o:,}","{h:,}","{lo:,}","{c:,}",+1,3', False),
    "Yahoo Japan": ("7203.T", "7203.T.csv", "cp932", "日付,始値,高値,安値,終値,出来高\n",
        lambda d, o, h, lo, c, v: f'{d.year}年{d.month}月{d.day}日,"{o:,}","{h:,}","{lo:,}","{c:,}","{v:,}"', True),
    "TDX": ("600519.SS", "SH#600519.txt", "gbk",
        "600519 贵州茅台 日线 前复权\n      日期\t    开盘\t    最高\t    最低\t    收盘\t    成交量\t    成交额\n",
        lambda d, o, h, lo, c, v: f"{d:%Y/%m/%d}\t{o}\t{h}\t{lo}\t{c}\t{v}\t1.00", False),
    "THS": ("600519.SS", "600519.csv", "gbk", "时间\t开盘\t最高\t最低\t收盘\t涨幅\t振幅\t总手\t金额\n",
        lambda d, o, h, lo, c, v:
        f"{d:%Y-%m-%d},{'一二三四五六日'[d.weekday()]}\t{o}\t{h}\t{lo}\t{c}\t1%\t2%\t{v:,}\t1", False),
    "CSMAR": ("600519.SS", "TRD_Dalyr.csv", "utf-8", "Stkcd,Trddt,Opnprc,Hiprc,Loprc,Clsprc,Dnshrtrd,Dnvaltrd\n",
        lambda d, o, h, lo, c, v: f"600519,{d:%Y-%m-%d},{o},{h},{lo},{c},{v},1", False),
    "qlib": ("600519.SS", "qlib.csv", "utf-8", "instrument,datetime,$open,$close,$high,$low,$volume,$factor\n",
        lambda d, o, h, lo, c, v: f"SH600519,{d:%Y-%m-%d},{o},{c},{h},{lo},{v},0.5", False),
    "Ariva": ("SAP.DE", "SAP.DE.csv", "utf-8", "Datum;Erster;Hoch;Tief;Schlusskurs;Stuecke;Volumen\n",
        lambda d, o, h, lo, c, v: f"{d:%Y-%m-%d};{comma(o)};{comma(h)};{comma(lo)};{comma(c)};{v};1", True),
    "Börse Frankfurt": ("SAP.DE", "SAP.DE.csv", "cp1252",
        "Datum;Open;Tageshoch;Tagestief;Schluss;Stückumsatz;Euroumsatz\n",
        lambda d, o, h, lo, c, v: f"{d:%d.%m.%y};{comma(o)};{comma(h)};{comma(lo)};{comma(c)};{v};1", True),
    "Euronext": ("SAP.DE", "SAP.DE.csv", "utf-8",
        '"Historical Data"\n"From 2024-01-02 to 2024-06-01"\nDate;Open;High;Low;Last;Close;"Number of Shares";vwap\n',
        lambda d, o, h, lo, c, v: f"{d:%d/%m/%Y};{o};{h};{lo};{c};{c};{v};1", True),
}  # fmt: skip


@pytest.mark.parametrize("vendor", VENDORS)
def test_table_of(vendor: str, tmp_path: Path) -> None:
    ticker, name, encoding, before, row, newest_first = VENDORS[vendor]
    frame = prices_of(ticker)
    lines = [row(day, o, h, lo, c, int(v)) for day, o, h, lo, c, v in frame.itertuples()]
    text = before + "\n".join(lines[::-1] if newest_first else lines) + "\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    ((named, read),) = read_prices(tmp_path / name).items()
    pd.testing.assert_frame_equal(read, frame, check_freq=False, check_index_type=False, rtol=1e-12)
    assert exchange_of(named) == exchange_of(ticker)


@pytest.mark.parametrize("order", ["open,low,high,close", "high,open,low,close", "low,high,open,close"])
def test_without_a_header_no_order_is_guessed(order: str, tmp_path: Path) -> None:
    """Only one order is recognised; a table in another is refused with a word about its header."""
    frame = prices_of("AAPL")[[name.title() for name in order.split(",")]]
    frame.to_csv(tmp_path / "AAPL.csv", header=False)
    with pytest.raises(UserError, match="missing columns|there is no header"):
        read_prices(tmp_path / "AAPL.csv")
