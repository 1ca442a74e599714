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

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run by path, Python looks for modules beside this file only

from stocklora.instruct.sft.settings import Resolved, SftParser, TrainSettings  # noqa: E402

DEFAULT_CONFIG = Path("configs/lora_config.yaml")


def build_parser() -> SftParser:
    config = next((path for path in (DEFAULT_CONFIG, ROOT / DEFAULT_CONFIG) if path.is_file()), None)
    return SftParser("training/train.py", __doc__, TrainSettings, config)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(resolved: Resolved) -> int:
    from stocklora.instruct.sft.run import run_training

    return run_training(resolved, "training/train.py")


if __name__ == "__main__":
    sys.exit(main())
