"""What ``ledger.py`` can be told; light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stocklora.cli.console import UserError
from stocklora.cli.settings import setting
from stocklora.prices.settings import ReadingSettings

COMMANDS = ("score", "verify", "export")
# Which command a flag is for, where it is not for all.
ONLY_FOR = {
    "test_csv": "score", "ticker": "score", "source": "score", "retries": "score", "worst": "score", "head": "verify",
    "output": "export",
}  # fmt: skip


@dataclass(frozen=True)
class LedgerSettings(ReadingSettings):
    """Settings of ``ledger.py``."""

    command: str = setting(
        "score", "score: what was said beside what came; verify: whether the record is unbroken; export: as CSV",
        section="what", positional=True, metavar="COMMAND",
    )  # fmt: skip
    ledger: Path = setting(
        Path("forecasts.db"), "the record that framework.py and framework_llm.py write", section="what", metavar="FILE"
    )
    test_csv: list[Path] = setting(
        [], "score: price CSV file(s) or folder(s) with the closes that came", section="closes", nargs="+",
        metavar="CSV",
    )  # fmt: skip
    ticker: list[str] | None = setting(
        None, "score: download the closes of these tickers, as download.py does; without a name, of all that are due",
        section="closes", nargs="*", metavar="TICKER",
    )  # fmt: skip
    source: str | None = setting(
        None, "where --ticker is asked for; see download.py (default: yahoo)", choices=("yahoo", "akshare", "sample"),
        section="closes",
    )  # fmt: skip
    retries: int | None = setting(
        None, "how often to ask again when the source says too many requests (default: 4)", section="closes"
    )
    worst: int = setting(5, "score: how many of the worst surprises are told", section="output", metavar="N")
    plot: Path | None = setting(
        Path("ledger.png"), "score: the reliability diagram", section="output", metavar="PNG", off="--no-plot"
    )
    head: str | None = setting(
        None, "verify: a head that was written down before, which must still be in the record", section="output",
        metavar="HASH",
    )  # fmt: skip
    output: Path = setting(Path("ledger.csv"), "export: where the table goes", section="output", metavar="CSV")

    def __post_init__(self) -> None:
        if self.command not in COMMANDS:
            raise UserError(f"unknown argument {self.command}; give one of {', '.join(COMMANDS)}")
        default = {"test_csv": [], "worst": 5, "output": Path("ledger.csv")}
        for name, command in ONLY_FOR.items():
            if getattr(self, name) != default.get(name) and self.command != command:
                raise UserError(f"--{name} is for {command}; leave it out of {self.command}")
        if self.worst < 0:
            raise UserError(f"--worst must be 0 or more, got {self.worst}")
        if self.test_csv and self.ticker is not None:
            raise UserError("--test_csv reads closes and --ticker downloads them; give one of the two")
        if not self.test_csv:
            self.refuse_reading("says how --test_csv is read, and there is none")
        for name in ("source", "retries"):
            if getattr(self, name) is not None and self.ticker is None:
                raise UserError(f"--{name} says how closes are downloaded; give --ticker too, or leave it out")
        if self.command == "score" and not self.test_csv and self.ticker is None:
            raise UserError(
                f"where are the closes that came? Give --test_csv FILE, or --ticker to download those of {self.ledger}"
            )
