"""Asking a price source for many tickers: gently, patiently, and without losing a failure.

A source is anything with ``fetch(ticker, request) -> Answer`` that raises :class:`SourceError`. What is
common to all of them is here: few requests at once, growing waits when a source says it is too much,
a cache for the day, and the cleaning of bars before anyone sees them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from stocklora.cli.console import progress, warn

if TYPE_CHECKING:
    from stocklora.prices.sources.cache import PriceCache
from stocklora.prices.sources.request import Answer, Request, Source, SourceError

AT_ONCE = 4  # requests in flight
LONGEST_WAIT_S = 120.0
NETWORK_RETRIES = 1  # a name that does not resolve will not resolve in ten seconds either


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
