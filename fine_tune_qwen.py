"""Fine-tune an instruct model on conversations: every weight, LoRA, or QLoRA over 4- or 8-bit weights.

    python fine_tune_qwen.py --config_file configs/train_config_lora.json
    python fine_tune_qwen.py --config_file configs/train_config_qlora.json --output_dir output_mine
    python fine_tune_qwen.py --use_lora --lora_r 64 --lora_alpha 16 --data_path data/store_xhs_sft_samples.jsonl \\
        --output_dir ./output_lora --learning_rate 1e-4
    python fine_tune_qwen.py --config_file configs/train_config_lora.json --resume_from_checkpoint last

The loss is taken on answers and the token that ends them. Writes an adapter folder (adapter_config.json,
adapter_model.safetensors, tokenizer), or for full tuning a plain model, and training_info.json, training_log.jsonl and
loss_curve.png. Ctrl-C saves a checkpoint and says how to go on. A flag wins over the config file.
"""

from __future__ import annotations

import argparse
import sys

from stocklora.cli.console import run_script
from stocklora.cli.settings import ScriptParser
from stocklora.instruct.sft.settings import SftSettings, add_sft_settings, resolve_sft


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="fine_tune_qwen.py", description=__doc__)
    add_sft_settings(parser, SftSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    resolved = resolve_sft(arguments, SftSettings)
    from stocklora.instruct.sft.run import run_training

    return run_training(resolved, "fine_tune_qwen.py")


if __name__ == "__main__":
    sys.exit(main())
