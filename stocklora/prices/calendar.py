"""Trading days: which exchange a ticker trades on, which days that exchange is open, and when such a day is over.

Tickers are written as Yahoo writes them: ``AAPL`` (United States), ``600519.SS`` (Shanghai), ``0700.HK``
(Hong Kong), ``BTC-USD`` (every day). Calendars come from exchange_calendars and are built for whole
years, only those that are asked for, since a calendar of every year there is takes seconds.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable
from typing import Any

import pandas as pd

from stocklora.cli.console import warn
from stocklora.prices.exchanges import EVERY_DAY, WEEKDAYS, exchange_of

Clock = Callable[[], dt.datetime]  # UTC

EARLIEST_ZONE = dt.timedelta(hours=14)  # where a day begins first
SETTLING = dt.timedelta(minutes=15)  # after the close, until the auction and late trades are in

YEARS_AT_ONCE = 5

# Days closed every year, for years beyond a calendar that is a list (Shanghai's ends with the current year).
CLOSED_ANYWHERE = ((1, 1),)
CLOSED_AT = {"XSHG": ((5, 1), (10, 1), (10, 2), (10, 3))}


def next_sessions(ticker: str, after: dt.date | pd.Timestamp, count: int) -> pd.DatetimeIndex:
    """The first ``count`` days after ``after`` on which the ticker's exchange is open.

    Where no calendar says (an unknown suffix, a year beyond the calendar's knowledge) weekdays stand
    in, with one line of warning.
    """
    if count < 1:
        return pd.DatetimeIndex([], name="Date")
    start = pd.Timestamp(after).tz_localize(None).normalize() + pd.Timedelta(days=1)
    # The longest closure of any exchange known here is about two weeks; double what is still short.
    span = 2 * count + 20
    while True:
        days = sessions_between(ticker, start, start + pd.Timedelta(days=span))
        if len(days) >= count:
            return days[:count]
        span *= 2


def sessions_between(ticker: str, first: dt.date | pd.Timestamp, last: dt.date | pd.Timestamp) -> pd.DatetimeIndex:
    """All sessions of the ticker's exchange from ``first`` to ``last``, both included; timezone-free."""
    start = pd.Timestamp(first).tz_localize(None).normalize()
    end = pd.Timestamp(last).tz_localize(None).normalize()
    code = exchange_of(ticker)
    if code is None:
        warn_once(
            f"{ticker}: no exchange is known for the suffix '.{ticker.rpartition('.')[2]}'; "
            "its trading days are taken to be weekdays, holidays included"
        )
        code = WEEKDAYS
    days = sessions_of(code, start, end)
    if len(days) and code not in {EVERY_DAY, WEEKDAYS}:
        bottom, top = known_range(code)
        if start < bottom or days[-1] > top:
            warn_once(
                f"{ticker}: the calendar of {code} is known from {bottom.year} to {top.date()} only; "
                "beyond that, weekdays stand in for trading days"
            )
    return days


def sessions_of(code: str, start: pd.Timestamp, end: pd.Timestamp) -> pd.DatetimeIndex:
    """All sessions of an exchange from ``start`` to ``end``, both included."""
    parts = [
        block_of_sessions(code, year, YEARS_AT_ONCE)
        for year in range(start.year - start.year % YEARS_AT_ONCE, end.year + 1, YEARS_AT_ONCE)
    ]
    if not parts:
        return pd.DatetimeIndex([], name="Date")
    days = parts[0].append(parts[1:])
    return days[(days >= start) & (days <= end)].rename("Date")


def zone_of(code: str | None) -> str | None:
    """The time zone of an exchange; UTC where trading never stops, None where nothing is known."""
    if code in (EVERY_DAY, WEEKDAYS):
        return "UTC"
    from exchange_calendars.calendar_utils import _default_calendar_factories as factories

    zone = getattr(factories.get(code), "tz", None) if code else None
    return str(zone) if zone is not None and not isinstance(zone, property) else None


def known_exchanges() -> list[str]:
    """The names that ``--exchange`` takes."""
    from exchange_calendars.calendar_utils import _default_calendar_factories as factories

    return [EVERY_DAY, WEEKDAYS, *(name for name in factories if name not in (EVERY_DAY, WEEKDAYS))]


@functools.lru_cache(maxsize=256)
def block_of_sessions(code: str, first_year: int, years: int) -> pd.DatetimeIndex:
    """Sessions of whole years: the calendar's where it knows, weekdays where it doesn't."""
    start, end = pd.Timestamp(first_year, 1, 1), pd.Timestamp(first_year + years - 1, 12, 31)
    if code == EVERY_DAY:
        return pd.date_range(start, end, unit="ns")
    if code == WEEKDAYS:
        return pd.bdate_range(start, end, unit="ns")
    bottom, top = known_range(code)
    known_start, known_end = max(start, bottom), min(end, top)
    if known_start > known_end:
        return guessed_days(code, start, end)
    import exchange_calendars

    calendar: Any = exchange_calendars.get_calendar(code, start=known_start, end=known_end)
    known = pd.DatetimeIndex(calendar.sessions).tz_localize(None)
    before = guessed_days(code, start, known_start - pd.Timedelta(days=1))
    behind = guessed_days(code, known_end + pd.Timedelta(days=1), end)
    return before.append([known, behind])


def guessed_days(code: str, start: pd.Timestamp, end: pd.Timestamp) -> pd.DatetimeIndex:
    """Weekdays without the few holidays that never move."""
    days = pd.bdate_range(start, end, unit="ns")
    for month, day in (*CLOSED_ANYWHERE, *CLOSED_AT.get(code, ())):
        days = days[~((days.month == month) & (days.day == day))]
    return days


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def session_close(ticker: str, day: pd.Timestamp) -> dt.datetime | None:
    """When the session of ``day`` ends, early closes included; UTC.

    None where no calendar says: an unknown suffix, a year beyond the calendar, a day without a session.
    Where trading never stops (crypto, currencies) a day ends at midnight UTC.
    """
    code = exchange_of(ticker)
    if code is None:
        return None
    if code in {EVERY_DAY, WEEKDAYS}:
        return (day.tz_localize("UTC") + pd.Timedelta(days=1)).to_pydatetime()
    close = closes_of(code, day.year).get(day)
    return None if close is None else close.to_pydatetime()


@functools.lru_cache(maxsize=64)
def closes_of(code: str, year: int) -> dict[pd.Timestamp, pd.Timestamp]:
    """Each session of a year and when it ends (UTC), as far as the calendar knows."""
    import exchange_calendars

    bottom, top = known_range(code)
    first, last = max(bottom, pd.Timestamp(year, 1, 1)), min(top, pd.Timestamp(year, 12, 31))
    if first >= last:
        return {}
    calendar: Any = exchange_calendars.get_calendar(code, start=first, end=last)
    return dict(calendar.closes)


def is_complete(ticker: str, day: pd.Timestamp, now: dt.datetime) -> bool:
    """Whether nothing can be added any more to the bar of ``day``.

    Where no calendar says, a bar is believed unless its day has begun nowhere on Earth.
    """
    close = session_close(ticker, day)
    if close is None:
        return bool(day.date() <= (now + EARLIEST_ZONE).date())
    return now >= close + SETTLING


@functools.cache
def known_range(code: str) -> tuple[pd.Timestamp, pd.Timestamp]:
    """First and last day that exchange_calendars answers for; it refuses days outside."""
    from exchange_calendars.calendar_utils import _default_calendar_factories as factories

    factory = factories[code]
    bottom, top = factory.bound_min(), factory.bound_max()
    # A calendar without bounds is rules, not a list: fit for any year that prices exist for.
    return (
        pd.Timestamp(1970, 1, 1) if bottom is None else pd.Timestamp(bottom).tz_localize(None).normalize(),
        pd.Timestamp(2100, 12, 31) if top is None else pd.Timestamp(top).tz_localize(None).normalize(),
    )


@functools.cache
def warn_once(message: str) -> None:
    warn(message)
