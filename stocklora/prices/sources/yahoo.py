"""Yahoo Finance through yfinance, with its surprises turned into answers or named failures.

yfinance logs and returns an empty frame where others would raise, does not retry HTTP 429, gives the
running day as if it were done, and leaves rows without a close in. Here each ticker ends as an
``Answer`` whose bars are whole days, or as a ``SourceError`` that says why.

``STOCKLORA_YAHOO_URL`` sends every request to another address that speaks Yahoo's protocol (a relay,
or the test suite's server) instead of ``*.yahoo.com``.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import re
import threading
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd

from stocklora.cli.console import one_line
from stocklora.prices.calendar import SETTLING, Clock, session_close, sessions_between, utc_now
from stocklora.prices.sources.request import Answer, Request, SourceError, clean_bars, period_start

RELAY_VARIABLE = "STOCKLORA_YAHOO_URL"
FACTS = ("exchangeTimezoneName", "currency", "currentTradingPeriod")
INSTANT = dt.timedelta(seconds=1)  # a session that ends at midnight is of the day before
SPACING_S = 0.1  # between the starts of two requests, whoever makes them


class YahooSource:
    """One session, one cookie and one pace for all tickers."""

    name = "yahoo"

    def __init__(self, cache_folder: Path | None = None, timeout_s: float = 15.0, clock: Clock = utc_now) -> None:
        import yfinance

        # Failures become exceptions that we turn into words; its own words would only double them.
        logging.getLogger("yfinance").setLevel(logging.CRITICAL + 1)
        # It still uses what pandas will drop; that is its authors' concern, not our users'.
        warnings.filterwarnings("ignore", module=r"yfinance(\.|$)")
        yfinance.config.debug.hide_exceptions = False
        if cache_folder is not None:
            with contextlib.suppress(OSError):
                cache_folder.mkdir(parents=True, exist_ok=True)
                yfinance.set_tz_cache_location(str(cache_folder))
        self.yfinance: Any = yfinance
        self.timeout_s, self.clock = timeout_s, clock
        self.seen = threading.local()  # what the chart endpoint last answered to this thread
        self.session = self.watched(new_session())

    def watched(self, session: Any) -> Any:
        """The session with its ``request`` wrapped: relayed if asked, spaced, and its last answer noted."""
        relay = os.environ.get(RELAY_VARIABLE, "").rstrip("/")
        send, lock, last = session.request, threading.Lock(), [0.0]

        def request(method: str, url: str, *args: Any, **options: Any) -> Any:
            with lock:
                time.sleep(max(0.0, last[0] + SPACING_S - time.monotonic()))
                last[0] = time.monotonic()
            if relay:
                parts = urlsplit(url)
                url = relay + parts.path + (f"?{parts.query}" if parts.query else "")
            is_chart = "/v8/finance/chart/" in url
            if is_chart:
                self.seen.status, self.seen.retry_after = None, 0.0
            response = send(method, url, *args, **options)
            if is_chart:
                self.seen.status = int(response.status_code)
                with contextlib.suppress(TypeError, ValueError):
                    self.seen.retry_after = float(response.headers.get("Retry-After"))
            return response

        session.request = request
        return session

    def fetch(self, ticker: str, request: Request) -> Answer:
        """Ask Yahoo once for one ticker.

        Raises:
            SourceError: there is no answer with whole days in it.
        """
        from yfinance.data import YfData

        # yfinance remembers responses by address, a server's 500 included: a retry must ask anew.
        YfData.cache_get.cache_clear()
        self.seen.status, self.seen.retry_after, self.seen.asked = None, 0.0, True
        stock = self.yfinance.Ticker(ticker, session=self.session)
        try:
            raw = stock.history(**self.arguments(request))
            metadata = stock.get_history_metadata()
            # Only these: the whole mapping would load intraday data for its last key.
            facts = {name: metadata[name] for name in FACTS if name in metadata}
        except Exception as error:
            raise self.reason(ticker, error) from None
        if raw is None or raw.empty:
            raise self.reason(ticker, None)
        return self.answer(ticker, request, raw, facts, self.clock())

    def arguments(self, request: Request) -> dict[str, Any]:
        """Arguments of ``Ticker.history``; ``auto_adjust`` is always set, for its default has changed before."""
        options: dict[str, Any] = {
            "interval": request.interval,
            "auto_adjust": request.adjust == "all",
            "actions": True,
            "keepna": True,  # empty rows are dropped and counted here
            "timeout": self.timeout_s,
        }
        # Undoing splits needs every split up to today, so the range is cut afterwards.
        end = None if request.adjust == "none" else request.end
        if request.start is None and request.end is None:
            return {**options, "period": request.period}
        start = request.start
        if start is None and request.end is not None and request.period != "max":
            start = (period_start(request.period, pd.Timestamp(request.end)) + pd.Timedelta(days=1)).date()
        begin = {"period": "max"} if start is None else {"start": str(start)}
        return options | begin | ({"end": str(end)} if end else {})

    def reason(self, ticker: str, error: Exception | None) -> SourceError:
        """Name a failure by what the chart endpoint last said, since yfinance's exceptions do not tell apart."""
        status = self.seen.status
        if status == 429 or type(error).__name__ == "YFRateLimitError":
            return SourceError("rate", "Yahoo answers 429, too many requests", self.seen.retry_after)
        if status is None:
            # curl appends a link to its manual
            text = one_line(str(error or "no answer")).partition(" See http")[0].rstrip(".")[:160]
            return SourceError("network", f"Yahoo cannot be reached ({text})")
        if status >= 500:
            return SourceError("server", f"Yahoo answers {status}, a fault on its side", self.seen.retry_after)
        if status == 404:
            known_as = re.sub(r"^([A-Z]+)[./]([ABC])$", r"\1-\2", ticker)
            advice = "look it up on finance.yahoo.com" if known_as == ticker else f"it writes this one {known_as}"
            return SourceError("unknown", f"Yahoo knows no such ticker; {advice}")
        if status >= 400:
            return SourceError("refused", f"Yahoo refuses with HTTP {status}")
        yahoo_reason = getattr(error, "yahoo_reason", None)
        if yahoo_reason:
            return SourceError("empty", f"Yahoo says: {yahoo_reason}")
        # A 200 whose JSON lacks the part with the bars makes yfinance stumble over the gap.
        if error is None or type(error).__name__.startswith("YF") or isinstance(error, (LookupError, TypeError)):
            return SourceError("empty", "Yahoo has no prices for it in that range")
        return SourceError("server", f"Yahoo's answer makes no sense ({type(error).__name__})")

    def answer(
        self, ticker: str, request: Request, raw: pd.DataFrame, facts: dict[str, Any], now: dt.datetime
    ) -> Answer:
        """Turn yfinance's frame into whole days without a time zone."""
        zone = str(facts.get("exchangeTimezoneName") or "UTC")
        splits = raw.get("Stock Splits", pd.Series(0.0, index=raw.index))
        raw.index = splits.index = local_days(raw.index, zone)
        ratios = {str(day.date()): float(ratio) for day, ratio in splits.items() if ratio and ratio != 1}
        if request.adjust == "none":
            raw = without_split_adjustment(raw, splits)
            if request.end is not None:
                raw = raw[raw.index < pd.Timestamp(request.end)]
        today, over, fresh_until = state_of_today(ticker, session_end(facts), zone, now)
        unfinished = len(raw) > 0 and is_unfinished(ticker, raw.index[-1], request.interval, today, over)
        frame, dropped = clean_bars(raw, unfinished)
        if frame.empty:
            raise SourceError("empty", "Yahoo gave no finished day with a price in that range")
        currency = facts.get("currency")
        return Answer(frame, now, zone, currency and str(currency), dropped, ratios, fresh_until)


def new_session() -> Any:
    """A session as yfinance wants it: curl_cffi's, which looks like a browser, else a plain one."""
    try:
        from curl_cffi import requests as backend

        return backend.Session(impersonate="chrome")
    except ImportError:
        import requests

        return requests.Session()


def local_days(index: pd.Index, zone: str) -> pd.DatetimeIndex:
    """The exchange's own calendar days of zoned timestamps."""
    stamps = pd.DatetimeIndex(index)
    if stamps.tz is not None:
        stamps = stamps.tz_convert(zone).tz_localize(None)
    return stamps.normalize().as_unit("ns").rename("Date")


def without_split_adjustment(raw: pd.DataFrame, splits: pd.Series) -> pd.DataFrame:
    """Prices as they were quoted: Yahoo divides days before a split by its ratio, so multiply them back."""
    ratio = splits.where(splits > 0, 1.0).to_numpy()
    # product of the ratios of all later days
    later = np.append(np.cumprod(ratio[::-1])[::-1][1:], 1.0)
    raw = raw.copy()
    for name in ("Open", "High", "Low", "Close"):
        raw[name] = raw[name] * later
    raw["Volume"] = raw["Volume"] / later
    return raw


def session_end(facts: dict[str, Any]) -> dt.datetime | None:
    """When the current (or latest) regular session ends, as Yahoo tells it."""
    try:
        end = facts["currentTradingPeriod"]["regular"]["end"]
        stamp = pd.Timestamp(end, unit="s", tz="UTC") if isinstance(end, (int, float)) else pd.Timestamp(end)
        return stamp.tz_convert("UTC").to_pydatetime()
    except (KeyError, TypeError, ValueError):
        return None


def state_of_today(
    ticker: str, session_ends: dt.datetime | None, zone: str, now: dt.datetime
) -> tuple[pd.Timestamp, bool, dt.datetime]:
    """The exchange's day, whether its session is over, and when the source may know more than now.

    Yahoo may still speak of an earlier session; then the exchange's calendar is asked about today's. Where nobody
    knows of one, today is not over before midnight.

    Args:
        session_ends: when the session ends that Yahoo takes for the current one.
        zone: the exchange's.
    """
    today = local_day(now, zone)
    settled, over = None, False
    if session_ends is not None:
        session = local_day(session_ends - INSTANT, zone)
        ends = session_close(ticker, today) if session < today else session_ends
        if ends is not None:
            settled = ends + SETTLING
            over = session > today or now >= settled
    if settled is None or now >= settled:
        midnight = (today + pd.Timedelta(days=1)).tz_localize(zone, ambiguous=True, nonexistent="shift_forward")
        settled = midnight.tz_convert("UTC").to_pydatetime()
    return today, over, settled


def local_day(moment: dt.datetime, zone: str) -> pd.Timestamp:
    """The exchange's calendar day of a moment."""
    return pd.Timestamp(moment).tz_convert(zone).tz_localize(None).normalize()


def is_unfinished(ticker: str, day: pd.Timestamp, interval: str, today: pd.Timestamp, today_is_over: bool) -> bool:
    """True for a last bar whose session (for ``1d``), week or month still has trading in it."""
    if interval == "1d":
        return bool(day > today or (day == today and not today_is_over))
    last = day + (pd.DateOffset(months=1) if interval == "1mo" else pd.DateOffset(weeks=1)) - pd.Timedelta(days=1)
    first_open_day = today + pd.Timedelta(days=1) if today_is_over else today
    return bool(last >= first_open_day and len(sessions_between(ticker, first_open_day, last)))
