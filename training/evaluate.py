"""Score a tuned chat model beside its base, on rows that it was not trained on.

    python training/evaluate.py --model_path outputs
    python training/evaluate.py --model_path outputs --num_samples 100 --max_new_tokens 128
    python training/evaluate.py --model_path outputs --data my_rows.jsonl

Writes outputs/evaluation_results.json and evaluation_predictions.jsonl. Without --data the rows are those that training
kept aside for this. Measures: answers that end by themselves, likeness to the expected answer (chrF, ROUGE-L), time and
length; where rows have a label, its accuracy and macro F1; where they have fields, valid JSON and right fields; numbers
in the answer that stand in the question. Each with a bootstrap interval, and so has the difference of the two models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run by path, Python looks for modules beside this file only

from stocklora.cli.console import run_script, say  # noqa: E402
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings  # noqa: E402
from stocklora.instruct.chat.settings import EvaluateSettings  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="training/evaluate.py", description=__doc__)
    add_settings(parser, EvaluateSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(resolve_settings(arguments, EvaluateSettings)))


def run(settings: EvaluateSettings) -> int:
    settings.check()
    from stocklora.instruct.evaluation.run import evaluate

    evaluate(settings)
    folder = settings.output_dir or settings.model_path
    say(f"next: python visualization/plot_results.py{'' if str(folder) == 'outputs' else f' --model_path {folder}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
