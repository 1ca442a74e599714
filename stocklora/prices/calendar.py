"""Trading days: which exchange a ticker trades on, which days that exchange is open, and when such a day is over.

Tickers are written as Yahoo writes them: ``AAPL`` (United States), ``600519.SS`` (Shanghai), ``0700.HK``
(Hong Kong), ``BTC-USD`` (every day). Calendars come from exchange_calendars and are built for whole
years, only those that are asked for, since a calendar of every year there is takes seconds.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections.abc import Callable
from typing import Any

import pandas as pd

from stocklora.cli.console import warn

Clock = Callable[[], dt.datetime]  # UTC

UNITED_STATES = "XNYS"
EVERY_DAY = "24/7"
WEEKDAYS = "24/5"
EARLIEST_ZONE = dt.timedelta(hours=14)  # where a day begins first
SETTLING = dt.timedelta(minutes=15)  # after the close, until the auction and late trades are in

# Yahoo's suffix -> exchange_calendars' name. Regional boards keep the days of their main exchange.
SUFFIXES = {
    "SS": "XSHG", "SH": "XSHG", "SZ": "XSHG", "BJ": "XSHG", "HK": "XHKG", "TW": "XTAI", "TWO": "XTAI",
    "T": "XTKS", "KS": "XKRX", "KQ": "XKRX", "SI": "XSES", "KL": "XKLS", "JK": "XIDX", "BK": "XBKK", "PS": "XPHS",
    "NS": "XBOM", "BO": "XBOM", "KA": "XKAR", "AX": "XASX", "XA": "XASX", "NZ": "XNZE",
    "L": "XLON", "IL": "XLON", "IR": "XDUB", "PA": "XPAR", "AS": "XAMS", "BR": "XBRU", "LS": "XLIS",
    "DE": "XETR", "F": "XFRA", "BE": "XFRA", "DU": "XDUS", "HM": "XHAM", "MU": "XFRA", "SG": "XSTU", "HA": "XFRA",
    "MI": "XMIL", "MC": "XMAD", "SW": "XSWX", "VI": "XWBO", "ST": "XSTO", "HE": "XHEL", "CO": "XCSE", "OL": "XOSL",
    "IC": "XICE", "TL": "XTAL", "RG": "XRIS", "VS": "XLIT", "WA": "XWAR", "PR": "XPRA", "BD": "XBUD", "RO": "XBSE",
    "AT": "ASEX", "IS": "XIST", "ME": "XMOS", "TA": "XTAE", "SR": "XSAU", "JO": "XJSE",
    "TO": "XTSE", "V": "XTSE", "NE": "XTSE", "CN": "XTSE", "MX": "XMEX", "SA": "BVMF", "BA": "XBUE", "SN": "XSGO",
    "CL": "XBOG", "LM": "XLIM",
    # share classes written with a point: BRK.B
    "A": UNITED_STATES, "B": UNITED_STATES, "C": UNITED_STATES, "US": UNITED_STATES,
}  # fmt: skip

INDICES = {
    "^FTSE": "XLON", "^GDAXI": "XETR", "^MDAXI": "XETR", "^FCHI": "XPAR", "^STOXX50E": "XETR", "^N225": "XTKS",
    "^HSI": "XHKG", "^HSCE": "XHKG", "^AXJO": "XASX", "^AORD": "XASX", "^GSPTSE": "XTSE", "^BVSP": "BVMF",
    "^MXX": "XMEX", "^KS11": "XKRX", "^KQ11": "XKRX", "^TWII": "XTAI", "^STI": "XSES", "^BSESN": "XBOM",
    "^NSEI": "XBOM", "^IBEX": "XMAD", "^AEX": "XAMS", "^SSMI": "XSWX", "^OMX": "XSTO", "^ATX": "XWBO",
}  # fmt: skip

CRYPTO = re.compile(r"[A-Z0-9]{2,}-(USD|EUR|GBP|JPY|CNY|KRW|INR|CAD|AUD|CHF|BRL|TRY|BTC|ETH|USDT|USDC)", re.IGNORECASE)
YEARS_AT_ONCE = 5

# Days closed every year, for years beyond a calendar that is a list (Shanghai's ends with the current year).
CLOSED_ANYWHERE = ((1, 1),)
CLOSED_AT = {"XSHG": ((5, 1), (10, 1), (10, 2), (10, 3))}


def exchange_of(ticker: str) -> str | None:
    """The exchange_calendars name for a ticker, or None where its suffix names no exchange known here."""
    name = ticker.strip().upper()
    if CRYPTO.fullmatch(name):
        return EVERY_DAY
    if name.endswith("=X"):
        return WEEKDAYS
    if name.endswith("=F"):
        return "CMES"
    if name.startswith("^"):
        return INDICES.get(name, UNITED_STATES)
    stem, point, suffix = name.rpartition(".")
    if point and stem:
        return SUFFIXES.get(suffix)
    if re.fullmatch(r"\d{6}", name):
        return "XSHG"  # A-shares are often written without a suffix; Shanghai and Shenzhen keep the same days
    return UNITED_STATES


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
    parts = [
        block_of_sessions(code, year, YEARS_AT_ONCE)
        for year in range(start.year - start.year % YEARS_AT_ONCE, end.year + 1, YEARS_AT_ONCE)
    ]
    if not parts:
        return pd.DatetimeIndex([], name="Date")
    days = parts[0].append(parts[1:])
    days = days[(days >= start) & (days <= end)].rename("Date")
    if len(days) and code not in {EVERY_DAY, WEEKDAYS}:
        bottom, top = known_range(code)
        if start < bottom or days[-1] > top:
            warn_once(
                f"{ticker}: the calendar of {code} is known from {bottom.year} to {top.date()} only; "
                "beyond that, weekdays stand in for trading days"
            )
    return days


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
