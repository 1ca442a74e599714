"""Try a tuned model: talk to it, or see it answer a round of ready questions.

    python examples/demo.py --model_path outputs --mode interactive
    python examples/demo.py --model_path outputs --mode batch

The folder holds an adapter or a whole model, as training wrote it. For files of prompts, several adapters, merging and
a server see inference_lora.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run by path, Python looks for modules beside this file only

from stocklora.cli.console import run_script, say  # noqa: E402
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings  # noqa: E402
from stocklora.instruct.chat.settings import DemoSettings  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="examples/demo.py", description=__doc__)
    add_settings(parser, DemoSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(resolve_settings(arguments, DemoSettings)))


def run(settings: DemoSettings) -> int:
    settings.check_answers()
    from stocklora.instruct.chat.sources import find_sources, quantization_note

    sources = find_sources(settings.base_model, [settings.model_path], settings.any_base)  # before seconds of imports
    if note := quantization_note(sources, settings.quantization):
        say(note)
    from stocklora.instruct.chat.load import load_sources
    from stocklora.instruct.chat.model import Sampling
    from stocklora.instruct.chat.terminal import QUESTIONS, ask_all, chat

    model, sampling = load_sources(sources, settings), Sampling.of(settings)
    if settings.mode == "batch":
        ask_all(model, QUESTIONS, adapter=None, sampling=sampling)
    else:
        chat(model, adapter=None, sampling=sampling)
    return 0


if __name__ == "__main__":
    sys.exit(main())
