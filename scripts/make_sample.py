"""Make the bundled price table from the PyPI package ``bokeh_sampledata``.

    pip install bokeh_sampledata
    python scripts/make_sample.py                              # data/sample/us_tech_2000_2013.csv.gz, made or verified
    python scripts/make_sample.py --output prices.csv

The package has five US stocks as quoted on the day, with an adjusted close. Open, high, low and close are multiplied by
adjusted close / close and rounded to six digits behind the point; volume stays as it is. A table that holds these very
prices already is left as it is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by path, this file sees only its own folder

from stocklora.cli.console import UserError, say
from stocklora.cli.settings import SettingsParser, setting
from stocklora.runtime.files import BUNDLED_PRICES

if TYPE_CHECKING:
    import pandas as pd

ORIGIN = "bokeh sample data"


@dataclass(frozen=True)
class MakeSampleSettings:
    """Settings of ``scripts/make_sample.py``."""

    output: Path = setting(Path("data/sample") / BUNDLED_PRICES, "CSV (or .csv.gz) to write", metavar="FILE")


def build_parser() -> SettingsParser:
    return SettingsParser("scripts/make_sample.py", __doc__, MakeSampleSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(make_sample, argv)


def make_sample(settings: MakeSampleSettings) -> int:
    from stocklora.prices.tables import read_prices, write_prices

    prices = adjusted_prices()
    rows = f"{settings.output}: {sum(map(len, prices.values())):,} rows of {', '.join(prices)}"
    if settings.output.exists():
        kept = read_prices(settings.output)
        if list(kept) == list(prices) and all(kept[ticker].equals(prices[ticker]) for ticker in prices):
            say(f"{rows}, as the package has them")
            return 0
    meta = {"source": "sample", "origins": dict.fromkeys(prices, ORIGIN), "adjust": "all", "interval": "1d"}
    write_prices(prices, settings.output, meta)
    say(f"{rows}, written")
    return 0


def adjusted_prices() -> dict[str, pd.DataFrame]:
    """The package's five stocks, adjusted for splits and dividends.

    Returns:
        One frame of daily Open, High, Low, Close (US dollars) and Volume (shares) a ticker.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from bokeh_sampledata import stocks
    except ImportError as error:
        raise UserError(f"{error}; install the package: pip install bokeh_sampledata") from None
    import pandas as pd

    prices = {}
    for ticker in ("AAPL", "FB", "GOOG", "IBM", "MSFT"):
        quoted = pd.DataFrame(getattr(stocks, ticker)).set_index("date")
        quoted.index = pd.DatetimeIndex(quoted.index, name="Date")
        factor = quoted["adj_close"] / quoted["close"]
        columns = {name.capitalize(): (quoted[name] * factor).round(6) for name in ("open", "high", "low", "close")}
        prices[ticker] = pd.DataFrame({**columns, "Volume": quoted["volume"].astype("float64")})
    return prices


if __name__ == "__main__":
    sys.exit(main())
