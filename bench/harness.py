"""What the benchmarks share: a script's frame, price files as markets, a run in a process of its own, a result's facts.

A benchmark is started by path, so this file is found as ``harness``, and the project's own modules once it is imported.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DEVELOPMENT = ROOT.parent / "shared" / "data"  # prices that are not the repository's: markets/, a file a market, and
POOL_FILE = DEVELOPMENT / "prices" / "us_large_2012_2017.csv.gz"
sys.path.insert(0, str(ROOT))  # started by path, a script sees only its own folder


def run_benchmark(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parse, run, and turn a user's mistake into one line and exit code 2."""
    arguments = parser.parse_args(argv)
    from stocklora.cli.console import run_script

    return run_script(lambda: run(arguments))


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
