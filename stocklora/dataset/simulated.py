"""Made-up stocks whose forecasts are known: what a model can learn to read before any outcome is learned.

What comes after a real day says little of what was to be expected on it. Of a simulated day the quantiles of the next
days' returns are known, as far as its own state tells them, and there are as many days as one asks for.

One series, in days t; ``z`` are independent standard normal draws::

    log sigma_t  = level + slow_t + fast_t        daily volatility: two mean-reverting parts (as in Alizadeh, Brandt
    slow_t       = a slow_{t-1} + b z             and Diebold, Journal of Finance 57, 2002), with half-lives of
    fast_t       = c fast_{t-1} + d z             60 and 4 days
    gap_t        = sigma_t sqrt(o) e_t z          overnight, a share o of the variance; e_t is 4 on the morning after
                                                  quarterly results and 1 on others
    day_t        = sigma_t sqrt(1 - o) z          from open to close, in 48 steps whose extremes are high and low
    jump_t       = 4 sigma_t z                    on one morning in 120, beside the gap
    volume_t     grows with the square root of the day's move, has a memory of its own, and triples on results

Results come every 63 days, a day or two early or late. Each series draws its own level (10% to 90% a year), share o
(0.1 to 0.5), spreads of both parts, and price. Volatility rises after falls: ``fast`` takes -0.3 of the last scaled
return's share of its spread (Black's leverage effect).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stocklora.metrics.scores import QUANTILE_LEVELS

SLOW, FAST = 0.5 ** (1 / 60), 0.5 ** (1 / 4)  # what is left of each part after a day
QUARTER_DAYS, RESULTS_GAP = 63, 4.0
JUMP_SHARE, JUMP_SIZE = 1 / 120, 4.0
LEVERAGE = -0.3
STEPS = 48
WARM_UP_DAYS = 250  # run and forgotten, so that a series starts anywhere in its cycle
DRAWS = 2000  # of the future, for each day's quantiles: the outermost are known to some 3%
FIRST_DAY = "2001-01-01"


@dataclass(frozen=True)
class SimulatedStock:
    """A price table and what was to be expected at each of its closes.

    Attributes:
        quantiles: (days, horizon, levels) of the log return, at ``QUANTILE_LEVELS``.
    """

    prices: pd.DataFrame
    quantiles: np.ndarray


@dataclass(frozen=True)
class _Company:
    """What one series draws once.

    Attributes:
        level: log of the usual daily volatility. slow, fast: (stationary) spreads of its two parts.
        overnight: share of the variance.
        results: (days + horizon,) whether the day's morning comes after results.
    """

    level: float
    slow: float
    fast: float
    overnight: float
    results: np.ndarray


def simulated_stock(seed: int, number: int, days: int = 500, horizon: int = 3) -> SimulatedStock:
    """The series of that number; the same seed and number give the same one.

    Args:
        seed: of all series together. number: which of them.
        days: rows of its table. horizon: days ahead that its quantiles reach.
    """
    draw = np.random.default_rng([seed, number])
    total = WARM_UP_DAYS + days
    company = _company(draw, total + horizon)
    slow, fast = np.zeros(total), np.zeros(total)
    gaps, moves, last = np.zeros(total), np.zeros((total, STEPS)), 0.0
    slow[0], fast[0] = company.slow * draw.standard_normal(), company.fast * draw.standard_normal()
    for day in range(total):
        if day:
            slow[day], fast[day] = _next_state(company, slow[day - 1], fast[day - 1], last, draw.standard_normal(2))
        sigma = np.exp(company.level + slow[day] + fast[day])
        gaps[day] = sigma * _gap(company, draw.random(), draw.standard_normal(2), company.results[day])
        moves[day] = sigma * np.sqrt((1.0 - company.overnight) / STEPS) * draw.standard_normal(STEPS)
        last = (gaps[day] + moves[day].sum()) / sigma
    scaled = (gaps + moves.sum(axis=1)) / np.exp(company.level + slow + fast)
    kept = slice(WARM_UP_DAYS, None)
    prices = _table(company, gaps[kept], moves[kept], company.results[WARM_UP_DAYS:total], draw)
    quantiles = np.stack([
        _expected(company, slow[day], fast[day], scaled[day], company.results[day + 1 : day + 1 + horizon], draw)
        for day in range(WARM_UP_DAYS, total)
    ])  # fmt: skip
    return SimulatedStock(prices, quantiles)


def _company(draw: np.random.Generator, days: int) -> _Company:
    yearly = np.exp(draw.uniform(np.log(0.10), np.log(0.90)))
    results = np.zeros(days, dtype=bool)
    mornings = np.arange(draw.integers(QUARTER_DAYS), days, QUARTER_DAYS)
    results[np.clip(mornings + draw.integers(-2, 3, len(mornings)), 0, days - 1)] = True
    return _Company(
        level=float(np.log(yearly / np.sqrt(252))), slow=draw.uniform(0.15, 0.45), fast=draw.uniform(0.15, 0.4),
        overnight=draw.uniform(0.1, 0.5), results=results,
    )  # fmt: skip


def _next_state(company: _Company, slow: Any, fast: Any, last: Any, noise: np.ndarray) -> tuple[Any, Any]:
    """Tomorrow's two parts of the log volatility; numbers or arrays.

    Args:
        last: today's return over its volatility. noise: (2, ...) standard normal.
    """
    shock = LEVERAGE * np.clip(last, -3.0, 3.0) + np.sqrt(1.0 - LEVERAGE**2) * noise[1]
    return (
        SLOW * slow + np.sqrt(1.0 - SLOW**2) * company.slow * noise[0],
        FAST * fast + np.sqrt(1.0 - FAST**2) * company.fast * shock,
    )


def _gap(company: _Company, chance: Any, noise: np.ndarray, results: bool) -> Any:
    """The overnight move over the day's volatility; numbers or arrays."""
    usual = np.sqrt(company.overnight) * (RESULTS_GAP if results else 1.0) * noise[0]
    return usual + np.where(chance < JUMP_SHARE, JUMP_SIZE * noise[1], 0.0)


def _expected(
    company: _Company, slow: float, fast: float, last: float, results: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """(horizon, levels) quantiles of the coming returns at the close of a day in this state, of ``DRAWS`` futures."""
    total = np.zeros(DRAWS)
    quantiles = np.empty((len(results), len(QUANTILE_LEVELS)))
    states: tuple[Any, Any] = slow, fast
    moved: Any = last
    for step, morning in enumerate(results):
        states = _next_state(company, *states, moved, draw.standard_normal((2, DRAWS)))
        moved = _gap(company, draw.random(DRAWS), draw.standard_normal((2, DRAWS)), morning)
        moved = moved + np.sqrt(1.0 - company.overnight) * draw.standard_normal(DRAWS)
        total = total + np.exp(company.level + states[0] + states[1]) * moved
        quantiles[step] = np.quantile(total, QUANTILE_LEVELS)
    return quantiles


def _table(
    company: _Company, gaps: np.ndarray, moves: np.ndarray, results: np.ndarray, draw: np.random.Generator
) -> pd.DataFrame:
    """Bars of the paths: (days,) gaps and (days, steps) moves within the day, as log returns."""
    days = len(gaps)
    closes = np.cumsum(gaps + moves.sum(axis=1)) + np.log(draw.uniform(8.0, 400.0))
    opens = np.concatenate([closes[:1], closes[:-1]]) + gaps
    inside = np.column_stack([opens, opens[:, None] + np.cumsum(moves, axis=1), closes])
    activity = np.empty(days)
    activity[0], noise = 0.0, 0.3 * draw.standard_normal(days)
    for day in range(1, days):
        activity[day] = 0.7 * activity[day - 1] + noise[day]
    sizes = np.abs(gaps + moves.sum(axis=1)) / np.exp(company.level)
    volume = 1e6 * np.exp(activity) * np.sqrt(0.3 + sizes) * np.where(results, 3.0, 1.0)
    return pd.DataFrame(
        {
            "Open": np.exp(opens),
            "High": np.exp(inside.max(axis=1)),
            "Low": np.exp(inside.min(axis=1)),
            "Close": np.exp(closes),
            "Volume": np.round(volume),
        },
        index=pd.bdate_range(FIRST_DAY, periods=days, name="Date"),
    )
