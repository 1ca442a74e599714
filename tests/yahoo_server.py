"""A small server that speaks Yahoo's chart JSON, cookie and crumb, so that the real yfinance can be driven.

A test puts a ``Stock`` (or a canned answer) under a ticker, points ``STOCKLORA_YAHOO_URL`` here, and
reads afterwards which requests came.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd

Canned = tuple[int, dict[str, str], str]
RANGES = ["1d", "5d", "1mo", "3mo", "6mo", "1y", "2y", "5y", "10y", "ytd", "max"]
SPANS = {"5d": {"days": 7}, "1mo": {"months": 1}, "6mo": {"months": 6}, "1y": {"years": 1}, "2y": {"years": 2}}

TOO_MANY: Canned = (429, {}, "Too Many Requests\r\n")
BROKEN: Canned = (500, {}, "Internal Server Error")
DOWN: Canned = (200, {}, "<html>Will be right back...</html>")
NO_RESULT: Canned = (200, {}, json.dumps({"chart": {"result": [], "error": None}}))
UNKNOWN: Canned = (
    404,
    {},
    json.dumps(
        {
            "chart": {
                "result": None,
                "error": {"code": "Not Found", "description": "No data found, symbol may be delisted"},
            }
        }
    ),
)


@dataclass
class Stock:
    """One instrument as Yahoo tells it: ``bars`` are divided by later splits, but not by dividends.

    ``bars`` may hold NaN. ``running`` adds a bar of today whose session ends ``closes_in_s`` from now.
    """

    bars: pd.DataFrame
    zone: str = "America/New_York"
    opens: str = "09:30"
    dividends: dict[str, float] = field(default_factory=dict)
    splits: dict[str, tuple[float, float]] = field(default_factory=dict)
    running: bool = False
    closes_in_s: float = -3600.0
    currency: str = "USD"
    kind: str = "EQUITY"

    def stamps(self) -> list[int]:
        local = (self.bars.index + pd.Timedelta(self.opens + ":00")).tz_localize(self.zone)
        return [int(stamp.timestamp()) for stamp in local]

    def adjusted(self) -> np.ndarray:
        """Yahoo's adjclose: each dividend scales the days before it by ``1 - dividend / close before``."""
        close = self.bars["Close"].to_numpy()
        factor = np.ones(len(close))
        for day, amount in self.dividends.items():
            place = self.bars.index.get_loc(day)
            factor[:place] *= 1 - amount / close[place - 1]
        return close * factor

    def chart(self, ticker: str, query: dict[str, str]) -> Canned:
        """The answer to ``/v8/finance/chart/TICKER``."""
        now = time.time()
        bars, stamps, adjclose = self.bars, np.array(self.stamps()), self.adjusted()
        if self.running:
            row = bars.iloc[-1:] * 1.01
            bars = pd.concat([bars, row])
            stamps, adjclose = np.append(stamps, int(now) - 2), np.append(adjclose, row["Close"].iloc[0])
        if "period1" in query:
            first, last = float(query["period1"]), float(query["period2"])
        else:
            span = SPANS.get(query["range"])
            last = now
            first = 0 if span is None else (pd.Timestamp(now, unit="s") - pd.DateOffset(**span)).timestamp()
        keep = (stamps >= first) & (stamps < max(last, first + 1))
        session = {"timezone": "XXX", "gmtoffset": 0, "start": int(now + self.closes_in_s - 20000)}
        session["end"] = int(now + self.closes_in_s)
        meta = {
            "currency": self.currency,
            "symbol": ticker,
            "instrumentType": self.kind,
            "exchangeTimezoneName": self.zone,
            "timezone": "XXX",
            "gmtoffset": 0,
            "regularMarketTime": int(now),
            "firstTradeDate": int(stamps[0]) if len(stamps) else 0,
            "priceHint": 2,
            "currentTradingPeriod": {name: dict(session) for name in ("pre", "regular", "post")},
            "dataGranularity": query.get("interval", "1d"),
            "range": query.get("range", ""),
            "validRanges": RANGES,
        }
        result: dict[str, Any] = {"meta": meta, "indicators": {"quote": [{}], "adjclose": [{}]}}
        if keep.any():
            result["timestamp"] = stamps[keep].tolist()
            quote = {name.lower(): values(bars[name].to_numpy()[keep]) for name in bars.columns}
            quote["volume"] = [None if v is None else int(v) for v in quote["volume"]]
            result["indicators"] = {"quote": [quote], "adjclose": [{"adjclose": values(adjclose[keep])}]}
            result["events"] = self.events(first, last)
        return 200, {}, json.dumps({"chart": {"result": [result], "error": None}})

    def events(self, first: float, last: float) -> dict[str, Any]:
        at = dict(zip((str(day.date()) for day in self.bars.index), self.stamps(), strict=True))
        inside = {day: stamp for day, stamp in at.items() if first <= stamp < last}
        found: dict[str, Any] = {}
        for day, amount in self.dividends.items():
            if day in inside:
                found.setdefault("dividends", {})[str(at[day])] = {"amount": amount, "date": at[day]}
        for day, (top, bottom) in self.splits.items():
            if day in inside:
                split = {"date": at[day], "numerator": top, "denominator": bottom, "splitRatio": f"{top:g}:{bottom:g}"}
                found.setdefault("splits", {})[str(at[day])] = split
        return found


def zone_at_noon() -> str:
    """A zone where it is about noon now, so that a session around now begins and ends on one day."""
    hours_behind = time.gmtime().tm_hour - 12
    return f"Etc/GMT{hours_behind:+d}"  # POSIX counts westwards


def values(numbers: np.ndarray) -> list[float | None]:
    return [None if not np.isfinite(number) else float(number) for number in numbers]


class YahooServer:
    """The server, running in a thread from ``start`` to ``stop``.

    ``plans[ticker]`` is what the ticker's chart requests get: a ``Stock``, a canned answer, or a list
    of either, one a request, whose last item stays. Tickers without a plan are unknown.
    """

    def __init__(self) -> None:
        self.plans: dict[str, Any] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.pause_s = 0.0
        self.retry_after: str | None = None
        self.crumb: Canned = (200, {}, "x9Y.crumb")
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def start(self) -> YahooServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def charts(self, ticker: str | None = None) -> list[dict[str, str]]:
        """The queries of the chart requests so far."""
        return [query for name, query in self.requests if name.startswith("chart:") and ticker in (None, name[6:])]

    def answer(self, path: str, query: dict[str, str]) -> Canned:
        if path.startswith("/v8/finance/chart/"):
            ticker = path.rpartition("/")[2].replace("%5E", "^")
            with self.lock:
                self.requests.append((f"chart:{ticker}", query))
                plan = self.plans.get(ticker, UNKNOWN)
                if isinstance(plan, list):
                    plan = plan.pop(0) if len(plan) > 1 else plan[0]
            if self.pause_s:
                time.sleep(self.pause_s)
            made: Callable[..., Canned] | None = getattr(plan, "chart", None)
            return made(ticker, query) if made else plan
        with self.lock:
            self.requests.append((path, query))
        if path.endswith("/getcrumb"):
            return self.crumb
        return 404, {"Set-Cookie": "A3=d=local; Path=/"}, "<html></html>"

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                query = {name: found[0] for name, found in parse_qs(parts.query).items()}
                status, headers, body = server.answer(parts.path, query)
                if status == 429 and server.retry_after:
                    headers = {**headers, "Retry-After": server.retry_after}
                content = body.encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client timed out, as a test wanted

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def made_up_bars(days: pd.DatetimeIndex, seed: int = 0, start: float = 100.0) -> pd.DataFrame:
    """Plausible bars on the given days."""
    random = np.random.default_rng(seed)
    close = start * np.exp(np.cumsum(random.normal(0, 0.01, len(days))))
    opens = close * np.exp(random.normal(0, 0.005, len(days)))
    high = np.maximum(opens, close) * (1 + random.uniform(0, 0.01, len(days)))
    low = np.minimum(opens, close) * (1 - random.uniform(0, 0.01, len(days)))
    volume = random.integers(10_000, 90_000, len(days)).astype(float)
    columns = {"Open": opens, "High": high, "Low": low, "Close": close, "Volume": volume}
    return pd.DataFrame(columns, index=days.rename("Date")).round(dict.fromkeys(("Open", "High", "Low", "Close"), 4))
