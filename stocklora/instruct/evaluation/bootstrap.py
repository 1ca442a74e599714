"""Means, shares and F1 over rows, with paired bootstrap intervals. NumPy only.

Rows about one event are alike, so whole groups of rows are drawn (a cluster bootstrap), the same ones for both models:
the interval of their difference is that of the same rows answered twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LOW, HIGH = 2.5, 97.5  # percentiles of a 95% interval


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval; without one where its rows are of fewer than two groups.

    Attributes:
        rows: how many it is computed from.
    """

    value: float
    low: float | None
    high: float | None
    rows: int


class Resampler:
    """Draws groups of rows with replacement, the same draws for all that is asked of it."""

    def __init__(self, groups: Sequence[Hashable], resamples: int, seed: int) -> None:
        """``groups``: of each row, what it belongs to."""
        names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
        self._group = np.array([names[name] for name in groups], dtype=np.intp)  # (rows,)
        self._groups = len(names)
        random = np.random.default_rng(seed)
        share = np.full(self._groups, 1.0 / self._groups)
        # How often each group is drawn: (1 + resamples, groups), the first row being the data as it is.
        drawn = random.multinomial(self._groups, share, size=resamples).astype(float)
        self._weights = np.vstack([np.ones(self._groups), drawn])

    def ratio(self, numerators: Sequence[float | None], denominators: Sequence[float] | None = None) -> np.ndarray:
        """Sum over sum in the data and in every resample, (1 + resamples,); NaN where the sum below is 0.

        Args:
            numerators: of each row; None leaves the row out. denominators: 1 each if not given, which makes a mean.
        """
        used = np.array([number is not None for number in numerators])
        above = np.array([0.0 if number is None else float(number) for number in numerators])
        below = np.ones(len(above)) if denominators is None else np.array(denominators, dtype=float)
        return _quotient(self._sums(above * used), self._sums(below * used))

    def macro_f1(self, given: Sequence[str | None], wanted: Sequence[str | None]) -> np.ndarray:
        """Mean F1 over the labels that occur in ``wanted``, (1 + resamples,).

        Args:
            given: of each row, None where nothing clear was said. wanted: None leaves the row out.
        """
        labels = sorted({label for label in wanted if label is not None})
        if not labels:
            return np.full(len(self._weights), np.nan)
        total, present = np.zeros(len(self._weights)), np.zeros(len(self._weights))
        for label in labels:
            used = np.array([other is not None for other in wanted])
            says = np.array([mine == label for mine in given]) & used
            means = np.array([other == label for other in wanted])
            hits = 2.0 * self._sums((says & means).astype(float))
            there = self._sums(means.astype(float)) > 0  # a draw without a rare label is judged by the others
            f1 = np.nan_to_num(_quotient(hits, self._sums(says.astype(float) + means.astype(float))))
            total += f1 * there
            present += there
        return _quotient(total, present)

    def estimate(
        self, values: np.ndarray, used: Sequence[bool], share: tuple[float, float] | None = None
    ) -> Estimate | None:
        """The data's value with the interval of the resamples' values; None where there is none.

        Args:
            used: of each row, whether it counts. Other rows' groups tell nothing of the value's chance.
            share: the least and the largest value that there can be, of shares and their differences. Where all rows
                agree, so do all resamples; then the interval is the exact binomial one (Clopper and Pearson 1934): of
                four rows out of four, from 40% to 100%.
        """
        if not np.isfinite(values[0]):
            return None
        value, rows = float(values[0]), sum(used)
        groups = len(set(self._group[np.array(used, dtype=bool)]))
        drawn = values[1:][np.isfinite(values[1:])]
        if groups < 2 or not len(drawn):
            return Estimate(value, None, None, rows)
        low, high = (float(side) for side in np.percentile(drawn, [LOW, HIGH]))
        if share is not None and high - low < 1e-9:
            width = 1.0 - (LOW / 100.0) ** (1.0 / groups)
            low, high = max(share[0], value - width), min(share[1], value + width)
        return Estimate(value, low, high, rows)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """(1 + resamples,) sums of the rows' ``values``."""
        by_group = np.bincount(self._group, weights=values, minlength=self._groups)
        return self._weights @ by_group


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def spread(kinds: Sequence[str], order: Mapping[int, str], most: int) -> list[int]:
    """Indices of at most ``most`` rows, each kind in its share, in the rows' own order.

    Args:
        order: of each index, what sorts the rows of a kind.
    """
    ranked: list[tuple[float, str, int]] = []
    for kind in sorted(set(kinds)):
        members = sorted((index for index, other in enumerate(kinds) if other == kind), key=lambda index: order[index])
        ranked += [((place + 0.5) / len(members), kind, index) for place, index in enumerate(members)]
    return sorted(index for _, _, index in sorted(ranked)[:most])
