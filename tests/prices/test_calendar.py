"""Trading days: known holidays, exchanges by suffix, dates far from today; and when a day's session is over."""

from __future__ import annotations

import datetime as dt

import exchange_calendars
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stocklora.prices import calendar as sessions
from stocklora.prices import exchanges
from stocklora.prices.calendar import is_complete, known_range, next_sessions, session_close, sessions_between
from stocklora.prices.exchanges import SUFFIXES, exchange_of


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def days(ticker: str, after: str, count: int) -> list[str]:
    return [str(day.date()) for day in next_sessions(ticker, pd.Timestamp(after), count)]


@pytest.mark.parametrize(
    ("ticker", "after", "expected"),
    [
        # a weekend, Thanksgiving, Christmas, Good Friday
        ("AAPL", "2025-10-31", ["2025-11-03", "2025-11-04", "2025-11-05"]),
        ("AAPL", "2025-11-26", ["2025-11-28", "2025-12-01"]),
        ("AAPL", "2025-12-24", ["2025-12-26", "2025-12-29"]),
        ("BRK-B", "2024-03-28", ["2024-04-01"]),
        # the week the New York exchange was shut in 2001, and old data in general
        ("IBM", "2001-09-10", ["2001-09-17", "2001-09-18"]),
        ("IBM", "2000-02-29", ["2000-03-01"]),
        # National Day in Shanghai and Shenzhen, Golden Week in Tokyo, Lunar New Year in Hong Kong
        ("600519.SS", "2024-09-30", ["2024-10-08"]),
        ("000001.SZ", "2024-09-30", ["2024-10-08"]),
        ("600519", "2024-09-30", ["2024-10-08"]),
        ("7203.T", "2024-05-02", ["2024-05-07"]),
        ("0700.HK", "2024-02-09", ["2024-02-14"]),
        # Boxing Day in London, Christmas Eve in Frankfurt, Labour Day in Paris, Canada Day in Toronto
        ("VOD.L", "2024-12-24", ["2024-12-27"]),
        ("SAP.DE", "2024-12-23", ["2024-12-27"]),
        ("MC.PA", "2024-04-30", ["2024-05-02"]),
        ("SHOP.TO", "2024-06-28", ["2024-07-02"]),
        ("^N225", "2024-05-02", ["2024-05-07"]),
        ("^GSPC", "2025-12-24", ["2025-12-26"]),
        # crypto every day, currencies every weekday
        ("BTC-USD", "2025-12-24", ["2025-12-25", "2025-12-26", "2025-12-27"]),
        ("EURUSD=X", "2025-12-24", ["2025-12-25", "2025-12-26", "2025-12-29"]),
        # far beyond the year that calendars are usually built to
        ("AAPL", "2040-12-24", ["2040-12-26"]),
        ("SAP.DE", "2035-12-30", ["2036-01-02"]),
    ],
)
def test_known_days(ticker: str, after: str, expected: list[str]) -> None:
    assert days(ticker, after, len(expected)) == expected


def test_dates_timestamps_and_zones_mean_the_same_day() -> None:
    expected = ["2025-11-03"]
    assert days("AAPL", "2025-10-31", 1) == expected
    assert [str(d.date()) for d in next_sessions("AAPL", dt.date(2025, 10, 31), 1)] == expected
    assert days("AAPL", "2025-10-31 16:00-04:00", 1) == expected
    index = next_sessions("AAPL", dt.date(2025, 10, 31), 4)
    assert index.tz is None
    assert index.name == "Date"
    assert next_sessions("AAPL", dt.date(2025, 10, 31), 0).empty


@pytest.mark.parametrize(
    ("ticker", "exchange"),
    [("AAPL", "XNYS"), ("brk.b", "XNYS"), ("RDS-B", "XNYS"), ("BTC-USD", "24/7"), ("eth-eur", "24/7"),
     ("ES=F", "CMES"), ("EURUSD=X", "24/5"), ("RY.TO", "XTSE"), ("005930.KS", "XKRX"), ("sample_test", "XNYS"),
     ("X.NOWHERE", None)],
)  # fmt: skip
def test_exchange_by_suffix(ticker: str, exchange: str | None) -> None:
    assert exchange_of(ticker) == exchange


def test_every_suffix_names_a_calendar_there_is() -> None:
    for code in {*SUFFIXES.values(), *exchanges.INDICES.values(), "CMES"}:
        bottom, top = known_range(code)
        assert bottom < pd.Timestamp("2025-01-01") < top, code


def test_unknown_suffix_is_weekdays_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    sessions.warn_once.cache_clear()
    assert days("ABC.QQ", "2025-12-24", 2) == ["2025-12-25", "2025-12-26"]
    assert days("ABC.QQ", "2025-12-25", 1) == ["2025-12-26"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "'.QQ'" in lines[0]
    assert "weekdays" in lines[0]


def test_beyond_the_calendar_weekdays_stand_in_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    sessions.warn_once.cache_clear()
    _, top = known_range("XSHG")
    found = next_sessions("600519.SS", top, 5)
    assert len(found) == 5
    assert (found > top).all()
    assert (found.day_of_week < 5).all()
    assert not ((found.month == 1) & (found.day == 1)).any()
    assert "the calendar of XSHG is known" in capsys.readouterr().err


def test_a_long_range_is_the_calendar_itself() -> None:
    calendar = exchange_calendars.get_calendar("XNYS", start="2000-01-01", end="2013-12-31")
    found = sessions_between("IBM", dt.date(2000, 3, 1), dt.date(2013, 3, 1))
    assert found.equals(calendar.sessions_in_range("2000-03-01", "2013-03-01").rename("Date"))


CALENDARS = {
    "AAPL": "XNYS",
    "600519.SS": "XSHG",
    "0700.HK": "XHKG",
    "7203.T": "XTKS",
    "VOD.L": "XLON",
    "SAP.DE": "XETR",
}


@given(
    ticker=st.sampled_from(sorted(CALENDARS)),
    after=st.dates(dt.date(2015, 1, 1), dt.date(2026, 6, 30)),
    count=st.integers(1, 60),
)
def test_sessions_increase_and_are_never_a_holiday(ticker: str, after: dt.date, count: int) -> None:
    found = next_sessions(ticker, after, count)
    # the same package asked for another range than ours
    calendar = exchange_calendars.get_calendar(CALENDARS[ticker], start="2014-06-01", end="2026-12-31")
    assert len(found) == count
    assert found[0] > pd.Timestamp(after)
    assert found.is_monotonic_increasing
    assert found.is_unique
    assert (found.day_of_week < 5).all()
    inside = found[found <= calendar.last_session]
    assert all(calendar.is_session(day) for day in inside)
    # and none was left out
    assert len(calendar.sessions_in_range(pd.Timestamp(after) + pd.Timedelta(days=1), inside[-1])) == len(inside)


@given(after=st.dates(dt.date(1990, 1, 1), dt.date(2060, 1, 1)), count=st.integers(1, 30))
def test_crypto_trades_every_day(after: dt.date, count: int) -> None:
    expected = pd.date_range(after + dt.timedelta(days=1), periods=count, name="Date", unit="ns")
    assert next_sessions("BTC-USD", after, count).equals(expected)


@pytest.mark.parametrize(
    ("ticker", "day", "close"),
    [
        ("AAPL", "2025-10-31", "2025-10-31 20:00"),
        ("AAPL", "2025-11-03", "2025-11-03 21:00"),  # winter time
        ("AAPL", "2025-11-28", "2025-11-28 18:00"),  # the day after Thanksgiving ends at one
        ("AAPL", "2025-11-27", None),  # Thanksgiving
        ("AAPL", "2025-11-01", None),  # a Saturday
        ("0700.HK", "2025-12-24", "2025-12-24 04:00"),  # half a day before Christmas
        ("7203.T", "2024-11-01", "2024-11-01 06:00"),
        ("7203.T", "2024-11-05", "2024-11-05 06:30"),  # Tokyo trades half an hour longer since that day
        ("600519.SS", "2025-10-31", "2025-10-31 07:00"),
        ("VOD.L", "2025-07-01", "2025-07-01 15:30"),
        ("BTC-USD", "2025-11-01", "2025-11-02 00:00"),
        ("X.UNKNOWN", "2025-10-31", None),
        ("600519.SS", "1980-01-02", None),  # before the calendar begins
    ],
)
def test_when_a_session_ends(ticker: str, day: str, close: str | None) -> None:
    assert session_close(ticker, pd.Timestamp(day)) == (at(close) if close else None)


@pytest.mark.parametrize(
    ("ticker", "day", "now", "complete"),
    [
        ("AAPL", "2025-10-31", "2025-10-31 13:29", False),  # before the open
        ("AAPL", "2025-10-31", "2025-10-31 19:59", False),
        ("AAPL", "2025-10-31", "2025-10-31 20:00", False),  # the auction's trades are still coming in
        ("AAPL", "2025-10-31", "2025-10-31 20:14", False),
        ("AAPL", "2025-10-31", "2025-10-31 20:15", True),
        ("AAPL", "2025-10-30", "2025-10-31 15:00", True),
        ("AAPL", "2025-11-28", "2025-11-28 18:15", True),  # an early close
        ("7203.T", "2025-10-31", "2025-10-31 06:44", False),
        ("7203.T", "2025-10-31", "2025-10-31 06:45", True),
        ("BTC-USD", "2025-11-01", "2025-11-01 23:59", False),
        ("BTC-USD", "2025-11-01", "2025-11-02 00:15", True),
        ("X.UNKNOWN", "2025-10-31", "2025-10-31 01:00", True),  # nobody says: the table is believed
        ("X.UNKNOWN", "2025-11-02", "2025-10-31 23:00", False),  # but not about tomorrow
        ("AAPL", "2025-11-01", "2025-10-30 09:00", False),  # a Saturday to come
    ],
)
def test_a_bar_is_complete_when_its_session_has_closed_and_settled(
    ticker: str, day: str, now: str, complete: bool
) -> None:
    assert is_complete(ticker, pd.Timestamp(day), at(now)) == complete
