"""One price file -> a checked frame a ticker: the layout recognised, adjusted, in order, on its exchange's days."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
    Faults,
    decoded,
    parse_dates,
    parse_numbers,
    split_rows,
)
from stocklora.prices.exchanges import assign_exchange, exchange_of, settle_exchange
from stocklora.prices.layouts import Layout, find_layout, plain_cells
from stocklora.prices.settings import AS_THEY_ARE, ReadingSettings
from stocklora.runtime.files import from_cell

ADJUSTED_CLOSES, SPLITS = "adjusted closes", "splits"  # columns to adjust by
# A year or an interval behind a ticker in a file's name: AAPL_2024_2025, BTCUSDT-1d-2024-01, aapl_us_d.
NAME_AND_MORE = re.compile(
    r"([A-Z0-9.^=-]+?)[_-](?:(?:19|20)\d{2}(?!\d)|1d|1wk?|1mo?|daily|weekly|monthly|D1|W1|MN1|(?:us_)?[dwm]$)"
    r"(?:[-_. ].*)?",
    re.IGNORECASE,
)
SPACINGS = {"weeks": (5, 9), "months": (26, 35), "quarters": (85, 96)}  # calendar days from one bar to the next
STILL_ROWS = 5  # in a row without any move: a suspension rather than a quiet share
LEAST_JUMP, JUMP_FIT = 0.4, 0.03  # of the log price, and how near a ratio it must be
# Splits, and prices in hundredths of a currency.
JUMP_RATIOS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 100.0, 1000.0)


def read_table(
    path: Path,
    meta: Mapping[str, Any] | None = None,
    reading: ReadingSettings = AS_THEY_ARE,
    any_interval: bool = False,
    mended: MendedBars | None = None,
    shown: Path | None = None,
) -> dict[str, pd.DataFrame]:
    """Read one file.

    Args:
        path: a CSV of any layout that is known.
        meta: its sidecar: a single ticker's name, and the interval.
        reading: what the user says of the file.
        any_interval: weeks and months are welcome too, on any days; for those who only look or update.
        mended: counts on, of a file that is read in pieces: whether there are too many, and saying so, is then the
            caller's.
        shown: what messages call the file, by default ``path``.

    Raises:
        UserError: it is not a table of days, or not a whole one.
    """
    text = decoded(path)
    path = shown or path
    faults = Faults(path)
    table = _of_ours(path, text, faults) if reading.date_format is None else None
    if table is None:
        faults.found.clear()
        table = _of_others(path, text, meta, reading, faults)
    place = {name: index for index, name in enumerate(table.columns)}
    lines = np.array(table.lines)
    cells = {name: [row[index] for row in table.rows] for name, index in place.items()}
    dates = parse_dates(cells["Date"], lines, faults)
    numbers = {name: parse_numbers(name, cells[name], lines, faults) for name in PRICE_COLUMNS}
    tickers = _tickers(path, cells.get("Ticker"), lines, meta, faults)
    notes = list(table.notes)
    by = adjust(numbers, cells, tickers, dates, lines, faults) if reading.adjust != "none" else None
    if by is not None:
        notes.append(f"all four prices adjusted by its column of {by} (--adjust none keeps them as quoted)")
    whole_file = MendedBars()
    _contradictions(numbers, tickers, dates, lines, "Ticker" in place, faults)
    mend_bars(numbers, dates, lines, mended or whole_file, faults, most=None if mended is None else len(dates))
    if reading.drop_bad_rows and faults.found:
        kept = faults.kept(lines)
        dates, lines, tickers = dates[kept], lines[kept], tickers[kept]
        numbers = {name: values[kept] for name, values in numbers.items()}
        notes.append(f"{len(faults.lines)} broken rows left out")
    else:
        faults.refuse()
    whole_file.tell(path)
    whole = pd.DataFrame(numbers, index=pd.DatetimeIndex(dates, name="Date"), dtype="float64")
    if by is not None:
        whole.attrs["adjust"] = "all" if by == ADJUSTED_CLOSES else "splits"
    frames, in_order = _in_order(whole, tickers)
    notes += in_order
    _tell(path, frames, notes)
    if not any_interval:
        check_days(path, frames, meta, reading)
    return frames


def _tell(path: Path, frames: Mapping[str, pd.DataFrame], notes: Sequence[str]) -> None:
    if notes:
        rows = sum(map(len, frames.values()))
        names = ", ".join(list(frames)[:5]) + (", ..." if len(frames) > 5 else "")
        say(f"{path}: {rows:,} days of {names} read with {'; '.join(notes)}")


def _in_order(whole: pd.DataFrame, tickers: np.ndarray) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """One frame a ticker, oldest day first and each day once, and what that took.

    Args:
        whole: (rows, prices) by date, on a day that is there twice the same.
        tickers: (rows,).
    """
    frames = {}
    turned, doubled = 0, 0
    for ticker, places in pd.Series(np.arange(len(whole))).groupby(tickers, sort=False):
        frame = whole.iloc[places.to_numpy()]
        if not frame.index.is_monotonic_increasing:
            turned += 1
            frame = frame.sort_index(kind="stable")
        if not frame.index.is_unique:
            once = frame[~frame.index.duplicated()]
            doubled += len(frame) - len(once)
            frame = once
        frames[str(ticker)] = frame
    notes = ["sorted, oldest day first"] if turned else []
    return frames, notes + ([f"{doubled} rows that were there twice left out"] if doubled else [])


def _contradictions(
    numbers: Mapping[str, np.ndarray], tickers: np.ndarray, dates: np.ndarray, lines: np.ndarray, named: bool,
    faults: Faults,
) -> None:  # fmt: skip
    """Find days of one ticker that are there twice, with other prices: ``faults``.

    Args:
        numbers, tickers, dates, lines: (rows,) of the table.
        named: whether the file names tickers.
        faults: takes both rows, since nothing says which is right.
    """
    table = pd.DataFrame({"Ticker": tickers, "Date": dates, **numbers})
    day = ["Ticker", "Date"]
    twice = table.duplicated(day, keep=False) & table["Date"].notna()
    if not twice.any():
        return
    for index in np.flatnonzero(twice & ~table.duplicated(keep=False)):
        whose = f" of {tickers[index]}" if named else ""
        faults.add(
            lines[index], "Date", "other prices than another row of their day",
            f"{str(dates[index])[:10]}{whose} is there twice, with other prices; delete one of the two lines",
        )  # fmt: skip


def _of_ours(path: Path, text: str, faults: Faults) -> Layout | None:
    """A table that is written as ours are; None for others, which ``layouts`` knows or refuses."""
    first = text.lstrip("\n\r ").partition("\n")[0].strip().lower().split(",")
    allowed = {"ticker", "date", *map(str.lower, PRICE_COLUMNS)}
    if not allowed - {"ticker"} <= set(first) or not set(first) <= allowed:
        return None
    columns, rows, lines = split_rows(path, text, faults)
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
    return Layout(columns, rows, lines)


def _of_others(
    path: Path, text: str, meta: Mapping[str, Any] | None, reading: ReadingSettings, faults: Faults
) -> Layout:
    layout = find_layout(path, text, faults)
    if layout is None:
        layout = Layout(*split_rows(path, text, faults))  # says what is wrong with the header
    if not layout.rows:
        faults.refuse()
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


def _tickers(
    path: Path, cells: list[str] | None, lines: np.ndarray, meta: Mapping[str, Any] | None, faults: Faults
) -> np.ndarray:
    if cells is None:
        return np.full(len(lines), ticker_of(path, meta), dtype=object)
    tickers = np.array([from_cell(cell.strip()) for cell in cells], dtype=object)
    for index in np.flatnonzero(tickers == ""):
        faults.add(lines[index], "Ticker", "an empty Ticker", "the cell is empty; name the ticker of this row")
    return tickers


# ---------------------------------------------------------------------------------------------- what prices mean


def adjust(
    numbers: dict[str, np.ndarray],
    cells: Mapping[str, list[str]],
    tickers: np.ndarray,
    dates: np.ndarray,
    lines: np.ndarray,
    faults: Faults,
) -> str | None:
    """Adjust all four prices by a column of adjusted closes, or of splits; by which, None where nothing changed.

    Args:
        numbers: columns of (rows,) prices, changed in place.
        cells: of ``Adjusted`` and ``Split``, where the file has them.
        tickers, dates, lines: (rows,) of the table.
        faults: takes the cells that are neither.
    """
    if "Adjusted" in cells and not all(is_missing(cell) for cell in cells["Adjusted"]):
        factor = parse_numbers("Adj Close", cells["Adjusted"], lines, faults) / numbers["Close"]
        by = ADJUSTED_CLOSES
    elif "Split" in cells:
        step = np.array([_split_of(cell, line, faults) for cell, line in zip(cells["Split"], lines, strict=True)])
        factor = np.ones(len(step))
        for ticker in dict.fromkeys(tickers):
            rows = np.flatnonzero(tickers == ticker)
            rows = rows[np.argsort(dates[rows], kind="stable")]
            later = np.append(np.cumprod(step[rows][::-1])[::-1][1:], 1.0)  # a split counts for the days before it
            factor[rows] = 1.0 / later
        by = SPLITS
    else:
        return None
    if np.allclose(factor[np.isfinite(factor)], 1.0, rtol=1e-6):
        return None
    for name in QUOTES:
        numbers[name] = numbers[name] * factor
    return by


def _split_of(cell: str, line: int, faults: Faults) -> float:
    """By how much a day's split multiplies the shares; 1 where there is none."""
    text = cell.strip()
    match = re.fullmatch(r"(\d+\.?\d*)\s*[:/]\s*(\d+\.?\d*)", text)
    try:
        ratio = float(match[1]) / float(match[2]) if match else 0.0 if is_missing(text) else float(text)
    except (ValueError, ZeroDivisionError):
        ratio = -1.0
    if not 0.0 <= ratio < np.inf:
        faults.add(
            line, "Split", "a split that is none",
            f"'{text}' is no split; write it like 4, 4:1 or 0, or give --adjust none",
        )  # fmt: skip
        return 1.0
    return ratio or 1.0


# ------------------------------------------------------------------------------------------- days of an exchange


def check_days(
    path: Path, frames: dict[str, pd.DataFrame], meta: Mapping[str, Any] | None, reading: ReadingSettings
) -> None:
    """Refuse weeks and months, settle each ticker's exchange, and name jumps that look like splits.

    Raises:
        UserError: as said; days that fit no exchange; an ``--exchange`` that is none.
    """
    told, kept = (meta or {}).get("interval") or "1d", dict((meta or {}).get("exchanges") or {})
    for code in {reading.exchange, *kept.values()} - {None}:
        if code not in known_exchanges():
            whose = f"--exchange {code}" if code == reading.exchange else f"{path}: the exchange {code} of its sidecar"
            raise UserError(f"{whose}: no such calendar; give one of {', '.join(known_exchanges())}")
    for ticker, frame in frames.items():
        index = pd.DatetimeIndex(frame.index)
        kind = {"1wk": "weeks", "1mo": "months"}.get(told) or bars_of(index)
        if kind != "days":
            raise UserError(
                f"{path}: the bars of {ticker} are {kind}, and forecasts are made of days and for days; get days, as "
                f"with python download.py --ticker {ticker} --interval 1d"
            )
        exchange = reading.exchange or kept.get(ticker)
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
        still = still_rows(frame)
        if still >= STILL_ROWS:
            warn(
                f"{path}: {ticker} has not moved in its last {still} rows, since {frame.index[-still]:%Y-%m-%d}; if it "
                f"is suspended, an interval says how little it moves until then, not where it opens again"
            )


def still_rows(frame: pd.DataFrame) -> int:
    """How many rows at the end stand at one price all day long."""
    values = frame[QUOTES].to_numpy()
    moved = np.flatnonzero((values != values[-1, 3]).any(axis=1)) if len(values) else np.empty(0)
    return len(values) - (int(moved[-1]) + 1 if len(moved) else 0)


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
    stem = re.sub(r"\.(csv|txt|tsv|prn)(\.gz)?$", "", path.name, flags=re.IGNORECASE).replace("#", "")
    match = NAME_AND_MORE.fullmatch(stem)
    return match[1] if match else stem
