"""LoRA fine-tuning of a Chinese instruct model, as configs/lora_config.yaml says.

    python training/train.py
    python training/train.py --config my_config.yaml --num_epochs 1
    python training/train.py --model_path models/smollm2-135m
    python training/train.py --resume_from_checkpoint last

Reads data/chinese_instructions.json (python data/prepare_data.py writes it) and writes into outputs/: adapter,
tokenizer, training_info.json, training_log.jsonl, loss_curve.png. The config file has sections lora: and training:,
and any other setting; a flag wins over it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run by path, Python looks for modules beside this file only

from stocklora.cli.console import run_script  # noqa: E402
from stocklora.cli.settings import ScriptParser  # noqa: E402
from stocklora.instruct.sft.settings import TrainSettings, add_sft_settings, resolve_sft  # noqa: E402

DEFAULT_CONFIG = Path("configs/lora_config.yaml")


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="training/train.py", description=__doc__)
    add_sft_settings(parser, TrainSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    config = next((path for path in (DEFAULT_CONFIG, ROOT / DEFAULT_CONFIG) if path.is_file()), None)
    resolved = resolve_sft(arguments, TrainSettings, config)
    from stocklora.instruct.sft.run import run_training

    return run_training(resolved, "training/train.py")


if __name__ == "__main__":
    sys.exit(main())
