"""What a wide backtest costs: memory and time for 50 and for 500 tickers of five years.

    python bench/backtest_scale.py                 # writes bench/results/backtest_scale.json

Each run is ``backtest.py`` in its own process on a folder of made-up prices, one file a ticker; its peak memory
is what the system saw. Memory should not grow with the number of tickers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from harness import RESULTS, ROOT, run_benchmark, save_result

DAYS = 1260
MODELS = ("naive", "drift", "ewma", "har", "harx")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tickers", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--output", type=Path, default=RESULTS / "backtest_scale.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.cli.console import print_table

    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in arguments.tickers:
            folder = Path(scratch) / f"prices-{count}"
            make_prices(folder, count)
            results.append(measure(folder, count, arguments.models, Path(scratch) / f"out-{count}"))
    rows = [(entry["tickers"], f"{entry['seconds']:.1f}", f"{entry['tickers_per_s']:.1f}", f"{entry['peak_mb']:,.0f}",
             f"{entry['forecasts']:,}") for entry in results]  # fmt: skip
    print_table("Backtest", ("tickers", "seconds", "tickers/s", "peak MB", "forecasts"), rows)
    save_result(arguments.output, {"days": DAYS, "models": arguments.models, "runs": results})
    return 0


def make_prices(folder: Path, count: int, rows: int = DAYS) -> None:
    """Random walks whose volatility walks too, a file a ticker."""
    import numpy as np
    import pandas as pd

    folder.mkdir()
    draw = np.random.default_rng(0)
    days = pd.bdate_range("2018-01-01", periods=rows).strftime("%Y-%m-%d")
    for number in range(count):
        volatility = 0.01 * np.exp(0.1 * np.cumsum(0.1 * draw.standard_normal(rows)))
        close = 50.0 * np.exp(np.cumsum(volatility * draw.standard_normal(rows)))
        opened = np.r_[close[:1], close[:-1]] * np.exp(0.3 * volatility * draw.standard_normal(rows))
        high = np.maximum(opened, close) * np.exp(0.5 * volatility * draw.random(rows))
        low = np.minimum(opened, close) * np.exp(-0.5 * volatility * draw.random(rows))
        volume = np.round(1e6 * np.exp(0.3 * draw.standard_normal(rows)))
        table = pd.DataFrame({"Date": days, "Open": opened, "High": high, "Low": low, "Close": close, "Volume": volume})
        table.to_csv(folder / f"S{number:04d}.csv", index=False, float_format="%.6f")


def measure(folder: Path, count: int, models: Sequence[str], out: Path) -> dict[str, float]:
    import pandas as pd
    import psutil

    command = [sys.executable, str(ROOT / "backtest.py"), "--data", str(folder), "--models", *models,
               "--output_dir", str(out)]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = [0]

    def watch() -> None:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak[0] = max(peak[0], watched.memory_info().rss)
            except psutil.Error:
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    seconds = time.perf_counter() - started
    if code:
        raise RuntimeError(f"backtest.py failed with {code}")
    metrics = pd.read_csv(out / "metrics.csv")
    return {
        "tickers": count,
        "seconds": seconds,
        "tickers_per_s": count / seconds,
        "peak_mb": peak[0] / 1e6,
        "forecasts": int(metrics[metrics["Ticker"] == "(all)"]["Origins"].sum()),
    }


if __name__ == "__main__":
    sys.exit(main())
