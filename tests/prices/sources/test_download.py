"""download.py as a user runs it: the bundled prices, Yahoo (a local server that speaks for it), updates, failures."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from yahoo_server import BROKEN, TOO_MANY, Stock, YahooServer, made_up_bars, zone_at_noon

import download as script
from stocklora.prices.calendar import sessions_between
from stocklora.prices.tables import read_meta, read_prices

Run = Callable[..., "subprocess.CompletedProcess[str]"]
TODAY = pd.Timestamp.now().normalize()
QUICK = ("--retry_wait_s", "0.05")


def past_sessions(years: int = 2, skip: int = 2) -> pd.DatetimeIndex:
    return sessions_between("AAPL", TODAY - pd.DateOffset(years=years), TODAY - pd.Timedelta(days=skip))


@pytest.fixture
def download(server: YahooServer, tmp_path: Path, run_script: Run) -> Run:
    """``download.py`` in an empty folder, against the local server, with a cache of its own."""

    def run(*options: object, url: str = server.url) -> subprocess.CompletedProcess[str]:
        (tmp_path / "work").mkdir(exist_ok=True)
        env = {"STOCKLORA_YAHOO_URL": url, "STOCKLORA_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
        return run_script("download.py", *options, cwd=tmp_path / "work", env=env)

    return run


@pytest.fixture
def called(server: YahooServer, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same without a process of its own, for stories of many runs."""
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("STOCKLORA_YAHOO_URL", server.url)
    monkeypatch.setenv("STOCKLORA_CACHE", str(work.parent / "cache"))
    monkeypatch.setattr("stocklora.prices.sources.yahoo.SPACING_S", 0.0)

    def run(*options: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = script.main([str(option) for option in options])
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(list(options), code, printed.out, printed.err)

    return run


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


# ---------------------------------------------------------------------------------------------- bundled


def test_bundled_prices_need_no_network_and_say_they_are_old(download: Run, work: Path, server: YahooServer) -> None:
    result = download("--source", "sample", "--ticker", "AAPL", "--period", "1y", "--output", "sample_test.csv")
    assert result.returncode == 0, result.stderr
    assert "250 days, 2012-03-02 to 2013-03-01, from the bundled sample" in result.stdout
    age = (dt.date.today() - dt.date(2013, 3, 1)).days
    assert f"not fresh, its last day is {age} days ago" in result.stdout
    assert (work / "sample_test.csv").read_text().splitlines()[1] == (
        "2012-03-02,69.942425,70.271421,69.721381,70.063229,15418300"
    )
    meta = read_meta(work / "sample_test.csv")
    assert (meta["source"], meta["adjust"], meta["rows"]) == ("sample", "all", 250)
    assert not server.requests


def test_without_a_ticker_the_bundled_ones_are_listed_and_aapl_is_written(called: Run, work: Path) -> None:
    result = called("--source", "sample")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[:6] == [
        "bundled, choose with --ticker:",
        "  AAPL: 3270 days, 2000-03-01 to 2013-03-01",
        "  FB: 196 days, 2012-05-18 to 2013-03-01",
        "  GOOG: 2148 days, 2004-08-19 to 2013-03-01",
        "  IBM: 3270 days, 2000-03-01 to 2013-03-01",
        "  MSFT: 3270 days, 2000-03-01 to 2013-03-01",
    ]
    assert list(read_prices(work / "sample_test.csv")) == ["AAPL"]
    assert "choose with" not in called("--source", "sample", "--ticker", "IBM").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--source", "sample", "--ticker", "TSLA"), "the bundled sample has no ticker TSLA; it has AAPL (2000-03-01"),
        (("--source", "sample", "--start", "2026-06-01"), "has no AAPL in that range; it has 2000-03-01 to 2013-03-01"),
        (("--source", "sample", "--interval", "1wk"), "daily, fully adjusted prices only"),
        (("--source", "sample", "--adjust", "none"), "daily, fully adjusted prices only"),
        (("--source", "sample", "--update"), "--update cannot add to bundled prices"),
        (("--period", "1 year"), "--period 1 year: not a period; write it like 5d, 6mo, 1y"),
        (("--period", "9999y"), "longer than there are prices; use max"),
        (("--start", "01/02/2024"), "--start 01/02/2024: not a day; write it as 2024-01-31"),
        (("--start", "2024-05-01", "--end", "2024-05-01"), "--start 2024-05-01 is not before --end 2024-05-01"),
        (("--start", "2999-01-01"), "is in the future"),
        (("--ticker", "../etc"), "the file cannot be read"),
        (("--ticker", "A<B"), "'A<B' is no ticker"),
        (("--ticker", "tickers.txt"), "tickers.txt: the file cannot be read (No such file or directory)"),
        (("--output", "prices.xlsx"), "must end in .csv or .csv.gz, or be a folder"),
        (("--retries", "-1"), "must not be negative"),
        (("--timeout_s", "0"), "must be above zero"),
        (("--check", "nowhere.csv"), "nowhere.csv: no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    options: tuple[str, ...],
    words: str,
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = YahooServer()
    gone.http.server_close()
    monkeypatch.setenv("STOCKLORA_YAHOO_URL", gone.url)
    monkeypatch.setenv("STOCKLORA_CACHE", str(in_folder / "cache"))
    assert script.main([*options, *(() if "--retries" in options else ("--retries", "0"))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not list(in_folder.glob("*.csv*"))


# ---------------------------------------------------------------------------------------------- Yahoo


def test_plain_download_then_a_second_run_that_asks_nothing(download: Run, work: Path, server: YahooServer) -> None:
    server.plans["AAPL"] = Stock(made_up_bars(past_sessions()))
    result = download()
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no bar, no logging, no deprecation of others when it is not a terminal
    frame = read_prices(work / "sample_test.csv")["AAPL"]
    assert frame.index[0] > TODAY - pd.DateOffset(years=1, days=1)
    meta = read_meta(work / "sample_test.csv")
    assert (meta["source"], meta["adjust"], meta["auto_adjust"], meta["interval"]) == ("yahoo", "all", True, "1d")
    assert meta["timezones"] == {"AAPL": "America/New_York"}

    asked = len(server.requests)
    before = (work / "sample_test.csv").read_bytes()
    again = download("--ticker", "AAPL", "--period", "1y", "--output", "sample_test.csv")
    assert again.returncode == 0, again.stderr
    assert len(server.requests) == asked
    assert "kept from a run today" in again.stdout
    assert (work / "sample_test.csv").read_bytes() == before
    assert read_meta(work / "sample_test.csv")["time"] == meta["time"]  # when Yahoo was asked, not now

    assert download("--no-cache").returncode == 0
    assert len(server.requests) > asked


def test_429_then_good(called: Run, work: Path, server: YahooServer) -> None:
    # yfinance itself asks twice before it gives up once
    server.plans["AAPL"] = [TOO_MANY] * 5 + [Stock(made_up_bars(past_sessions()))]
    result = called(*QUICK)
    assert result.returncode == 0, result.stderr
    assert "429" in result.stderr
    assert "trying again" in result.stderr
    assert read_prices(work / "sample_test.csv")


@pytest.mark.parametrize(
    ("plan", "words"), [(TOO_MANY, "429"), (BROKEN, "500"), ("gone", "cannot be reached")], ids=["429", "500", "gone"]
)
def test_a_source_that_fails_leaves_the_old_csv(
    plan: object, words: str, called: Run, work: Path, server: YahooServer
) -> None:
    assert called("--source", "sample").returncode == 0
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    server.plans["AAPL"] = plan
    if plan == "gone":
        server.stop()
    result = called(*QUICK, "--retries", "2")
    assert result.returncode == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: AAPL: ")
    assert words in last
    assert "--source sample" in last
    assert "Traceback" not in result.stderr
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


def test_one_failing_ticker_is_named_last_and_the_others_are_written(
    called: Run, work: Path, server: YahooServer
) -> None:
    names = [f"T{i:02d}" for i in range(12)]
    for seed, name in enumerate(names):
        server.plans[name] = Stock(made_up_bars(past_sessions(), seed))
    server.plans["T07"] = BROKEN
    (work / "tickers.txt").write_text("# my list\nT00, T01 T02\n" + "\n".join(names[3:]) + "\nT00\nnope  # unknown\n")
    result = called("--ticker", "tickers.txt", "--output", "all.csv", *QUICK, "--retries", "1")
    assert result.returncode == 1
    tail = result.stderr.splitlines()[-3:]
    assert tail[0] == "error: 2 tickers did not come; the others are written:"
    assert tail[1].startswith("  T07: Yahoo answers 500")
    assert tail[2].startswith("  NOPE: Yahoo knows no such ticker")
    frames = read_prices(work / "all.csv")
    assert list(frames) == [name for name in names if name != "T07"]
    assert len(result.stdout.splitlines()) == 12
    # asked again, those that came cost nothing
    server.plans["T07"] = Stock(made_up_bars(past_sessions(), 7))
    asked = len(server.charts())
    assert called("--ticker", *names, "--output", "all.csv", *QUICK).returncode == 0
    assert {name for name in names if any(q for q in server.charts(name))} == set(names)
    assert len(server.charts()) - asked <= 2


def test_a_folder_gets_one_csv_a_ticker(called: Run, work: Path, server: YahooServer) -> None:
    for name in ("AAPL", "^GSPC", "BTC-USD"):
        server.plans[name] = Stock(made_up_bars(past_sessions()), zone="UTC", opens="00:00")
    result = called("--ticker", "aapl", "^GSPC", "BTC-USD", "--output", "prices/")
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (work / "prices").iterdir()}
    assert names == {f"{t}.csv{s}" for t in ("AAPL", "^GSPC", "BTC-USD") for s in ("", ".meta.json")}
    assert set(read_prices(work / "prices")) == {"AAPL", "^GSPC", "BTC-USD"}
    assert read_meta(work / "prices" / "AAPL.csv")["timezones"] == {"AAPL": "UTC"}


def test_empty_rows_and_the_running_bar_are_counted(called: Run, work: Path, server: YahooServer) -> None:
    bars = made_up_bars(past_sessions())
    bars.iloc[-3, bars.columns.get_loc("Close")] = np.nan
    server.plans["AAPL"] = Stock(bars, zone=zone_at_noon(), running=True, closes_in_s=3600)
    result = called()
    assert result.returncode == 0, result.stderr
    assert "1 row without a price left out; 1 row still running left out" in result.stdout
    assert read_meta(work / "sample_test.csv")["dropped"] == {"AAPL": {"empty": 1, "unfinished": 1}}


def test_adjustment_is_recorded_and_mixing_is_refused(called: Run, work: Path, server: YahooServer) -> None:
    days = past_sessions()
    for name in ("AAPL", "MSFT"):
        server.plans[name] = Stock(made_up_bars(days), splits={str(days[-20].date()): (3, 1)})
    assert called("--output", "p/").returncode == 0
    result = called("--ticker", "MSFT", "--adjust", "none", "--output", "p/")
    assert result.returncode == 0
    assert "not adjusted" in result.stdout
    assert read_meta(work / "p" / "MSFT.csv")["auto_adjust"] is False
    assert read_meta(work / "p" / "MSFT.csv")["splits"] == {"MSFT": {str(days[-20].date()): 3.0}}
    refused = pytest.raises(Exception, match="different adjustment cannot be mixed")
    with refused:
        read_prices(work / "p")
    # the unadjusted file shows its split in the report
    report = called("--check", "p/MSFT.csv")
    assert report.returncode == 0, report.stderr
    assert f"{days[-20].date()} -6" in report.stdout
    assert "near a split of 3 to 1" in report.stdout


# ---------------------------------------------------------------------------------------------- --update


def test_update_appends_new_days_after_comparing(called: Run, work: Path, server: YahooServer) -> None:
    days = past_sessions()
    bars = {name: made_up_bars(days, seed) for seed, name in enumerate(("AAPL", "MSFT"))}
    for name, frame in bars.items():
        server.plans[name] = Stock(frame.iloc[:-5])
    assert called("--ticker", "AAPL", "MSFT", "--output", "p.csv", "--start", str(days[100].date())).returncode == 0
    for name, frame in bars.items():
        server.plans[name] = Stock(frame)
    asked = len(server.charts())
    result = called("--update", "--output", "p.csv")
    assert result.returncode == 0, result.stderr
    assert "AAPL: 5 new rows" in result.stdout
    frames = read_prices(work / "p.csv")
    for name, frame in frames.items():
        assert list(frame.index) == list(days[100:])
        np.testing.assert_allclose(frame["Close"], bars[name]["Close"].iloc[100:], rtol=1e-12)
    spans = {int(query["period2"]) - int(query["period1"]) for query in server.charts()[asked:] if "period1" in query}
    assert max(spans) < 60 * 86400  # only the last days were asked for
    before = (work / "p.csv").read_bytes()
    again = called("--update", "--output", "p.csv")
    assert "already up to date" in again.stdout
    assert (work / "p.csv").read_bytes() == before


@pytest.mark.parametrize("event", ["split", "dividend"])
def test_update_after_a_split_or_dividend_fetches_anew(
    event: str, called: Run, work: Path, server: YahooServer
) -> None:
    days = past_sessions()
    bars = made_up_bars(days)
    first = {"start": str(days[100].date())}
    before = bars.iloc[:-5].copy()
    if event == "split":
        # until the split, Yahoo told prices twice as high
        before[["Open", "High", "Low", "Close"]] *= 2
        stock = Stock(bars, splits={str(days[-3].date()): (2, 1)})
    else:
        stock = Stock(bars, dividends={str(days[-3].date()): 0.5})
    server.plans["AAPL"] = Stock(before)
    assert called("--output", "p.csv", "--start", first["start"]).returncode == 0
    server.plans["AAPL"] = stock
    result = called("--update", "--output", "p.csv")
    assert result.returncode == 0, result.stderr
    assert "history has changed" in result.stderr
    assert "fetched anew" in result.stderr
    if event == "split":
        assert f"a split of 2 to 1 on {days[-3].date()}" in result.stderr
    else:
        assert "by the same factor in all four prices" in result.stderr
    frame = read_prices(work / "p.csv")["AAPL"]
    assert list(frame.index) == list(days[100:])
    np.testing.assert_allclose(frame["Close"], stock.adjusted()[100:], rtol=1e-12)


def test_update_that_fails_leaves_the_file(called: Run, work: Path, server: YahooServer) -> None:
    days = past_sessions()
    for name in ("AAPL", "MSFT"):
        server.plans[name] = Stock(made_up_bars(days).iloc[:-5])
    assert called("--ticker", "AAPL", "MSFT", "--output", "p.csv").returncode == 0
    before = (work / "p.csv").read_bytes()
    server.plans["AAPL"] = server.plans["MSFT"] = BROKEN
    result = called("--update", "--output", "p.csv", *QUICK, "--retries", "0")
    assert result.returncode == 2
    assert "500" in result.stderr.splitlines()[-1]
    assert (work / "p.csv").read_bytes() == before
    # one of two: it keeps its rows, the other grows, and it is named
    server.plans["MSFT"] = Stock(made_up_bars(days))
    result = called("--update", "--output", "p.csv", *QUICK, "--retries", "0")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("  AAPL: Yahoo answers 500")
    frames = read_prices(work / "p.csv")
    assert frames["AAPL"].index[-1] == days[-6]
    assert frames["MSFT"].index[-1] == days[-1]


def test_update_of_a_folder_goes_file_by_file(called: Run, work: Path, server: YahooServer) -> None:
    days = past_sessions()
    for name in ("AAPL", "MSFT"):
        server.plans[name] = Stock(made_up_bars(days).iloc[:-5])
    assert called("--ticker", "AAPL", "MSFT", "--output", "p/").returncode == 0
    for name in ("AAPL", "MSFT", "IBM"):
        server.plans[name] = Stock(made_up_bars(days))
    (work / "p" / "MSFT.csv.meta.json").unlink()
    result = called("--update", "--ticker", "AAPL", "MSFT", "IBM", "NOPE", "--output", "p")
    assert result.returncode == 1
    assert "AAPL: 5 new rows" in result.stdout
    assert "IBM: " in result.stdout
    named = [line.strip().partition(":")[0] for line in result.stderr.splitlines()[-2:]]
    assert named == ["MSFT", "NOPE"]
    assert read_prices(work / "p" / "AAPL.csv")["AAPL"].index[-1] == days[-1]
    assert read_prices(work / "p" / "MSFT.csv")["MSFT"].index[-1] == days[-6]
    assert read_prices(work / "p" / "IBM.csv")


def test_update_refuses_what_it_cannot_know(called: Run, work: Path, server: YahooServer) -> None:
    (work / "empty").mkdir()
    assert "the folder holds no .csv" in called("--update", "--output", "empty").stderr
    assert called("--source", "sample", "--output", "s.csv").returncode == 0
    assert "which does not grow" in called("--update", "--output", "s.csv").stderr
    (work / "s.csv.meta.json").unlink()
    result = called("--update", "--output", "s.csv")
    assert result.returncode == 2
    assert "no sidecar says where these prices came from" in result.stderr
    server.plans["AAPL"] = Stock(made_up_bars(past_sessions()))
    assert called("--update", "--output", "new.csv").returncode == 0  # not there yet: the whole of it
    result = called("--update", "--output", "new.csv", "--adjust", "none")
    assert result.returncode == 2
    assert "was downloaded with --adjust all, not none" in result.stderr
    result = called("--update", "--output", "new.csv", "--ticker", "MSFT")
    assert result.returncode == 2
    assert "--update does not add tickers" in result.stderr


# ---------------------------------------------------------------------------------------------- the rest


def test_help_is_quick_and_loads_nothing_heavy(run_script: Run, tmp_path: Path) -> None:
    probe = (
        "import sys, download; "
        "code = 0\ntry: download.main(['--help'])\nexcept SystemExit as e: code = e.code\n"
        "heavy = {'pandas', 'numpy', 'torch', 'yfinance', 'exchange_calendars'} & set(sys.modules)\n"
        "sys.exit(code or (f'loaded {heavy}' if heavy else 0))"
    )
    import sys

    root = Path(__file__).resolve().parents[3]
    result = subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "python download.py --source sample" in result.stdout


def test_config_file_speaks_and_flags_win(called: Run, work: Path) -> None:
    (work / "c.json").write_text(
        json.dumps({"source": "sample", "ticker": ["MSFT"], "period": "6mo", "output": "m.csv"})
    )
    result = called("--config", "c.json", "--period", "1mo")
    assert result.returncode == 0, result.stderr
    frame = read_prices(work / "m.csv")["MSFT"]
    assert frame.index[0] > frame.index[-1] - pd.Timedelta(days=32)
    (work / "c.json").write_text(json.dumps({"tikcer": "MSFT"}))
    result = called("--config", "c.json")
    assert result.returncode == 2
    assert "did you mean 'ticker'" in result.stderr
