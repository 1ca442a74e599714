"""What a tuned model answers, beside its own base.

    python scripts/qlora/test_qlora_model.py --adapter_path models/qlora/adapter --test_cases "美联储宣布加息25个基点"
    python scripts/qlora/test_qlora_model.py --adapter_path qlora_output --test_cases "央行降准" "CPI同比上涨0.2%"
    python scripts/qlora/test_qlora_model.py --adapter_path qlora_output --cases_file cases.txt --output answers.json

Each test case is put behind --instruction; lines of --cases_file are whole prompts. Without any, a few cases of its
own. Both models answer greedily, so the same each time. --load_in_4bit needs less memory for a large base.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by path, this file sees only its own folder

from stocklora.cli.settings import SettingsParser
from stocklora.instruct.chat.settings import CompareSettings


def build_parser() -> SettingsParser:
    return SettingsParser("scripts/qlora/test_qlora_model.py", __doc__, CompareSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: CompareSettings) -> None:
    settings.check()
    from stocklora.instruct.chat.terminal import compare

    compare(settings)


if __name__ == "__main__":
    sys.exit(main())
