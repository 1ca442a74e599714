"""What ``download.py`` does: fetch, write, append, and say plainly what the prices are."""

from __future__ import annotations

import dataclasses
import datetime as dt
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError, one_line, say, warn
from stocklora.prices.exchanges import UNITED_STATES, assign_exchange, exchange_of
from stocklora.prices.sources.fetch import NothingCame, bundled_prices, days_of, fetch_prices
from stocklora.prices.sources.request import SOURCE_NAMES, DownloadSettings, Request, request_of, tickers_of
from stocklora.prices.tables import is_table, read_prices, trusted_meta, write_prices

EXIT_SOME_FAILED = 1
OVERLAP = 10  # rows of the old table that are fetched again and compared
# Yahoo's adjusted prices carry float32 noise of some 1e-7; the smallest dividend moves them by more than this.
AGREEMENT = 2e-5
ADJUSTED = {"all": "adjusted for splits and dividends", "splits": "adjusted for splits", "none": "not adjusted"}
BY_TICKER = ("origins", "timezones", "currencies", "splits", "dropped")  # sidecar keys with a value a ticker
DROPPED = {
    "empty": "without a price left out",
    "broken": "with a price that cannot be left out",
    "unfinished": "still running left out",
    "duplicate": "there twice left out",
    "widened": "with high or low moved to hold open and close",
}


def download(settings: DownloadSettings) -> int:
    """Do what ``settings`` ask; 0, or 1 where some tickers came and others did not."""
    request_of(settings)
    if settings.check:
        from stocklora.prices.quality import print_quality

        for path in settings.check:
            print_quality(path)
        return 0
    if settings.convert is not None:
        convert(settings.convert, settings)
        return 0
    as_folder = is_folder(settings.output)
    if settings.update and settings.source == "sample":
        raise UserError("--update cannot add to bundled prices, which do not grow; leave out --source sample")
    if settings.update and settings.output.exists():
        return update_tables(settings, as_folder)
    if settings.update:
        say(f"{settings.output} is not there yet: downloading it whole")
    if settings.source == "sample" and settings.ticker is None:
        print_bundled_tickers()
    frames, meta = fetch_prices(settings)
    write_out(settings.output, as_folder, frames, meta)
    return print_failures(meta.get("failed", {}))


def convert(path: Path, settings: DownloadSettings) -> None:
    """Write a table of any known layout as one of ours, with its sidecar, and report on it.

    Raises:
        UserError: it cannot be read, or would be written over itself.
    """
    from stocklora.prices.quality import print_quality

    if settings.output.resolve() == path.resolve():
        raise UserError(f"--convert {path}: --output is the same file; give it another name, so that nothing is lost")
    frames = read_prices(path, reading=settings)
    if settings.ticker and len(frames) == len(settings.ticker):  # a file seldom says whose prices it holds
        named = dict(zip(frames, tickers_of(settings.ticker), strict=True))
        for read, ticker in named.items():
            assign_exchange(ticker, exchange_of(read) or UNITED_STATES)
        frames = {named[read]: frame for read, frame in frames.items()}
    meta: dict[str, Any] = {"source": "converted", "origins": dict.fromkeys(frames, path.name), "interval": "1d"}
    adjusted = {frame.attrs.get("adjust") for frame in frames.values()}
    told = (trusted_meta(path) or {}).get("adjust")
    if told or adjusted != {None}:
        meta["adjust"] = told or next(iter(adjusted))
    meta["exchanges"] = {ticker: code for ticker in frames if (code := exchange_of(ticker)) is not None}
    write_prices(frames, settings.output, meta)
    say(f"saved: {settings.output}")
    print_quality(settings.output)


def print_bundled_tickers() -> None:
    """What ``--source sample`` has, for those who named no ticker."""
    say("bundled, choose with --ticker:")
    for ticker, frame in bundled_prices().items():
        say(f"  {ticker}: {len(frame)} days, {days_of(frame)}")


def is_folder(output: Path) -> bool:
    """Whether ``--output`` means a folder: one that is there, or a name without any suffix."""
    if output.is_dir():
        return True
    if is_table(output):
        return False
    if output.suffix:
        raise UserError(f"--output {output}: must end in .csv or .csv.gz, or be a folder")
    return True


def write_out(output: Path, as_folder: bool, frames: Mapping[str, pd.DataFrame], meta: Mapping[str, Any]) -> None:
    """Write one table, or one a ticker, and say of each what it holds."""
    if as_folder:
        for ticker, frame in frames.items():
            write_prices({ticker: frame}, output / f"{ticker}.csv", meta_for([ticker], meta))
    else:
        write_prices(frames, output, meta_for(list(frames), meta))
    for ticker, frame in frames.items():
        say(describe(ticker, frame, meta))
    where = f"{output}/ ({len(frames)} file{'s' * (len(frames) > 1)})" if as_folder else str(output)
    say(f"written: {where}, {ADJUSTED[meta['adjust']]}")


def meta_for(tickers: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The sidecar's beginning for some of the tickers; failures are said, not stored with prices."""
    part: dict[str, Any] = {}
    for key, value in meta.items():
        if key in BY_TICKER:
            value = {ticker: value[ticker] for ticker in tickers if ticker in value}
        if key not in {"failed", "from_cache"} and value != {}:
            part[key] = value
    return part


def describe(ticker: str, frame: pd.DataFrame, meta: Mapping[str, Any]) -> str:
    """One line: rows, dates, source, how fresh, what was left out."""
    bars = {"1d": "days", "1wk": "weeks", "1mo": "months"}[meta["interval"]]
    text = f"{ticker}: {len(frame)} {bars}, {days_of(frame)}, from {SOURCE_NAMES[meta['source']]}"
    if meta["source"] == "sample":
        age = (dt.date.today() - frame.index[-1].date()).days
        text += f" ({meta['origins'][ticker]}): not fresh, its last day is {age} days ago"
    elif ticker in meta.get("from_cache", []):
        text += f" (kept from a run today, fetched {meta['time'][:16].replace('T', ' ')} UTC)"
    notes = [f"{n} row{'s' * (n != 1)} {DROPPED[why]}" for why, n in meta.get("dropped", {}).get(ticker, {}).items()]
    return text + (f"; {'; '.join(notes)}" if notes else "")


def print_failures(failed: Mapping[str, str]) -> int:
    """Name every ticker that did not come, last, where nobody overlooks it.

    Args:
        failed: ticker -> why it did not come.

    Returns:
        The exit code.
    """
    if not failed:
        return 0
    noun = "ticker" if len(failed) == 1 else "tickers"
    print(f"error: {len(failed)} {noun} did not come; the others are written:", file=sys.stderr)
    for ticker, reason in failed.items():
        print(f"  {ticker}: {one_line(reason)}", file=sys.stderr)
    return EXIT_SOME_FAILED


def update_tables(settings: DownloadSettings, as_folder: bool) -> int:
    """Append what is new to existing tables, each after a comparison of the days that both have; the exit code.

    Raises:
        UserError: there is nothing to update, or nothing could be.
    """
    tables = _tables_to_update(settings, as_folder)
    present = {ticker for frames in tables.values() for ticker in frames}
    new = [ticker for ticker in tickers_of(settings.ticker) if ticker not in present] if settings.ticker else []
    if new and not as_folder:
        raise UserError(f"{settings.output} has no {', '.join(new)}; --update does not add tickers, download it anew")
    if not tables and not new:
        raise UserError(f"{settings.output}: the folder holds no .csv or .csv.gz file; give --ticker to fill it")
    failed: dict[str, str] = {}
    for path, frames in tables.items():
        try:
            failed.update(update_table(path, frames, settings))
        except UserError as error:
            if not as_folder:
                raise
            failed.update(dict.fromkeys(frames, str(error)))
    if new:
        added, meta = fetch_or_fail(settings, dict.fromkeys(new, request_of(settings)))
        if added:
            write_out(settings.output, as_folder, added, meta)
        failed.update(meta.get("failed", {}))
    if failed and not set(failed) < present | set(new):
        ticker, reason = next(iter(failed.items()))
        raise UserError(f"nothing was updated, every file is as it was: {ticker}: {reason}; try later")
    return print_failures(failed)


def _tables_to_update(settings: DownloadSettings, as_folder: bool) -> dict[Path, dict[str, pd.DataFrame]]:
    """The table that ``--output`` names; of a folder those that hold a ticker named, or all."""
    if not as_folder:
        return {settings.output: read_prices(settings.output, any_interval=True)}
    named = set(tickers_of(settings.ticker)) if settings.ticker else None
    tables = {
        path: read_prices(path, any_interval=True) for path in sorted(settings.output.iterdir()) if is_table(path)
    }
    return {path: frames for path, frames in tables.items() if named is None or named & set(frames)}


def update_table(path: Path, old: dict[str, pd.DataFrame], settings: DownloadSettings) -> dict[str, str]:
    """Bring one table up to date; returns the tickers that could not be, which keep their old rows."""
    known, end = settings_of(path, settings), request_of(settings).end
    ask = {
        ticker: Request("max", frame.index[-min(OVERLAP, len(frame))].date(), end, known.interval, known.adjust)
        for ticker, frame in old.items()
    }
    fresh, meta = fetch_or_fail(known, ask)
    result, anew = dict(old), {}
    for ticker, frame in fresh.items():
        quarrel = disagreement(old[ticker], frame, meta.get("splits", {}).get(ticker, {}))
        if quarrel:
            warn(f"{path}: {ticker}: {quarrel}; its history is fetched anew")
            anew[ticker] = dataclasses.replace(ask[ticker], start=old[ticker].index[0].date())
        else:
            result[ticker] = pd.concat([old[ticker], frame[frame.index > old[ticker].index[-1]]])
    failed = dict(meta.get("failed", {}))
    if anew:
        whole, more = fetch_or_fail(known, anew)
        result.update(whole)
        failed.update(more.get("failed", {}))
        for key in BY_TICKER:
            meta.setdefault(key, {}).update(more.get(key, {}))
    done = [ticker for ticker in old if ticker not in failed]
    for ticker in done:
        gained = len(result[ticker]) - len(old[ticker])
        what = "fetched anew" if ticker in anew else f"{gained} new row{'s' * (gained != 1)}"
        say(f"{ticker}: {what}, {days_of(result[ticker])}, from {SOURCE_NAMES[known.source]}")
    if any(not result[ticker].equals(old[ticker]) for ticker in done):
        write_prices(result, path, meta_for(done, meta))
        say(f"updated: {path}, {ADJUSTED[known.adjust]}")
    elif done:
        say(f"{path} is already up to date")
    return failed


def fetch_or_fail(
    settings: DownloadSettings, ask: Mapping[str, Request]
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """:func:`fetch_prices`, with every ticker under ``failed`` where none came."""
    try:
        return fetch_prices(settings, ask)
    except NothingCame as error:
        return {}, {"failed": error.failures}


def settings_of(path: Path, settings: DownloadSettings) -> DownloadSettings:
    """The settings that the table was made with, as its sidecar says; the only ones it can be updated with.

    Raises:
        UserError: there is no sidecar to trust, its prices do not grow, or a flag contradicts it.
    """
    meta = trusted_meta(path)
    if meta is None:
        raise UserError(
            f"{path}: no sidecar says where these prices came from and how they are adjusted, "
            "so nothing can be added; download it anew without --update"
        )
    if meta.get("source") not in {"yahoo", "akshare"}:
        raise UserError(
            f"{path}: these prices come from {SOURCE_NAMES.get(meta.get('source', ''), 'elsewhere')}, "
            "which does not grow; download it anew without --update"
        )
    default = DownloadSettings()
    for name in ("source", "adjust", "interval"):
        asked = getattr(settings, name)
        if asked not in {meta.get(name), getattr(default, name)}:
            raise UserError(
                f"{path}: was downloaded with --{name} {meta.get(name)}, not {asked}; "
                "leave the flag out, or download it anew without --update"
            )
    same = {name: meta[name] for name in ("source", "adjust", "interval")}
    # What was there a minute ago is not the question here.
    return dataclasses.replace(settings, **same, start=None, end=None)


def disagreement(old: pd.DataFrame, new: pd.DataFrame, splits: Mapping[str, float]) -> str:
    """What differs on the days that both tables should have, or an empty string."""
    first = new.index[0]
    past, again = old[old.index >= first], new[new.index <= old.index[-1]]
    if not len(again):
        return f"no fetched day is in the table, which ends on {old.index[-1]:%Y-%m-%d}"
    if not past.index.equals(again.index):
        odd = past.index.symmetric_difference(again.index)[0]
        where = "no longer there" if odd in past.index else "new among old days"
        return f"{odd:%Y-%m-%d} is {where}"
    before, after = past[["Open", "High", "Low", "Close"]], again[["Open", "High", "Low", "Close"]]
    ratio = (after / before).to_numpy()
    wrong = np.abs(ratio - 1) > AGREEMENT
    if not wrong.any():
        return ""
    row = int(np.argmax(wrong.any(axis=1)))
    day = past.index[row]
    later = {when: size for when, size in splits.items() if pd.Timestamp(when) > old.index[-1]}
    cause = ""
    if later:
        cause = ", for " + " and ".join(f"a split of {size:g} to 1 on {when}" for when, size in later.items())
    elif np.ptp(ratio[row]) < AGREEMENT:
        cause = ", by the same factor in all four prices, as a later dividend or split does"
    return (
        f"history has changed: the close of {day:%Y-%m-%d} was {before['Close'].iloc[row]:.6g} "
        f"and is {after['Close'].iloc[row]:.6g} now{cause}"
    )
