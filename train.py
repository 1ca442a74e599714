"""Train the simple baseline: a small network from 30 days of prices to the next close.

    python train.py --data sample_test.csv --epochs 100
    python train.py --data prices/ --tickers AAPL MSFT --save_path model.pth

Training days come first, then validation days (early stopping, error bars), then test days that the
model never saw, on which it stands beside the random walk. Writes model.pth, which framework.py reads.
"""

from __future__ import annotations

import sys

from stocklora.baselines.settings import TrainSettings
from stocklora.cli.settings import SettingsParser


def build_parser() -> SettingsParser:
    return SettingsParser("train.py", __doc__, TrainSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: TrainSettings) -> None:
    from stocklora.dataset.prepare import select_tickers
    from stocklora.prices.tables import read_prices

    prices = select_tickers(read_prices(settings.data, reading=settings), settings.tickers)

    from stocklora.baselines.simple_fit import train_and_save

    train_and_save(prices, settings)


if __name__ == "__main__":
    sys.exit(main())
