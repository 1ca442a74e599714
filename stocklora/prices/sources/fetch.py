"""Where prices come from: Yahoo Finance, akshare, or the tables bundled with the project.

:func:`fetch_prices` gives what ``download.py`` writes; :func:`sample_prices` is its bundled part alone.
Importing this module stays light: pandas and the clients load when prices are asked for.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocklora.cli.console import UserError
from stocklora.cli.settings import setting

if TYPE_CHECKING:
    import pandas as pd

    from stocklora.prices.sources.retry import Answer, Request, SourceError

# Newest first: a ticker that stands in several is taken from the newest that has days in the range.
SAMPLE_TABLES = ("AAPL_2024_2025.csv.gz", "us_large_2012_2017.csv.gz", "us_tech_2000_2013.csv.gz")
DEFAULT_TICKER = "AAPL"
SOURCE_NAMES = {"yahoo": "Yahoo Finance", "akshare": "akshare", "sample": "the bundled sample"}
TICKER = re.compile(r"[A-Z0-9^][A-Z0-9.^=&_-]{0,19}")
PERIOD = re.compile(r"([1-9]\d{0,3})(d|wk|mo|y)")


@dataclass
class DownloadSettings:
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
        choices=("none", "splits", "all"),
        section="what",
    )
    source: str = setting(
        "yahoo",
        "yahoo; akshare for A-shares (an optional package); sample for the bundled prices, without a network",
        choices=("yahoo", "akshare", "sample"),
        section="where",
    )
    output: Path = setting(
        Path("sample_test.csv"), "CSV (or .csv.gz) to write; a folder gets one CSV a ticker", section="where"
    )
    update: bool = setting(False, "append new days to the CSV after checking that it agrees", section="where")
    check: list[Path] | None = setting(
        None, "download nothing: report on the quality of these CSVs or folders", nargs="+", section="where"
    )
    cache: bool = setting(True, "a second run within the day asks for nothing twice", section="network")
    retries: int = setting(4, "how often to ask again when a source says too many requests", section="network")
    retry_wait_s: float = setting(2.0, "seconds before the first retry; they double, with jitter", section="network")
    timeout_s: float = setting(15.0, "seconds to wait for an answer", section="network")


def sample_folder() -> Path:
    """The folder of bundled tables: ``data/sample`` in a checkout, ``stocklora/_sample`` when installed.

    Raises:
        UserError: neither holds the tables, so the installation is not whole.
    """
    package = Path(__file__).resolve().parents[2]
    for folder in (package.parent / "data" / "sample", package / "_sample"):
        if (folder / SAMPLE_TABLES[0]).is_file():
            return folder
    raise UserError(f"the bundled sample prices are missing beside {package}; install the project again")


def sample_prices(
    ticker: str | Sequence[str], period: str = "1y", start: str | None = None, end: str | None = None
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Bundled prices of one or several tickers, and the sidecar's beginning (source, adjustment, interval).

    ``period`` counts back from the last day the bundle holds for a ticker, not from today.

    Raises:
        UserError: a ticker or range that the bundle does not hold; an unreadable period.
    """
    from stocklora.prices.tables import read_meta, read_table

    folder = sample_folder()
    wanted = [one.upper() for one in ([ticker] if isinstance(ticker, str) else ticker)]
    found: dict[str, pd.DataFrame] = {}
    held: dict[str, list[str]] = {}
    origins: dict[str, str] = {}
    for name in SAMPLE_TABLES:
        meta = read_meta(folder / name) or {}
        # A sidecar lists the tickers, so that only a table that is needed gets unpacked.
        if meta.get("tickers") and not (set(wanted) - set(found)) & set(meta["tickers"]):
            for symbol in meta["tickers"]:
                held.setdefault(symbol, [])
            continue
        for symbol, frame in read_table(folder / name, meta).items():
            held.setdefault(symbol, []).append(days_of(frame))
            if symbol not in wanted or symbol in found:
                continue
            part = within(frame, period, start, end)
            if len(part):
                found[symbol] = part
                origins[symbol] = str(meta.get("origins", {}).get(symbol, name))
    for symbol in wanted:
        if symbol not in held:
            raise UserError(
                f"the bundled sample has no ticker {symbol}; it has {', '.join(sorted(held))}; "
                "for any other, leave out --source sample"
            )
        if symbol not in found:
            raise UserError(f"the bundled sample has no {symbol} in that range; it has {', '.join(held[symbol])}")
    meta = {"source": "sample", "origins": {symbol: origins[symbol] for symbol in wanted}}
    return {symbol: found[symbol] for symbol in wanted}, {**meta, "adjust": "all", "interval": "1d"}


def days_of(frame: pd.DataFrame) -> str:
    return f"{frame.index[0]:%Y-%m-%d} to {frame.index[-1]:%Y-%m-%d}"


def within(frame: pd.DataFrame, period: str, start: str | None, end: str | None) -> pd.DataFrame:
    """The rows from ``start`` (or one ``period`` back) up to, not including, ``end``."""
    import pandas as pd

    if end is not None:
        frame = frame[frame.index < pd.Timestamp(end)]
    if start is not None:
        return frame[frame.index >= pd.Timestamp(start)]
    if not len(frame) or period == "max":
        return frame
    return frame[frame.index > period_start(period, frame.index[-1])]


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

    from stocklora.prices.sources.retry import Request

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

    from stocklora.prices.sources.cache import PriceCache, cache_folder
    from stocklora.prices.sources.retry import Source, fetch_all

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
        super().__init__(nothing_came(failures))
        self.failures = {ticker: str(error) for ticker, error in failures.items()}


def nothing_came(failures: Mapping[str, SourceError]) -> str:
    """Why no ticker came, in one line, and what to do about it."""
    first, error = next(iter(failures.items()))
    others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    kinds = {failure.kind for failure in failures.values()}
    advice = ""
    if kinds & {"network", "rate", "server", "refused"}:
        advice = "; nothing was written; try later, or use the bundled prices: --source sample"
    elif kinds == {"empty"}:
        advice = "; nothing was written; ask for other days with --period or --start"
    return f"{first}{others}: {error}{advice}"


def beginning_of_meta(
    settings: DownloadSettings, answers: Mapping[str, Answer], failures: Mapping[str, SourceError]
) -> dict[str, Any]:
    """What is known about fetched prices, for their sidecar. ``time`` is that of the oldest answer."""
    dropped: dict[str, dict[str, int]] = {t: a.dropped for t, a in answers.items() if a.dropped}
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
    if any(answer.splits for answer in answers.values()):
        meta["splits"] = {ticker: answer.splits for ticker, answer in answers.items() if answer.splits}
    if dropped:
        meta["dropped"] = dropped
    if any(answer.cached for answer in answers.values()):
        meta["from_cache"] = [ticker for ticker, answer in answers.items() if answer.cached]
    if failures:
        meta["failed"] = {ticker: str(error) for ticker, error in failures.items()}
    return meta
