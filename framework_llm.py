"""Forecast the next three closes with a fine-tuned language model.

    python framework_llm.py --test_csv sample_test.csv --model_path ./Qwen3-0.6B \\
        --lora_weights ./checkpoints/best_lora_weights.pth --output predictions.csv
    python framework_llm.py --test_csv prices/ --model_path models/smollm2-135m --plot forecast.png

Window, prompt, horizon and LoRA settings come from the weights file. Writes one row a ticker and day:
Ticker,Origin,Date,Day,Last_Close,Predicted_Close,P05,P10,P25,P50,P75,P90,P95.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stocklora.console import UserError, run_script, say
from stocklora.options import ForecastSettings
from stocklora.settings import add_settings, resolve_settings


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="framework_llm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_settings(parser, ForecastSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(resolve_settings(arguments, ForecastSettings)))


def run(settings: ForecastSettings) -> int:
    from stocklora.dataset import select_tickers
    from stocklora.prices import read_prices

    prices = select_tickers(read_prices(settings.test_csv), settings.tickers)

    from stocklora.devices import choose_device, choose_dtype
    from stocklora.forecasting import load_forecaster
    from stocklora.machine import peak_memory_mb
    from stocklora.predictions import write_predictions
    from stocklora.tables import print_forecast

    device = choose_device(settings.device)
    forecaster, weights = load_forecaster(
        settings.lora_weights,
        settings.model_path,
        device,
        choose_dtype(settings.dtype, device),
        settings.trust_remote_code,
    )
    trained_window = forecaster.spec.window_size
    if settings.window_size not in (None, trained_window):
        raise UserError(
            f"--window_size {settings.window_size}: {settings.lora_weights} was trained with a window of "
            f"{trained_window} days; leave the flag out or train again"
        )
    rows = forecaster.forecast(prices)
    write_predictions(settings.output, rows)

    trainable = sum(p.numel() for p in forecaster.model.parameters() if p.requires_grad)
    say(f"trainable parameters: {trainable:,}")
    say(f"peak memory: {peak_memory_mb(device.type):,.0f} MB ({device.type})")
    for score_name, label in (("model", "this model"), ("naive", "the last close")):
        score = weights.training["test_scores"][score_name]
        say(f"test pinball loss of {label}: {score['pinball_bp']:.2f} bp (in training's {score['origins']} test days)")
    print_forecast(rows)
    say(f"saved: {settings.output}")
    if settings.plot is not None:
        plot(settings.plot, prices, rows)
    return 0


def plot(path: Path, prices: dict, rows: list[dict]) -> None:
    from stocklora.report import plot_forecast

    for ticker, frame in prices.items():
        own = [row for row in rows if row["Ticker"] == ticker]
        if not own:  # too few days: said already
            continue
        name = ticker.replace("/", "-")
        target = path if len(prices) == 1 else path.with_name(f"{path.stem}_{name}{path.suffix}")
        plot_forecast(frame, own, target)
        say(f"chart: {target}")


if __name__ == "__main__":
    sys.exit(main())
