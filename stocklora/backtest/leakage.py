"""Does anything said of the past move when the future changes?

At random days every later row is scaled, shuffled, emptied or deleted, in all tickers at once. Every forecast,
fitted number, scale, calibration, indicator and day line of that day and the days before must stay equal bit
for bit. What looks ahead, by a centred window, a scaler fitted on everything or a split that overlaps, moves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from stocklora.backtest.prepare import prepare_run, priors_used
from stocklora.backtest.settings import BacktestSettings
from stocklora.backtest.walk_forward import Baselines, Model, Plan
from stocklora.cli.console import UserError, progress, say, warn
from stocklora.dataset.indicators import INDICATORS, indicator_table
from stocklora.dataset.prepare import prepare
from stocklora.dataset.prompts import returns_lines, words_lines
from stocklora.dataset.windows import calendar_of
from stocklora.metrics.calibration import fit_calibration
from stocklora.prices.store import spool
from stocklora.volatility.market import markets_of
from stocklora.volatility.prior import MarketPrior, prior_note
from stocklora.volatility.scales import SCALES, ewma_volatility

MUTATIONS = ("scaled", "shuffled", "emptied", "deleted")
ORIGINS_COMPARED = 40  # a cut, the last ones before it
MOST_TICKERS = 8

Observations = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Leak:
    """Something of the past that moved: what it is, of which ticker, the cut, and what was done to later rows."""

    what: str
    ticker: str
    cut: pd.Timestamp
    mutation: str

    def __str__(self) -> str:
        whose = f" of {self.ticker}" if self.ticker else ""
        return f"{self.what}{whose} up to {self.cut:%Y-%m-%d} changed when later rows were {self.mutation}"


def mutated(frame: pd.DataFrame, cut: pd.Timestamp, mutation: str, draw: np.random.Generator) -> pd.DataFrame:
    """``frame`` with every row after ``cut`` changed."""
    place = int(frame.index.searchsorted(cut, side="right"))
    if mutation == "deleted":
        return frame.iloc[:place].copy()
    changed = frame.copy()
    count = len(frame) - place
    if mutation == "scaled":
        # Up to ten thousandfold, a factor a row: whatever reads a later price reads another number.
        changed.iloc[place:] = changed.iloc[place:].to_numpy() * np.exp(draw.uniform(-5.0, 5.0, (count, 1)))
    elif mutation == "shuffled":
        changed.iloc[place:] = changed.iloc[place + draw.permutation(count)].to_numpy()
    elif mutation == "emptied":
        changed.iloc[place:] = np.nan
    else:
        raise ValueError(f"no mutation {mutation!r}")
    return changed


def find_leaks(
    observe: Callable[[Mapping[str, pd.DataFrame], pd.Timestamp], Observations],
    prices: Mapping[str, pd.DataFrame],
    cuts: Sequence[pd.Timestamp],
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Leak], int]:
    """Observe at every cut, change the future, observe again.

    Args:
        observe: (prices, cut) -> numbers known at the close of ``cut``, by (what, ticker).
        advance: called after each observation.

    Returns:
        The leaks, and how many numbers were compared.
    """
    leaks, compared = [], 0
    for number, cut in enumerate(cuts):
        expected = observe(prices, cut)
        advance()
        for kind, mutation in enumerate(MUTATIONS):
            draw = np.random.default_rng([seed, number, kind])
            changed = {name: mutated(frame, cut, mutation, draw) for name, frame in prices.items()}
            again = observe({name: frame for name, frame in changed.items() if len(frame)}, cut)
            advance()
            for (what, ticker), values in expected.items():
                compared += values.size
                other = again.get((what, ticker))
                if other is None or not _same(values, other):
                    leaks.append(Leak(what, ticker, cut, mutation))
    return leaks, compared


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal to the last bit; a NaN equals a NaN."""
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def observe(
    models: Sequence[Model], plan: Plan, tickers: Sequence[str], prices: Mapping[str, pd.DataFrame], cut: pd.Timestamp
) -> Observations:
    """What a backtest says at a cut: forecasts of every model, what was fitted, and what training would see."""
    with np.errstate(all="ignore"):  # emptied rows make NaNs, after the cut
        return (
            _forecasts(models, plan, tickers, prices, cut)
            | _training(plan, prices, cut, next((m.prior for m in models if isinstance(m, Baselines)), None))
            | _inputs(tickers, prices, cut)
        )


def _forecasts(
    models: Sequence[Model], plan: Plan, tickers: Sequence[str], prices: Mapping[str, pd.DataFrame], cut: pd.Timestamp
) -> Observations:
    fitted_at = max(date for date in plan.cuts if date <= cut)
    observed: Observations = {}
    for model in models:
        model.fit(prices, plan, fitted_at)
        if isinstance(model, Baselines):
            for name, baseline in model.fitted.items():
                observed[f"the fitted quantiles of {name}", ""] = baseline.table
                if baseline.scale is not None and baseline.scale.coefficients:
                    observed[f"the fitted coefficients of {name}", ""] = np.array(baseline.scale.coefficients)
        for ticker in (name for name in tickers if name in prices):
            frame = prices[ticker]
            stop = int(frame.index.searchsorted(cut, side="right"))
            first = max(plan.window_size, int(frame.index.searchsorted(fitted_at)), stop - ORIGINS_COMPARED)
            if first < stop:
                for name, quantiles in model.quantiles(ticker, frame, range(first, stop)).items():
                    observed[f"the forecast {name}", ticker] = quantiles
    return observed


def _training(
    plan: Plan, prices: Mapping[str, pd.DataFrame], cut: pd.Timestamp, prior: MarketPrior | None
) -> Observations:
    """What ``train_lora.py`` would fit, with test days that begin shortly before the cut."""
    dates = calendar_of(prices)
    dates = dates[dates <= cut]
    test_from = dates[-min(len(dates), 3 * plan.horizon + 10)]
    validation_from = dates[int(0.8 * len(dates))]
    long_enough = {
        name: frame for name, frame in prices.items()
        if int(frame.index.searchsorted(test_from)) > plan.window_size + plan.horizon
    }  # fmt: skip
    if not long_enough or validation_from >= test_from:
        return {}
    data = prepare(
        long_enough, plan.window_size, plan.horizon,
        validation_from=f"{validation_from:%Y-%m-%d}", test_from=f"{test_from:%Y-%m-%d}", prior=prior,
    )  # fmt: skip
    observed: Observations = {("the scale chosen for training", ""): np.array([SCALES.index(data.better_scale())])}
    returns = data.returns_of("validation")
    for kind in data.scales:
        start = data.start(kind)
        calibration = fit_calibration(returns, data.forecasts_of(start, "validation"), data.levels)
        observed[f"the calibration of {kind}", ""] = np.array([calibration.shrinkage, calibration.interval_scale])
        observed[f"the training start of {kind}", ""] = np.concatenate([start.location[:, None], start.table], axis=1)
        for name, values in data.scales[kind].items():
            stop = int(prices[name].index.searchsorted(cut, side="right"))
            observed[f"the volatility scale {kind}", name] = values[:stop]
    return observed


def _inputs(tickers: Sequence[str], prices: Mapping[str, pd.DataFrame], cut: pd.Timestamp) -> Observations:
    markets = markets_of(prices)
    observed: Observations = {}
    for ticker in (name for name in tickers if name in prices):
        frame = prices[ticker]
        stop = int(frame.index.searchsorted(cut, side="right"))
        if not stop:  # not listed yet
            continue
        market = markets.of(ticker).days
        observed["the market's day", ticker] = market[market.index <= cut].to_numpy()
        for name in INDICATORS:
            observed[f"the indicator {name}", ticker] = indicator_table(frame, [name], market)[:stop]
        volatility = ewma_volatility(frame["Close"])
        lines = {
            "returns": returns_lines(frame), "zscores": returns_lines(frame, volatility),
            "words": words_lines(frame, volatility),
        }  # fmt: skip
        for prompt, written in lines.items():
            observed[f"the day lines ({prompt})", ticker] = np.array(written[:stop])
    return observed


def check_backtest(settings: BacktestSettings) -> int:
    """``backtest.py --check-leakage``: 0 where nothing moved, 1 with the leaks named.

    Raises:
        UserError: as a backtest with these settings.
    """
    with tempfile.TemporaryDirectory(prefix="leakage-", ignore_cleanup_errors=True) as folder:
        prices = dict(spool(settings.data, Path(folder), settings.tickers, settings).items())
    if len(prices) > MOST_TICKERS:
        names = np.random.default_rng(settings.seed).choice(list(prices), MOST_TICKERS, replace=False)
        warn(f"{len(prices)} tickers: checking {MOST_TICKERS} of them, {', '.join(sorted(names))}")
        prices = {name: frame for name, frame in prices.items() if name in names}
    if settings.refit != "never" and "llm" in settings.models:
        warn("--refit: the weights given are checked, not those that a refit would train")
    models, plan, ensemble = prepare_run(replace(settings, refit="never"), prices)
    cuts = choose_leakage_cuts(prices, plan, settings.leakage_cuts, settings.seed)
    scored = calendar_of(prices)
    scored = scored[(scored >= plan.cuts[0]) & (scored <= plan.end)].to_numpy().astype("datetime64[D]")
    for made_from in priors_used(settings, ensemble):
        say(prior_note(made_from, scored))
    known_at = partial(observe, models, plan, list(prices))
    with progress() as bar:
        task = bar.add_task("leakage", total=len(cuts) * (1 + len(MUTATIONS)))
        leaks, compared = find_leaks(known_at, prices, cuts, settings.seed, lambda: bar.advance(task))
    days = ", ".join(f"{cut:%Y-%m-%d}" for cut in cuts)
    say(f"{compared:,} numbers compared: {len(prices)} tickers, futures changed after {days} in {len(MUTATIONS)} ways")
    if not leaks:
        say("no leak: nothing said of a day moved when later days changed")
        return 0
    for leak in leaks[:20]:
        say(f"leak: {leak}")
    if len(leaks) > 20:
        say(f"... and {len(leaks) - 20} more")
    return 1


def choose_leakage_cuts(prices: Mapping[str, pd.DataFrame], plan: Plan, count: int, seed: int) -> list[pd.Timestamp]:
    """Random days between the first fit and the last day that leaves some future to change."""
    days = calendar_of(prices)
    known = days[(days >= plan.cuts[0]) & (days <= plan.end)][: -2 * plan.horizon]
    if not len(known):
        raise UserError("too few days after --from to change any future; give an earlier --from")
    draw = np.random.default_rng(seed)
    return sorted(known[place] for place in draw.choice(len(known), min(count, len(known)), replace=False))
