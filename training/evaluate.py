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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by path, this file sees only its own folder

from stocklora.cli.console import say
from stocklora.cli.settings import SettingsParser
from stocklora.instruct.chat.settings import EvaluateSettings


def build_parser() -> SettingsParser:
    return SettingsParser("training/evaluate.py", __doc__, EvaluateSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: EvaluateSettings) -> None:
    settings.check()
    from stocklora.instruct.evaluation.run import evaluate

    evaluate(settings)
    folder = settings.output_dir or settings.model_path
    say(f"next: python visualization/plot_results.py{'' if str(folder) == 'outputs' else f' --model_path {folder}'}")


if __name__ == "__main__":
    sys.exit(main())
