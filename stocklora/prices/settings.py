"""How price files are to be read where they do not say so themselves; light to import."""

from __future__ import annotations

from dataclasses import dataclass

from stocklora.cli.console import UserError
from stocklora.cli.settings import setting


@dataclass(frozen=True)
class ReadingSettings:
    """Flags of every script that reads price files."""

    exchange: str | None = setting(
        None, "exchange of all tickers in the files, such as XSHG, XTKS or 24/7, where neither their names nor their "
        "days tell", section="reading prices", metavar="CODE",
    )  # fmt: skip
    date_format: str | None = setting(
        None, "how dates are written where they can be read in two ways, such as %d/%m/%Y", section="reading prices",
        metavar="FORMAT",
    )  # fmt: skip
    adjust: str = setting(
        "all", "what a column of adjusted closes or splits is for: all: it adjusts all four prices; none: prices stay "
        "as quoted", choices=("all", "none"), section="reading prices",
    )  # fmt: skip
    mend_jumps: bool = setting(
        False, "divide out jumps that look like a split or a change of unit", section="reading prices"
    )

    drop_bad_rows: bool = setting(
        False, "leave out rows that are broken, if they are few; without it they are named", section="reading prices"
    )

    def refuse_reading(self, why: str) -> None:
        """Raise a UserError where a flag says how files are read, and none is."""
        for name in ("exchange", "date_format", "mend_jumps", "drop_bad_rows"):
            if getattr(self, name):
                raise UserError(f"--{name} {why}; leave it out")


AS_THEY_ARE = ReadingSettings()
