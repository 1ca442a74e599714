"""The record of forecasts: what was said before the fact, beside what came.

    python ledger.py score --test_csv prices.csv            # the closes that came, from files or folders
    python ledger.py score --ticker                         # downloaded, of every ticker whose forecasts are due
    python ledger.py score --ticker AAPL --plot aapl.png --worst 10
    python ledger.py verify                                 # is the record unbroken? says its head
    python ledger.py verify --head 3f9c...                  # and does it go on from a head that you wrote down
    python ledger.py export --output ledger.csv

framework.py and framework_llm.py append every forecast to forecasts.db (--ledger FILE, --no-ledger). A forecast of a
close that was known already is marked as late; it is never counted, and a repeated one is counted once.
Exit code 0: done; 1: some of --ticker did not come, the others are scored; 2: the line says what is wrong.
"""

from __future__ import annotations

import sys

from stocklora.cli.settings import SettingsParser
from stocklora.ledger.settings import LedgerSettings


def build_parser() -> SettingsParser:
    return SettingsParser("ledger.py", __doc__, LedgerSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: LedgerSettings) -> int:
    from stocklora.ledger.run import run_ledger

    return run_ledger(settings)


if __name__ == "__main__":
    sys.exit(main())
