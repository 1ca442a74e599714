"""One run of ``train_lora.py``: prices -> a weights file, its history and its test score."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.base_models import check_model_folder, describe_model
from stocklora.calibration import fit_calibration
from stocklora.checkpoints import ForecasterSpec, WeightsFile, save_weights, versions
from stocklora.console import UserError, say, warn
from stocklora.dataset import Example, ForecastData, data_facts, make_examples, prepare
from stocklora.devices import choose_device, choose_dtype, memory_errors
from stocklora.files import plain, replacing
from stocklora.forecasting import Forecaster, build_forecaster, context_tokens_of, load_encoder
from stocklora.machine import keep_freed_memory, peak_memory_mb
from stocklora.methods import trained_state
from stocklora.metrics import Scores
from stocklora.options import TrainLoraSettings
from stocklora.prompts import DayEncoder, check_lengths, fit_targets_per_sequence
from stocklora.quality import short_form
from stocklora.tables import print_scores
from stocklora.training import HISTORY_COLUMNS, TrainingOutcome, standardize_head, train
from stocklora.volatility import SCALES
from stocklora.windows import SPLITS, DaySequence

WEIGHTS_NAME = "best_lora_weights.pth"
HISTORY_NAME = "training_history.csv"
CURVE_NAME = "training_curve.png"


@dataclass
class FittedRun:
    """What a training run leaves behind in memory.

    Attributes:
        test_scores: by forecaster: ``naive``, ``drift``, ``ewma``, ``har`` and ``model``.
        test_quantiles: (origins, horizon, levels) of the model, in the order of ``data``.
    """

    forecaster: Forecaster
    data: ForecastData
    outcome: TrainingOutcome
    test_scores: dict[str, Scores]
    test_quantiles: np.ndarray
    weights_path: Path


def fit(prices: Mapping[str, pd.DataFrame], settings: TrainLoraSettings) -> FittedRun:
    """Train on ``prices`` and write weights, history and curve into ``settings.save_dir``.

    Raises:
        UserError: anything in data, base model or settings that the user can mend; nothing is written then.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    check_model_folder(settings.model_path)
    check_writable(settings.save_dir)
    prices = with_enough_days(prices, settings.window_size + settings.horizon + 1)
    data = prepare(
        prices, settings.window_size, settings.horizon, settings.validation_fraction, settings.test_fraction,
        settings.validation_from, settings.test_from,
    )  # fmt: skip
    scale_kind = data.better_scale() if settings.scale == "auto" else settings.scale
    encoder = load_encoder(
        settings.model_path,
        settings.prompt,
        settings.trust_remote_code,
        settings.indicators,
        anonymize=settings.anonymize,
    )
    start = data.start(scale_kind)
    assert start.scale is not None
    context = context_tokens_of(settings.model_path, settings.trust_remote_code)
    targets_per_sequence, sequences, examples = encode_splits(data, settings, encoder, scale_kind, context)

    set_seed(settings.seed)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    accelerator = Accelerator(cpu=device.type == "cpu")
    spec = ForecasterSpec(
        base_model=describe_model(settings.model_path),
        backbone_layers=settings.backbone_layers,
        prompt=settings.prompt,
        window_size=settings.window_size,
        targets_per_sequence=targets_per_sequence,
        horizon=settings.horizon,
        levels=data.levels.tolist(),
        table=start.table.tolist(),
        scale=start.scale.to_dict(),
        lora={
            "rank": settings.lora_rank,
            "alpha": settings.lora_alpha,
            "dropout": settings.lora_dropout,
            "target_modules": lora_targets(settings.target_modules),
        },
        calibration={"shrinkage": 1.0, "interval_scale": 1.0},
        location=start.location.tolist(),
        indicators=list(settings.indicators),
        anonymize=settings.anonymize,
    )
    forecaster = build_forecaster(
        spec, settings.model_path, encoder, accelerator.device, dtype, settings.trust_remote_code
    )
    if settings.gradient_checkpointing:
        checkpointing: Any = forecaster.model.backbone
        try:
            checkpointing.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"--gradient_checkpointing: {error}; leave the flag out") from None
    announce(forecaster, data, examples, settings, scale_kind)

    with memory_errors():
        standardize_head(forecaster.model, examples["train"], accelerator.device)
        outcome = train(
            forecaster.model,
            examples["train"],
            examples["validation"],
            data.levels,
            settings,
            accelerator,
            data.dates_of("validation"),
        )
        validation = forecaster.quantiles(examples["validation"], calibrated=False)
        forecaster.spec = spec.with_calibration(fit_calibration(data.returns_of("validation"), validation, data.levels))
        forecaster.model.eval()
        quantiles = forecaster.quantiles(examples["test"])
    scores = {name: data.score(baseline_on_test(data, name), "test") for name in data.baselines}
    scores["model"] = data.score(quantiles, "test")
    run = FittedRun(forecaster, data, outcome, scores, quantiles, settings.save_dir / WEIGHTS_NAME)
    if accelerator.is_main_process:
        save_run(run, settings, {split: sequences[split] for split in SPLITS})
    return run


def encode_splits(
    data: ForecastData, settings: TrainLoraSettings, encoder: DayEncoder, scale_kind: str, context_tokens: int
) -> tuple[int, dict[str, list[DaySequence]], dict[str, list[Example]]]:
    """Targets a sequence (fitted unless set), and each split's sequences and examples.

    Raises:
        UserError: a sequence that the base model's context cannot hold.
    """
    targets = settings.targets_per_sequence or fit_targets_per_sequence(
        max(encoder.tokens_per_day(frame) for frame in data.prices.values()),
        data.window_size,
        context_tokens,
        settings.max_tokens_per_sequence,
        available=max(len(parts["train"]) for parts in data.origins.values()),
    )
    while True:
        sequences = {split: data.sequences(split, targets) for split in SPLITS}
        examples = {
            split: make_examples(data.prices, sequences[split], encoder, data.scales[scale_kind]) for split in SPLITS
        }
        encoded = [example.encoded for part in examples.values() for example in part]
        longest = max(len(item.input_ids) for item in encoded)
        if settings.targets_per_sequence or targets == 1 or longest <= context_tokens:
            check_lengths(encoded, context_tokens)
            return targets, sequences, examples
        # Wild days write longer lines than the recent ones that the estimate was made from.
        targets = max(1, int(0.95 * targets * context_tokens / longest))


def with_enough_days(prices: Mapping[str, pd.DataFrame], least: int) -> dict[str, pd.DataFrame]:
    """The tickers that have at least one day to learn from; the others are named and left out."""
    short = [f"{name} ({len(frame)})" for name, frame in prices.items() if len(frame) < least]
    if short and len(short) < len(prices):
        warn(f"fewer than {least} rows, left out: {', '.join(short)}")
    return {name: frame for name, frame in prices.items() if len(frame) >= least} or dict(prices)


def check_writable(folder: Path, flag: str = "--save_dir") -> None:
    """An unwritable folder is found before the work, not after it.

    Raises:
        UserError: naming the folder.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        if made:
            folder.rmdir()  # a run that fails leaves nothing behind
    except OSError as error:
        raise UserError(f"cannot write into {flag} {folder}: {error.strerror or error}") from None


def baseline_on_test(data: ForecastData, name: str) -> np.ndarray:
    """A baseline's test forecasts; the volatility-scaled ones calibrated on validation days, as the model is."""
    quantiles = data.forecasts_of(name, "test")
    if name not in SCALES:
        return quantiles
    fitted = fit_calibration(data.returns_of("validation"), data.forecasts_of(name, "validation"), data.levels)
    return fitted.apply(quantiles, data.levels)


def lora_targets(names: list[str]) -> str | list[str]:
    """``all-linear`` is a word of its own, not the name of a layer."""
    if "all-linear" in names and len(names) > 1:
        raise UserError("--target_modules: give either all-linear or names, not both")
    return "all-linear" if names == ["all-linear"] else list(names)


def announce(
    forecaster: Forecaster,
    data: ForecastData,
    examples: Mapping[str, list[Example]],
    settings: TrainLoraSettings,
    scale_kind: str,
) -> None:
    """What is about to happen, before the first step."""
    parameters = list(forecaster.model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    tokens = sum(len(example.encoded.input_ids) for example in examples["train"])
    days_read = sum(len(example.encoded.sequence.days) for example in examples["train"])
    names = list(data.prices)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    days = {split: sum(len(parts[split]) for parts in data.origins.values()) for split in SPLITS}
    spec = forecaster.spec
    facts = [
        ("prices", short_form(data.prices)),
        *([("tickers", shown)] if len(names) > 1 else []),
        ("days to learn from", f"{days['train']:,}; to validate {days['validation']:,} (from "
                               f"{data.dates.validation:%Y-%m-%d}); to test {days['test']:,} (from "
                               f"{data.dates.test:%Y-%m-%d})"),
        ("base model", f"{spec.base_model['name']}, {dtype_name(forecaster)} on {forecaster.device.type}"),
        ("parameters", f"{total:,} total, {trainable:,} trainable ({100 * trainable / total:.2f}%)"),
        ("prompt", f"{' + '.join([spec.prompt, *spec.indicators])}, {tokens / days_read:.1f} tokens a day"),
        ("sequences", f"{len(examples['train']):,} of up to {spec.window_size + spec.targets_per_sequence - 1} days, "
                      f"{spec.targets_per_sequence} forecasts each; {tokens:,} tokens an epoch"),
        ("starts at", f"the random walk scaled by {scale_kind} volatility"),
        ("memory expected", f"about {expected_memory_mb(forecaster, examples['train'], settings):,.0f} MB"),
    ]  # fmt: skip
    for name, text in facts:
        say(f"{name:<19} {text}")
    if len(examples["train"]) < settings.batch_size:
        warn(
            f"only {len(examples['train'])} training sequences: one step an epoch; --batch_size 1 learns more per epoch"
        )


def dtype_name(forecaster: Forecaster) -> str:
    return str(next(forecaster.model.backbone.parameters()).dtype).removeprefix("torch.")


def expected_memory_mb(forecaster: Forecaster, examples: list[Example], settings: TrainLoraSettings) -> float:
    """Weights, gradients, optimizer state and the activations kept for backward, in MB.

    Activations are counted for a decoder layer with a gated feed-forward part (Llama, Qwen): about eleven
    tensors of the hidden size and five of the intermediate size a token and layer.
    """
    config: Any = forecaster.model.backbone.config
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden)
    parameters = list(forecaster.model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    # gradient and two Adam moments, all float32
    state = 3 * 4 * sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    width = next(forecaster.model.backbone.parameters()).element_size()
    longest = max(len(example.encoded.input_ids) for example in examples)
    tokens = longest * min(settings.batch_size, len(examples))
    kept = tokens * (11 * hidden + 5 * inner) * width
    # Checkpointing keeps each layer's input, and in turn one layer's activations and their gradients.
    recomputed = 3 * kept + layers * tokens * hidden * width
    activations = recomputed if settings.gradient_checkpointing else layers * kept
    # Python, torch and transformers themselves, measured; a graphics card holds none of it.
    program = 850e6 if forecaster.device.type == "cpu" else 0.0
    return (weights + state + activations + program) / 1e6


def save_run(run: FittedRun, settings: TrainLoraSettings, sequences: Mapping[str, Any]) -> None:
    """Weights, history and curve; each replaces its predecessor only when whole."""
    from stocklora.report import plot_training_curve

    model = run.forecaster.model
    training = {
        "data": data_facts(run.data, sequences),
        "settings": plain(asdict(settings)),
        "seed": settings.seed,
        "versions": versions(),
        "best_epoch": run.outcome.best_epoch,
        "steps": run.outcome.steps,
        "stopped": run.outcome.stopped,
        "validation_ratio": run.outcome.best_ratio,
        "unproven_epoch": run.outcome.unproven_epoch,
        "gain_in_errors": run.outcome.gain_in_errors,
        "test_scores": {name: scores.to_dict() for name, scores in run.test_scores.items()},
    }
    state = trained_state(model)
    # All three are whole before the first takes its name.
    with (
        replacing(run.weights_path) as weights,
        replacing(settings.save_dir / HISTORY_NAME) as history,
        replacing(settings.save_dir / CURVE_NAME) as curve,
    ):
        save_weights(weights, WeightsFile(run.forecaster.spec, state["adapters"], state["head"], training))
        with history.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(HISTORY_COLUMNS)
            for row in run.outcome.history:
                writer.writerow([_cell(row[name]) for name in HISTORY_COLUMNS])
        plot_training_curve(run.outcome, curve)


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.6g}"


def report_run(run: FittedRun) -> None:
    """The end of the story: how training went and how the model did on days it never saw."""
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
    say()
    print_scores(
        run.test_scores,
        f"Test, {run.test_scores['model'].origins} days from {run.data.dates.test:%Y-%m-%d}, "
        f"none seen in training, mean of 1 to {run.data.horizon} days ahead",
    )
