"""What the benchmarks share: a script's frame, price files as markets, a run in a process of its own, a result's facts.

A benchmark is started by path, so this file is found as ``harness``, and the project's own modules once it is imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DEVELOPMENT = ROOT.parent / "shared" / "data"  # prices that are not the repository's: markets/, a file a market, and
POOL_FILE = DEVELOPMENT / "prices" / "us_large_2012_2017.csv.gz"
ANSWER = "answer.json"  # what a process of its own leaves
sys.path.insert(0, str(ROOT))  # started by path, a script sees only its own folder


def run_benchmark(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
    work: Callable[[dict[str, Any], Path], Mapping[str, Any]] | None = None,
) -> int:
    """Parse, run, and turn a user's mistake into one line and exit code 2.

    Args:
        work: what a process of its own does for ``answer_of``, from a task and a folder to an answer.
    """
    if work is not None:
        parser.add_argument("--worker", type=Path, metavar="TASK", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    from stocklora.cli.console import run_script

    if work is None or arguments.worker is None:
        return run_script(lambda: run(arguments))

    def work_on(task: Path) -> None:
        answer = work(json.loads(task.read_text(encoding="utf-8")), task.parent)
        (task.parent / ANSWER).write_text(json.dumps(answer), encoding="utf-8")

    return run_script(lambda: work_on(arguments.worker))


def answer_of(script: str, task: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """What the ``work`` of a benchmark answers in a process of its own, so that its peak memory is its own.

    Args:
        script: the benchmark's ``__file__``.
        task: as JSON has it.
        scratch: a folder, in which it works.

    Returns:
        ``{"error": ...}`` where it said in a line why it cannot be.
    """
    path, answer = scratch / "task.json", scratch / ANSWER
    answer.unlink(missing_ok=True)
    path.write_text(json.dumps(dict(task)), encoding="utf-8")
    command = [sys.executable, str(Path(script).resolve()), "--worker", str(path.resolve())]
    return error_of(command, task, cwd=scratch) or dict(json.loads(answer.read_text(encoding="utf-8")))


class Clock:
    """Wall clock and CPU time of this process since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]


def markets_in(paths: Sequence[Path]) -> dict[str, dict[str, pd.DataFrame]]:
    """Price files, and folders of them, as markets: file's name -> ticker -> its table.

    Raises:
        UserError: a file that is not there or not whole, or two of one name.
    """
    from stocklora.cli.console import UserError
    from stocklora.prices.tables import price_files, read_prices

    markets: dict[str, dict[str, pd.DataFrame]] = {}
    for path in price_files(paths):
        name = path.name.removesuffix(".gz").removesuffix(".csv")
        if name in markets:
            raise UserError(f"{path}: another file is named {name} too, and a file is a market; rename one of them")
        markets[name] = read_prices(path)
    return markets


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
