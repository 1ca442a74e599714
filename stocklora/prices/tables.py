"""Price tables on disk: read, validate, write.

A table is a CSV (or ``.csv.gz``) with the columns ``Date,Open,High,Low,Close,Volume``, preceded by
``Ticker`` when it holds several. Beside it stands ``FILE.meta.json``: source, adjustment, interval,
rows, tickers, dates, sha256 and time. In memory a history is a frame with a strictly increasing,
timezone-free ``DatetimeIndex`` named ``Date`` and float64 columns in the order of ``PRICE_COLUMNS``.

Everything a script reads comes through :func:`read_prices`, which accepts a table whole or refuses it
with one line naming file, row and column. Rows are counted as an editor counts lines: the header is 1.
"""

from __future__ import annotations

import csv
import datetime as dt
import difflib
import gzip
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError, warn
from stocklora.prices.bars import bar_faults
from stocklora.prices.csv_columns import PRICE_COLUMNS
from stocklora.prices.reading import read_table
from stocklora.prices.settings import AS_THEY_ARE, ReadingSettings
from stocklora.runtime.files import json_of, replacing, sha256_of, to_cell, write_json


def read_prices(
    paths: Path | Sequence[Path],
    *,
    min_rows: int = 0,
    reading: ReadingSettings = AS_THEY_ARE,
    any_interval: bool = False,
) -> dict[str, pd.DataFrame]:
    """Read and validate one or several price files or folders of them.

    Args:
        paths: CSV or ``.csv.gz`` files, or folders, whose ``*.csv`` and ``*.csv.gz`` are all read.
        min_rows: the fewest rows a ticker may have.
        reading: what the user says of the files.
        any_interval: weeks and months too; a forecast wants days.

    Returns:
        One frame a ticker, in the order of the files and of first appearance in them.

    Raises:
        UserError: any table is not whole, a ticker stands in two files, or files of different
            adjustment are mixed.
    """
    files = [paths] if isinstance(paths, (str, Path)) else paths
    frames = {}
    for path, ticker, frame in each_ticker(
        files, lambda file, meta: read_table(file, meta, reading, any_interval).items()
    ):
        if len(frame) < min_rows:
            raise UserError(
                f"{path}: {ticker} has {len(frame)} rows, but {min_rows} are needed; "
                "download a longer --period or lower the window"
            )
        frames[ticker] = frame
    return frames


def each_ticker(
    paths: Iterable[Path], read: Callable[[Path, Mapping[str, Any] | None], Iterable[tuple[str, pd.DataFrame]]]
) -> Iterator[tuple[Path, str, pd.DataFrame]]:
    """Every ticker of every file, in order, with the file it stands in.

    Args:
        paths: files, and folders of them.
        read: (file, its sidecar) -> its tickers.

    Raises:
        UserError: as ``read``; a ticker stands in two files; at the end, files of different adjustment were mixed.
    """
    home: dict[str, Path] = {}
    adjustments: dict[str, Path] = {}
    for path in price_files(paths):
        meta = trusted_meta(path)
        if meta is not None and meta.get("adjust"):
            adjustments.setdefault(str(meta["adjust"]), path)
        for ticker, frame in read(path, meta):
            if ticker in home:
                raise UserError(f"{path}: ticker {ticker} is also in {home[ticker]}; give only one of the two files")
            home[ticker] = path
            yield path, ticker, frame
    refuse_mixed(adjustments)


def refuse_mixed(adjustments: Mapping[str, Path]) -> None:
    """Raise unless all sidecars agree on how prices were adjusted (``{adjustment: a file that has it}``)."""
    if "mixed" in adjustments:
        raise UserError(
            f"{adjustments['mixed']}: its sidecar says that files of different adjustment are mixed in it; "
            "download all tickers again with one --adjust"
        )
    if len(adjustments) > 1:
        (one, first), (other, second) = list(adjustments.items())[:2]
        raise UserError(
            f"{second} is adjusted for '{other}' but {first} for '{one}'; prices of different adjustment cannot "
            "be mixed: download them again with one --adjust"
        )


def price_files(paths: Iterable[Path]) -> list[Path]:
    """The files that ``paths`` name, folders opened; each once, in order."""
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if is_table(p) and not p.name.startswith("."))
            if not inside:
                raise UserError(f"{path}: the folder holds no .csv or .csv.gz file; run download.py --output {path}/")
            files.update(dict.fromkeys(inside))
        elif path.exists():
            files[path] = None
        else:
            near = difflib.get_close_matches(path.name, siblings(path), n=1, cutoff=0.6)
            hint = f"did you mean {path.with_name(near[0])}?" if near else f"run: python download.py --output {path}"
            raise UserError(f"{path}: no such file; {hint}")
    if not files:
        raise UserError("no price file was given; run: python download.py")
    return list(files)


def siblings(path: Path) -> list[str]:
    """The tables in the folder that ``path`` would be in."""
    try:
        return [p.name for p in path.parent.iterdir() if is_table(p)]
    except OSError:
        return []


def is_table(path: Path) -> bool:
    """Whether the name is that of a table."""
    return path.name.lower().endswith((".csv", ".csv.gz"))


def validated(frame: pd.DataFrame, ticker: str) -> pd.DataFrame:
    """Check a frame in memory against the contract; return it with the columns in order.

    Raises:
        ValueError: it breaks the contract. A program made it, so this is no mistake of a user.
    """
    missing = [name for name in PRICE_COLUMNS if name not in frame.columns]
    if missing:
        raise ValueError(f"{ticker}: missing columns {missing}")
    index = frame.index
    if not isinstance(index, pd.DatetimeIndex) or index.tz is not None or not index.equals(index.normalize()):
        raise ValueError(f"{ticker}: the index must be a timezone-free DatetimeIndex of whole days")
    if not (index.is_monotonic_increasing and index.is_unique):
        raise ValueError(f"{ticker}: dates must strictly increase")
    frame = frame[PRICE_COLUMNS].astype("float64").rename_axis(columns=None)
    frame.index = index.as_unit("ns").rename("Date")
    values = frame.to_numpy()
    if not np.isfinite(values).all() or (values[:, :4] <= 0).any() or (values[:, 4] < 0).any():
        raise ValueError(f"{ticker}: prices must be finite and positive, volumes finite and not negative")
    if any(faults.any() for faults in bar_faults(frame).values()):
        raise ValueError(f"{ticker}: a bar's high is not its highest or its low not its lowest price")
    return frame


def write_prices(frames: Mapping[str, pd.DataFrame], path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write one table and its sidecar, each atomically, such that :func:`read_prices` gives the same back.

    Args:
        frames: one frame a ticker; several make a long table with a ``Ticker`` column.
        path: a ``.csv`` or ``.csv.gz`` file.
        meta: what only the caller knows: ``source``, ``adjust``, ``interval`` and anything else worth
            keeping. Rows, tickers, dates, sha256 and (unless given) time are filled in.

    Returns:
        The sidecar's content.
    """
    path = Path(path)
    if not frames:
        raise ValueError("no prices to write")
    checked = {ticker: validated(frame, ticker) for ticker, frame in frames.items()}
    content = table_text(checked).encode()
    if path.suffix.lower() == ".gz":
        content = gzip.compress(content, mtime=0)  # the same prices make the same bytes
    days = [frame.index for frame in checked.values() if len(frame)]
    full = {
        **meta,
        "rows": sum(map(len, checked.values())),
        "tickers": list(checked),
        "first_date": str(min(day[0] for day in days).date()) if days else None,
        "last_date": str(max(day[-1] for day in days).date()) if days else None,
        "sha256": hashlib.sha256(content).hexdigest(),
        "time": meta.get("time") or dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        write_json(meta_path(path), full)  # before the prices take their place: half done, the old ones are still whole
    return full


def table_text(frames: Mapping[str, pd.DataFrame]) -> str:
    """The CSV: shortest digits that read back to the same float, whole volumes without a point."""
    several = len(frames) > 1
    out = io.StringIO()
    out.write(",".join([*(["Ticker"] if several else []), "Date", *PRICE_COLUMNS]) + "\n")
    writer = csv.writer(out, lineterminator="\n")
    for ticker, frame in frames.items():
        days = frame.index.strftime("%Y-%m-%d")
        for day, row in zip(days, frame.to_numpy().tolist(), strict=True):
            volume = int(row[4]) if row[4].is_integer() else row[4]
            writer.writerow([*([to_cell(ticker)] if several else []), day, *row[:4], volume])
    return out.getvalue()


def meta_path(path: Path) -> Path:
    """Where a price file's sidecar stands."""
    return path.with_name(path.name + ".meta.json")


def read_meta(path: Path) -> dict[str, Any] | None:
    """The sidecar of a price file, or None where there is none.

    Raises:
        UserError: the sidecar is there but is not JSON of a mapping.
    """
    side = meta_path(Path(path))
    try:
        content = json_of(side.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{side}: not a readable sidecar ({error}); delete it or download the prices again") from None
    tickers = content.get("tickers") or [] if isinstance(content, dict) else None
    if not isinstance(tickers, list) or not all(_is_text(name) for name in tickers):
        raise UserError(f"{side}: not a sidecar (no mapping of facts); delete it or download the prices again")
    return content


def _is_text(value: Any) -> bool:
    """Whether it is a text that can be written again: JSON can hold half a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def trusted_meta(path: Path) -> dict[str, Any] | None:
    """The sidecar, unless the table has changed since it was written: then it speaks of another table."""
    meta = read_meta(path)
    if meta is not None and meta.get("sha256") != sha256_of(path):
        warn(f"{path} has changed since {meta_path(path).name} was written; that sidecar is ignored")
        return None
    return meta


def prices_sha256(prices: Mapping[str, pd.DataFrame]) -> str:
    """Of names, dates and numbers, the tickers in alphabetical order."""
    digest = hashlib.sha256()
    for name in sorted(prices):
        digest.update(name.encode())
        digest.update(prices[name].index.to_numpy().astype("datetime64[D]").astype(np.int64).tobytes())
        digest.update(np.ascontiguousarray(prices[name].to_numpy(dtype=np.float64)).tobytes())
    return digest.hexdigest()


def log_returns_ahead(close: np.ndarray, horizon: int) -> np.ndarray:
    """``log(close[t + h] / close[t])`` for h = 1..horizon.

    Args:
        close: (days,) closes.

    Returns:
        (days, horizon) float64; NaN where the day ``t + h`` is not in the table.
    """
    log_close = np.log(close)
    ahead = np.full((len(close), horizon), np.nan)
    for step in range(1, horizon + 1):
        ahead[:-step, step - 1] = log_close[step:] - log_close[:-step]
    return ahead
