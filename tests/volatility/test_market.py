"""What all tickers did on a day: means by hand, the running surprise by hand, nothing from later days."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from price_tables import random_prices

from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.prices.tables import log_returns_ahead
from stocklora.volatility import scales
from stocklora.volatility.market import (
    MARKET_COLUMNS,
    SURPRISE_HALF_LIFE_DAYS,
    SURPRISE_PRIOR_DAYS,
    SURPRISE_WARM_UP_DAYS,
    Market,
    garman_klass_variance,
    market_of,
)
from stocklora.volatility.prior import prior_named
from stocklora.volatility.random_walk import fit_baselines
from stocklora.volatility.scales import ewma_volatility

USUAL = 0.8
DECAY = 0.5 ** (1 / SURPRISE_HALF_LIFE_DAYS)
SKIPPED = SURPRISE_WARM_UP_DAYS  # a ticker's first surprises, which nobody counts


def days_of(closes: Mapping[str, float], spread: float = 1.0) -> pd.DataFrame:
    """Bars that open at the close, ``spread`` times as high as low."""
    close = np.array(list(closes.values()))
    return pd.DataFrame(
        {"Open": close, "High": close * spread, "Low": close, "Close": close, "Volume": 0.0},
        index=pd.DatetimeIndex(list(closes), name="Date"),
    )


def by_hand(prices: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The market's days, date by date and ticker by ticker."""
    rows = {}
    for date in sorted(set().union(*[frame.index for frame in prices.values()])):
        cells = []
        for frame in prices.values():
            if date not in frame.index or date == frame.index[0]:
                continue
            day, before = frame.loc[date], frame.loc[: date - pd.Timedelta(days=1)].iloc[-1]
            move = np.log(day["Close"] / before["Close"])
            u, d, c = (np.log(day[name] / day["Open"]) for name in ("High", "Low", "Close"))
            deviation = np.sqrt(0.5 * (u - d) ** 2 - (2 * np.log(2) - 1) * c**2)
            cells.append([move, abs(move), np.log(max(deviation, 1e-4))])
        if cells:
            rows[date] = np.mean(cells, axis=0)
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(MARKET_COLUMNS)).rename_axis("Date")


def with_gaps(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """``frame`` without some of its days."""
    kept = np.random.default_rng(seed).random(len(frame)) < 0.7
    return frame[kept] if kept.any() else frame


def test_days_by_hand() -> None:
    wide = np.exp(0.02)
    prices = {
        "A": days_of({"2024-01-02": 100, "2024-01-03": 101, "2024-01-04": 100, "2024-01-05": 100}, wide),
        "B": days_of({"2024-01-02": 50, "2024-01-04": 52, "2024-01-05": 51}),  # no 3rd: the 4th has two days' return
        "C": days_of({"2024-01-04": 10, "2024-01-05": 11}, wide),  # begins later
    }
    days = market_of(prices).days
    assert tuple(days.columns) == MARKET_COLUMNS
    assert list(days.index) == list(pd.to_datetime(["2024-01-03", "2024-01-04", "2024-01-05"]))
    a, b, c = (np.log(parts) for parts in ([1.01, 1 / 1.01, 1.0], [1.04, 51 / 52], [1.1]))
    assert days["market_return"].tolist() == pytest.approx(
        [a[0], (a[1] + b[0]) / 2, (a[2] + b[1] + c[0]) / 3], abs=1e-15
    )
    assert days["market_size"].tolist() == pytest.approx(
        [abs(a[0]), (abs(a[1]) + abs(b[0])) / 2, (0 + abs(b[1]) + abs(c[0])) / 3]
    )
    # Garman-Klass of a bar whose open is its close: sqrt(1/2) of the log range; B's has none and stands at the floor.
    wide_range, still = np.log(np.sqrt(0.5) * 0.02), np.log(1e-4)
    assert days["market_log_range"].tolist() == pytest.approx(
        [wide_range, (wide_range + still) / 2, (2 * wide_range + still) / 3]
    )


@given(seed=st.integers(0, 999), tickers=st.integers(1, 4))
def test_days_are_means_over_the_tickers_that_have_them(seed: int, tickers: int) -> None:
    prices = {f"T{n}": with_gaps(random_prices(25, seed + n).iloc[3 * n :], seed + n) for n in range(tickers)}
    expected, found = by_hand(prices), market_of(prices).days
    assert list(found.index) == list(expected.index)
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy().reshape(-1, 3), rtol=1e-12, atol=1e-15)


def test_garman_klass_by_hand_and_never_below_zero() -> None:
    frame = random_prices(50)
    opened, high, low, close = (np.log(frame[name].to_numpy()) for name in ("Open", "High", "Low", "Close"))
    expected = 0.5 * (high - low) ** 2 - (2 * np.log(2) - 1) * (close - opened) ** 2
    np.testing.assert_allclose(garman_klass_variance(frame), expected, rtol=1e-12)
    rounded = days_of({"2024-01-02": 100})
    rounded["Close"] = 101.0  # beyond its high, as rounding may leave it
    assert garman_klass_variance(rounded).tolist() == [0.0]


def surprise_frames(seed: int = 0, rows: int = 60) -> tuple[dict[str, pd.DataFrame], dict[str, np.ndarray]]:
    """Three tickers, one with gaps and one that begins later, and a made-up scale of each."""
    prices = {
        "A": random_prices(rows, seed),
        "B": with_gaps(random_prices(rows, seed + 1), seed),
        "C": random_prices(rows, seed + 2).iloc[rows // 3 :],
    }
    draw = np.random.default_rng(seed)
    return prices, {name: 0.02 * np.exp(0.5 * draw.standard_normal(len(frame))) for name, frame in prices.items()}


def surprised(prices: Mapping[str, pd.DataFrame], scales: Mapping[str, np.ndarray]) -> Market:
    market = Market()
    for name, frame in prices.items():
        market.add_surprise(frame, scales[name])
    return market


def running_by_hand(
    prices: Mapping[str, pd.DataFrame], scales: Mapping[str, np.ndarray], index: pd.DatetimeIndex, usual: float
) -> list[float]:
    """A weighted mean written as one: every past day's mean surprise, half as heavy a half-life later."""
    daily: dict[pd.Timestamp, list[float]] = {}
    for name, frame in prices.items():
        close = frame["Close"].to_numpy()
        for row in range(1 + SKIPPED, len(frame)):
            size = abs(np.log(close[row] / close[row - 1])) / scales[name][row - 1]
            daily.setdefault(frame.index[row], []).append(min(size, 6.0))
    found = []
    for date in index:
        past = [np.mean(daily[day]) for day in sorted(daily) if day <= date]
        weights = [DECAY**age for age in range(len(past) - 1, -1, -1)]
        prior = SURPRISE_PRIOR_DAYS * DECAY ** len(past)
        found.append((prior * usual + sum(w * p for w, p in zip(weights, past, strict=True))) / (prior + sum(weights)))
    return found


@pytest.mark.parametrize("seed", [0, 7])
def test_running_surprise_by_hand(seed: int) -> None:
    prices, scales = surprise_frames(seed)
    market = surprised(prices, scales)
    for frame in prices.values():
        found = market.running_surprise(pd.DatetimeIndex(frame.index), USUAL)[0]
        np.testing.assert_allclose(
            found, running_by_hand(prices, scales, pd.DatetimeIndex(frame.index), USUAL), rtol=1e-12
        )


def test_a_running_surprise_says_of_how_many_tickers_it_is_the_mean() -> None:
    prices = {"A": random_prices(200, 1), "B": random_prices(200, 2).iloc[100:]}
    scales = {name: ewma_volatility(frame["Close"]) for name, frame in prices.items()}
    market, index = surprised(prices, scales), pd.DatetimeIndex(prices["A"].index)
    tickers = market.running_surprise(index, USUAL)[1]
    np.testing.assert_allclose(tickers[: 100 + SKIPPED], 1.0)
    assert (np.diff(tickers[101 + SKIPPED :]) > 0).all()  # B counts more with every day that it has
    assert 1.5 < tickers[-1] < 2.0
    assert (Market().running_surprise(index, USUAL)[1] == 1.0).all()


def test_running_surprise_starts_from_usual() -> None:
    prices, scales = surprise_frames()
    index = pd.DatetimeIndex(prices["A"].index)
    found = surprised(prices, scales).running_surprise(index, USUAL)[0]
    assert (found[: 1 + SKIPPED] == USUAL).all()  # before the first surprise that counts
    assert (found[1 + SKIPPED :] != USUAL).all()
    assert (Market().running_surprise(index, USUAL)[0] == USUAL).all()  # nobody was added
    before = pd.bdate_range("2010-01-01", periods=3)
    assert (surprised(prices, scales).running_surprise(before, USUAL)[0] == USUAL).all()


def test_running_surprise_follows_the_usual_it_is_asked_with() -> None:
    prices, scales = surprise_frames()
    index = pd.DatetimeIndex(prices["A"].index)
    market = surprised(prices, scales)
    for usual in (USUAL, 2.0, USUAL):
        assert (
            market.running_surprise(index, usual)[0] == surprised(prices, scales).running_surprise(index, usual)[0]
        ).all()


def test_a_scale_that_is_right_surprises_as_usual_from_the_first_day_on() -> None:
    """The first scales of a table rest on next to nothing; they must not make the first weeks look like a crash."""
    prices = {f"T{n}": random_prices(250, n) for n in range(20)}
    scales = {name: ewma_volatility(frame["Close"]) for name, frame in prices.items()}
    usual = float(np.sqrt(2 / np.pi)) * 1.03  # mean |z| of a normal, and a little for the estimated scale
    found = surprised(prices, scales).running_surprise(pd.DatetimeIndex(prices["T0"].index), usual)[0]
    assert np.abs(found / usual - 1).max() < 0.08


def test_one_crash_counts_six_scales_at_most() -> None:
    prices, scales = surprise_frames()
    crash = prices["A"].copy()
    crash.iloc[40:, :4] /= 1e6
    market, index = Market(), pd.DatetimeIndex(crash.index)
    market.add_surprise(crash, scales["A"])
    found = market.running_surprise(index, USUAL)[0]
    total, weight = found[39] * _weight(39 - SKIPPED), _weight(39 - SKIPPED)
    assert found[40] == pytest.approx((DECAY * total + 6.0) / (DECAY * weight + 1.0))


def _weight(days: int) -> float:
    return SURPRISE_PRIOR_DAYS * DECAY**days + sum(DECAY**age for age in range(days))


def test_a_date_the_market_lacks_has_the_last_days_surprise() -> None:
    prices, scales = surprise_frames()
    market = surprised(prices, scales)
    known = pd.DatetimeIndex(prices["A"].index)
    between = known[30:40] + pd.Timedelta(hours=12)
    assert (market.running_surprise(between, USUAL)[0] == market.running_surprise(known[30:40], USUAL)[0]).all()


@given(cut=st.integers(2, 59), seed=st.integers(0, 99), deleted=st.booleans())
def test_nothing_of_a_day_depends_on_later_days(cut: int, seed: int, deleted: bool) -> None:
    prices, scales = surprise_frames(seed)
    last = prices["A"].index[cut - 1]
    changed, changed_scales = {}, {}
    for name, frame in prices.items():
        place = int(frame.index.searchsorted(last, side="right"))
        other, scale = frame.copy(), scales[name].copy()
        draw = np.random.default_rng(seed)
        other.iloc[place:] *= np.exp(draw.uniform(-9, 9, (len(frame) - place, 1)))
        scale[place:] *= np.exp(draw.uniform(-9, 9, len(frame) - place))
        stop = place if deleted else len(frame)
        if stop:
            changed[name], changed_scales[name] = other.iloc[:stop], scale[:stop]
    before, after = market_of(prices).days.loc[:last], market_of(changed).days.loc[:last]
    pd.testing.assert_frame_equal(before, after, check_exact=True)
    index = pd.DatetimeIndex(prices["A"].index[:cut])
    known = surprised(prices, scales).running_surprise(index, USUAL)[0]
    assert (known == surprised(changed, changed_scales).running_surprise(index, USUAL)[0]).all()


def test_streamed_tickers_make_the_same_market_bit_for_bit() -> None:
    prices, scales = surprise_frames()
    whole = market_of(prices)
    streamed = Market()
    for name, frame in prices.items():
        streamed.add(frame.copy())
        _ = streamed.days  # asked for in between: what comes later still counts
        streamed.add_surprise(frame.copy(), scales[name])
        _ = streamed.running_surprise(pd.DatetimeIndex(frame.index), USUAL)[0]
    pd.testing.assert_frame_equal(streamed.days, whole.days, check_exact=True)
    index = pd.DatetimeIndex(prices["A"].index)
    expected = surprised(prices, scales).running_surprise(index, USUAL)[0]
    assert (streamed.running_surprise(index, USUAL)[0] == expected).all()


def test_what_is_derived_from_the_days_is_computed_once_and_anew_after_another_ticker() -> None:
    prices, _ = surprise_frames()
    market, calls = Market(), []

    def doubled(days: pd.DataFrame) -> pd.DataFrame:
        calls.append(len(days))
        return 2.0 * days

    for name in ("A", "C"):
        market.add(prices[name])
        for _ in range(3):
            pd.testing.assert_frame_equal(market.derived("doubled", doubled), 2.0 * market.days)
    assert calls == [59, 59]
    assert len(market.derived("first", lambda days: days.iloc[:1])) == 1  # another name, another computation


def test_another_order_moves_no_more_than_the_last_bits() -> None:
    prices, _ = surprise_frames()
    turned = dict(reversed(prices.items()))
    pd.testing.assert_frame_equal(market_of(prices).days, market_of(turned).days, rtol=1e-12)


def test_dates_of_another_resolution_are_the_same_dates() -> None:
    prices = {f"T{n}": random_prices(20, n) for n in range(2)}
    mixed = {"T0": prices["T0"].set_axis(prices["T0"].index.as_unit("ns")), "T1": prices["T1"]}
    one, other = market_of(prices).days, market_of(mixed).days
    assert list(one.index) == list(other.index)
    assert (one.to_numpy() == other.to_numpy()).all()


def test_the_shortest_tables() -> None:
    assert market_of({}).days.shape == (0, 3)
    assert market_of({"A": random_prices(1)}).days.shape == (0, 3)
    assert market_of({"A": random_prices(2)}).days.shape == (1, 3)
    market = Market()
    for rows in (1, 2, SKIPPED + 1):
        market.add_surprise(random_prices(rows), np.full(rows, 0.02))
    index = pd.DatetimeIndex(random_prices(30).index)
    assert (market.running_surprise(index, USUAL)[0] == USUAL).all()


def test_a_price_that_never_moves_is_finite_and_at_the_floor() -> None:
    still = days_of({f"2024-01-{day:02d}": 5.0 for day in range(1, 29)})
    market = market_of({"A": still})
    assert (market.days.to_numpy() == [0.0, 0.0, np.log(1e-4)]).all()
    market.add_surprise(still, np.full(len(still), 1e-4))
    found = market.running_surprise(pd.DatetimeIndex(still.index), USUAL)[0]
    assert (found == USUAL).all()  # a halt is not a calm


def test_the_input_stays_as_it_was() -> None:
    prices, scales = surprise_frames()
    copies = {name: frame.copy() for name, frame in prices.items()}, {n: scale.copy() for n, scale in scales.items()}
    market_of(prices)
    surprised(prices, scales)
    for name, frame in prices.items():
        pd.testing.assert_frame_equal(frame, copies[0][name])
        assert (scales[name] == copies[1][name]).all()


def test_a_tables_inputs_are_computed_once_for_all_scales_fitted_on_it(monkeypatch):
    prices = {name: random_prices(420, seed) for seed, name in enumerate(["A", "B"])}
    real, seen = scales.harx_features, []
    monkeypatch.setattr(scales, "harx_features", lambda frame, *rest: seen.append(id(frame)) or real(frame, *rest))
    origins = {name: range(70, 380) for name in prices}
    returns = {name: log_returns_ahead(frame["Close"].to_numpy(), 3) for name, frame in prices.items()}
    fit_baselines(prices, origins, returns, np.array(QUANTILE_LEVELS), scales.SCALES, {}, prior_named("builtin"))
    assert sorted(seen) == sorted(map(id, prices.values()))


def test_a_forecast_of_many_tickers_computes_their_inputs_once(monkeypatch):
    """Even where a market remembers nothing; the scales are those of each ticker asked by itself."""
    prices = {name: random_prices(80, seed) for seed, name in enumerate("ABCD")}
    scale = prior_named("builtin").scale_for(3)
    markets = scale.markets_of(prices)
    expected = {name: scale.at(frame, markets.of(name)) for name, frame in prices.items()}
    counts = []
    real = scales.harx_features
    monkeypatch.setattr("stocklora.volatility.market.REMEMBERED_BYTES", 0)
    monkeypatch.setattr(scales, "harx_features", lambda *given: counts.append(None) or real(*given))
    found = scale.on({name: prices[name] for name in "AB"}, {name: prices[name] for name in "CD"})
    assert len(counts) == 4
    assert list(found) == ["A", "B"]
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_what_a_market_remembers_is_of_the_very_table_and_bounded(monkeypatch):
    frames = [random_prices(30, seed) for seed in range(3)]
    market = market_of({"A": frames[0]})
    counts = []

    def asked(frame, horizon=3):
        return market.remembered(frame, horizon, lambda: counts.append(None) or frame["Close"].to_numpy().copy())

    assert asked(frames[0]) is asked(frames[0])
    asked(frames[0], horizon=4)
    asked(frames[0].copy())
    assert len(counts) == 3
    with pytest.raises(ValueError, match="read-only"):
        asked(frames[0])[0] = 1.0
    monkeypatch.setattr("stocklora.volatility.market.REMEMBERED_BYTES", 2 * frames[0]["Close"].to_numpy().nbytes)
    for frame in frames[1:]:
        asked(frame)
    assert len(market._remembered) == 2
    market.add(frames[1])
    assert not market._remembered  # another market now
