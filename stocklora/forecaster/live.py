"""Prices that keep coming, and forecasts that keep up with them.

A bar is complete when its exchange has closed and the closing auction has settled; a forecast starts at
no other. A source leaves a running bar out by what it is told of today's session; here the exchange's
calendar is asked whatever the source, files included.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pandas as pd

from stocklora.cli.console import UserError, listed, say, warn
from stocklora.dataset.prepare import select_tickers
from stocklora.forecaster.settings import ForecastSettings
from stocklora.prices.calendar import Clock, is_complete, next_sessions, utc_now
from stocklora.prices.exchanges import exchange_of
from stocklora.prices.settings import AS_THEY_ARE, ReadingSettings
from stocklora.prices.sources.download import describe, fetch_or_fail, print_failures
from stocklora.prices.sources.fetch import fetch_prices
from stocklora.prices.sources.request import DownloadSettings, request_of, tickers_of
from stocklora.prices.tables import meta_path, price_files, read_prices

Prices = dict[str, pd.DataFrame]

STILL_S = 0.25  # a file that did not change for so long is taken to be whole


# ------------------------------------------------------------------------------------------- complete bars


def completed(ticker: str, frame: pd.DataFrame, now: dt.datetime) -> pd.DataFrame:
    """``frame`` without the rows at its end that are not complete yet."""
    rows = len(frame)
    while rows and not is_complete(ticker, frame.index[rows - 1], now):
        rows -= 1
    return frame.iloc[:rows]


def may_have_more(ticker: str, last: pd.Timestamp, now: dt.datetime) -> bool:
    """Whether a session after ``last`` is over, so that asking is worth a request; True where nobody knows."""
    if exchange_of(ticker) is None:
        return True
    return is_complete(ticker, next_sessions(ticker, last, 1)[0], now)


# --------------------------------------------------------------------------------------------------- feeds


class Feed(Protocol):
    """Where prices come from, again and again.

    Attributes:
        market_only: prices of tickers that are not asked for but are part of the same market.
    """

    market_only: Prices

    def first(self) -> Prices:
        """The prices now; whatever is wrong ends the run."""

    def look(self) -> Prices:
        """The prices now: the very object that was given last where there is nothing new to forecast from.

        Raises:
            UserError: they cannot be had this time.
        """

    def exit_code(self) -> int:
        """The exit code of a run without ``--watch``; names what did not come."""


def price_feed(settings: ForecastSettings, clock: Clock = utc_now) -> Feed:
    """What ``--ticker`` or ``--test_csv`` mean."""
    watching = settings.watch is not None
    if not settings.ticker:
        return FilePrices(settings.price_files, settings.tickers, watching, clock, settings)
    asked = {name: getattr(settings, name) for name in ("source", "period", "retries")}
    given = {name: value for name, value in asked.items() if value is not None}
    return FetchedPrices(DownloadSettings(ticker=settings.ticker, **given), watching, clock)


class FetchedPrices:
    """A feed of prices from a source, by the code of ``download.py`` and with its cache; nothing is written.

    While watching, a ticker is asked for only when a session has ended since its last bar; then without
    the cache, which may hold today's answer from before the bar was there, and without retries, since
    the next look is one.
    """

    def __init__(self, download: DownloadSettings, watching: bool = False, clock: Clock = utc_now) -> None:
        self.download, self.watching, self.clock = download, watching, clock
        self.tickers = tickers_of(download.ticker)
        self.market_only: Prices = {}
        self.prices: Prices = {}
        self.failed: dict[str, str] = {}

    def first(self) -> Prices:
        now = self.clock()
        frames, meta = fetch_prices(self.download, dict.fromkeys(self.tickers, request_of(self.download)))
        failed = dict(meta.get("failed", {}))
        for ticker, frame in frames.items():
            whole = completed(ticker, frame, now)
            if running := len(frame) - len(whole):
                counts = meta.setdefault("dropped", {}).setdefault(ticker, {})
                counts["unfinished"] = counts.get("unfinished", 0) + running
            if whole.empty:
                failed[ticker] = "its only days are not over yet; ask for a longer --period"
                continue
            self.prices[ticker] = whole
            say(describe(ticker, whole, meta))
        if not self.prices:
            raise UserError(f"{self.tickers[0]}: {failed[self.tickers[0]]}")
        if self.watching:
            self.warn_of_failures(failed)
        self.failed = failed
        return self.prices

    def look(self) -> Prices:
        now = self.clock()
        known = self.prices
        due = [name for name in self.tickers if name not in known or may_have_more(name, known[name].index[-1], now)]
        if not due:
            return self.prices
        once = dataclasses.replace(self.download, cache=False, retries=0)
        frames, meta = fetch_or_fail(once, dict.fromkeys(due, request_of(once)))
        self.warn_of_failures(meta.get("failed", {}))
        fresh = {ticker: completed(ticker, frame, now) for ticker, frame in frames.items()}
        longer = {
            ticker: frame
            for ticker, frame in fresh.items()
            if len(frame) and (ticker not in known or frame.index[-1] > known[ticker].index[-1])
        }
        if longer:
            both = {**known, **longer}
            self.prices = {ticker: both[ticker] for ticker in self.tickers if ticker in both}
        return self.prices

    def warn_of_failures(self, failed: Mapping[str, str]) -> None:
        """Warn of tickers that begin to fail; one that goes on failing has been named already."""
        new = [ticker for ticker in failed if ticker not in self.failed]
        if new:
            others = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
            warn(f"{new[0]}{others}: {failed[new[0]]}; it is asked for again at the next look")
        self.failed = dict(failed)

    def exit_code(self) -> int:
        return print_failures(self.failed)


class FilePrices:
    """A feed of prices from files or folders, read again when one of them has changed.

    Without watching, rows are taken as they stand; a last row whose session still runs is warned of.
    While watching, such a row waits for its close.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tickers: Sequence[str] = (),
        watching: bool = False,
        clock: Clock = utc_now,
        reading: ReadingSettings = AS_THEY_ARE,
    ) -> None:
        self.paths, self.tickers, self.watching, self.clock = list(paths), list(tickers), watching, clock
        self.reading = reading
        self.rows: Prices = {}  # as read
        self.prices: Prices = {}
        self.market_only: Prices = {}
        self.state: dict[Path, tuple[int, ...] | None] = {}
        self.warned: dict[str, pd.Timestamp] = {}

    def first(self) -> Prices:
        self.state, self.rows = state_of(self.paths), self.read()
        self.prices = self.only_complete() if self.watching else self.rows
        self.warn_of_running()
        return self.prices

    def look(self) -> Prices:
        state = state_of(self.paths)
        if state != self.state:
            state = settled(self.paths, state)
            self.rows, self.state = self.read(), state
        self.warn_of_running()
        now = self.only_complete()
        if list(now) != list(self.prices) or any(not frame.equals(self.prices[name]) for name, frame in now.items()):
            self.prices = now
        return self.prices

    def exit_code(self) -> int:
        return 0

    def read(self) -> Prices:
        """The tickers asked for; those that are not asked for become ``market_only``."""
        everything = read_prices(self.paths, reading=self.reading)
        wanted = select_tickers(everything, self.tickers)
        now = self.clock()
        self.market_only = {
            name: completed(name, frame, now) if self.watching else frame
            for name, frame in everything.items() if name not in wanted
        }  # fmt: skip
        return wanted

    def running(self) -> dict[str, pd.Timestamp]:
        """The tickers whose last row is not complete, and its day."""
        now = self.clock()
        last = {name: frame.index[-1] for name, frame in self.rows.items() if len(frame)}
        # Only a day of about now can be running: a calendar takes a moment to load, and most files are old.
        recent = pd.Timestamp((now - dt.timedelta(days=2)).date())
        return {name: day for name, day in last.items() if day >= recent and not is_complete(name, day, now)}

    def only_complete(self) -> Prices:
        running, now = self.running(), self.clock()
        return {name: completed(name, frame, now) if name in running else frame for name, frame in self.rows.items()}

    def warn_of_running(self) -> None:
        """Warn once of each last row that is not complete."""
        running = self.running()
        new = [name for name, day in running.items() if self.warned.get(name) != day]
        if new:
            what = "left out until then" if self.watching else "the forecast takes its close as final"
            names = listed([f"{name} {running[name]:%Y-%m-%d}" for name in new])
            warn(f"the last row is of a session that has not closed yet: {names}; {what}")
        self.warned = running


def state_of(paths: Sequence[Path]) -> dict[Path, tuple[int, ...] | None]:
    """What tells a changed price file, or sidecar, from an unchanged one."""
    state: dict[Path, tuple[int, ...] | None] = {}
    for path in price_files(paths):
        for part in (path, meta_path(path)):
            try:
                facts = part.stat()
                state[part] = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            except OSError:
                state[part] = None
    return state


def settled(paths: Sequence[Path], state: dict[Path, tuple[int, ...] | None]) -> dict[Path, tuple[int, ...] | None]:
    """The state once it stands still: a table's sidecar, which names its ticker, is written after it."""
    for _ in range(40):
        time.sleep(STILL_S)
        before, state = state, state_of(paths)
        if state == before:
            break
    return state


# --------------------------------------------------------------------------------------------------- watch


def watch(
    feed: Feed,
    shown: Prices,
    minutes: float,
    forecast: Callable[[Prices, str], None],
    clock: Clock = utc_now,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Look every so many minutes and forecast when there is a new complete bar, until Ctrl-C.

    A look or forecast that fails is a warning, said once for as long as it fails alike; what was new
    then is still new at the next look.

    Args:
        shown: the prices of the forecast that is out.
        forecast: takes the prices and a line that says what is new in them.

    Returns:
        0, the exit code.
    """
    forecasts, last_failure = 1, ""
    try:
        say(f"watching, one look every {minutes:g} min; Ctrl-C ends it")
        while True:
            sleep(60.0 * minutes)
            try:
                prices = feed.look()
                if prices is not shown:
                    forecast(prices, f"{clock():%Y-%m-%d %H:%M} UTC, {news(shown, prices)}")
                    shown, forecasts = prices, forecasts + 1
                last_failure = ""
            except UserError as error:
                if str(error) != last_failure:
                    warn(f"{error}; the last forecast stands, the next look is in {minutes:g} min")
                last_failure = str(error)
    except KeyboardInterrupt:
        say(f"watching has ended after {forecasts} forecast{'s' * (forecasts != 1)}")
        return 0


def news(old: Mapping[str, pd.DataFrame], new: Mapping[str, pd.DataFrame]) -> str:
    """In words, which bars are new."""
    last = {name: frame.index[-1] for name, frame in new.items() if len(frame)}
    before = {name: frame.index[-1] for name, frame in old.items() if len(frame)}
    bars = [f"{name} {day:%Y-%m-%d}" for name, day in last.items() if before.get(name) != day]
    return f"new: {listed(bars)}" if bars else "prices have changed"
