"""From the bytes of a CSV to checked columns: text, header, dates and numbers.

What is wrong with a row goes into ``Faults``, which names file, row and column and tells all of a file at once;
what is wrong with the whole file raises a ``UserError``. Rows are counted as an editor counts lines: the header is
row 1. What the columns must hold *together* is checked in ``bars.py`` and ``reading.py``.
"""

from __future__ import annotations

import contextlib
import csv
import datetime as dt
import gzip
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stocklora.cli.console import UserError

PRICE_COLUMNS = ["Open", "High", "Low", "Close", "Volume"]

# 2024-01-02, 2024/01/02 or 20240102; a time of day only when it is midnight, with any zone after it.
ISO_DATE = re.compile(r"(\d{4})([-/]?)(\d{2})\2(\d{2})(.*)", re.DOTALL)
MIDNIGHT = re.compile(r"([T ]00:00(:00(\.0+)?)?)?( ?(Z|UTC|[+-]\d{2}:?\d{2}))?")
NOT_A_VALUE = {"nan", "na", "n/a", "null", "none", "-", "inf", "-inf", "+inf", "infinity", "#n/a"}


HEADER_WORDS = {
    "gb18030": "日期|时间|开盘|收盘|代码",
    "big5": "日期|開盤|收盤|證券",
    "cp932": "日付|始値|終値",
    "cp949": "일자|날짜|시가|종가",
    "cp1252": "[äöüÄÖÜßéèêáíóúñç]",
}
MOST_DROPPED = 0.1  # of the rows: above it, a file is not one with some broken rows


def at(path: Path, line: int, column: str = "") -> str:
    """A place in a file, as error messages name it."""
    return f"{path}, row {line}" + (f", column {column}" if column else "")


@dataclass
class Faults:
    """Broken rows of a file, so that they can be told all at once, or left out.

    Attributes:
        path: what messages call the file.
        found: line, column, kind and what is wrong, in words, of each fault.
    """

    path: Path
    found: list[tuple[int, str, str, str]] = field(default_factory=list)

    def add(self, line: int, column: str, kind: str, problem: str) -> None:
        """Take one.

        Args:
            line: of the file.
            column: by our name; empty for the row as a whole.
            kind: what such rows have, in a few words, such as ``no date``.
            problem: what this one has and what to do.
        """
        self.found.append((int(line), column, kind, problem))

    @property
    def lines(self) -> list[int]:
        """The lines with a fault, each once, in order."""
        return sorted({line for line, *_ in self.found})

    def refuse(self) -> None:
        """Raise a UserError that names the first fault, and the rows of each kind, if there is any."""
        if not self.found:
            return
        line, column, _, problem = min(self.found, key=lambda fault: fault[0])
        if len(broken := self.lines) == 1:
            raise UserError(f"{at(self.path, line, column)}: {problem}")
        kinds: dict[str, list[int]] = {}
        for number, _, kind, _ in sorted(self.found):
            if number not in kinds.setdefault(kind, []):
                kinds[kind].append(number)
        told = "; ".join(f"{len(rows)} with {kind} ({_few(rows)})" for kind, rows in kinds.items())
        raise UserError(
            f"{at(self.path, line, column)}: {problem}; {len(broken)} broken rows in all: {told}; to leave them out: "
            f"python download.py --convert {self.path} --output clean.csv --drop_bad_rows"
        )

    def kept(self, lines: np.ndarray) -> np.ndarray:
        """Mask of the rows without a fault.

        Args:
            lines: (rows,) of the file.

        Raises:
            UserError: more than ``MOST_DROPPED`` of them have one.
        """
        broken = self.lines
        if len(broken) > MOST_DROPPED * max(1, len(lines)):
            line, column, _, problem = min(self.found, key=lambda fault: fault[0])
            raise UserError(
                f"{at(self.path, line, column)}: {problem}; {len(broken)} of {len(lines)} rows are broken, more than "
                f"--drop_bad_rows leaves out ({MOST_DROPPED:.0%}); look whether this is a table of prices"
            )
        return ~np.isin(lines, broken)


def _few(lines: Sequence[int]) -> str:
    return ", ".join(str(line) for line in lines[:5]) + (", ..." if len(lines) > 5 else "")


def decoded(path: Path) -> str:
    """The file's text, unpacked if it is gzip, whatever its name says."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        elif path.suffix.lower() == ".gz":
            raise UserError(f"{path}: the name says gzip but the content is not; rename it to {path.stem}")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); download it again") from None
    if not content.strip():
        raise UserError(f"{path}: the file is empty; run: python download.py --output {path}")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace")
    if b"\0" in content:
        raise UserError(f"{path}: this is a binary file, not a CSV; export it as 'CSV UTF-8'")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fault = f"{at(path, line)}: byte 0x{content[error.start]:02x} is not UTF-8 text; save the file as 'CSV UTF-8'"
    # Excel in East Asia and in Europe. Some decode nearly anything; in the right one the header makes sense.
    for encoding, words in HEADER_WORDS.items():
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if re.search(words, text[:2000]):
            return text
    raise UserError(fault)


def split_rows(path: Path, text: str, faults: Faults) -> tuple[list[str], list[list[str]], list[int]]:
    """Column names in their usual spelling, the whole rows, and the line each row stands on."""
    reader = csv.reader(io.StringIO(text, newline=""))
    rows, lines = [], []
    try:
        columns = checked_header(path, [cell.strip() for cell in next(reader)])
        for row in reader:
            if any(cell.strip() for cell in row) and is_whole(reader.line_num, row, len(columns), faults):
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{at(path, reader.line_num)}: not a CSV line ({error}); correct or delete it") from None
    if not rows:
        faults.refuse()
        raise UserError(f"{path}: there is a header but no row under it; run: python download.py --output {path}")
    return columns, rows, lines


def is_whole(line: int, row: Sequence[str], width: int, faults: Faults) -> bool:
    """Whether a row has a cell for each column; commas at its end are harmless, a value without a column not."""
    whole = len(row) >= width and not any(cell.strip() for cell in row[width:])
    if not whole:
        faults.add(
            line, "", "another number of cells than the header",
            f"{len(row)} values under {width} columns; put commas inside quotes, or complete the line",
        )  # fmt: skip
    return whole


def checked_header(path: Path, header: list[str]) -> list[str]:
    """The header in our spelling (``close`` is ``Close``), or a ``UserError`` that says what is wrong with it."""
    known = {name.lower(): name for name in ["Ticker", "Date", *PRICE_COLUMNS]}
    columns = [known.get(name.lower(), name) for name in header]
    if columns[:1] == ["Price"] and {"Close", "High", "Low", "Open"} <= set(columns):
        raise UserError(
            f"{path}: this is yfinance's table with a header of several lines; get a flat one with download.py, "
            "or with yfinance.download(..., multi_level_index=False)"
        )
    for name in ["Ticker", "Date", *PRICE_COLUMNS]:
        if columns.count(name) > 1:
            raise UserError(f"{path}, row 1: column {name} stands {columns.count(name)} times; keep one")
    missing = [name for name in ["Date", *PRICE_COLUMNS] if name not in columns]
    if not missing:
        return columns
    if len(header) == 1 and (mark := next((m for m in (";", "\t", "|") if m in header[0]), None)):
        name = {"\t": "tabs"}.get(mark, f"'{mark}'")
        raise UserError(f"{path}: the columns are separated by {name}; save the file with commas")
    if header and all(re.fullmatch(r"[-+0-9.:/eE]+", name) for name in header):
        raise UserError(f"{path}: there is no header; make the first line Date,{','.join(PRICE_COLUMNS)}")
    there = ", ".join(name or "(no name)" for name in header)[:200] or "an empty first line"
    raise UserError(f"{path}: missing column{'s' * (len(missing) > 1)} {', '.join(missing)}; the file has: {there}")


def parse_dates(cells: list[str], lines: np.ndarray, faults: Faults) -> np.ndarray:
    """Days as ``datetime64[ns]``, NaT for a fault; a time of day other than midnight is one, since rows are days."""
    if all(len(cell) == 10 and cell[4] == cell[7] == "-" for cell in cells):  # nearly every file: ten times as fast
        with contextlib.suppress(ValueError):
            known = np.array(cells, dtype="datetime64[D]")
            if (known >= np.datetime64("1800-01-01")).all():
                return known.astype("datetime64[ns]")
    days = np.full(len(cells), "NaT", dtype="datetime64[D]")
    for place, (cell, line) in enumerate(zip(cells, lines, strict=True)):
        text = cell.strip()
        match = ISO_DATE.fullmatch(text)
        problem, kind = "is not a date; write it as 2024-01-31", "a Date that is none"
        if not text:
            problem, kind = "the cell is empty; fill it in or delete that line", "an empty Date"
        elif match and not MIDNIGHT.fullmatch(match[5]):
            problem = "has a time of day; tables hold one row a day: download with --interval 1d"
            kind = "a time of day"
        elif match:
            try:
                day = dt.date(int(match[1]), int(match[3]), int(match[4]))
                if day.year >= 1800:
                    days[place] = day
                    continue
                problem = "is before there were prices; write it as 2024-01-31"
            except ValueError:
                problem = "is no day of the calendar; write it as 2024-01-31"
        faults.add(line, "Date", kind, f"{quoted(text)}{problem}")
    return days.astype("datetime64[ns]")


def parse_numbers(column: str, cells: list[str], lines: np.ndarray, faults: Faults) -> np.ndarray:
    """One column as float64; NaN for a cell that is not a finite, allowed number."""
    try:
        values = np.array([float(cell) for cell in cells])
    except ValueError:
        values = np.array([number_or_nan(cell) for cell in cells])
    # A price must be above zero; no trade on a day is a volume of zero and may be.
    wrong = ~np.isfinite(values) | (values < 0 if column == "Volume" else values <= 0)
    for index in np.flatnonzero(wrong):
        text = cells[index].strip()
        if not text:
            kind, problem = f"an empty {column}", "the cell is empty; fill it in or delete that line"
        elif np.isfinite(values[index]):
            sign = "negative" if values[index] < 0 else "zero"
            noun = "a volume" if column == "Volume" else "a price"
            kind = f"{_a(column)} that is {sign}"
            problem = f"is {sign}, which {noun} cannot be; correct or delete that line"
        elif text.lower() in NOT_A_VALUE:
            kind, problem = f"{_a(column)} without a value", "is not a value; fill it in or delete that line"
        else:
            kind, problem = f"{_a(column)} that is no number", "is not a number; write it like 1234.56"
        faults.add(lines[index], column, kind, f"{quoted(text)}{problem}")
    return np.where(wrong, np.nan, values)


def _a(column: str) -> str:
    return f"an {column}" if column[0] in "AO" else f"a {column}"


def number_or_nan(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def quoted(text: str) -> str:
    """``text`` in quotes and a blank, cut where it is long; nothing for nothing."""
    shown = text if len(text) <= 40 else text[:37] + "..."
    return f"'{shown}' " if text else ""
