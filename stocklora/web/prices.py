"""The watch list's prices: which files they stand in, and of each ticker what a line of the list shows.

Files are read in a thread, once a version; what the list needs of them is kept in the workspace, so that thousands of
tickers are there at once when the server is started again.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError
from stocklora.prices.csv_columns import PRICE_COLUMNS
from stocklora.prices.tables import is_table, read_prices
from stocklora.runtime.files import json_of, write_json
from stocklora.web.workspace import PRICES, REMOVED, STATE, Workspace

SPARK_DAYS = 60
SPARK_HEIGHT = 100  # closes of a sparkline are whole numbers from 0 to this
MOST_ROWS_HELD = 3_000_000  # of tables in memory; those asked for last stay
FORMAT = 1


class WatchedPrices:
    """Prices in ``prices/``, whatever their layout, and in tables of the plain one beside it.

    Args:
        workspace: where they lie.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.errors: dict[str, str] = {}  # file -> why it cannot be read
        self.version = 0  # grows with every change
        self._known: dict[str, dict[str, Any]] = {}  # file -> its stamp and its tickers' lines
        self._frames: OrderedDict[str, tuple[str, dict[str, Any]]] = OrderedDict()
        self._lock, self._reading = threading.RLock(), threading.Lock()
        self._kept = workspace.root / STATE / "watch.json"
        try:
            kept = json_of(self._kept.read_text(encoding="utf-8"))
            if kept.get("format") == FORMAT:
                self._known = kept["files"]
        except (OSError, ValueError, KeyError, AttributeError):
            pass

    def files(self) -> dict[str, str]:
        """Every price file with the stamp of its version, the newest first."""
        folder = self.workspace.root / PRICES
        found = [path for path in _tables(folder) if not path.is_symlink()]
        found += [path for path in _tables(self.workspace.root) if not path.is_symlink() and is_plain_table(path)]
        stats = sorted(((path.stat(), path) for path in found), key=lambda pair: -pair[0].st_mtime)
        return {self.workspace.name_of(path): f"{stat.st_mtime_ns}-{stat.st_size}" for stat, path in stats}

    def refresh(self) -> int:
        """Begin to read what is new, in a thread; how many files are still to be read."""
        files = self.files()
        with self._lock:
            gone = set(self._known) - set(files)
            for name in gone:
                del self._known[name]
            self.errors = {name: why for name, why in self.errors.items() if name in files}
            waiting = [name for name, stamp in files.items() if self._known.get(name, {}).get("stamp") != stamp]
            self.version += bool(gone)
        if waiting and self._reading.acquire(blocking=False):
            threading.Thread(target=self._read_all, args=(waiting, files), daemon=True).start()
        return len(waiting)

    def lines(self) -> list[dict[str, Any]]:
        """What the list shows of every ticker; of one in two files the newer file's, ``also_in`` names the other."""
        lines: dict[str, dict[str, Any]] = {}
        with self._lock:
            for name in self.files():
                for line in self._known.get(name, {}).get("lines", []):
                    if line["ticker"] in lines:
                        lines[line["ticker"]]["also_in"] = name
                    else:
                        lines[line["ticker"]] = {**line, "file": name}
        return sorted(lines.values(), key=lambda line: str(line["ticker"]))

    def frame(self, ticker: str) -> Any:
        """A ticker's table.

        Raises:
            UserError: it is not in the list, or its file cannot be read.
        """
        line = next((line for line in self.lines() if line["ticker"] == ticker), None)
        if line is None:
            raise UserError(f"{ticker[:40]} is not in the watch list")
        return self._table(line["file"])[ticker]

    def frames(self, tickers: Sequence[str]) -> dict[str, Any]:
        """Tables of those of ``tickers`` that are in the list."""
        homes = {line["ticker"]: line["file"] for line in self.lines()}
        return {ticker: self._table(homes[ticker])[ticker] for ticker in tickers if ticker in homes}

    def arguments(self) -> list[str]:
        """What ``--test_csv`` is given for the whole list: the folder, or files one by one where a ticker is twice."""
        lines = self.lines()
        used = list(dict.fromkeys(line["file"] for line in lines))
        inside = [name for name in used if name.startswith(f"{PRICES}/")]
        in_folder = [name for name in self.files() if name.startswith(f"{PRICES}/")]
        if len(inside) > 1 and sorted(inside) == sorted(in_folder):
            return [PRICES, *(name for name in used if name not in inside)]
        return used

    def add(self, name: str, data: bytes) -> list[str]:
        """Take in a price file; its tickers.

        Raises:
            UserError: it is no price table, or one of its tickers is in the list already.
        """
        path = self.workspace.new_file(name)
        if not is_table(path):
            path = path.with_name(f"{path.name}.csv")
        waiting = self.workspace.root / STATE / "arriving" / path.name  # its name may say whose prices they are
        waiting.parent.mkdir(parents=True, exist_ok=True)
        try:
            waiting.write_bytes(data)
            try:
                tickers = list(read_prices(waiting, any_interval=True))
            except UserError as error:
                raise UserError(str(error).replace(str(waiting), path.name)) from None
            homes = {line["ticker"]: line["file"] for line in self.lines()}
            for ticker in tickers:
                other = homes.get(ticker)
                if other is not None and other != self.workspace.name_of(path):
                    raise UserError(f"{path.name}: {ticker} is in {other} already; remove that from the list first")
            path.parent.mkdir(parents=True, exist_ok=True)
            waiting.replace(path)
        finally:
            waiting.unlink(missing_ok=True)
        self.refresh()
        return tickers

    def remove(self, name: str) -> None:
        """Take a file from the list; it goes into ``removed/``, not away.

        Raises:
            UserError: it is no file of the list.
        """
        if name not in self.files():
            raise UserError(f"{name[:60]} is no file of the watch list")
        path = self.workspace.inside(name)
        target = self.workspace.root / REMOVED
        target.mkdir(exist_ok=True)
        for file in (path, path.with_name(f"{path.name}.meta.json")):
            if file.exists():
                place, count = target / file.name, 1
                while place.exists():
                    place, count = target / f"{count}-{file.name}", count + 1
                file.replace(place)
        self.refresh()

    def _table(self, name: str) -> dict[str, Any]:
        path = self.workspace.inside(name)
        stat = path.stat()
        stamp = f"{stat.st_mtime_ns}-{stat.st_size}"
        with self._lock:
            held = self._frames.get(name)
            if held is not None and held[0] == stamp:
                self._frames.move_to_end(name)
                return held[1]
        frames = read_prices(path, any_interval=True)
        with self._lock:
            self._frames[name] = (stamp, frames)
            while len(self._frames) > 1 and _rows(self._frames) > MOST_ROWS_HELD:
                self._frames.popitem(last=False)
        return frames

    def _read_all(self, names: Sequence[str], stamps: Mapping[str, str]) -> None:
        try:
            for name in names:
                try:
                    lines, why = [line_of(ticker, frame) for ticker, frame in self._table(name).items()], None
                except UserError as error:
                    lines, why = [], str(error).replace(f"{self.workspace.root}/", "")
                except OSError as error:
                    lines, why = [], f"{name}: {error.strerror or error}"
                with self._lock:
                    self._known[name] = {"stamp": stamps[name], "lines": lines}
                    self.errors.pop(name, None)
                    if why is not None:
                        self.errors[name] = why
                    self.version += 1
            with self._lock:
                kept = {name: known for name, known in self._known.items() if name not in self.errors}
            write_json_quietly(self._kept, {"format": FORMAT, "files": kept})
        finally:
            self._reading.release()


def line_of(ticker: str, frame: Any) -> dict[str, Any]:
    """What the list shows of a ticker's prices."""
    closes = frame["Close"].to_numpy()[-SPARK_DAYS:]
    low, high = float(closes.min()), float(closes.max())
    spark = [round(SPARK_HEIGHT * (float(close) - low) / ((high - low) or 1.0)) for close in closes]
    return {
        "ticker": ticker, "rows": len(frame), "first": f"{frame.index[0]:%Y-%m-%d}",
        "last": f"{frame.index[-1]:%Y-%m-%d}", "close": float(f"{closes[-1]:.7g}"),
        "change": float(f"{closes[-1] / closes[-2] - 1.0:.5g}") if len(closes) > 1 else None, "spark": spark,
    }  # fmt: skip


def is_plain_table(path: Path) -> bool:
    """Whether a CSV beside ``prices/`` has our own columns; forecasts and records lie there too."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            line = stream.readline(2000).decode("utf-8-sig")
        header = next(csv.reader([line]), [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error):
        return False
    return {"date", *(name.lower() for name in PRICE_COLUMNS)} <= {cell.strip().lower() for cell in header}


def write_json_quietly(path: Path, content: Any) -> None:
    """A cache that cannot be written is none; nothing else is lost."""
    with contextlib.suppress(UserError):
        write_json(path, content)


def _tables(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and is_table(path) and path.name[0] != ".")


def _rows(frames: Mapping[str, tuple[str, dict[str, Any]]]) -> int:
    return sum(len(frame) for _, tables in frames.values() for frame in tables.values())
