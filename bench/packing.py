"""One sequence, many forecasts: packed training against one window a forward pass.

    python bench/packing.py                       # models/smollm2-135m, writes bench/results/packing.json
    python bench/packing.py --model_path FOLDER --seeds 1

The first part times real training steps of the whole model, four sequences a forward pass on both sides,
the sides taking turns. The second trains the first layers of the model on the same targets, as many of
them in each step on both sides, and compares validation losses against the spread between seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET_RATIO = 15.0
BATCH_SIZE = 4  # sequences a forward pass on both sides: the default of train_lora.py


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each side (default: %(default)s)")
    parser.add_argument("--loss_layers", type=int, default=6, help="layers of the second part (default: %(default)s)")
    parser.add_argument("--loss_epochs", type=int, default=3, help="epochs of the second part (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the second part (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "packing.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))  # started by path, this file sees only its own folder
    from stocklora.console import run_script

    return run_script(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    from stocklora.base_models import check_model_folder
    from stocklora.console import print_table, say
    from stocklora.dataset import select_tickers
    from stocklora.files import write_json
    from stocklora.machine import machine_facts
    from stocklora.prices import read_prices
    from stocklora.sources import sample_folder, sample_prices

    check_model_folder(arguments.model_path)
    prices, _ = sample_prices("AAPL", period="1y")
    history = select_tickers(read_prices(sample_folder() / "us_tech_2000_2013.csv.gz"), ["AAPL"])
    speed = measure_speed(arguments, history)
    loss = compare_losses(arguments, prices) if arguments.seeds else None
    write_json(arguments.output, {"machine": machine_facts(), "speed": speed, "loss": loss})

    packed, single = speed["packed"], speed["one_window_a_pass"]
    print_table(
        f"{arguments.model_path.name}: LoRA training, forward, backward and step",
        ("forward pass", "forecasts", "tokens a forecast", "targets/s", "tokens/s"),
        [
            (name, side["targets_per_sequence"], f"{side['tokens_per_target']:.0f}", f"{side['targets_per_s']:.2f}",
             f"{side['tokens_per_s']:.0f}")
            for name, side in (("packed", packed), ("one window a pass", single))
        ],
    )  # fmt: skip
    say(f"packed is {speed['ratio']:.1f} times as fast (target: {TARGET_RATIO:.0f})")
    if loss:
        say(
            f"validation loss after {arguments.loss_epochs} epochs: packed {loss['packed_mean_bp']:.3f} bp, one window "
            f"{loss['one_window_mean_bp']:.3f} bp; difference {loss['difference_bp']:+.3f}, spread of seeds "
            f"{loss['seed_spread_bp']:.3f}"
        )
    say(f"saved: {arguments.output}")
    return 0 if speed["ratio"] >= TARGET_RATIO else 1


def measure_speed(arguments: argparse.Namespace, prices: Any) -> dict[str, Any]:
    """Targets a second of whole training steps, medians over turns."""
    import torch
    from accelerate import Accelerator

    from lora import lora_parameters
    from stocklora.dataset import prepare
    from stocklora.devices import choose_device, choose_dtype
    from stocklora.forecasting import build_forecaster, context_tokens_of, load_encoder
    from stocklora.prompts import fit_targets_per_sequence
    from stocklora.training import accumulate_gradients, collate

    data = prepare(prices, 30, 3)
    frame = next(iter(prices.values()))
    encoder = load_encoder(arguments.model_path, "returns")
    fitted = fit_targets_per_sequence(
        encoder.tokens_per_day(frame), 30, context_tokens_of(arguments.model_path), 1400, available=1000
    )
    device = choose_device(arguments.device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    forecaster = build_forecaster(
        forecaster_spec(data, fitted), arguments.model_path, encoder, device, choose_dtype("auto", device)
    )
    model = forecaster.model.train()
    torch.nn.init.normal_(model.head.linear.weight, std=1e-3)  # at zero, no gradient would reach the adapters
    optimizer = torch.optim.AdamW([*lora_parameters(model.backbone), *model.head.parameters()], lr=1e-5)
    levels = torch.tensor(data.levels, dtype=torch.float32, device=device)

    def step(examples: list[Any], batch_size: int) -> tuple[float, int, int]:
        """Seconds, targets and tokens of one optimizer step over ``examples``."""
        targets = sum(len(example.scale) for example in examples)
        tokens = sum(len(example.encoded.input_ids) for example in examples)
        micro = [collate(examples[at : at + batch_size]) for at in range(0, len(examples), batch_size)]
        start = time.perf_counter()
        accumulate_gradients(model, micro, levels, accelerator, targets)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, targets, tokens

    packed = forecaster.examples(prices, data.sequences("train", fitted)[:BATCH_SIZE])
    single = forecaster.examples(prices, data.sequences("train", 1)[:fitted])
    step(packed, BATCH_SIZE), step(single[:BATCH_SIZE], BATCH_SIZE)  # warm up
    turns: dict[str, list[tuple[float, int, int]]] = {"packed": [], "one_window_a_pass": []}
    for _ in range(arguments.rounds):
        turns["packed"] += [step(packed, BATCH_SIZE) for _ in range(2)]
        turns["one_window_a_pass"].append(step(single, BATCH_SIZE))
    sides = {}
    for name, results in turns.items():
        seconds = statistics.median(result[0] for result in results)
        _, targets, tokens = results[0]
        sides[name] = {
            "targets_per_sequence": fitted if name == "packed" else 1,
            "tokens_per_target": tokens / targets,
            "step_s": seconds,
            "targets_per_s": targets / seconds,
            "tokens_per_s": tokens / seconds,
        }
    ratio = sides["packed"]["targets_per_s"] / sides["one_window_a_pass"]["targets_per_s"]
    facts = {"model": arguments.model_path.name, "prompt": "returns", "batch_size": BATCH_SIZE}
    return {**facts, **sides, "ratio": round(ratio, 2)}


def forecaster_spec(data: Any, targets_per_sequence: int) -> Any:
    """Rank-8 adapters on all linear layers, starting at the EWMA-scaled random walk."""
    from stocklora.checkpoints import ForecasterSpec

    start = data.baselines["ewma"]
    return ForecasterSpec(
        base_model={}, backbone_layers=None, prompt="returns", window_size=30,
        targets_per_sequence=targets_per_sequence, horizon=3, levels=data.levels.tolist(), table=start.table.tolist(),
        scale=start.scale.to_dict(), lora={"rank": 8, "alpha": 16.0},
        calibration={"shrinkage": 1.0, "interval_scale": 1.0},
    )  # fmt: skip


def compare_losses(arguments: argparse.Namespace, prices: Any) -> dict[str, Any]:
    """Final validation loss of both sides after the same epochs over the same targets, for some seeds."""
    import contextlib
    import io
    import tempfile

    from stocklora.fitting import fit
    from stocklora.options import TrainLoraSettings

    losses: dict[str, list[float]] = {"packed": [], "one_window": []}
    for seed in range(arguments.seeds):
        packed_targets = None
        for name in losses:
            single = name == "one_window"
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                result = fit(
                    prices,
                    TrainLoraSettings(
                        model_path=arguments.model_path,
                        backbone_layers=arguments.loss_layers,
                        epochs=arguments.loss_epochs,
                        patience=arguments.loss_epochs,
                        targets_per_sequence=1 if single else None,
                        batch_size=4 if single else 1,
                        gradient_accumulation_steps=-(-packed_targets // 4) if single else 1,
                        scale="ewma",
                        seed=seed,
                        device=arguments.device,
                        save_dir=Path(folder),
                    ),
                )
            packed_targets = result.forecaster.spec.targets_per_sequence
            losses[name].append(result.outcome.history[-1]["validation_pinball_bp"])
    means = {name: statistics.mean(values) for name, values in losses.items()}
    spread = max(statistics.stdev(values) if len(values) > 1 else 0.0 for values in losses.values())
    return {
        "layers": arguments.loss_layers,
        "epochs": arguments.loss_epochs,
        "packed_bp": losses["packed"],
        "one_window_bp": losses["one_window"],
        "packed_mean_bp": means["packed"],
        "one_window_mean_bp": means["one_window"],
        "difference_bp": means["packed"] - means["one_window"],
        "seed_spread_bp": spread,
    }


if __name__ == "__main__":
    sys.exit(main())
