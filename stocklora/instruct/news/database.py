"""A news database (SQLite) read without ever writing to it: events, and what prices did after them.

``events`` holds flashes (``content``) and calendar items (``name``, ``previous``, ``consensus``, ``actual``);
``event_impacts`` holds returns by event, ticker and window. Standard library only.
"""

from __future__ import annotations

import contextlib
import math
import re
import sqlite3
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError

COLUMNS = {
    "events": (
        "event_id", "source", "ts_local", "ts_utc", "country", "name", "content", "previous", "consensus", "actual",
    ),
    "event_impacts": ("event_id", "ticker", "window_min", "ret"),
}  # fmt: skip
SAMPLE_DATABASE = "finance_news.db"
MISSING = {"", "none", "null", "nan", "n/a", "-", "--"}
LARGEST_RETURN = 0.5  # a window of minutes or hours with more than this is a fault of the data
# How a database may write returns, and what makes a fraction of them. 0.27% is 0.0027, 0.27 or 27.
RETURN_UNITS = {"fraction": 1.0, "percent": 100.0, "bp": 10_000.0}
SHORT_MIN = 60  # within an hour no usual market moves by
LARGEST_MEDIAN = 0.01  # a percent in the middle of its days; numbers that say so are in another unit
WRITE_AHEAD = b"\x02"  # at byte 18 of a database in WAL mode
LOCK_TIMEOUT_S = 5.0
NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"  # a comma parts thousands; "0,3" is not read as 3
DAY = re.compile(r"(\d{4})[-/.年](\d{1,2})[-/.月](\d{1,2})(?!\d)|(\d{4})(\d{2})(\d{2})(?!\d)")


@dataclass(frozen=True)
class Event:
    """One item of the news.

    Attributes:
        moves: by ticker, (window in minutes, return in basis points) from the shortest window to the longest. Returns
            are rounded to whole basis points here, so that no text can show another number than it was judged by.
    """

    event_id: str
    source: str
    day: date
    country: str
    name: str
    content: str
    previous: str | None
    consensus: str | None
    actual: str | None
    moves: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)


def sample_database() -> Path:
    """The bundled database of invented news."""
    from stocklora.runtime.files import bundled_folder

    return bundled_folder() / SAMPLE_DATABASE


def read_events(path: Path | None, return_unit: str = "auto") -> tuple[list[Event], Counter[str]]:
    """Events in order of time, and how many rows were left out for which reason.

    Args:
        path: an SQLite file; None is the bundled one.
        return_unit: of ``RETURN_UNITS``; ``auto`` takes them for fractions, and stops where they cannot be.

    Raises:
        UserError: no such file, not SQLite, a table or a column missing, returns that are no fractions, or no usable
            event.
    """
    path = path or sample_database()
    left_out: Counter[str] = Counter()
    with _opened(path) as connection:
        _check_tables(connection, path)
        moves = _moves(connection, left_out, path, return_unit)
        # Named anew, for a table may spell them in capitals; not by rowid, which not every table has.
        columns = ", ".join(f"{name} AS {name}" for name in COLUMNS["events"])
        rows = [dict(row) for row in connection.execute(f"SELECT {columns} FROM events")]
    events = []
    seen = set()
    for row in rows:
        event_id, day = _text(row["event_id"]), _day(row["ts_local"]) or _day(row["ts_utc"])
        if event_id is None or event_id in seen:
            left_out["event without an id, or with another's"] += 1
            continue
        seen.add(event_id)
        if day is None:
            left_out["event without a date"] += 1
            continue
        if any(isinstance(row[key], bytes) for key in COLUMNS["events"]):
            left_out["event with a cell that is neither UTF-8 nor GB18030 text"] += 1
            continue
        if not (_text(row["content"]) or _text(row["name"])):
            left_out["event without text"] += 1
            continue
        source, country, name, content = (_text(row[key]) or "" for key in ("source", "country", "name", "content"))
        previous, consensus, actual = (_text(row[key]) for key in ("previous", "consensus", "actual"))
        words = (source, day, country, name, content)
        events.append(Event(event_id, *words, previous, consensus, actual, moves.get(event_id, {})))
    orphans = sum(len(windows) for key in moves.keys() - seen for windows in moves[key].values())
    if orphans:
        left_out["return of an unknown event"] += orphans
    if not events:
        raise UserError(f"{path}: table events has no usable row; each needs event_id, a date and a text")
    events.sort(key=lambda event: (event.day, event.event_id))
    return events, left_out


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        if not path.is_file():
            bundled = f"the bundled one is --db data/sample/{SAMPLE_DATABASE}, the default"
            raise UserError(f"no database {path}; give --db FILE; {bundled}")
        with path.open("rb") as stream:
            in_wal_mode = stream.read(100)[18:19] == WRITE_AHEAD
        logs = {end: path.with_name(path.name + end) for end in ("-wal", "-journal")}
        unfinished = [log.name for log in logs.values() if log.is_file() and log.stat().st_size]
        alone = in_wal_mode and not logs["-wal"].exists()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    # A database in WAL mode wants to make files beside itself even for reading; without a log there is nothing to
    # share with a writer, and `immutable` reads it as it lies. The same helps where locks cannot be had, but not
    # beside a log or a writer: then what lies there is not the whole of it.
    modes = [] if alone else ["mode=ro"]
    if not unfinished:
        modes.append("mode=ro&immutable=1")
    problem = ""
    for mode in modes:
        with contextlib.ExitStack() as stack:
            try:
                uri = f"{path.resolve().as_uri()}?{mode}"
                connection = sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT_S)
                stack.callback(connection.close)
                connection.row_factory = sqlite3.Row
                connection.text_factory = _decoded
                connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchone()
            except sqlite3.OperationalError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                    raise UserError(f"{path} is locked by another program that writes to it; try again later") from None
                problem = str(error)
                continue
            except sqlite3.DatabaseError as error:
                raise UserError(_damage(path) or f"{path} is not an SQLite database: {error}") from None
            try:
                yield connection
            except sqlite3.DatabaseError as error:
                raise UserError(_damage(path) or f"cannot read {path}: {error}") from None
            return
    if unfinished:
        problem += f"; {', '.join(unfinished)} holds changes to it: open and close it once in sqlite3"
    raise UserError(f"cannot open {path}: {problem}")


def _decoded(data: bytes) -> str | bytes:
    """Text as UTF-8, else as GB18030, which Chinese programs write without saying so; else the bytes themselves."""
    for encoding in ("utf-8", "gb18030"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data


def _damage(path: Path) -> str | None:
    """What is wrong with a file that begins as SQLite does and cannot be read; None if it does not begin so."""
    with path.open("rb") as stream:
        head = stream.read(100)
    if not head.startswith(b"SQLite format 3\0") or len(head) < 100:
        return None
    page = int.from_bytes(head[16:18], "big")
    whole, there = (65536 if page == 1 else page) * int.from_bytes(head[28:32], "big"), path.stat().st_size
    if there < whole:
        return f"{path} is cut short: {there:,} of its {whole:,} bytes are there; copy it again, or restore a backup"
    return f"{path} is a damaged SQLite database; restore a backup, or try: sqlite3 {path.name} .recover"


def _check_tables(connection: sqlite3.Connection, path: Path) -> None:
    tables = {
        row[0].lower() for row in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table','view')")
    }
    for table, columns in COLUMNS.items():
        if table not in tables:
            there = ", ".join(sorted(tables)) or "none"
            raise UserError(f"{path}: no table {table}; tables there: {there}")
        present = {row[1].lower() for row in connection.execute(f"PRAGMA table_info({table})")}
        missing = [column for column in columns if column not in present]
        if missing:
            raise UserError(f"{path}: table {table} has no column {', '.join(missing)}; it needs {', '.join(columns)}")


def _moves(
    connection: sqlite3.Connection, left_out: Counter[str], path: Path, unit: str
) -> dict[str, dict[str, tuple[tuple[int, int], ...]]]:
    """By event and ticker: (minutes, basis points) in order of the windows."""
    found: dict[str, dict[str, dict[int, int]]] = {}
    short: dict[str, list[float]] = {}
    scale = RETURN_UNITS.get(unit, 1.0)
    for row in connection.execute("SELECT event_id, ticker, window_min, ret FROM event_impacts"):
        event_id, ticker = _text(row["event_id"]), _text(row["ticker"])
        minutes, ret = _number(row["window_min"]), _number(row["ret"], scale)
        if event_id is None or ticker is None or minutes is None or minutes <= 0 or minutes != int(minutes):
            left_out["return without event, ticker or window"] += 1
            continue
        if ret is not None and minutes <= SHORT_MIN:
            short.setdefault(ticker, []).append(abs(ret))
        if ret is None or abs(ret) > LARGEST_RETURN:
            left_out["return that is empty, no number or beyond 50%"] += 1
        else:
            windows = found.setdefault(event_id, {}).setdefault(ticker, {})
            if int(minutes) in windows:
                left_out["return given twice for one window"] += 1
            windows.setdefault(int(minutes), round(ret * 10_000))
    if unit == "auto":
        _check_unit(short, path)
    return {
        event_id: {ticker: tuple(sorted(windows.items())) for ticker, windows in sorted(tickers.items())}
        for event_id, tickers in found.items()
    }


def _check_unit(short: Mapping[str, list[float]], path: Path) -> None:
    """Refuse returns that no market makes, whatever each ticker has: answers would state them a hundred times too big.

    Args:
        short: by ticker, the sizes of its moves within ``SHORT_MIN`` minutes, read as fractions.

    Raises:
        UserError: naming the unit that they seem to have.
    """
    for ticker, sizes in sorted(short.items()):
        typical = statistics.median(sizes)
        if typical <= LARGEST_MEDIAN:
            continue
        unit = "percent" if typical <= 100 * LARGEST_MEDIAN else "bp"
        words = {"percent": "percent", "bp": "basis points"}[unit]
        raise UserError(
            f"{path}, event_impacts.ret: half of the moves of {ticker} within an hour are beyond "
            f"{100 * typical:,.1f}% if they are fractions; they seem to be in {words}: add --return_unit {unit} (or "
            f"--return_unit fraction, if they are meant so)"
        )


def _text(value: Any) -> str | None:
    """Text of a cell; what stands for nothing is None, as are bytes that are no text."""
    if value is None or isinstance(value, bytes):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes 7 a 7.0 where a column has gaps; an id must stay the same
    text = str(value).strip()
    return None if text.lower() in MISSING else text


def _number(value: Any, scale: float = 1.0) -> float | None:
    """A number of a cell over ``scale``, also from text; ``0.3%`` is 0.003 in any case."""
    text = _text(value)
    if text is None:
        return None
    digits = text.removesuffix("%").strip()
    if "," in digits and not re.fullmatch(NUMBER, digits):
        return None
    try:
        number = float(digits.replace(",", "")) / (100 if text.endswith("%") else scale)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _day(value: Any) -> date | None:
    """The day that a time begins with: ``2025-01-03 09:30:00``, ``2025/1/3``, ``20250103``.

    Ten digits are a Unix time, thirteen one in milliseconds; its day is that of UTC.
    """
    text = _text(value) or ""
    if unix := re.fullmatch(r"(\d{10})(?:\d{3})?(?:\.\d*)?", text):
        return datetime.fromtimestamp(int(unix[1]), UTC).date()
    match = DAY.match(text)
    if match is None:
        return None
    try:
        return date(*(int(part) for part in match.groups() if part))
    except ValueError:
        return None
