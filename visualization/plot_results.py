"""Pictures of a training run and of its evaluation, as PNG files beside them.

    python visualization/plot_results.py
    python visualization/plot_results.py --model_path output_qwen_lora --language en

Reads training_log.jsonl, training_info.json and evaluation_results.json from outputs/ and writes there: plot_loss.png,
plot_learning_rate.png, plot_scores.png (base against tuned, with intervals), plot_generation.png (time and length).
Labels are Chinese where a font on this machine has the characters, else English.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by path, this file sees only its own folder

from stocklora.cli.console import UserError, say
from stocklora.cli.settings import SettingsParser
from stocklora.instruct.chat.settings import PlotSettings


def build_parser() -> SettingsParser:
    return SettingsParser("visualization/plot_results.py", __doc__, PlotSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: PlotSettings) -> None:
    if not settings.model_path.is_dir():
        raise UserError(f"no folder {settings.model_path}; train with: python training/train.py")
    from stocklora.instruct.evaluation.plots import plot_results

    for path in plot_results(settings):
        say(f"picture: {path}")


if __name__ == "__main__":
    sys.exit(main())
