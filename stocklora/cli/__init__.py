"""Messages, settings as flags, checks."""

import contextlib
import os
import signal
import sys
from types import TracebackType

EXIT_INTERRUPTED = 130


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a script's first lines are still importing, before ``run_script`` can answer it: one word."""
    if issubclass(kind, KeyboardInterrupt):
        leave_at_once_if_asked_again()
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def leave_at_once_if_asked_again() -> None:
    """From now on Ctrl-C waits neither for threads nor for what else Python does at its end, and says nothing.

    Only where a script of ours is the program: another one's way to end is not ours to change.
    """
    if sys.excepthook is _say_interrupted:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))


def _is_script(path: str) -> bool:
    """Whether the program that runs is one of ours; another one's way to end is not ours to change."""
    name, package = path.replace("\\", "/"), __file__.replace("\\", "/").rpartition("/stocklora/")[0]
    return name.rpartition("/")[2].startswith("stocklora-") or (
        name.startswith(f"{package}/") and not name.startswith((f"{package}/tests/", f"{package}/.venv/"))
    )


if sys.excepthook is sys.__excepthook__ and _is_script(getattr(sys.modules.get("__main__"), "__file__", None) or ""):
    sys.excepthook = _say_interrupted
