"""What the days of hundreds of stocks teach about the next days of any other: the *market prior*.

The ``harx`` regression, the quantiles of the returns that it scales, and a sample of their paths, fitted once on
tickers of several markets and kept in ``prior.json`` beside this file, which ``scripts/make_prior.py`` writes. A
forecast starts there, and its own days move it as far as they deserve (``scales.fit_scale``,
``random_walk.fit_baselines``); with none of its own it is the prior's.
"""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError
from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.prices.tables import log_returns_ahead, prices_sha256
from stocklora.runtime.files import json_of, write_text
from stocklora.volatility.harx import centre_and_spread, standardized
from stocklora.volatility.market import SURPRISE_LIMIT, markets_of
from stocklora.volatility.scales import (
    HARX_INPUTS,
    SCALE_FLOOR,
    VolatilityScale,
    harx_regression,
    regression_inputs,
)

BUILTIN = Path(__file__).with_name("prior.json")
MOST_HORIZON = 20  # days ahead that a prior is made for, as many as any --horizon may ask for
LEAST_ROWS = 60  # days of prices that a ticker needs for a forecast by the prior alone
TABLE_ORIGINS = 700.0  # its quantiles are worth so many training origins; chosen as scales.PRIOR_ORIGINS was
DRIFT_ORIGINS = 1400.0  # and no drift at all so many

# Every ticker teaches twice: within its market, and alone in stretches as short as those that users bring.
STRETCH_DAYS = (150, 250, 400)
STRETCH_LEAST_DAYS = 100
WARM_UP_DAYS = 30
FITTED_ORIGINS = 120_000
RIDGE_ORIGINS = 1600.0
PATHS = 400


@dataclass(frozen=True)
class MarketPrior:
    """A fitted prior.

    Attributes:
        scale: of kind ``prior``, for ``MOST_HORIZON`` days.
        table: (horizon, levels) quantiles of the scaled return at ``QUANTILE_LEVELS``.
        paths: (paths, horizon) scaled log returns from one origin each, as they came together.
        made_from: tickers, rows and dates by market, versions, sha256 of the prices.
    """

    scale: VolatilityScale
    table: np.ndarray
    paths: np.ndarray
    made_from: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.made_from['tickers']} tickers, {self.made_from['first_day']} to {self.made_from['last_day']}"

    def scale_for(self, horizon: int) -> VolatilityScale:
        """The scale of the first ``horizon`` days ahead.

        Raises:
            ValueError: more days ahead than the prior was made for.
        """
        if horizon > self.scale.horizon:
            raise ValueError(f"the prior reaches {self.scale.horizon} days ahead, not {horizon}")
        rows = {name: getattr(self.scale, name)[:horizon] for name in ("coefficients", "centre", "spread")}
        return VolatilityScale("prior", horizon, **rows, usual=self.scale.usual)

    def moved_table(self, own: np.ndarray, origins: int) -> np.ndarray:
        """Its quantiles, moved toward those of a ticker's own days.

        Args:
            own: (horizon, levels) quantiles of the scaled return at ``QUANTILE_LEVELS``.
            origins: how many training origins they rest on.
        """
        return self.table[: len(own)] + origins / (origins + TABLE_ORIGINS) * (own - self.table[: len(own)])

    def save(self, path: Path) -> None:
        """Write it as JSON, an input or a day ahead a line; the same prior makes the same bytes."""
        columns = zip(
            *(_columns(part) for part in (self.scale.centre, self.scale.spread, self.scale.coefficients)), strict=True
        )
        inputs = {name: dict(zip(("centre", "spread", "coefficients"), parts, strict=True))
                  for name, parts in zip(HARX_INPUTS, columns, strict=True)}  # fmt: skip
        parts = {
            "made_from": self.made_from,
            "usual_surprise": _rounded(self.scale.usual),
            "levels": QUANTILE_LEVELS,
            "inputs": inputs,
            "quantiles": [list(map(_rounded, row)) for row in self.table],
            "paths_in_hundredths": np.rint(100.0 * self.paths).astype(int).tolist(),
        }
        write_text(path, "{\n" + ",\n".join(f'"{name}": {_lines(part)}' for name, part in parts.items()) + "\n}\n")


def _columns(rows: tuple[tuple[float, ...], ...]) -> Iterator[list[float]]:
    """Down the days ahead; one number where they are all the same."""
    for column in zip(*rows, strict=True):
        values = list(map(_rounded, column))
        yield values[:1] if len(set(values)) == 1 else values


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _lines(part: Any) -> str:
    if isinstance(part, dict):
        return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in part.items()) + "\n}"
    if isinstance(part, list):
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in part) + "\n]"
    return json.dumps(part)


def load_prior(path: Path = BUILTIN) -> MarketPrior:
    """Read a prior, or take the one read before from a file that is as it was.

    Raises:
        OSError: there is no such file.
        ValueError: it is no prior, or one of other inputs or quantiles than this version has.
    """
    return _read(path, path.stat().st_mtime_ns)


@functools.cache
def _read(path: Path, _written_ns: int) -> MarketPrior:
    content = json_of(path.read_text(encoding="utf-8"))
    try:
        if tuple(content["inputs"]) != HARX_INPUTS or tuple(content["levels"]) != QUANTILE_LEVELS:
            raise ValueError("it was made for other inputs or quantiles")
        table = np.array(content["quantiles"], dtype=float)
        paths = np.array(content["paths_in_hundredths"], dtype=float) / 100.0
        horizon = len(table)
        fields: dict[str, Any] = {}
        for name in ("centre", "spread", "coefficients"):
            columns = [
                np.broadcast_to(np.array(entry[name], dtype=float), horizon) for entry in content["inputs"].values()
            ]
            fields[name] = tuple(map(tuple, np.stack(columns, axis=1).tolist()))
        scale = VolatilityScale("prior", horizon, **fields, usual=float(content["usual_surprise"]))
        prior = MarketPrior(scale, table, paths, content["made_from"])
        _check(prior)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"not a file of scripts/make_prior.py: {error!r}") from None
    return prior


def _check(prior: MarketPrior) -> None:
    """Raise a ValueError, or what a missing or wrong entry raises, unless forecasts and notes can be made of it."""
    tables = np.array([prior.scale.coefficients, prior.scale.centre, prior.scale.spread])
    if prior.table.shape != (prior.scale.horizon, len(QUANTILE_LEVELS)) or prior.paths.shape[1:] != tables.shape[1:2]:
        raise ValueError("its tables do not go together")
    numbers = np.concatenate([np.ravel(part) for part in (tables, prior.table, prior.paths, prior.scale.usual)])
    if not np.isfinite(numbers).all() or tables[2].min() <= 0.0 or prior.scale.usual <= 0.0:
        raise ValueError("a number in it cannot be")
    if (np.diff(prior.table, axis=1) < 0.0).any():
        raise ValueError("its quantiles do not increase")
    prior_note(prior.made_from, np.empty(0, dtype="datetime64[D]"))
    str(prior.made_from["prices_sha256"])


def prior_note(made_from: Mapping[str, Any], days: np.ndarray) -> str:
    """What a reader of a score must know: how many of the days scored a prior was made from.

    Args:
        made_from: of the prior.
        days: (n,) datetime64[D] forecast dates.
    """
    first, last = (np.datetime64(made_from[name], "D") for name in ("first_day", "last_day"))
    inside = int(np.sum((days >= first) & (days <= last)))
    whole = f"The market prior was made from {made_from['tickers']} tickers, {first} to {last}"
    if not inside:
        return f"{whole}: none of the {len(days)} days scored lies between these."
    share = "all" if inside == len(days) else f"{inside} of"
    return f"{whole}: {share} the {len(days)} days scored lie between these, and a score on them may be flattered."


def prior_named(name: str) -> MarketPrior | None:
    """The prior that ``--prior`` names: ``builtin``, ``none`` or a file of ``scripts/make_prior.py``.

    Raises:
        UserError: no such file, or one that holds no prior.
    """
    if name == "none":
        return None
    try:
        return load_prior(BUILTIN if name == "builtin" else Path(name))
    except OSError as error:
        raise UserError(f"--prior {name}: {error.strerror}; give builtin, none or a file of make_prior.py") from None
    except ValueError as error:
        raise UserError(f"--prior {name}: {error}; make it anew with scripts/make_prior.py") from None


# ----------------------------------------------------------------------------------------------------- fitting


def fit_prior(
    markets: Mapping[str, Mapping[str, pd.DataFrame]],
    before: pd.Timestamp | None = None,
    horizon: int = MOST_HORIZON,
    start: pd.Timestamp | None = None,
) -> MarketPrior:
    """Fit a prior; the same prices give the same numbers.

    Args:
        markets: name -> ticker -> its table; the tickers of one name are each other's market.
        before: nothing of this day and later ones is read.
        horizon: days ahead.
        start: nothing before this day is read.

    Raises:
        ValueError: too few days.
    """
    known = {
        name: {ticker: frame[_between(frame.index, start, before)] for ticker, frame in prices.items()}
        for name, prices in markets.items()
    }
    known = {
        name: kept for name, prices in known.items()
        if (kept := {ticker: frame for ticker, frame in prices.items() if len(frame) >= STRETCH_LEAST_DAYS})
    }  # fmt: skip
    rows = sum(len(frame) for prices in known.values() for frame in prices.values())
    if not rows:
        raise ValueError(f"no ticker has the {STRETCH_LEAST_DAYS} days that a prior is made from")
    inputs, returns = _lessons(known, horizon, every=max(1, -(-2 * rows // FITTED_ORIGINS)))
    fields: dict[str, list[Any]] = {"coefficients": [], "centre": [], "spread": []}
    scaled = np.empty_like(returns)
    for step in range(horizon):
        raw = inputs[step].astype(np.float64)
        centre, spread = centre_and_spread(raw)
        centre[:2], spread[:2] = 0.0, 1.0  # the constant, and log EWMA
        centre, spread = (np.array(list(map(_rounded, row))) for row in (centre, spread))
        columns = standardized(raw, centre, spread)
        sizes = np.maximum(np.abs(returns[:, step]), 0.1 * SCALE_FLOOR)
        fitted = np.array(list(map(_rounded, harx_regression(columns, sizes, RIDGE_ORIGINS))))
        scaled[:, step] = returns[:, step] * np.exp(-(columns @ fitted))
        for name, row in zip(fields, (fitted, centre, spread), strict=True):
            fields[name].append(tuple(row.tolist()))
    usual = _rounded(float(np.minimum(np.abs(scaled[:, 0]), SURPRISE_LIMIT).mean()))
    tables: dict[str, Any] = {name: tuple(rows) for name, rows in fields.items()}
    scale = VolatilityScale("prior", horizon, **tables, usual=usual)
    table = np.array([[_rounded(cell) for cell in row] for row in np.quantile(scaled, QUANTILE_LEVELS, axis=0).T])
    chosen = np.linspace(0, len(scaled) - 1, PATHS).astype(int)
    return MarketPrior(scale, table, np.rint(100.0 * scaled[chosen]) / 100.0, _made_from(known, len(scaled)))


def _between(index: pd.Index, start: pd.Timestamp | None, before: pd.Timestamp | None) -> np.ndarray:
    days = index.to_numpy()
    late = days >= (days.min() if start is None else start.to_numpy())
    return np.asarray(late if before is None else late & (days < before.to_numpy()))


def _lessons(
    markets: Mapping[str, Mapping[str, pd.DataFrame]], horizon: int, every: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every ``every``-th origin of all tickers: (horizon, n, inputs) in single precision, and (n, horizon) returns."""
    inputs, returns = [], []
    for prices in markets.values():
        together = markets_of(prices)
        for ticker, frame in prices.items():
            seen = [(frame, together), *((part, markets_of({ticker: part})) for part in _stretches(frame))]
            for part, market in seen:
                origins = slice(WARM_UP_DAYS, max(WARM_UP_DAYS, len(part) - horizon), every)
                found = regression_inputs(part, market.of(ticker), horizon)[:, origins]
                inputs.append(found.astype(np.float32))
                returns.append(log_returns_ahead(part["Close"].to_numpy(), horizon)[origins])
    return np.concatenate(inputs, axis=1), np.concatenate(returns)


def _stretches(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    start, number = 0, 0
    while start + STRETCH_LEAST_DAYS <= len(frame):
        days = STRETCH_DAYS[number % len(STRETCH_DAYS)]
        yield frame.iloc[start : start + days]
        start, number = start + days, number + 1


def _made_from(markets: Mapping[str, Mapping[str, pd.DataFrame]], origins: int) -> dict[str, Any]:
    frames = {f"{name}/{ticker}": frame for name, prices in markets.items() for ticker, frame in prices.items()}

    def facts(prices: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
        return {
            "tickers": list(prices),
            "rows": sum(map(len, prices.values())),
            "first_day": f"{min(frame.index[0] for frame in prices.values()):%Y-%m-%d}",
            "last_day": f"{max(frame.index[-1] for frame in prices.values()):%Y-%m-%d}",
        }

    whole = facts(frames)
    return {
        "tickers": len(frames), "rows": whole["rows"], "origins": origins, "first_day": whole["first_day"],
        "last_day": whole["last_day"], "prices_sha256": prices_sha256(frames),
        "versions": {"numpy": np.__version__, "pandas": pd.__version__, "python": platform.python_version()},
        "markets": {name: facts(prices) for name, prices in markets.items()},
    }  # fmt: skip
