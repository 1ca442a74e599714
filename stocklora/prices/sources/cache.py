"""Answers of price sources, kept for the rest of the day so that asking again costs no request.

An entry is good until the source may know more: the close of a session that was open when it was
fetched, else the end of the exchange's day. It is never good on another day, and an answer from here
keeps the time at which it was fetched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import json
import os
import sys
from pathlib import Path

from stocklora.cli.console import UserError
from stocklora.prices.sources.request import Answer, Request
from stocklora.prices.tables import meta_path, read_meta, read_table, write_prices

VARIABLE = "STOCKLORA_CACHE"
FORMAT = 1  # raise when the meaning of an entry changes


def cache_folder() -> Path:
    """``$STOCKLORA_CACHE``, else ``stocklora`` in the system's cache folder."""
    if given := os.environ.get(VARIABLE):
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
        key = json.dumps([FORMAT, source, ticker, dataclasses.asdict(request)], default=str)
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
            frames = read_table(path, meta)
            if list(frames) != [ticker] or len(frames[ticker]) != meta["rows"]:
                return None
            kept = {name: meta[name] for name in ("timezone", "currency", "dropped", "splits")}
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
            "timezone": answer.timezone,
            "currency": answer.currency,
            "dropped": answer.dropped,
            "splits": answer.splits,
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
