"""Forecast the next three closes with the simple baseline.

    python framework.py --model_path model.pth --test_csv sample_test.csv
    python framework.py --test_csv prices/ --output predictions.csv

The window comes from the model file that train.py wrote. Writes one row a ticker and day:
Ticker,Origin,Date,Day,Last_Close,Predicted_Close,P05,P10,P25,P50,P75,P90,P95.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stocklora.baselines.settings import FrameworkSettings, check_model_file
from stocklora.cli.console import run_script
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="framework.py", description=__doc__)
    add_settings(parser, FrameworkSettings)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(resolve_settings(arguments, FrameworkSettings)))


def run(settings: FrameworkSettings) -> None:
    check_model_file(settings.model_path)  # before the seconds that torch takes to import
    from stocklora.dataset.prepare import select_tickers
    from stocklora.prices.tables import read_prices

    prices = select_tickers(read_prices(settings.test_csv), settings.tickers)

    from stocklora.baselines.simple_fit import forecast_and_save

    forecast_and_save(prices, settings)


if __name__ == "__main__":
    sys.exit(main())
