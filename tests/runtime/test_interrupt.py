"""Signals asked for and answered: the notice, the second signal, and the places where none can be caught."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from stocklora.runtime.interrupt import Interruption


def test_signals_are_caught_only_where_they_may_be() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts with `&`
    try:
        with Interruption(None) as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interruption.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.requested
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    faults: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with Interruption(None):
                pass
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not faults


def test_the_second_signal_leaves_at_once_unless_it_is_the_first_one_passed_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Interruption("once more leaves") as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as a launcher does with a terminal's Ctrl-C
        assert interruption.requested
    assert capfd.readouterr() == ("", "once more leaves\n")
    with Interruption("to stdout", descriptor=1, together_s=0.0):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr() == ("to stdout\n", "")
