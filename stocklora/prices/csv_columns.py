"""From the bytes of a CSV to checked columns: text, header, dates and numbers.

Each check that fails raises a ``UserError`` naming file, row and column. Rows are counted as an editor
counts lines: the header is row 1. What the columns must hold *together* is checked in ``prices.py``.
"""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import re
import zlib
from pathlib import Path

import numpy as np

from stocklora.cli.console import UserError

PRICE_COLUMNS = ["Open", "High", "Low", "Close", "Volume"]

# 2024-01-02, 2024/01/02 or 20240102; a time of day only when it is midnight, with any zone after it.
ISO_DATE = re.compile(r"(\d{4})([-/]?)(\d{2})\2(\d{2})(.*)", re.DOTALL)
MIDNIGHT = re.compile(r"([T ]00:00(:00(\.0+)?)?)?( ?(Z|UTC|[+-]\d{2}:?\d{2}))?")
NOT_A_VALUE = {"nan", "na", "n/a", "null", "none", "-", "inf", "-inf", "+inf", "infinity", "#n/a"}


def at(path: Path, line: int, column: str = "") -> str:
    """A place in a file, as error messages name it."""
    return f"{path}, row {line}" + (f", column {column}" if column else "")


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
    # Excel in China and in Europe. Either decodes nearly anything; in the right one the header makes sense.
    for encoding in ("gb18030", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if re.search("日期|时间|开盘|收盘|代码" if encoding == "gb18030" else r"[äöüÄÖÜßéèêáíóúñç]", text[:2000]):
            return text
    raise UserError(fault)


def split_rows(path: Path, text: str) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Column names in their usual spelling, the rows, and the line each row stands on."""
    reader = csv.reader(io.StringIO(text, newline=""))
    rows, lines = [], []
    try:
        columns = checked_header(path, [cell.strip() for cell in next(reader)])
        width = len(columns)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            # A comma at the end of every line is harmless, a value without a column is not.
            if len(row) != width and (len(row) < width or any(cell.strip() for cell in row[width:])):
                raise UserError(
                    f"{at(path, reader.line_num)}: {len(row)} values under {width} columns; "
                    "put commas inside quotes, or complete the line"
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{at(path, reader.line_num)}: not a CSV line ({error}); correct or delete it") from None
    if not rows:
        raise UserError(f"{path}: there is a header but no row under it; run: python download.py --output {path}")
    return columns, rows, np.array(lines)


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


def parse_dates(path: Path, cells: list[str], lines: np.ndarray) -> np.ndarray:
    """Days as ``datetime64[ns]``; a time of day other than midnight is refused, since rows are days."""
    days = []
    for cell, line in zip(cells, lines, strict=True):
        text = cell.strip()
        match = ISO_DATE.fullmatch(text)
        problem = "is not a date; write it as 2024-01-31"
        if not text:
            problem = "the cell is empty; fill it in or delete that line"
        elif match and not MIDNIGHT.fullmatch(match[5]):
            problem = "has a time of day; tables hold one row a day: download with --interval 1d"
        elif match:
            try:
                day = dt.date(int(match[1]), int(match[3]), int(match[4]))
                if day.year >= 1800:
                    days.append(day)
                    continue
                problem = "is before there were prices; write it as 2024-01-31"
            except ValueError:
                problem = "is no day of the calendar; write it as 2024-01-31"
        raise UserError(f"{at(path, line, 'Date')}: {quoted(text)}{problem}")
    return np.array(days, dtype="datetime64[D]").astype("datetime64[ns]")


def parse_numbers(path: Path, column: str, cells: list[str], lines: np.ndarray) -> np.ndarray:
    """One column as float64, or a ``UserError`` at the first cell that is not a finite, allowed number."""
    try:
        values = np.array([float(cell) for cell in cells])
    except ValueError:
        values = np.array([number_or_nan(cell) for cell in cells])
    # A price must be above zero; no trade on a day is a volume of zero and may be.
    wrong = ~np.isfinite(values) | (values < 0 if column == "Volume" else values <= 0)
    for index in np.flatnonzero(wrong):
        text = cells[index].strip()
        place = at(path, lines[index], column)
        if not text:
            raise UserError(f"{place}: the cell is empty; fill it in or delete that line")
        if np.isfinite(values[index]):
            sign = "negative" if values[index] < 0 else "zero"
            noun = "a volume" if column == "Volume" else "a price"
            raise UserError(f"{place}: {quoted(text)}is {sign}, which {noun} cannot be; correct or delete that line")
        if text.lower() in NOT_A_VALUE:
            raise UserError(f"{place}: {quoted(text)}is not a value; fill it in or delete that line")
        raise UserError(f"{place}: {quoted(text)}is not a number; write it like 1234.56")
    return values


def number_or_nan(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def quoted(text: str) -> str:
    """``text`` in quotes and a blank, cut where it is long; nothing for nothing."""
    shown = text if len(text) <= 40 else text[:37] + "..."
    return f"'{shown}' " if text else ""
