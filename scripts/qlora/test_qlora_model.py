"""What a tuned model answers, beside its own base.

    python scripts/qlora/test_qlora_model.py --adapter_path models/qlora/adapter --test_cases "美联储宣布加息25个基点"
    python scripts/qlora/test_qlora_model.py --adapter_path qlora_output --test_cases "央行降准" "CPI同比上涨0.2%"
    python scripts/qlora/test_qlora_model.py --adapter_path qlora_output --cases_file cases.txt --output answers.json

Each test case is put behind --instruction; lines of --cases_file are whole prompts. Without any, a few cases of its
own. Both models answer greedily, so the same each time. --load_in_4bit needs less memory for a large base.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # run by path, Python looks for modules beside this file only

from stocklora.cli.console import run_script  # noqa: E402
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings  # noqa: E402
from stocklora.instruct.chat.settings import CompareSettings  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(
        prog="scripts/qlora/test_qlora_model.py",
        description=__doc__,
    )
    add_settings(parser, CompareSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(resolve_settings(arguments, CompareSettings)))


def run(settings: CompareSettings) -> int:
    settings.check_answers()
    from stocklora.instruct.chat.terminal import compare

    compare(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
