"""What ``backtest.py`` does: walk forward, one ticker at a time, and write metrics, forecasts and report.

A run can be stopped and resumed, and several processes can share the tickers (see ``parts``).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.backtest.aggregate import Aggregate
from stocklora.backtest.leakage import check_backtest
from stocklora.backtest.parts import (
    PARTS,
    PRICES,
    forecast_writer,
    open_parts,
    part_path,
    read_parts,
    remove_parts,
    write_part,
)
from stocklora.backtest.prepare import cutoff_note, prepare_run, priors_used
from stocklora.backtest.results import BacktestResult, write_metrics
from stocklora.backtest.settings import BacktestSettings
from stocklora.backtest.walk_forward import LanguageModel, Model, Plan, models_compared
from stocklora.cli.console import UserError, print_table, progress, say
from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.prices.store import PriceStore
from stocklora.runtime.distributed import launched_processes, wait_for_everyone
from stocklora.runtime.files import check_writable
from stocklora.volatility.prior import prior_note


def run_backtest(settings: BacktestSettings) -> int:
    """Score, or with ``check_leakage`` look for leaks; 0, or 1 where a leak was found.

    Raises:
        UserError: anything in data, weights or settings that the user can mend; reports of earlier runs stay.
    """
    if not settings.data:
        raise UserError("no price file was given; run: python backtest.py --data FILE")
    if settings.check_leakage:
        return check_backtest(settings)
    process = launched_processes()
    check_writable(settings.output_dir, "--output_dir")
    parts = settings.output_dir / PARTS
    if process.is_main_process:
        open_parts(parts, settings)
    wait_for_everyone()
    try:
        prices = PriceStore(parts / PRICES)
        models, plan, ensemble = prepare_run(settings, prices, process.is_main_process)
        if process.is_main_process:
            fits = "1 fit" if len(plan.cuts) == 1 else f"{len(plan.cuts)} fits"
            names = ", ".join(models_compared(settings.models))
            say(f"{len(prices)} tickers, {fits} from {plan.cuts[0]:%Y-%m-%d}; {names}")
        score_tickers(prices, models, plan, parts, process)
        wait_for_everyone()
        if process.is_main_process:
            print_and_write_report(settings, aggregate_parts(settings, prices, plan, ensemble))
            shutil.rmtree(parts)
        wait_for_everyone()
    except KeyboardInterrupt:
        raise UserError(
            f"stopped; what is done lies in {parts}: the same command with --resume goes on from there"
        ) from None
    except UserError:
        if process.is_main_process and not any(parts.glob("*.npz")):  # nothing done that a resumed run could use
            remove_parts(parts)
        raise
    return 0


def score_tickers(
    prices: Mapping[str, pd.DataFrame], models: Sequence[Model], plan: Plan, parts: Path, process: Any
) -> None:
    """Write the parts that are not there yet, of this process's share of the tickers.

    Cut after cut, so that each model is fitted once.

    Args:
        prices: ticker -> its table.
        models: fitted here, at each of the plan's cuts.
        plan: when to fit and what to score.
        parts: the folder of parts.
        process: which share of the tickers is this one's.
    """
    own = [(place, name) for place, name in enumerate(prices) if place % process.num_processes == process.process_index]
    begun = sum(part_path(parts, place, 0).is_file() for place, _ in own)
    if process.is_main_process and begun:
        say(f"resumed: {begun} of {len(own)} tickers were done or begun")
    with progress("{task.fields[what]}", shown=process.is_main_process) as bar:
        task = bar.add_task("backtest", total=len(own) * len(plan.cuts), what="")
        for cut, date in enumerate(plan.cuts):
            undone = [(place, name) for place, name in own if not part_path(parts, place, cut).is_file()]
            bar.advance(task, len(own) - len(undone))
            # Later fits do not build on this one, but every process must meet at the language model's barriers.
            if not undone and not any(isinstance(model, LanguageModel) for model in models):
                continue
            bar.update(task, what=f"fitting for {date:%Y-%m-%d}")
            for model in models:
                model.fit(prices, plan, date)
            for place, ticker in undone:
                bar.update(task, what=ticker, advance=1)
                frame = prices[ticker]
                origins = plan.origins(pd.DatetimeIndex(frame.index), cut)
                quantiles: dict[str, np.ndarray] = {}
                for model in models if origins else ():
                    quantiles.update(model.quantiles(ticker, frame, origins))
                write_part(part_path(parts, place, cut), origins, quantiles)


def aggregate_parts(
    settings: BacktestSettings, prices: Mapping[str, pd.DataFrame], plan: Plan, ensemble: Any
) -> BacktestResult:
    """Read all parts once: write the forecasts file, and add up what the report shows.

    Raises:
        UserError: no ticker has a day to score.
    """
    names = models_compared(settings.models)
    aggregate = Aggregate(names, plan.horizon, np.array(QUANTILE_LEVELS), settings.show)
    scored, days = 0, np.empty(0, dtype="datetime64[D]")
    with forecast_writer(settings) as write:
        for forecasts in read_parts(settings.output_dir / PARTS, prices, names, plan):
            aggregate.add(forecasts)
            write(forecasts)
            scored += 1
            days = np.union1d(days, forecasts.targets[:, 0])
    if not scored:
        raise UserError(
            f"no ticker has a day to score from {plan.cuts[0]:%Y-%m-%d} on with {plan.window_size} days behind it and "
            f"{plan.horizon} ahead; give an earlier --from or more prices"
        )
    facts = run_facts(settings, plan, scored, len(prices), days, ensemble)
    notes = cutoff_note(ensemble, settings.base_cutoff, days) if ensemble is not None else []
    notes += [prior_note(made_from, days) for made_from in priors_used(settings, ensemble)]
    return aggregate.result(facts, notes)


def run_facts(
    settings: BacktestSettings, plan: Plan, scored: int, tickers: int, days: np.ndarray, ensemble: Any
) -> list[tuple[str, str]]:
    """What was run, as (name, text) lines of the report.

    Args:
        settings: what ``backtest.py`` was told.
        plan: when models were fitted.
        scored, tickers: how many tickers have forecasts, of how many.
        days: (n,) datetime64[D] forecast dates.
        ensemble: the weights, None without ``llm``.
    """
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


def print_and_write_report(settings: BacktestSettings, result: BacktestResult) -> None:
    """Write metrics and report, print the table and the verdicts."""
    from stocklora.backtest.report.page import write_report
    from stocklora.backtest.report.style import name_of

    write_metrics(settings.output_dir / "metrics.csv", result)
    write_report(settings.output_dir / "report.html", result)
    rows = []
    for model in result.models:
        own = pd.DataFrame([row for row in result.pooled if row["Model"] == model])
        mean = own.mean(numeric_only=True, skipna=False)
        rows.append((
            name_of(model), f"{mean.MAE:.4g}", f"{mean.Relative_MAE:.4f}", f"{mean.MASE:.3f}",
            "-" if np.isnan(mean.Direction) else f"{mean.Direction:.1f}",
            f"{mean.Pinball_bp:.2f}", f"{mean.Coverage_80:.1f}",
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
