"""Fine-tune a causal language model with LoRA to forecast the next three closes.

    python train_lora.py --data sample_test.csv --model_path ./Qwen3-0.6B \\
        --epochs 20 --batch_size 4 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 16.0
    python train_lora.py --data prices/ --model_path models/smollm2-135m --config my_run.yaml

Writes checkpoints/best_lora_weights.pth (adapters, forecast head, calibration, and the metadata that
rebuilds the model), training_history.csv and training_curve.png. The untrained model is the
volatility-scaled random walk; training keeps only what improves on it on validation days. At the end
the model stands beside the random walk on test days that it never saw.
"""

from __future__ import annotations

import sys

from stocklora.cli.console import UserError, say
from stocklora.cli.settings import SettingsParser
from stocklora.finetune.settings import TrainLoraSettings


def build_parser() -> SettingsParser:
    return SettingsParser("train_lora.py", __doc__, TrainLoraSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: TrainLoraSettings) -> None:
    if not settings.data:
        raise UserError("no data: give --data FILE (make one with: python download.py --ticker AAPL --period 1y)")
    from stocklora.dataset.prepare import select_tickers
    from stocklora.finetune.prepare import before_torch
    from stocklora.prices.tables import read_prices

    prices = select_tickers(read_prices(settings.data, reading=settings), settings.tickers)
    split = before_torch(prices, settings)

    from stocklora.finetune.fit import finetune
    from stocklora.finetune.report import print_outcome

    result = finetune(prices, settings, split=split)
    print_outcome(result)
    say(f"weights: {result.weights_path}")
    say(
        f"next: python framework_llm.py --test_csv {settings.data[0]} --model_path {settings.model_path} "
        f"--lora_weights {result.weights_path}"
    )


if __name__ == "__main__":
    sys.exit(main())
