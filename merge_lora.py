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

import sys

from stocklora.base_models.folders import check_model_folder
from stocklora.cli.settings import SettingsParser
from stocklora.forecaster.settings import MergeSettings, check_weights_path


def build_parser() -> SettingsParser:
    return SettingsParser("merge_lora.py", __doc__, MergeSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: MergeSettings) -> None:
    check_weights_path(settings.lora_weights)  # before seconds of imports
    check_model_folder(settings.model_path)
    from stocklora.forecaster.merge import merge

    merge(settings)


if __name__ == "__main__":
    sys.exit(main())
