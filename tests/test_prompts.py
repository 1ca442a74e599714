"""Days as text and tokens: the exact lines, where each day ends, nothing cut, nothing from the future."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from price_tables import random_prices

from stocklora.console import UserError
from stocklora.prompts import DayEncoder, check_lengths, fit_targets_per_sequence, ohlcv_lines, returns_lines
from stocklora.windows import pack


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def table(rows):
    return pd.DataFrame(
        rows, columns=["Open", "High", "Low", "Close", "Volume"], dtype=float,
        index=pd.bdate_range("2024-01-01", periods=len(rows), name="Date"),
    )  # fmt: skip


def test_a_returns_line_by_hand():
    frame = table([[100, 101, 99, 100, 1000], [99.71, 100.65, 98.99, 100.54, 910]])
    assert returns_lines(frame) == ["", "-29 65 -101 54 91\n"]


def test_an_ohlcv_line_is_the_documents_format_rebased_to_100():
    frame = table([[10.0, 10.5, 9.5, 10.0, 5e6], [10.05, 10.23, 9.98, 10.12, 1_000_000]])
    first, second = ohlcv_lines(frame, range(2))
    assert first == "Day 1: Open=100.0, High=105.0, Low=95.0, Close=100.0, Volume=5000000\n"
    assert second == "Day 2: Open=100.5, High=102.3, Low=99.8, Close=101.2, Volume=1000000\n"


def test_no_volume_is_written_as_zero():
    assert returns_lines(table([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]))[1] == "0 0 0 0 0\n"


@pytest.mark.parametrize("prompt", ["returns", "ohlcv"])
def test_origin_tokens_are_line_ends_and_decode_to_the_lines(tokenizer, prompt):
    frame = random_prices(60)
    (sequence,) = pack("X", range(30, 50), 30, 20)
    encoder = DayEncoder(tokenizer, prompt)
    (encoded,) = encoder.encode({"X": frame}, [sequence])
    text = "".join(ohlcv_lines(frame, sequence.days) if prompt == "ohlcv" else returns_lines(frame)[1:50])
    assert tokenizer.decode(encoded.input_ids[1:]) == text
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    for count, position in enumerate(encoded.origin_tokens, start=30):
        seen = tokenizer.decode(encoded.input_ids[1 : position + 1])
        assert seen.endswith("\n")
        assert seen.count("\n") == count  # days of the sequence up to and including the origin


@given(cut=st.integers(31, 59), seed=st.integers(0, 99))
def test_lines_up_to_a_day_do_not_depend_on_later_days(cut, seed):
    frame = random_prices(60, seed)
    changed = frame.copy()
    changed.iloc[cut:] *= np.random.default_rng(seed).uniform(0.2, 5.0, (60 - cut, 5))
    assert returns_lines(frame)[:cut] == returns_lines(changed)[:cut]
    assert ohlcv_lines(frame, range(1, 60))[: cut - 1] == ohlcv_lines(changed, range(1, 60))[: cut - 1]


def test_a_returns_line_does_not_depend_on_where_the_sequence_starts(tokenizer):
    frame = random_prices(120)
    encoder = DayEncoder(tokenizer, "returns")
    packed = encoder.encode({"X": frame}, pack("X", range(30, 110), 30, 80))[0]
    for single in encoder.encode({"X": frame}, pack("X", range(30, 110), 30, 1)):
        end = packed.origin_tokens[single.sequence.origins[0] - 30]
        body = single.input_ids[1:]
        assert (packed.input_ids[end + 1 - len(body) : end + 1] == body).all()


def test_targets_fit_themselves_to_budget_context_and_data():
    assert fit_targets_per_sequence(17.0, 30, 8192, 1400, 1000) == 74 - 30 + 1
    assert fit_targets_per_sequence(17.0, 30, 1024, 1400, 1000) == 54 - 30 + 1
    assert fit_targets_per_sequence(17.0, 30, 8192, 1400, 10) == 10
    # A budget below two windows is stretched to them; the model's context is not.
    assert fit_targets_per_sequence(45.0, 30, 8192, 512, 1000) == 31
    assert fit_targets_per_sequence(45.0, 30, 1500, 512, 1000) == 1


def test_a_window_beyond_the_context_is_an_error_that_names_the_flags():
    with pytest.raises(UserError, match="--window_size or use --prompt returns"):
        fit_targets_per_sequence(45.0, 30, 1024, 1400, 100)


def test_nothing_is_truncated(tokenizer):
    encoded = DayEncoder(tokenizer, "returns").encode({"X": random_prices(120)}, pack("X", range(30, 110), 30, 80))
    check_lengths(encoded, len(encoded[0].input_ids))
    with pytest.raises(UserError, match="--targets_per_sequence"):
        check_lengths(encoded, len(encoded[0].input_ids) - 1)
