"""From price tables to what the model eats: splits, scale, starting quantiles, token sequences.

Everything fitted here is fitted on training origins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError, warn
from stocklora.dataset.prompts import DayEncoder, EncodedSequence, check_lengths
from stocklora.dataset.windows import (
    SPLITS,
    DaySequence,
    SplitDates,
    choose_split_dates,
    count_origins,
    pack,
    split_origins,
)
from stocklora.metrics.scores import QUANTILE_LEVELS, Scores, median_index, pinball_loss, score
from stocklora.prices.tables import log_returns_ahead, prices_sha256
from stocklora.volatility.market import Markets
from stocklora.volatility.prior import DRIFT_ORIGINS, MarketPrior
from stocklora.volatility.random_walk import QuantileBaseline, fit_baselines
from stocklora.volatility.scales import OWN_SCALES, SCALES

BETTER_THAN_PRIOR = -1.645  # a standard normal's 5%
LEAST_DAYS_TO_LEAVE = 120  # validation days; of the runs that left the prior on 34, 23 of 28 were worse off for it
LEAST_TRAINING_ORIGINS = 20  # fewer cannot tell nine quantiles apart


@dataclass(frozen=True)
class Example:
    """A sequence with what is known and what came at each of its origins.

    Attributes:
        scale: (targets, horizon).
        returns: (targets, horizon), NaN where the future is not known yet.
        teacher: (targets, horizon, levels) quantiles of the return to learn from as well, NaN where there are none.
    """

    encoded: EncodedSequence
    scale: np.ndarray
    returns: np.ndarray
    teacher: np.ndarray | None = None


@dataclass(frozen=True)
class ForecastData:
    """Prices cut into train, validation and test, with the baselines fitted on train.

    Attributes:
        returns: ticker -> (days, horizon) log returns ahead.
        origins: ticker -> split -> rows.
        scales: kind -> ticker -> (days, horizon).
    """

    prices: Mapping[str, pd.DataFrame]
    dates: SplitDates
    window_size: int
    horizon: int
    returns: Mapping[str, np.ndarray]
    origins: Mapping[str, Mapping[str, range]]
    baselines: Mapping[str, QuantileBaseline]
    scales: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def levels(self) -> np.ndarray:
        return np.array(QUANTILE_LEVELS)

    def sequences(self, split: str, targets_per_sequence: int) -> list[DaySequence]:
        return [
            sequence
            for ticker in self.prices
            for sequence in pack(ticker, self.origins[ticker][split], self.window_size, targets_per_sequence)
        ]

    def at_origins(self, values: Callable[[str], np.ndarray], split: str) -> np.ndarray:
        """(n, ...): what ``values(ticker)``, (days, ...), has at the origins; tickers in the order of ``sequences``."""
        return np.concatenate([values(name)[list(self.origins[name][split])] for name in self.prices])

    def returns_of(self, split: str) -> np.ndarray:
        """(n, horizon) log returns that came."""
        return self.at_origins(self.returns.__getitem__, split)

    def dates_of(self, split: str) -> np.ndarray:
        """(n,) dates of the origins."""
        return self.at_origins(lambda name: self.prices[name].index.to_numpy(), split)

    def closes_of(self, split: str) -> np.ndarray:
        """(n,) closes at the origins."""
        return self.at_origins(lambda name: self.prices[name]["Close"].to_numpy(), split)

    def forecasts_of(self, baseline: str | QuantileBaseline, split: str) -> np.ndarray:
        """(n, horizon, levels) of a baseline."""
        fitted = self.baselines[baseline] if isinstance(baseline, str) else baseline
        scales = self.scales[fitted.scale.kind if fitted.scale else OWN_SCALES[0]]
        return fitted.quantiles(self.at_origins(scales.__getitem__, split))

    def score(self, quantiles: np.ndarray, split: str) -> Scores:
        return score(self.closes_of(split), self.returns_of(split), quantiles, self.levels)

    def validation_losses(self, baseline: str | QuantileBaseline) -> np.ndarray:
        """(n,) quantile loss of a baseline at each validation origin."""
        quantiles = self.forecasts_of(baseline, "validation")
        return pinball_loss(self.returns_of("validation"), quantiles, self.levels).mean(axis=1)

    def validation_loss(self, baseline: str | QuantileBaseline) -> float:
        """Its mean."""
        return float(self.validation_losses(baseline).mean())

    def better_scale(self) -> str:
        """The scale to start from: of those fitted on training days alone the one with the lowest validation loss.

        Where there is a prior, the prior's, unless another is better on validation days by more than chance (the
        test of Diebold and Mariano at 5%) and there are at least ``LEAST_DAYS_TO_LEAVE`` of them: fewer choose by luck,
        whatever the test says.
        """
        from stocklora.metrics.significance import diebold_mariano  # scipy's statistics: a forecast needs none

        own = min(OWN_SCALES, key=self.validation_loss)
        if "prior" not in self.baselines:
            return own
        if len(np.unique(self.dates_of("validation"))) < LEAST_DAYS_TO_LEAVE:
            return "prior"
        losses = self.validation_losses(own) - self.validation_losses("prior")
        daily = pd.Series(losses).groupby(self.dates_of("validation")).mean()
        statistic, _ = diebold_mariano(daily.to_numpy(), self.horizon)
        return own if statistic < BETTER_THAN_PRIOR else "prior"

    def start(self, kind: str) -> QuantileBaseline:
        """Where a model with this scale starts: around the scaled median or around the drift.

        The point forecast with the lower absolute error on validation decides.
        """
        scaled, drift = self.baselines[kind], self.baselines["drift"].location
        if kind == "prior":  # a year's mean return is mostly luck
            origins = sum(len(parts["train"]) for parts in self.origins.values())
            if origins < DRIFT_ORIGINS:
                return scaled
            drift = drift * origins / (origins + DRIFT_ORIGINS)
        drifting = scaled.around_drift(drift, self.levels)
        middle, returns = median_index(self.levels), self.returns_of("validation")

        def absolute_error(baseline: QuantileBaseline) -> float:
            return float(np.abs(self.forecasts_of(baseline, "validation")[..., middle] - returns).mean())

        return min((scaled, drifting), key=absolute_error)


def prepare(
    prices: Mapping[str, pd.DataFrame],
    window_size: int,
    horizon: int,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    validation_from: str | None = None,
    test_from: str | None = None,
    prior: MarketPrior | None = None,
) -> ForecastData:
    """Split by date across all tickers and fit the baselines.

    Args:
        prices: ticker -> its table.
        window_size: days that a forecast is made from.
        horizon: days ahead.
        validation_fraction, test_fraction: shares of the dates, the last.
        validation_from, test_from: first days of these parts, in place of a share.
        prior: what other tickers teach; with it there is a scale ``prior`` too.

    Raises:
        UserError: too few days, or split dates that leave a part empty.
    """
    dates = choose_split_dates(
        prices, window_size, horizon, validation_fraction, test_fraction, validation_from, test_from
    )
    origins = {name: split_origins(frame, dates, window_size, horizon) for name, frame in prices.items()}
    for split in SPLITS:
        total = sum(len(parts[split]) for parts in origins.values())
        least = LEAST_TRAINING_ORIGINS if split == "train" else 1
        if total < least:
            raise UserError(
                f"only {total} days left to forecast from in the {split} part (at least {least} needed): --window_size "
                f"{window_size} leaves too few; download more days (--period 2y) or lower --window_size"
            )
    returns = {name: log_returns_ahead(frame["Close"].to_numpy(), horizon) for name, frame in prices.items()}
    training = {name: parts["train"] for name, parts in origins.items()}
    scales: dict[str, dict[str, np.ndarray]] = {}
    kinds = OWN_SCALES if prior is None else SCALES
    baselines = fit_baselines(prices, training, returns, np.array(QUANTILE_LEVELS), kinds, scales, prior)
    return ForecastData(prices, dates, window_size, horizon, returns, origins, baselines, scales)


def make_examples(
    prices: Mapping[str, pd.DataFrame],
    sequences: Sequence[DaySequence],
    encoder: DayEncoder,
    scales: Mapping[str, np.ndarray],
    markets: Markets | None = None,
) -> list[Example]:
    """Token ids, scale and, where it is known, the future of every sequence.

    Args:
        prices: ticker -> its table.
        sequences: what to encode, in order.
        encoder: writes days as token ids.
        scales: ticker -> (days, horizon), of all tickers or those that the sequences name.
        markets: of all tickers forecast together; by default of ``prices``.
    """
    names = {sequence.ticker for sequence in sequences}
    returns = {name: log_returns_ahead(prices[name]["Close"].to_numpy(), scales[name].shape[1]) for name in names}
    return [
        Example(
            encoded,
            scales[encoded.sequence.ticker][list(encoded.sequence.origins)],
            returns[encoded.sequence.ticker][list(encoded.sequence.origins)],
        )
        for encoded in encoder.encode(prices, sequences, markets)
    ]


def fitted_to_context(
    make: Callable[[int], list[Example]],
    targets: int,
    context_tokens: int,
    fewer: Callable[[int, int], int] | None = None,
) -> tuple[int, list[Example]]:
    """Examples that the base model can read: made anew with fewer targets a sequence while one is too long.

    Args:
        make: the examples for so many targets a sequence.
        targets: how many to begin with.
        context_tokens: what the base model can read at once.
        fewer: the next number to try, from the last one and the tokens of its longest example; by default a tenth
            below the number that would fit if each target took as many tokens.

    Returns:
        The targets a sequence that fit, and their examples.

    Raises:
        UserError: a single target outgrows the context.
    """
    while True:
        examples = make(targets)
        longest = max((len(example.encoded.input_ids) for example in examples), default=0)
        if targets == 1 or longest <= context_tokens:
            check_lengths([example.encoded for example in examples], context_tokens)
            return targets, examples
        proposed = int(0.9 * targets * context_tokens / longest) if fewer is None else fewer(targets, longest)
        targets = max(1, proposed)


def data_facts(data: ForecastData, sequences: Mapping[str, Sequence[DaySequence]]) -> dict[str, Any]:
    """What a weights file says of the data it was trained on."""
    return {
        "tickers": list(data.prices),
        "rows": {name: len(frame) for name, frame in data.prices.items()},
        "first": f"{min(frame.index[0] for frame in data.prices.values()):%Y-%m-%d}",
        "last": f"{max(frame.index[-1] for frame in data.prices.values()):%Y-%m-%d}",
        "validation_from": f"{data.dates.validation:%Y-%m-%d}",
        "test_from": f"{data.dates.test:%Y-%m-%d}",
        "targets": {split: count_origins(parts) for split, parts in sequences.items()},
        "sha256": prices_sha256(data.prices),
    }


def select_tickers(prices: Mapping[str, pd.DataFrame], names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Only the named tickers, in that order; all of them if none is named.

    Raises:
        UserError: a ticker that no file has.
    """
    missing = [name for name in names if name not in prices]
    if missing:
        raise UserError(f"no prices of {', '.join(missing)} in the files; they have {', '.join(prices)}")
    return {name: prices[name] for name in names} if names else dict(prices)


def split_by_rows(prices: Mapping[str, pd.DataFrame], least: int) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The tickers with at least so many rows, and the others, each as ``NAME (rows)``."""
    known = {name: frame for name, frame in prices.items() if len(frame) >= least}
    return known, [f"{name} ({len(frame)})" for name, frame in prices.items() if name not in known]


def with_a_day_to_learn_from(prices: Mapping[str, pd.DataFrame], least: int) -> dict[str, pd.DataFrame]:
    """The tickers that have at least so many rows; the others are named and left out, unless none is left."""
    known, short = split_by_rows(prices, least)
    if short and known:
        warn(f"fewer than {least} rows, left out: {', '.join(short)}")
    return known or dict(prices)
