"""How sure one may be of a share that is looked at again and again: an anytime-valid confidence sequence.

A usual 95% interval holds at one time that was fixed beforehand. Who looks every day at a growing record, and may stop
when it pleases, will one day see the usual interval miss. A *confidence sequence* holds at all times at once: with
probability 0.95 it never misses, however often one looks.

Pure functions over NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

# The bets that are mixed: from those that pay after ten thousand observations to those that pay after a few.
BERNOULLI_BETS = np.concatenate([sign * np.geomspace(0.01, 5.0, 25) for sign in (-1.0, 1.0)])
BERNSTEIN_BETS = np.concatenate([sign * np.geomspace(0.01, 0.95, 20) for sign in (-1.0, 1.0)])


def log_evidence(outcomes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The evidence, after each outcome, that the mean share so far is not the one given.

    Robbins' method of mixtures (Annals of Mathematical Statistics 41, 1970) over two families of bets, half the stake
    on each. For outcomes x in [0, 1] with conditional means whose average so far is m, both

    - exp(b S - n log(1 - m + m exp(b))), S the sum of the outcomes (Hoeffding, Journal of the American Statistical
      Association 58, 1963; the logarithm is concave in m, so the means need not be equal), and
    - exp(b (S - n m) - (-log(1 - |b|) - |b|) V), V the sum of squares of x less the mean of the outcomes before it
      (empirical Bernstein: Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence
      sequences", Annals of Statistics 49, 2021, theorem 4; which sees that means of many tickers vary little)

    are at most a supermartingale that starts at 1, for any b chosen beforehand; so is their mean over any bets. By
    Ville's inequality it exceeds 1 / alpha, ever, with probability alpha at most. The share may change from day to
    day and the outcomes may depend on the past in any way: nothing is assumed but their order and their range.

    Args:
        outcomes: (n,) in [0, 1], in the order in which they came.
        shares: (n,) the supposed mean of the conditional means up to each outcome, or one number for all.

    Returns:
        (n,) natural logarithm of the evidence.
    """
    count, total, squares = _sums(outcomes)
    shares = np.broadcast_to(np.asarray(shares, dtype=float), count.shape)
    return _log_mixture(count, total, squares, shares)


def share_interval(outcomes: np.ndarray, alpha: float = 0.05) -> tuple[float, float]:
    """Where the mean share so far may lie: the shares against which there is less evidence than 1 / alpha.

    Args:
        outcomes: (n,) in [0, 1], in the order in which they came; (0, 1) is all that is known of none.
        alpha: the probability that it misses at any time.
    """
    if not len(outcomes):
        return 0.0, 1.0
    count, total, squares = (part[-1:] for part in _sums(outcomes))
    mean, bar = float(total[0] / count[0]), -np.log(alpha)

    def excess(share: float) -> float:
        return float(_log_mixture(count, total, squares, np.array([share]))[0]) - bar

    # As a function of the share each bet's logarithm is convex, so the mixture's is, and at the mean it is not above 0.
    low = 0.0 if excess(0.0) <= 0.0 else float(brentq(excess, 0.0, mean))
    high = 1.0 if excess(1.0) <= 0.0 else float(brentq(excess, mean, 1.0))
    return low, high


def overlapping_share_interval(
    outcomes: np.ndarray, begins: np.ndarray, ends: np.ndarray, alpha: float = 0.05
) -> tuple[float, float]:
    """The same for outcomes whose spans overlap, as those of forecasts of several days ahead made every day.

    An outcome that is half decided when the next forecast is made breaks the order that evidence needs. The outcomes
    are therefore dealt into runs whose spans follow each other; the k-th run has alpha / (k (k + 1)) of the probability
    to miss, which sums to alpha over however many there are, and the mean of the runs' ends holds with what is left.

    Args:
        outcomes: (n,) in [0, 1], sorted by ``begins``.
        begins: (n,) when each was forecast; ends: (n,) when it came. Anything that can be ordered.
        alpha: the probability that it misses at any time.
    """
    runs: list[list[int]] = []
    for index in range(len(outcomes)):
        free = next((run for run in runs if ends[run[-1]] <= begins[index]), None)
        if free is None:
            free = []
            runs.append(free)
        free.append(index)
    low = high = 0.0
    for number, run in enumerate(runs, start=1):
        below, above = share_interval(np.asarray(outcomes)[run], alpha / (number * (number + 1)))
        low, high = low + below * len(run), high + above * len(run)
    return (low / len(outcomes), high / len(outcomes)) if runs else (0.0, 1.0)


def _sums(outcomes: np.ndarray | Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) each: how many outcomes so far, their sum, and their squared distances from the mean before each."""
    values = np.asarray(outcomes, dtype=float)
    if values.size and not (values.min() >= 0.0 and values.max() <= 1.0):
        raise ValueError("outcomes must be from 0 to 1")
    count, total = np.arange(1.0, len(values) + 1.0), np.cumsum(values)
    before = (total - values + 0.5) / count  # begins at one half
    return count, total, np.cumsum((values - before) ** 2)


def _log_mixture(count: np.ndarray, total: np.ndarray, squares: np.ndarray, shares: np.ndarray) -> np.ndarray:
    hoeffding = np.outer(total, BERNOULLI_BETS) - count[:, None] * np.log1p(np.outer(shares, np.expm1(BERNOULLI_BETS)))
    size = np.abs(BERNSTEIN_BETS)
    bernstein = np.outer(total - count * shares, BERNSTEIN_BETS) - np.outer(squares, -np.log1p(-size) - size)
    logs = np.concatenate([hoeffding - np.log(2 * hoeffding.shape[1]), bernstein - np.log(2 * bernstein.shape[1])], 1)
    return np.asarray(logsumexp(logs, axis=1))
