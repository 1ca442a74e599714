"""The forms of a day's line that ``bench/reading.py`` compares: the package's own, and others that only stand here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

WARM_DAYS, TARGET_DAYS = 66, 44  # of a sequence: read before the first origin, and forecast from


def package_lines(prompt: str) -> Callable[[Any], list[str]]:
    def lines(frame: Any) -> list[str]:
        from stocklora.dataset.prompts import DayEncoder

        return DayEncoder(_NoTokenizer(), prompt)._lines(frame)  # the package's own text, whatever it is

    return lines


class _NoTokenizer:
    bos_token_id = eos_token_id = None


def changed_numbers(change: Callable[[int], str]) -> Callable[[Any], list[str]]:
    """``returns`` with each of its numbers written in another way."""

    def lines(frame: Any) -> list[str]:
        from stocklora.dataset.prompts import returns_lines

        return [line and " ".join(change(int(cell)) for cell in line.split()) + "\n" for line in returns_lines(frame)]

    return lines


def two_digits(number: int) -> str:
    unit = 10 ** max(0, len(str(abs(number))) - 2)
    return str(round(number / unit) * unit)


def with_range(alone: bool) -> Callable[[Any], list[str]]:
    """``returns`` and the day's range in basis points behind it; alone: range and return, nothing else."""

    def lines(frame: Any) -> list[str]:
        from stocklora.dataset.indicators import indicator_table
        from stocklora.dataset.prompts import returns_lines

        ranges = indicator_table(frame, ["range"])[:, 0].tolist()
        written = zip(returns_lines(frame), ranges, strict=True)
        if alone:
            return [line and f"{size} {line.split()[3]}\n" for line, size in written]
        return [line and f"{line.rstrip()} {size}\n" for line, size in written]

    return lines


def words_in_percent(frame: Any) -> list[str]:
    """``words`` in percent of the price, in place of volatilities."""
    import numpy as np

    from stocklora.dataset.prompts import words_lines

    return words_lines(frame, np.full(len(frame), 0.01))


FORMS: dict[str, Callable[[Any], list[str]] | None] = {
    "returns": package_lines("returns"),
    "zscores": package_lines("zscores"),
    "words": package_lines("words"),
    "words%": words_in_percent,
    "ohlcv": None,  # its lines depend on the sequence
    "rounded": changed_numbers(two_digits),
    "fixed": changed_numbers(lambda number: f"{number:+05d}"),
    "returns+range": with_range(alone=False),
    "range,return": with_range(alone=True),
}


class Encoder:
    """Days of a form as tokens: ids of a sequence, and the end and length of each line."""

    def __init__(self, tokenizer: Any, form: str) -> None:
        self.tokenizer, self.form = tokenizer, form
        self._known: dict[str, list[list[int]]] = {}

    def sequence(self, name: str, frame: Any, first: int) -> tuple[Any, Any, Any]:
        import numpy as np

        from stocklora.dataset.prompts import ohlcv_lines

        days = slice(first - WARM_DAYS + 1, first + TARGET_DAYS)
        make = FORMS[self.form]
        if make is None:
            lines = self._tokens(ohlcv_lines(frame, range(days.start, days.stop)))
        else:
            if name not in self._known:
                self._known[name] = self._tokens(make(frame))
            lines = self._known[name][days]
        lengths = np.array([len(line) for line in lines])
        ids = [self.tokenizer.bos_token_id or 0, *itertools.chain.from_iterable(lines)]
        return np.array(ids), np.cumsum(lengths), lengths

    def _tokens(self, lines: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(lines, add_special_tokens=False)["input_ids"]
        return ids
