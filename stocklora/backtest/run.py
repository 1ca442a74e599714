"""What ``backtest.py`` does: walk forward, one ticker at a time, and write metrics, forecasts and report.

Every finished ticker is a file in ``OUTPUT/parts``, so a run can be stopped and resumed, and several processes
can share the tickers; at the end the parts are read once, in order, whoever made them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora import __version__
from stocklora.backtest.aggregate import Tally, write_metrics
from stocklora.backtest.base_cutoffs import cutoff_note
from stocklora.backtest.results import REFERENCE, BacktestResult, TickerForecasts
from stocklora.backtest.settings import BacktestSettings
from stocklora.backtest.walk_forward import (
    BASELINES,
    Baselines,
    LanguageModel,
    Model,
    Peer,
    Plan,
    Simple,
    choose_cuts,
    default_start,
    score_ticker,
    wait_for_everyone,
)
from stocklora.cli.console import UserError, progress, say, warn
from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.prices.store import PriceStore, spool
from stocklora.runtime.files import as_json_types, check_writable, replacing, write_json

PARTS, PRICES, REFITS, MANIFEST = "parts", "prices", "refits", "manifest.json"
LEVEL_COLUMNS = tuple(f"P{round(100 * level):02d}" for level in QUANTILE_LEVELS)
UNFINGERPRINTED = ("resume", "output_dir", "show", "forecasts_format", "check_leakage", "leakage_cuts", "device")


@dataclass(frozen=True)
class Process:
    """This process among those that ``accelerate launch`` started; one of one otherwise."""

    index: int
    count: int

    @staticmethod
    def here() -> Process:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1:
            from accelerate import PartialState

            state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))
            return Process(state.process_index, state.num_processes)
        return Process(0, 1)

    @property
    def is_main(self) -> bool:
        return self.index == 0


def run(settings: BacktestSettings) -> int:
    """Score, or with ``check_leakage`` look for leaks; 0, or 1 where a leak was found.

    Raises:
        UserError: anything in data, weights or settings that the user can mend; reports of earlier runs stay.
    """
    if not settings.data:
        raise UserError("no price file was given; run: python backtest.py --data FILE")
    if settings.check_leakage:
        from stocklora.backtest.leakage import check_backtest

        return check_backtest(settings)
    process = Process.here()
    check_writable(settings.output_dir, "--output_dir")
    parts = settings.output_dir / PARTS
    if process.is_main:
        begin(parts, settings)
    wait_for_everyone()
    try:
        prices = PriceStore(parts / PRICES)
        models, plan, ensemble = prepare_run(settings, prices, process)
        walk(prices, models, plan, parts, process, settings.models)
        wait_for_everyone()
        if process.is_main:
            report(settings, finish(settings, prices, plan, ensemble))
            shutil.rmtree(parts)
        wait_for_everyone()
    except KeyboardInterrupt:
        raise UserError(
            f"stopped; what is done lies in {parts}: the same command with --resume goes on from there"
        ) from None
    except UserError:
        if process.is_main and not any(parts.glob("*.npz")):  # nothing done that a resumed run could use
            clear(parts)
        raise
    return 0


def clear(parts: Path) -> None:
    """Take away ``parts``, and the output folder where nothing else is in it."""
    shutil.rmtree(parts, ignore_errors=True)
    if parts.parent.is_dir() and not any(parts.parent.iterdir()):
        parts.parent.rmdir()


def begin(parts: Path, settings: BacktestSettings) -> None:
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
            spool(settings.data, parts / PRICES, settings.tickers)
        except UserError:
            clear(parts)
            raise
        write_json(parts / MANIFEST, fingerprint(settings, parts))
        return
    before = json.loads((parts / MANIFEST).read_text(encoding="utf-8"))
    now = as_json_types(fingerprint(settings, parts))
    differing = [name for name in now if now[name] != before.get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"--resume: the stopped run in {parts} had another {name} ({before.get(name)}, now {now[name]}); give the "
            f"same, or leave out --resume to start anew"
        )


def fingerprint(settings: BacktestSettings, parts: Path) -> dict[str, Any]:
    """What a run's parts depend on."""
    from stocklora.runtime.files import sha256_of

    content = {name: value for name, value in asdict(settings).items() if name not in UNFINGERPRINTED}
    content["version"] = __version__
    content["weights"] = [sha256_of(path) if path.is_file() else None for path in settings.lora_weights]
    sizes = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(settings.data)]
    content["files"] = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return content


def _files(paths: Sequence[Path]) -> list[Path]:
    from stocklora.prices.tables import price_files

    return price_files(paths)


def prepare_run(
    settings: BacktestSettings, prices: Mapping[str, pd.DataFrame], process: Process
) -> tuple[list[Model], Plan, Any]:
    """The models and the dates; refuses days that the weights were trained on.

    Returns:
        Models, plan, and the ensemble of weights (None without ``llm``).
    """
    levels = np.array(QUANTILE_LEVELS)
    if settings.show is not None and settings.show not in prices:
        raise UserError(
            f"--show {settings.show}: no such ticker in the files; they have {', '.join(list(prices)[:20])}"
        )
    calendar = calendar_of(prices)
    ensemble, seen_until, window_size = None, None, settings.window_size
    if "llm" in settings.models:
        ensemble = load_ensemble(settings)
        specs = [content.spec for content in ensemble.weights]
        window_size = max(window_size, *(spec.window_size for spec in specs))
        if specs[0].horizon != settings.horizon:
            raise UserError(
                f"--horizon {settings.horizon}: {settings.lora_weights[0]} forecasts {specs[0].horizon} days; give "
                f"--horizon {specs[0].horizon} or train again"
            )
        if specs[0].levels != levels.tolist():
            raise UserError(f"{settings.lora_weights[0]} forecasts other quantile levels; train it anew")
        seen_until = max(pd.Timestamp(content.training["data"]["test_from"]) for content in ensemble.weights)
    first = _date(settings.start, "--from")
    if first is None:
        first = seen_until if seen_until is not None else default_start(calendar[window_size:])
    if seen_until is not None and first < seen_until and settings.refit == "never":
        raise UserError(
            f"--from {first:%Y-%m-%d}: the weights were trained and calibrated on days before {seen_until:%Y-%m-%d}, "
            f"and a score on days it learned from means nothing; give a later date, or --refit yearly to train anew"
        )
    end = _date(settings.end, "--to") or calendar[-1]
    cuts = choose_cuts(calendar, first, end, settings.refit)
    plan = Plan(cuts, end, window_size, settings.horizon, settings.train_days)
    names = list(dict.fromkeys([REFERENCE, *settings.models]))
    models: list[Model] = [Baselines([name for name in names if name in BASELINES], levels)]
    for name in names:
        if name == "simple":
            models.append(Simple(window_size, settings.seed, settings.device))
        elif name == "llm":
            refits = settings.output_dir / PARTS / REFITS if settings.refit != "never" else None
            models.append(LanguageModel(ensemble, refits, process.is_main))
        elif name not in BASELINES:
            models.append(Peer(name, levels))
    return models, plan, ensemble


def load_ensemble(settings: BacktestSettings) -> Any:
    from stocklora.forecaster.ensemble import Ensemble
    from stocklora.runtime.machine import choose_device, choose_dtype

    device = choose_device(settings.device)
    folders = settings.model_path * len(settings.lora_weights) if len(settings.model_path) == 1 else settings.model_path
    members = list(zip(settings.lora_weights, folders, strict=True))
    dtype = choose_dtype(settings.dtype, device)
    return Ensemble(members, settings.ensemble, device, dtype, settings.trust_remote_code, keep=True)


def calendar_of(prices: Mapping[str, pd.DataFrame]) -> pd.DatetimeIndex:
    """Every date that any ticker has."""
    dates: set[np.datetime64] = set()
    for frame in prices.values():
        dates.update(frame.index.to_numpy())
    return pd.DatetimeIndex(sorted(dates))


def _date(text: str | None, flag: str) -> pd.Timestamp | None:
    if text is None:
        return None
    try:
        return pd.Timestamp(text).tz_localize(None).normalize()
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a date; write it as 2016-07-01") from None


def walk(
    prices: Mapping[str, pd.DataFrame],
    models: Sequence[Model],
    plan: Plan,
    parts: Path,
    process: Process,
    names: Sequence[str],
) -> None:
    """Write a part for every ticker that has none yet, this process's share of them.

    Cut after cut, so that each model is fitted once; a ticker's cuts are joined when the last is done.
    """
    tickers = list(prices)
    mine = [(place, name) for place, name in enumerate(tickers) if place % process.count == process.index]
    todo = [(place, name) for place, name in mine if not part_path(parts, place).is_file()]
    if process.is_main:
        say(f"{len(tickers)} tickers, {len(plan.cuts)} {'fit' if len(plan.cuts) == 1 else 'fits'} from "
            f"{plan.cuts[0]:%Y-%m-%d}; {', '.join(dict.fromkeys([REFERENCE, *names]))}")  # fmt: skip
        done = [
            place for place, _ in mine if part_path(parts, place).is_file() or piece_path(parts, place, 0).is_file()
        ]
        if done:
            say(f"resumed: {len(done)} of {len(mine)} tickers were done or begun")
    with progress("{task.fields[what]}", shown=process.is_main) as bar:
        task = bar.add_task("backtest", total=len(todo) * len(plan.cuts), what="")
        for cut, date in enumerate(plan.cuts):
            waiting = [item for item in todo if not piece_path(parts, item[0], cut).is_file()]
            if not waiting:
                bar.advance(task, len(todo))
                # Later fits do not build on this one, but every process must meet at its barriers.
                if not any(isinstance(model, LanguageModel) for model in models):
                    continue
            bar.update(task, what=f"fitting for {date:%Y-%m-%d}")
            for model in models:
                model.fit(prices, plan, date)
            for place, ticker in waiting:
                bar.update(task, what=ticker, advance=1)
                frame = prices[ticker]
                origins = plan.origins(pd.DatetimeIndex(frame.index), cut)
                found: dict[str, np.ndarray] = {}
                for model in models if origins else ():
                    found.update(model.quantiles(ticker, frame, origins))
                with replacing(piece_path(parts, place, cut)) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, allow_pickle=False, origins=np.array([origins.start, origins.stop]), **found)
        for place, ticker in todo:
            join_pieces(parts, place, ticker, prices[ticker], plan)


def part_path(parts: Path, place: int) -> Path:
    return parts / f"{place:05d}.npz"


def piece_path(parts: Path, place: int, cut: int) -> Path:
    return parts / f"{place:05d}-{cut:03d}.npz"


def join_pieces(parts: Path, place: int, ticker: str, frame: pd.DataFrame, plan: Plan) -> None:
    """One ticker's pieces become its part; a ticker without a scored day leaves an empty one."""
    pieces = []
    for cut in range(len(plan.cuts)):
        with np.load(piece_path(parts, place, cut)) as content:
            start, stop = content["origins"].tolist()
            if stop > start:
                pieces.append((range(start, stop), {name: content[name] for name in content if name != "origins"}))
    forecasts = score_ticker(ticker, frame, pieces, plan) if pieces else None
    arrays: dict[str, np.ndarray] = {}
    if forecasts is not None:
        arrays = {f"q_{name}": value for name, value in forecasts.quantiles.items()}
        arrays |= {name: getattr(forecasts, name) for name in
                   ("origins", "targets", "last_close", "returns", "naive_mae")}  # fmt: skip
    with replacing(part_path(parts, place)) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    for cut in range(len(plan.cuts)):
        piece_path(parts, place, cut).unlink()


def read_parts(parts: Path, tickers: Sequence[str], names: Sequence[str]) -> Iterator[TickerForecasts]:
    """Every scored ticker, in order, one in memory at a time."""
    for place, ticker in enumerate(tickers):
        with np.load(part_path(parts, place)) as content:
            if "origins" in content:
                quantiles = {name: content[f"q_{name}"] for name in names}
                fields = {name: content[name] for name in
                          ("origins", "targets", "last_close", "returns", "naive_mae")}  # fmt: skip
                yield TickerForecasts(ticker=ticker, quantiles=quantiles, **fields)


def finish(settings: BacktestSettings, prices: Mapping[str, pd.DataFrame], plan: Plan, ensemble: Any) -> BacktestResult:
    """Read all parts once: tables, forecasts file and what the report shows."""
    names = list(dict.fromkeys([REFERENCE, *settings.models]))
    parts, tickers = settings.output_dir / PARTS, list(prices)
    tally = Tally(names, plan.horizon, np.array(QUANTILE_LEVELS), settings.show)
    scored, days = 0, np.empty(0, dtype="datetime64[D]")
    with forecast_writer(settings) as write:
        for forecasts in read_parts(parts, tickers, names):
            tally.add(forecasts)
            write(forecasts)
            scored += 1
            days = np.union1d(days, forecasts.targets[:, 0])
    if not scored:
        raise UserError(
            f"no ticker has a day to score from {plan.cuts[0]:%Y-%m-%d} on with {plan.window_size} days behind it and "
            f"{plan.horizon} ahead; give an earlier --from or more prices"
        )
    facts = run_facts(settings, plan, scored, len(tickers), days, ensemble)
    notes = cutoff_note(ensemble, settings.base_cutoff, days) if ensemble is not None else []
    return tally.finish(facts, notes)


def run_facts(
    settings: BacktestSettings, plan: Plan, scored: int, tickers: int, days: np.ndarray, ensemble: Any
) -> list[tuple[str, str]]:
    window = "expanding" if plan.train_days is None else f"rolling, {plan.train_days} days"
    refit = {"never": "once, before the first day", "yearly": "every year"}
    facts = [
        ("prices", ", ".join(path.name for path in settings.data)),
        ("tickers", f"{scored} scored" + (f" of {tickers}" if scored < tickers else "")),
        ("days forecast", f"{days[0]} to {days[-1]}, {plan.horizon} days ahead from each close"),
        ("fitted", f"{refit.get(settings.refit, f'every {settings.refit} days')}, {window} window; purge and embargo "
                   f"of {plan.horizon} days each"),
    ]  # fmt: skip
    if ensemble is not None:
        specs = [content.spec for content in ensemble.weights]
        names = ", ".join(dict.fromkeys(spec.base_model["name"] for spec in specs))
        how = f", {settings.ensemble} of {len(specs)}" if len(specs) > 1 else ""
        seen = all(spec.anonymize for spec in specs)
        facts.append(("language model", f"{names}{how}; prompt {', '.join(dict.fromkeys(s.prompt for s in specs))}"))
        facts.append(("prompt names", "no ticker and no date" if seen else "ticker and first date"))
    return facts


def forecast_writer(settings: BacktestSettings) -> Any:
    """A context that gives ``write(forecasts)``; the file takes its name when all are written."""
    import contextlib
    import importlib.util

    has_arrow = importlib.util.find_spec("pyarrow") is not None
    if settings.forecasts_format == "parquet" and not has_arrow:
        raise UserError("--forecasts_format parquet needs pyarrow: pip install pyarrow, or give csv")
    as_parquet = has_arrow and settings.forecasts_format != "csv"

    @contextlib.contextmanager
    def parquet() -> Iterator[Any]:
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        with replacing(settings.output_dir / "forecasts.parquet") as temporary:
            schema = pyarrow.schema(
                [("Model", pyarrow.string()), ("Ticker", pyarrow.string()), ("Origin", pyarrow.date32()),
                 ("Date", pyarrow.date32()), ("Day", pyarrow.int8())]
                + [(name, pyarrow.float64()) for name in ("Last_Close", "Close", *LEVEL_COLUMNS)]
            )  # fmt: skip
            with ParquetWriter(temporary, schema, compression="zstd") as writer:
                yield lambda forecasts: writer.write_table(pyarrow.table(forecast_columns(forecasts), schema=schema))

    @contextlib.contextmanager
    def compressed_csv() -> Iterator[Any]:
        import gzip
        import io

        with (
            replacing(settings.output_dir / "forecasts.csv.gz") as temporary,
            temporary.open("wb") as raw,
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=5, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8", newline="") as stream,
        ):
            first = [True]

            def write(forecasts: TickerForecasts) -> None:
                table = pd.DataFrame(forecast_columns(forecasts))
                table.to_csv(stream, index=False, header=first[0], float_format="%.7g", lineterminator="\n")
                first[0] = False

            yield write

    other = settings.output_dir / ("forecasts.csv.gz" if as_parquet else "forecasts.parquet")
    other.unlink(missing_ok=True)  # of an earlier run
    return parquet() if as_parquet else compressed_csv()


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


def report(settings: BacktestSettings, result: BacktestResult) -> None:
    """Write metrics and report, print the table and the verdicts."""
    from stocklora.backtest.report.page import write_report
    from stocklora.backtest.report.words import name_of
    from stocklora.cli.console import print_table

    write_metrics(settings.output_dir / "metrics.csv", result)
    write_report(settings.output_dir / "report.html", result)
    rows = []
    for model in result.models:
        own = [row for row in result.pooled if row["Model"] == model]

        def mean(column: str, own: list[Mapping[str, Any]] = own) -> float:
            return float(np.mean([row[column] for row in own]))

        rows.append((
            name_of(model), f"{mean('MAE'):.4g}", f"{mean('Relative_MAE'):.4f}", f"{mean('MASE'):.3f}",
            "-" if mean("Direction") != mean("Direction") else f"{mean('Direction'):.1f}",
            f"{mean('Pinball_bp'):.2f}", f"{mean('Coverage_80'):.1f}",
        ))  # fmt: skip
    say()
    header = ("model", "MAE", "of last close", "MASE", "direction %", "pinball bp", "80% covers %")
    print_table(f"Mean of 1 to {result.horizon} days ahead, {len(result.tickers)} tickers", header, rows)
    for note in result.notes:
        say(f"note: {note}")
    say()
    for verdict in result.verdicts:
        say(verdict)
    say()
    for name in ("report.html", "metrics.csv", "forecasts.parquet", "forecasts.csv.gz"):
        if (settings.output_dir / name).exists():
            say(f"saved: {settings.output_dir / name}")
