"""framework_llm.py over many tickers: tokens a second against the model's plain forward pass, and memory.

    python bench/many_tickers.py                           # SmolLM2-135M's first 4 layers, 50 and 500 tickers
    python bench/many_tickers.py --layers 30 --tickers 100

Each row is one run of what ``framework_llm.py`` runs, prices to predictions.csv, in a process of its own, so that its
peak memory is its own. The plain pass reads the same sequences without gradient, four at a time as a training step
does, half of them before the forecast's own passes and half after; its time is taken off the run's. Loading the model
takes as long for one ticker as for many and has a column of its own. Writes bench/results/many_tickers.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from backtest_scale import make_prices
from harness import RESULTS, ROOT, Clock, answer_of, run_benchmark, save_result

RATIO_TARGET, MEMORY_TARGET = 0.9, 1.03
BATCH_SIZE = 4


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: %(default)s)")
    parser.add_argument("--tickers", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--rows", type=int, default=500, help="of each ticker (default: %(default)s)")
    parser.add_argument("--plain", type=int, default=64, help="sequences of the plain pass (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=RESULTS / "many_tickers.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv, work)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.base_models.folders import check_model_folder
    from stocklora.cli.console import print_table, say

    check_model_folder(arguments.model_path)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        shared = {"model": str(arguments.model_path.resolve()), "layers": arguments.layers, "device": arguments.device,
                  "plain": arguments.plain}  # fmt: skip
        for count in [4, *sorted(arguments.tickers)]:  # the first makes the weights
            make_prices(Path(scratch) / f"prices-{count}", count, arguments.rows)
            rows.append(answer_of(__file__, shared | {"prices": f"prices-{count}"}, Path(scratch)))
    rows = rows[1:]
    growth = rows[-1]["peak_mb"] / rows[0]["peak_mb"]
    facts = {"model": arguments.model_path.name, "layers": arguments.layers, "rows": arguments.rows}
    save_result(arguments.output, {**facts, "runs": rows, "memory_growth": growth})
    print_table(
        f"{arguments.model_path.name}, {arguments.layers} layers: forecasts",
        ("tickers", "tokens", "tokens/s", "plain", "ratio", "loading s", "peak MB"),
        [
            (row["tickers"], f"{row['tokens']:,}", f"{row['tokens_per_s']:,.0f}", f"{row['plain_tokens_per_s']:,.0f}",
             f"{row['ratio']:.3f}", f"{row['loading_s']:.1f}", f"{row['peak_mb']:,.0f}")
            for row in rows
        ],
    )  # fmt: skip
    say(f"ratio (target: {RATIO_TARGET}) by {rows[-1]['clock']}; memory grows {growth:.3f} times ({MEMORY_TARGET})")
    say(f"saved: {arguments.output}")
    return 0 if rows[-1]["ratio"] >= RATIO_TARGET and growth <= MEMORY_TARGET else 1


def work(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Weights at their start, or one forecast of all tickers with them."""
    from stocklora.finetune.fit import finetune
    from stocklora.finetune.settings import TrainLoraSettings
    from stocklora.prices.tables import read_prices

    prices, weights, model = folder / task["prices"], folder / "run" / "best_lora_weights.pth", Path(task["model"])
    if weights.exists():
        return forecast(task, prices, weights, folder / "predictions.csv")
    few = dict(list(read_prices(prices).items())[:4])
    settings = TrainLoraSettings(
        model_path=model, backbone_layers=task["layers"], epochs=0, save_dir=weights.parent, device=task["device"]
    )
    finetune(few, settings, alone=True)
    return {}


def forecast(task: dict[str, Any], prices: Path, weights: Path, output: Path) -> dict[str, Any]:
    """A run of ``framework_llm.py``, with plain passes just before and after its own."""
    from stocklora.forecaster import ensemble, forecaster
    from stocklora.forecaster.run import forecast_prices
    from stocklora.forecaster.settings import ForecastSettings
    from stocklora.runtime.machine import choose_device, peak_memory_mb

    device = choose_device(task["device"])
    # Others share the processor's cores, but not this process's time on them.
    kind = 0 if device.type == "cuda" else 1
    seconds = dict.fromkeys(("loading", "warming up", "plain"), 0.0)
    tokens = dict.fromkeys(("all", "plain"), 0)
    assemble, predict = ensemble.assemble, forecaster.predict

    def timed(name: str, call: Callable[..., Any], *given: Any) -> Any:
        clock = Clock()
        result = call(*given)
        seconds[name] += clock.seconds()[kind]
        return result

    def between_plain_passes(model: Any, examples: list[Any], device: Any) -> Any:
        sample = examples[:: max(1, len(examples) // task["plain"])]
        half = len(sample) // 2
        tokens.update({"all": tokens_of(examples), "plain": tokens_of(sample)})
        timed("warming up", plain_pass, model, sample[:BATCH_SIZE], device)  # fetches its memory from the system
        timed("plain", plain_pass, model, sample[:half], device)
        result = predict(model, examples, device)
        timed("plain", plain_pass, model, sample[half:], device)
        return result

    ensemble.assemble = lambda *given: timed("loading", assemble, *given)  # type: ignore[assignment]
    forecaster.predict = between_plain_passes  # type: ignore[assignment]
    settings = ForecastSettings(
        test_csv=[prices], model_path=[Path(task["model"])], lora_weights=[weights], output=output,
        device=task["device"],
    )  # fmt: skip
    clock = Clock()
    forecast_prices(settings)
    spent = clock.seconds()[kind] - sum(seconds.values())
    rate, plain = tokens["all"] / spent, tokens["plain"] / seconds["plain"]
    return {
        "tickers": len(list(prices.iterdir())), "tokens": tokens["all"], "seconds": spent, "tokens_per_s": rate,
        "plain_tokens_per_s": plain, "ratio": rate / plain, "loading_s": seconds["loading"],
        "clock": ("wall clock", "CPU time")[kind], "peak_mb": peak_memory_mb(device.type),
    }  # fmt: skip


def plain_pass(model: Any, examples: list[Any], device: Any) -> None:
    """The same model over the same sequences, as a training step collates them, without gradient."""
    import torch

    from stocklora.forecaster.batches import collate

    with torch.inference_mode():
        for at in range(0, len(examples), BATCH_SIZE):
            batch = collate(examples[at : at + BATCH_SIZE]).to(device)
            model(batch.input_ids, batch.origin_tokens, batch.scale)


def tokens_of(examples: list[Any]) -> int:
    return sum(len(example.encoded.input_ids) for example in examples)


if __name__ == "__main__":
    sys.exit(main())
