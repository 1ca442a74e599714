"""What ``train.py`` and ``framework.py`` do: fit the simple baseline, report it, forecast with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from stocklora.baselines.settings import HORIZON, FrameworkSettings, TrainSettings
from stocklora.baselines.simple_network import (
    Epoch,
    Scaling,
    SimpleForecaster,
    SimpleStockPredictor,
    error_scale,
    fit_scaling,
    load_simple,
    residual_quantiles,
    roll_forward,
    save_simple,
    train_network,
    windows_at,
)
from stocklora.cli.console import UserError, listed, progress, say
from stocklora.dataset.prepare import ForecastData, data_facts, prepare, with_a_day_to_learn_from
from stocklora.dataset.windows import SPLITS
from stocklora.forecaster.explain import say_more
from stocklora.forecaster.predictions import prediction_rows, print_forecast, write_predictions
from stocklora.ledger.record import Maker, record_forecast
from stocklora.metrics.scores import Scores, print_scores
from stocklora.runtime.files import as_json_types, sha256_of
from stocklora.runtime.machine import choose_device, peak_memory_mb, versions


@dataclass(frozen=True)
class SimpleRun:
    """A finished training run.

    Attributes:
        test_scores: ``naive``, ``drift``, ``ewma`` and ``model``, on test days.
    """

    forecaster: SimpleForecaster
    data: ForecastData
    history: list[Epoch]
    test_scores: Mapping[str, Scores]
    seconds: float

    @property
    def best(self) -> Epoch:
        return min(self.history, key=lambda epoch: (epoch.validation_loss, epoch.number))


def train_and_save(prices: Mapping[str, pd.DataFrame], settings: TrainSettings) -> None:
    """What ``train.py`` does: train, write the model file, and say how good it is.

    Raises:
        UserError: too few days for three parts, or a file that cannot be written.
    """
    run = fit_simple(prices, settings)
    save_simple(settings.save_path, run.forecaster)
    print_run_result(run)
    say(f"model: {settings.save_path}")
    say(f"next: python framework.py --model_path {settings.save_path} --test_csv {settings.data[0]}")


def forecast_and_save(prices: Mapping[str, pd.DataFrame], settings: FrameworkSettings) -> None:
    """What ``framework.py`` does: read the model file, forecast every ticker, write and print the forecasts.

    Raises:
        UserError: a model file that cannot be used, or a ticker with too few days.
    """
    device = choose_device(settings.device)
    forecaster = load_simple(settings.model_path, device)
    if settings.window_size not in (None, forecaster.window_size):
        raise UserError(
            f"--window_size {settings.window_size}: {settings.model_path} was trained with a window of "
            f"{forecaster.window_size} days; leave the flag out or train again"
        )
    rows = forecast_simple(forecaster, prices)
    write_predictions(settings.output, rows)
    say(f"trainable parameters: {forecaster.network.trainable_parameters:,}")
    say(f"peak memory: {peak_memory_mb(device.type):,.0f} MB ({device.type})")
    print_forecast(rows)
    say(f"saved: {settings.output}")
    maker = Maker(f"simple network {settings.model_path}", sha256_of(settings.model_path))
    record_forecast(settings.ledger, rows, prices, maker)
    say_more(rows, settings, None)


def fit_simple(prices: Mapping[str, pd.DataFrame], settings: TrainSettings, *, quiet: bool = False) -> SimpleRun:
    """Train on all tickers together; scaling from training days, error bars from validation days.

    Args:
        prices: ticker -> its table.
        settings: what ``train.py`` was told.
        quiet: say nothing of what is trained.

    Raises:
        UserError: too few days for three parts.
    """
    prices = with_a_day_to_learn_from(prices, settings.window_size + HORIZON + 1)
    data = prepare(
        prices, settings.window_size, HORIZON, settings.validation_fraction, settings.test_fraction,
        settings.validation_from, settings.test_from,
    )  # fmt: skip
    torch.set_num_threads(1)  # too small a network to gain from handing its rows around the cores
    windows = {
        split: of_each_ticker(data, split, partial(windows_at, window_size=data.window_size))
        for split in ("train", "validation")
    }
    scaling = fit_scaling(windows["train"], data.returns_of("train")[:, 0])
    torch.manual_seed(settings.seed)
    network = SimpleStockPredictor(settings.window_size).to(choose_device(settings.device))
    if not quiet:
        print_run_facts(data, network)
    start = time.perf_counter()
    history = train_epochs(network, scaling, data, windows, settings, shown=not quiet)
    seconds = time.perf_counter() - start

    errors = data.returns_of("validation") - roll_forward(network, scaling, windows["validation"], HORIZON)
    error_scales = of_each_ticker(data, "validation", partial(error_scale, horizon=HORIZON))
    residuals = residual_quantiles(errors, error_scales, data.levels)
    forecaster = SimpleForecaster(network, scaling, settings.window_size, data.levels, residuals, {})
    scores = {name: data.score(data.forecasts_of(name, "test"), "test") for name in ("naive", "drift", "ewma")}
    scores["model"] = data.score(of_each_ticker(data, "test", forecaster.quantiles), "test")
    run = SimpleRun(forecaster, data, history, scores, seconds)
    forecaster.training.update(training_facts(run, settings))
    return run


def train_epochs(
    network: SimpleStockPredictor,
    scaling: Scaling,
    data: ForecastData,
    windows: Mapping[str, np.ndarray],
    settings: TrainSettings,
    shown: bool,
) -> list[Epoch]:
    """Train the network in place to the weights of its best epoch; every epoch's losses.

    Args:
        windows: split -> (n, window, 5), of training and validation days.
        shown: whether a bar shows how far it is.
    """
    device = next(network.parameters()).device

    def tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        targets = torch.from_numpy((data.returns_of(split)[:, 0] / scaling.return_std).astype(np.float32))
        return scaling.inputs(windows[split]).to(device), targets.to(device)

    epochs = train_network(
        network, tensors("train"), tensors("validation"), settings.epochs, settings.batch_size,
        settings.learning_rate, settings.patience, settings.seed,
    )  # fmt: skip
    history: list[Epoch] = []
    with progress("validation loss / last close {task.fields[ratio]}", shown=shown) as bar:
        task = bar.add_task("training", total=settings.epochs, ratio="-")
        for epoch in epochs:
            history.append(epoch)
            ratio = epoch.validation_loss / max(history[0].validation_loss, 1e-12)
            bar.update(task, completed=epoch.number, ratio=f"{ratio:.4f}")
    return history


def of_each_ticker(
    data: ForecastData, split: str, compute: Callable[[pd.DataFrame, Sequence[int]], np.ndarray]
) -> np.ndarray:
    """(n, ...): ``compute`` of every ticker's table and origins, in the order of ``data.returns_of``."""
    return np.concatenate([compute(frame, data.origins[name][split]) for name, frame in data.prices.items()])


def training_facts(run: SimpleRun, settings: TrainSettings) -> dict[str, Any]:
    """What the model file says of its own making."""
    sequences = {split: run.data.sequences(split, 1) for split in SPLITS}
    return {
        "data": data_facts(run.data, sequences),
        "settings": as_json_types(asdict(settings)),
        "versions": versions(),
        "best_epoch": run.best.number,
        "test_scores": {name: asdict(scores) for name, scores in run.test_scores.items()},
    }


def print_run_facts(data: ForecastData, network: SimpleStockPredictor) -> None:
    """What is about to be trained, on what."""
    counts = {split: sum(len(parts[split]) for parts in data.origins.values()) for split in SPLITS}
    say(f"trainable parameters: {network.trainable_parameters:,}")
    say(f"tickers: {len(data.prices)} ({listed(list(data.prices))}); windows of {data.window_size} days")
    say(
        f"days: {counts['train']:,} to train on, {counts['validation']:,} to validate from "
        f"{data.dates.validation:%Y-%m-%d}, {counts['test']:,} to test from {data.dates.test:%Y-%m-%d}"
    )


def print_run_result(run: SimpleRun) -> None:
    """How training went, and the model beside the random walk on days it never saw."""
    best, first, last = run.best, run.history[0], run.history[-1]
    say(f"epochs run: {last.number} in {run.seconds:.1f} s; peak memory {peak_memory_mb():,.0f} MB")
    if best.number == 0:
        say("no epoch beat the last close on validation days; the model forecasts the last close (epoch 0)")
    else:
        ratio = best.validation_loss / max(first.validation_loss, 1e-12)
        say(f"best epoch {best.number}: validation loss {ratio:.4f} of the last close's")
    say()
    print_scores(
        run.test_scores,
        f"Test, {run.test_scores['model'].origins} days from {run.data.dates.test:%Y-%m-%d}, none seen in training, "
        f"mean of 1 to {HORIZON} days ahead",
    )


def forecast_simple(forecaster: SimpleForecaster, prices: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """The next closes of every ticker from its last row; rows of ``predictions.csv``.

    Raises:
        UserError: no ticker has the days of the window.
    """
    prices = with_a_day_to_learn_from(prices, forecaster.window_size)
    for name, frame in prices.items():
        if len(frame) < forecaster.window_size:
            raise UserError(
                f"{name} has {len(frame)} rows; a forecast needs the {forecaster.window_size} days of the window; "
                f"download more days"
            )
    return [
        row
        for name, frame in prices.items()
        for row in prediction_rows(name, frame, forecaster.quantiles(frame, [len(frame) - 1])[0], forecaster.levels)
    ]
