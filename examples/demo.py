"""Try a tuned model: talk to it, or see it answer a round of ready questions.

    python examples/demo.py --model_path outputs --mode interactive
    python examples/demo.py --model_path outputs --mode batch

The folder holds an adapter or a whole model, as training wrote it. For files of prompts, several adapters, merging and
a server see inference_lora.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by path, this file sees only its own folder

from stocklora.cli.settings import SettingsParser
from stocklora.instruct.chat.settings import DemoSettings


def build_parser() -> SettingsParser:
    return SettingsParser("examples/demo.py", __doc__, DemoSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: DemoSettings) -> None:
    settings.check_answers()
    from stocklora.instruct.chat.sources import find_sources

    sources = find_sources(settings.base_model, [settings.model_path], settings.any_base)  # before seconds of imports
    from stocklora.instruct.chat.load import load_sources
    from stocklora.instruct.chat.model import Sampling
    from stocklora.instruct.chat.terminal import ask_questions, chat

    answer = ask_questions if settings.mode == "batch" else chat
    answer(load_sources(sources, settings), None, Sampling.of(settings))


if __name__ == "__main__":
    sys.exit(main())
