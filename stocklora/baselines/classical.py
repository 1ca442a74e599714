"""Forecasters that one would otherwise pick, run through a walk-forward backtest: ARIMA, ETS, Theta, GARCH, fracast-0.

They are fitted by the packages people use (arch; statsforecast, the extra ``peers``; fracast by itself), one ticker
at a time. Nothing here looks past the origin: a model is fitted at the close of a refit day, and until the next one
its parameters stay as they are while later closes update its state.

Every model reads ``log(close / first close of its window)``, the *path*. Adjusted closes are scaled by splits and
dividends yet to come, and the optimizers behind ARIMA, ETS and Theta end elsewhere when a constant is added.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from stocklora.cli import console
from stocklora.cli.console import UserError
from stocklora.metrics.scores import median_index
from stocklora.prices.tables import log_returns_ahead
from stocklora.volatility.random_walk import centred, empirical_quantiles

_EXTRA = "pip install '.[peers]'"
# peer -> (module to import, command that installs it)
PACKAGES = {
    "autoarima": ("statsforecast", _EXTRA),
    "autoets": ("statsforecast", _EXTRA),
    "autotheta": ("statsforecast", _EXTRA),
    "garch": ("arch", "pip install arch"),
    "fracast": ("fracast", "pip install fracast"),
}
PEERS: tuple[str, ...] = tuple(PACKAGES)

# Closes that a fit reads, unless told otherwise. ARIMA, ETS and Theta have one variance for all of their window, so a
# crash four years back would widen every interval; GARCH, whose variance moves, wants many days for its tails.
WINDOW_DAYS = {"autoarima": 500, "autoets": 500, "autotheta": 500, "garch": 1000, "fracast": 1000}

LEAST_SPREAD = 1e-9  # of a forecast's quantiles: less is rounding

# The path from the window's first day to the origin -> (horizon, levels) quantiles of the log return from there.
Forecaster = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class PeerForecast:
    """A peer's forecasts of one ticker.

    Attributes:
        quantiles: (origins, horizon, levels) of the h-day log return.
        fallbacks: at how many origins the peer had no forecast and the last close stands in.
    """

    quantiles: np.ndarray
    fallbacks: int


class NoForecastError(Exception):
    """Why a peer has no forecast at an origin."""


def require_peer(name: str) -> ModuleType:
    """The package behind a peer, imported.

    Raises:
        UserError: no such peer, or its package is missing or does not load.
    """
    if name not in PACKAGES:
        raise UserError(f"there is no peer {name!r}; choose from {', '.join(PEERS)}")
    package, command = PACKAGES[name]
    try:
        with _silence():
            return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{name} needs the package {package} ({error}); run: {command}") from None


def peer_quantiles(
    name: str,
    close: np.ndarray,
    origins: Sequence[int] | np.ndarray,
    horizon: int,
    levels: Sequence[float] | np.ndarray,
    refit_every: int = 60,
    least_days: int = 250,
    max_days: int | None = None,
    ticker: str = "this ticker",
    quiet: Collection[str] = (),
) -> PeerForecast:
    """Quantiles of the h-day log return, h = 1..horizon, each from closes up to and including its origin.

    Refit days are the rows ``origins[0] + k * refit_every``: which other origins are asked for changes nothing. A
    fit reads at most ``max_days`` closes that end there; forecasts until the next refit day read the same closes and
    those since.

    Where the peer has no forecast (fewer than ``least_days`` closes, a price that never moved or is no positive
    number, a fit that failed) the last close with the centred empirical quantiles of the past returns stands in.
    One warning a call says how often and why.

    Args:
        name: one of ``PEERS``.
        close: (days,) closes of one ticker.
        origins: increasing rows of ``close``.
        horizon: days ahead.
        levels: increasing, in (0, 1).
        refit_every: days from one fit to the next.
        least_days: closes that a fit needs.
        max_days: closes that a fit reads at most; None: the peer's ``WINDOW_DAYS``.
        ticker: how the warning names the series.
        quiet: tickers that were warned of before.

    Raises:
        UserError: no such peer, or its package is missing.
        ValueError: origins, levels or window lengths that make no sense.
    """
    require_peer(name)
    close = np.asarray(close, dtype=np.float64)
    rows = np.asarray(origins, dtype=np.int64)
    shares = np.asarray(levels, dtype=np.float64)
    window_days = WINDOW_DAYS[name] if max_days is None else max_days
    if rows.size and (rows[0] < 0 or rows[-1] >= len(close) or (np.diff(rows) <= 0).any()):
        raise ValueError(f"origins must increase within 0..{len(close) - 1}")
    if not ((shares > 0.0) & (shares < 1.0)).all() or (np.diff(shares) <= 0.0).any():
        raise ValueError("levels must increase between 0 and 1")
    if horizon < 1 or refit_every < 1 or window_days < least_days:
        raise ValueError(f"{horizon=} and {refit_every=} must be positive, {window_days=} at least {least_days=}")
    with _silence():
        table, reasons = _fit_and_forecast(name, close, rows, horizon, shares, refit_every, least_days, window_days)
    if reasons and ticker not in quiet:
        why = "; ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        console.warn(
            f"{name} has no forecast at {reasons.total()} of {len(rows)} origins of {ticker} ({why}); the last close "
            f"with the quantiles of past returns stands in there"
        )
    return PeerForecast(table, reasons.total())


def _fit_and_forecast(
    name: str,
    close: np.ndarray,
    rows: np.ndarray,
    horizon: int,
    levels: np.ndarray,
    refit_every: int,
    least_days: int,
    window_days: int,
) -> tuple[np.ndarray, Counter[str]]:
    """Fit and forecast along the origins: (origins, horizon, levels), and why the last close stands in how often."""
    table = np.empty((len(rows), horizon, len(levels)))
    reasons: Counter[str] = Counter()
    refit_day = -1
    for index, origin in enumerate(rows.tolist()):
        day = origin - (origin - int(rows[0])) % refit_every
        if day != refit_day:
            refit_day, start = day, max(0, day + 1 - window_days)
            forecaster = _fit(name, close[start : day + 1], horizon, levels, least_days)
        try:
            table[index] = _forecast(forecaster, close[start : origin + 1])
        except NoForecastError as reason:
            reasons[str(reason)] += 1
            table[index] = _last_close(close[max(0, origin + 1 - window_days) : origin + 1], horizon, levels)
    return table, reasons


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No warnings from the packages: what matters in them is checked and counted here."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _path(close: np.ndarray) -> np.ndarray:
    """(days,) log close from the first day on, which needs positive numbers."""
    if not (np.isfinite(close) & (close > 0.0)).all():
        raise NoForecastError("a close that is not a positive number")
    return np.log(close / close[0])


def _fit(
    name: str, close: np.ndarray, horizon: int, levels: np.ndarray, least_days: int
) -> Forecaster | NoForecastError:
    """A peer fitted on a window; where that is not possible, why."""
    try:
        if len(close) < least_days:
            raise NoForecastError(f"fewer than {least_days} days")
        path = _path(close)
        if not path.any():
            raise NoForecastError("a price that never moved")
        if name == "garch":
            return _garch(path, horizon, levels)
        if name == "fracast":
            return _fracast(horizon, levels)
        return _statsforecast(name, path, horizon, levels)
    except NoForecastError as reason:
        return reason
    except Exception as error:  # the packages raise anything, bare Exception included; the warning quotes it
        return NoForecastError(f"the fit failed with {_described(error)}")


def _forecast(forecaster: Forecaster | NoForecastError, close: np.ndarray) -> np.ndarray:
    """(horizon, levels), in order along levels; a NoForecastError says why there is none, or none that could be one."""
    path = _path(close)
    if isinstance(forecaster, NoForecastError):
        raise NoForecastError(*forecaster.args)
    try:
        quantiles = forecaster(path)
    except Exception as error:  # as in _fit
        raise NoForecastError(f"the forecast failed with {_described(error)}") from error
    several = quantiles.shape[1] > 1
    if not np.isfinite(quantiles).all() or (several and (np.ptp(quantiles, axis=1) < LEAST_SPREAD).any()):
        raise NoForecastError("a forecast that is not finite or has no spread")
    # Sampled intervals can cross next to the median; sorting never adds to the quantile loss
    # (Chernozhukov, Fernandez-Val and Galichon, Econometrica 78, 2010).
    return np.sort(quantiles, axis=1)


def _described(error: Exception) -> str:
    return console.one_line(f"{type(error).__name__}: {error}")[:120]


def _last_close(close: np.ndarray, horizon: int, levels: np.ndarray) -> np.ndarray:
    """(horizon, levels): the baseline ``naive`` of this window; next to no spread if no return is known yet."""
    returns = log_returns_ahead(close, horizon)
    returns = returns[np.isfinite(returns).all(axis=1)]
    return centred(empirical_quantiles(returns if len(returns) else np.zeros((1, horizon)), levels), levels)


def _statsforecast(name: str, path: np.ndarray, horizon: int, levels: np.ndarray) -> Forecaster:
    """AutoARIMA, AutoETS or AutoTheta without a season.

    Quantiles are the ends of the package's own prediction intervals and, at 0.5, its point forecast. The intervals
    are normal for ARIMA and ETS; for Theta they are quantiles of 200 paths drawn with a fixed seed. ``forward`` keeps
    the fitted parameters (for ETS and Theta the first day's state too, hence a window whose start stays).
    """
    from statsforecast.models import AutoARIMA, AutoETS, AutoTheta

    model = {"autoarima": AutoARIMA, "autoets": AutoETS, "autotheta": AutoTheta}[name](season_length=1)
    model.fit(path)
    # Levels 0.05 and 0.95 are the ends of the 90% interval; rounded, so that 0.4 and 0.6 name one interval of 20%.
    widths = [round(abs(200.0 * level - 100.0), 6) for level in levels.tolist()]
    asked = sorted({width for width in widths if width}) or None
    keys = [
        "mean" if not width else f"{'lo' if level < 0.5 else 'hi'}-{width}"
        for level, width in zip(levels.tolist(), widths, strict=True)
    ]

    def forecast(path: np.ndarray) -> np.ndarray:
        answer = model.forward(y=path, h=horizon, level=asked)
        return np.stack([np.asarray(answer[key], dtype=np.float64) for key in keys], axis=1) - path[-1]

    return forecast


def _garch(path: np.ndarray, horizon: int, levels: np.ndarray) -> Forecaster:
    """GARCH(1,1) (Bollerslev, Journal of Econometrics 31, 1986) with Student t shocks and a constant mean.

    Fitted by arch on log returns in percent. Until the next refit the variance is filtered on here with the fitted
    parameters: arch's ``fix`` would start its filter from the mean of all the returns it is given, later ones
    included. The variance of the h-day return is the sum of the h forecast variances; its quantiles are taken from
    a t of the fitted degrees of freedom scaled to it. That is exact for h = 1 and an approximation beyond: a sum of
    t's has thinner tails than a t, variances that move together within the h days fatter ones.
    """
    from arch import arch_model
    from scipy import stats

    # rescale: a price that hardly moves is fitted in larger units than percent
    model = arch_model(100.0 * np.diff(path), mean="Constant", vol="GARCH", p=1, q=1, dist="t", rescale=True)
    result = model.fit(disp="off", show_warning=False)
    if result.convergence_flag != 0:
        raise NoForecastError("the fit did not converge")
    unit = 100.0 * float(result.scale)
    mean, omega, alpha, beta, freedom = (float(value) for value in np.asarray(result.params))
    last_shock, last_volatility = float(result.resid[-1]), float(result.conditional_volatility[-1])
    next_variance = omega + alpha * last_shock**2 + beta * last_volatility**2  # of the day after the fit's last
    standard = stats.t.ppf(levels, freedom) * np.sqrt((freedom - 2.0) / freedom)
    fitted_days, days = len(path), np.arange(1, horizon + 1)

    def forecast(path: np.ndarray) -> np.ndarray:
        variance = next_variance
        for daily in (unit * np.diff(path[fitted_days - 1 :])).tolist():
            variance = omega + alpha * (daily - mean) ** 2 + beta * variance
        ahead = [variance]
        for _ in range(1, horizon):
            ahead.append(omega + (alpha + beta) * ahead[-1])
        deviation = np.sqrt(np.cumsum(ahead))
        return (mean * days[:, None] + deviation[:, None] * standard[None, :]) / unit

    return forecast


def _fracast(horizon: int, levels: np.ndarray) -> Forecaster:
    """The zero-shot model fracast-0 (85 thousand parameters, carried by the package): nothing is fitted.

    It answers with quantiles 0.1 to 0.9. Other levels are read off on the scale of a standard normal: between two
    of its own by linear interpolation, beyond them on the line through its median and its outermost quantile.
    """
    from scipy import stats

    model = _fracast_model()
    own, asked = stats.norm.ppf(model.quantiles), stats.norm.ppf(levels)
    middle = median_index(np.asarray(model.quantiles))

    def forecast(path: np.ndarray) -> np.ndarray:
        # From the last close: the model works in single precision.
        answer = np.sort(np.asarray(model.forecast(path - path[-1], horizon=horizon), dtype=np.float64), axis=1)
        median = answer[:, middle : middle + 1]
        inside = np.stack([np.interp(asked, own, row) for row in answer])
        below = median + (answer[:, :1] - median) * asked / own[0]
        above = median + (answer[:, -1:] - median) * asked / own[-1]
        return np.where(asked < own[0], below, np.where(asked > own[-1], above, inside))

    return forecast


@functools.cache
def _fracast_model() -> Any:
    from fracast import FracastModel

    return FracastModel.from_pretrained(weights="fp32")  # its 8-bit default forecasts worse
