"""What the benchmarks share: the frame of a script, a run in a process of its own, a result with the machine's facts.

A benchmark is started by path, so this file is found as ``harness``, and the project's own modules once it is imported.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))  # started by path, a script sees only its own folder


def run_benchmark(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parse, run, and turn a user's mistake into one line and exit code 2."""
    arguments = parser.parse_args(argv)
    from stocklora.cli.console import run_script

    return run_script(lambda: run(arguments))


def error_of(command: Sequence[str], name: object, cwd: Path | None = None) -> dict[str, str]:
    """Run a command in a process of its own: empty, or ``{"error": ...}`` where it said in a line why it cannot be.

    Raises:
        RuntimeError: it ended in another way; with the end of what it wrote.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode == 2:
        return {"error": done.stderr.strip().splitlines()[-1].removeprefix("error: ")}
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-4000:]}")
    return {}


def save_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, beside the facts of this machine."""
    from stocklora.runtime.files import write_json
    from stocklora.runtime.machine import machine_facts

    write_json(path, {"machine": machine_facts(), **result})
