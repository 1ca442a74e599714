"""Two numbers fitted on validation days: how much to believe the forecast, and how wide to draw it.

``q' = shrinkage * median + interval_scale * (q - median)``. A shrinkage of 0 is the last close as the
point forecast; 1 is the model's own median. Both stay at 1 without evidence: each is charged a small
penalty worth a few days, so that a short validation part cannot swing them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from stocklora.metrics.scores import median_index, pinball_loss

PENALTY_DAYS = 100.0


@dataclass(frozen=True)
class Calibration:
    """Applied to every forecast; ``Calibration()`` changes nothing."""

    shrinkage: float = 1.0
    interval_scale: float = 1.0

    def apply(self, quantiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """(..., levels) -> (..., levels); order along levels is kept."""
        median = quantiles[..., median_index(levels)][..., None]
        return self.shrinkage * median + self.interval_scale * (quantiles - median)

    @staticmethod
    def from_dict(content: Mapping[str, float]) -> Calibration:
        return Calibration(float(content["shrinkage"]), float(content["interval_scale"]))


def fit_calibration(returns: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> Calibration:
    """The pair with the lowest quantile loss on validation origins.

    Args:
        returns: (n, horizon).
        quantiles: (n, horizon, levels), uncalibrated.
        levels: (levels,) increasing.
    """
    from scipy.optimize import minimize_scalar  # takes a second, and a forecast does not need it

    levels = np.asarray(levels)
    base = float(pinball_loss(returns, quantiles, levels).mean())
    if len(returns) == 0 or not base > 0:
        return Calibration()
    weight = base * PENALTY_DAYS / len(returns)

    def loss(shrinkage: float, interval_scale: float) -> float:
        adjusted = Calibration(shrinkage, interval_scale).apply(quantiles, levels)
        penalty = (shrinkage - 1.0) ** 2 / 10.0 + np.log(interval_scale) ** 2
        return float(pinball_loss(returns, adjusted, levels).mean()) + weight * float(penalty)

    def best(fixed: Callable[[float], float], low: float, high: float) -> float:
        return float(minimize_scalar(fixed, bounds=(low, high), method="bounded").x)

    shrinkage, interval_scale = 1.0, 1.0
    for _ in range(5):  # coordinate-wise: the two hardly interact
        shrinkage = best(partial(loss, interval_scale=interval_scale), 0.0, 1.0)
        interval_scale = best(partial(loss, shrinkage), 0.4, 2.5)
    fitted = Calibration(round(shrinkage, 4), round(interval_scale, 4))
    return fitted if loss(fitted.shrinkage, fitted.interval_scale) <= loss(1.0, 1.0) else Calibration()
