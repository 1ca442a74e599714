"""The documented run, one ticker and one year of prices: is its start any better than EWMA, and how often worse?

    python bench/one_year.py                                   # about ten minutes on two cores
    python bench/one_year.py --runs 4                          # a fifth of it
    python bench/one_year.py --data mine.csv theirs.csv --tested_from 2024-01-02
    python bench/one_year.py --data mine.csv --tested_from 2024-01-02 --prior builtin

A run is one ticker by itself: 250 days to learn from, the last 37 of them for validation, and the 60 days after them,
each forecast 1 to 3 days ahead. Every forecaster's quantile loss on these 60 is over that of EWMA, whose quantiles are
those of the same ticker's training days. Tickers and days are drawn at random, and no two runs of a file test the same
ticker on the same days. *chosen*: of the scales that the ticker's own days give, the one that is best on validation;
*harx*: always that one; *prior alone*: nothing fitted on the ticker; *start*: where train_lora.py starts, with the
prior. The last and the first stand there as fitted, and calibrated on validation days as train_lora.py does it.

The prior knows neither the ticker nor any day that it is tested on: tickers lie in five folds by a hash of their name,
and each fold is forecast by a prior of the other four, of days before those tested: before 2021 for the markets, before
2015 for the large US stocks of 2012 to 2017. The bundled prices teach and are not tested. Only the strength of its pull
(``PRIOR_ORIGINS`` and its like) was chosen on these files. Prices are the development data beside the repository, or
--data: files or folders of them, a file a market. Writes bench/results/one_year.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import DEVELOPMENT, POOL_FILE, RESULTS, markets_in, run_benchmark, save_result

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from stocklora.volatility.prior import MarketPrior

POOL = POOL_FILE.name.removesuffix(".csv.gz")
BUNDLED = "bundled sample"
FOLDS = 5
LEARNT_ROWS, VALIDATION_ROWS, TESTED_ROWS = 250, 37, 60
WINDOW_SIZE, HORIZON = 30, 3  # train_lora.py's
FORECASTERS = ("chosen", "chosen, calibrated", "harx", "prior alone", "start", "start, calibrated")
TARGETS = {"mean": 0.985, "worst market's mean": 0.995, "worst tenth": 1.010}
COVERED, COVERED_SD = (78.0, 82.0), 5.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of a market and fold, at most (default: %(default)s)")
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="price files, one a market, or folders of "
                        "them (default: the development data in ../shared/data)")  # fmt: skip
    parser.add_argument("--tested_from", metavar="DATE", help="with --data: first day tested, before which the prior "
                        "learns (default: 2021-01-01)")  # fmt: skip
    parser.add_argument("--prior", metavar="FILE", help="score this one, whatever it has seen: builtin or a file of "
                        "scripts/make_prior.py (default: one made for each fold)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "one_year.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


@dataclass(frozen=True)
class Fold:
    """The runs that one prior forecasts, with all it takes to make them in a process of its own.

    Attributes:
        windows: (market, ticker, the run's rows) of each run.
        lessons: market -> ticker -> its table, what a prior may be fitted on.
        before: and before which day.
        prior: the one to score in place of that.
    """

    windows: list[tuple[str, str, pd.DataFrame]]
    lessons: dict[str, dict[str, pd.DataFrame]]
    before: pd.Timestamp
    prior: MarketPrior | None


@dataclass(frozen=True)
class Run:
    """What came of one run.

    Attributes:
        scale: that ``start`` took.
        days: (60,) forecast dates.
        ratios: forecaster -> its quantile loss over EWMA's.
        covered: forecaster -> percent inside its 80% interval.
    """

    market: str
    scale: str
    days: np.ndarray
    ratios: dict[str, float]
    covered: dict[str, float]


def run(arguments: argparse.Namespace) -> int:
    from stocklora.cli.console import UserError, say

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported: every processor has a process
    started = time.perf_counter()
    if arguments.runs < 1 or arguments.processes < 1:
        raise UserError("--runs and --processes must be at least 1")
    folds = folds_of(arguments)
    say(f"{sum(len(fold.windows) for fold in folds)} runs in {len(folds)} folds")
    found: list[Run] = []
    with ProcessPoolExecutor(min(arguments.processes, len(folds))) as pool:
        for number, (facts, runs) in enumerate(pool.map(runs_of, folds), start=1):
            found += runs
            say(f"{number}/{len(folds)}: {len(runs)} runs by a prior of {facts}")
    if arguments.prior:
        tell_what_it_has_seen(arguments.prior, found)
    summary = {name: summary_of([one for one in found if name in (one.market, "all")])
               for name in (*dict.fromkeys(one.market for one in found), "all")}  # fmt: skip
    print_summary(summary)
    settings = {"runs": arguments.runs, "seed": arguments.seed, "prior": arguments.prior or "without fold and days"}
    save_result(arguments.output, {"settings": settings, "markets": summary})
    say(f"took {time.perf_counter() - started:,.0f} s; saved: {arguments.output}")
    return 0


def folds_of(arguments: argparse.Namespace) -> list[Fold]:
    """The folds with runs in them, those of the later days, which take longer, first.

    Raises:
        UserError: no data, or no ticker with days enough for a run.
    """
    from stocklora.cli.console import UserError
    from stocklora.dataset.windows import as_date
    from stocklora.prices.sources.fetch import bundled_prices
    from stocklora.volatility.prior import prior_named

    prior = prior_named(arguments.prior) if arguments.prior else None
    if arguments.prior and prior is None:
        raise UserError("--prior none leaves nothing to score; give builtin or a file of scripts/make_prior.py")
    if arguments.tested_from and not arguments.data:
        raise UserError("--tested_from is for --data: the development data have their own days")
    later = as_date(arguments.tested_from or "2021-01-01", "--tested_from")
    markets = markets_in(arguments.data or development_files())
    tested_from = {name: as_date("2015-01-01", POOL) if name == POOL and not arguments.data else later
                   for name in markets}  # fmt: skip
    teachers = {**markets, BUNDLED: bundled_prices()}
    folds = []
    for day in sorted(set(tested_from.values()), reverse=True):
        for number in range(FOLDS):
            lessons = {name: {ticker: frame for ticker, frame in prices.items() if fold_of(ticker) != number}
                       for name, prices in teachers.items()}  # fmt: skip
            windows = [
                (name, ticker, frame)
                for name, prices in markets.items() if tested_from[name] == day
                for ticker, frame in drawn(name, prices, number, day, arguments)
            ]  # fmt: skip
            if windows:
                folds.append(Fold(windows, lessons if prior is None else {}, day, prior))
    if not folds:
        raise UserError(f"no ticker has {LEARNT_ROWS} days and {TESTED_ROWS + HORIZON} from {later:%Y-%m-%d} on to "
                        "test; give longer tables or an earlier --tested_from")  # fmt: skip
    return folds


def development_files() -> list[Path]:
    """All of the development data.

    Raises:
        UserError: they are not there.
    """
    from stocklora.cli.console import UserError

    paths = [DEVELOPMENT / "markets", POOL_FILE]
    for path in paths:
        if not path.exists():
            raise UserError(f"no development data at {path}; give --data FILE ..., daily prices, one file a market")
    return paths


def fold_of(ticker: str) -> int:
    """The same in every file."""
    return zlib.crc32(ticker.encode()) % FOLDS


def drawn(
    market: str, prices: Mapping[str, pd.DataFrame], fold: int, tested_from: pd.Timestamp, arguments: argparse.Namespace
) -> list[tuple[str, pd.DataFrame]]:
    """(ticker, the run's rows) of a market and fold: among stretches of 60 test days, laid out from a random day on."""
    import numpy as np

    draw = np.random.default_rng([arguments.seed, zlib.crc32(market.encode()), fold])
    candidates = []
    for ticker, frame in prices.items():
        if fold_of(ticker) == fold:
            first = max(LEARNT_ROWS, int(frame.index.searchsorted(tested_from))) + int(draw.integers(TESTED_ROWS))
            starts = range(first, len(frame) - TESTED_ROWS - HORIZON + 1, TESTED_ROWS)
            candidates += [(ticker, start) for start in starts]
    chosen = [candidates[place] for place in draw.permutation(len(candidates))[: arguments.runs]]
    return [(ticker, prices[ticker].iloc[start - LEARNT_ROWS : start + TESTED_ROWS + HORIZON])
            for ticker, start in chosen]  # fmt: skip


# ------------------------------------------------------------------------------------------------- one fold's runs


def runs_of(fold: Fold) -> tuple[str, list[Run]]:
    """A line on the fold's prior, and its runs.

    Raises:
        UserError: nothing to fit a prior on.
    """
    from stocklora.cli.console import UserError
    from stocklora.volatility.prior import fit_prior

    try:
        prior = fold.prior or fit_prior(fold.lessons, fold.before, HORIZON)
    except ValueError as error:
        raise UserError(f"--tested_from {fold.before:%Y-%m-%d}: {error}; test from a later day") from None
    return str(prior), [one_run(*window, prior) for window in fold.windows]


def one_run(market: str, ticker: str, frame: pd.DataFrame, prior: MarketPrior) -> Run:
    """Learn from a ticker's first 250 rows and score on the others."""
    from stocklora.dataset.prepare import prepare

    validation, test = (f"{frame.index[row]:%Y-%m-%d}" for row in (LEARNT_ROWS - VALIDATION_ROWS, LEARNT_ROWS))
    data = prepare({ticker: frame}, WINDOW_SIZE, HORIZON, validation_from=validation, test_from=test, prior=prior)
    ewma = data.score(data.forecasts_of("ewma", "test"), "test")
    scale, forecasts = forecasts_of(data, ticker, prior)
    scores = {name: data.score(quantiles, "test") for name, quantiles in forecasts.items()}
    return Run(
        market, scale, data.dates_of("test").astype("datetime64[D]"),
        {name: entry.pinball_bp / ewma.pinball_bp for name, entry in scores.items()},
        {name: entry.coverage_80 for name, entry in scores.items()},
    )  # fmt: skip


def forecasts_of(data: Any, ticker: str, prior: MarketPrior) -> tuple[str, dict[str, np.ndarray]]:
    """The scale that ``start`` takes, and forecaster -> (60, horizon, levels) quantiles of the test days."""
    from stocklora.metrics.calibration import fit_calibration
    from stocklora.volatility.scales import OWN_SCALES

    def calibrated(baseline: Any) -> np.ndarray:
        validation = data.forecasts_of(baseline, "validation")
        fitted = fit_calibration(data.returns_of("validation"), validation, data.levels)
        return fitted.apply(data.forecasts_of(baseline, "test"), data.levels)

    taken = data.better_scale()
    own, start = data.start(min(OWN_SCALES, key=data.validation_loss)), data.start(taken)
    untouched = prior.scale_for(HORIZON)
    alone = untouched.on(data.prices)[ticker][list(data.origins[ticker]["test"]), :, None] * prior.table[:HORIZON]
    forecasts = (data.forecasts_of(own, "test"), calibrated(own), data.forecasts_of("harx", "test"), alone,
                 data.forecasts_of(start, "test"), calibrated(start))  # fmt: skip
    return taken, dict(zip(FORECASTERS, forecasts, strict=True))


# ------------------------------------------------------------------------------------------------------- all of them


def tell_what_it_has_seen(name: str, runs: Sequence[Run]) -> None:
    """How many of the days scored lie among those of the prior that was asked for."""
    import numpy as np

    from stocklora.cli.console import say
    from stocklora.volatility.prior import prior_named, prior_note

    prior = prior_named(name)
    assert prior is not None
    say(prior_note(prior.made_from, np.unique(np.concatenate([one.days for one in runs]))))


def summary_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of some runs, by forecaster."""
    import numpy as np

    entry: dict[str, Any] = {"runs": len(runs), "scale_of_start": dict(Counter(one.scale for one in runs))}
    for name in FORECASTERS:
        ratios, covered = (np.array([part[name] for part in parts])
                           for parts in ([one.ratios for one in runs], [one.covered for one in runs]))  # fmt: skip
        entry[name] = {
            "mean": float(ratios.mean()), "worst_tenth": float(np.quantile(ratios, 0.9)),
            "coverage_80": float(covered.mean()), "coverage_80_sd": float(covered.std()),
        }  # fmt: skip
    return entry


def print_summary(summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Three tables, a row a market, and the targets."""
    from stocklora.cli.console import print_table, say

    shown = {
        "Quantile loss over EWMA's, mean over runs": lambda entry: f"{entry['mean']:.4f}",
        "Quantile loss over EWMA's, worst tenth of the runs": lambda entry: f"{entry['worst_tenth']:.4f}",
        "80% interval covers %, mean and standard deviation over runs":
            lambda entry: f"{entry['coverage_80']:.1f} ± {entry['coverage_80_sd']:.1f}",
    }  # fmt: skip
    for title, cell in shown.items():
        rows = [(market, entry["runs"], *[cell(entry[name]) for name in FORECASTERS])
                for market, entry in summary.items()]  # fmt: skip
        print_table(title, ("market", "runs", *FORECASTERS), rows)
    ours = {market: entry["start, calibrated"] for market, entry in summary.items()}
    whole = ours["all"]
    measured = {
        "mean": whole["mean"],
        "worst market's mean": max(entry["mean"] for entry in ours.values()),
        "worst tenth": whole["worst_tenth"],
    }
    say("start, calibrated:")
    for name, target in TARGETS.items():
        met = measured[name] <= target
        say(f"  {name} {measured[name]:.4f} (target at most {target}): {'met' if met else 'not met'}")
    (low, high), covered, spread = COVERED, whole["coverage_80"], whole["coverage_80_sd"]
    met = low <= covered <= high and spread <= COVERED_SD
    say(f"  80% interval covers {covered:.1f}% ± {spread:.1f} (target {low:g} to {high:g}, ± at most {COVERED_SD:g}): "
        f"{'met' if met else 'not met'}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
