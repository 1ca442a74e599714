"""Days as text and tokens: the exact lines, where each day ends, nothing cut, nothing from the future."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from price_tables import random_prices

from stocklora.cli.console import UserError
from stocklora.dataset.indicators import INDICATORS, indicator_table, number_names
from stocklora.dataset.prompts import (
    PROMPTS,
    DayEncoder,
    check_lengths,
    fit_targets_per_sequence,
    ohlcv_lines,
    returns_lines,
    volatility_before,
    words_lines,
)
from stocklora.dataset.windows import last_origin, pack
from stocklora.volatility.market import market_of, markets_of
from stocklora.volatility.scales import SCALE_FLOOR, ewma_volatility


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def table(rows):
    return pd.DataFrame(
        rows, columns=["Open", "High", "Low", "Close", "Volume"], dtype=float,
        index=pd.bdate_range("2024-01-01", periods=len(rows), name="Date"),
    )  # fmt: skip


def zscore_lines(frame):
    return returns_lines(frame, ewma_volatility(frame["Close"]))


def letter_lines(frame):
    return words_lines(frame, ewma_volatility(frame["Close"]))


def numbers(lines):
    """(lines, 5) of the lines that are not empty."""
    return np.array([[int(cell) for cell in line.split()] for line in lines if line])


def text_of(tokenizer, encoded):
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    return tokenizer.decode(encoded.input_ids[1:])


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


@pytest.mark.parametrize("prompt", PROMPTS)
def test_origin_tokens_are_line_ends_and_decode_to_the_lines(tokenizer, prompt):
    frame = random_prices(60)
    (sequence,) = pack("X", range(30, 50), 30, 20)
    encoder = DayEncoder(tokenizer, prompt)
    (encoded,) = encoder.encode({"X": frame}, [sequence])
    lines = {
        "returns": returns_lines(frame)[1:50], "zscores": zscore_lines(frame)[1:50], "words": letter_lines(frame)[1:50],
    }  # fmt: skip
    text = "".join(lines.get(prompt) or ohlcv_lines(frame, sequence.days))
    assert tokenizer.decode(encoded.input_ids[1:]) == text
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    for count, position in enumerate(encoded.origin_tokens, start=30):
        seen = tokenizer.decode(encoded.input_ids[1 : position + 1])
        assert seen.endswith("\n")
        assert seen.count("\n") == count  # days of the sequence up to and including the origin


@given(
    cut=st.integers(31, 59), seed=st.integers(0, 99), future=st.sampled_from(["changed", "shuffled", "emptied", "gone"])
)
def test_lines_up_to_a_day_do_not_depend_on_later_days(cut, seed, future):
    frame, draw = random_prices(60, seed), np.random.default_rng(seed)
    changed = frame.copy()
    if future == "changed":
        changed.iloc[cut:] *= draw.uniform(0.2, 5.0, (60 - cut, 5))
    elif future == "shuffled":
        changed.iloc[cut:] = draw.permutation(changed.iloc[cut:].to_numpy())
    elif future == "emptied":
        changed.iloc[cut:] = np.nan
    else:
        changed = changed.iloc[:cut]
    with np.errstate(invalid="ignore"):
        assert returns_lines(frame)[:cut] == returns_lines(changed)[:cut]
        assert zscore_lines(frame)[:cut] == zscore_lines(changed)[:cut]
        assert letter_lines(frame)[:cut] == letter_lines(changed)[:cut]
    assert ohlcv_lines(frame, range(1, cut)) == ohlcv_lines(changed, range(1, cut))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_up_to_an_origin_do_not_depend_on_later_days(tokenizer, prompt):
    prices = {"X": random_prices(80, 1), "Y": random_prices(80, 2)}
    encoder = DayEncoder(tokenizer, prompt, list(INDICATORS), anonymize=False)
    (encoded,) = encoder.encode(prices, pack("X", range(30, 70), 30, 40))
    for cut in (31, 45, 69):
        changed = {name: frame.copy() for name, frame in prices.items()}
        for frame in changed.values():
            frame.iloc[cut:] *= np.random.default_rng(cut).uniform(0.2, 5.0, (80 - cut, 5))
        (other,) = encoder.encode(changed, pack("X", range(30, 70), 30, 40))
        end = encoded.origin_tokens[cut - 1 - 30]
        assert other.origin_tokens[cut - 1 - 30] == end
        assert (other.input_ids[: end + 1] == encoded.input_ids[: end + 1]).all()
        assert (other.input_ids[end + 1 : end + 60] != encoded.input_ids[end + 1 : end + 60]).any()


@pytest.mark.parametrize("prompt", ["returns", "zscores", "words"])
@pytest.mark.parametrize("indicators", [(), tuple(INDICATORS)])
def test_a_line_does_not_depend_on_where_the_sequence_starts(tokenizer, prompt, indicators):
    frame = random_prices(120)
    encoder = DayEncoder(tokenizer, prompt, indicators)
    packed = encoder.encode({"X": frame}, pack("X", range(30, 110), 30, 80))[0]
    for single in encoder.encode({"X": frame}, pack("X", range(30, 110), 30, 1)):
        end = packed.origin_tokens[single.sequence.origins[0] - 30]
        body = single.input_ids[1:]
        assert (packed.input_ids[end + 1 - len(body) : end + 1] == body).all()


def test_a_zscores_line_is_in_percent_of_the_volatility_known_the_day_before():
    frame = random_prices(60, 4)
    close = frame["Close"].to_numpy()
    moves = np.diff(np.log(close)) ** 2
    lines = zscore_lines(frame)
    for row in range(20, 60):
        known = moves[: row - 1]  # returns of rows 1 .. row - 1
        weights = 0.94 ** np.arange(len(known) - 1, -1, -1.0)
        volatility = np.sqrt(weights @ known / weights.sum())
        expected = [100 * (frame[name].iloc[row] / close[row - 1] - 1) / volatility for name in frame.columns[:4]]
        assert np.abs(np.array(lines[row].split()[:4], dtype=int) - expected).max() <= 0.5 + 1e-6
    # The volume is the same share of its median in either format.
    assert (numbers(lines)[:, 4] == numbers(returns_lines(frame))[:, 4]).all()


def test_the_first_zscores_lines_are_in_percent_of_the_volatility_so_far():
    frame = random_prices(30, 4)
    lines = zscore_lines(frame)
    assert lines[0] == ""
    variances = []
    for row in range(20):
        opened, high, low, close = frame.iloc[row, :4]
        gap = np.log(opened / frame["Close"].iloc[row - 1]) if row else 0.0
        garman_klass = 0.5 * np.log(high / low) ** 2 - (2 * np.log(2) - 1) * np.log(close / opened) ** 2
        by_range = gap**2 + garman_klass
        by_close = np.log(close / frame["Close"].iloc[row - 1]) ** 2 if row else by_range
        variances.append((by_range + by_close) / 2)
        if row:
            volatility = np.sqrt(np.mean(variances))
            expected = 100 * (frame.iloc[row, :4].to_numpy() / frame["Close"].iloc[row - 1] - 1) / volatility
            assert np.abs(np.array(lines[row].split()[:4], dtype=int) - expected).max() <= 0.5 + 1e-6


@given(seed=st.integers(0, 999), volatility=st.floats(0.001, 0.1))
def test_the_first_zscores_lines_look_like_later_ones(seed, volatility):
    table = numbers(zscore_lines(random_prices(200, seed, volatility=volatility)))[:, :4]
    early, late = np.abs(table[:20]), np.abs(table[20:])
    assert early.max() < 1000  # ten times the usual move
    assert 0.4 < early.mean() / late.mean() < 2.5


STILL, UP, ON = [1, 1, 1, 1, 9], [1, 1.05, 1, 1.05, 9], [1.05, 1.1, 1, 1.02, 9]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([STILL, STILL, UP, ON], id="the first close still"),
        pytest.param([[p, p, p, p, 0] for p in (1, 1.0001, 1.03, 1.01)], id="a fund, one price a day"),
        pytest.param([*[STILL] * 60, UP, ON], id="suspended after listing"),
    ],
)
def test_zscores_of_awkward_beginnings_are_not_absurd(rows):
    # The close is at most this far from the mean of its own day and those before, and the rest not much further.
    assert np.abs(numbers(zscore_lines(table(rows)))[:, :4]).max() <= 2 * 100 * np.sqrt(2 * len(rows))


def test_a_price_that_never_moves_has_zscores_of_zero():
    assert set(zscore_lines(table([[5, 5, 5, 5, 0]] * 40))[1:]) == {"0 0 0 0 0\n"}
    still = table([[5, 5, 5, 5, 0]] * 40)
    assert (volatility_before(still, ewma_volatility(still["Close"])) == SCALE_FLOOR).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_the_shortest_tables_have_lines(rows):
    frame = random_prices(rows)
    for lines in (returns_lines(frame), zscore_lines(frame), letter_lines(frame)):
        assert len(lines) == rows
        assert lines[0] == ""


@given(seed=st.integers(0, 99), times=st.floats(0.5, 4.0))
def test_a_calm_stock_and_a_wild_one_write_alike_in_zscores(seed, times):
    calm = random_prices(120, seed, volatility=0.005)
    wild = calm.copy()
    wild.iloc[:, :4] = 50.0 * (calm.iloc[:, :4] / 50.0) ** times  # every log move is so many times as large
    one, other = numbers(zscore_lines(calm)), numbers(zscore_lines(wild))
    # A line's moves are simple returns, volatility is of log returns: large moves differ by half their size.
    assert (np.abs(one - other) <= 1 + 0.05 * np.abs(one)).all()
    # In basis points they do not write alike.
    if abs(times - 1) > 0.2:
        plain = numbers(returns_lines(calm))[:, :4], numbers(returns_lines(wild))[:, :4]
        assert np.abs(plain[0]).sum() != pytest.approx(np.abs(plain[1]).sum(), rel=0.1)


def test_a_words_line_is_sizes_in_volatilities_known_the_day_before():
    frame = random_prices(60, 4)
    volatility = volatility_before(frame, ewma_volatility(frame["Close"]))
    previous = frame["Close"].shift(1)
    lines = letter_lines(frame)
    assert lines[0] == ""
    usual = [np.median(frame["Volume"].iloc[max(0, row - 20) : row]) for row in range(1, 60)]
    for row in range(1, 60):
        day, unit = frame.iloc[row], volatility[row]
        gap, move = (np.log(day[name] / previous.iloc[row]) / unit for name in ("Open", "Close"))
        garman_klass = (
            0.5 * np.log(day["High"] / day["Low"]) ** 2
            - (2 * np.log(2) - 1) * np.log(day["Close"] / day["Open"]) ** 2
        )  # fmt: skip
        sizes = [  # the size, what the letters a and z stand for, and whether it has a sign
            (gap, 0.03, 10, True), (np.sqrt(max(garman_klass, 0)) / unit, 0.03, 10, False), (move, 0.03, 10, True),
            (day["Volume"] / usual[row - 1], 0.1, 10, False), (unit, 0.002, 0.2, False),
        ]  # fmt: skip
        for word, (size, first, last, signed) in zip(lines[row].split(), sizes, strict=True):
            stands_for = first * (last / first) ** ((ord(word[-1]) - ord("a")) / 25)
            step = (last / first) ** (0.5 / 25) * (1 + 1e-9)
            assert stands_for / step <= np.clip(abs(size), first, last) <= stands_for * step
            assert word[:-1] == ("" if not signed else "+" if size > 0 else "-")


def test_a_words_line_by_hand():
    lines = letter_lines(table([[100, 101, 99, 100, 1000], [100, 100, 100, 100, 0], [100, 109, 100, 109, 1000]]))
    assert lines[1].split()[:4] == ["-a", "a", "-a", "a"]  # nothing moved, nothing was traded
    assert lines[2].split()[2].startswith("+")
    falling = letter_lines(table([[100, 101, 99, 100, 1000], [100, 100, 91, 91, 1000]]))
    assert falling[1].split()[2].startswith("-")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_anonymous_prompt_knows_neither_ticker_nor_date(tokenizer, prompt):
    frame = random_prices(60, start="2016-01-01")
    encoder = DayEncoder(tokenizer, prompt, list(INDICATORS))
    (encoded,) = encoder.encode({"AAPL": frame}, pack("AAPL", range(30, 50), 30, 20))
    text = text_of(tokenizer, encoded)
    assert "AAPL" not in text
    assert "-01-" not in text
    # The same prices under another name, eight years later, are the same tokens.
    later = frame.set_axis(frame.index + pd.Timedelta(weeks=418))
    (other,) = encoder.encode({"KO": later}, pack("KO", range(30, 50), 30, 20))
    assert (encoded.input_ids == other.input_ids).all()
    assert (encoded.origin_tokens == other.origin_tokens).all()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("ticker", ["AAPL", "BRK/B", "^GSPC", "600519.SS", "贵州茅台"])
def test_a_named_prompt_begins_with_ticker_and_first_day(tokenizer, prompt, ticker):
    frame = random_prices(60, start="2016-06-30")  # row 1 is 2016-07-01
    encoder, anonymous = (DayEncoder(tokenizer, prompt, anonymize=flag) for flag in (False, True))
    sequences = [*pack(ticker, range(30, 50), 30, 20), last_origin(ticker, 60, 30, 5)]
    for sequence, first in zip(sequences, ["2016-07-01", "2016-08-05"], strict=True):
        (encoded,) = encoder.encode({ticker: frame}, [sequence])
        (without,) = anonymous.encode({ticker: frame}, [sequence])
        header, body = text_of(tokenizer, encoded).split("\n", 1)
        assert header == f"{ticker} {first}"
        assert body == text_of(tokenizer, without)
        assert ticker not in body
        added = len(encoded.input_ids) - len(without.input_ids)
        assert (encoded.origin_tokens == without.origin_tokens + added).all()
        assert encoded.origin_tokens[-1] == len(encoded.input_ids) - 1
        for position in encoded.origin_tokens:
            assert tokenizer.decode(encoded.input_ids[position : position + 1]).endswith("\n")


@pytest.mark.parametrize("prompt", ["returns", "zscores"])
def test_indicators_stand_after_the_volume(tokenizer, prompt):
    prices = {"X": random_prices(60, 1), "Y": random_prices(60, 2)}
    names = ["range", "market", "rsi"]
    (encoded,) = DayEncoder(tokenizer, prompt, names).encode(prices, pack("X", range(30, 50), 30, 20))
    cells = indicator_table(prices["X"], names, market_of(prices).days)
    plain = (returns_lines if prompt == "returns" else zscore_lines)(prices["X"])
    lines = text_of(tokenizer, encoded).splitlines()
    assert len(lines) == 49
    for row, line in enumerate(lines, start=1):
        assert line == plain[row].rstrip() + "".join(f" {cell}" for cell in cells[row])
        assert len(line.split()) == 5 + len(number_names(names))


def test_indicators_are_named_in_the_documents_format(tokenizer):
    frame = random_prices(60, 1)
    sequence = last_origin("X", 60, 30, 5)
    (encoded,) = DayEncoder(tokenizer, "ohlcv", ["sma", "rsi"]).encode({"X": frame}, [sequence])
    lines = text_of(tokenizer, encoded).splitlines()
    cells = indicator_table(frame, ["sma", "rsi"])[sequence.days.start :]
    assert len(lines) == len(cells) == 34
    for line, plain, (sma20, sma50, rsi) in zip(lines, ohlcv_lines(frame, sequence.days), cells, strict=True):
        assert line == f"{plain.rstrip()}, SMA20={sma20}, SMA50={sma50}, RSI14={rsi}"


def test_the_market_is_that_of_the_prices_given_unless_another_is(tokenizer):
    prices = {"X": random_prices(60, 1), "Y": random_prices(60, 2)}
    sequences = pack("X", range(30, 50), 30, 20)
    encoder = DayEncoder(tokenizer, "returns", ["market"])
    (both,) = encoder.encode(prices, sequences)
    (streamed,) = encoder.encode({"X": prices["X"]}, sequences, markets_of(prices))
    (alone,) = encoder.encode({"X": prices["X"]}, sequences)
    assert (both.input_ids == streamed.input_ids).all()
    assert text_of(tokenizer, both) != text_of(tokenizer, alone)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("indicators", [[], ["market"], ["rsi", "range"], list(INDICATORS)])
def test_tokens_per_day_are_those_of_the_last_250_lines(tokenizer, prompt, indicators):
    frame = random_prices(320)
    encoder = DayEncoder(tokenizer, prompt, indicators)
    # The sequence of the last 250 days: its own tokens, less the one before the first line.
    (encoded,) = encoder.encode({"X": frame}, [last_origin("X", 320, 200, 51)])
    assert len(encoded.sequence.days) == 250
    assert encoder.tokens_per_day(frame) == (len(encoded.input_ids) - 1) / 250
    if indicators:
        least = 2 * len(number_names(indicators))  # a blank and a digit
        assert encoder.tokens_per_day(frame) >= DayEncoder(tokenizer, prompt).tokens_per_day(frame) + least


class WithoutSome:
    """A tokenizer of single characters that knows all but some."""

    bos_token_id, eos_token_id, unk_token_id = 1, 2, 0

    def __init__(self, unknown):
        self.unknown = unknown

    def __call__(self, lines, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[0 if mark in self.unknown else ord(mark) for mark in line] for line in lines]}


def test_no_day_is_tokenized_that_no_sequence_reads():
    """Tickers with years of days are forecast from the last few; the tokens are those of a whole table."""
    tokenizer, read = WithoutSome(""), []
    call = type(tokenizer).__call__

    class Counting(WithoutSome):
        def __call__(self, lines, add_special_tokens):
            read.extend(lines)
            return call(self, lines, add_special_tokens)

    prices = {"X": random_prices(500), "Y": random_prices(400, 1)}
    last = [pack(name, range(rows - 30, rows), 30, 20)[-1] for name, rows in (("X", 500), ("Y", 400))]
    encoded = DayEncoder(Counting(""), "returns").encode(prices, last)
    assert len(read) == sum(len(sequence.days) for sequence in last)
    everything = [sequence for name in prices for sequence in pack(name, range(30, len(prices[name])), 30, 20)]
    whole = DayEncoder(tokenizer, "returns").encode(prices, [*everything, *last])[-2:]
    assert all(np.array_equal(one.input_ids, other.input_ids) for one, other in zip(encoded, whole, strict=True))


def test_a_tokenizer_that_cannot_write_the_numbers_is_refused():
    frame, sequences = random_prices(60), pack("X", range(30, 50), 30, 20)
    with pytest.raises(UserError, match="cannot write letters, digits and signs; choose another --model_path"):
        DayEncoder(WithoutSome("7"), "returns").encode({"X": frame}, sequences)


def test_a_tokenizer_that_cannot_write_the_ticker_is_told_so():
    frame, sequences = random_prices(60), pack("茅台", range(30, 50), 30, 20)
    assert DayEncoder(WithoutSome("茅"), "returns").encode({"茅台": frame}, sequences)
    with pytest.raises(UserError, match="cannot write the ticker 茅台; leave out --no-anonymize"):
        DayEncoder(WithoutSome("茅"), "returns", anonymize=False).encode({"茅台": frame}, sequences)


def test_unknown_formats_and_indicators_are_errors(tokenizer):
    with pytest.raises(ValueError, match="prompt must be one of words, returns, ohlcv, zscores, got 'prices'"):
        DayEncoder(tokenizer, "prices")
    with pytest.raises(ValueError, match="unknown indicator 'vwap'"):
        DayEncoder(tokenizer, "returns", ["vwap"]).encode({"X": random_prices(60)}, pack("X", range(30, 50), 30, 20))


def test_targets_fit_themselves_to_budget_context_and_data():
    assert fit_targets_per_sequence(17.0, 30, 8192, 1400, 1000) == 74 - 30 + 1
    assert fit_targets_per_sequence(17.0, 30, 1024, 1400, 1000) == 54 - 30 + 1
    assert fit_targets_per_sequence(17.0, 30, 8192, 1400, 10) == 10
    # A budget below two windows is stretched to them; the model's context is not.
    assert fit_targets_per_sequence(45.0, 30, 8192, 512, 1000) == 31
    assert fit_targets_per_sequence(45.0, 30, 1500, 512, 1000) == 1


def test_a_window_beyond_the_context_is_an_error_that_names_the_flags():
    with pytest.raises(UserError, match="--window_size or use --prompt words"):
        fit_targets_per_sequence(45.0, 30, 1024, 1400, 100)


def test_nothing_is_truncated(tokenizer):
    encoded = DayEncoder(tokenizer, "returns").encode({"X": random_prices(120)}, pack("X", range(30, 110), 30, 80))
    check_lengths(encoded, len(encoded[0].input_ids))
    with pytest.raises(UserError, match="--targets_per_sequence"):
        check_lengths(encoded, len(encoded[0].input_ids) - 1)
