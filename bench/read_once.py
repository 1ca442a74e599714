"""Layers that do not train are read once: ``--adapt_layers K`` against adapters in all layers.

    python bench/read_once.py                                 # SmolLM2-135M, a year of AAPL, K = 8
    python bench/read_once.py --adapt_layers 4 --epochs 5 --no-learning

*Speed*: both runs in one process, an epoch of each in turn (training steps and validation, as ``train_lora.py`` takes
them), medians of wall clock and CPU time. The first layers are read once, and that is counted once: the time of
``--of_epochs`` epochs is the reading and so many times the median epoch. *Memory*: each run in a process of its own.
*Learning*: both on days with a planted trend, one day ahead, and on real ones; the lowest validation loss, over that of
the start, and the loss on test days. Writes bench/results/read_once.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, ROOT, Clock, answer_of, run_benchmark, save_result

SPEED_TARGET, MEMORY_TARGET = 3.0, 0.5


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--adapt_layers", type=int, default=8, help="last layers that train (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of each side (default: %(default)s)")
    parser.add_argument("--of_epochs", type=int, default=20, help="epochs of the run it stands for (%(default)s)")
    parser.add_argument("--sequences", type=int, help="time only so many sequences of the year (default: all)")
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--learning", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--learning_epochs", type=int, default=3, help="of the third part (default: %(default)s)")
    parser.add_argument("--learning_days", type=int, default=300, help="of each of its tables (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="real prices of the third part (default: bundled AAPL)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=RESULTS / "read_once.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv, work)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.base_models.folders import check_model_folder
    from stocklora.cli.console import say

    check_model_folder(arguments.model_path)
    result: dict[str, Any] = {"model": arguments.model_path.name, "adapt_layers": arguments.adapt_layers}
    met = True
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.speed:
            speed = result["speed"] = measure_speed(arguments, Path(scratch))
            say(
                f"{arguments.of_epochs} epochs: {speed['whole']['run_cpu_s']:,.0f} s of CPU with all layers, "
                f"{speed['last']['run_cpu_s']:,.0f} s with the last {arguments.adapt_layers}: "
                f"{speed['ratio_cpu']:.2f} times as fast, by wall clock {speed['ratio_wall']:.2f} "
                f"(target: {SPEED_TARGET:.0f})"
            )
            met &= speed["ratio_cpu"] >= SPEED_TARGET
        if arguments.memory:
            peaks = [answer_of(__file__, ways(arguments)[side], Path(scratch))["peak_mb"] for side in ("whole", "last")]
            result["memory"] = {"whole_mb": peaks[0], "last_mb": peaks[1], "ratio": peaks[1] / peaks[0]}
            say(f"peak memory: {peaks[0]:,.0f} and {peaks[1]:,.0f} MB: {peaks[1] / peaks[0]:.3f} (target: 0.5)")
            met &= peaks[1] / peaks[0] <= MEMORY_TARGET
        if arguments.learning:
            result["learning"] = compare_learning(arguments, Path(scratch))
            for name, row in result["learning"].items():
                say(f"{name}: {json.dumps(row)}")
    save_result(arguments.output, result)
    say(f"saved: {arguments.output}")
    return 0 if met else 1


def ways(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of ``train_lora.py`` of both sides."""
    shared = {"model_path": str(arguments.model_path.resolve()), "device": arguments.device, "epochs": 1}
    return {"whole": shared, "last": shared | {"adapt_layers": arguments.adapt_layers}}


def a_year(ticker: str = "AAPL") -> Any:
    from stocklora.prices.sources.fetch import sample_prices

    return sample_prices(ticker, "1y")[0]


def measure_speed(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds of an epoch of either side, in turn, and of what is read once."""
    from stocklora.base_models.loading import BaseModel
    from stocklora.cli.console import say
    from stocklora.cli.settings import restored
    from stocklora.finetune.fit import join_training_processes, prepare_data, prepare_run
    from stocklora.finetune.optimization import Optimization
    from stocklora.finetune.prepare import split_prices
    from stocklora.finetune.settings import TrainLoraSettings
    from stocklora.forecaster.batches import predict

    runs, table = {}, {}
    for side, flags in ways(arguments).items():
        settings = restored(flags | {"save_dir": str(scratch / side)}, TrainLoraSettings)
        base = BaseModel(settings.model_path)
        accelerator = join_training_processes(settings, alone=True)
        data = prepare_data(split_prices(a_year(), settings), settings, base)
        prepared = prepare_run(data, settings, base, accelerator)
        model = prepared.forecaster.model
        examples = {split: part[: arguments.sequences] for split, part in prepared.prepared.examples.items()}
        clock = Clock()
        for example in [*examples["train"], *examples["validation"]]:
            if prepared.states is not None:
                prepared.states.of(example)
        table[side] = {"read_once": clock.seconds(), "epochs": []}
        say(f"read once, {side}: {table[side]['read_once'][1]:.1f} s of CPU")
        levels = prepared.prepared.data.levels
        steps = Optimization(model, examples["train"], levels, settings, accelerator, prepared.states)
        runs[side] = (steps, examples["validation"], prepared)
    for number in range(arguments.epochs + 1):
        for side, (steps, validation, prepared) in runs.items():
            clock = Clock()
            list(steps.epoch(number))
            predict(prepared.forecaster.model, validation, prepared.forecaster.device, states=prepared.states)
            seconds = clock.seconds()
            say(f"epoch {number}, {side}: {seconds[0]:.1f} s, {seconds[1]:.1f} s of CPU")
            if number:  # the first fetches memory from the system
                table[side]["epochs"].append(seconds)
    for row in table.values():
        for index, kind in enumerate(("wall", "cpu")):
            row[f"epoch_{kind}_s"] = statistics.median(epoch[index] for epoch in row["epochs"])
            row[f"run_{kind}_s"] = row["read_once"][index] + arguments.of_epochs * row[f"epoch_{kind}_s"]
    tokens = sum(len(example.encoded.input_ids) for example in runs["whole"][0].training)
    ratios = {f"ratio_{kind}": table["whole"][f"run_{kind}_s"] / table["last"][f"run_{kind}_s"] for kind in
              ("wall", "cpu")}  # fmt: skip
    return {"tokens_an_epoch": tokens, "of_epochs": arguments.of_epochs, **table, **ratios}


def compare_learning(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Validation and test loss of both sides, over the start's and over that of EWMA, on each table of days."""
    days = arguments.learning_days
    trend = {"planted": days, "horizon": 1, "learning_rate": 1e-3, "batch_size": 1, "scale": "ewma"}
    real = {"data": [str(arguments.data.resolve())]} if arguments.data else {"last_days": days}
    found: dict[str, Any] = {}
    for name, table in (("planted trend", trend), ("real days", real)):
        for side, flags in ways(arguments).items():
            epochs = {"epochs": arguments.learning_epochs, "patience": arguments.learning_epochs}
            found[f"{name}, {side}"] = answer_of(__file__, flags | table | epochs, scratch)
    return found


def work(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run of ``train_lora.py`` in a process of its own."""
    from stocklora.cli.settings import restored
    from stocklora.finetune.fit import finetune
    from stocklora.finetune.settings import TrainLoraSettings
    from stocklora.prices.tables import read_prices
    from stocklora.runtime.machine import peak_memory_mb

    planted, last_days = task.pop("planted", None), task.pop("last_days", None)
    settings = restored(task | {"save_dir": str(folder / "run")}, TrainLoraSettings)
    if planted is not None:
        prices = {"TREND": planted_trend(planted)}
    elif last_days is not None:
        prices = {name: frame.iloc[-last_days:] for name, frame in a_longer_time().items()}
    else:
        prices = read_prices(settings.data) if settings.data else a_year()
    run = finetune(prices, settings)
    scores, history = run.test_scores, run.outcome.history
    return {
        "peak_mb": peak_memory_mb(run.forecaster.device.type),
        "validation_ratio": min(row["validation_ratio"] for row in history[1:]),
        "validation_ratios": [row["validation_ratio"] for row in history[1:]],
        "test_of_ewma": scores["model"].pinball_bp / scores["ewma"].pinball_bp,
        "seconds": history[-1]["seconds"],
    }


def a_longer_time() -> Any:
    from stocklora.prices.sources.fetch import sample_prices

    return sample_prices("AAPL", "5y")[0]


def planted_trend(rows: int) -> Any:
    """Runs of ups and downs, ten days long on average: today's sign tells tomorrow's."""
    import pandas as pd

    draw = np.random.default_rng(0)
    signs = np.cumprod(np.where(draw.random(rows) < 0.1, -1.0, 1.0))
    close = 50 * np.exp(np.cumsum(0.01 * (0.8 * signs + 0.5 * draw.standard_normal(rows))))
    volume = np.round(1e6 * np.exp(0.3 * draw.standard_normal(rows)))
    days = pd.bdate_range("2020-01-01", periods=rows, name="Date")
    columns = {"Open": close, "High": 1.001 * close, "Low": close / 1.001, "Close": close, "Volume": volume}
    return pd.DataFrame(columns, index=days)


if __name__ == "__main__":
    sys.exit(main())
