"""How long ``--help`` of every script takes, beside a Python that does nothing.

    python bench/startup.py                 # writes bench/results/startup.json
    python bench/startup.py --runs 21

Scripts take turns, so that whatever else the machine does falls on all of them. Ends with exit code 1
when a script is slower than the target or imports torch.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import RESULTS, ROOT

NOT_SCRIPTS = {"setup.py", "conftest.py", "lora.py", "llm_model.py"}
HEAVY = ("torch", "transformers", "pandas", "numpy", "matplotlib", "yfinance")
TARGET_S = 0.5


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11, help="timed runs a script (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "startup.json")
    return parser


def seconds_of(command: list[str]) -> float:
    """Wall time of one run, from start to exit."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def heavy_imports(script: str) -> list[str]:
    """Which of the slow packages ``--help`` imports; Python itself lists what it loads."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    return [name for name in HEAVY if name in loaded]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    from stocklora.cli.console import print_table, say
    from stocklora.runtime.files import write_json
    from stocklora.runtime.machine import machine_facts

    scripts = sorted(path.name for path in ROOT.glob("*.py") if path.name not in NOT_SCRIPTS)
    commands = {"python -c pass": [sys.executable, "-c", "pass"]}
    commands |= {name: [sys.executable, name, "--help"] for name in scripts}
    for command in commands.values():
        seconds_of(command)  # compiles what is not compiled yet
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.runs):
        for name, command in commands.items():
            times[name].append(seconds_of(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    bare_s = medians.pop("python -c pass")
    heavy = {name: heavy_imports(name) for name in scripts}

    result = {
        "what": "wall time of `python SCRIPT --help`, median",
        "machine": machine_facts(),
        "runs": arguments.runs,
        "target_s": TARGET_S,
        "bare_python_s": round(bare_s, 4),
        "scripts": {
            name: {
                "median_s": round(medians[name], 4),
                "slowest_s": round(max(times[name]), 4),
                "ratio_to_bare_python": round(medians[name] / bare_s, 2),
                "heavy_imports": heavy[name],
            }
            for name in scripts
        },
    }
    write_json(arguments.output, result)
    print_table(
        f"--help, median of {arguments.runs} runs; python -c pass takes {bare_s:.3f} s",
        ("script", "seconds", "of bare Python", "heavy imports"),
        [
            (name, f"{medians[name]:.3f}", f"{medians[name] / bare_s:.1f}x", ", ".join(heavy[name]) or "none")
            for name in scripts
        ],
    )
    say(f"saved: {arguments.output}")
    wrong = [name for name in scripts if medians[name] > TARGET_S or heavy[name]]
    if wrong:
        say(f"over {TARGET_S} s or importing too much: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
