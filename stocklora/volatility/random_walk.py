"""The simple forecasters every report stands beside.

All of them forecast quantiles of the h-day log return, h = 1..horizon. Anything fitted here is fitted on
the training days that the caller passes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stocklora.metrics.scores import median_index
from stocklora.volatility.market import markets_of
from stocklora.volatility.prior import MarketPrior
from stocklora.volatility.scales import MOST_FITTED_ORIGINS, OWN_SCALES, VolatilityScale, fit_scale, thinned


def empirical_quantiles(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Quantiles down each column, made strictly increasing.

    Args:
        values: (n, horizon). Returns: (horizon, levels).
    """
    table = np.quantile(values, levels, axis=0).T
    # Ties (a short table, a price that never moves) would leave no room between quantiles.
    spread = np.maximum(table[:, -1:] - table[:, :1], 1e-3)
    return table + spread * 1e-4 * np.arange(len(levels))[None, :]


def centred(table: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(horizon, levels) quantiles around their median."""
    return table - table[:, [median_index(levels)]]


@dataclass(frozen=True)
class QuantileBaseline:
    """A baseline that knows only scale and past distribution: location(h) + scale(origin, h) * table(h, level).

    ``naive``: last close as the point forecast, unscaled empirical quantiles around it. ``drift``: the same,
    moved by the mean training return. ``ewma``, ``har``, ``harx``, ``prior``: quantiles of the scaled returns.

    Attributes:
        location: (horizon,) log return that the quantiles stand around.
        table: (horizon, levels).
    """

    name: str
    scale: VolatilityScale | None
    location: np.ndarray
    table: np.ndarray

    def quantiles(self, scale: np.ndarray) -> np.ndarray:
        """(origins, horizon, levels) quantiles of the h-day log return.

        Args:
            scale: (origins, horizon) of ``self.scale``; only its length counts where there is none.
        """
        size = np.ones_like(scale) if self.scale is None else scale
        return self.location[None, :, None] + size[:, :, None] * self.table[None]

    def around_drift(self, drift: np.ndarray, levels: np.ndarray) -> QuantileBaseline:
        """The same spread around the mean training return in place of the scaled median."""
        return QuantileBaseline(self.name, self.scale, drift, centred(self.table, levels))


def fit_baselines(
    prices: Mapping[str, pd.DataFrame],
    origins: Mapping[str, range],
    returns: Mapping[str, np.ndarray],
    levels: np.ndarray,
    kinds: Sequence[str] = OWN_SCALES,
    scales: dict[str, dict[str, np.ndarray]] | None = None,
    prior: MarketPrior | None = None,
) -> dict[str, QuantileBaseline]:
    """Fit ``naive``, ``drift`` and one baseline for each scale on the training origins of all tickers, pooled.

    Tickers are looked at one at a time, so mappings that read them from disk stay small in memory.

    Args:
        prices: ticker -> its table.
        origins: ticker -> training rows.
        returns: ticker -> (days, horizon) log returns ahead.
        levels: (levels,) increasing, in (0, 1).
        kinds: the scales asked for.
        scales: filled with every scale's values: kind -> ticker -> (days, horizon).
        prior: where the scale and the quantiles of ``prior`` start, if that is among ``kinds``.
    """
    rows = thinned(origins, MOST_FITTED_ORIGINS)
    pooled = np.concatenate([returns[name][rows[name]] for name in prices])
    nothing = np.zeros(pooled.shape[1])
    raw = centred(empirical_quantiles(pooled, levels), levels)
    baselines = {
        "naive": QuantileBaseline("naive", None, nothing, raw),
        "drift": QuantileBaseline("drift", None, pooled.mean(axis=0), raw),
    }
    plain = markets_of(prices) if not set(kinds).isdisjoint(("harx", "prior")) else None
    for kind in kinds:
        start = prior.scale_for(pooled.shape[1]) if prior is not None and kind == "prior" else None
        scale = fit_scale(kind, prices, origins, returns, start, plain)
        markets = scale.markets_of(prices, plain)
        scaled = []
        for name, frame in prices.items():
            values = scale.at(frame, markets.of(name))
            scaled.append(returns[name][rows[name]] / values[rows[name]])
            if scales is not None:
                scales.setdefault(kind, {})[name] = values
        table = empirical_quantiles(np.concatenate(scaled), levels)
        if prior is not None and kind == "prior":
            table = prior.moved_table(table, len(pooled))
        baselines[kind] = QuantileBaseline(kind, scale, nothing, table)
    return baselines
