"""Forecast the next three closes with the simple baseline, or with no training at all.

    python framework.py --model_path model.pth --test_csv sample_test.csv
    python framework.py --model_path prior --test_csv sample_test.csv        # what hundreds of other stocks teach
    python framework.py --model_path prior --test_csv sample_test.csv --explain --paths 1000 --above 280
    python framework.py --test_csv prices/ --output predictions.csv

The window comes from the model file that train.py wrote. Writes one row a ticker and day:
Ticker,Origin,Date,Day,Last_Close,Predicted_Close,P05,P10,P25,P50,P75,P90,P95.
"""

from __future__ import annotations

import sys

from stocklora.baselines.settings import FrameworkSettings, check_model_file
from stocklora.cli.settings import SettingsParser


def build_parser() -> SettingsParser:
    return SettingsParser("framework.py", __doc__, FrameworkSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: FrameworkSettings) -> None:
    if not settings.by_prior:
        check_model_file(settings.model_path)  # before the seconds that torch takes to import
    from stocklora.dataset.prepare import select_tickers
    from stocklora.prices.tables import read_prices

    prices = select_tickers(read_prices(settings.test_csv, reading=settings), settings.tickers)
    settings.check_price(prices)

    if settings.by_prior:
        from stocklora.baselines.by_prior import forecast_and_save
    else:
        from stocklora.baselines.simple_fit import forecast_and_save
    forecast_and_save(prices, settings)


if __name__ == "__main__":
    sys.exit(main())
