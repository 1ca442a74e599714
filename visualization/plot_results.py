"""Pictures of a training run and of its evaluation, as PNG files beside them.

    python visualization/plot_results.py
    python visualization/plot_results.py --model_path output_qwen_lora --language en

Reads training_log.jsonl, training_info.json and evaluation_results.json from outputs/ and writes there: plot_loss.png,
plot_learning_rate.png, plot_scores.png (base against tuned, with intervals), plot_generation.png (time and length).
Labels are Chinese where a font on this machine has the characters, else English.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run by path, Python looks for modules beside this file only

from stocklora.cli.console import UserError, run_script, say  # noqa: E402
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings  # noqa: E402
from stocklora.instruct.chat.settings import PlotSettings  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="visualization/plot_results.py", description=__doc__)
    add_settings(parser, PlotSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(resolve_settings(arguments, PlotSettings)))


def run(settings: PlotSettings) -> int:
    if not settings.model_path.is_dir():
        raise UserError(f"no folder {settings.model_path}; train with: python training/train.py")
    from stocklora.instruct.evaluation.plots import plot_results

    for path in plot_results(settings):
        say(f"picture: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
