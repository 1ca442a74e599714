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
from stocklora.cli.console import UserError, run_script, say
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

    from stocklora.baselines.simple_fit import forecast_simple
    from stocklora.baselines.simple_network import load_simple
    from stocklora.forecaster.predictions import print_forecast, write_predictions
    from stocklora.runtime.machine import choose_device, peak_memory_mb

    device = choose_device(settings.device)
    forecaster = load_simple(settings.model_path, device)
    if settings.window_size not in (None, forecaster.window_size):
        raise UserError(
            f"--window_size {settings.window_size}: {settings.model_path} was trained with a window of "
            f"{forecaster.window_size} days; leave the flag out or train again"
        )
    rows = forecast_simple(forecaster, prices)
    write_predictions(settings.output, rows)
    say(f"trainable parameters: {forecaster.trainable_parameters:,}")
    say(f"peak memory: {peak_memory_mb(device.type):,.0f} MB ({device.type})")
    print_forecast(rows)
    say(f"saved: {settings.output}")


if __name__ == "__main__":
    sys.exit(main())
