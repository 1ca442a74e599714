"""What a price source is asked and what it answers, and what the user asks for."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stocklora.cli.console import UserError
from stocklora.cli.settings import setting
from stocklora.prices.settings import ReadingSettings

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_TICKER = "AAPL"
SOURCE_NAMES = {"yahoo": "Yahoo Finance", "akshare": "akshare", "sample": "the bundled sample"}
TICKER = re.compile(r"[A-Z0-9^][A-Z0-9.^=&_-]{0,19}")
PERIOD = re.compile(r"([1-9]\d{0,3})(d|wk|mo|y)")


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


def clean_bars(frame: pd.DataFrame, unfinished: bool = False) -> tuple[pd.DataFrame, dict[str, int]]:
    """Bars fit for a table, and how many were left out or mended and why.

    ``unfinished``: the last bar, where it has trading in it still, as the caller knows.
    ``empty``: a price is missing. ``broken``: a price is not positive, or high is below low. Both are
    dropped. ``widened``: open or close lay outside the bar, whose high or low then moves to hold it.
    """
    import numpy as np

    from stocklora.prices.bars import QUOTES, bar_faults
    from stocklora.prices.csv_columns import PRICE_COLUMNS

    frame = frame.iloc[: len(frame) - unfinished]
    frame = frame[PRICE_COLUMNS].astype("float64").replace([np.inf, -np.inf], np.nan)
    frame["Volume"] = frame["Volume"].fillna(0.0).clip(lower=0.0)
    counts = {}
    empty = frame[QUOTES].isna().any(axis=1)
    frame, counts["empty"] = frame[~empty], int(empty.sum())
    broken = (frame[QUOTES] <= 0).any(axis=1) | (frame["High"] < frame["Low"])
    frame, counts["broken"] = frame[~broken].copy(), int(broken.sum())
    counts["widened"] = int(np.any(list(bar_faults(frame).values()), axis=0).sum())
    frame["High"] = frame[QUOTES].max(axis=1)
    frame["Low"] = frame[QUOTES].min(axis=1)
    twice = frame.index.duplicated(keep="last")
    frame, counts["duplicate"] = frame[~twice].sort_index(), int(twice.sum())
    counts["unfinished"] = int(unfinished)
    return frame.rename_axis(index="Date", columns=None), {reason: n for reason, n in counts.items() if n}


@dataclass(frozen=True)
class DownloadSettings(ReadingSettings):
    """Settings of ``download.py``."""

    ticker: list[str] | None = setting(
        None,
        f"one or more tickers as Yahoo writes them, or a text file of them (default: {DEFAULT_TICKER}; "
        "with --update, those in the file)",
        nargs="+",
        section="what",
    )
    period: str = setting("1y", "how far back: 5d, 6mo, 1y, 10y, ytd, max; --start wins over it", section="what")
    start: str | None = setting(None, "first day, such as 2020-01-01", section="what", metavar="DAY")
    end: str | None = setting(None, "day after the last, such as 2025-01-01", section="what", metavar="DAY")
    interval: str = setting("1d", "length of a bar: a day, week or month", choices=("1d", "1wk", "1mo"), section="what")
    adjust: str = setting(
        "all",
        "all: for splits and dividends; splits: for splits alone; none: as quoted on the day",
        choices=("none", "splits", "all"), section="what",
    )  # fmt: skip
    source: str = setting(
        "yahoo",
        "yahoo; akshare for A-shares (an optional package); sample for the bundled prices, without a network",
        choices=("yahoo", "akshare", "sample"), section="where",
    )  # fmt: skip
    output: Path = setting(
        Path("sample_test.csv"), "CSV (or .csv.gz) to write; a folder gets one CSV a ticker", section="where"
    )
    update: bool = setting(False, "append new days to the CSV after checking that it agrees", section="where")
    check: list[Path] | None = setting(
        None, "download nothing: report on the quality of these CSVs or folders", nargs="+", section="where"
    )
    convert: Path | None = setting(
        None, "download nothing: read this table of another program or site, say what it is, and write it to --output",
        section="where", metavar="FILE",
    )  # fmt: skip
    cache: bool = setting(True, "a second run within the day asks for nothing twice", section="network")
    retries: int = setting(4, "how often to ask again when a source says too many requests", section="network")
    retry_wait_s: float = setting(2.0, "seconds before the first retry; they double, with jitter", section="network")
    timeout_s: float = setting(15.0, "seconds to wait for an answer", section="network")

    def __post_init__(self) -> None:
        if self.convert is None:
            self.refuse_reading("is for --convert, which reads a file; downloads need no such word")


def period_start(period: str, last: pd.Timestamp) -> pd.Timestamp:
    """The day before the first of a period such as ``1y`` that ends on ``last``."""
    import pandas as pd

    if period == "ytd":
        return pd.Timestamp(last.year - 1, 12, 31)
    match = PERIOD.fullmatch(period)
    if not match:
        raise UserError(f"--period {period}: not a period; write it like 5d, 6mo, 1y, 10y, ytd or max")
    count, unit = int(match[1]), match[2]
    if unit == "d":
        return last - pd.tseries.offsets.BusinessDay(count)
    try:
        return last - pd.DateOffset(**{{"wk": "weeks", "mo": "months", "y": "years"}[unit]: count})
    except (OverflowError, ValueError):
        raise UserError(f"--period {period}: longer than there are prices; use max") from None


def tickers_of(given: Sequence[str] | None) -> list[str]:
    """The tickers that ``--ticker`` names, files of them opened; upper case, each once, in order.

    A file holds tickers separated by white space or commas; ``#`` begins a comment.

    Raises:
        UserError: a word that cannot be a ticker, or none at all.
    """
    tickers: dict[str, None] = {}
    for word in given or [DEFAULT_TICKER]:
        path = Path(word)
        looks_like_a_file = path.suffix.lower() in {".txt", ".lst", ".csv"} or "/" in word or "\\" in word
        if looks_like_a_file or path.is_file():
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8 text"
                raise UserError(
                    f"--ticker {word}: the file cannot be read ({reason}); give a text file of tickers"
                ) from None
        else:
            lines = [word]
        for number, line in enumerate(lines, 1):
            for name in re.split(r"[\s,;]+", line.partition("#")[0].strip()):
                if not name:
                    continue
                if not TICKER.fullmatch(name.upper()):
                    where = f"{word}, row {number}" if looks_like_a_file else "--ticker"
                    raise UserError(f"{where}: '{name[:40]}' is no ticker; write it as Yahoo does, such as 600519.SS")
                tickers[name.upper()] = None
    if not tickers:
        raise UserError(f"--ticker {' '.join(given or [])}: no ticker in it; write one a line")
    return list(tickers)


def request_of(settings: DownloadSettings) -> Request:
    """What ``settings`` ask for each ticker, checked.

    Raises:
        UserError: a day or period that cannot be read, or days in the wrong order.
    """
    import pandas as pd

    days: dict[str, dt.date | None] = {}
    for name in ("start", "end"):
        text = getattr(settings, name)
        try:
            days[name] = dt.date.fromisoformat(text) if text is not None else None
        except ValueError:
            raise UserError(f"--{name} {text}: not a day; write it as 2024-01-31") from None
    start, end = days["start"], days["end"]
    if start is not None and end is not None and start >= end:
        raise UserError(f"--start {start} is not before --end {end}, which is the day after the last; swap them")
    if start is not None and start > dt.date.today():
        raise UserError(f"--start {start} is in the future; give a day that has been")
    if settings.period not in {"max", "ytd"}:
        period_start(settings.period, pd.Timestamp(dt.date.today()))
    for name in ("retries", "retry_wait_s"):
        if getattr(settings, name) < 0:
            raise UserError(f"--{name} {getattr(settings, name)}: must not be negative")
    if settings.timeout_s <= 0:
        raise UserError(f"--timeout_s {settings.timeout_s}: must be above zero")
    return Request(settings.period, start, end, settings.interval, settings.adjust)
