"""Sequences and splits: nothing overlaps, nothing is lost, nothing sees its future."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from price_tables import random_prices

from stocklora.cli.console import UserError
from stocklora.dataset.windows import SPLITS, choose_split_dates, last_origin, pack, split_origins
from stocklora.prices.tables import log_returns_ahead


def test_log_returns_ahead_by_hand():
    ahead = log_returns_ahead(np.array([100.0, 110.0, 99.0]), 2)
    assert ahead[0] == pytest.approx([np.log(1.1), np.log(0.99)])
    assert ahead[1, 0] == pytest.approx(np.log(0.9))
    assert np.isnan(ahead[1, 1])
    assert np.isnan(ahead[2]).all()


@given(
    start=st.integers(0, 40),
    count=st.integers(0, 200),
    window=st.integers(2, 40),
    targets=st.integers(1, 90),
)
def test_packing_covers_every_origin_once_with_a_full_window(start, count, window, targets):
    origins = range(window + start, window + start + count)
    sequences = pack("X", origins, window, targets)
    assert [origin for sequence in sequences for origin in sequence.origins] == list(origins)
    for sequence in sequences:
        assert len(sequence.origins) <= targets
        assert sequence.first_day == sequence.origins.start - window + 1 >= 1
        # A window never holds a day after its last origin.
        assert sequence.days.stop - 1 == sequence.origins[-1]


def test_one_target_a_sequence_is_one_window_a_pass():
    assert [len(sequence.days) for sequence in pack("X", range(30, 33), 30, 1)] == [30, 30, 30]


def test_fifty_targets_cost_79_days_instead_of_1500():
    (sequence,) = pack("X", range(30, 80), 30, 50)
    assert len(sequence.days) == 79


def test_packing_refuses_an_origin_without_a_window():
    with pytest.raises(ValueError, match="fewer than window_size"):
        pack("X", range(29, 40), 30, 5)


@given(
    lengths=st.lists(st.integers(120, 400), min_size=1, max_size=3),
    offsets=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    window=st.integers(2, 40),
    horizon=st.integers(1, 5),
)
def test_no_target_of_one_part_reaches_the_next(lengths, offsets, window, horizon):
    prices = {
        f"T{index}": random_prices(length, index, str(pd.Timestamp("2020-01-01") + pd.Timedelta(days=offset)))
        for index, (length, offset) in enumerate(zip(lengths, offsets, strict=False))
    }
    dates = choose_split_dates(prices, window, horizon, 0.2, 0.2)
    for frame in prices.values():
        parts = split_origins(frame, dates, window, horizon)
        for name, limit in (("train", dates.validation), ("validation", dates.test)):
            for origin in parts[name]:
                assert frame.index[origin + horizon] < limit
        for name, start in (("validation", dates.validation), ("test", dates.test)):
            assert all(frame.index[origin] >= start for origin in parts[name])
        rows = [origin for name in SPLITS for origin in parts[name]]
        assert len(rows) == len(set(rows))
        assert all(window <= origin < len(frame) - horizon for origin in rows)


def test_tickers_with_different_histories_are_cut_on_the_same_day():
    prices = {"OLD": random_prices(600, 1, "2018-01-01"), "NEW": random_prices(200, 2, "2019-06-03")}
    dates = choose_split_dates(prices, 30, 3, 0.15, 0.15)
    for frame in prices.values():
        parts = split_origins(frame, dates, 30, 3)
        assert all(frame.index[origin] < dates.validation for origin in parts["train"])


def test_split_dates_can_be_given():
    prices = {"X": random_prices(300)}
    dates = choose_split_dates(prices, 30, 3, 0.15, 0.15, "2020-09-01", "2020-11-02")
    assert (dates.validation, dates.test) == (pd.Timestamp("2020-09-01"), pd.Timestamp("2020-11-02"))


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        ("2020-11-02", "2020-09-01", "in order"),
        ("1999-01-01", "2020-09-01", "in order"),
        ("2020-09-01", "2035-01-01", "in order"),
        ("soon", "2020-09-01", "not a date"),
    ],
)
def test_bad_split_dates_are_named(validation, test, message):
    with pytest.raises(UserError, match=message):
        choose_split_dates({"X": random_prices(300)}, 30, 3, 0.15, 0.15, validation, test)


def test_too_few_days_says_what_to_do():
    with pytest.raises(UserError, match="--window_size 30 needs at least"):
        choose_split_dates({"X": random_prices(40)}, 30, 3, 0.15, 0.15)


def test_last_origin_sees_as_much_as_a_training_sequence():
    assert len(last_origin("X", 250, 30, 50).days) == 79
    assert last_origin("X", 31, 30, 50).days == range(1, 31)
