"""What a training run says, from its first line to its scores, and what it writes into ``--save_dir``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.adapters.survey import print_survey
from stocklora.cli.console import say, warn
from stocklora.dataset.prepare import Example, ForecastData
from stocklora.finetune.optimization import HISTORY_COLUMNS, TrainingOutcome
from stocklora.finetune.prepare import print_facts
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.forecaster import Forecaster
from stocklora.forecaster.methods import trained_state
from stocklora.forecaster.weights import WeightsFile, save_weights
from stocklora.metrics.scores import Scores, print_scores, width_explained
from stocklora.runtime.files import as_json_types, replacing
from stocklora.runtime.machine import peak_memory_mb, versions

WEIGHTS_NAME = "best_lora_weights.pth"
HISTORY_NAME = "training_history.csv"
CURVE_NAME = "training_curve.png"
STORED_AS = {"none": "", "8bit": ", linear layers in int8", "4bit": ", linear layers in 4-bit nf4"}


@dataclass
class FinetunedRun:
    """What a training run leaves behind in memory.

    Attributes:
        data_facts: what the weights file says of the data.
        test_scores: by forecaster: ``naive``, ``drift``, ``ewma``, ``har`` and ``model``.
        test_quantiles: (origins, horizon, levels) of the model, in the order of ``data``.
    """

    forecaster: Forecaster
    data: ForecastData
    data_facts: dict[str, Any]
    outcome: TrainingOutcome
    test_scores: dict[str, Scores]
    test_quantiles: np.ndarray
    weights_path: Path


def print_run_facts(
    forecaster: Forecaster, examples: Mapping[str, list[Example]], settings: TrainLoraSettings, base_parameters: int
) -> None:
    """Print what is about to be trained, before the first step.

    Args:
        base_parameters: of the base model; those of a quantized one are packed and cannot be counted.
    """
    model = forecaster.model
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    inside = 0 if settings.method == "full" else sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    total = base_parameters + inside + sum(parameter.numel() for parameter in model.head.parameters())
    tokens = sum(len(example.encoded.input_ids) for example in examples["train"])
    days_read = sum(len(example.encoded.sequence.days) for example in examples["train"])
    spec = forecaster.spec
    print_facts([
        ("base model", f"{spec.base_model['name']}, {number_format(forecaster)} on {forecaster.device.type}"),
        ("method", name_of_method(settings)),
        *([("read once", f"by the first {model.frozen_layers} layers, which do not train")]
          if settings.adapt_layers is not None and model.frozen_layers else []),
        ("parameters", f"{total:,} total, {trainable:,} trainable ({100 * trainable / total:.2f}%)"),
        ("prompt", f"{' + '.join([spec.prompt, *spec.indicators])}, {tokens / days_read:.1f} tokens a day"),
        ("sequences", f"{len(examples['train']):,} of up to {spec.window_size + spec.targets_per_sequence - 1} days, "
                      f"{spec.targets_per_sequence} forecasts each; {tokens:,} tokens an epoch"),
    ])  # fmt: skip
    print_survey(forecaster.survey)
    if len(examples["train"]) < settings.batch_size:
        warn(
            f"only {len(examples['train'])} training sequences: one step an epoch; --batch_size 1 learns more per epoch"
        )


def number_format(forecaster: Forecaster) -> str:
    """What the base computes in, and what its weights are stored in where that is another thing."""
    stored = str(next(forecaster.model.backbone.parameters()).dtype).removeprefix("torch.")
    if forecaster.model.autocast_dtype is not None:
        return f"{str(forecaster.model.autocast_dtype).removeprefix('torch.')}, weights kept in {stored}"
    return stored + STORED_AS[forecaster.spec.quantization]


def name_of_method(settings: TrainLoraSettings) -> str:
    """What trains, in a few words: the method with its variants, rank and layers."""
    if settings.method == "full":
        return "full: every weight of the base"
    if settings.method == "head":
        return "head: the forecast head alone; the base reads each sequence once"
    bias = {"none": "", "lora_only": ", biases of these layers", "all": ", all biases"}[settings.train_bias]
    kinds = [
        ("rsLoRA", settings.use_rslora),
        ("DoRA", settings.use_dora),
        ("PiSSA", settings.init_lora == "pissa"),
        (f"LoRA+ {settings.lora_plus_ratio or 0:g}", settings.lora_plus_ratio is not None),
    ]
    variants = "".join(f", {name}" for name, used in kinds if used)
    targets = " ".join(settings.target_modules)
    by_peft = " by PEFT" if settings.method == "peft" else ""
    last = "" if settings.adapt_layers is None else f" of the last {settings.adapt_layers} layers"
    return f"LoRA{by_peft}, rank {settings.lora_rank}, alpha {settings.lora_alpha:g} on {targets}{last}{variants}{bias}"


def save_run(run: FinetunedRun, settings: TrainLoraSettings) -> None:
    """Write weights, history and curve; each replaces its predecessor only when whole."""
    from stocklora.plots.curves import plot_training_curve

    model = run.forecaster.model
    training = {
        "data": run.data_facts,
        "settings": as_json_types(asdict(replace(settings, resume=False))),
        "seed": settings.seed,
        "versions": versions(),
        "best_epoch": run.outcome.best_epoch,
        "steps": run.outcome.steps,
        "stopped": run.outcome.stopped,
        "validation_ratio": run.outcome.best_ratio,
        "unproven_epoch": run.outcome.unproven_epoch,
        "gain_in_errors": run.outcome.gain_in_errors,
        "test_scores": {name: asdict(scores) for name, scores in run.test_scores.items()},
        "read_r2": read_of_prior(run),
    }
    state = trained_state(model)
    if settings.method == "full" and run.outcome.best_epoch == 0:
        state["adapters"] = {}  # the base's own weights: nothing of training was kept
    # All three are whole before the first takes its name.
    with (
        replacing(run.weights_path) as weights,
        replacing(settings.save_dir / HISTORY_NAME) as history,
        replacing(settings.save_dir / CURVE_NAME) as curve,
    ):
        save_weights(weights, WeightsFile(run.forecaster.spec, state["adapters"], state["head"], training))
        table = pd.DataFrame(run.outcome.history, columns=list(HISTORY_COLUMNS))
        table.to_csv(history, index=False, float_format="%.6g", lineterminator="\n")
        plot_training_curve(run.outcome.history, run.outcome.best_epoch, curve)


def read_of_prior(run: FinetunedRun) -> float | None:
    """R² on test days of how much wider than its start the forecast is, against the market prior that taught it."""
    kind, data = run.forecaster.spec.scale["kind"], run.data
    if kind == "prior" or not run.data_facts.get("prior"):
        return None
    # Calibration widens all days alike: that is not read.
    uncalibrated = run.test_quantiles / run.forecaster.spec.calibration["interval_scale"]
    forecasts = (data.forecasts_of(data.baselines[name], "test") for name in ("prior", kind))
    return width_explained(uncalibrated, *forecasts)


def print_outcome(run: FinetunedRun) -> None:
    """Print how training went, and how the model did on days that it never saw."""
    outcome, calibration = run.outcome, run.forecaster.spec.calibration
    if outcome.stopped:
        say(f"stopped: {outcome.stopped}")
    if outcome.unproven_epoch is not None:
        lowest = outcome.history[outcome.unproven_epoch]["validation_ratio"]
        say(
            f"epoch {outcome.unproven_epoch} had the lowest validation loss, {lowest:.4f} of the random walk's, but a "
            f"gain of {outcome.gain_in_errors:.1f} standard errors may be chance (--required_gain): the weights stay "
            f"at the start"
        )
    elif outcome.best_epoch == 0:
        say("training did not improve on its start, the scaled random walk: the weights are those of epoch 0")
    else:
        say(f"best epoch {outcome.best_epoch}: validation loss {outcome.best_ratio:.4f} of the random walk's")
    if outcome.steps:
        say(
            f"{outcome.steps} steps, {outcome.targets_per_s:,.1f} days/s, peak memory "
            f"{peak_memory_mb(run.forecaster.device.type):,.0f} MB"
        )
    say(f"calibration: shrinkage {calibration['shrinkage']:.3f}, interval scale {calibration['interval_scale']:.3f}")
    if (read := read_of_prior(run)) is not None:
        say(f"read from the text: R² {read:.2f} of how much wider than the start the market prior is, on test days")
    say()
    print_scores(
        run.test_scores,
        f"Test, {run.test_scores['model'].origins} days from {run.data.dates.test:%Y-%m-%d}, "
        f"none seen in training, mean of 1 to {run.data.horizon} days ahead",
    )
