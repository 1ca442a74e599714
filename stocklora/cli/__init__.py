"""Messages, settings as flags, checks."""

import sys
from types import TracebackType


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a script's first lines are still importing, before ``run_script`` can answer it: one word."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _is_script(path: str) -> bool:
    """Whether the program that runs is one of ours; another one's way to end is not ours to change."""
    name, package = path.replace("\\", "/"), __file__.replace("\\", "/").rpartition("/stocklora/")[0]
    return name.rpartition("/")[2].startswith("stocklora-") or (
        name.startswith(f"{package}/") and not name.startswith((f"{package}/tests/", f"{package}/.venv/"))
    )


if sys.excepthook is sys.__excepthook__ and _is_script(getattr(sys.modules.get("__main__"), "__file__", None) or ""):
    sys.excepthook = _say_interrupted
