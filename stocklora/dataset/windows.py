"""Sequences, targets and chronological splits.

A *sequence* is a run of consecutive days of one ticker. Its last days are *origins*: days at whose
close a forecast is made. A causal language model reads the sequence once and yields a forecast at
every origin, each seeing only its own past, so ``targets_per_sequence`` origins cost one pass over
``window_size + targets_per_sequence - 1`` days instead of ``targets_per_sequence`` passes over
``window_size`` days.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DaySequence:
    """Days ``first_day .. origins[-1]`` of one ticker, forecast from each of ``origins``.

    All indices are rows of the ticker's price table; ``origins`` are consecutive, increasing, and the
    first of them has ``window_size`` days of the sequence up to and including itself.
    """

    ticker: str
    first_day: int
    origins: range

    @property
    def days(self) -> range:
        return range(self.first_day, self.origins.stop)


@dataclass(frozen=True)
class SplitDates:
    """Half-open date ranges: train < ``validation`` <= validation < ``test`` <= test."""

    validation: pd.Timestamp
    test: pd.Timestamp


def calendar_of(prices: Mapping[str, pd.DataFrame], skipped: int = 0) -> pd.DatetimeIndex:
    """Every date that any ticker has after its first ``skipped`` rows."""
    dates = [frame.index.to_numpy()[skipped:] for frame in prices.values()]
    return pd.DatetimeIndex(np.unique(np.concatenate(dates)))


def choose_split_dates(
    prices: Mapping[str, pd.DataFrame],
    window_size: int,
    horizon: int,
    validation_fraction: float,
    test_fraction: float,
    validation_from: str | None = None,
    test_from: str | None = None,
) -> SplitDates:
    """Cut the calendar of all tickers together, so that no ticker's test days are another's training days.

    Args:
        prices: ticker -> its table.
        window_size: days that a forecast is made from.
        horizon: days ahead.
        validation_fraction, test_fraction: of the dates that can be origins (the first ``window_size`` can't).
        validation_from, test_from: first days of these parts, in place of a share.

    Raises:
        UserError: dates out of order, outside the data, or too few days for three parts.
    """
    calendar = calendar_of(prices, window_size)
    least = 4 * (horizon + 1)
    if len(calendar) < least:
        longest = max(len(frame) for frame in prices.values())
        raise UserError(
            f"too few days to train, validate and test: the longest table has {longest} rows and --window_size "
            f"{window_size} needs at least {window_size + least}; download more days (--period 2y) or lower "
            f"--window_size"
        )
    validation_at = len(calendar) - round(len(calendar) * (validation_fraction + test_fraction))
    test_at = len(calendar) - round(len(calendar) * test_fraction)
    test = as_date(test_from, "--test_from") if test_from else calendar[min(test_at, len(calendar) - 1)]
    validation_at = min(validation_at, len(calendar) - 2)
    validation = as_date(validation_from, "--validation_from") if validation_from else calendar[validation_at]
    if not calendar[0] < validation < test <= calendar[-1]:
        raise UserError(
            f"the split dates must lie in order inside {calendar[0]:%Y-%m-%d} to {calendar[-1]:%Y-%m-%d}: "
            f"validation from {validation:%Y-%m-%d}, test from {test:%Y-%m-%d}; change --validation_from and "
            f"--test_from"
        )
    return SplitDates(validation, test)


def as_date(text: str, flag: str) -> pd.Timestamp:
    """The day that a flag names, without time and zone.

    Raises:
        UserError: it is no date.
    """
    try:
        return pd.Timestamp(text).tz_localize(None).normalize()
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a date; write it as 2016-07-01") from None


def split_origins(frame: pd.DataFrame, dates: SplitDates, window_size: int, horizon: int) -> dict[str, range]:
    """Rows of one ticker that are origins of each split.

    Purged: an origin belongs to train or validation only if its last target day lies before the next
    part begins, which leaves ``horizon`` days between the parts in which nothing is forecast.
    Row 0 has no previous close, hence no day line; the first origin has ``window_size`` lines behind it.
    """
    first, last = window_size, len(frame) - horizon  # origins need targets for every h to be scored
    starts = [0, frame.index.searchsorted(dates.validation), frame.index.searchsorted(dates.test)]
    stops = [starts[1] - horizon, starts[2] - horizon, last]
    return {
        name: range(max(first, start), max(first, start, min(stop, last)))
        for name, start, stop in zip(SPLITS, starts, stops, strict=True)
    }


def pack(ticker: str, origins: range, window_size: int, targets_per_sequence: int) -> list[DaySequence]:
    """Cut consecutive origins into sequences of at most ``targets_per_sequence`` each.

    Args:
        ticker: whose rows they are.
        origins: rows to forecast from.
        window_size: days up to and including the first origin of a sequence.
        targets_per_sequence: 1 is one window a forward pass.

    Raises:
        ValueError: an origin has fewer than ``window_size`` day lines behind it.
    """
    if origins and origins.start < window_size:
        raise ValueError(f"origin {origins.start} has fewer than window_size={window_size} days behind it")
    sequences = []
    for start in range(origins.start, origins.stop, targets_per_sequence):
        chunk = range(start, min(start + targets_per_sequence, origins.stop))
        sequences.append(DaySequence(ticker, start - window_size + 1, chunk))
    return sequences


def last_origin(ticker: str, rows: int, window_size: int, targets_per_sequence: int) -> DaySequence:
    """The sequence that forecasts from the last row, with as much past as a training sequence has at most."""
    origin = rows - 1
    first_day = max(1, origin - (window_size + targets_per_sequence - 1) + 1)
    return DaySequence(ticker, first_day, range(origin, origin + 1))


def count_origins(sequences: Sequence[DaySequence]) -> int:
    """How many forecasts the sequences make."""
    return sum(len(sequence.origins) for sequence in sequences)
