"""A day's four prices: high is the highest and low the lowest, or the bar is wrong, mended or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError, warn
from stocklora.prices.csv_columns import PRICE_COLUMNS, Faults

QUOTES = PRICE_COLUMNS[:4]

# Adjusting multiplies four prices by one factor, and rounding then lets a close stand a hair above its
# high. A gap up to this fraction of the price is rounding, a wider one is a wrong bar.
BAR_TOLERANCE = 1e-5
MENDED_GAP, MENDED_SHARE = 0.02, 0.005  # of the price, and of a file's rows: what is mended rather than refused
CLOSE_ALONE_SHARE, LEAST_ROWS = 0.2, 20  # of the rows with the close outside the bar: it alone is adjusted


@dataclass
class MendedBars:
    """Bars whose range was widened to hold their open and close.

    Attributes:
        rows: of the tables looked at, mended or not.
        days: of the mended ones.
        gap: the furthest that a price lay outside, as a share of the price.
    """

    rows: int = 0
    days: list[str] = field(default_factory=list)
    gap: float = 0.0

    @property
    def too_many(self) -> bool:
        """Whether the table is wrong rather than a few of its bars."""
        return len(self.days) > MENDED_SHARE * self.rows

    def tell(self, path: Path) -> None:
        """Warn, in one line, if there are any."""
        if self.days:
            days = ", ".join(self.days[:3]) + (", ..." if len(self.days) > 3 else "")
            warn(f"{path}: {len(self.days)} of {self.rows} rows had an open or close up to {100 * self.gap:.2g}% "
                 f"outside the day's range ({days}); their range was widened")  # fmt: skip


def mend_bars(
    numbers: dict[str, np.ndarray],
    dates: np.ndarray,
    lines: np.ndarray,
    mended: MendedBars,
    faults: Faults,
    most: float | None = None,
) -> None:
    """High is the highest and low the lowest of a bar, up to ``BAR_TOLERANCE``.

    A few opens and closes a little outside, as real tables of tens of thousands of rows have them, widen their day's
    range in ``numbers`` and are counted in ``mended``. One further out than ``MENDED_GAP`` is among the ``faults``, and
    so are all where they are more than ``most``, by default ``MENDED_SHARE`` of the rows.

    Raises:
        UserError: a table whose closes alone are adjusted.
    """
    high, low = numbers["High"], numbers["Low"]
    wrong = bar_faults(numbers)
    rows = np.flatnonzero(wrong["Open"] | wrong["Close"])
    body = np.stack([numbers["Open"], numbers["Close"]])[:, rows]
    top, bottom = np.maximum(high[rows], body.max(axis=0)), np.minimum(low[rows], body.min(axis=0))
    gap = np.maximum(top / high[rows], low[rows] / bottom) - 1.0
    alone = wrong["Close"] & ~wrong["Open"]
    if len(alone) >= LEAST_ROWS and alone.mean() > CLOSE_ALONE_SHARE:
        raise UserError(
            f"{faults.path}: in {alone.sum()} of {len(alone)} rows the close alone lies outside the day's range, as "
            "where it is adjusted for dividends and open, high and low are not; get all four adjusted, or the adjusted "
            "close in a column of its own (Adj Close) beside the quoted one"
        )
    small = (gap <= MENDED_GAP) & ~wrong["High"][rows]
    if small.sum() <= (MENDED_SHARE * len(high) if most is None else most):
        few = rows[small]
        mended.rows += len(high)
        mended.days += [str(date)[:10] for date in dates[few]]
        mended.gap = max([mended.gap, *gap[small].tolist()])
        numbers["High"], numbers["Low"] = high.copy(), low.copy()
        numbers["High"][few], numbers["Low"][few] = top[small], bottom[small]
        for name in ("Open", "Close"):
            wrong[name][few] = False
    _add_faults(wrong, numbers, lines, faults)


def _add_faults(
    wrong: Mapping[str, np.ndarray], numbers: Mapping[str, np.ndarray], lines: np.ndarray, faults: Faults
) -> None:
    for name, mask in wrong.items():
        for index in np.flatnonzero(mask if name == "High" else mask & ~wrong["High"]):
            what = f"{name.lower()} {numbers[name][index]:g} is "
            if name == "High":
                kind, what = "a high below the low", what + f"below low {numbers['Low'][index]:g}"
            else:
                what += f"outside the day's range {numbers['Low'][index]:g} to {numbers['High'][index]:g}"
                kind = f"the {name.lower()} outside the day's range"
            faults.add(lines[index], name, kind, f"{what}; correct or delete that line")


def bar_faults(bars: Mapping[str, Any] | pd.DataFrame) -> dict[str, np.ndarray]:
    """Where a bar's high is below its low, or its open or close outside them, beyond rounding.

    Args:
        bars: columns of (days,) prices.

    Returns:
        (days,) masks by the column that is at fault: ``High``, ``Open`` and ``Close``.
    """
    price = {name: np.asarray(bars[name]) for name in QUOTES}
    highest, lowest = price["High"] * (1 + BAR_TOLERANCE), price["Low"] * (1 - BAR_TOLERANCE)
    outside = {name: (price[name] > highest) | (price[name] < lowest) for name in ("Open", "Close")}
    return {"High": price["High"] < lowest, **outside}
