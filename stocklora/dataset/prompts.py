"""Days into text into token ids.

Four formats. ``words``, about 8 tokens a day, writes the size of a number as one letter of a scale of 26, behind its
sign where it has one::

     +k j -n m o

are the overnight gap, the day's range and the return in units of the volatility known the day before, the volume over
its median of the 20 days before, and that volatility itself (``words_lines``). A model reads the size of a letter, and
not that of a row of digits. ``returns``, about 17 tokens a day, says each price as its distance from the previous close
in basis points and volume in percent of its median::

    -29 65 -101 54 91

``zscores`` says the same in percent of the volatility known the day before, so that a calm stock and a wild
one write alike (a table's first days, before which too little is known, in percent of the volatility up to
and including them). ``ohlcv``, about 45 tokens a day, is the documents' line, rebased so that the sequence's
first close is 100::

    Day 1: Open=100.5, High=102.3, Low=99.8, Close=101.2, Volume=1000000

Indicators, where asked for, stand at the line's end. No line names the ticker or a date: a base model may
remember those (``anonymize=False`` puts both before the first line). Every line is tokenized by itself
and the ids are joined, so a day's tokens never depend on its neighbours, and its last token is always
the line's end: that is where the model makes its forecast.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import UserError
from stocklora.dataset.indicators import indicator_table, number_names
from stocklora.dataset.windows import DaySequence
from stocklora.volatility.market import Markets, garman_klass_variance, market_of, markets_of
from stocklora.volatility.scales import SCALE_FLOOR, ewma_volatility

PROMPTS = ("words", "returns", "ohlcv", "zscores")
VOLUME_MEDIAN_DAYS = 20
UNKNOWN_VOLATILITY_DAYS = 20  # a volatility of fewer returns says little
WORDS = string.ascii_lowercase  # after a blank each is one token in nearly every vocabulary
# What the first and the last letter stand for; those between are as far apart as their logarithms.
MOVE_SIZES = (0.03, 10.0)  # volatilities
VOLUME_SIZES = (0.1, 10.0)  # medians
VOLATILITY_SIZES = (0.002, 0.2)  # daily log return
LIMIT_BP = 9999  # a day beyond a doubling is a data fault or a squeeze; four digits keep the line short


@dataclass(frozen=True)
class EncodedSequence:
    """A sequence as the model reads it.

    Attributes:
        input_ids: (tokens,) int64.
        origin_tokens: (targets,) position of each origin's last token.
    """

    sequence: DaySequence
    input_ids: np.ndarray
    origin_tokens: np.ndarray


class DayEncoder:
    """Writes days as text and token ids for one tokenizer and format.

    Args:
        indicators: names from ``indicators.INDICATORS``, written after the prices.
        anonymize: leave out the ticker and the first day's date.
    """

    def __init__(self, tokenizer: Any, prompt: str, indicators: Sequence[str] = (), *, anonymize: bool = True) -> None:
        if prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.indicators = tuple(indicators)
        self.anonymize = anonymize
        # One token before the first day: models trained with it park unused attention there.
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.prefix_ids: list[int] = [] if first is None else [int(first)]

    def encode(
        self, prices: Mapping[str, pd.DataFrame], sequences: Sequence[DaySequence], markets: Markets | None = None
    ) -> list[EncodedSequence]:
        """Token ids of every sequence, in order.

        Args:
            prices: ticker -> its table.
            sequences: what to encode.
            markets: of all tickers forecast together; by default of ``prices``.

        Raises:
            UserError: the tokenizer cannot write a line (an unknown token would hide the numbers).
        """
        if markets is None and "market" in self.indicators:
            markets = markets_of(prices)
        spans: dict[str, range] = {}  # the days that a ticker's sequences read: none else is tokenized
        for sequence in sequences:
            known = spans.get(sequence.ticker, sequence.days)
            first, stop = min(known.start, sequence.first_day), max(known.stop, sequence.days.stop)
            spans[sequence.ticker] = range(first, stop)
        cached: dict[str, list[list[int]]] = {}
        tails: dict[str, list[str]] = {}
        encoded = []
        for sequence in sequences:
            ticker, frame, days = sequence.ticker, prices[sequence.ticker], sequence.days
            if ticker not in tails:
                tails[ticker] = self._tails(frame, None if markets is None else markets.of(ticker).days)
            if self.prompt == "ohlcv":  # rebased to the sequence: every line is the sequence's own
                lines = self._tokenize(_joined(ohlcv_lines(frame, days), tails[ticker][days.start : days.stop]))
            else:
                span = spans[ticker]
                if ticker not in cached:
                    read = slice(span.start, span.stop)
                    cached[ticker] = self._tokenize(_joined(self._lines(frame)[read], tails[ticker][read]))
                lines = cached[ticker][days.start - span.start : days.stop - span.start]
            encoded.append(self._join(sequence, lines, frame))
        return encoded

    def _lines(self, frame: pd.DataFrame) -> list[str]:
        """Every row's line in a format whose lines do not depend on the sequence, without indicators."""
        if self.prompt == "words":
            return words_lines(frame, ewma_volatility(frame["Close"]))
        return returns_lines(frame, ewma_volatility(frame["Close"]) if self.prompt == "zscores" else None)

    def _tails(self, frame: pd.DataFrame, market: pd.DataFrame | None) -> list[str]:
        """What every row's indicators add to its line."""
        table = indicator_table(frame, self.indicators, market).tolist()
        if self.prompt == "ohlcv":
            names = number_names(self.indicators)
            return ["".join(f", {name}={cell}" for name, cell in zip(names, row, strict=True)) for row in table]
        return ["".join(f" {cell}" for cell in row) for row in table]

    def tokens_per_day(self, frame: pd.DataFrame) -> float:
        """Mean tokens of a day line over the last days of ``frame`` (no more than 250)."""
        days = range(max(1, len(frame) - 250), len(frame))
        # The ticker alone stands in for the market: its numbers are about as long.
        market = market_of({"": frame}).days if "market" in self.indicators else None
        lines = ohlcv_lines(frame, days) if self.prompt == "ohlcv" else self._lines(frame)[days.start :]
        return sum(map(len, self._tokenize(_joined(lines, self._tails(frame, market)[days.start :])))) / len(days)

    def _tokenize(
        self, lines: list[str], what: str = "letters, digits and signs", remedy: str = "choose another --model_path"
    ) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(lines, add_special_tokens=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        ends = {self.tokenizer.eos_token_id, self.tokenizer.bos_token_id}
        if unknown is not None and unknown not in ends and any(unknown in line for line in ids):
            raise UserError(f"the base model's tokenizer cannot write {what}; {remedy}")
        return ids

    def _join(self, sequence: DaySequence, lines: Sequence[list[int]], frame: pd.DataFrame) -> EncodedSequence:
        prefix = list(self.prefix_ids)
        if not self.anonymize:
            header = f"{sequence.ticker} {frame.index[sequence.first_day]:%Y-%m-%d}\n"
            prefix += self._tokenize([header], f"the ticker {sequence.ticker}", "leave out --no-anonymize")[0]
        ends = len(prefix) + np.cumsum([len(line) for line in lines]) - 1
        flat = prefix + [token for line in lines for token in line]
        return EncodedSequence(sequence, np.array(flat, dtype=np.int64), ends[-len(sequence.origins) :])


def _joined(lines: Sequence[str], tails: Sequence[str]) -> list[str]:
    """Lines with their indicators; an empty line stays empty."""
    return [line and line.rstrip("\n") + tail + "\n" for line, tail in zip(lines, tails, strict=True)]


def returns_lines(frame: pd.DataFrame, volatility: np.ndarray | None = None) -> list[str]:
    """A line for every row of ``frame``; row 0, which has no previous close, gets an empty one.

    A line depends on its own day and earlier ones alone, and not on where a sequence starts.

    Args:
        volatility: (days,) daily volatility, each day's at its close; given, prices are in percent of the day
            before's (see ``volatility_before``).
    """
    previous = frame["Close"].shift(1)
    unit = 1e-4 if volatility is None else 0.01 * volatility_before(frame, volatility)
    moves = [
        np.clip(np.rint((frame[name] / previous - 1.0).fillna(0.0).to_numpy() / unit), -LIMIT_BP, LIMIT_BP)
        for name in ("Open", "High", "Low", "Close")
    ]
    share = np.clip(np.rint(volume_percent(frame)), 0, LIMIT_BP)
    table = np.stack([*moves, share], axis=1).astype(np.int64)
    return [""] + [f"{o} {h} {low} {c} {v}\n" for o, h, low, c, v in table[1:].tolist()]


def words_lines(frame: pd.DataFrame, volatility: np.ndarray) -> list[str]:
    """A line of letters for every row of ``frame``; row 0, which has no previous close, gets an empty one.

    The overnight gap and the return from close to close with their signs, the Garman-Klass range between them, all in
    units of the volatility known the day before; the volume over its median, and that volatility.

    Args:
        volatility: (days,) daily volatility, each day's at its close.
    """
    previous = frame["Close"].shift(1)
    unit = volatility_before(frame, volatility)
    gap, move = (np.log(frame[name] / previous).to_numpy() / unit for name in ("Open", "Close"))
    day_range = np.sqrt(np.maximum(garman_klass_variance(frame), 0.0)) / unit
    columns = [
        _words(gap, MOVE_SIZES, signed=True), _words(day_range, MOVE_SIZES), _words(move, MOVE_SIZES, signed=True),
        _words(volume_percent(frame) / 100.0, VOLUME_SIZES), _words(unit, VOLATILITY_SIZES),
    ]  # fmt: skip
    return [""] + [f" {' '.join(row)}\n" for row in list(zip(*columns, strict=True))[1:]]


def _words(values: Any, sizes: tuple[float, float], signed: bool = False) -> list[str]:
    """The letter of ``WORDS`` nearest to each value's size, behind its sign if ``signed``.

    The sign is a token of its own: a model finds it at once, where it would have to learn which capitals are which.
    """
    numbers = np.nan_to_num(np.asarray(values, dtype=np.float64), posinf=0.0, neginf=0.0)
    first, last = np.log(sizes)
    place = (np.log(np.clip(np.abs(numbers), *sizes)) - first) / (last - first) * (len(WORDS) - 1)
    letters = [WORDS[at] for at in np.rint(place).astype(int).tolist()]
    if not signed:
        return letters
    return [("+" if above else "-") + letter for letter, above in zip(letters, numbers > 0.0, strict=True)]


def volume_percent(frame: pd.DataFrame) -> np.ndarray:
    """(days,) volume in percent of its median of the ``VOLUME_MEDIAN_DAYS`` before."""
    usual = frame["Volume"].shift(1).rolling(VOLUME_MEDIAN_DAYS, min_periods=1).median().to_numpy()
    # Indices and currencies have no volume: 0 of 0 is written as 0.
    return np.divide(100.0 * frame["Volume"].to_numpy(), usual, out=np.zeros(len(frame)), where=usual > 0)


def volatility_before(frame: pd.DataFrame, volatility: np.ndarray) -> np.ndarray:
    """The volatility that each day's prices are measured in: the one known at the close of the day before.

    In the first ``UNKNOWN_VOLATILITY_DAYS`` rows, and where closes have not moved, next to nothing is known.
    There it is the root mean variance of the days up to and including the row's own, a day's being the mean
    of its squared return and of its squared overnight gap plus Garman-Klass: no day is far from it by much.

    Args:
        volatility: (days,) as ``ewma_volatility`` gives it.

    Returns:
        (days,) standard deviation of the daily log return, at least ``SCALE_FLOOR``.
    """
    previous = frame["Close"].shift(1)
    by_range = np.log(frame["Open"] / previous).fillna(0.0) ** 2 + garman_klass_variance(frame)
    by_close = (np.log(frame["Close"] / previous) ** 2).fillna(by_range)
    so_far = np.sqrt((0.5 * (by_range + by_close)).expanding().mean().to_numpy())
    before = np.r_[volatility[:1], volatility[:-1]]
    unknown = (np.arange(len(frame)) < UNKNOWN_VOLATILITY_DAYS) | (before <= SCALE_FLOOR)
    return np.maximum(np.where(unknown, so_far, before), SCALE_FLOOR)


def ohlcv_lines(frame: pd.DataFrame, days: range) -> list[str]:
    """The documents' line for each of ``days``, prices rebased to 100 at the first of them."""
    part = frame.iloc[days.start : days.stop]
    factor = 100.0 / part["Close"].iloc[0]
    rows = zip(
        *[(part[name] * factor).tolist() for name in ("Open", "High", "Low", "Close")],
        part["Volume"].round().astype("int64").tolist(),
        strict=True,
    )
    return [
        f"Day {number}: Open={o:.1f}, High={h:.1f}, Low={low:.1f}, Close={c:.1f}, Volume={v}\n"
        for number, (o, h, low, c, v) in enumerate(rows, start=1)
    ]


def fit_targets_per_sequence(
    tokens_per_day: float, window_size: int, context_tokens: int, token_budget: int, available: int
) -> int:
    """The most targets whose sequence stays inside the model's context and the token budget.

    Args:
        tokens_per_day: of a day line.
        window_size: days that a forecast is made from.
        context_tokens: that the base model can read at once.
        token_budget: tokens of a sequence; stretched to two windows where it is less.
        available: targets there are; more would only pad.

    Raises:
        UserError: even one window does not fit the model's context.
    """
    # Below two windows a sequence is mostly context: long lines are worth a longer sequence.
    longest = min(context_tokens, max(token_budget, 2 * _tokens(window_size, tokens_per_day)))
    if _tokens(window_size, tokens_per_day) > context_tokens:
        raise UserError(
            f"a window of {window_size} days is about {_tokens(window_size, tokens_per_day)} tokens, more than the "
            f"{context_tokens} this base model can read; lower --window_size or use --prompt words"
        )
    days = int((longest - 1) / (tokens_per_day * 1.1))  # lines differ in length: keep a tenth in hand
    return max(1, min(days - window_size + 1, available))


def check_lengths(encoded: Sequence[EncodedSequence], context_tokens: int) -> None:
    """Nothing is ever truncated: a sequence that outgrows the context is an error.

    Raises:
        UserError: naming the longest sequence and the flags that shorten it.
    """
    longest = max(encoded, key=lambda item: len(item.input_ids))
    if len(longest.input_ids) > context_tokens:
        raise UserError(
            f"a sequence of {len(longest.sequence.days)} days is {len(longest.input_ids)} tokens, more than the "
            f"{context_tokens} this base model can read; lower --targets_per_sequence or --window_size"
        )


def _tokens(days: int, tokens_per_day: float) -> int:
    return 1 + int(np.ceil(days * tokens_per_day * 1.1))
