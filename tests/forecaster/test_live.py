"""Fresh prices, bars that are complete, and forecasts that follow them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from price_tables import random_prices
from script_calls import ForkedScript
from source_tree import REPO_ROOT
from tuned_models import make_weights
from yahoo_server import BROKEN, TOO_MANY, Stock, YahooServer, made_up_bars, zone_at_noon

import download as download_script
import framework_llm as script
import stocklora.forecaster.live
from stocklora.cli.console import UserError
from stocklora.cli.settings import default_of
from stocklora.forecaster.live import (
    FetchedPrices,
    FilePrices,
    completed,
    may_have_more,
    price_feed,
    watch,
)
from stocklora.forecaster.settings import ForecastSettings
from stocklora.ledger.chain import read_entries
from stocklora.prices.calendar import is_complete, sessions_between
from stocklora.prices.sources.request import DownloadSettings
from stocklora.prices.tables import read_prices, write_prices

META = {"source": "test", "adjust": "all", "interval": "1d"}
TODAY = pd.Timestamp.now().normalize()
FRIDAY = pd.Timestamp("2025-10-31")  # New York closes at 20:00 UTC, the day before clocks go back on Sunday


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def past_sessions() -> pd.DatetimeIndex:
    return sessions_between("AAPL", TODAY - pd.DateOffset(years=1, months=2), TODAY - pd.Timedelta(days=2))


def bars(last: str, rows: int = 60, ticker: str = "AAPL") -> pd.DataFrame:
    """A table that ends with the session of day ``last``."""
    end = pd.Timestamp(last)
    return made_up_bars(sessions_between(ticker, end - pd.Timedelta(days=2 * rows), end)[-rows:])


# ------------------------------------------------------------------------------------------- complete bars


def test_only_rows_at_the_end_are_left_out() -> None:
    frame = bars("2025-11-04")
    pd.testing.assert_frame_equal(completed("AAPL", frame, at("2025-11-03 20:30")), frame.iloc[:-2])
    pd.testing.assert_frame_equal(completed("AAPL", frame, at("2025-11-04 21:15")), frame)
    assert completed("AAPL", frame, at("2020-01-01 00:00")).empty


@pytest.mark.parametrize(
    ("ticker", "now", "asked"),
    [
        ("AAPL", "2025-10-31 22:00", False),
        ("AAPL", "2025-11-02 12:00", False),  # the weekend
        ("AAPL", "2025-11-03 21:14", False),
        ("AAPL", "2025-11-03 21:15", True),
        ("BTC-USD", "2025-11-02 00:14", False),
        ("BTC-USD", "2025-11-02 00:15", True),
        ("X.UNKNOWN", "2025-10-31 22:00", True),
    ],
)
def test_a_source_is_asked_when_a_session_has_ended_since_the_last_bar(ticker: str, now: str, asked: bool) -> None:
    assert may_have_more(ticker, FRIDAY, at(now)) == asked


# -------------------------------------------------------------------------------------------- fresh prices


@pytest.fixture
def yahoo(server: YahooServer, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> YahooServer:
    """The local server for scripts called in this process, in an empty folder."""
    monkeypatch.setenv("STOCKLORA_YAHOO_URL", server.url)
    monkeypatch.setenv("STOCKLORA_CACHE", str(in_folder / ".cache"))
    monkeypatch.setattr("stocklora.prices.sources.yahoo.SPACING_S", 0.0)
    return server


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[str]:
    """What a forecast needs besides prices."""
    weights = make_weights(tmp_path_factory.mktemp("weights") / "weights.pth", tiny_model, 0)
    return ["--model_path", str(tiny_model), "--lora_weights", str(weights), "--dtype", "float32", "--device", "cpu"]


def test_fresh_prices_forecast_as_a_downloaded_file_does(yahoo: YahooServer, options: list[str], capsys) -> None:
    days = past_sessions()
    yahoo.plans = {name: Stock(made_up_bars(days, seed)) for seed, name in enumerate(("AAPL", "MSFT"))}
    assert script.main(["--ticker", "msft", "AAPL", *options, "--output", "live.csv"]) == 0
    asked = len(yahoo.charts())
    assert "MSFT: 2" in (printed := capsys.readouterr().out)
    assert f"to {days[-1]:%Y-%m-%d}, from Yahoo Finance" in printed
    assert not list(Path().glob("*.meta.json"))  # no price table is left behind
    assert download_script.main(["--ticker", "MSFT", "AAPL", "--output", "file.csv"]) == 0
    assert script.main(["--test_csv", "file.csv", *options, "--output", "from_file.csv"]) == 0
    assert Path("live.csv").read_bytes() == Path("from_file.csv").read_bytes()
    table = pd.read_csv("live.csv", parse_dates=["Origin"])
    assert table["Ticker"].tolist() == ["MSFT"] * 3 + ["AAPL"] * 3
    assert (table["Origin"] == days[-1]).all()
    assert len(yahoo.charts()) == asked  # within the day nothing is asked for twice, whichever script asks


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (None, "Yahoo knows no such ticker"),
        (TOO_MANY, "Yahoo answers 429, too many requests"),
        (BROKEN, "Yahoo answers 500"),
        ("no network", "Yahoo cannot be reached"),
        (Stock(made_up_bars(pd.bdate_range("1990-01-01", periods=3))), "Yahoo has no prices for it in that range"),
    ],
)
def test_a_download_that_fails_says_what_download_py_says(yahoo, options, capsys, monkeypatch, plan, words) -> None:
    if plan == "no network":
        gone = YahooServer()
        gone.http.server_close()
        monkeypatch.setenv("STOCKLORA_YAHOO_URL", gone.url)
    elif plan is not None:
        yahoo.plans["AAPL"] = plan
    assert script.main(["--ticker", "AAPL", "--retries", "0", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: AAPL: ")
    assert words in line
    assert download_script.main(["--ticker", "AAPL", "--retries", "0"]) == 2
    # curl counts milliseconds
    mask = [text.partition(" after ")[0] for text in (line, capsys.readouterr().err.strip())]
    assert mask[0] == mask[1]
    assert not list(Path().glob("*.csv"))


def test_tickers_that_came_are_forecast_and_the_others_named(yahoo: YahooServer, options: list[str], capsys) -> None:
    yahoo.plans["AAPL"] = Stock(made_up_bars(past_sessions()))
    assert script.main(["--ticker", "NOPE", "AAPL", *options]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "error: 1 ticker did not come; the others are written:"
    assert errors[1].startswith("  NOPE: Yahoo knows no such ticker")
    assert pd.read_csv("predictions.csv")["Ticker"].unique().tolist() == ["AAPL"]


def test_todays_running_bar_is_no_origin(yahoo: YahooServer, options: list[str], capsys) -> None:
    days = past_sessions()
    yahoo.plans["AAPL"] = Stock(made_up_bars(days), zone=zone_at_noon(), running=True, closes_in_s=3600)
    assert script.main(["--ticker", "AAPL", *options]) == 0
    assert "1 row still running left out" in capsys.readouterr().out
    assert (pd.read_csv("predictions.csv", parse_dates=["Origin"])["Origin"] == days[-1]).all()


@pytest.mark.parametrize(("now", "last"), [("2025-10-31 20:14", "2025-10-30"), ("2025-10-31 20:15", "2025-10-31")])
def test_a_source_that_gives_the_running_day_as_done_is_not_believed(monkeypatch, capsys, now, last) -> None:
    def fetched(settings, requests):
        meta = {"source": "yahoo", "interval": "1d", "adjust": "all"}
        return {name: bars("2025-10-31") for name in requests}, meta

    monkeypatch.setattr(stocklora.forecaster.live, "fetch_prices", fetched)
    feed = FetchedPrices(DownloadSettings(ticker=["AAPL"]), clock=lambda: at(now))
    assert feed.first()["AAPL"].index[-1] == pd.Timestamp(last)
    assert ("1 row still running left out" in capsys.readouterr().out) == (last == "2025-10-30")


def test_bundled_prices_are_forecast_without_a_network(in_folder: Path, options: list[str], capsys) -> None:
    assert script.main(["--ticker", "AAPL", "--source", "sample", *options]) == 0
    assert "not fresh, its last day is" in capsys.readouterr().out
    assert (pd.read_csv("predictions.csv")["Origin"] == "2013-03-01").all()


def test_help_says_the_defaults_of_download_py() -> None:
    fields = {field.name: field for field in dataclasses.fields(ForecastSettings)}
    for field in dataclasses.fields(DownloadSettings):
        if field.name in {"source", "period", "retries"}:
            assert f"(default: {default_of(field)})" in fields[field.name].metadata["help"]
    feed = price_feed(ForecastSettings(ticker=["AAPL"], period="5y", retries=1))
    assert isinstance(feed, FetchedPrices)
    assert feed.download == DownloadSettings(ticker=["AAPL"], period="5y", retries=1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--ticker", "AAPL", "--test_csv", "a.csv"), "--test_csv reads prices and --ticker downloads them; give one"),
        (("--ticker", "AAPL", "--tickers", "AAPL"), "--tickers chooses among those of --test_csv"),
        (("--test_csv", "a.csv", "--source", "sample"), "--source says how prices are downloaded; give --ticker too"),
        (("--period", "5y"), "--period says how prices are downloaded; give --ticker too"),
        (("--ticker", "AAPL", "--period", "5 years"), "--period 5 years: not a period"),
        (("--ticker", "A<B"), "'A<B' is no ticker"),
        (("--ticker", "AAPL", "--source", "sample", "--watch", "5"), "bundled prices do not grow"),
        (("--ticker", "AAPL", "--watch", "0"), "--watch must be above 0"),
        (("--ticker", "AAPL", "--watch", "1e300"), "at most 1440 minutes"),
        ((), "sample_test.csv: no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(yahoo: YahooServer, capsys, flags: tuple[str, ...], words: str) -> None:
    assert script.main(list(flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not yahoo.requests


# --------------------------------------------------------------------------------------------------- watch


class Fetches:
    """Stands in for the network: what it is asked, and what it answers at the next look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[str]] = []
        self.settings: list[DownloadSettings] = []
        self.answers: dict[str, pd.DataFrame | str] = {}
        monkeypatch.setattr(stocklora.forecaster.live, "fetch_or_fail", self.fetch)
        monkeypatch.setattr(stocklora.forecaster.live, "fetch_prices", self.fetch)

    def fetch(self, settings: DownloadSettings, requests: dict) -> tuple[dict, dict]:
        self.asked.append(list(requests))
        self.settings.append(settings)
        told = {name: self.answers[name] for name in requests}
        failed = {name: answer for name, answer in told.items() if isinstance(answer, str)}
        meta = {"source": "yahoo", "interval": "1d", "adjust": "all", "failed": failed}
        return {name: answer for name, answer in told.items() if not isinstance(answer, str)}, meta


def test_a_look_asks_only_for_what_may_have_grown(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    net, now = Fetches(monkeypatch), [at("2025-10-31 22:00")]
    net.answers = {"AAPL": bars("2025-10-31"), "7203.T": bars("2025-10-31", ticker="7203.T")}
    feed = FetchedPrices(DownloadSettings(ticker=["AAPL", "7203.T"]), watching=True, clock=lambda: now[0])
    first = feed.first()
    assert net.settings[0].cache
    now[0] = at("2025-11-03 01:00")  # Monday in Tokyo, a holiday
    assert feed.look() is first
    assert len(net.asked) == 1
    now[0] = at("2025-11-03 22:00")  # New York has closed
    assert feed.look() is first  # but its bar is not there yet
    net.answers["AAPL"] = bars("2025-11-03")
    second = feed.look()
    assert net.asked[1:] == [["AAPL"], ["AAPL"]]
    assert not net.settings[-1].cache
    assert net.settings[-1].retries == 0
    assert list(second) == ["AAPL", "7203.T"]
    assert second["AAPL"].index[-1] == pd.Timestamp("2025-11-03")
    assert second["7203.T"] is first["7203.T"]
    now[0] = at("2025-11-04 21:14")  # both are due, but New York's bar still runs for a minute
    net.answers = {"AAPL": bars("2025-11-04"), "7203.T": bars("2025-11-04", ticker="7203.T")}
    third = feed.look()
    assert net.asked[3:] == [["7203.T"]]
    assert third["7203.T"].index[-1] == pd.Timestamp("2025-11-04")
    assert third["AAPL"] is second["AAPL"]
    assert capsys.readouterr().err == ""


def test_a_failing_ticker_is_warned_of_once_until_it_comes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    net = Fetches(monkeypatch)
    net.answers = {"AAPL": bars("2025-10-31"), "MSFT": "Yahoo cannot be reached"}
    feed = FetchedPrices(DownloadSettings(ticker=["AAPL", "MSFT"]), watching=True, clock=lambda: at("2025-11-01 00:00"))
    first = feed.first()
    assert list(first) == ["AAPL"]
    assert feed.look() is first
    assert feed.look() is first
    assert net.asked == [["AAPL", "MSFT"], ["MSFT"], ["MSFT"]]
    assert capsys.readouterr().err.count("MSFT: Yahoo cannot be reached") == 1
    net.answers["MSFT"] = bars("2025-10-31")
    assert list(feed.look()) == ["AAPL", "MSFT"]
    assert capsys.readouterr().err == ""


class Script:
    """A feed and a sleep that play a story: each step's function runs while ``watch`` sleeps; then Ctrl-C."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.steps = list(steps)
        self.slept: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        if not self.steps:
            raise KeyboardInterrupt
        self.steps.pop(0)()


class Feed:
    def __init__(self, prices: dict[str, pd.DataFrame]) -> None:
        self.now: dict[str, pd.DataFrame] | UserError = prices

    def first(self) -> dict[str, pd.DataFrame]:
        return self.look()

    def look(self) -> dict[str, pd.DataFrame]:
        if isinstance(self.now, UserError):
            raise self.now
        return self.now

    def exit_code(self) -> int:
        return 0


def test_watching_forecasts_what_is_new_and_says_each_trouble_once(capsys) -> None:
    old, new = {"AAPL": bars("2025-10-31")}, {"AAPL": bars("2025-11-03"), "MSFT": bars("2025-10-31")}
    feed, full, seen = Feed(old), [True], []

    def forecast(prices: dict[str, pd.DataFrame], told: str) -> None:
        seen.append((prices, told))
        if prices is new and full[0]:
            raise UserError("cannot write predictions.csv: the disk is full")

    def set_now(value: dict[str, pd.DataFrame] | UserError) -> Callable[[], None]:
        return lambda: setattr(feed, "now", value)

    def nothing() -> None: ...

    story = Script(
        nothing, set_now(UserError("gone")), nothing, set_now(old), set_now(UserError("gone")),
        set_now(new), nothing, lambda: full.clear() or full.append(False), nothing,
    )  # fmt: skip
    assert watch(feed, old, 2.0, forecast, clock=lambda: at("2025-11-03 21:20"), sleep=story) == 0
    assert set(story.slept) == {120.0}
    # tried until it succeeded, then never again
    assert [prices for prices, _ in seen] == [new] * 3
    assert {told for _, told in seen} == {"2025-11-03 21:20 UTC, new: AAPL 2025-11-03, MSFT 2025-10-31"}
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "warning: gone; the last forecast stands, the next look is in 2 min",
        "warning: gone; the last forecast stands, the next look is in 2 min",  # it had come back in between
        "warning: cannot write predictions.csv: the disk is full; the last forecast stands, the next look is in 2 min",
    ]
    assert printed.out.splitlines() == [
        "watching, one look every 2 min; Ctrl-C ends it", "watching has ended after 2 forecasts",
    ]  # fmt: skip


def test_a_file_is_read_again_when_it_has_changed(in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(stocklora.forecaster.live, "STILL_S", 0.01)
    days = sessions_between("AAPL", "2024-01-01", "2024-06-28")
    frame = random_prices(len(days)).set_index(days)
    path = in_folder / "sample_test.csv"  # named AAPL by its sidecar alone
    write_prices({"AAPL": frame.iloc[:-1]}, path, META)
    feed = FilePrices([path], watching=True)
    first = feed.first()
    monkeypatch.setattr(
        stocklora.forecaster.live, "read_prices", lambda _: pytest.fail("read though nothing has changed")
    )
    assert feed.look() is first
    monkeypatch.setattr(stocklora.forecaster.live, "read_prices", read_prices)
    os.utime(path)
    assert feed.look() is first  # touched, the same rows
    write_prices({"AAPL": frame}, path, META)
    second = feed.look()
    assert second["AAPL"].index[-1] == days[-1]
    text = path.read_text()
    path.write_text(text[:-30])  # caught in the middle of being written
    for _ in range(2):
        with pytest.raises(UserError, match=r"sample_test\.csv, row"):
            feed.look()
    path.write_text(text)
    assert feed.look() is second  # whole again, with the rows that are known
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        feed.look()


def test_a_file_s_running_row_waits_for_the_close_while_watching(in_folder: Path, capsys) -> None:
    write_prices({"AAPL": bars("2025-10-31"), "BTC-USD": bars("2025-10-30", 60, "BTC-USD")}, Path("p.csv"), META)
    now = [at("2025-10-31 19:00")]
    feed = FilePrices([Path("p.csv")], watching=True, clock=lambda: now[0])
    first = feed.first()
    assert first["AAPL"].index[-1] == pd.Timestamp("2025-10-30")
    assert first["BTC-USD"].index[-1] == pd.Timestamp("2025-10-30")
    assert feed.look() is first
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "has not closed yet: AAPL 2025-10-31; left out until then" in warnings[0]
    now[0] = at("2025-10-31 20:15")  # the file is as it was, the bar is complete
    assert feed.look()["AAPL"].index[-1] == FRIDAY
    # Without --watch a file's rows are taken at their word.
    once = FilePrices([Path("p.csv")], clock=lambda: at("2025-10-31 19:00")).first()
    assert once["AAPL"].index[-1] == FRIDAY
    assert "AAPL 2025-10-31; the forecast takes its close as final" in capsys.readouterr().err


class Running:
    """A script in a process of its own, whose lines (both streams) are read as they come."""

    def __init__(self, script: ForkedScript) -> None:
        self.script = script
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.printed: list[str] = []
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        for line in self.script.stdout:
            self.lines.put(line.rstrip())
        self.lines.put(None)

    def until(self, words: str, timeout_s: float = 120.0) -> str:
        """The first line from here on that holds ``words``."""
        end = time.monotonic() + timeout_s
        while (line := self.lines.get(timeout=max(0.1, end - time.monotonic()))) is not None:
            self.printed.append(line)
            if words in line:
                return line
        raise AssertionError(f"ended before {words!r}: {self.printed}")

    def interrupt(self) -> int:
        self.script.interrupt()
        self.until("watching has ended")
        return self.script.wait(60)


def wait_for_looks(server: YahooServer, count: int) -> None:
    before, end = len(server.charts()), time.monotonic() + 60
    while len(server.charts()) < before + count:
        assert time.monotonic() < end, "nobody looks any more"
        time.sleep(0.05)


@pytest.fixture
def start(nursery: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """``start(*options, cwd=..., env=...)``: ``framework_llm.py`` in a process of its own."""
    started: list[ForkedScript] = []

    def run(*options: object, cwd: Path, env: dict[str, str] | None = None) -> Running:
        printed = tmp_path_factory.mktemp("watch") / "printed"
        started.append(
            ForkedScript(
                nursery, REPO_ROOT / "framework_llm.py", *options, cwd=cwd, printed=printed, env=env, together=True
            )
        )
        return Running(started[-1])

    yield run
    for each in started:
        each.process.kill()
        each.process.join()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_watching_a_ticker_from_start_to_ctrl_c(server: YahooServer, tmp_path: Path, options, start) -> None:
    days = sessions_between("AAPL", TODAY - pd.DateOffset(years=1, months=2), TODAY)
    days = days[[is_complete("AAPL", day, dt.datetime.now(dt.UTC)) for day in days]]  # up to the very last
    whole = made_up_bars(days)
    server.plans["AAPL"] = Stock(whole.iloc[:-2])
    env = {"STOCKLORA_YAHOO_URL": server.url, "STOCKLORA_CACHE": str(tmp_path / "cache")}
    work = tmp_path / "work"
    work.mkdir()
    run = start("--ticker", "AAPL", *options, "--watch", "0.002", cwd=work, env=env)

    def origins() -> set[pd.Timestamp]:
        return set(pd.read_csv(work / "predictions.csv", parse_dates=["Origin"])["Origin"])

    run.until("watching, one look every 0.002 min")
    assert origins() == {days[-3]}
    wait_for_looks(server, 3)  # that find nothing
    before = (work / "predictions.csv").stat().st_ino
    server.plans["AAPL"] = Stock(whole.iloc[:-1])
    run.until(f"new: AAPL {days[-2]:%Y-%m-%d}")
    run.until("saved: predictions.csv")
    assert origins() == {days[-2]}
    assert (work / "predictions.csv").stat().st_ino != before  # another file under the name, never half a one
    server.plans["AAPL"] = BROKEN
    run.until("warning: AAPL: Yahoo answers 500, a fault on its side; it is asked for again at the next look")
    wait_for_looks(server, 3)
    server.plans["AAPL"] = Stock(whole)
    run.until(f"new: AAPL {days[-1]:%Y-%m-%d}")
    run.until("saved: predictions.csv")
    assert origins() == {days[-1]}
    looks = len(server.charts())
    time.sleep(0.3)
    assert len(server.charts()) == looks  # no session has ended since: nobody is asked
    assert run.interrupt() == 0
    assert run.printed[-1] == "watching has ended after 3 forecasts"
    text = "\n".join(run.printed)
    assert text.count("warning:") == 1
    assert text.count("80% from") == 3
    assert text.count("trainable parameters") == 1  # the model was loaded once
    assert {path.name for path in work.iterdir()} == {"predictions.csv", "forecasts.db"}
    recorded = [entry.content["origin"] for entry in read_entries(work / "forecasts.db")]
    assert recorded == [f"{day:%Y-%m-%d}" for day in days[-3:]]  # the ledger fills by itself


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_watching_a_file_from_start_to_ctrl_c(tmp_path: Path, options, start) -> None:
    days = sessions_between("AAPL", "2024-01-01", "2024-06-28")
    frame = random_prices(len(days)).set_index(days)
    write_prices({"AAPL": frame.iloc[:-1]}, tmp_path / "sample_test.csv", META)
    run = start(*options, "--watch", "0.002", "--plot", "fan.png", cwd=tmp_path)
    run.until("watching")
    write_prices({"AAPL": frame}, tmp_path / "sample_test.csv", META)
    run.until(f"new: AAPL {days[-1]:%Y-%m-%d}")
    run.until("chart: fan.png")
    assert (pd.read_csv(tmp_path / "predictions.csv", parse_dates=["Origin"])["Origin"] == days[-1]).all()
    (tmp_path / "sample_test.csv").write_text("half a ro")
    run.until("warning: ")
    assert run.interrupt() == 0
    assert "watching has ended after 2 forecasts" in run.printed[-1]
    assert (pd.read_csv(tmp_path / "predictions.csv", parse_dates=["Origin"])["Origin"] == days[-1]).all()
    assert json.loads((tmp_path / "sample_test.csv.meta.json").read_text())["last_date"] == f"{days[-1]:%Y-%m-%d}"


def test_a_first_forecast_that_fails_ends_the_watch(yahoo: YahooServer, options: list[str], capsys) -> None:
    assert script.main(["--ticker", "NOPE", *options, "--watch", "1"]) == 2
    assert "NOPE: Yahoo knows no such ticker" in capsys.readouterr().err
