"""Every way to fine-tune on the same days: trainable parameters, step time, memory, file size, validation loss.

    python bench/methods.py                                    # SmolLM2-135M; the first six: 11 minutes, two cores
    python bench/methods.py --methods lora peft --backbone_layers 8 --epochs 3
    python bench/methods.py --data prices.csv --validation_from 2022-01-03 --test_from 2023-01-03

Each method is one run of what ``train_lora.py`` runs, in a process of its own, so that its peak memory is its own.
A step's time is that of the last epoch's steps: the first epoch also fetches memory from the system. The validation
loss is over that of the start (epoch 0, the scaled random walk), the lowest of all epochs, kept or not. The size is
that of the weights file if such an epoch is kept. Writes bench/results/methods.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, answer_of, run_benchmark, save_result

# name -> settings of train_lora.py
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "learning_rate": 1e-5},
    "head": {"method": "head"},
    "lora": {"method": "lora"},
    "peft": {"method": "peft"},
    "lora-8bit": {"method": "lora", "quantization": "8bit"},
    "lora-4bit": {"method": "lora", "quantization": "4bit"},
    "peft-4bit": {"method": "peft", "quantization": "4bit"},
    "dora": {"method": "lora", "use_dora": True},
    "lora-checkpointing": {"method": "lora", "gradient_checkpointing": True},
}
FIRST, LAST = "2007-06-01", "2009-12-31"
SPLIT = {"validation_from": "2009-01-02", "test_from": "2009-07-01"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--backbone_layers", type=int, help="layers of the model (default: all)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training days (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="your own prices (default: AAPL from June 2007 to 2009, bundled)")
    parser.add_argument("--validation_from", help="with --data: first validation day")
    parser.add_argument("--test_from", help="with --data: first test day")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=RESULTS / "methods.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv, work)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.base_models.folders import check_model_folder
    from stocklora.cli.console import print_table, say

    check_model_folder(arguments.model_path)
    with tempfile.TemporaryDirectory() as scratch:
        data, split = arguments.data, {"validation_from": arguments.validation_from, "test_from": arguments.test_from}
        if data is None:
            data, split = bundled_days(Path(scratch), ["AAPL"]), SPLIT
        shared = {
            "data": [str(data)], **split, "epochs": arguments.epochs, "patience": arguments.epochs,
            "model_path": str(arguments.model_path), "backbone_layers": arguments.backbone_layers,
            "device": arguments.device,
        }  # fmt: skip
        rows = []
        for name in arguments.methods:
            say(f"{name} ...")
            rows.append({"name": name, **measure(shared | METHODS[name], Path(scratch))})
    settings = shared | {"data": data.name, "model_path": arguments.model_path.name}
    save_result(arguments.output, {"settings": settings, "rows": rows})
    print_table(f"{arguments.model_path.name}, {arguments.epochs} epochs", HEADER, [cells(row) for row in rows])
    say(f"saved: {arguments.output}")
    return 0


HEADER = ("method", "trainable", "step s", "tokens/s", "peak MB", "file MB", "validation")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table, or the reason why there is none."""
    if "error" in row:
        return [row["name"], row["error"], *[""] * (len(HEADER) - 2)]
    return [
        row["name"], f"{row['trainable']:,}", f"{row['step_s']:.2f}", f"{row['tokens_per_s']:,.0f}",
        f"{row['peak_mb']:,.0f}", f"{row['file_mb']:,.1f}", f"{row['validation_ratio']:.4f}",
    ]  # fmt: skip


def bundled_days(folder: Path, tickers: Sequence[str], first: str = FIRST) -> Path:
    """Bundled prices until the end of 2009, as a file."""
    from stocklora.prices.tables import read_prices, write_prices
    from stocklora.runtime.files import bundled_folder

    prices = read_prices(bundled_folder() / "us_tech_2000_2013.csv.gz")
    path = folder / "prices.csv"
    write_prices({ticker: prices[ticker].loc[first:LAST] for ticker in tickers}, path, {"source": "sample"})
    return path


def measure(settings: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """One training run in a process of its own; ``{"error": ...}`` where it says in a line why it cannot be.

    Args:
        settings: of ``TrainLoraSettings``, as JSON has them.
    """
    # The run works elsewhere: prices and model may be given by a path from here.
    settings = dict(settings) | {"data": [str(Path(path).resolve()) for path in settings["data"]]}
    settings["model_path"] = str(Path(settings["model_path"]).resolve())
    return answer_of(__file__, settings, scratch)


def work(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The process of its own."""
    import torch

    from stocklora.cli.console import UserError
    from stocklora.cli.settings import restored
    from stocklora.dataset.prepare import select_tickers
    from stocklora.finetune.fit import finetune
    from stocklora.finetune.settings import TrainLoraSettings
    from stocklora.forecaster.methods import trained_state
    from stocklora.forecaster.weights import WeightsFile, save_weights
    from stocklora.prices.tables import read_prices
    from stocklora.runtime.machine import peak_memory_mb

    settings = restored(task | {"save_dir": str(folder / "run")}, TrainLoraSettings)
    prices = select_tickers(read_prices(settings.data), settings.tickers)
    torch.manual_seed(settings.seed)
    run = finetune(prices, settings)
    peak_mb = peak_memory_mb(run.forecaster.device.type)

    forecaster, history = run.forecaster, run.outcome.history
    if len(history) < 2:
        raise UserError(f"no epoch was finished: {run.outcome.stopped}")
    examples = forecaster.examples(prices, run.data.sequences("train", forecaster.spec.targets_per_sequence))
    tokens = sum(len(example.encoded.input_ids) for example in examples)
    targets = sum(len(example.scale) for example in examples)
    epoch_s = targets / history[-1]["targets_per_s"]
    steps = history[-1]["step"] - history[-2]["step"]
    state = trained_state(forecaster.model)
    kept = folder / "kept.pth"
    save_weights(kept, WeightsFile(forecaster.spec, state["adapters"], state["head"], {}))
    number_format = forecaster.model.autocast_dtype or next(iter(forecaster.model.backbone.parameters())).dtype
    trainable = [parameter for parameter in forecaster.model.parameters() if parameter.requires_grad]
    return {
        "trainable": sum(parameter.numel() for parameter in trainable),
        "step_s": epoch_s / steps,
        "epoch_s": epoch_s,
        "tokens_an_epoch": tokens,
        "longest_tokens": max(len(example.encoded.input_ids) for example in examples),
        "tokens_per_s": tokens / epoch_s,
        "targets_per_s": history[-1]["targets_per_s"],
        "training_s": history[-1]["seconds"],
        "peak_mb": peak_mb,
        "file_mb": kept.stat().st_size / 1e6,
        "validation_ratio": min(row["validation_ratio"] for row in history[1:]),
        "number_format": str(number_format).removeprefix("torch."),
    }


if __name__ == "__main__":
    sys.exit(main())
