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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by path, this file sees only its own folder

from stocklora.instruct.sft.settings import DeepseekSettings, Resolved, SftParser


def build_parser() -> SftParser:
    return SftParser("scripts/qlora/train_qlora.py", __doc__, DeepseekSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(resolved: Resolved) -> int:
    from stocklora.instruct.sft.run import run_training

    return run_training(resolved, "scripts/qlora/train_qlora.py")


if __name__ == "__main__":
    sys.exit(main())
