"""A backtest's files while it runs: what is done, by which a stopped run is resumed, and all forecasts.

A *part* in ``OUTPUT/parts`` is what is forecast of one ticker between two fits. At the end the parts are read once, in
order, whoever made them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora import __version__
from stocklora.backtest.results import TickerForecasts
from stocklora.backtest.settings import BacktestSettings
from stocklora.backtest.walk_forward import Plan, score_ticker
from stocklora.cli.console import UserError, one_line, warn
from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.prices.store import NO_ARRAYS, spool
from stocklora.prices.tables import price_files
from stocklora.runtime.files import as_json_types, json_of, replacing, sha256_of, to_cell, write_json

PARTS, PRICES, REFITS, MANIFEST = "parts", "prices", "refits", "manifest.json"
UNFINGERPRINTED = ("resume", "output_dir", "show", "forecasts_format", "check_leakage", "leakage_cuts", "device")
LEVEL_COLUMNS = tuple(f"P{round(100 * level):02d}" for level in QUANTILE_LEVELS)

WriteForecasts = Callable[[TickerForecasts], object]


# --- parts -----------------------------------------------------------------------------------------------------


def open_parts(parts: Path, settings: BacktestSettings) -> None:
    """A fresh ``parts`` folder with validated prices, or the one of a stopped run.

    Raises:
        UserError: ``--resume`` with other data, weights or settings than the stopped run had.
    """
    if parts.exists() and not settings.resume:
        shutil.rmtree(parts)
    if not (parts / MANIFEST).is_file():
        if settings.resume:
            warn(f"nothing to resume in {parts}: starting anew")
            shutil.rmtree(parts, ignore_errors=True)
        try:
            spool(settings.data, parts / PRICES, settings.tickers, settings)
        except UserError:
            remove_parts(parts)
            raise
        write_json(parts / MANIFEST, fingerprint(settings, parts))
        return
    try:
        before = dict(json_of((parts / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"--resume: {parts / MANIFEST} is damaged, so nobody knows what was run; leave out --resume to start anew"
        ) from None
    now = as_json_types(fingerprint(settings, parts))
    for name in now:
        if now[name] != before.get(name):
            raise UserError(
                f"--resume: the stopped run in {parts} had another {name} ({before.get(name)}, now {now[name]}); give "
                f"the same, or leave out --resume to start anew"
            )


def fingerprint(settings: BacktestSettings, parts: Path) -> dict[str, Any]:
    """What a run's parts depend on."""
    content = {name: value for name, value in asdict(settings).items() if name not in UNFINGERPRINTED}
    content["version"] = __version__
    content["weights"] = [sha256_of(path) if path.is_file() else None for path in settings.lora_weights]
    sizes = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in price_files(settings.data)]
    content["files"] = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return content


def remove_parts(parts: Path) -> None:
    """Take away ``parts``, and the output folder where nothing else is in it."""
    shutil.rmtree(parts, ignore_errors=True)
    if parts.parent.is_dir() and not any(parts.parent.iterdir()):
        parts.parent.rmdir()


def part_path(parts: Path, place: int, cut: int) -> Path:
    """Where the forecasts lie that the models fitted at the ``cut``-th date make of the ``place``-th ticker."""
    return parts / f"{place:05d}-{cut:03d}.npz"


def write_part(path: Path, origins: range, quantiles: Mapping[str, np.ndarray]) -> None:
    """Keep one ticker's forecasts between two fits.

    Args:
        path: from ``part_path``.
        origins: rows of the ticker's table.
        quantiles: model -> (origins, horizon, levels) of the log return; empty where there is no origin.
    """
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, origins=np.array([origins.start, origins.stop]), **quantiles)


def read_parts(
    parts: Path, prices: Mapping[str, pd.DataFrame], names: Sequence[str], plan: Plan
) -> Iterator[TickerForecasts]:
    """Every ticker with a scored day, in order, one in memory at a time."""
    for place, (ticker, frame) in enumerate(prices.items()):
        made = []
        for cut in range(len(plan.cuts)):
            path = part_path(parts, place, cut)
            try:
                with np.load(path, allow_pickle=False) as content:
                    start, stop = content["origins"].tolist()
                    if stop > start:
                        made.append((range(start, stop), {name: content[name] for name in names}))
            except NO_ARRAYS as error:
                raise UserError(
                    f"{path} is damaged ({one_line(str(error))[:120]}); remove it, and go on with --resume"
                ) from None
        forecasts = score_ticker(ticker, frame, made, plan) if made else None
        if forecasts is not None:
            yield forecasts


# --- all forecasts ---------------------------------------------------------------------------------------------


def forecast_writer(settings: BacktestSettings) -> contextlib.AbstractContextManager[WriteForecasts]:
    """A context that gives ``write(forecasts)``; the file takes its name when all are written.

    Raises:
        UserError: parquet is asked for and its package is missing.
    """
    has_arrow = importlib.util.find_spec("pyarrow") is not None
    if settings.forecasts_format == "parquet" and not has_arrow:
        raise UserError("--forecasts_format parquet needs pyarrow: pip install pyarrow, or give csv")
    parquet, packed_csv = (settings.output_dir / f"forecasts.{suffix}" for suffix in ("parquet", "csv.gz"))
    as_parquet = has_arrow and settings.forecasts_format != "csv"
    (packed_csv if as_parquet else parquet).unlink(missing_ok=True)  # of an earlier run
    return _parquet_writer(parquet) if as_parquet else _csv_writer(packed_csv)


@contextlib.contextmanager
def _parquet_writer(path: Path) -> Iterator[WriteForecasts]:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema(
        [("Model", pyarrow.string()), ("Ticker", pyarrow.string()), ("Origin", pyarrow.date32()),
         ("Date", pyarrow.date32()), ("Day", pyarrow.int8())]
        + [(name, pyarrow.float64()) for name in ("Last_Close", "Close", *LEVEL_COLUMNS)]
    )  # fmt: skip
    with replacing(path) as temporary, ParquetWriter(temporary, schema, compression="zstd") as writer:
        yield lambda forecasts: writer.write_table(pyarrow.table(forecast_columns(forecasts), schema=schema))


@contextlib.contextmanager
def _csv_writer(path: Path) -> Iterator[WriteForecasts]:
    with (
        replacing(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=5, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as stream,
    ):
        is_first = True

        def write(forecasts: TickerForecasts) -> None:
            nonlocal is_first
            table = pd.DataFrame(forecast_columns(forecasts) | {"Ticker": to_cell(forecasts.ticker)})
            table.to_csv(stream, index=False, header=is_first, float_format="%.7g", lineterminator="\n")
            is_first = False

        yield write


def forecast_columns(forecasts: TickerForecasts) -> dict[str, Any]:
    """Columns of the forecasts file: a row a model, origin and day ahead."""
    count, horizon = forecasts.returns.shape
    last = np.repeat(forecasts.last_close, horizon)
    came = last * np.exp(forecasts.returns.reshape(-1))
    models = list(forecasts.quantiles)
    closes = np.concatenate([last[:, None] * np.exp(forecasts.quantiles[name].reshape(-1, len(QUANTILE_LEVELS)))
                             for name in models])  # fmt: skip
    return {
        "Model": np.repeat(models, count * horizon).tolist(),
        "Ticker": [forecasts.ticker] * (len(models) * count * horizon),
        "Origin": np.tile(np.repeat(forecasts.origins, horizon), len(models)),
        "Date": np.tile(forecasts.targets.reshape(-1), len(models)),
        "Day": np.tile(np.arange(1, horizon + 1, dtype=np.int8), len(models) * count),
        "Last_Close": np.tile(last, len(models)),
        "Close": np.tile(came, len(models)),
        **{name: closes[:, column] for column, name in enumerate(LEVEL_COLUMNS)},
    }
