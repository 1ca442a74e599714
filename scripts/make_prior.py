"""Make the market prior: what every forecast begins with, from daily prices of several markets.

    python scripts/make_prior.py --data us.csv.gz ashares.csv.gz hk.csv.gz     # stocklora/volatility/prior.json
    python scripts/make_prior.py --data my_prices/*.csv --before 2022-01-03 --output mine.json
    python train_lora.py --data AAPL.csv --prior mine.json

The tickers of one file are each other's market. The same prices give the same file, which says what it was made from.
Give --before and --without the first day and the tickers that a score is to be honest about.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by path, this file sees only its own folder

from stocklora.cli.console import UserError, say
from stocklora.cli.settings import SettingsParser, setting


@dataclass(frozen=True)
class MakePriorSettings:
    """Settings of ``scripts/make_prior.py``."""

    data: list[Path] = setting([], "price files; the tickers of one file are a market", nargs="+", metavar="CSV")
    start: str | None = setting(None, "read no day before this one", metavar="DATE", flags=("--from", "--start"))
    before: str | None = setting(None, "read no day from this one on", metavar="DATE")
    without: list[str] = setting([], "leave these tickers out", nargs="+", metavar="TICKER")
    output: Path = setting(Path("stocklora/volatility/prior.json"), "JSON to write", metavar="FILE")

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("--data names no file; give price files of download.py, one a market")


def build_parser() -> SettingsParser:
    return SettingsParser("scripts/make_prior.py", __doc__, MakePriorSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(make_prior, argv)


def make_prior(settings: MakePriorSettings) -> None:
    from stocklora.dataset.windows import as_date
    from stocklora.prices.tables import read_prices
    from stocklora.volatility.prior import fit_prior

    markets = {path.name.removesuffix(".gz").removesuffix(".csv"): read_prices(path) for path in settings.data}
    kept = {name: {ticker: frame for ticker, frame in prices.items() if ticker not in settings.without}
            for name, prices in markets.items()}  # fmt: skip
    start = as_date(settings.start, "--from") if settings.start else None
    before = as_date(settings.before, "--before") if settings.before else None
    try:
        prior = fit_prior(kept, before, start=start)
    except ValueError as error:
        raise UserError(f"--data: {error}; give more tickers or longer tables") from None
    prior.save(settings.output)
    facts = prior.made_from
    say(f"{settings.output}: {facts['tickers']} tickers of {len(facts['markets'])} markets, {facts['rows']:,} rows, "
        f"{facts['first_day']} to {facts['last_day']}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
