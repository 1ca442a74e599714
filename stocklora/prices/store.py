"""Price tables that are read one ticker at a time, so that a wide backtest does not hold them all.

The files are validated once and each ticker is kept as a small binary file; afterwards a store behaves as a
read-only ``dict[str, DataFrame]`` whose values are loaded when asked for and forgotten after.
"""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError, one_line
from stocklora.prices.bars import MendedBars
from stocklora.prices.csv_columns import ISO_DATE, PRICE_COLUMNS
from stocklora.prices.exchanges import assign_exchange, assigned_exchanges
from stocklora.prices.reading import read_table
from stocklora.prices.settings import AS_THEY_ARE, ReadingSettings
from stocklora.prices.tables import each_ticker, log_returns_ahead
from stocklora.runtime.files import json_of, write_errors, write_json

# What np.load raises at a file that is cut short, is none of its own, or holds objects, which it never unpickles here.
NO_ARRAYS = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
LARGE_FILE_BYTES = 8 * 2**20  # unpacked; a larger table of several tickers is split before it is read
ROWS_HELD = 50_000  # rows of text in memory while a large table is split
INDEX_NAME = "tickers.json"

T = TypeVar("T")
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)


class PerTicker(Mapping[str, T]):
    """Something of each ticker, computed when asked for, so that a wide file does not stand in memory.

    Args:
        tickers: their names, in order.
        compute: ticker -> what it has.
    """

    def __init__(self, tickers: Iterable[str], compute: Callable[[str], T]) -> None:
        self.tickers, self.compute = {ticker: place for place, ticker in enumerate(tickers)}, compute

    def __getitem__(self, ticker: str) -> T:
        return self.compute(ticker)

    def __contains__(self, ticker: object) -> bool:
        return ticker in self.tickers  # the mixin would compute it

    def __iter__(self) -> Iterator[str]:
        return iter(self.tickers)

    def __len__(self) -> int:
        return len(self.tickers)


class PriceStore(PerTicker[pd.DataFrame]):
    """Tickers in a folder of binary files, in the order of the price files; see ``spool``.

    Raises:
        FileNotFoundError: ``spool`` has not been there, or not to its end.
    """

    def __init__(self, folder: Path) -> None:
        index = json_of((folder / INDEX_NAME).read_text(encoding="utf-8"))
        super().__init__(index["tickers"], self._read)
        for ticker, code in index["exchanges"].items():  # what its reader found
            assign_exchange(ticker, code)
        self.folder = folder
        self._last: tuple[str, pd.DataFrame] | None = None

    def _read(self, ticker: str) -> pd.DataFrame:
        # Passes ask for a ticker's prices and then for its returns: keep the one just read.
        if self._last is None or self._last[0] != ticker:
            path = self.folder / f"{self.tickers[ticker]:05d}.npz"
            try:
                with np.load(path, allow_pickle=False) as content:
                    index = pd.DatetimeIndex(content["dates"].astype("datetime64[ns]"), name="Date")
                    self._last = ticker, pd.DataFrame(content["values"], index=index, columns=list(PRICE_COLUMNS))
            except NO_ARRAYS as error:
                raise UserError(f"{path} is damaged ({one_line(str(error))[:120]}); run the backtest anew") from None
        # Copied only if somebody writes into it: the next caller gets what the file holds.
        return self._last[1].copy(deep=False)


def returns_ahead(prices: Mapping[str, pd.DataFrame], horizon: int) -> PerTicker[np.ndarray]:
    """``log_returns_ahead`` of every ticker, computed when asked for."""
    return PerTicker(prices, lambda ticker: log_returns_ahead(prices[ticker]["Close"].to_numpy(), horizon))


def spool(
    paths: Sequence[Path], folder: Path, only: Sequence[str] = (), reading: ReadingSettings = AS_THEY_ARE
) -> PriceStore:
    """Validate price files and write each ticker into ``folder``, in place of a store that is there.

    A file of ``LARGE_FILE_BYTES`` or more with a Ticker column is split on disk first, so that no more than one
    ticker's rows (and ``ROWS_HELD`` rows of text) are in memory; only to name a fault's line is it read whole.

    Args:
        paths: CSV files or folders of them.
        only: these tickers; all if none is named.
        reading: what the user says of the files.

    Raises:
        UserError: as ``read_prices``; a ticker of ``only`` that no file has; a folder that cannot be written.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    try:
        with write_errors(folder):
            pieces = tempfile.TemporaryDirectory(prefix=".pieces-", dir=folder)
        with pieces as name:  # gone afterwards, come what may
            names = _spool(paths, folder, Path(name), only, reading)
        assigned = {name: code for name, code in assigned_exchanges().items() if name in names}
        write_json(folder / INDEX_NAME, {"tickers": names, "exchanges": assigned})  # last: half a store is no store
    except BaseException:
        _clear(folder)
        raise
    return PriceStore(folder)


def _spool(
    paths: Sequence[Path], folder: Path, pieces: Path, only: Sequence[str], reading: ReadingSettings
) -> list[str]:
    """Write the tickers; their names in order."""
    present: list[str] = []
    names: list[str] = []
    for _, ticker, frame in each_ticker(paths, lambda path, meta: _tables(path, meta, pieces, reading)):
        present.append(ticker)
        if not only or ticker in only:
            _write(folder / f"{len(names):05d}.npz", frame)
            names.append(ticker)
    missing = [name for name in only if name not in present]
    if missing:
        shown = ", ".join(present[:20]) + (" ..." if len(present) > 20 else "")
        raise UserError(f"no prices of {', '.join(missing)} in the files; they have {shown}")
    return names


def _clear(folder: Path) -> None:
    """Remove a store, or what a failure left of one."""
    with write_errors(folder):
        for path in (folder / INDEX_NAME, *folder.glob("[0-9][0-9][0-9][0-9][0-9]*.npz")):
            path.unlink(missing_ok=True)


def _write(path: Path, frame: pd.DataFrame) -> None:
    dates = frame.index.to_numpy().astype("datetime64[D]")
    with write_errors(path.parent):
        np.savez(path, dates=dates, values=frame[list(PRICE_COLUMNS)].to_numpy(dtype=np.float64))


def _tables(
    path: Path, meta: Mapping[str, object] | None, folder: Path, reading: ReadingSettings
) -> Iterator[tuple[str, pd.DataFrame]]:
    """``read_table`` ticker by ticker, by way of pieces in ``folder`` where the file is large."""
    size = path.stat().st_size  # of a pipe 0, which nobody but read_table may open
    is_large = 4 * size >= LARGE_FILE_BYTES and size * (4 if _is_gzip(path) else 1) >= LARGE_FILE_BYTES
    # Which rows are broken, and whether they are few, is a question to the whole file.
    column = _ticker_column(path) if is_large and not reading.drop_bad_rows else None
    if column is None:
        yield from read_table(path, meta, reading).items()
        return
    mended = MendedBars()
    for piece in _split(path, meta, column, folder):
        try:
            tables = read_table(piece, meta, reading, mended=mended, shown=path)
        except UserError:
            read_table(path, meta, reading)  # says where in the user's own file the fault is
            raise
        piece.unlink()
        yield from tables.items()
    if mended.too_many:
        read_table(path, meta, reading)  # says so
    mended.tell(path)


def _is_gzip(path: Path) -> bool:
    """By its content, as ``read_table`` decides."""
    try:
        with path.open("rb") as stream:
            return stream.read(2) == b"\x1f\x8b"
    except OSError:
        return False


def _open(path: Path) -> io.TextIOWrapper:
    if _is_gzip(path):
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _ticker_column(path: Path) -> int | None:
    """Where a table that is written as ours are has ``Ticker``; None for others, which must be seen as a whole.

    How a file writes its dates and numbers is decided by all its rows. None also for what cannot be read:
    ``read_table`` says why.
    """
    if path.suffix.lower() == ".gz" and not _is_gzip(path):
        return None
    try:
        with _open(path) as stream:
            reader = csv.reader(stream)
            names = [name.strip().lower() for name in next(reader, [])]
            row = next(reader, [])
    except UNREADABLE:
        return None
    ours = sorted(names) == sorted(map(str.lower, ("Ticker", "Date", *PRICE_COLUMNS))) and len(row) == len(names)
    return names.index("ticker") if ours and ISO_DATE.fullmatch(row[names.index("date")].strip()) else None


def _rows(path: Path, meta: Mapping[str, object] | None) -> Iterator[list[str]]:
    """The rows that ``read_table`` counts."""
    try:
        with _open(path) as stream:
            for row in csv.reader(stream):
                if any(cell.strip() for cell in row):
                    yield row
    except UNREADABLE:
        read_table(path, meta)  # names the line
        raise


def _split(path: Path, meta: Mapping[str, object] | None, column: int, folder: Path) -> Iterator[Path]:
    """One CSV in ``folder`` for each ticker of ``path``, which is read line by line: rows stand in any order."""
    pieces: dict[str, tuple[Path, list[list[str]]]] = {}
    unwritten = 0

    def flush() -> None:
        with write_errors(folder.parent):
            for piece, rows in pieces.values():
                if rows:
                    with piece.open("a", newline="", encoding="utf-8") as stream:
                        csv.writer(stream).writerows(rows)
                    rows.clear()

    rows = _rows(path, meta)
    header = next(rows)
    for row in rows:
        ticker = row[column].strip() if column < len(row) else ""
        if ticker not in pieces:
            pieces[ticker] = folder / f"{len(pieces):05d}.csv", [header]
        pieces[ticker][1].append(row)
        unwritten += 1
        if unwritten >= ROWS_HELD:
            flush()
            unwritten = 0
    flush()
    if not pieces:
        read_table(path, meta)  # says that there is no row
    yield from [piece for piece, _ in pieces.values()]
