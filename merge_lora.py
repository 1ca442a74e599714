"""Turn trained weights into a plain model, or into an adapter folder as PEFT writes it.

    python merge_lora.py --lora_weights checkpoints/best_lora_weights.pth --model_path ./Qwen3-0.6B --output merged
    python merge_lora.py --model_path ./Qwen3-0.6B --output merged --verify
    python merge_lora.py --model_path ./Qwen3-0.6B --export_peft adapter
    python framework_llm.py --test_csv sample_test.csv --model_path merged --lora_weights merged
    python framework_llm.py --test_csv sample_test.csv --model_path ./Qwen3-0.6B --lora_weights adapter

A plain model loads like any other and needs no LoRA any more; what was trained over a quantized base is merged into
the unquantized one. The forecast head, calibration and the rest lie beside it in stocklora_forecaster.pth. --verify
forecasts with both and prints the largest difference, and how far a 4-bit base would have been off.
"""

from __future__ import annotations

import argparse
import sys

from stocklora.cli.console import UserError, run_script
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings
from stocklora.forecaster.settings import MergeSettings


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="merge_lora.py", description=__doc__)
    add_settings(parser, MergeSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(resolve_settings(arguments, MergeSettings)))


def run(settings: MergeSettings) -> int:
    if not settings.lora_weights.exists():  # before seconds of imports
        raise UserError(f"no weights file {settings.lora_weights}; train one with: python train_lora.py --data FILE")
    from stocklora.forecaster.merge import merge

    merge(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
