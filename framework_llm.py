"""Forecast the next three closes with a fine-tuned language model.

    python framework_llm.py --test_csv sample_test.csv --model_path ./Qwen3-0.6B \\
        --lora_weights ./checkpoints/best_lora_weights.pth --output predictions.csv
    python framework_llm.py --test_csv prices/ --model_path models/smollm2-135m --plot forecast.png
    python framework_llm.py --ticker AAPL MSFT                 # downloads fresh prices itself
    python framework_llm.py --ticker AAPL --watch 15           # stays; forecasts anew after each close
    python framework_llm.py --test_csv sample_test.csv --lora_weights a.pth b.pth c.pth --ensemble median
    python framework_llm.py --ticker AAPL --lora_weights a.pth b.pth --model_path ./Qwen3-0.6B ./models/gpt2-medium
    python framework_llm.py --ticker AAPL --lora_weights a.pth:0.7 b.pth:0.3     # one model, averaged weights
    python framework_llm.py --ticker AAPL --model_path merged --lora_weights merged     # what merge_lora.py wrote

Window, prompt, horizon and LoRA settings come from the weights file. Writes one row a ticker and day:
Ticker,Origin,Date,Day,Last_Close,Predicted_Close,P05,P10,P25,P50,P75,P90,P95.
Exit code 0: all is forecast; 1: some of --ticker did not come, the others are forecast; 2: nothing was written,
and the line says why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocklora.cli.console import UserError, run_script, say, warn
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings
from stocklora.forecaster.settings import ForecastSettings

if TYPE_CHECKING:
    from stocklora.forecaster.ensemble import Ensemble


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="framework_llm.py", description=__doc__)
    add_settings(parser, ForecastSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(resolve_settings(arguments, ForecastSettings)))


def run(settings: ForecastSettings) -> int:
    from stocklora.forecaster.live import price_feed, watch

    feed = price_feed(settings)
    prices = feed.first()

    from stocklora.forecaster.ensemble import Ensemble
    from stocklora.forecaster.predictions import write_predictions
    from stocklora.runtime.machine import choose_device, choose_dtype

    device = choose_device(settings.device)
    ensemble = Ensemble(
        settings.members, settings.ensemble, device, choose_dtype(settings.dtype, device), settings.trust_remote_code,
        shares=settings.shares,
    )  # fmt: skip
    check_window(settings, ensemble)
    check_market(ensemble, [*prices, *feed.beside])
    rows = ensemble.forecast(prices, feed.beside)
    write_predictions(settings.output, rows)
    announce(ensemble)
    show(settings, prices, rows)
    if settings.watch is None:
        return feed.finish()

    def again(prices: dict, news: str) -> None:
        rows = ensemble.forecast(prices, feed.beside)
        write_predictions(settings.output, rows)
        say()
        say(news)
        show(settings, prices, rows)

    return watch(feed, prices, settings.watch, again)


def check_window(settings: ForecastSettings, ensemble: Ensemble) -> None:
    for (path, _), content in zip(ensemble.members, ensemble.weights, strict=True):
        trained_window = content.spec.window_size
        if settings.window_size not in (None, trained_window):
            raise UserError(
                f"--window_size {settings.window_size}: {path} was trained with a window of {trained_window} days; "
                f"leave the flag out or train again"
            )


def check_market(ensemble: Ensemble, tickers: list[str]) -> None:
    """Weights that read the market were trained on some tickers' market; far fewer are another one."""
    for (path, _), content in zip(ensemble.members, ensemble.weights, strict=True):
        spec = content.spec
        trained = len(content.training.get("data", {}).get("tickers", []))
        if (
            (spec.scale["kind"] == "harx" or "market" in spec.indicators)
            and trained >= 5
            and 2 * len(tickers) < trained
        ):
            warn(
                f"{path} was trained on {trained} tickers and reads their market every day; with {len(tickers)} its "
                f"error bars may be off: give the others' prices too and choose by --tickers"
            )


def announce(ensemble: Ensemble) -> None:
    """What forecasts, and how it did on the test days of its training."""
    from stocklora.forecaster.ensemble import trainable_parameters
    from stocklora.runtime.machine import peak_memory_mb

    memory = f"peak memory: {peak_memory_mb(ensemble.device.type):,.0f} MB ({ensemble.device.type})"
    if averaged := ensemble.weights[0].training.get("averaged"):
        say(f"trainable parameters: {trainable_parameters(ensemble.weights[0]):,}")
        say(memory)
        say(f"average of the weights of {len(averaged)} models, itself not scored; the test pinball losses of each:")
        for part in averaged:
            say(f"  {part['share']:.3g} of {part['path']}: {part['test_scores']['model']['pinball_bp']:.2f} bp")
        return
    scores = [content.training["test_scores"] for content in ensemble.weights]
    if len(scores) == 1:
        say(f"trainable parameters: {trainable_parameters(ensemble.weights[0]):,}")
        say(memory)
        for score_name, label in (("model", "this model"), ("naive", "the last close")):
            score = scores[0][score_name]
            say(
                f"test pinball loss of {label}: {score['pinball_bp']:.2f} bp (in training's {score['origins']} test "
                f"days)"
            )
        return
    say(f"{ensemble.how} of the quantiles of {len(scores)} models:")
    for (path, _), content, score in zip(ensemble.members, ensemble.weights, scores, strict=True):
        spec, model, naive = content.spec, score["model"], score["naive"]
        say(
            f"  {path}: {spec.base_model['name']}, window {spec.window_size}, prompt {spec.prompt}, "
            f"{trainable_parameters(content):,} trainable parameters; test pinball loss {model['pinball_bp']:.2f} bp, "
            f"of the last close {naive['pinball_bp']:.2f} bp (in training's {model['origins']} test days)"
        )
    say(memory)


def show(settings: ForecastSettings, prices: dict, rows: list[dict[str, Any]]) -> None:
    from stocklora.forecaster.predictions import print_forecast

    print_forecast(rows)
    say(f"saved: {settings.output}")
    if settings.plot is not None:
        plot(settings.plot, prices, rows)


def plot(path: Path, prices: dict, rows: list[dict[str, Any]]) -> None:
    from stocklora.plots.forecasts import plot_forecast

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
