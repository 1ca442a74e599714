"""Make instruction rows for a Chinese financial assistant from a news database.

    python scripts/qlora/build_instruction_dataset.py --db finance_analysis.db \\
        --output data/qlora/instructions.jsonl --num_samples 300
    python scripts/qlora/build_instruction_dataset.py --show 3     # the bundled database, and three of its rows

The database is SQLite: `events` (flashes and calendar items) and `event_impacts` (event_id, ticker, window_min, ret).
It is opened read-only. Without --db it is the bundled one, whose news are invented.

60% of the rows are about news (sentiment with a reason, extraction as JSON, several windows compared, the sentiment of
each as JSON), 20% are market analysis (priced in or not, wait-and-see, risk level), 20% read economic data (previous,
consensus, actual). Answers are computed from the measured returns; digests and repeated news are left out; train,
validation and test are cut by date. The same database, settings and --seed give the same file. Rows are alpaca JSON
lines with their origin beside them: kind, share, event_id, ticker, windows, returns_bp, date, split, seed, and the
label or fields to score by.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by path, this file sees only its own folder

from stocklora.cli.console import print_table, say
from stocklora.cli.settings import SettingsParser
from stocklora.instruct.news.dataset import Built, InstructionSettings, build_dataset


def build_parser() -> SettingsParser:
    return SettingsParser("build_instruction_dataset.py", __doc__, InstructionSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: InstructionSettings) -> None:
    from stocklora.instruct.rows.records import write_records

    built = build_dataset(settings)
    write_records(built.records, settings.output, "alpaca")
    report(built, settings)


def report(built: Built, settings: InstructionSettings) -> None:
    """What was made, what was left out, and a few of the rows."""
    if settings.show:
        # evenly over the file, so that several kinds and dates are seen
        step = max(1, len(built.records) // settings.show)
        for record in built.records[::step][: settings.show]:
            say(f"--- {record.meta['kind']}, {record.meta['date']}, {record.meta['split']} ({record.meta['event_id']})")
            say(f"{record.prompt[-1].content}\n=> {record.answer}\n")
    print_table("Instruction rows", ("kind", "asks", "share", "rows", "train", "validation", "test"), built.table())
    for reason, count in sorted(built.left_out.items()):
        say(f"left out: {count:,} {reason}")
    for note in built.notes:
        say(f"note: {note}")
    say(f"saved: {settings.output}")
    say(f"next: python -m stocklora.instruct.lint {settings.output}")


if __name__ == "__main__":
    sys.exit(main())
