"""From a list of tickers to each one's prices or the reason why they did not come: gently, patiently, once a day.

What is common to all sources is here: few requests at once, growing waits when a source says it is too much, and a
cache, so that asking again costs no request. A cached answer is good until the source may know more: the close of a
session that was open when it was fetched, else the end of the exchange's day. It is never good on another day, and
keeps the time at which it was fetched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd

from stocklora.cli.console import UserError, progress, warn
from stocklora.prices.reading import read_table
from stocklora.prices.sources.request import (
    SOURCE_NAMES,
    Answer,
    DownloadSettings,
    Request,
    Source,
    SourceError,
    period_start,
    request_of,
    tickers_of,
)
from stocklora.prices.tables import meta_path, read_meta, write_prices
from stocklora.runtime.files import BUNDLED_PRICES, bundled_folder

CACHE_VARIABLE = "STOCKLORA_CACHE"
CACHE_FORMAT = 1  # raise when the meaning of an entry changes
KEPT = ("timezone", "currency", "dropped", "splits")  # of an answer, beside its bars and times
AT_ONCE = 4  # requests in flight
LONGEST_WAIT_S = 120.0
NETWORK_RETRIES = 1  # a name that does not resolve will not resolve in ten seconds either


def fetch_prices(
    settings: DownloadSettings, requests: Mapping[str, Request] | None = None
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Prices as ``settings`` ask, and the beginning of their sidecar.

    Args:
        settings: what to fetch and how.
        requests: one request a ticker, where they differ (``--update``); by default all ask the same.

    Returns:
        Frames by ticker, and what :func:`stocklora.prices.tables.write_prices` takes as ``meta``. The key
        ``failed`` is there if some tickers did not come: ``{ticker: reason}``.

    Raises:
        NothingCame: no ticker came.
        UserError: the settings make no sense.
    """
    request = request_of(settings)
    if requests is None:
        requests = dict.fromkeys(tickers_of(settings.ticker), request)
    if settings.source == "sample":
        if settings.interval != "1d" or settings.adjust != "all":
            raise UserError("--source sample has daily, fully adjusted prices only; leave out --interval and --adjust")
        return sample_prices(list(requests), settings.period, settings.start, settings.end)

    source: Source
    if settings.source == "akshare":
        from stocklora.prices.sources.ashares import AkshareSource

        source = AkshareSource(settings.timeout_s)
    else:
        from stocklora.prices.sources.yahoo import YahooSource

        source = YahooSource(cache_folder() / "yfinance", settings.timeout_s)
    cache = PriceCache() if settings.cache else None
    answers, failures = fetch_all(source, requests, cache=cache, retries=settings.retries, wait_s=settings.retry_wait_s)
    if not answers:
        raise NothingCame(failures)
    frames = {ticker: answer.frame for ticker, answer in answers.items()}
    return frames, beginning_of_meta(settings, answers, failures)


class NothingCame(UserError):
    """No ticker came; ``failures`` has each one's reason."""

    def __init__(self, failures: Mapping[str, SourceError]) -> None:
        first, error = next(iter(failures.items()))
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        kinds = {failure.kind for failure in failures.values()}
        advice = ""
        if kinds & {"network", "rate", "server", "refused"}:
            advice = "; nothing was written; try later, or use the bundled prices: --source sample"
        elif kinds == {"empty"}:
            advice = "; nothing was written; ask for other days with --period or --start"
        super().__init__(f"{first}{others}: {error}{advice}")
        self.failures = {ticker: str(error) for ticker, error in failures.items()}


def beginning_of_meta(
    settings: DownloadSettings, answers: Mapping[str, Answer], failures: Mapping[str, SourceError]
) -> dict[str, Any]:
    """What is known about fetched prices, for their sidecar. ``time`` is that of the oldest answer."""
    meta: dict[str, Any] = {
        "source": settings.source,
        "origins": dict.fromkeys(answers, SOURCE_NAMES[settings.source]),
        "adjust": settings.adjust,
        "interval": settings.interval,
        "time": min(answer.time for answer in answers.values()).isoformat(timespec="seconds"),
        "timezones": {ticker: answer.timezone for ticker, answer in answers.items()},
        "currencies": {ticker: answer.currency for ticker, answer in answers.items()},
    }
    if settings.source == "yahoo":
        meta["auto_adjust"] = settings.adjust == "all"
    of_some: dict[str, Any] = {
        "splits": {ticker: answer.splits for ticker, answer in answers.items() if answer.splits},
        "dropped": {ticker: answer.dropped for ticker, answer in answers.items() if answer.dropped},
        "from_cache": [ticker for ticker, answer in answers.items() if answer.cached],
        "failed": {ticker: str(error) for ticker, error in failures.items()},
    }
    return meta | {name: value for name, value in of_some.items() if value}


class Patience:
    """The shared manners of all workers: one refusal makes everyone wait, a dead network stops everyone."""

    def __init__(self, retries: int, wait_s: float) -> None:
        self.retries = retries
        self.wait_s = wait_s
        self.lock = threading.Lock()
        self.not_before = 0.0
        self.broken: SourceError | None = None

    def hold(self, seconds: float) -> None:
        """Make everyone wait for so many seconds from now."""
        with self.lock:
            self.not_before = max(self.not_before, time.monotonic() + seconds)

    def stop(self) -> None:
        """Let nobody wait or ask any more: the run has ended, by Ctrl-C or a fault."""
        with self.lock:
            self.broken = self.broken or SourceError("stopped", "the run was stopped")
            self.not_before = 0.0

    def fetch(self, source: Source, ticker: str, request: Request) -> Answer:
        """Ask until there is an answer, a reason that asking again cannot change, or no patience left."""
        attempt = 0
        while True:
            while (left := self.not_before - time.monotonic()) > 0:
                time.sleep(min(left, 0.5))
            if self.broken is not None:
                raise SourceError(self.broken.kind, f"not tried, since: {self.broken}")
            try:
                return source.fetch(ticker, request)
            except SourceError as error:
                limit = min(self.retries, NETWORK_RETRIES) if error.kind == "network" else self.retries
                if not error.passing or attempt >= limit:
                    # What stops one ticker here would stop the next: don't knock on a closed door.
                    if error.kind in {"rate", "network"}:
                        self.broken = error
                    raise
                # Doubling waits, spread by half, so that several users do not come back in step.
                seconds = self.wait_s * 2**attempt * random.uniform(0.5, 1.5)
                seconds = min(max(seconds, error.wait_s), LONGEST_WAIT_S)
                attempt += 1
                warn(f"{ticker}: {error}; trying again in {seconds:.1f} s ({attempt} of {limit})")
                self.hold(seconds)


def fetch_all(
    source: Source, requests: Mapping[str, Request], *, cache: PriceCache | None, retries: int, wait_s: float
) -> tuple[dict[str, Answer], dict[str, SourceError]]:
    """Answers and failures by ticker, each in the order of ``requests``; every ticker is in one of the two."""
    answers: dict[str, Answer] = {}
    failures: dict[str, SourceError] = {}
    for ticker, request in requests.items():
        if cache is not None and (known := cache.get(source.name, ticker, request)) is not None:
            answers[ticker] = known
    open_requests = {ticker: request for ticker, request in requests.items() if ticker not in answers}
    patience = Patience(retries, wait_s)
    pool = ThreadPoolExecutor(max_workers=AT_ONCE)
    try:
        waiting = {
            pool.submit(patience.fetch, source, ticker, request): ticker for ticker, request in open_requests.items()
        }
        with progress() as bar:
            task = bar.add_task("downloading", total=len(waiting), visible=bool(waiting))
            for future in as_completed(waiting):
                ticker = waiting[future]
                try:
                    answers[ticker] = future.result()
                    if cache is not None:
                        cache.put(source.name, ticker, open_requests[ticker], answers[ticker])
                except SourceError as error:
                    failures[ticker] = error
                bar.advance(task)
    except BaseException:
        patience.stop()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return (
        {ticker: answers[ticker] for ticker in requests if ticker in answers},
        {ticker: failures[ticker] for ticker in requests if ticker in failures},
    )


def cache_folder() -> Path:
    """``$STOCKLORA_CACHE``, else ``stocklora`` in the system's cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "stocklora"


class PriceCache:
    """A folder of entries, one table and sidecar each. A damaged or unwritable cache is only a missing one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or cache_folder()) / "prices"

    def path(self, source: str, ticker: str, request: Request) -> Path:
        """Where the answer to a request is kept."""
        key = json.dumps([CACHE_FORMAT, source, ticker, dataclasses.asdict(request)], default=str)
        safe = "".join(c if c.isalnum() else "_" for c in ticker)
        return self.folder / f"{safe}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.csv.gz"

    def get(self, source: str, ticker: str, request: Request, now: dt.datetime | None = None) -> Answer | None:
        """The entry, if there is a whole one that the source could not better yet."""
        now = now or dt.datetime.now(dt.UTC)
        path = self.path(source, ticker, request)
        try:
            meta = read_meta(path)
            if meta is None or not path.exists():
                return None
            fetched, until = (dt.datetime.fromisoformat(meta[name]) for name in ("time", "fresh_until"))
            if not fetched <= now < until:
                return None
            frames = read_table(path, meta, any_interval=True)
            if list(frames) != [ticker] or len(frames[ticker]) != meta["rows"]:
                return None
            kept = {name: meta[name] for name in KEPT}
            return Answer(frames[ticker], fetched, **kept, fresh_until=until, cached=True)
        except (UserError, KeyError, TypeError, ValueError, OSError):
            return None

    def put(self, source: str, ticker: str, request: Request, answer: Answer) -> None:
        """Keep an answer; entries whose day is over go."""
        if answer.fresh_until is None:
            return
        meta = {
            "source": source,
            "adjust": request.adjust,
            "interval": request.interval,
            "time": answer.time.isoformat(),
            "fresh_until": answer.fresh_until.isoformat(),
            **{name: getattr(answer, name) for name in KEPT},
        }
        with contextlib.suppress(UserError, OSError):
            write_prices({ticker: answer.frame}, self.path(source, ticker, request), meta)
            self.prune()

    def prune(self) -> None:
        """Delete entries written more than two days ago."""
        old = dt.datetime.now(dt.UTC).timestamp() - 2 * 86400
        for path in self.folder.glob("*.csv.gz"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < old:
                    path.unlink()
                    meta_path(path).unlink(missing_ok=True)


def bundled_prices() -> dict[str, pd.DataFrame]:
    """Every bundled day, one frame a ticker."""
    return read_table(bundled_folder() / BUNDLED_PRICES)


def sample_prices(
    ticker: str | Sequence[str], period: str = "1y", start: str | None = None, end: str | None = None
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Bundled prices of one or several tickers, and the sidecar's beginning (source, adjustment, interval).

    ``period`` counts back from the last day the bundle holds for a ticker, not from today.

    Raises:
        UserError: a ticker or range that the bundle does not hold; an unreadable period.
    """
    bundled = bundled_prices()
    origins = (read_meta(bundled_folder() / BUNDLED_PRICES) or {}).get("origins", {})
    symbols = [one.upper() for one in ([ticker] if isinstance(ticker, str) else ticker)]
    parts: dict[str, pd.DataFrame] = {}
    for symbol in symbols:
        if symbol not in bundled:
            tickers = ", ".join(f"{name} ({days_of(frame)})" for name, frame in bundled.items())
            raise UserError(
                f"the bundled sample has no ticker {symbol}; it has {tickers}; for any other, leave out --source sample"
            )
        parts[symbol] = within(bundled[symbol], period, start, end)
        if not len(parts[symbol]):
            raise UserError(f"the bundled sample has no {symbol} in that range; it has {days_of(bundled[symbol])}")
    meta = {"source": "sample", "origins": {symbol: str(origins.get(symbol, BUNDLED_PRICES)) for symbol in symbols}}
    return parts, {**meta, "adjust": "all", "interval": "1d"}


def days_of(frame: pd.DataFrame) -> str:
    return f"{frame.index[0]:%Y-%m-%d} to {frame.index[-1]:%Y-%m-%d}"


def within(frame: pd.DataFrame, period: str, start: str | None, end: str | None) -> pd.DataFrame:
    """The rows from ``start`` (or one ``period`` back) up to, not including, ``end``."""
    if end is not None:
        frame = frame[frame.index < pd.Timestamp(end)]
    if start is not None:
        return frame[frame.index >= pd.Timestamp(start)]
    if not len(frame) or period == "max":
        return frame
    return frame[frame.index > period_start(period, frame.index[-1])]
