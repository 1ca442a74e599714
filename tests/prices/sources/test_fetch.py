"""Sources in general: bundled prices, patience with a source that refuses, the day's cache, and A-shares."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from source_tree import REPO_ROOT

from stocklora.cli.console import UserError
from stocklora.prices.sources import fetch as fetching
from stocklora.prices.sources.ashares import AkshareSource
from stocklora.prices.sources.fetch import PriceCache, bundled_prices, fetch_all, fetch_prices, sample_prices
from stocklora.prices.sources.request import (
    Answer,
    DownloadSettings,
    Request,
    SourceError,
    clean_bars,
    period_start,
    request_of,
    tickers_of,
)
from stocklora.prices.tables import meta_path, read_prices, validated

UTC = dt.UTC
RECORDED = REPO_ROOT / "tests" / "fixtures" / "recorded"


def answer(days: int = 5, fresh_for_s: float = 3600) -> Answer:
    index = pd.bdate_range("2024-01-01", periods=days, name="Date", unit="ns")
    columns = {"Open": 10.0, "High": 11.0, "Low": 9.0, "Close": 10.5, "Volume": 100.0}
    now = dt.datetime.now(UTC)
    frame = pd.DataFrame(columns, index=index)
    return Answer(
        frame,
        now,
        "America/New_York",
        "USD",
        {"empty": 1},
        {"2024-01-02": 2.0},
        now + dt.timedelta(seconds=fresh_for_s),
    )


class Scripted:
    """A source that answers as it is told: ``plans[ticker]`` is a list of errors before the answer."""

    name = "scripted"

    def __init__(self, plans: dict[str, list[SourceError]] | None = None) -> None:
        self.plans = plans or {}
        self.asked: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def fetch(self, ticker: str, request: Request) -> Answer:
        with self.lock:
            self.asked.append(ticker)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            error = self.plans[ticker].pop(0) if self.plans.get(ticker) else None
        time.sleep(0.01)
        with self.lock:
            self.at_once -= 1
        if error is not None:
            raise error
        return answer()


def ask(source: Scripted, tickers: list[str], retries: int = 3) -> tuple[dict, dict]:
    return fetch_all(source, dict.fromkeys(tickers, Request()), cache=None, retries=retries, wait_s=0.01)


# ---------------------------------------------------------------------------------------------- bundled


def test_the_bundled_table_is_whole() -> None:
    frames = bundled_prices()
    for ticker, frame in frames.items():
        validated(frame, ticker)
    assert list(frames) == ["AAPL", "FB", "GOOG", "IBM", "MSFT"]


def test_bundled_days_are_counted_from_the_last_or_between_two() -> None:
    frames, meta = sample_prices("AAPL")
    assert len(frames["AAPL"]) == 250
    assert (meta["source"], meta["adjust"]) == ("sample", "all")
    older, _ = sample_prices(["MSFT", "AAPL"], start="2010-01-01", end="2011-01-01")
    assert list(older) == ["MSFT", "AAPL"]
    assert older["AAPL"].index[0] == pd.Timestamp("2010-01-04")
    assert older["AAPL"].index[-1] == pd.Timestamp("2010-12-31")
    assert sample_prices("msft", "max")[0]["MSFT"].index[-1] == pd.Timestamp("2013-03-01")


def test_bundled_prices_are_what_download_settings_get() -> None:
    frames, _ = fetch_prices(DownloadSettings(source="sample", ticker=["GOOG"], period="5d"))
    assert len(frames["GOOG"]) == 5


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("period", "first"),
    [("5d", "2025-10-24"), ("2wk", "2025-10-17"), ("6mo", "2025-04-30"), ("1y", "2024-10-31"), ("ytd", "2024-12-31")],
)
def test_periods(period: str, first: str) -> None:
    assert period_start(period, pd.Timestamp("2025-10-31")) == pd.Timestamp(first)


def test_tickers_from_words_and_files(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("\ufeffaapl, msft;ibm\n\n# all of it\n600519.ss  # Moutai\nAAPL\n", encoding="utf-8")
    assert tickers_of([str(file), "ibm", "^gspc"]) == ["AAPL", "MSFT", "IBM", "600519.SS", "^GSPC"]
    assert tickers_of(None) == ["AAPL"]
    assert tickers_of(["AAPL,MSFT"]) == ["AAPL", "MSFT"]
    file.write_text("AAPL\nnot/a/ticker\n")
    with pytest.raises(UserError, match=r"list\.txt, row 2: 'not/a/ticker' is no ticker"):
        tickers_of([str(file)])
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="no ticker in it"):
        tickers_of([str(file)])


def test_request_takes_days_and_adjustment() -> None:
    request = request_of(DownloadSettings(start="2024-01-02", end="2024-02-01", adjust="splits", interval="1wk"))
    assert request == Request("1y", dt.date(2024, 1, 2), dt.date(2024, 2, 1), "1wk", "splits")


# ---------------------------------------------------------------------------------------------- patience


def test_answers_keep_the_order_and_few_are_in_flight() -> None:
    source = Scripted()
    tickers = [f"T{i}" for i in range(25)]
    answers, failures = ask(source, tickers)
    assert list(answers) == tickers
    assert not failures
    assert source.most_at_once <= fetching.AT_ONCE


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(fetching.Patience, "hold", lambda self, seconds: waits.append(seconds))
    source = Scripted({"A": [SourceError("rate", "429")] * 4})
    answers, _ = fetch_all(source, {"A": Request()}, cache=None, retries=4, wait_s=2.0)
    assert list(answers) == ["A"]
    assert source.asked == ["A"] * 5
    for place, wait in enumerate(waits):
        assert 0.5 * 2 * 2**place <= wait <= 1.5 * 2 * 2**place
    assert len(set(waits)) == 4


def test_a_source_that_names_its_wait_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(fetching.Patience, "hold", lambda self, seconds: waits.append(seconds))
    ask(Scripted({"A": [SourceError("rate", "429", wait_s=33), SourceError("rate", "429", wait_s=9999)]}), ["A"])
    assert waits == [33, fetching.LONGEST_WAIT_S]


def test_what_asking_again_cannot_change_is_asked_once() -> None:
    source = Scripted({"BAD": [SourceError("unknown", "no such ticker")] * 9})
    answers, failures = ask(source, ["A", "BAD", "B"])
    assert list(answers) == ["A", "B"]
    assert {ticker: str(error) for ticker, error in failures.items()} == {"BAD": "no such ticker"}
    assert source.asked.count("BAD") == 1


def test_a_fault_of_one_ticker_is_its_own() -> None:
    source = Scripted({"BAD": [SourceError("server", "500")] * 99})
    answers, failures = ask(source, ["BAD", *"ABCDEFGH"], retries=2)
    assert list(answers) == list("ABCDEFGH")
    assert source.asked.count("BAD") == 3
    assert list(failures) == ["BAD"]


@pytest.mark.parametrize(("kind", "tries"), [("rate", 3), ("network", 2)])
def test_a_closed_door_is_not_knocked_on_for_every_ticker(kind: str, tries: int) -> None:
    tickers = [f"T{i}" for i in range(40)]
    source = Scripted({ticker: [SourceError(kind, "closed")] * 99 for ticker in tickers})
    answers, failures = ask(source, tickers, retries=2)
    assert not answers
    assert list(failures) == tickers
    assert len(source.asked) <= fetching.AT_ONCE * tries
    assert "not tried, since: closed" in str(failures[tickers[-1]])


def test_a_fault_of_ours_is_not_swallowed() -> None:
    class Faulty(Scripted):
        def fetch(self, ticker: str, request: Request) -> Answer:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(Faulty(), ["A", "B"])


def test_cleaning_counts_what_it_leaves_out() -> None:
    frame = answer(8).frame
    frame.iloc[0, 3] = np.nan
    frame.iloc[1, 0] = np.inf
    frame.iloc[2, 2] = -1
    frame.iloc[3, 1] = 8.0  # high below low
    frame.iloc[4, 0] = 12.0  # open above high
    frame.iloc[5, 4] = np.nan
    clean, counts = clean_bars(pd.concat([frame, frame.iloc[-1:]]))
    assert counts == {"empty": 2, "broken": 2, "widened": 1, "duplicate": 1}
    validated(clean, "X")
    assert clean["High"].tolist() == [12, 11, 11, 11]
    assert clean["Volume"].tolist() == [100, 0, 100, 100]


# ---------------------------------------------------------------------------------------------- cache


def test_cache_gives_back_the_answer_until_the_source_knows_more(tmp_path: Path) -> None:
    cache, kept = PriceCache(tmp_path), answer(fresh_for_s=3600)
    assert cache.get("yahoo", "AAPL", Request()) is None
    cache.put("yahoo", "AAPL", Request(), kept)
    found = cache.get("yahoo", "AAPL", Request())
    assert found.cached
    pd.testing.assert_frame_equal(found.frame, kept.frame, check_freq=False)
    assert (found.time, found.timezone, found.currency) == (kept.time, kept.timezone, kept.currency)
    assert (found.dropped, found.splits) == (kept.dropped, kept.splits)
    assert cache.get("yahoo", "AAPL", Request(), now=kept.time + dt.timedelta(seconds=3601)) is None
    for other in (("akshare", "AAPL", Request()), ("yahoo", "MSFT", Request()), ("yahoo", "AAPL", Request("2y"))):
        assert cache.get(*other) is None
    assert cache.get("yahoo", "AAPL", Request(adjust="none")) is None


@pytest.mark.parametrize("harm", ["table", "sidecar", "half", "other"])
def test_a_damaged_cache_is_a_missing_one(harm: str, tmp_path: Path) -> None:
    cache = PriceCache(tmp_path)
    cache.put("yahoo", "AAPL", Request(), answer())
    path = cache.path("yahoo", "AAPL", Request())
    if harm == "table":
        path.write_bytes(b"\x1f\x8bxxxx")
    elif harm == "sidecar":
        meta_path(path).write_text("{")
    elif harm == "half":
        path.unlink()
    else:
        meta_path(path).write_text('{"time": 3}')
    assert cache.get("yahoo", "AAPL", Request()) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "prices").write_text("a file where the folder should be")
    cache = PriceCache(tmp_path)
    cache.put("yahoo", "AAPL", Request(), answer())
    assert cache.get("yahoo", "AAPL", Request()) is None


def test_cached_tickers_are_not_asked_for(tmp_path: Path) -> None:
    source, cache = Scripted(), PriceCache(tmp_path)
    requests = dict.fromkeys(["A", "B"], Request())
    fetch_all(source, requests, cache=cache, retries=0, wait_s=0)
    answers, _ = fetch_all(source, {"C": Request(), **requests}, cache=cache, retries=0, wait_s=0)
    assert list(answers) == ["C", "A", "B"]
    assert sorted(source.asked) == ["A", "B", "C"]


# ---------------------------------------------------------------------------------------------- akshare


class Recorded:
    """akshare's one function that is used, answering with a table in its own columns and types."""

    def __init__(self, table: pd.DataFrame | Exception) -> None:
        self.table = table
        self.asked: dict = {}

    def stock_zh_a_hist(self, **options: object) -> pd.DataFrame:
        self.asked = options
        if isinstance(self.table, Exception):
            raise self.table
        return self.table


def recorded_table() -> pd.DataFrame:
    """As akshare builds it: dates as ``datetime.date``, volume in lots of 100 shares."""
    table = pd.read_csv(RECORDED / "akshare_600519_daily.csv", dtype={"股票代码": str})
    table["日期"] = pd.to_datetime(table["日期"]).dt.date
    return table


def akshare(table: pd.DataFrame | Exception) -> tuple[AkshareSource, Recorded]:
    source = AkshareSource.__new__(AkshareSource)
    source.akshare, source.timeout_s = Recorded(table), 5.0
    return source, source.akshare


def test_a_shares_become_the_same_table() -> None:
    source, api = akshare(recorded_table())
    request = Request(start=dt.date(2024, 9, 26), end=dt.date(2024, 10, 12), adjust="all")
    found = source.fetch("600519.SS", request)
    assert api.asked == {
        "symbol": "600519",
        "period": "daily",
        "start_date": "20240926",
        "end_date": "20241011",
        "adjust": "qfq",
        "timeout": 5.0,
    }
    frame = validated(found.frame, "600519.SS")
    first = recorded_table().iloc[0]
    assert frame.index[0] == pd.Timestamp(first["日期"])
    assert frame.iloc[0].tolist() == [first["开盘"], first["最高"], first["最低"], first["收盘"], first["成交量"] * 100]
    assert (found.timezone, found.currency) == ("Asia/Shanghai", "CNY")


@pytest.mark.parametrize("ticker", ["AAPL", "0700.HK", "60051", "600519.T"])
def test_other_markets_are_refused_by_name(ticker: str) -> None:
    with pytest.raises(SourceError, match="A-shares only") as caught:
        akshare(recorded_table())[0].fetch(ticker, Request())
    assert not caught.value.passing


def test_akshare_failures_have_names() -> None:
    for table, kind in (
        (pd.DataFrame(), "empty"),
        (recorded_table().drop(columns="收盘"), "refused"),
        (ConnectionError("no route"), "network"),
        (KeyError("data"), "server"),
    ):
        with pytest.raises(SourceError) as caught:
            akshare(table)[0].fetch("600519.SS", Request())
        assert caught.value.kind == kind
    with pytest.raises(UserError, match="no prices adjusted for splits alone"):
        akshare(recorded_table())[0].fetch("600519.SS", Request(adjust="splits"))


def test_the_running_day_of_shanghai_is_left_out() -> None:
    source, _ = akshare(recorded_table())
    last = pd.Timestamp(recorded_table()["日期"].iloc[-1])
    for hour, count in ((14, len(recorded_table()) - 1), (16, len(recorded_table()))):
        today = last + pd.Timedelta(hours=hour)
        now = today.tz_localize("Asia/Shanghai").tz_convert("UTC").to_pydatetime()
        found = source.answer(Request(), recorded_table(), today, now)
        assert len(found.frame) == count
        assert found.fresh_until > now


STUB = """
import pandas as pd
def stock_zh_a_hist(symbol, period, start_date, end_date, adjust, timeout):
    table = pd.read_csv(r"{path}", dtype={{"股票代码": str}})
    table["日期"] = pd.to_datetime(table["日期"]).dt.date
    return table
"""


def test_download_from_akshare(tmp_path: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    (tmp_path / "akshare.py").write_text(STUB.format(path=RECORDED / "akshare_600519_daily.csv"), encoding="utf-8")
    env = {"PYTHONPATH": str(tmp_path), "STOCKLORA_CACHE": str(tmp_path / "cache")}
    options = ("--source", "akshare", "--ticker", "600519.SS", "--start", "2024-09-26", "--end", "2024-10-12")
    result = run_script("download.py", *options, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert "from akshare" in result.stdout
    assert list(read_prices(tmp_path / "sample_test.csv")) == ["600519.SS"]


def test_akshare_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "akshare", None)
    with pytest.raises(UserError, match=r"pip install 'akshare"):
        fetch_prices(DownloadSettings(source="akshare", ticker=["600519.SS"]))
