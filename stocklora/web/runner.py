"""Runs one command of the page and writes down how it ended, whether or not the server still lives.

Started as ``python -I runner.py FOLDER``; standard library only. The folder has ``command.json``; ``log``,
``process.json`` and ``exit.json`` are written here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Run what ``command.json`` says to its end."""
    command = json.loads((folder / "command.json").read_text(encoding="utf-8"))
    # A server that was started with `&` ignores Ctrl-C, and its children would too; scripts are stopped by it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    environment = os.environ | command["environment"]
    with (folder / "log").open("ab") as log:
        try:
            child = subprocess.Popen(
                command["argv"], cwd=command["folder"], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        except OSError as error:
            log.write(f"error: cannot start: {error}\n".encode())
            _write(folder / "exit.json", {"code": 127, "ended": time.time()})
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the script, which ends by itself
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        _write(folder / "process.json", {"pid": child.pid, "runner": os.getpid()})
        code = child.wait()
    _write(folder / "exit.json", {"code": code, "ended": time.time()})


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
