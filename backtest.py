"""Score any forecaster against the last close, walking forward through days it never saw.

    python backtest.py --data prices.csv
    python backtest.py --data prices/ --models naive drift ewma har simple --from 2023-01-03 --refit yearly
    python backtest.py --data prices.csv --models naive ewma har llm --model_path models/smollm2-135m \\
        --lora_weights checkpoints/best_lora_weights.pth
    python backtest.py --data prices.csv --models ewma har garch autoets      # needs: pip install '.[peers]'
    python backtest.py --data prices.csv --check-leakage
    accelerate launch --cpu --num_processes 2 backtest.py --data prices/

Writes backtest/report.html, backtest/metrics.csv and backtest/forecasts.parquet.
"""

from __future__ import annotations

import sys

from stocklora.backtest.settings import BacktestSettings
from stocklora.cli.settings import SettingsParser


def build_parser() -> SettingsParser:
    return SettingsParser("backtest.py", __doc__, BacktestSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: BacktestSettings) -> int:
    from stocklora.backtest.run import run_backtest

    return run_backtest(settings)


if __name__ == "__main__":
    sys.exit(main())
