"""Inputs of the ``harx`` scale: the HAR-range regression's and what else moves tomorrow's volatility.

HAR with exogenous inputs: longer memory, the overnight part, volume, the market's day, and the calendar of
each company. Companies report four times a year, mostly in the same week of the quarter; what happened
around the same day one to four quarters ago says more about the next three days than any recent day does
(the regularity behind Heston and Sadka, Journal of Financial Economics 87, 2008, in the size of moves
rather than their sign). No date enters but as a distance.

Every input at a day depends on that day and earlier ones alone. NaN means not known yet; the regression
reads it as the training days' mean.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from stocklora.volatility.market import RANGE_FLOOR, Market, garman_klass_variance

QUARTERS = (1, 2, 3, 4)
QUARTER_TRADING_DAYS = 63
QUARTER_CALENDAR_DAYS = 91  # thirteen weeks: the same weekday
NEAR_ROWS = 3  # how far, in trading days, a report may be from its place a quarter ago
NEAR_DAYS, NEAR_SPREAD_DAYS = 5, 0.8  # and in calendar days, with a bell of this width
EVENT_DAYS, EVENT_LEAST_DAYS, EVENT_SHARE = 250, 60, 0.05  # an event: among a year's strongest 5% of days

# What ``harx_features`` returns, in order; a prior's file and its explanations go by these names.
ALIKE_INPUTS = (
    "log_range_250", "log_range_500", "log_size_66", "log_size_250",
    *[f"log_overnight_{days}" for days in (1, 5, 22, 66)], "volume", "volume_5", "move_5", "move_22",
    "market_today", "market_today_size",
    *[f"market_log_range_{days}" for days in (1, 5, 22, 66)], "market_log_size_1", "market_log_size_5",
    "market_log_ewma", "market_move_5", "market_move_22",
)  # fmt: skip
AHEAD_INPUTS = (
    *[f"unrest_{quarter}_quarters_ago" for quarter in QUARTERS],
    *[f"busy_{quarter}_quarters_ago" for quarter in QUARTERS],
    "report_near", "report_near_two", "report_near_squared", "report_near_two_squared",
    "event_5_days", "event_5_days_and_near", "event_15_days", "event_15_days_and_near",
)  # fmt: skip


def harx_features(frame: pd.DataFrame, market: Market, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs that come on top of ``scales.range_features``.

    Args:
        frame: one ticker's prices.
        market: of all tickers of its exchange.
        horizon: days ahead.

    Returns:
        (days, k) inputs alike for every horizon, and (horizon, days, j) inputs about days t+1 .. t+h.
    """
    index = pd.DatetimeIndex(frame.index)
    returns = np.log(frame["Close"]).diff()
    volatility = _ewma(returns)
    size, variance = returns.abs(), garman_klass_variance(frame)
    above = _log_volume(frame)
    own = [
        *[_log_mean(variance, days, root=True) for days in (250, 500)],
        *[_log_mean(size, days) for days in (66, 250)],
        *_overnight(frame),
        above.to_numpy(),
        above.rolling(5, min_periods=1).mean().to_numpy(),
        *[_move(returns, volatility, days) for days in (5, 22)],
    ]
    shared = market.derived("harx", _market_inputs).reindex(index, method="ffill").to_numpy()
    alike = np.concatenate([np.stack(own, axis=1), shared], axis=1)
    unrest = _unrest_last_quarters(size, variance, above, horizon)
    return alike, np.concatenate([unrest, _reports_due(frame, horizon)], axis=2)


# Rolling windows are pandas'; everything between them is NumPy, a tenth of the time on columns this short.


def _ewma(returns: pd.Series) -> np.ndarray:
    return np.maximum(np.sqrt((returns**2).ewm(alpha=0.06).mean().to_numpy()), RANGE_FLOOR)


def _log_mean(series: pd.Series, days: int, root: bool = False) -> np.ndarray:
    mean = np.maximum(series.rolling(days, min_periods=1).mean().to_numpy(), 0.0)
    return np.log(np.maximum(np.sqrt(mean) if root else mean, RANGE_FLOOR))


def _move(returns: pd.Series, volatility: np.ndarray, days: int) -> np.ndarray:
    """The return over ``days`` in units of its usual size."""
    total = returns.rolling(days, min_periods=1).sum().to_numpy()
    return np.clip(total / volatility / np.sqrt(days), -4.0, 4.0)


def _overnight(frame: pd.DataFrame) -> list[np.ndarray]:
    jump = np.log(frame["Open"] / frame["Close"].shift(1)).fillna(0.0)
    return [_log_mean(jump**2, days, root=True) for days in (1, 5, 22, 66)]


def _log_volume(frame: pd.DataFrame) -> pd.Series:
    """Log volume above its median over the last 20 days; 0 where there is none."""
    volume = frame["Volume"]
    return np.log((volume + 1.0) / (volume.rolling(20, min_periods=1).median() + 1.0))


def _market_inputs(days: pd.DataFrame) -> pd.DataFrame:
    """The market's day, (dates, 11), from ``Market.days``."""
    returns, sizes, ranges = (days[name] for name in days.columns)
    volatility = _ewma(returns)
    today = np.clip(returns.to_numpy() / volatility, -4.0, 4.0)
    columns = [
        today,
        np.abs(today),
        *[ranges.rolling(span, min_periods=1).mean().to_numpy() for span in (1, 5, 22, 66)],
        *[_log_mean(sizes, span) for span in (1, 5)],
        np.log(volatility),
        *[_move(returns, volatility, span) for span in (5, 22)],
    ]
    return pd.DataFrame(np.stack(columns, axis=1), index=days.index)


def _unrest_last_quarters(size: pd.Series, variance: pd.Series, volume: pd.Series, horizon: int) -> np.ndarray:
    """How wild and how busy the days around t+1 .. t+h were, one to four quarters earlier.

    Args:
        size: (days,) absolute log returns.
        variance: (days,) Garman-Klass variance.
        volume: (days,) log volume above its median.
        horizon: days ahead.

    Returns:
        (horizon, days, 8): the wildest day of each quarter, then the busiest of each.
    """
    usual = np.maximum(np.sqrt(variance.rolling(22, min_periods=5).mean().shift(1).to_numpy()), RANGE_FLOOR)
    largest = np.maximum(np.sqrt(variance.to_numpy()), size.to_numpy())
    unrest = pd.Series(np.clip(np.log(np.maximum(largest, RANGE_FLOOR) / usual), -2.0, 3.0))
    busy = pd.Series(np.clip(volume.to_numpy(), -2.0, 3.0))
    rows = []
    for step in range(1, horizon + 1):
        columns = []
        for series in (unrest, busy):
            highest = series.rolling(step + 2 * NEAR_ROWS, min_periods=1).max().to_numpy()
            columns += [_later(highest, QUARTER_TRADING_DAYS * quarter - step - NEAR_ROWS) for quarter in QUARTERS]
        rows.append(np.stack(columns, axis=1))
    return np.stack(rows)


def _reports_due(frame: pd.DataFrame, horizon: int) -> np.ndarray:
    """How near days t+1 .. t+h are to an event's anniversary, and whether the event has just been.

    Returns:
        (horizon, days, 8)
    """
    event = _events(frame)
    near = _near_event(pd.DatetimeIndex(frame.index), event, horizon)  # (horizon, days, quarters), single days ahead
    lately = [pd.Series(event).rolling(days, min_periods=1).max().to_numpy() for days in (5, 15)]
    rows = []
    for step in range(1, horizon + 1):
        ahead = near[:step]
        mean = ahead.mean(axis=2).max(axis=0)
        both = np.sort(ahead, axis=2)[:, :, -2:].mean(axis=2).max(axis=0)  # two quarters that agree
        # A report that has just come does not come again.
        just_been = [part for recent in lately for part in (recent, recent * mean)]
        rows.append(np.stack([mean, both, mean**2, both**2, *just_been], axis=1))
    return np.stack(rows)


def _later(values: np.ndarray, days: int) -> np.ndarray:
    """Each value ``days`` rows further down, NaN before the first."""
    moved = np.full(len(values), np.nan)
    if days < len(values):
        moved[days:] = values[: len(values) - days]
    return moved


def _events(frame: pd.DataFrame) -> np.ndarray:
    """(days,) 0 to 1: how far a day stands among the strongest of its year in gap, move and volume."""
    opening = np.log(frame["Open"] / frame["Close"].shift(1)).abs()
    strength = np.maximum(0.0, _times_usual(opening) - 0.5)
    strength += np.maximum(0.0, _times_usual(np.log(frame["Close"]).diff().abs()) - 0.5)
    volume = frame["Volume"].to_numpy()
    usual = frame["Volume"].shift(1).rolling(60, min_periods=5).median().to_numpy()
    strength *= np.clip(np.log((volume + 1.0) / (usual + 1.0)), 0.0, 3.0)
    rank = pd.Series(strength).rolling(EVENT_DAYS, min_periods=EVENT_LEAST_DAYS).rank(pct=True).to_numpy()
    return np.nan_to_num(np.clip((rank - (1.0 - EVENT_SHARE)) / EVENT_SHARE, 0.0, 1.0))


def _times_usual(size: pd.Series) -> np.ndarray:
    usual = np.maximum(size.rolling(60, min_periods=10).median().shift(1).to_numpy(), 1e-3)
    return np.clip(np.log1p(size.to_numpy() / usual), 0.0, 3.5)


def _near_event(index: pd.DatetimeIndex, event: np.ndarray, horizon: int) -> np.ndarray:
    """How near each of the next weekdays is to an event's anniversary.

    Returns:
        (horizon, days, quarters) 0 to 1; 0 where the table does not reach back.
    """
    dates = index.to_numpy().astype("datetime64[D]")
    first = dates[0]
    calendar = np.zeros(int((dates[-1] - first).astype(int)) + 1)
    calendar[(dates - first).astype(int)] = event
    padded = np.pad(calendar, NEAR_DAYS)
    offsets = range(-NEAR_DAYS, NEAR_DAYS + 1)
    nearest = np.max(
        [
            padded[NEAR_DAYS + offset : NEAR_DAYS + offset + len(calendar)]
            * np.exp(-0.5 * (offset / NEAR_SPREAD_DAYS) ** 2)
            for offset in offsets
        ],
        axis=0,
    )
    rows = []
    for step in range(1, horizon + 1):
        # Weekdays rather than the table's next rows: those are the future's.
        target = np.busday_offset(dates, step, roll="backward")
        then = [(target - first).astype(int) - QUARTER_CALENDAR_DAYS * quarter for quarter in QUARTERS]
        rows.append(np.stack([np.where(at >= 0, nearest[np.clip(at, 0, None)], 0.0) for at in then], axis=1))
    return np.stack(rows)


def standardized(inputs: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Inputs in units of their spread on training days, unknown ones at their centre, within 6 spreads.

    The first two, the constant and the log EWMA volatility, are left as they are: a ticker far calmer or wilder
    than those trained on is no outlier.

    Args:
        inputs: (days, inputs).
        centre, spread: (inputs,) of the training days.
    """
    result = np.nan_to_num((inputs - centre) / spread, nan=0.0)
    result[:, 2:] = np.clip(result[:, 2:], -6.0, 6.0)
    return result


def centre_and_spread(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column means and standard deviations over training rows.

    An input that never varies has spread 1, one that is never known centre 0 as well.
    """
    known = np.isfinite(inputs)
    count = np.maximum(known.sum(axis=0), 1)
    filled = np.where(known, inputs, 0.0)
    centre = filled.sum(axis=0) / count
    spread = np.sqrt((np.where(known, inputs - centre, 0.0) ** 2).sum(axis=0) / count)
    return centre, np.where(spread > 1e-9, spread, 1.0)


def time_blocks(dates: np.ndarray, blocks: int) -> list[np.ndarray]:
    """Row masks of consecutive stretches of dates, about equal in rows, for cross-validation.

    Args:
        dates: (n,) in any order.
    """
    edges = np.quantile(dates.astype("datetime64[D]").astype(np.int64), np.linspace(0.0, 1.0, blocks + 1))
    days = dates.astype("datetime64[D]").astype(np.int64)
    place = np.clip(np.searchsorted(edges, days, side="right") - 1, 0, blocks - 1)
    return [place == block for block in range(blocks)]
