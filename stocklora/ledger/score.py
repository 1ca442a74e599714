"""How a forecaster's record stands: shares, losses and surprises of the forecasts that are due."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stocklora.ledger.record import BASELINES
from stocklora.ledger.table import LEVELS, SCORED, returns_of
from stocklora.metrics.confidence import overlapping_share_interval
from stocklora.metrics.scores import BASIS_POINTS, inside_interval, median_index, pinball_loss

SHARES = (0.5, 0.8, 0.9)


@dataclass(frozen=True)
class Share:
    """How often something held that should hold a share ``wanted`` of the time.

    Attributes:
        found: the mean over days, each counted once however many tickers it has.
        low, high: the ends of the confidence sequence.
    """

    wanted: float
    found: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.low > self.wanted:
            return "more than promised"
        return "fewer than promised" if self.high < self.wanted else "no contradiction"


@dataclass(frozen=True)
class DayRecord:
    """The forecasts of one forecaster so many days ahead.

    Attributes:
        closes: how many are scored, on how many ``origins`` days they were made.
        inside: shares inside the 50, 80 and 90% intervals.
        below: shares at or below each quantile.
        losses: ``model``, ``naive`` and ``ewma`` -> mean quantile loss and mean absolute error, basis points of the
            return; all of the same closes, ``compared`` many.
    """

    day: int
    closes: int
    origins: int
    inside: tuple[Share, ...]
    below: tuple[Share, ...]
    losses: dict[str, tuple[float, float]]
    compared: int


@dataclass(frozen=True)
class Record:
    """A forecaster's.

    Attributes:
        table: its rows, of every state.
        days: for each day ahead with a scored close.
    """

    name: str
    sha256: str
    table: pd.DataFrame
    days: tuple[DayRecord, ...]


def records_of(table: pd.DataFrame) -> Iterator[Record]:
    """A record for each forecaster, in the order in which they first spoke; ``table`` as ``with_closes`` makes it."""
    for sha256, own in table.groupby("sha256", sort=False):
        scored = own[own["state"] == SCORED]
        days = tuple(day_record(int(day), rows) for day, rows in scored.groupby("day"))
        yield Record(own["model"].iloc[-1], str(sha256), own, days)


def day_record(day: int, scored: pd.DataFrame) -> DayRecord:
    """Scores of the forecasts so many days ahead."""
    came, quantiles = scored["came"].to_numpy()[:, None], returns_of(scored, "model")
    inside = [inside_interval(came, quantiles, LEVELS, share)[:, 0] for share in SHARES]
    below = [came[:, 0] <= quantiles[:, 0, index] for index in range(len(LEVELS))]
    compared = scored[scored[[f"{name}_P50" for name in BASELINES]].notna().all(axis=1)]
    return DayRecord(
        day, len(scored), scored["origin"].nunique(),
        tuple(share_of(held, scored, share) for held, share in zip(inside, SHARES, strict=True)),
        tuple(share_of(held, scored, level) for held, level in zip(below, LEVELS.tolist(), strict=True)),
        {name: losses_of(compared, name) for name in ("model", *BASELINES)} if len(compared) else {}, len(compared),
    )  # fmt: skip


def share_of(held: np.ndarray, scored: pd.DataFrame, wanted: float) -> Share:
    """How often it held, with its confidence sequence.

    Tickers move together, so what is counted is the mean of each day; days whose forecasts overlap are dealt with in
    ``overlapping_share_interval``.

    Args:
        held: (rows,) bool.
    """
    units = pd.Series(held.astype(float), index=scored.index).groupby([scored["origin"], scored["date"]]).mean()
    spans = units.index.to_frame()  # sorted by origin, then by date
    low, high = overlapping_share_interval(
        units.to_numpy(), spans["origin"].to_numpy(), spans["date"].to_numpy()
    )  # fmt: skip
    return Share(wanted, float(units.mean()), low, high)


def losses_of(scored: pd.DataFrame, name: str) -> tuple[float, float]:
    """Mean quantile loss and mean absolute error of the return, basis points."""
    came, quantiles = scored["came"].to_numpy()[:, None], returns_of(scored, name)
    error = np.abs(came[:, 0] - quantiles[:, 0, median_index(LEVELS)])
    return BASIS_POINTS * float(pinball_loss(came, quantiles, LEVELS).mean()), BASIS_POINTS * float(error.mean())


def surprises(record: Record, most: int) -> pd.DataFrame:
    """The scored closes that went furthest, in units of half the 80% interval on their side of the median.

    Of a close that was forecast on several days, the worst forecast stands for all.

    Returns:
        Rows of the table with ``times``, the worst first.
    """
    scored = record.table[record.table["state"] == SCORED]
    quantiles = returns_of(scored, "model")[:, 0, :]
    low, middle, high = (quantiles[:, list(LEVELS).index(level)] for level in (0.1, 0.5, 0.9))
    distance = scored["came"].to_numpy() - middle
    side = np.where(distance < 0.0, middle - low, high - middle)
    worst = scored.assign(times=np.abs(distance) / np.maximum(side, 1e-12)).sort_values("times", ascending=False)
    return worst.drop_duplicates(["ticker", "date"]).head(most)
