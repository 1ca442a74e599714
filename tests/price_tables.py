"""Made-up price tables for tests: geometric random walks with plausible bars."""

from __future__ import annotations

import numpy as np
import pandas as pd


def random_prices(rows: int = 300, seed: int = 0, start: str = "2020-01-01", volatility: float = 0.02) -> pd.DataFrame:
    """A price table as ``read_prices`` gives it."""
    draw = np.random.default_rng(seed)
    close = 50.0 * np.exp(np.cumsum(volatility * draw.standard_normal(rows)))
    opened = np.concatenate([[close[0]], close[:-1]]) * np.exp(0.3 * volatility * draw.standard_normal(rows))
    spread = np.exp(np.abs(0.5 * volatility * draw.standard_normal((2, rows))))
    return pd.DataFrame(
        {
            "Open": opened,
            "High": np.maximum(opened, close) * spread[0],
            "Low": np.minimum(opened, close) / spread[1],
            "Close": close,
            "Volume": np.round(1e6 * np.exp(0.3 * draw.standard_normal(rows))),
        },
        index=pd.bdate_range(start, periods=rows, name="Date"),
    )


def planted_trend(rows: int) -> pd.DataFrame:
    """Runs of ups and downs, ten days long on average: no random walk, since today's sign tells tomorrow's."""
    draw = np.random.default_rng(0)
    signs = np.cumprod(np.where(draw.random(rows) < 0.1, -1.0, 1.0))
    close = 50 * np.exp(np.cumsum(0.01 * (0.8 * signs + 0.5 * draw.standard_normal(rows))))
    frame = random_prices(rows)
    frame["Close"], frame["Open"] = close, close
    frame["High"], frame["Low"] = close * 1.001, close / 1.001
    return frame
