"""The real yfinance against a local server that speaks Yahoo's chart JSON: what comes, what is dropped, what fails."""

from __future__ import annotations

import datetime as dt
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from yahoo_server import (
    BROKEN,
    DOWN,
    NO_RESULT,
    TOO_MANY,
    UNKNOWN,
    Canned,
    Stock,
    YahooServer,
    made_up_bars,
    zone_at_noon,
)

from stocklora.prices.bars import QUOTES
from stocklora.prices.calendar import SETTLING, sessions_between
from stocklora.prices.sources.request import Request, SourceError
from stocklora.prices.sources.yahoo import YahooSource, is_unfinished, state_of_today
from stocklora.prices.tables import validated

TODAY = pd.Timestamp.now().normalize()
UTC = dt.UTC


def past_sessions(ticker: str, years: int = 1) -> pd.DatetimeIndex:
    """Sessions up to the day before yesterday: over in every time zone."""
    return sessions_between(ticker, TODAY - pd.DateOffset(years=years), TODAY - pd.Timedelta(days=2))


@pytest.fixture
def source(server: YahooServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> YahooSource:
    monkeypatch.setenv("STOCKLORA_YAHOO_URL", server.url)
    monkeypatch.setattr("stocklora.prices.sources.yahoo.SPACING_S", 0.0)
    return YahooSource(tmp_path / "yfinance", timeout_s=5)


def test_good_answer_is_adjusted_for_splits_and_dividends(server: YahooServer, source: YahooSource) -> None:
    days = past_sessions("GOOD")
    stock = Stock(made_up_bars(days), dividends={str(days[-30].date()): 1.5})
    server.plans["GOOD"] = stock
    answer = source.fetch("GOOD", Request("max"))
    frame = validated(answer.frame, "GOOD")
    assert list(frame.index) == list(days)
    factor = stock.adjusted() / stock.bars["Close"].to_numpy()
    np.testing.assert_allclose(frame["Close"], stock.adjusted(), rtol=1e-12)
    np.testing.assert_allclose(frame["Open"], stock.bars["Open"] * factor, rtol=1e-12)
    np.testing.assert_array_equal(frame["Volume"], stock.bars["Volume"])
    assert factor[0] < 0.99
    assert (answer.timezone, answer.currency, answer.dropped) == ("America/New_York", "USD", {})
    assert answer.fresh_until > answer.time


def test_only_local_requests_are_made(server: YahooServer, source: YahooSource) -> None:
    server.plans["LOCAL"] = Stock(made_up_bars(past_sessions("LOCAL")))
    source.fetch("LOCAL", Request("1y"))
    paths = {path for path, _ in server.requests}
    assert "chart:LOCAL" in paths
    assert server.charts("LOCAL")[-1]["range"] == "1y"


@pytest.mark.parametrize("adjust", ["none", "splits", "all"])
def test_split_under_each_adjustment(adjust: str, server: YahooServer, source: YahooSource) -> None:
    days = past_sessions("SPLT")
    split, later = days[-40], days[-20]
    stock = Stock(
        made_up_bars(days),
        splits={str(split.date()): (4, 1), str(later.date()): (1, 2)},
        dividends={str(days[-10].date()): 2.0},
    )
    server.plans["SPLT"] = stock
    answer = source.fetch("SPLT", Request("max", adjust=adjust))
    assert answer.splits == {str(split.date()): 4.0, str(later.date()): 0.5}
    yahoo = stock.bars
    expected = yahoo["Close"].to_numpy().copy()
    volume = yahoo["Volume"].to_numpy().copy()
    if adjust == "all":
        expected = stock.adjusted()
    if adjust == "none":
        # as quoted: four times as much before the first split, and half of that before the reverse one
        times = np.where(days < split, 4 * 0.5, np.where(days < later, 0.5, 1.0))
        expected, volume = expected * times, volume / times
    np.testing.assert_allclose(answer.frame["Close"], expected, rtol=1e-12)
    np.testing.assert_allclose(answer.frame["Volume"], volume, rtol=1e-12)


def test_unadjusted_prices_of_a_past_range_undo_splits_after_it(server: YahooServer, source: YahooSource) -> None:
    days = past_sessions("PAST")
    server.plans["PAST"] = stock = Stock(made_up_bars(days), splits={str(days[-5].date()): (2, 1)})
    end = days[-50].date()
    answer = source.fetch("PAST", Request(start=days[-60].date(), end=end, adjust="none"))
    assert list(answer.frame.index) == list(days[-60:-50])
    np.testing.assert_allclose(answer.frame["Close"], stock.bars["Close"].loc[answer.frame.index] * 2)


@pytest.mark.parametrize(
    ("ticker", "zone", "opens"),
    [
        ("7203.T", "Asia/Tokyo", "09:00"),
        ("BHP.AX", "Australia/Sydney", "10:00"),
        ("VOD.L", "Europe/London", "08:00"),
        ("AIR.NZ", "Pacific/Auckland", "10:00"),
        ("BTC-USD", "UTC", "00:00"),
        ("PETR4.SA", "America/Sao_Paulo", "10:00"),
    ],
)
def test_days_are_the_exchange_s_own(
    ticker: str, zone: str, opens: str, server: YahooServer, source: YahooSource
) -> None:
    days = past_sessions(ticker)
    server.plans[ticker] = Stock(made_up_bars(days), zone=zone, opens=opens)
    answer = source.fetch(ticker, Request("max"))
    assert list(answer.frame.index) == list(days)
    assert answer.timezone == zone


def test_running_bar_is_left_out_and_counted(server: YahooServer, source: YahooSource) -> None:
    days = past_sessions("RUN")
    server.plans["RUN"] = Stock(made_up_bars(days), zone=zone_at_noon(), running=True, closes_in_s=3600)
    answer = source.fetch("RUN", Request("max"))
    assert answer.frame.index[-1] == days[-1]
    assert answer.dropped == {"unfinished": 1}
    # the cache must not outlive the close
    assert dt.timedelta(minutes=70) < answer.fresh_until - answer.time <= dt.timedelta(minutes=75)


@pytest.mark.parametrize(("minutes_ago", "kept"), [(1, False), (14, False), (16, True), (300, True)])
def test_todays_bar_is_kept_once_it_has_settled(
    minutes_ago: int, kept: bool, server: YahooServer, source: YahooSource
) -> None:
    days = past_sessions("DONE")
    server.plans["DONE"] = Stock(made_up_bars(days), zone=zone_at_noon(), running=True, closes_in_s=-60 * minutes_ago)
    answer = source.fetch("DONE", Request("max"))
    assert len(answer.frame) == len(days) + kept
    assert answer.dropped == ({} if kept else {"unfinished": 1})


def test_rows_without_a_close_are_left_out_and_counted(server: YahooServer, source: YahooSource) -> None:
    bars = made_up_bars(past_sessions("HOLE"))
    bars.iloc[-1, bars.columns.get_loc("Close")] = np.nan  # as Yahoo often ends, with volume
    bars.iloc[5] = np.nan
    server.plans["HOLE"] = Stock(bars)
    answer = source.fetch("HOLE", Request("max"))
    assert answer.dropped == {"empty": 2}
    assert len(validated(answer.frame, "HOLE")) == len(bars) - 2


def test_bars_that_cannot_be_are_mended_or_left_out(server: YahooServer, source: YahooSource) -> None:
    bars = made_up_bars(past_sessions("ODD"))
    bars.iloc[3, bars.columns.get_loc("Open")] = bars["High"].iloc[3] * 1.02
    bars.iloc[7, bars.columns.get_loc("Low")] = 0.0
    bars.iloc[9, bars.columns.get_loc("High")] = bars["Low"].iloc[9] * 0.9
    server.plans["ODD"] = Stock(bars)
    answer = source.fetch("ODD", Request("max"))
    assert answer.dropped == {"broken": 2, "widened": 1}
    frame = validated(answer.frame, "ODD")
    assert frame["High"].iloc[3] == frame["Open"].iloc[3]


def test_start_end_and_interval_reach_yahoo(server: YahooServer, source: YahooSource) -> None:
    days = past_sessions("WEEK")
    weeks = days[days.day_of_week == 0]
    server.plans["WEEK"] = Stock(made_up_bars(weeks))
    first, last = weeks[5], weeks[20]
    answer = source.fetch("WEEK", Request(start=first.date(), end=last.date(), interval="1wk"))
    assert list(answer.frame.index) == list(weeks[5:20])
    asked = server.charts("WEEK")[-1]
    assert asked["interval"] == "1wk"
    assert pd.Timestamp(int(asked["period1"]), unit="s", tz="UTC").tz_convert("America/New_York").date() == first.date()


@pytest.mark.parametrize(
    ("plan", "kind", "words"),
    [
        (TOO_MANY, "rate", "429"),
        (BROKEN, "server", "500"),
        ((503, {}, "Service Unavailable"), "server", "503"),
        (UNKNOWN, "unknown", "no such ticker"),
        ((403, {}, "Forbidden"), "refused", "403"),
        (NO_RESULT, "empty", "no prices"),
        (DOWN, "server", "makes no sense"),
        ((200, {}, "<html>please consent</html>"), "server", "makes no sense"),
        (Stock(made_up_bars(pd.DatetimeIndex([]))), "empty", "no prices"),
        (Stock(made_up_bars(pd.bdate_range("2020-01-06", periods=4)) * np.nan), "empty", "no finished day"),
    ],
    ids=["429", "500", "503", "unknown", "403", "no result", "down", "consent page", "no bars", "all empty"],
)
def test_failures_have_names(
    plan: object, kind: str, words: str, server: YahooServer, source: YahooSource, request: pytest.FixtureRequest
) -> None:
    ticker = "F" + request.node.callspec.id.upper().replace(" ", "")
    server.plans[ticker] = plan
    with pytest.raises(SourceError, match=words) as caught:
        source.fetch(ticker, Request("max" if kind != "rate" else "1y"))
    assert caught.value.kind == kind
    assert caught.value.passing == (kind in {"rate", "server"})


def test_requests_are_spaced(server: YahooServer, source: YahooSource, monkeypatch: pytest.MonkeyPatch) -> None:
    from stocklora.prices.sources import yahoo

    now, started = [100.0], []

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

        @staticmethod
        def sleep(seconds: float) -> None:
            now[0] += seconds

    class Session:
        @staticmethod
        def request(*_: object) -> None:
            started.append(now[0])

    monkeypatch.setattr(yahoo, "SPACING_S", 0.1)
    monkeypatch.setattr(yahoo, "time", Clock)
    session = source.watched(Session())
    for pause in (0.0, 0.04, 0.3, 0.0):
        now[0] += pause
        session.request("GET", "https://query2.finance.yahoo.com/v8")
    assert started == pytest.approx([100.0, 100.1, 100.4, 100.5])


def test_retry_after_is_heard(server: YahooServer, source: YahooSource) -> None:
    server.retry_after = "7"
    server.plans["WAIT"] = TOO_MANY
    with pytest.raises(SourceError) as caught:
        source.fetch("WAIT", Request("1y"))
    assert caught.value.wait_s == 7


def test_a_refused_crumb_does_not_stop_prices(server: YahooServer, source: YahooSource) -> None:
    server.crumb = TOO_MANY
    server.plans["CRUMB"] = Stock(made_up_bars(past_sessions("CRUMB")))
    assert len(source.fetch("CRUMB", Request("max")).frame)


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = YahooServer()
    gone.http.server_close()
    monkeypatch.setenv("STOCKLORA_YAHOO_URL", gone.url)
    with pytest.raises(SourceError, match="cannot be reached") as caught:
        YahooSource(tmp_path, timeout_s=2).fetch("GONE", Request("1y"))
    assert caught.value.kind == "network"
    assert "http" not in str(caught.value).partition("127.0.0.1")[2]


def test_an_answer_that_takes_too_long(server: YahooServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKLORA_YAHOO_URL", server.url)
    server.plans["SLOW"] = Stock(made_up_bars(past_sessions("SLOW")))
    server.pause_s = 0.6
    impatient = YahooSource(tmp_path, timeout_s=0.2)
    with pytest.raises(SourceError) as caught:
        impatient.fetch("SLOW", Request("1y"))
    assert caught.value.kind == "network"


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=UTC)


FRIDAY = pd.Timestamp("2025-10-31")


@pytest.mark.parametrize(
    ("day", "interval", "settled", "now", "unfinished"),
    [
        # New York closes at 20:00 UTC (daylight saving time), and is taken to have settled at once
        (FRIDAY, "1d", "2025-10-31 20:00", "2025-10-31 15:00", True),
        (FRIDAY, "1d", "2025-10-31 20:00", "2025-10-31 20:01", False),
        (FRIDAY, "1d", "2025-10-31 20:00", "2025-11-02 12:00", False),
        (FRIDAY, "1d", "2025-11-03 21:00", "2025-10-31 23:00", False),  # Monday's session is the current one
        (FRIDAY, "1d", None, "2025-10-31 23:00", True),  # nobody says, so today is not trusted
        (FRIDAY, "1d", None, "2025-11-01 12:00", False),
        (pd.Timestamp("2025-10-27"), "1wk", "2025-10-31 20:00", "2025-10-31 15:00", True),
        (pd.Timestamp("2025-10-27"), "1wk", "2025-10-31 20:00", "2025-10-31 21:00", False),
        (pd.Timestamp("2025-10-27"), "1wk", "2025-10-30 20:00", "2025-10-30 21:00", True),
        (pd.Timestamp("2025-10-01"), "1mo", "2025-10-31 20:00", "2025-10-31 21:00", False),
        (pd.Timestamp("2025-10-01"), "1mo", "2025-10-30 20:00", "2025-10-30 21:00", True),
    ],
)
def test_whether_the_last_bar_is_done(
    day: pd.Timestamp, interval: str, settled: str | None, now: str, unfinished: bool
) -> None:
    told = at(settled) - SETTLING if settled else None
    today, over, _ = state_of_today("AAPL", told, "America/New_York", at(now))
    assert is_unfinished("AAPL", day, interval, today, over) == unfinished


@dataclass
class StockAt(Stock):
    """A stock whose session that Yahoo takes for the current one ends at a given moment."""

    ends: dt.datetime = dt.datetime(1970, 1, 1, tzinfo=UTC)

    def chart(self, ticker: str, query: dict[str, str]) -> Canned:
        self.closes_in_s = self.ends.timestamp() + 0.5 - time.time()  # the time is added again, and cut to seconds
        return super().chart(ticker, query)


NEW_YORK, TOKYO = ("America/New_York", "09:30"), ("Asia/Tokyo", "09:00")
LONDON, MIDNIGHT = ("Europe/London", "00:00"), ("UTC", "00:00")


@pytest.mark.parametrize(
    ("ticker", "place", "told", "now", "last", "fresh_until"),
    [
        # Yahoo still speaks of Thursday's session: New York's calendar says when Friday's bar is complete
        ("AAPL", NEW_YORK, "2025-10-30 20:00", "2025-10-31 15:00", "2025-10-30", "2025-10-31 20:15"),
        ("AAPL", NEW_YORK, "2025-10-30 20:00", "2025-10-31 20:14", "2025-10-30", "2025-10-31 20:15"),
        ("AAPL", NEW_YORK, "2025-10-30 20:00", "2025-10-31 20:15", "2025-10-31", "2025-11-01 04:00"),
        ("AAPL", NEW_YORK, "2025-10-30 20:00", "2025-11-01 12:00", "2025-10-31", "2025-11-02 04:00"),
        # the day after Thanksgiving ends at one; before it, Yahoo's last session was Wednesday's
        ("AAPL", NEW_YORK, "2025-11-26 21:00", "2025-11-28 18:14", "2025-11-26", "2025-11-28 18:15"),
        ("AAPL", NEW_YORK, "2025-11-26 21:00", "2025-11-28 18:15", "2025-11-28", "2025-11-29 05:00"),
        ("7203.T", TOKYO, "2025-10-30 06:30", "2025-10-31 06:44", "2025-10-30", "2025-10-31 06:45"),
        ("7203.T", TOKYO, "2025-10-30 06:30", "2025-10-31 06:45", "2025-10-31", "2025-10-31 15:00"),
        # of today's session Yahoo is believed before the calendar: it knows of a close that nobody planned
        ("AAPL", NEW_YORK, "2025-10-31 17:00", "2025-10-31 17:15", "2025-10-31", "2025-11-01 04:00"),
        # no calendar for the exchange: not before the day is over there
        ("X.UNKNOWN", NEW_YORK, "2025-10-30 20:00", "2025-10-31 23:59", "2025-10-30", "2025-11-01 04:00"),
        ("X.UNKNOWN", NEW_YORK, "2025-10-30 20:00", "2025-11-01 04:00", "2025-10-31", "2025-11-02 04:00"),
        # where trading never stops, Yahoo's session ends a minute before midnight, or at it
        ("BTC-USD", MIDNIGHT, "2025-10-31 23:59", "2025-10-31 12:00", "2025-10-30", "2025-11-01 00:14"),
        ("BTC-USD", MIDNIGHT, "2025-11-01 00:00", "2025-10-31 12:00", "2025-10-30", "2025-11-01 00:15"),
        ("BTC-USD", MIDNIGHT, "2025-10-30 23:59", "2025-10-31 12:00", "2025-10-30", "2025-11-01 00:15"),
        ("EURUSD=X", LONDON, "2025-07-31 22:59", "2025-07-31 12:00", "2025-07-30", "2025-07-31 23:14"),
        ("EURUSD=X", LONDON, "2025-07-30 22:59", "2025-07-31 12:00", "2025-07-30", "2025-08-01 00:15"),
    ],
)  # fmt: skip
def test_the_last_bar_waits_for_its_session_whatever_session_yahoo_speaks_of(
    ticker: str, place: tuple[str, str], told: str, now: str, last: str, fresh_until: str,
    server: YahooServer, source: YahooSource,
) -> None:  # fmt: skip
    zone, opens = place
    today = pd.Timestamp(at(now)).tz_convert(zone).tz_localize(None).normalize()
    days = sessions_between(ticker, today - pd.DateOffset(months=1), today)  # the last one may be running
    server.plans[ticker] = StockAt(made_up_bars(days), zone=zone, opens=opens, ends=at(told))
    source.clock = lambda: at(now)
    answer = source.fetch(ticker, Request("max"))
    assert answer.frame.index[-1] == pd.Timestamp(last)
    assert answer.dropped == ({} if len(answer.frame) == len(days) else {"unfinished": 1})
    assert answer.fresh_until == at(fresh_until)


@pytest.mark.parametrize(
    ("interval", "first", "now", "kept"),
    [
        ("1wk", "2025-10-27", "2025-10-31 15:00", False),  # Friday's session, of which Yahoo does not speak yet
        ("1wk", "2025-10-27", "2025-10-31 20:15", True),
        ("1mo", "2025-10-01", "2025-10-31 15:00", False),
        ("1mo", "2025-10-01", "2025-10-31 20:15", True),
    ],
)
def test_a_week_or_month_waits_for_its_last_session(
    interval: str, first: str, now: str, kept: bool, server: YahooServer, source: YahooSource
) -> None:
    starts = pd.date_range(end=first, periods=12, freq="7D" if interval == "1wk" else "MS")
    server.plans["AAPL"] = StockAt(made_up_bars(starts), ends=at("2025-10-30 20:00"))
    source.clock = lambda: at(now)
    answer = source.fetch("AAPL", Request("max", interval=interval))
    assert answer.frame.index[-1] == starts[-1 if kept else -2]


@pytest.mark.parametrize(
    ("zone", "now", "midnight"),
    [
        ("America/Sao_Paulo", "2018-11-03 15:00", "2018-11-04 03:00"),  # clocks went from midnight to one
        ("America/Havana", "2025-11-01 15:00", "2025-11-02 04:00"),  # and here from one to midnight, a second one
        ("UTC", "2025-10-31 23:59", "2025-11-01 00:00"),
    ],
)
def test_a_day_ends_at_midnight_even_where_clocks_change_then(zone: str, now: str, midnight: str) -> None:
    today, over, fresh_until = state_of_today("AAPL", None, zone, at(now))
    assert (f"{today:%Y-%m-%d}", over, fresh_until) == (now[:10], False, at(midnight))


def test_prices_keep_their_digits(server: YahooServer, source: YahooSource) -> None:
    server.plans["DIGIT"] = stock = Stock(made_up_bars(past_sessions("DIGIT")))
    answer = source.fetch("DIGIT", Request("max", adjust="splits"))
    pd.testing.assert_frame_equal(answer.frame[QUOTES], stock.bars[QUOTES], check_exact=True, check_freq=False)


@pytest.mark.parametrize(("ticker", "known_as"), [("BRK.B", "BRK-B"), ("BRK/B", "BRK-B"), ("BF.A", "BF-A")])
def test_a_share_class_is_named_as_yahoo_writes_it(
    ticker: str, known_as: str, server: YahooServer, source: YahooSource
) -> None:
    server.plans[ticker] = UNKNOWN
    with pytest.raises(SourceError, match=f"it writes this one {known_as}"):
        source.fetch(ticker, Request("1y"))
