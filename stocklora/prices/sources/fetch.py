"""Where prices come from: Yahoo Finance, akshare, or the tables bundled with the project.

:func:`fetch_prices` gives what ``download.py`` writes; :func:`sample_prices` is its bundled part alone.
Importing this module stays light: pandas and the clients load when prices are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stocklora.cli.console import UserError

if TYPE_CHECKING:
    import pandas as pd

    from stocklora.prices.sources.request import Answer, Request, SourceError
from stocklora.prices.sources.bundled import sample_prices
from stocklora.prices.sources.request import SOURCE_NAMES, DownloadSettings, request_of, tickers_of


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
    from stocklora.prices.sources.request import Source
    from stocklora.prices.sources.retry import fetch_all

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
