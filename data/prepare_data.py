"""Make the bundled Chinese finance instructions, or convert and split files of conversations.

    python data/prepare_data.py                              # data/chinese_instructions.json, made or verified
    head -20 data/chinese_instructions.json
    python data/prepare_data.py --convert chats.json --to messages --output chats.jsonl
    python data/prepare_data.py --split data/qlora/instructions.jsonl --output data/qlora/parts

The instructions are this project's own; data/finance_lessons.md is where they are written. Rows may be alpaca
(instruction, input, output), ShareGPT (conversations) or messages, mixed in one file, as JSON or JSON lines; other
keys of a row go along. A split follows the rows' own `split`, else their `date`, else a seeded hash of the question,
and never lets the same question or event stand on two sides.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by path, this file sees only its own folder

from stocklora.cli.settings import SettingsParser
from stocklora.instruct.rows.prepare import PrepareSettings, prepare


def build_parser() -> SettingsParser:
    return SettingsParser("prepare_data.py", __doc__, PrepareSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: PrepareSettings) -> None:
    prepare(settings, Path(__file__).resolve().parent)


if __name__ == "__main__":
    sys.exit(main())
