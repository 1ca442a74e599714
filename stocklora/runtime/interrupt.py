"""Ctrl-C or a polite kill in the middle of a run: what is at hand is finished, and its state saved."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any


class Interruption:
    """Ctrl-C or a polite kill (SIGTERM): asked once, the run finishes its step; asked twice, it leaves at once.

    A context manager. Launchers pass a terminal's Ctrl-C on a second time, so what follows within ``together_s``
    seconds counts as the same. Outside the main thread, where signals cannot be caught, it does nothing.

    Args:
        notice: the line that answers the first signal; None in a process that stays silent.
        descriptor: of the stream that the notice goes to, by default stderr's.
    """

    def __init__(self, notice: str | None, descriptor: int = 2, together_s: float = 0.5) -> None:
        self.notice, self.descriptor, self.together_s = notice, descriptor, together_s
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._asked_at > 0.0

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == signal.SIG_IGN:  # whoever started us wants it so, as for a shell's `&`
                continue
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self._asked_at = now
            if self.notice is not None:  # not by print, which may be what was interrupted
                os.write(self.descriptor, f"{self.notice}\n".encode())
        elif now - self._asked_at > self.together_s:
            raise KeyboardInterrupt
