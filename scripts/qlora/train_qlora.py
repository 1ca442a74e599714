"""4-bit QLoRA of DeepSeek-7B-chat on financial instructions; fits one 16 GB card.

    python download_model.py --model deepseek-ai/deepseek-llm-7b-chat --save_dir ./models
    python scripts/qlora/train_qlora.py
    python scripts/qlora/train_qlora.py --resume_from_checkpoint qlora_output/checkpoint-100 --batch_size 2 \\
        --max_length 256
    python scripts/qlora/train_qlora.py --model_path models/smollm2-135m --data_path data/chinese_instructions.json

Reads data/qlora/instructions.jsonl (build_instruction_dataset.py writes it) and writes into qlora_output/: adapter,
tokenizer, training_info.json, training_log.jsonl, loss_curve.png, and checkpoint-N every 50 steps. Rank 8, alpha 16,
dropout 0.05, 3 epochs, batch size 4, learning rate 2e-4, 512 tokens a row; each can be told otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # run by path, Python looks for modules beside this file only

from stocklora.cli.console import run_script  # noqa: E402
from stocklora.cli.settings import ScriptParser  # noqa: E402
from stocklora.instruct.sft.settings import DeepseekSettings, add_sft_settings, resolve_sft  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="scripts/qlora/train_qlora.py", description=__doc__)
    add_sft_settings(parser, DeepseekSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    resolved = resolve_sft(arguments, DeepseekSettings)
    from stocklora.instruct.sft.run import run_training

    return run_training(resolved, "scripts/qlora/train_qlora.py")


if __name__ == "__main__":
    sys.exit(main())
