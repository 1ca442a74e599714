"""One sequence, many forecasts: packed training against one window a forward pass.

    python bench/packing.py                       # models/smollm2-135m, writes bench/results/packing.json
    python bench/packing.py --model_path FOLDER --seeds 1
    python bench/packing.py --seeds 0 --prompt words --lengths 400 1400

Part one times real training steps of four sequences, the sides taking turns: one window a sequence, the default token
budget of train_lora.py, and others; each in passes as train_lora.py cuts them (2,816 tokens on a CPU), the default also
in one pass of all four. Part two trains the first layers of the model with one
window and with the default on the same targets, step by step, and compares their losses on two years of validation days
against the noise of those days.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, run_benchmark, save_result

TARGET_RATIO = 20.0
BATCH_SIZE = 4  # sequences a step on all sides: the default of train_lora.py
UNCUT = "packed, one pass"
EVERYTHING = 10**9  # tokens


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each side (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the model, the first part's (default: all)")
    parser.add_argument("--prompt", default="returns", choices=("returns", "zscores", "words"))
    parser.add_argument("--lengths", type=int, nargs="*", default=[1000, 2000, 2700, 3500], metavar="TOKENS",
                        help="token budgets beside the default one (default: 1000 2000 2700 3500)")  # fmt: skip
    parser.add_argument("--loss_layers", type=int, default=6, help="layers of the second part (default: %(default)s)")
    parser.add_argument("--loss_epochs", type=int, default=3, help="epochs of the second part (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the second part (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=RESULTS / "packing.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.base_models.folders import check_model_folder
    from stocklora.cli.console import print_table, say
    from stocklora.dataset.prepare import prepare, select_tickers
    from stocklora.prices.tables import read_prices
    from stocklora.runtime.files import bundled_folder
    from stocklora.runtime.machine import keep_freed_memory

    check_model_folder(arguments.model_path)
    prices = select_tickers(read_prices(bundled_folder() / "us_tech_2000_2013.csv.gz"), ["AAPL"])
    data = prepare(prices, 30, 3, validation_from="2010-01-04", test_from="2012-01-03")
    keep_freed_memory()  # as train_lora.py does
    speed = measure_speed(arguments, data)
    loss = compare_losses(arguments, data) if arguments.seeds else None
    save_result(arguments.output, {"speed": speed, "loss": loss})

    print_table(
        f"{arguments.model_path.name}: LoRA training, forward, backward and step",
        ("forward pass", "forecasts", "tokens", "tokens a forecast", "targets/s", "ratio", "by CPU time"),
        [
            (name.replace("_", " "), side["targets_per_sequence"], f"{side['tokens_per_sequence']:.0f}",
             f"{side['tokens_per_target']:.0f}", f"{side['targets_per_s']:.2f}", f"{side['ratio']:.1f}",
             f"{side['ratio_cpu']:.1f}")
            for name, side in speed["sides"].items()
        ],
    )  # fmt: skip
    say(f"packed is {speed['ratio']:.1f} times as fast (target: {TARGET_RATIO:.0f})")
    if loss:
        say(
            f"validation loss over {loss['validation_days']} days after the same steps: packed {loss['packed_bp']:.3f} "
            f"bp, one window {loss['one_window_a_pass_bp']:.3f} bp (untrained {loss['untrained_bp']:.3f}); difference "
            f"{loss['difference_bp']:+.3f}, standard error {loss['standard_error_bp']:.3f}"
        )
    say(f"saved: {arguments.output}")
    return 0 if speed["ratio"] >= TARGET_RATIO else 1


def build(arguments: argparse.Namespace, data: Any, layers: int | None) -> Any:
    """A forecaster with rank-8 adapters on all linear layers."""
    from stocklora.base_models.loading import BaseModel
    from stocklora.forecaster.forecaster import build_forecaster
    from stocklora.forecaster.weights import ForecasterSpec
    from stocklora.runtime.machine import choose_device, choose_dtype

    base = BaseModel(arguments.model_path)
    start = data.baselines["ewma"]
    spec = ForecasterSpec(
        base_model={}, backbone_layers=layers, prompt=arguments.prompt, window_size=data.window_size,
        targets_per_sequence=1, horizon=data.horizon, levels=data.levels.tolist(), table=start.table.tolist(),
        scale=start.scale.to_dict(), lora={"rank": 8, "alpha": 16.0},
        calibration={"shrinkage": 1.0, "interval_scale": 1.0},
    )  # fmt: skip
    device = choose_device(arguments.device)
    return build_forecaster(spec, base, device, choose_dtype(arguments.dtype, device))


class Trainer:
    """Real optimizer steps, as ``train_lora.py`` takes them."""

    def __init__(self, forecaster: Any) -> None:
        import torch
        from accelerate import Accelerator

        from lora import lora_parameters
        from stocklora.finetune.settings import TrainLoraSettings

        defaults = TrainLoraSettings()
        self.model = forecaster.model.train()
        self.device = forecaster.device
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self.levels = torch.tensor(forecaster.levels, dtype=torch.float32, device=self.device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(lora_parameters(self.model.backbone)), "lr": defaults.learning_rate},
                {"params": list(self.model.head.parameters()), "lr": defaults.head_learning_rate},
            ]
        )

    def step(self, examples: list[Any], most: int | None = None) -> tuple[float, float]:
        """One optimizer step over ``examples`` in passes of at most so many tokens, or as training cuts them.

        Returns:
            Seconds, and those of the CPU.
        """
        import torch

        from stocklora.finetune.optimization import accumulate_gradients
        from stocklora.forecaster.batches import collate, grouped_by_tokens, training_tokens

        most = most or training_tokens(None, self.device.type) or EVERYTHING
        targets = sum(len(example.scale) for example in examples)
        batches = [examples[at : at + BATCH_SIZE] for at in range(0, len(examples), BATCH_SIZE)]
        micro = [collate(group) for batch in batches for group in grouped_by_tokens(batch, most)]
        start, cpu = time.perf_counter(), time.process_time()
        accumulate_gradients(self.model, micro, self.levels, self.accelerator, targets)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu


def measure_speed(arguments: argparse.Namespace, data: Any) -> dict[str, Any]:
    """Targets a second of whole training steps, the sides taking turns, at each token budget and at one window."""
    import torch

    forecaster = build(arguments, data, arguments.layers)
    # At zero, no gradient would reach the adapters.
    torch.nn.init.normal_(forecaster.model.head.linear.weight, std=1e-3)
    trainer = Trainer(forecaster)
    own = targets_of(forecaster, data, arguments, None)
    budgets = {f"packed, {tokens:,} tokens": targets_of(forecaster, data, arguments, tokens) for tokens in
               arguments.lengths}  # fmt: skip
    sides = {
        name: forecaster.examples(data.prices, data.sequences("train", targets)[:BATCH_SIZE])
        for name, targets in {"packed": own, UNCUT: own, **budgets, "one_window_a_pass": 1}.items()
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(arguments.rounds + 1):
        for name, examples in sides.items():
            # One window is over soon: as many passes as there are turns of one packed pass would be a bad clock.
            most = EVERYTHING if name == UNCUT else None
            passes = [trainer.step(examples, most) for _ in range(4 if name == "one_window_a_pass" else 1)]
            if turn:  # the first steps fetch their memory from the system
                seconds[name].append((statistics.mean(wall for wall, _ in passes), min(cpu for _, cpu in passes)))
    table = {}
    for name, examples in sides.items():
        wall_s, cpu_s = statistics.median(wall for wall, _ in seconds[name]), min(cpu for _, cpu in seconds[name])
        targets = sum(len(example.scale) for example in examples)
        tokens = sum(len(example.encoded.input_ids) for example in examples)
        table[name] = {
            "targets_per_sequence": len(examples[0].scale),
            "tokens_per_sequence": tokens / len(examples),
            "tokens_per_target": tokens / targets,
            "step_s": wall_s,
            "step_cpu_s": cpu_s,
            "targets_per_s": targets / wall_s,
            "targets_per_cpu_s": targets / cpu_s,
        }
    for side in table.values():
        for kind in ("s", "cpu_s"):
            of_one = side[f"targets_per_{kind}"] / table["one_window_a_pass"][f"targets_per_{kind}"]
            side["ratio" if kind == "s" else "ratio_cpu"] = round(of_one, 2)
    # Others share the processor's cores, but not this process's time on them.
    kind = "ratio_cpu" if forecaster.device.type == "cpu" else "ratio"
    dtype = str(next(forecaster.model.backbone.parameters()).dtype).removeprefix("torch.")
    facts = {
        "model": arguments.model_path.name, "layers": arguments.layers, "prompt": arguments.prompt, "dtype": dtype,
        "threads": torch.get_num_threads(), "batch_size": BATCH_SIZE,
    }  # fmt: skip
    return {**facts, "sides": table, "ratio": table["packed"][kind]}


def targets_of(forecaster: Any, data: Any, arguments: argparse.Namespace, budget: int | None) -> int:
    """Targets of a sequence under a token budget; None for the default of ``train_lora.py``."""
    from stocklora.dataset.prompts import fit_targets_per_sequence
    from stocklora.finetune.settings import TrainLoraSettings

    (frame,) = data.prices.values()
    tokens = forecaster.encoder.tokens_per_day(frame)
    budget = budget or TrainLoraSettings().max_tokens_per_sequence
    return fit_targets_per_sequence(tokens, data.window_size, forecaster.context_tokens, budget, available=1000)


def compare_losses(arguments: argparse.Namespace, data: Any) -> dict[str, Any]:
    """Validation loss of both sides after the same steps on the same targets, day by day.

    The noise is the standard error of the mean difference over validation days, from means of blocks of
    ten days, since neighbouring days share the returns that they forecast.
    """
    import numpy as np
    import torch

    from stocklora.finetune.optimization import standardize_head
    from stocklora.metrics.scores import BASIS_POINTS, pinball_loss

    returns = data.returns_of("validation")
    differences, means = [], {"packed": 0.0, "one_window_a_pass": 0.0, "untrained": 0.0}
    for seed in range(arguments.seeds):
        losses = {}
        for name in ("untrained", "packed", "one_window_a_pass"):
            torch.manual_seed(seed)
            forecaster = build(arguments, data, arguments.loss_layers)
            fitted = targets_of(forecaster, data, arguments, None)
            packed = forecaster.examples(data.prices, data.sequences("train", fitted)[-BATCH_SIZE - 1 : -1])
            windows = {item.encoded.sequence.origins[0]: item for item in
                       forecaster.examples(data.prices, data.sequences("train", 1))}  # fmt: skip
            standardize_head(forecaster.model, packed, forecaster.device)
            trainer = Trainer(forecaster)
            for _ in range(arguments.loss_epochs if name != "untrained" else 0):
                for example in packed:
                    same = [windows[origin] for origin in example.encoded.sequence.origins]
                    trainer.step([example] if name == "packed" else same)
            quantiles = forecaster.quantiles(forecaster.examples(data.prices, data.sequences("validation", fitted)))
            losses[name] = BASIS_POINTS * pinball_loss(returns, quantiles, forecaster.levels).mean(axis=1)
            means[name] += float(losses[name].mean()) / arguments.seeds
        differences.append(losses["packed"] - losses["one_window_a_pass"])
    difference = np.mean(differences, axis=0)
    blocks = difference[: len(difference) // 10 * 10].reshape(-1, 10).mean(axis=1)
    return {
        "layers": arguments.loss_layers,
        "epochs": arguments.loss_epochs,
        "seeds": arguments.seeds,
        "training_targets": BATCH_SIZE * fitted,
        "validation_days": len(returns),
        **{f"{name}_bp": value for name, value in means.items()},
        "difference_bp": float(difference.mean()),
        "standard_error_bp": float(blocks.std(ddof=1) / np.sqrt(len(blocks))),
    }


if __name__ == "__main__":
    sys.exit(main())
