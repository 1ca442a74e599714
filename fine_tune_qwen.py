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

import sys

from stocklora.instruct.sft.settings import Resolved, SftParser, SftSettings


def build_parser() -> SftParser:
    return SftParser("fine_tune_qwen.py", __doc__, SftSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(resolved: Resolved) -> int:
    from stocklora.instruct.sft.run import run_training

    return run_training(resolved, "fine_tune_qwen.py")


if __name__ == "__main__":
    sys.exit(main())
