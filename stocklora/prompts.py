"""Days into text into token ids.

Two formats. ``returns``, about 17 tokens a day, says each price as its distance from the previous
close in basis points and volume in percent of its median over the 20 days before::

    -29 65 -101 54 91

``ohlcv``, about 45 tokens a day, is the documents' line, rebased so that the sequence's first close is 100::

    Day 1: Open=100.5, High=102.3, Low=99.8, Close=101.2, Volume=1000000

Neither names the ticker or a date: a base model may remember those. Every line is tokenized by itself
and the ids are joined, so a day's tokens never depend on its neighbours, and its last token is always
the line's end: that is where the model makes its forecast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stocklora.console import UserError
from stocklora.windows import DaySequence

PROMPTS = ("returns", "ohlcv")
VOLUME_MEDIAN_DAYS = 20
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
    """Writes days as text and token ids for one tokenizer and format."""

    def __init__(self, tokenizer: Any, prompt: str) -> None:
        if prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
        self.tokenizer = tokenizer
        self.prompt = prompt
        # One token before the first day: models trained with it park unused attention there.
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.prefix_ids: list[int] = [] if first is None else [int(first)]

    def encode(self, prices: Mapping[str, pd.DataFrame], sequences: Sequence[DaySequence]) -> list[EncodedSequence]:
        """Token ids of every sequence, in order.

        Raises:
            UserError: the tokenizer cannot write a line (an unknown token would hide the numbers).
        """
        cached: dict[str, list[list[int]]] = {}
        encoded = []
        for sequence in sequences:
            frame = prices[sequence.ticker]
            if self.prompt == "returns":
                if sequence.ticker not in cached:
                    cached[sequence.ticker] = self._tokenize(returns_lines(frame))
                lines = cached[sequence.ticker][sequence.days.start : sequence.days.stop]
            else:
                lines = self._tokenize(ohlcv_lines(frame, sequence.days))
            encoded.append(self._join(sequence, lines))
        return encoded

    def tokens_per_day(self, frame: pd.DataFrame) -> float:
        """Mean tokens of a day line over the last days of ``frame`` (no more than 250)."""
        days = range(max(1, len(frame) - 250), len(frame))
        text = returns_lines(frame)[days.start :] if self.prompt == "returns" else ohlcv_lines(frame, days)
        return sum(map(len, self._tokenize(text))) / len(days)

    def _tokenize(self, lines: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(lines, add_special_tokens=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        ends = {self.tokenizer.eos_token_id, self.tokenizer.bos_token_id}
        if unknown is not None and unknown not in ends and any(unknown in line for line in ids):
            raise UserError("the base model's tokenizer cannot write digits and signs; choose another --model_path")
        return ids

    def _join(self, sequence: DaySequence, lines: Sequence[list[int]]) -> EncodedSequence:
        ends = len(self.prefix_ids) + np.cumsum([len(line) for line in lines]) - 1
        flat = self.prefix_ids + [token for line in lines for token in line]
        return EncodedSequence(sequence, np.array(flat, dtype=np.int64), ends[-len(sequence.origins) :])


def returns_lines(frame: pd.DataFrame) -> list[str]:
    """A line for every row of ``frame``; row 0, which has no previous close, gets an empty one.

    A line depends on its own day and earlier ones alone, and not on where a sequence starts.
    """
    previous = frame["Close"].shift(1)
    moves = [
        np.clip(np.rint(1e4 * (frame[name] / previous - 1.0).fillna(0.0).to_numpy()), -LIMIT_BP, LIMIT_BP)
        for name in ("Open", "High", "Low", "Close")
    ]
    usual = frame["Volume"].shift(1).rolling(VOLUME_MEDIAN_DAYS, min_periods=1).median().to_numpy()
    volume = frame["Volume"].to_numpy()
    # Indices and currencies have no volume: 0 of 0 is written as 0.
    share = np.divide(100.0 * volume, usual, out=np.zeros(len(frame)), where=usual > 0)
    table = np.stack([*moves, np.clip(np.rint(share), 0, LIMIT_BP)], axis=1).astype(np.int64)
    return [""] + [f"{o} {h} {low} {c} {v}\n" for o, h, low, c, v in table[1:].tolist()]


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
            f"{context_tokens} this base model can read; lower --window_size or use --prompt returns"
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
