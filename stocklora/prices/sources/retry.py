"""Asking a price source for many tickers: gently, patiently, and without losing a failure.

A source is anything with ``fetch(ticker, request) -> Answer`` that raises :class:`SourceError`. What is
common to all of them is here: few requests at once, growing waits when a source says it is too much,
a cache for the day, and the cleaning of bars before anyone sees them.
"""

from __future__ import annotations

import datetime as dt
import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from stocklora.cli.console import progress, warn

if TYPE_CHECKING:
    import pandas as pd

    from stocklora.prices.sources.cache import PriceCache

AT_ONCE = 4  # requests in flight
LONGEST_WAIT_S = 120.0
NETWORK_RETRIES = 1  # a name that does not resolve will not resolve in ten seconds either


@dataclass(frozen=True)
class Request:
    """What to ask for. ``start`` wins over ``period``; ``end`` is not included, as in yfinance."""

    period: str = "1y"
    start: dt.date | None = None
    end: dt.date | None = None
    interval: str = "1d"
    adjust: str = "all"


@dataclass
class Answer:
    """One ticker's bars as the source gave them, and what is known about them.

    ``dropped`` counts the rows left out by reason; ``fresh_until`` is when the source may know more.
    """

    frame: pd.DataFrame
    time: dt.datetime
    timezone: str | None = None
    currency: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    splits: dict[str, float] = field(default_factory=dict)
    fresh_until: dt.datetime | None = None
    cached: bool = False


class SourceError(Exception):
    """Why a ticker did not come. ``kind``: rate, server, network, refused, unknown, empty or stopped."""

    def __init__(self, kind: str, text: str, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.kind = kind
        self.wait_s = wait_s

    @property
    def passing(self) -> bool:
        """True where asking again may help."""
        return self.kind in {"rate", "server", "network"}


class Source(Protocol):
    name: str

    def fetch(self, ticker: str, request: Request) -> Answer: ...


class Patience:
    """The shared manners of all workers: one refusal makes everyone wait, a dead network stops everyone."""

    def __init__(self, retries: int, wait_s: float) -> None:
        self.retries = retries
        self.wait_s = wait_s
        self.lock = threading.Lock()
        self.not_before = 0.0
        self.broken: SourceError | None = None

    def wait_turn(self) -> None:
        while (left := self.not_before - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))

    def hold(self, seconds: float) -> None:
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
            self.wait_turn()
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


def clean_bars(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Bars fit for a table, and how many were left out or mended and why.

    ``empty``: a price is missing. ``broken``: a price is not positive, or high is below low. Both are
    dropped. ``widened``: open or close lay outside the bar, whose high or low then moves to hold it.
    """
    import numpy as np

    from stocklora.prices.tables import PRICE_COLUMNS, QUOTES, bar_faults

    frame = frame[PRICE_COLUMNS].astype("float64").replace([np.inf, -np.inf], np.nan)
    frame["Volume"] = frame["Volume"].fillna(0.0).clip(lower=0.0)
    counts = {}
    empty = frame[QUOTES].isna().any(axis=1)
    frame, counts["empty"] = frame[~empty], int(empty.sum())
    broken = (frame[QUOTES] <= 0).any(axis=1) | (frame["High"] < frame["Low"])
    frame, counts["broken"] = frame[~broken].copy(), int(broken.sum())
    counts["widened"] = int(bar_faults(frame).sum())
    frame["High"] = frame[QUOTES].max(axis=1)
    frame["Low"] = frame[QUOTES].min(axis=1)
    twice = frame.index.duplicated(keep="last")
    frame, counts["duplicate"] = frame[~twice].sort_index(), int(twice.sum())
    return frame.rename_axis(index="Date", columns=None), {reason: n for reason, n in counts.items() if n}
