"""Download daily prices into a CSV that every other script reads.

    python download.py                                        # AAPL, one year, sample_test.csv
    python download.py --ticker AAPL --period 1y --output sample_test.csv
    python download.py --source sample                        # bundled prices, no network needed
    python download.py --ticker AAPL MSFT 600519.SS --start 2020-01-01 --output prices.csv
    python download.py --ticker tickers.txt --period 10y --output prices/   # a folder, one CSV a ticker
    python download.py --update --output prices.csv           # append the days since
    python download.py --convert HistoricalData.csv --output QZX.csv    # a table of another site: see docs/data.md
    python download.py --check prices.csv                     # gaps, jumps, stale runs; downloads nothing

Beside each CSV stands FILE.meta.json: source, adjustment, dates, sha256. Exit code 0: all is written;
1: some tickers did not come, the others are written; 2: nothing was written, and the line says why.
"""

from __future__ import annotations

import sys

from stocklora.cli.settings import SettingsParser
from stocklora.prices.sources.request import DownloadSettings


def build_parser() -> SettingsParser:
    return SettingsParser("download.py", __doc__, DownloadSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: DownloadSettings) -> int:
    from stocklora.prices.sources.download import download

    return download(settings)


if __name__ == "__main__":
    sys.exit(main())
