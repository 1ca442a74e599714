"""What is odd about a price table that is whole: gaps, jumps, stale runs, days without volume.

None of it is an error. A jump may be an unadjusted split or an earnings surprise; the report gives the
dates, so that the reader can look. :func:`short_form` is the line that training prints.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import listed, print_table, say
from stocklora.prices.calendar import sessions_between
from stocklora.prices.exchanges import exchange_of
from stocklora.prices.reading import read_table
from stocklora.prices.tables import price_files, read_prices, trusted_meta

JUMP = 0.25  # simple return in one bar
STALE_RUN = 5  # bars with the same close
SPLIT_RATIOS = (2, 3, 4, 5, 6, 7, 8, 10, 15, 20, 25, 30, 50, 100, 1.5, 1.25)


@dataclass(frozen=True)
class Finding:
    """One kind of oddity in one ticker: how many days, and the first few of them in words."""

    kind: str
    count: int
    details: tuple[str, ...]


def findings_of(ticker: str, frame: pd.DataFrame, meta: Mapping[str, Any] | None = None) -> list[Finding]:
    """All findings of one history, in a fixed order; empty where nothing is odd."""
    interval = (meta or {}).get("interval") or "1d"
    findings = [jumps(frame), stale_runs(frame), days_without_volume(frame)]
    if interval == "1d":
        findings[:0] = calendar_findings(ticker, frame)
    future = frame.index[frame.index > pd.Timestamp(dt.date.today())]
    findings.append(Finding("days in the future", len(future), tuple(map(day_text, future))))
    return [finding for finding in findings if finding.count]


def calendar_findings(ticker: str, frame: pd.DataFrame) -> list[Finding]:
    """Sessions without a row, and rows without a session."""
    sessions = sessions_between(ticker, frame.index[0], frame.index[-1])
    missing = sessions.difference(frame.index)
    closed = frame.index.difference(sessions)
    where = exchange_of(ticker) or "weekdays"
    findings = [
        Finding(f"missing sessions ({where})", len(missing), tuple(runs_of(missing, sessions))),
        Finding(f"rows on days without a session ({where})", len(closed), tuple(map(day_text, closed))),
    ]
    # One day off all week long is a clock, not a holiday: Monday in Tokyo is still Sunday in UTC.
    for days in (1, -1):
        moved = frame.index + pd.Timedelta(days=days)
        if len(closed) > max(2, 0.1 * len(frame)) and moved.isin(sessions).mean() > 0.98:
            text = f"dates fit the exchange when moved by {days:+d} day"
            findings.append(Finding("time zone", len(closed), (f"{text}: they were cut in another time zone",)))
    return findings


def jumps(frame: pd.DataFrame) -> Finding:
    """Returns beyond ``JUMP``, with the split they would fit."""
    close = frame["Close"].to_numpy()
    ratio = close[1:] / close[:-1]
    places = np.flatnonzero(np.abs(ratio - 1) > JUMP) + 1
    details = []
    for place in places:
        step = close[place] / close[place - 1]
        near = next((r for r in SPLIT_RATIOS for s in (r, 1 / r) if abs(step * s - 1) < 0.03), None)
        hint = ""
        if near is not None:
            sizes = f"{near:g} to 1" if step < 1 else f"1 to {near:g}"
            hint = f", near a split of {sizes}: unadjusted?"
        details.append(f"{day_text(frame.index[place])} {step - 1:+.1%}{hint}")
    return Finding(f"returns beyond {JUMP:.0%}", len(places), tuple(details))


def stale_runs(frame: pd.DataFrame) -> Finding:
    """Runs of ``STALE_RUN`` or more bars with the same close."""
    close = frame["Close"].to_numpy()
    starts = np.flatnonzero(np.r_[True, close[1:] != close[:-1]])
    lengths = np.diff(np.r_[starts, len(close)])
    runs = [(s, n) for s, n in zip(starts, lengths, strict=True) if n >= STALE_RUN]
    texts = tuple(
        f"{day_text(frame.index[s])} to {day_text(frame.index[s + n - 1])} at {close[s]:g} ({n} rows)" for s, n in runs
    )
    return Finding(f"stale runs (same close {STALE_RUN} times or more)", len(runs), texts)


def days_without_volume(frame: pd.DataFrame) -> Finding:
    """Bars without volume; a series that never has any, such as an index, is one finding."""
    days = frame.index[frame["Volume"].to_numpy() == 0]
    texts = ("on every row",) if len(days) == len(frame) else tuple(map(day_text, days))
    return Finding("zero volume", len(days), texts)


def runs_of(missing: pd.DatetimeIndex, sessions: pd.DatetimeIndex) -> list[str]:
    """Missing sessions in words, neighbours joined: ``2024-03-04 to 2024-03-08 (5)``."""
    places = sessions.get_indexer(missing)
    texts = []
    for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
        if len(run):
            first, last = day_text(sessions[run[0]]), day_text(sessions[run[-1]])
            texts.append(first if len(run) == 1 else f"{first} to {last} ({len(run)})")
    return texts


def day_text(day: pd.Timestamp) -> str:
    return f"{day:%Y-%m-%d}"


def times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def short_form(frames: Mapping[str, pd.DataFrame], meta: Mapping[str, Any] | None = None) -> str:
    """One line on all tickers: rows, dates, and how many oddities of each kind there are."""
    rows = sum(map(len, frames.values()))
    first = min(frame.index[0] for frame in frames.values())
    last = max(frame.index[-1] for frame in frames.values())
    totals: dict[str, int] = {}
    for ticker, frame in frames.items():
        for finding in findings_of(ticker, frame, meta):
            kind = finding.kind.split(" (")[0]
            totals[kind] = totals.get(kind, 0) + finding.count
    whose = next(iter(frames)) if len(frames) == 1 else f"{len(frames)} tickers"
    odd = ", ".join(f"{kind}: {count}" for kind, count in totals.items()) or "nothing odd"
    return f"{whose}: {rows:,} rows, {day_text(first)} to {day_text(last)}; {odd}"


def print_quality(path: Path) -> None:
    """Print the full report on a file, or on every file of a folder."""
    if path.is_dir():
        for file in price_files([path]):
            print_quality(file)
        return
    meta = trusted_meta(path)
    frames = read_prices(path, any_interval=True) if meta is None else read_table(path, meta, any_interval=True)
    say(f"{path}: {sum(map(len, frames.values())):,} rows, {len(frames)} ticker{'s' * (len(frames) > 1)}")
    say(f"  source: {source_text(meta)}")
    if meta and (zones := sorted(set(map(str, (meta.get("timezones") or {}).values())))):
        say(f"  time zone: {', '.join(zones)}; dates are the exchange's own days")
    else:
        say("  time zone: not recorded; dates are taken as the exchange's own days")
    rows, odd = [], []
    for ticker, frame in frames.items():
        findings = findings_of(ticker, frame, meta)
        rows.append(
            [
                ticker,
                exchange_of(ticker) or "unknown",
                len(frame),
                day_text(frame.index[0]),
                day_text(frame.index[-1]),
                ", ".join(f"{f.kind.split(' (')[0]}: {f.count}" for f in findings) or "nothing odd",
            ]
        )
        odd += [(ticker, finding) for finding in findings]
    print_table("", ["ticker", "exchange", "rows", "first", "last", "findings"], rows)
    for ticker, finding in odd:
        say(f"  {ticker}: {finding.kind}, {times(finding.count)}: {listed(finding.details)}")
    if not odd:
        say("  no gap, jump, stale run or day without volume")


def source_text(meta: Mapping[str, Any] | None) -> str:
    """Where prices come from and how they are adjusted, in words."""
    if meta is None:
        return "not recorded (no sidecar)"
    origins = ", ".join(sorted(set((meta.get("origins") or {}).values()))) or meta.get("source")
    return (
        f"{origins}, interval {meta.get('interval')}, adjust {meta.get('adjust')}, written {str(meta.get('time'))[:10]}"
    )
