"""The two accuracy benchmarks: SmolLM2-135M beside every baseline, on days that nothing was fitted on.

    python bench/accuracy.py                                  # both, about 25 minutes on two cores
    python bench/accuracy.py --benchmarks four --epochs 0     # the baselines and the untrained start, a minute
    python bench/accuracy.py --peers garch autoets            # with the forecasters a user would otherwise pick
    python bench/accuracy.py --elsewhere 40 --tickers_a_draw 4 --seed 7   # the start on random tickers and years
    python bench/accuracy.py --data my_prices.csv --validation_from 2022-01-03 --test_from 2023-01-03

*pool*: 59 large US stocks, trained before 2016, validated on its first half, tested from July 2016 to August
2017. *four*: AAPL, GOOG, IBM and MSFT, trained before 2010, validated in 2010 and 2011, tested from 2012. All
choices (scale, epoch, calibration) are made on validation days. Prices of *four* are bundled; those of *pool* are a
file of yours (--pool FILE), and where there is none a line says how to download them.

The market prior is made for each benchmark, of other tickers than its own and none of its validation or test days, and
lies as prior.json beside the weights. *pool*: of days before its training ends. *four*: of days after its last test
day, hence none of its days, though later ones than it forecasts. It learns from the bundled prices and the development
data beside the repository; where those are not, a line says so and there is no prior. With --data it is the built-in
one, and a line says how many of the test days that was made from. Writes bench/results/accuracy.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import DEVELOPMENT, POOL_FILE, RESULTS, ROOT, markets_in, run_benchmark, save_result

BENCHMARKS = {
    "pool": {
        "tickers": (),
        "dates": ("2016-01-01", "2016-07-01"),
        "prior_is_later": False,
        "target": 0.985,
    },
    "four": {
        "tickers": ("AAPL", "GOOG", "IBM", "MSFT"),
        "dates": ("2010-01-01", "2012-01-01"),
        "prior_is_later": True,
        "target": 0.990,
    },
}  # fmt: skip
POOL_TICKERS = """
AAPL ABB AEP AGFS AMZN BA BAC BBL BHP BP BSAC BUD CAT CELG CHTR CMCSA CSCO CVX DHR DIS EXC FB GE GMRE HD HON
HSBC IEP JNJ JPM LMT MA MDT MMM MRK MSFT NGG NVS PCG PCLN PFE PG PM PPL RDS-B REX SNP SNY SPLP SRE TM TOT UL
UN UPS UTX VZ WFC XOM
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", nargs="+", choices=tuple(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--elsewhere", type=int, metavar="DRAWS", help="instead: the start on random tickers and years")
    parser.add_argument("--tickers_a_draw", type=int, default=4, help="with --elsewhere (default: %(default)s)")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="your own prices instead")
    parser.add_argument("--pool", type=Path, metavar="FILE", help="prices of pool's 59 stocks (default: "
                        "../shared/data/prices/us_large_2012_2017.csv.gz, where it lies there)")  # fmt: skip
    parser.add_argument("--validation_from", help="with --data: first validation day")
    parser.add_argument("--test_from", help="with --data: first test day")
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--backbone_layers", type=int, default=8, help="layers of the model (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training days (default: %(default)s)")
    parser.add_argument("--prompt", default="returns", choices=("returns", "ohlcv", "zscores", "words"))
    parser.add_argument("--indicators", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--scale", default="auto", choices=("auto", "ewma", "har", "harx", "prior"))
    parser.add_argument("--prior", metavar="FILE", help="builtin, none or a file of scripts/make_prior.py (default: "
                        "one made of other tickers; with --data builtin)")  # fmt: skip
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--head_learning_rate", type=float, default=1e-4)
    parser.add_argument("--max_tokens_per_sequence", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--peers", nargs="+", default=[], help="autoarima, autoets, autotheta, garch")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--save_dir", type=Path, default=ROOT / "checkpoints" / "accuracy", help="weights go here")
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.dataset.prepare import select_tickers
    from stocklora.prices.tables import read_prices

    results = {}
    if arguments.elsewhere:
        return elsewhere(arguments)
    if arguments.data:
        prices = read_prices(arguments.data)
        dates = (arguments.validation_from, arguments.test_from)
        results["data"] = one_benchmark("data", prices, dates, 1.003, arguments.prior or "builtin", arguments)
    else:
        for name in arguments.benchmarks:
            facts: Mapping[str, Any] = BENCHMARKS[name]
            found = prices_of(name, arguments)
            if found is None:
                continue
            prices = select_tickers(found, facts["tickers"])
            prior = arguments.prior or made_prior(name, prices, arguments)
            results[name] = one_benchmark(name, prices, facts["dates"], facts["target"], prior, arguments)
    save_result(arguments.output, {"benchmarks": results})
    return 0


def prices_of(name: str, arguments: argparse.Namespace) -> Mapping[str, Any] | None:
    """The prices of *pool* or *four*; None, after a line that says how to get them, where pool's are not there."""
    from stocklora.cli.console import UserError, say
    from stocklora.prices.sources.fetch import bundled_prices
    from stocklora.prices.tables import read_prices

    if name == "four":
        return bundled_prices()
    path = arguments.pool or POOL_FILE
    if path.is_file():
        return read_prices(path)
    command = f"python download.py --ticker {' '.join(POOL_TICKERS.split())} --start 2012-09-04 --end 2017-09-02"
    line = f"no prices of pool's stocks at {path}; get them with: {command} --output pool.csv.gz, then give --pool FILE"
    if arguments.pool:
        raise UserError(line)
    say(line)
    return None


def made_prior(name: str, prices: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """``--prior`` of a benchmark: a file, made of other tickers and other days; "none", after a line, without the data.

    Args:
        name: of the benchmark.
        prices: its own.
    """
    import pandas as pd

    from stocklora.cli.console import say

    teachers = prior_teachers(arguments)
    if teachers is None:
        return "none"
    last = max(frame.index[-1] for frame in prices.values())
    prior = prior_of_others(name, teachers, prices, pd.Timestamp(BENCHMARKS[name]["dates"][0]), last)
    path = Path(arguments.save_dir / name / "prior.json")
    prior.save(path)
    say(f"{name}: a prior of {prior}")
    return str(path)


def prior_teachers(arguments: argparse.Namespace) -> dict[str, Mapping[str, Any]] | None:
    """Market -> tables that a prior is made from; None, after a line, where the development prices are not there."""
    from stocklora.cli.console import say
    from stocklora.prices.sources.fetch import bundled_prices

    markets, pool = DEVELOPMENT / "markets", arguments.pool or POOL_FILE
    if not markets.is_dir():
        say(f"no prior, since no prices to make one of lie at {markets}")
        return None
    return {"bundled": bundled_prices(), **markets_in([markets, *([pool] if pool.is_file() else [])])}


def prior_of_others(name: str, teachers: Mapping[str, Any], tested: Collection[str], before: Any, last: Any) -> Any:
    """A prior of tickers that are not ``tested``: of days before ``before``, or for *four* of days after ``last``."""
    import pandas as pd

    from stocklora.finetune.settings import TrainLoraSettings
    from stocklora.volatility.prior import fit_prior

    others = {market: {ticker: frame for ticker, frame in tables.items() if ticker not in tested}
              for market, tables in teachers.items()}  # fmt: skip
    if BENCHMARKS[name]["prior_is_later"]:
        return fit_prior(others, None, TrainLoraSettings.horizon, start=last + pd.Timedelta(days=1))
    return fit_prior(others, before, TrainLoraSettings.horizon)


def settings_of(arguments: argparse.Namespace, name: str, dates: tuple[str, str], prior: str) -> Any:
    """The benchmark's ``TrainLoraSettings``."""
    from stocklora.finetune.settings import TrainLoraSettings

    return TrainLoraSettings(
        model_path=arguments.model_path,
        validation_from=dates[0],
        test_from=dates[1],
        prompt=arguments.prompt,
        indicators=arguments.indicators,
        scale=arguments.scale,
        prior=prior,
        backbone_layers=arguments.backbone_layers,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        head_learning_rate=arguments.head_learning_rate,
        max_tokens_per_sequence=arguments.max_tokens_per_sequence,
        seed=arguments.seed,
        device=arguments.device,
        save_dir=arguments.save_dir / name,
    )


def one_benchmark(
    name: str, prices: Mapping[str, Any], dates: tuple[str, str], target: float, prior: str,
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Train, score on test, print the table."""
    import numpy as np

    from stocklora.cli.console import say
    from stocklora.finetune.fit import finetune
    from stocklora.metrics.scores import print_scores
    from stocklora.volatility.prior import prior_named, prior_note

    settings = settings_of(arguments, name, dates, prior)
    say(f"== {name} ==")
    fitted = finetune(prices, settings)
    scores = dict(fitted.test_scores)
    raw_ewma = fitted.data.score(fitted.data.forecasts_of("ewma", "test"), "test")
    for peer in arguments.peers:
        scores[peer] = peer_scores(peer, fitted.data)
    print_scores(scores, f"{name}: test days from {fitted.data.dates.test:%Y-%m-%d}, mean of 1 to {settings.horizon}")
    # The table's EWMA is calibrated on validation days as the model is; the published figure is without.
    ratios = {kind: entry.pinball_bp / raw_ewma.pinball_bp for kind, entry in scores.items()}
    say("quantile loss over EWMA's: " + ", ".join(f"{kind} {ratio:.4f}" for kind, ratio in ratios.items()))
    known = prior_named(prior)
    if known is not None:
        say(prior_note(known.made_from, np.unique(fitted.data.dates_of("test").astype("datetime64[D]"))))
    model = scores["model"]
    simple = min(scores[kind].mae for kind in ("naive", "drift", "ewma", "har"))
    simple_bp = min(scores[kind].mae_bp for kind in ("naive", "drift", "ewma", "har"))
    best_scale = min(scores["ewma"].pinball_bp, scores["har"].pinball_bp, raw_ewma.pinball_bp)
    say(f"pinball over EWMA's {ratios['model']:.4f} (target {target}); over the better of EWMA and HAR "
        f"{model.pinball_bp / best_scale:.4f}; MAE over the best simple baseline's {model.mae / simple:.4f} "
        f"(log return: {model.mae_bp / simple_bp:.4f}); 80% interval covers {model.coverage_80:.1f}%")  # fmt: skip
    return run_facts(fitted, settings) | {
        "test": {kind: asdict(entry) for kind, entry in scores.items()},
        "ewma_uncalibrated_pinball_bp": raw_ewma.pinball_bp,
        "pinball_ratio_to_ewma": ratios["model"],
        "pinball_ratios_to_ewma": ratios,
        "pinball_ratio_to_better_of_ewma_and_har": model.pinball_bp / best_scale,
        "mae_ratio_to_best_simple": model.mae / simple,
        "mae_bp_ratio_to_best_simple": model.mae_bp / simple_bp,
        "coverage_80": model.coverage_80,
    }


def run_facts(fitted: Any, settings: Any) -> dict[str, Any]:
    """What was trained and how, for the record."""
    from stocklora.volatility.prior import prior_named

    outcome, spec, prior = fitted.outcome, fitted.forecaster.spec, prior_named(settings.prior)
    facts = {key: value.name if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    return {
        # Names, not where they lie: the record is read elsewhere.
        "settings": facts | {"prior": Path(settings.prior).name},
        "prior": None if prior is None else {key: part for key, part in prior.made_from.items() if key != "markets"},
        "scale": spec.scale["kind"],
        "calibration": spec.calibration,
        "history": [{key: None if value != value else value for key, value in row.items()} for row in outcome.history],
        "best_epoch": outcome.best_epoch,
        "unproven_epoch": outcome.unproven_epoch,
        "gain_in_standard_errors": outcome.gain_in_errors,
        "validation_ratio_to_start": outcome.best_ratio,
    }


YEARS = {
    "pool": [("2014-01-01", "2014-07-01"), ("2014-10-01", "2015-04-01"),
             ("2015-06-01", "2016-01-01"), ("2016-01-01", "2016-07-01")],
    "four": [(f"{year}-01-01", f"{year + 1}-01-01") for year in range(2004, 2012)],
}  # fmt: skip


def elsewhere(arguments: argparse.Namespace) -> int:
    """Random tickers and years of both files: the start, chosen and calibrated as train_lora.py does it.

    Each draw trains on all days before its validation part and is tested on at most 400 days after that. Its prior, as
    that of the benchmark its prices come from, knows none of its tickers and none of its validation or test days.
    """
    import numpy as np
    import pandas as pd

    from stocklora.cli.console import UserError, say
    from stocklora.dataset.prepare import prepare
    from stocklora.metrics.calibration import fit_calibration

    teachers = None if arguments.prior == "none" else prior_teachers(arguments)
    found_prices = {name: prices_of(name, arguments) for name in YEARS}
    files = {name: prices for name, prices in found_prices.items() if prices is not None}
    draw = np.random.default_rng(arguments.seed)
    ratios, coverage = [], []
    for number in range(arguments.elsewhere):
        name = list(files)[number % len(files)]
        prices = files[name]
        names = draw.choice(
            list(prices), min(arguments.tickers_a_draw, len(prices) - (len(prices) < 10)), replace=False
        )
        validation_from, test_from = YEARS[name][draw.integers(len(YEARS[name]))]
        end = pd.Timestamp(test_from) + pd.Timedelta(days=600 if len(prices) > 10 else 400)
        chosen = {ticker: prices[ticker][prices[ticker].index < end] for ticker in names}
        chosen = {ticker: frame for ticker, frame in chosen.items() if (frame.index < validation_from).sum() > 150}
        try:
            prior = teachers and prior_of_others(name, teachers, names, pd.Timestamp(validation_from), end)
            data = prepare(chosen, 30, 3, validation_from=validation_from, test_from=test_from, prior=prior)
        except (UserError, ValueError):  # not listed yet, or nothing left to test on
            continue
        returns = data.returns_of("validation")

        def scored(baseline: Any, data: Any = data, returns: Any = returns) -> Any:
            fitted = fit_calibration(returns, data.forecasts_of(baseline, "validation"), data.levels)
            return data.score(fitted.apply(data.forecasts_of(baseline, "test"), data.levels), "test")

        start = scored(data.start(data.better_scale()))
        ratios.append(start.pinball_bp / min(scored("ewma").pinball_bp, scored("har").pinball_bp))
        coverage.append(start.coverage_80)
    found = np.array(ratios)
    say(f"{len(found)} draws of up to {arguments.tickers_a_draw} tickers; quantile loss over the better of EWMA and "
        f"HAR: mean {found.mean():.4f}, worst tenth {np.quantile(found, 0.9):.4f}, worst {found.max():.4f}, "
        f"above 1.003 in {int((found > 1.003).sum())}; 80% interval covers {np.mean(coverage):.1f}%")  # fmt: skip
    return 0


def peer_scores(peer: str, data: Any) -> Any:
    """A peer's forecasts at every test origin, each ticker for itself, refitted every 60 days."""
    import numpy as np

    from stocklora.baselines.classical import peer_quantiles

    parts = []
    for ticker, frame in data.prices.items():
        origins = data.origins[ticker]["test"]
        parts.append(peer_quantiles(peer, frame["Close"].to_numpy(), origins, data.horizon, data.levels).quantiles)
    return data.score(np.concatenate(parts), "test")


if __name__ == "__main__":
    sys.exit(main())
