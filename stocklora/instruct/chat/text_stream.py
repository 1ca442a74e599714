"""From token ids as they come to text that can be shown: whole characters, nothing of a stop text or behind it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are not yet a character
NO_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
THOUGHT = re.compile(r"\A(?:\s*<think>.*?|(?:(?!<think>).)*?)</think>", re.DOTALL)
NO_THOUGHT_LETTERS = "<think></think>"
# What a terminal would obey instead of showing; news from the web may hold anything, and models repeat it.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TextStream:
    """Collects the tokens of one answer.

    A Chinese character often is two or three tokens; it is held back until it is whole. The empty chain of thought
    with which reasoning models answer when they were asked not to reason is left out.

    Attributes:
        text: all that was handed out. ended: a stop text was met; further tokens change nothing.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        # Texts of ids[_start:_read] and ids[_start:] are compared: the last tokens alone may decode otherwise.
        self._start = self._read = 0
        self._head: str | None = ""  # the beginning, until it is known not to be an empty chain of thought
        self._held = ""  # decoded, and perhaps the beginning of a stop text
        self.text = ""
        self.ended = False

    def push(self, token: int) -> str:
        """The text that is certain now and was not before, often none."""
        if self.ended:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._hand_out(self._without_empty_thought(now[len(before) :]))

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        if self.ended:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        rest = self._decode(self._ids[self._start :])[len(before) :]
        self._start = self._read = len(self._ids)
        rest = self._without_empty_thought(rest)
        if self._head:
            rest, self._head = NO_THOUGHT.sub("", self._head, count=1), None
        return self._hand_out(rest, last=True)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _without_empty_thought(self, piece: str) -> str:
        if self._head is None:
            return piece
        self._head += piece
        letters = "".join(self._head.split())
        if NO_THOUGHT_LETTERS.startswith(letters):
            return ""  # may yet become one
        head, self._head = self._head, None
        return NO_THOUGHT.sub("", head, count=1) if letters.startswith(NO_THOUGHT_LETTERS) else head

    def _hand_out(self, piece: str, last: bool = False) -> str:
        self._held += piece
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            out, self._held, self.ended = self._held[: min(found)], "", True
        else:
            kept = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
            cut = len(self._held) - kept
            out, self._held = self._held[:cut], self._held[cut:]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def printable(text: str) -> str:
    """``text`` with a mark in place of every control character but line breaks and tabs."""
    return CONTROL.sub("\ufffd", text)


def holds_no_character(text: str) -> bool:
    """Whether half of a surrogate pair is in ``text``: bytes that were not UTF-8, or half of a JSON escape."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def without_reasoning(text: str) -> str:
    """An answer without the chain of thought before it, if there is one, and without blanks around it.

    Templates that open the chain of thought themselves (DeepSeek-R1's) leave only its end in the answer.
    """
    return THOUGHT.sub("", text, count=1).strip()
