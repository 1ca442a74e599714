"""Indicators: each against its formula written out here, and nothing in them from later days."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from price_tables import random_prices

from stocklora.dataset.indicators import INDICATORS, LIMIT, indicator_table, number_names
from stocklora.volatility.market import market_of

OWN = [name for name in INDICATORS if name != "market"]  # those of the ticker's own prices
COLUMNS = ["Open", "High", "Low", "Close", "Volume"]


def table(rows: list[list[float]]) -> pd.DataFrame:
    index = pd.bdate_range("2024-01-01", periods=len(rows), name="Date")
    return pd.DataFrame(rows, columns=COLUMNS, dtype=float, index=index)


def closes(*values: float) -> pd.DataFrame:
    """Days of one price each."""
    return table([[value, value, value, value, 1000.0] for value in values])


def column(frame: pd.DataFrame, name: str, number: str) -> np.ndarray:
    return indicator_table(frame, [name])[:, number_names([name]).index(number)]


def assert_rounded(found: np.ndarray, expected: np.ndarray) -> None:
    """``found`` are the whole numbers nearest to ``expected``."""
    assert found.dtype == np.int64
    assert len(found) == len(expected)
    assert np.abs(found - expected).max() <= 0.5 + 1e-6


def simple_average(values: np.ndarray, days: int) -> np.ndarray:
    return np.array([values[max(0, t - days + 1) : t + 1].mean() for t in range(len(values))])


def exponential_average(values: np.ndarray, keep: float) -> np.ndarray:
    """Weights 1, keep, keep**2, ... from the newest day back, over the days there are, summing to one."""
    averages = []
    for t in range(len(values)):
        weights = keep ** np.arange(t, -1, -1.0)
        averages.append(weights @ values[: t + 1] / weights.sum())
    return np.array(averages)


def recursive_average(values: np.ndarray, new: float, seed_days: int) -> np.ndarray:
    """The textbooks' recursion: the first value is a plain mean, then ``new`` of each day comes in; NaN before."""
    averages = np.full(len(values), np.nan)
    averages[seed_days - 1] = values[:seed_days].mean()
    for t in range(seed_days, len(values)):
        averages[t] = averages[t - 1] + new * (values[t] - averages[t - 1])
    return averages


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return random_prices(700, seed=3)


def test_returns_over_a_week_and_a_month_or_the_days_there_are(frame: pd.DataFrame) -> None:
    close = frame["Close"].to_numpy()
    for days in (5, 22):
        expected = [1e4 * (close[t] / close[max(0, t - days)] - 1.0) for t in range(len(close))]
        assert_rounded(column(frame, "returns", f"Return{days}"), np.array(expected))
    assert indicator_table(closes(100, 101, 102, 103, 104, 110), ["returns"]).tolist()[-1] == [1000, 1000]


def test_distance_from_the_simple_average(frame: pd.DataFrame) -> None:
    close = frame["Close"].to_numpy()
    for days in (20, 50):
        expected = 1e4 * (close / simple_average(close, days) - 1.0)
        assert_rounded(column(frame, "sma", f"SMA{days}"), expected)
    assert indicator_table(closes(100, 100, 106), ["sma"]).tolist()[-1] == [392, 392]  # 106 / 102


def test_distance_from_the_exponential_average(frame: pd.DataFrame) -> None:
    close = frame["Close"].to_numpy()
    for days in (12, 26):
        found = column(frame, "ema", f"EMA{days}")
        assert_rounded(found, 1e4 * (close / exponential_average(close, 1.0 - 2.0 / (days + 1)) - 1.0))
        # The usual recursion begins from a plain mean; after the warm-up there is no difference.
        usual = recursive_average(close, 2.0 / (days + 1), days)
        assert_rounded(found[350:], (1e4 * (close / usual - 1.0))[350:])


def test_rsi_is_wilders(frame: pd.DataFrame) -> None:
    change = np.diff(frame["Close"].to_numpy())
    up, down = np.maximum(change, 0.0), np.maximum(-change, 0.0)
    found = column(frame, "rsi", "RSI14")
    # Wilder begins from a plain mean of 14 changes; after the warm-up there is no difference.
    strength = recursive_average(up, 1 / 14, 14) / recursive_average(down, 1 / 14, 14)
    assert_rounded(found[350:], (100.0 - 100.0 / (1.0 + strength))[349:])
    ups, downs = exponential_average(up, 13 / 14), exponential_average(down, 13 / 14)
    assert_rounded(found[1:], 100.0 * ups / (ups + downs))
    assert found[0] == 50


def test_rsi_at_its_ends() -> None:
    assert column(closes(100, 101, 102, 103), "rsi", "RSI14").tolist() == [50, 100, 100, 100]
    assert column(closes(100, 99, 98, 97), "rsi", "RSI14").tolist() == [50, 0, 0, 0]


def test_macd_is_the_histogram_of_12_26_9(frame: pd.DataFrame) -> None:
    close = frame["Close"].to_numpy()
    found = column(frame, "macd", "MACD")
    line = exponential_average(close, 11 / 13) - exponential_average(close, 25 / 27)
    assert_rounded(found, 1e4 * (line - exponential_average(line, 0.8)) / close)
    usual = (recursive_average(close, 2 / 13, 12) - recursive_average(close, 2 / 27, 26))[25:]
    signal = recursive_average(usual, 0.2, 9)
    assert_rounded(found[400:], (1e4 * (usual - signal) / close[25:])[375:])


def test_bollinger_is_the_width_of_20_days_and_two_deviations(frame: pd.DataFrame) -> None:
    close = frame["Close"].to_numpy()
    expected = []
    for t in range(len(close)):
        window = close[max(0, t - 19) : t + 1]
        middle = window.sum() / len(window)
        deviation = np.sqrt(((window - middle) ** 2).sum() / len(window))  # of the population, as Bollinger's
        upper, lower = middle + 2.0 * deviation, middle - 2.0 * deviation
        expected.append(1e4 * (upper - lower) / middle)
    assert_rounded(column(frame, "bollinger", "Bollinger"), np.array(expected))
    assert column(closes(99, 101), "bollinger", "Bollinger").tolist() == [0, 400]


def test_atr_is_wilders(frame: pd.DataFrame) -> None:
    high, low, close = (frame[name].to_numpy() for name in ("High", "Low", "Close"))
    true_range = [high[0] - low[0]] + [
        max(high[t] - low[t], abs(high[t] - close[t - 1]), abs(low[t] - close[t - 1])) for t in range(1, len(close))
    ]
    found = column(frame, "atr", "ATR14")
    usual = recursive_average(np.array(true_range), 1 / 14, 14)
    assert_rounded(found[350:], (1e4 * usual / close)[350:])
    assert_rounded(found, 1e4 * exponential_average(np.array(true_range), 13 / 14) / close)
    assert found[0] == round(1e4 * (high[0] - low[0]) / close[0])


def test_range_is_garman_klass(frame: pd.DataFrame) -> None:
    opened, high, low, close = (frame[name].to_numpy() for name in ("Open", "High", "Low", "Close"))
    # Garman and Klass 1980, equation 20, in prices relative to the opening one.
    u, d, c = np.log(high / opened), np.log(low / opened), np.log(close / opened)
    variance = 0.5 * (u - d) ** 2 - (2.0 * np.log(2.0) - 1.0) * c**2
    for days in (1, 5, 22):
        assert_rounded(column(frame, "range", f"Range{days}"), 1e4 * np.sqrt(simple_average(variance, days)))


def test_range_measures_volatility_in_basis_points_a_day() -> None:
    draw = np.random.default_rng(0)
    paths = np.exp(np.cumsum(0.02 / np.sqrt(2000) * draw.standard_normal((400, 2000)), axis=1))
    days = [[1.0, max(1.0, path.max()), min(1.0, path.min()), path[-1], 0.0] for path in paths]
    found = column(table(days), "range", "Range1").astype(float)
    # Seen at 2000 moments a day, the range falls a little short of the continuous path's.
    assert np.sqrt((found**2).mean()) == pytest.approx(200.0, rel=0.07)


def test_market_is_the_mean_over_the_tickers_present_on_that_day() -> None:
    one, late = random_prices(12, 1), random_prices(12, 3).iloc[6:]
    two = random_prices(12, 2).drop(index=pd.Timestamp("2020-01-07"))
    market = market_of({"A": one, "B": two, "C": late}).days
    found = indicator_table(one, ["market"], market)
    assert found[0].tolist() == [0, 0]  # before anything is known
    for row, date in list(enumerate(one.index))[1:]:
        moves, ranges = [], []
        for ticker in (one, two, late):
            place = ticker.index.get_indexer([date])[0]
            if place < 1:  # not there, or no day before
                continue
            day = ticker.iloc[place]
            moves.append(np.log(day["Close"] / ticker["Close"].iloc[place - 1]))
            u, d, c = (np.log(day[name] / day["Open"]) for name in ("High", "Low", "Close"))
            ranges.append(np.sqrt(0.5 * (u - d) ** 2 - (2.0 * np.log(2.0) - 1.0) * c**2))
        assert len(moves) == 1 + (date != pd.Timestamp("2020-01-07")) + (row > 6)
        # of the ranges the geometric mean
        assert_rounded(found[row], 1e4 * np.array([np.mean(moves), np.prod(ranges) ** (1 / len(ranges))]))


def test_a_day_the_market_does_not_have_is_zero() -> None:
    frame = random_prices(10)
    market = market_of({"A": frame}).days.drop(index=frame.index[5])
    assert indicator_table(frame, ["market"], market)[5].tolist() == [0, 0]


def test_columns_are_in_the_order_asked_for(frame: pd.DataFrame) -> None:
    both = indicator_table(frame, ["range", "rsi"])
    assert number_names(["range", "rsi"]) == ["Range1", "Range5", "Range22", "RSI14"]
    assert (both[:, :3] == indicator_table(frame, ["range"])).all()
    assert (both[:, 3:] == indicator_table(frame, ["rsi"])).all()
    assert indicator_table(frame, []).shape == (len(frame), 0)
    market = market_of({"X": frame}).days
    for name in INDICATORS:
        assert indicator_table(frame, [name], market).shape == (len(frame), len(number_names([name])))


FUTURES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "scaled": lambda rows, draw: rows * np.exp(draw.uniform(-9.0, 9.0, (len(rows), 1))),
    "every cell changed": lambda rows, draw: rows * np.exp(draw.uniform(-9.0, 9.0, rows.shape)),
    "shuffled": lambda rows, draw: draw.permutation(rows),
    "emptied": lambda rows, draw: np.full_like(rows, np.nan),
    "deleted": lambda rows, draw: rows[:0],
}


def with_other_future(frame: pd.DataFrame, cut: int, future: str, seed: int) -> pd.DataFrame:
    later = FUTURES[future](frame.iloc[cut:].to_numpy(), np.random.default_rng(seed))
    changed = frame.iloc[: cut + len(later)].copy()
    changed.iloc[cut:] = later
    return changed


@given(cut=st.integers(1, 89), future=st.sampled_from(sorted(FUTURES)), seed=st.integers(0, 999))
def test_nothing_of_a_day_depends_on_later_days(cut: int, future: str, seed: int) -> None:
    prices = {"A": random_prices(90, seed), "B": random_prices(90, seed + 1)}
    changed = {name: with_other_future(frame, cut, future, seed) for name, frame in prices.items()}
    before = indicator_table(prices["A"], list(INDICATORS), market_of(prices).days)
    with np.errstate(all="ignore"):
        after = indicator_table(changed["A"], list(INDICATORS), market_of(changed).days)
    assert (before[:cut] == after[:cut]).all()


@pytest.mark.parametrize("name", OWN)
def test_an_indicator_does_read_its_own_day(name: str) -> None:
    """Or the test above would hold of a table of zeros."""
    frame = random_prices(90)
    changed = frame.copy()
    changed.iloc[60, :4] *= [1.0, 1.3, 0.8, 1.2]
    assert (indicator_table(frame, [name])[60] != indicator_table(changed, [name])[60]).all()


@given(seed=st.integers(0, 99), start=st.integers(1, 40))
def test_a_table_that_begins_later_says_the_same_once_windows_are_full(seed: int, start: int) -> None:
    frame = random_prices(120, seed)
    windowed = ["returns", "sma", "bollinger", "range"]
    late = indicator_table(frame.iloc[start:], windowed)[50:]
    # Running sums may differ in their last bit, and a number on the edge of two then rounds either way.
    assert np.abs(indicator_table(frame, windowed)[start + 50 :] - late).max() <= 1


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_shortest_tables(rows: int) -> None:
    frame = random_prices(rows)
    found = indicator_table(frame, list(INDICATORS), market_of({"X": frame}).days)
    assert found.shape == (rows, len(number_names(list(INDICATORS))))
    first = dict(zip(number_names(list(INDICATORS)), found[0].tolist(), strict=True))
    known = {"RSI14": 50, "ATR14": first["ATR14"], **{f"Range{days}": first["Range1"] for days in (1, 5, 22)}}
    assert first == {name: known.get(name, 0) for name in first}
    assert first["ATR14"] > 0
    assert first["Range1"] > 0


def test_a_price_that_never_moves() -> None:
    frame = closes(*[7.0] * 80)
    frame["Volume"] = 0.0
    found = indicator_table(frame, OWN)
    still = {"RSI14": 50}
    assert (found == [still.get(name, 0) for name in number_names(OWN)]).all()
    # A range has a floor of one basis point where its logarithm is taken.
    assert indicator_table(frame, ["market"], market_of({"X": frame}).days)[1:].tolist() == [[0, 1]] * 79


def test_a_price_that_stops_moving_comes_to_rest() -> None:
    moving = random_prices(60)
    last = moving["Close"].iloc[-1]
    frame = pd.concat([moving, closes(*[last] * 400).set_axis(pd.bdate_range("2021-01-01", periods=400))])
    ends = dict(zip(number_names(OWN), indicator_table(frame, OWN)[-1].tolist(), strict=True))
    assert {name: ends[name] for name in ends if name != "RSI14"} == dict.fromkeys(set(ends) - {"RSI14"}, 0)
    # Both of Wilder's averages fade alike, so their ratio stays.
    assert ends["RSI14"] == indicator_table(moving, ["rsi"])[-1, 0]


def test_a_data_fault_is_forgotten_when_its_window_has_passed() -> None:
    frame = random_prices(150)
    faulty = frame.copy()
    faulty.iloc[40, :4] *= 1e5
    windowed = ["returns", "sma", "bollinger", "range"]
    assert np.abs(indicator_table(frame, windowed)[95:] - indicator_table(faulty, windowed)[95:]).max() <= 1


price = st.floats(1e-6, 1e9, allow_subnormal=False)


@st.composite
def wild_tables(draw: st.DrawFn) -> pd.DataFrame:
    rows = []
    for _ in range(draw(st.integers(1, 30))):
        low, opened, close, high = sorted(draw(st.tuples(price, price, price, price)))
        rows.append([opened, high, low, close, draw(st.sampled_from([0.0, 1.0, 1e15]))])
    return table(rows)


@given(frame=wild_tables())
def test_wild_prices_stay_within_four_digits(frame: pd.DataFrame) -> None:
    found = indicator_table(frame, list(INDICATORS), market_of({"X": frame}).days)
    assert found.dtype == np.int64
    assert np.abs(found).max() <= LIMIT == 9999
    rsi = number_names(list(INDICATORS)).index("RSI14")
    assert found[:, rsi].min() >= 0
    assert found[:, rsi].max() <= 100


def test_beyond_a_doubling_is_cut_to_the_limit() -> None:
    assert column(closes(1, 1, 3), "returns", "Return5").tolist() == [0, 0, 9999]
    fallen = column(closes(*[1000.0] * 30, 1.0), "returns", "Return5")
    assert fallen[-1] == -9990  # a price cannot fall further than all of it
    assert column(closes(1, 1e6), "macd", "MACD")[-1] == pytest.approx(1e4 * macd_of_two(1.0, 1e6), abs=0.5)


def macd_of_two(one: float, two: float) -> float:
    prices = np.array([one, two])
    line = exponential_average(prices, 11 / 13) - exponential_average(prices, 25 / 27)
    return float((line - exponential_average(line, 0.8))[1] / two)


def test_volume_is_not_read() -> None:
    frame = random_prices(60)
    assert (indicator_table(frame, OWN) == indicator_table(frame.assign(Volume=0.0), OWN)).all()


def test_the_input_stays_as_it_was() -> None:
    frame = random_prices(60)
    market = market_of({"X": frame}).days
    copies = frame.copy(), market.copy()
    indicator_table(frame, list(INDICATORS), market)
    pd.testing.assert_frame_equal(frame, copies[0])
    pd.testing.assert_frame_equal(market, copies[1])


def test_what_is_not_there_is_an_error() -> None:
    frame = random_prices(30)
    with pytest.raises(ValueError, match=r"unknown indicator 'vwap'; there are market, returns, sma"):
        indicator_table(frame, ["rsi", "vwap"])
    with pytest.raises(ValueError, match=r"'market' needs the market's days"):
        indicator_table(frame, ["market"])
