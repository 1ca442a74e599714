"""One price file -> a checked frame a ticker: the layout recognised, adjusted, in order, on its exchange's days."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError, say, warn
from stocklora.prices.bars import QUOTES, MendedBars, mend_bars
from stocklora.prices.calendar import known_exchanges, sessions_of, zone_of
from stocklora.prices.cells import is_missing
from stocklora.prices.csv_columns import (
    ISO_DATE,
    MIDNIGHT,
    PRICE_COLUMNS,
    at,
    decoded,
    parse_dates,
    parse_numbers,
    split_rows,
)
from stocklora.prices.exchanges import assign_exchange, exchange_of, settle_exchange
from stocklora.prices.layouts import Layout, find_layout, plain_cells
from stocklora.prices.settings import AS_THEY_ARE, ReadingSettings

ADJUSTED_CLOSES, SPLITS = "adjusted closes", "splits"  # columns to adjust by
NAME_WITH_YEAR = re.compile(r"([A-Za-z0-9.^=-]+)_(19|20)\d{2}(\D.*)?$")
SPACINGS = {"weeks": (5, 9), "months": (26, 35), "quarters": (85, 96)}  # calendar days from one bar to the next
LEAST_JUMP, JUMP_FIT = 0.4, 0.03  # of the log price, and how near a ratio it must be
# Splits, and prices in hundredths of a currency.
JUMP_RATIOS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 100.0, 1000.0)


def read_table(
    path: Path,
    meta: Mapping[str, Any] | None = None,
    reading: ReadingSettings = AS_THEY_ARE,
    any_interval: bool = False,
    mended: MendedBars | None = None,
) -> dict[str, pd.DataFrame]:
    """Read one file.

    Args:
        path: a CSV of any layout that is known.
        meta: its sidecar: a single ticker's name, and the interval.
        reading: what the user says of the file.
        any_interval: weeks and months are welcome too, on any days; for those who only look or update.
        mended: counts on, of a file that is read in pieces: whether there are too many, and saying so, is then the
            caller's.

    Raises:
        UserError: it is not a table of days, or not a whole one.
    """
    text = decoded(path)
    table = _of_ours(path, text) if reading.date_format is None else None
    if table is None:
        table = _of_others(path, text, meta, reading)
    place = {name: index for index, name in enumerate(table.columns)}
    lines = np.array(table.lines)
    cells = {name: [row[index] for row in table.rows] for name, index in place.items()}
    dates = parse_dates(path, cells["Date"], lines)
    numbers = {name: parse_numbers(path, name, cells[name], lines) for name in PRICE_COLUMNS}
    tickers = _tickers(path, cells.get("Ticker"), lines, meta)
    notes = list(table.notes)
    by = adjust(path, numbers, cells, tickers, dates, lines) if reading.adjust == "all" else None
    if by is not None:
        notes.append(f"all four prices adjusted by its column of {by} (--adjust none keeps them as quoted)")
    if mended is None:
        mend_bars(path, numbers, dates, lines, whole_file := MendedBars())
        whole_file.tell(path)
    else:
        mend_bars(path, numbers, dates, lines, mended, most=len(dates))
    whole = pd.DataFrame(numbers, index=pd.DatetimeIndex(dates, name="Date"), dtype="float64")
    if by is not None:
        whole.attrs["adjust"] = "all" if by == ADJUSTED_CLOSES else "splits"
    frames, in_order = _in_order(path, whole, tickers, lines, "Ticker" in place)
    notes += in_order
    if notes:
        rows = sum(map(len, frames.values()))
        names = ", ".join(list(frames)[:5]) + (", ..." if len(frames) > 5 else "")
        say(f"{path}: {rows:,} days of {names} read with {'; '.join(notes)}")
    if not any_interval:
        check_days(path, frames, meta, reading)
    return frames


def _in_order(
    path: Path, whole: pd.DataFrame, tickers: np.ndarray, lines: np.ndarray, named: bool
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """One frame a ticker, oldest day first and each day once, and what that took.

    Args:
        path, lines: for messages. named: whether the file names tickers.
        whole: (rows, prices) by date. tickers: (rows,).
    """
    frames = {}
    turned, doubled = 0, 0
    dates = whole.index.to_numpy()
    for ticker, places in pd.Series(np.arange(len(whole))).groupby(tickers, sort=False):
        index = places.to_numpy()
        if (np.diff(dates[index]) < np.timedelta64(0)).any():
            turned += 1
            index = index[np.argsort(dates[index], kind="stable")]
        kept = _once(path, str(ticker) if named else "", dates[index], lines[index], whole.iloc[index])
        doubled += len(index) - int(kept.sum())
        frames[str(ticker)] = whole.iloc[index[kept]]
    notes = ["sorted, oldest day first"] if turned else []
    return frames, notes + ([f"{doubled} rows that were there twice left out"] if doubled else [])


def _of_ours(path: Path, text: str) -> Layout | None:
    """A table that is written as ours are; None for others, which ``layouts`` knows or refuses."""
    first = text.lstrip("\n\r ").partition("\n")[0].strip().lower().split(",")
    allowed = {"ticker", "date", *map(str.lower, PRICE_COLUMNS)}
    if not allowed - {"ticker"} <= set(first) or not set(first) <= allowed:
        return None
    columns, rows, lines = split_rows(path, text)
    days = columns.index("Date")
    if not all((match := ISO_DATE.fullmatch(row[days].strip())) and MIDNIGHT.fullmatch(match[5]) for row in rows):
        return None
    try:
        for name in PRICE_COLUMNS:
            values = np.array([float(row[columns.index(name)]) for row in rows])
            if not np.isfinite(values).all() or (name != "Volume" and (values == 0).any()):
                return None
    except ValueError:
        return None
    return Layout(columns, rows, lines.tolist())


def _of_others(path: Path, text: str, meta: Mapping[str, Any] | None, reading: ReadingSettings) -> Layout:
    layout = find_layout(path, text)
    if layout is None:
        columns, rows, lines = split_rows(path, text)  # says what is wrong with the header
        layout = Layout(columns, rows, lines.tolist())
    if not layout.rows:
        raise UserError(f"{path}: there is a header but no row under it; run: python download.py --output {path}")
    has_ticker = "Ticker" in layout.columns
    name = layout.rows[0][layout.columns.index("Ticker")].strip() if has_ticker else ticker_of(path, meta)
    zone = zone_of(reading.exchange or exchange_of(name))
    raw_days = [row[layout.columns.index("Date")].strip() for row in layout.rows]
    plain = plain_cells(path, layout, reading.date_format, zone)
    _refuse_intraday(path, plain, raw_days)
    return plain


def _refuse_intraday(path: Path, table: Layout, raw_days: list[str]) -> None:
    """Raise where stamps that differ fall on one day of one ticker."""
    days, names = table.columns.index("Date"), table.columns.index("Ticker") if "Ticker" in table.columns else None
    stamps: dict[tuple[str, str], set[str]] = {}
    for row, raw in zip(table.rows, raw_days, strict=True):
        stamps.setdefault(("" if names is None else row[names], row[days]), set()).add(raw)
    several = sum(len(seen) > 1 for seen in stamps.values())
    if several > 0.2 * len(stamps):
        raise UserError(
            f"{path}: {len(table.rows)} bars on {len(stamps)} days: it has a time of day, and tables hold one row a "
            f"day; get days, as with download.py --interval 1d"
        )


def _tickers(path: Path, cells: list[str] | None, lines: np.ndarray, meta: Mapping[str, Any] | None) -> np.ndarray:
    if cells is None:
        return np.full(len(lines), ticker_of(path, meta), dtype=object)
    tickers = np.array([cell.strip() for cell in cells], dtype=object)
    for index in np.flatnonzero(tickers == ""):
        raise UserError(f"{at(path, lines[index], 'Ticker')}: the cell is empty; name the ticker of this row")
    return tickers


def _once(path: Path, ticker: str, dates: np.ndarray, lines: np.ndarray, frame: pd.DataFrame) -> np.ndarray:
    """Mask of one row a day; a day that is there twice must be the same both times."""
    kept = np.ones(len(dates), dtype=bool)
    values = frame.to_numpy()
    for index in np.flatnonzero(np.diff(dates) == np.timedelta64(0)) + 1:
        if not (values[index] == values[index - 1]).all():
            whose = f" of {ticker}" if ticker else ""
            raise UserError(
                f"{at(path, lines[index], 'Date')}: {str(dates[index])[:10]}{whose} is there twice, with other prices; "
                f"delete one of the two lines"
            )
        kept[index] = False
    return kept


# ---------------------------------------------------------------------------------------------- what prices mean


def adjust(
    path: Path,
    numbers: dict[str, np.ndarray],
    cells: Mapping[str, list[str]],
    tickers: np.ndarray,
    dates: np.ndarray,
    lines: np.ndarray,
) -> str | None:
    """Adjust all four prices by a column of adjusted closes, or of splits; by which, None where nothing changed.

    Args:
        path, lines: for messages.
        numbers: columns of (rows,) prices, changed in place.
        cells: of ``Adjusted`` and ``Split``, where the file has them.
        tickers, dates: (rows,) of the table.
    """
    if "Adjusted" in cells and not all(is_missing(cell) for cell in cells["Adjusted"]):
        factor = parse_numbers(path, "Adj Close", cells["Adjusted"], lines) / numbers["Close"]
        by = ADJUSTED_CLOSES
    elif "Split" in cells:
        step = np.array([1.0 if is_missing(cell) or float(cell) == 0.0 else float(cell) for cell in cells["Split"]])
        factor = np.ones(len(step))
        for ticker in dict.fromkeys(tickers):
            rows = np.flatnonzero(tickers == ticker)
            rows = rows[np.argsort(dates[rows], kind="stable")]
            later = np.append(np.cumprod(step[rows][::-1])[::-1][1:], 1.0)  # a split counts for the days before it
            factor[rows] = 1.0 / later
        by = SPLITS
    else:
        return None
    if np.allclose(factor, 1.0, rtol=1e-6):
        return None
    for name in QUOTES:
        numbers[name] = numbers[name] * factor
    return by


# ------------------------------------------------------------------------------------------- days of an exchange


def check_days(
    path: Path, frames: dict[str, pd.DataFrame], meta: Mapping[str, Any] | None, reading: ReadingSettings
) -> None:
    """Refuse weeks and months, settle each ticker's exchange, and name jumps that look like splits.

    Raises:
        UserError: as said; days that fit no exchange; an ``--exchange`` that is none.
    """
    if reading.exchange is not None and reading.exchange not in known_exchanges():
        raise UserError(f"--exchange {reading.exchange}: no such calendar; give one of {', '.join(known_exchanges())}")
    told = (meta or {}).get("interval") or "1d"
    for ticker, frame in frames.items():
        index = pd.DatetimeIndex(frame.index)
        kind = {"1wk": "weeks", "1mo": "months"}.get(told) or bars_of(index)
        if kind != "days":
            raise UserError(
                f"{path}: the bars of {ticker} are {kind}, and forecasts are made of days and for days; get days, as "
                f"with python download.py --ticker {ticker} --interval 1d"
            )
        exchange = reading.exchange or ((meta or {}).get("exchanges") or {}).get(ticker)
        if exchange is not None:
            assign_exchange(ticker, str(exchange))
            continue
        try:
            decided = settle_exchange(ticker, index, sessions_of)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        if decided:
            say(f"{path}: {decided}")
    for ticker, frame in frames.items():
        frames[ticker] = without_jumps(path, ticker, frame, reading.mend_jumps)


def bars_of(index: pd.DatetimeIndex) -> str:
    """``weeks`` or ``months`` where nearly all rows are so far apart, else ``days``."""
    gaps = np.diff(index.to_numpy()) / np.timedelta64(1, "D")
    for kind, (least, most) in SPACINGS.items():
        if len(gaps) >= 4 and np.mean((gaps >= least) & (gaps <= most)) > 0.9:
            return kind
    return "days"


def without_jumps(path: Path, ticker: str, frame: pd.DataFrame, mend: bool) -> pd.DataFrame:
    """Name the days on which all prices jump as at a split or a change of unit; with ``mend`` divide the jumps out."""
    close = frame["Close"].to_numpy()
    jump = np.log(close[1:] / close[:-1])
    opening = np.log(frame["Open"].to_numpy()[1:] / close[:-1])
    usual = 8.0 * np.median(np.abs(jump)) if len(jump) else 0.0
    found = []
    # A split is there at the open, and larger than anything the price does by itself.
    for place in np.flatnonzero((np.abs(jump) > max(LEAST_JUMP, usual)) & (np.abs(opening - jump) < 0.15)):
        ratio = min(JUMP_RATIOS, key=lambda ratio: abs(np.log(ratio) - abs(jump[place])))
        if abs(np.log(ratio) - abs(jump[place])) <= max(JUMP_FIT, 2.0 * np.median(np.abs(jump))):
            found.append((place + 1, ratio if jump[place] > 0 else 1.0 / ratio))
    if not found:
        return frame
    days = ", ".join(f"{frame.index[place]:%Y-%m-%d} (times {factor:.3g})" for place, factor in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    if not mend:
        warn(
            f"{path}: {ticker} jumps as at a split or a change of unit on {days}{more}; if it is one, --mend_jumps "
            f"divides it out, or download adjusted prices"
        )
        return frame
    mended = frame.copy()
    for place, factor in found:
        mended.iloc[:place, :4] *= factor
        mended.iloc[:place, 4] /= factor
    say(f"{path}: {ticker}: the jumps of {days}{more} divided out")
    return mended


def ticker_of(path: Path, meta: Mapping[str, Any] | None = None) -> str:
    """The ticker of a file without a ``Ticker`` column: from the sidecar, ``AAPL_2024_2025`` or the stem."""
    named = (meta or {}).get("tickers") or []
    if len(named) == 1:
        return str(named[0])
    stem = re.sub(r"\.csv(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    match = NAME_WITH_YEAR.fullmatch(stem)
    return match[1] if match else stem
