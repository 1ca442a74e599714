"""One run of ``train_lora.py``: prices -> a weights file, its history and its test score."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stocklora.base_models.folders import check_model_folder, describe_model
from stocklora.cli.console import UserError, say, warn
from stocklora.dataset.prepare import Example, ForecastData, data_facts, make_examples, prepare
from stocklora.dataset.prompts import DayEncoder, check_lengths, fit_targets_per_sequence
from stocklora.dataset.windows import SPLITS, DaySequence
from stocklora.finetune.loop import train
from stocklora.finetune.memory import print_plan, setup_of, shape_of, warn_if_too_large
from stocklora.finetune.optimization import HISTORY_COLUMNS, TrainingOutcome
from stocklora.finetune.resume import FOLDER, Checkpoints, identity_of, resume_command
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.finetune.speedups import speedups
from stocklora.finetune.warm_start import start_from, with_teacher
from stocklora.forecaster.batches import predict
from stocklora.forecaster.forecaster import LESS_MEMORY, Forecaster, build_forecaster, context_tokens_of, load_encoder
from stocklora.forecaster.methods import trained_state
from stocklora.forecaster.weights import ForecasterSpec, WeightsFile, save_weights
from stocklora.metrics.calibration import fit_calibration
from stocklora.metrics.scores import Scores, print_scores
from stocklora.prices.quality import short_form
from stocklora.runtime.distributed import (
    Alone,
    asked_for_cpu,
    from_main,
    join_processes,
    shards_models,
    whole_parameters,
)
from stocklora.runtime.files import as_json_types, check_writable, replacing
from stocklora.runtime.machine import (
    choose_device,
    choose_dtype,
    keep_freed_memory,
    memory_errors,
    peak_memory_mb,
    versions,
)
from stocklora.volatility.scales import SCALES

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


def fit(prices: Mapping[str, pd.DataFrame], settings: TrainLoraSettings, *, alone: bool = False) -> FittedRun:
    """Train on ``prices`` and write weights, history and curve into ``settings.save_dir``.

    Where several processes were launched, all of them call this together.

    Args:
        alone: this process trains by itself, whatever others were launched beside it.

    Raises:
        UserError: anything in data, base model or settings that the user can mend; nothing is written then.
    """
    import rich.style  # noqa: F401 - draws from Python's random numbers when first imported: before they are seeded
    from accelerate.utils import set_seed

    check_model_folder(settings.model_path)
    device = choose_device("cpu" if settings.device == "auto" and asked_for_cpu() else settings.device)
    accelerator: Any = Alone(device) if alone else join_processes(device)
    if shards_models(accelerator) and settings.method == "head":
        raise UserError("--method head and FSDP do not go together; leave FSDP out, a frozen base fits in 4 bits")
    from_main(accelerator, lambda: check_writable(settings.save_dir))  # several at once would meet each other's traces
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
    dtype = choose_dtype(settings.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    checkpoints = checkpoints_of(data, sequences, settings, accelerator, dtype)
    resumed = from_main(accelerator, checkpoints.load) if settings.resume else None
    shape = shape_of(settings)
    setup = setup_of(settings, shape, examples["train"], dtype, device)
    if accelerator.is_main_process:
        warn_if_too_large(shape, setup, accelerator.device)
    if settings.teacher is not None:
        examples["train"] = with_teacher(examples["train"], data, settings, accelerator.device)
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
        lora=lora_fields(settings),
        calibration={"shrinkage": 1.0, "interval_scale": 1.0},
        location=start.location.tolist(),
        indicators=list(settings.indicators),
        anonymize=settings.anonymize,
        method=settings.method,
        quantization=settings.quantization,
    )
    forecaster = build_forecaster(
        spec, settings.model_path, encoder, torch.device("cpu") if shards_models(accelerator) else accelerator.device,
        dtype, settings.trust_remote_code, fresh=resumed is None,
    )  # fmt: skip
    if settings.gradient_checkpointing:
        checkpointing: Any = forecaster.model.backbone
        try:
            checkpointing.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"--gradient_checkpointing: {error}; leave the flag out") from None
    announce(forecaster, data, examples, settings, scale_kind, shape.parameters)
    if (count := accelerator.num_processes) > 1:
        together = settings.batch_size * settings.gradient_accumulation_steps * count
        say(f"{'processes':<19} {count}, {together} sequences a step together")
    print_plan(shape, setup)

    if resumed is None:
        if settings.resume and accelerator.is_main_process:
            warn(f"nothing to resume in {checkpoints.folder}: starting anew")
        from_main(accelerator, checkpoints.set_aside)
    if accelerator.process_index:
        set_seed(settings.seed + accelerator.process_index)  # each process drops out in its own way
    with memory_errors(LESS_MEMORY):
        with speedups(forecaster.model, settings):
            if resumed is None and settings.expand_rank_from is not None:
                start_from(forecaster, settings, data.dates)
            outcome = train(
                forecaster.model,
                examples["train"],
                examples["validation"],
                data.levels,
                settings,
                accelerator,
                data.dates_of("validation"),
                checkpoints,
                resumed,
                standardize=settings.expand_rank_from is None,
            )
        forecaster.device = accelerator.device
        if outcome.interrupted and checkpoints.newest:
            say(f"state saved; to go on: {resume_command(settings, accelerator.num_processes)}")
        validation = predict(forecaster.model, examples["validation"], accelerator.device, accelerator=accelerator)
        calibration = fit_calibration(data.returns_of("validation"), validation, data.levels)
        forecaster.spec = spec.with_calibration(calibration)
        forecaster.model.eval()
        test = predict(forecaster.model, examples["test"], accelerator.device, accelerator=accelerator)
        quantiles = calibration.apply(test, data.levels)
    scores = {name: data.score(baseline_on_test(data, name), "test") for name in data.baselines}
    scores["model"] = data.score(quantiles, "test")
    run = FittedRun(forecaster, data, outcome, scores, quantiles, settings.save_dir / WEIGHTS_NAME)

    def finish() -> None:
        save_run(run, settings, {split: sequences[split] for split in SPLITS})
        if not (outcome.interrupted or settings.keep_checkpoints):
            checkpoints.remove()

    with whole_parameters(forecaster.model):
        from_main(accelerator, finish)
    return run


def checkpoints_of(
    data: ForecastData,
    sequences: Mapping[str, list[DaySequence]],
    settings: TrainLoraSettings,
    accelerator: Any,
    dtype: Any,
) -> Checkpoints:
    """Where the run's state goes, and what a run that goes on from it must share with it."""
    place = {"device": accelerator.device.type, "dtype": str(dtype).removeprefix("torch.")}
    base = describe_model(settings.model_path)
    identity = identity_of(settings, data_facts(data, sequences), base, accelerator.num_processes, place)
    return Checkpoints(settings.save_dir / FOLDER, identity, settings.checkpoint_every)


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
    base_parameters: int,
) -> None:
    """What is about to happen, before the first step.

    Args:
        base_parameters: of the base model; those of a quantized one are packed and cannot be counted.
    """
    model = forecaster.model
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    inside = 0 if settings.method == "full" else sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    total = base_parameters + inside + sum(parameter.numel() for parameter in model.head.parameters())
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
        ("base model", f"{spec.base_model['name']}, {number_format(forecaster)} on {forecaster.device.type}"),
        ("method", method_words(settings)),
        ("parameters", f"{total:,} total, {trainable:,} trainable ({100 * trainable / total:.2f}%)"),
        ("prompt", f"{' + '.join([spec.prompt, *spec.indicators])}, {tokens / days_read:.1f} tokens a day"),
        ("sequences", f"{len(examples['train']):,} of up to {spec.window_size + spec.targets_per_sequence - 1} days, "
                      f"{spec.targets_per_sequence} forecasts each; {tokens:,} tokens an epoch"),
        ("starts at", f"the random walk scaled by {scale_kind} volatility"
                      if settings.expand_rank_from is None else f"the forecasts of {settings.expand_rank_from}"),
    ]  # fmt: skip
    for name, text in facts:
        say(f"{name:<19} {text}")
    if len(examples["train"]) < settings.batch_size:
        warn(
            f"only {len(examples['train'])} training sequences: one step an epoch; --batch_size 1 learns more per epoch"
        )


def number_format(forecaster: Forecaster) -> str:
    """What the base computes in, and what its weights are stored in where that is another thing."""
    stored = str(next(forecaster.model.backbone.parameters()).dtype).removeprefix("torch.")
    if forecaster.model.autocast_dtype is not None:
        return f"{str(forecaster.model.autocast_dtype).removeprefix('torch.')}, weights kept in {stored}"
    in_less = {"none": "", "8bit": ", linear layers in int8", "4bit": ", linear layers in 4-bit nf4"}
    return stored + in_less[forecaster.spec.quantization]


def method_words(settings: TrainLoraSettings) -> str:
    """What trains, in a few words."""
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
    return f"LoRA{by_peft}, rank {settings.lora_rank}, alpha {settings.lora_alpha:g} on {targets}{variants}{bias}"


def lora_fields(settings: TrainLoraSettings) -> dict[str, Any]:
    """Fields of ``LoRAConfig`` for the methods with adapters; none for the others."""
    if settings.method in ("full", "head"):
        return {}
    return {
        "rank": settings.lora_rank,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
        "target_modules": lora_targets(settings.target_modules),
        "rslora": settings.use_rslora,
        "dora": settings.use_dora,
        "init": settings.init_lora,
        "train_bias": settings.train_bias,
    }


def save_run(run: FittedRun, settings: TrainLoraSettings, sequences: Mapping[str, Any]) -> None:
    """Weights, history and curve; each replaces its predecessor only when whole."""
    from stocklora.plots.curves import plot_training_curve

    model = run.forecaster.model
    training = {
        "data": data_facts(run.data, sequences),
        "settings": as_json_types(asdict(replace(settings, resume=False))),
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
    if settings.method == "full" and run.outcome.best_epoch == 0:
        state["adapters"] = {}  # the base's own weights: nothing of training was kept
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
