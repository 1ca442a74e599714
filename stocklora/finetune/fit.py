"""One run of ``train_lora.py``: prices -> a weights file, its history and its test score."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from llm_model import length_that_counts
from stocklora.base_models.loading import BaseModel, unquantized_name
from stocklora.cli.console import UserError, say, warn
from stocklora.dataset.prepare import (
    Example,
    ForecastData,
    data_facts,
    fitted_to_context,
    make_examples,
)
from stocklora.dataset.prompts import DayEncoder, check_lengths, fit_targets_per_sequence
from stocklora.dataset.windows import SPLITS
from stocklora.finetune.loop import train
from stocklora.finetune.memory import print_plan, setup_of, shape_of, warn_if_too_large
from stocklora.finetune.optimization import TrainingOutcome, compiled
from stocklora.finetune.prepare import SplitPrices, split_prices
from stocklora.finetune.report import WEIGHTS_NAME, FinetunedRun, print_run_facts, save_run
from stocklora.finetune.resume import FOLDER, Checkpoints, identity_of, resume_command
from stocklora.finetune.settings import PRIOR_TEACHER, TrainLoraSettings
from stocklora.finetune.warm_start import simulated_lessons, start_from, with_teacher
from stocklora.forecaster.batches import KeptStates, predict
from stocklora.forecaster.forecaster import LESS_MEMORY, Forecaster, build_forecaster
from stocklora.forecaster.weights import ForecasterSpec
from stocklora.metrics.calibration import fit_calibration
from stocklora.metrics.scores import Scores
from stocklora.runtime.distributed import (
    Alone,
    asked_for_cpu,
    from_main,
    join_processes,
    shards_models,
    whole_parameters,
)
from stocklora.runtime.files import check_writable
from stocklora.runtime.machine import choose_device, choose_dtype, keep_freed_memory, memory_errors
from stocklora.volatility.scales import SCALES


@dataclass(frozen=True)
class PreparedData:
    """What prices and tokenizer give, before anything random happens.

    Attributes:
        scale_kind: of the volatility that the forecaster starts from.
        targets_per_sequence: fitted to the base model's context unless set.
        examples: split -> examples, in the order of ``data``. lessons: of simulated series, for the teacher's epochs.
        facts: what the weights file will say of the data.
    """

    data: ForecastData
    scale_kind: str
    targets_per_sequence: int
    examples: dict[str, list[Example]]
    facts: dict[str, Any]
    lessons: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class PreparedRun:
    """A forecaster that has learned nothing yet, or what a stopped run had learned, and all that its training takes.

    Attributes:
        accelerator: of the processes that train together. resumed: the state to go on from, if any.
        states: of the layers that do not train, where there are such.
    """

    settings: TrainLoraSettings
    accelerator: Any
    prepared: PreparedData
    forecaster: Forecaster
    checkpoints: Checkpoints
    resumed: Mapping[str, Any] | None
    states: KeptStates | None


def finetune(
    prices: Mapping[str, pd.DataFrame],
    settings: TrainLoraSettings,
    *,
    alone: bool = False,
    split: SplitPrices | None = None,
) -> FinetunedRun:
    """Train on ``prices`` and write weights, history and curve into ``settings.save_dir``.

    Where several processes were launched, all of them call this together.

    Args:
        prices: ticker -> table of days.
        alone: this process trains by itself, whatever others were launched beside it.
        split: what ``before_torch`` made of these prices.

    Raises:
        UserError: anything in data, base model or settings that the user can mend; nothing is written then.
    """
    import rich.style  # noqa: F401 - draws from Python's random numbers when first imported: before they are seeded

    base = BaseModel(settings.model_path, settings.trust_remote_code)
    accelerator = join_training_processes(settings, alone)
    split = split or split_prices(prices, settings)
    run = prepare_run(prepare_data(split, settings, base), settings, base, accelerator)
    with memory_errors(LESS_MEMORY):
        outcome = train_forecaster(run)
        quantiles, scores = calibrate_and_score(run)
    prepared = run.prepared
    finished = FinetunedRun(
        run.forecaster, prepared.data, prepared.facts, outcome, scores, quantiles, settings.save_dir / WEIGHTS_NAME
    )
    with whole_parameters(run.forecaster.model):
        from_main(accelerator, lambda: save_finished(finished, run))
    return finished


# --------------------------------------------------------------------------------------------------- preparing


def join_training_processes(settings: TrainLoraSettings, alone: bool) -> Any:
    """The ``Accelerator`` of the processes that train together, or one of this process.

    Raises:
        UserError: a device that is not there, processes that cannot train this method, or a folder that cannot be
            written.
    """
    device = choose_device("cpu" if settings.device == "auto" and asked_for_cpu() else settings.device)
    accelerator: Any = Alone(device) if alone else join_processes(device)
    if shards_models(accelerator) and (settings.method == "head" or settings.adapt_layers is not None):
        flag = "--method head" if settings.method == "head" else "--adapt_layers"
        raise UserError(f"{flag} and FSDP do not go together; leave FSDP out, a frozen base fits in 4 bits")
    from_main(accelerator, lambda: check_writable(settings.save_dir))  # several at once would meet each other's traces
    return accelerator


def prepare_data(split: SplitPrices, settings: TrainLoraSettings, base: BaseModel) -> PreparedData:
    """Token sequences of the days, and the facts on record.

    Raises:
        UserError: a sequence that the base model's context cannot hold.
    """
    data, scale_kind, prior = split.data, split.scale_kind, split.prior
    encoder = DayEncoder(base.tokenizer, settings.prompt, settings.indicators, anonymize=settings.anonymize)
    targets, examples = encode_splits(data, settings, encoder, scale_kind, base.context_tokens)
    sequences = {split: [example.encoded.sequence for example in part] for split, part in examples.items()}
    facts = data_facts(data, sequences)
    if prior is not None and (scale_kind == "prior" or settings.teacher == PRIOR_TEACHER):
        facts["prior"] = {name: value for name, value in prior.made_from.items() if name != "markets"}
    return PreparedData(data, scale_kind, targets, examples, facts)


def encode_splits(
    data: ForecastData, settings: TrainLoraSettings, encoder: DayEncoder, scale_kind: str, context_tokens: int
) -> tuple[int, dict[str, list[Example]]]:
    """Targets a sequence (fitted unless set), and each split's examples.

    Raises:
        UserError: a sequence that the base model's context cannot hold.
    """

    def examples_of(targets: int) -> list[Example]:
        sequences = [sequence for split in SPLITS for sequence in data.sequences(split, targets)]
        return make_examples(data.prices, sequences, encoder, data.scales[scale_kind])

    if settings.targets_per_sequence:
        targets = settings.targets_per_sequence
        examples = examples_of(targets)
        check_lengths([example.encoded for example in examples], context_tokens)
    else:
        estimated = fit_targets_per_sequence(
            max(encoder.tokens_per_day(frame) for frame in data.prices.values()), data.window_size, context_tokens,
            settings.max_tokens_per_sequence, available=max(len(parts["train"]) for parts in data.origins.values()),
        )  # fmt: skip
        # Wild days write longer lines than the recent ones that the estimate was made from.
        targets, examples = fitted_to_context(
            examples_of, estimated, context_tokens,
            fewer=lambda targets, longest: int(0.95 * targets * context_tokens / longest),
        )  # fmt: skip
    rest = iter(examples)
    return targets, {split: list(itertools.islice(rest, len(data.sequences(split, targets)))) for split in SPLITS}


def prepare_run(prepared: PreparedData, settings: TrainLoraSettings, base: BaseModel, accelerator: Any) -> PreparedRun:
    """Seed, look for a stopped run, plan the memory, and build the forecaster; says what is about to happen.

    Raises:
        UserError: a state or a teacher that does not fit, or a base model that cannot be loaded or tuned so.
    """
    from accelerate.utils import set_seed

    data, device = prepared.data, accelerator.device
    settings = with_stored_quantization(settings, base)
    set_seed(settings.seed)
    dtype = choose_dtype(settings.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    place = {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    identity = identity_of(settings, prepared.facts, base.description, accelerator.num_processes, place)
    checkpoints = Checkpoints(settings.save_dir / FOLDER, identity, settings.checkpoint_every)
    resumed = from_main(accelerator, checkpoints.load) if settings.resume else None
    warn_of_length(prepared, base)
    shape = shape_of(settings, base.config)
    setup = setup_of(settings, shape, prepared.examples["train"], dtype, device)
    if accelerator.is_main_process:
        warn_if_too_large(shape, setup, device)
    if settings.teacher is not None:
        taught = with_teacher(prepared.examples["train"], data, settings, device)
        lessons = simulated_lessons(data, prepared.scale_kind, prepared.targets_per_sequence, settings, base)
        prepared = replace(prepared, examples={**prepared.examples, "train": taught}, lessons=lessons)
    forecaster = build_forecaster(
        specification(prepared, settings, base), base,
        torch.device("cpu") if shards_models(accelerator) else device, dtype, fresh=resumed is None,
        probe=True,
    )  # fmt: skip
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(forecaster)
    print_run_facts(forecaster, prepared.examples, settings, shape.parameters)
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
    model = forecaster.model
    states = KeptStates(model, settings.save_dir) if model.frozen_layers else None
    return PreparedRun(settings, accelerator, prepared, forecaster, checkpoints, resumed, states)


def warn_of_length(prepared: PreparedData, base: BaseModel) -> None:
    """A line where the base reads a day otherwise in a long sequence than in a short one."""
    limit = length_that_counts(base.config)
    longest = max(len(example.encoded.input_ids) for part in prepared.examples.values() for example in part)
    if longest > limit:
        warn(
            f"{base.path} reads sequences of more than {limit:,} tokens otherwise than shorter ones (longrope or "
            f"dynamic NTK), and the longest here is {longest:,}: forecasts then depend a little on what they are "
            f"batched with; --max_tokens_per_sequence {limit} avoids it"
        )


def with_stored_quantization(settings: TrainLoraSettings, base: BaseModel) -> TrainLoraSettings:
    """``settings`` with the quantization that the base has on disk.

    Raises:
        UserError: another one was asked for, or every weight is to train.
    """
    stored = base.quantization
    if stored not in ("8bit", "4bit") or settings.quantization == stored:
        return settings
    if settings.method == "full":
        raise UserError(
            f"--method full trains every weight, and {base.path} is stored in {stored}: give --model_path "
            f"{unquantized_name(base.path)}, or use --method lora"
        )
    if settings.quantization != "none":
        raise UserError(f"{base.path} is stored in {stored}; leave out --quantization {settings.quantization}")
    return replace(settings, quantization=stored)


def specification(prepared: PreparedData, settings: TrainLoraSettings, base: BaseModel) -> ForecasterSpec:
    """What the forecaster is made of, not calibrated yet."""
    data = prepared.data
    start = data.start(prepared.scale_kind)
    assert start.scale is not None
    return ForecasterSpec(
        base_model=base.identity, backbone_layers=settings.backbone_layers, method=settings.method,
        quantization=settings.quantization, lora=lora_fields(settings), adapt_layers=settings.adapt_layers,
        prompt=settings.prompt, indicators=list(settings.indicators), anonymize=settings.anonymize,
        window_size=settings.window_size, targets_per_sequence=prepared.targets_per_sequence,
        horizon=settings.horizon, levels=data.levels.tolist(), table=start.table.tolist(),
        scale=start.scale.to_dict(), location=start.location.tolist(),
        calibration={"shrinkage": 1.0, "interval_scale": 1.0},
    )  # fmt: skip


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


def lora_targets(names: list[str]) -> str | list[str]:
    """``all-linear`` is a word of its own, not the name of a layer."""
    if "all-linear" in names and len(names) > 1:
        raise UserError("--target_modules: give either all-linear or names, not both")
    return "all-linear" if names == ["all-linear"] else list(names)


def enable_gradient_checkpointing(forecaster: Forecaster) -> None:
    """Have the backbone compute its activations again in the backward pass, in place of keeping them.

    Raises:
        UserError: a base model that cannot do so.
    """
    backbone: Any = forecaster.model.backbone
    try:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {error}; leave the flag out") from None


# ---------------------------------------------------------------------------------- training, judging and saving


def train_forecaster(run: PreparedRun) -> TrainingOutcome:
    """Train; on return the forecaster's model holds the weights of the best epoch.

    Raises:
        UserError: an earlier run's weights that do not fit, or a model that cannot be compiled here.
    """
    settings, accelerator, model, data = run.settings, run.accelerator, run.forecaster.model, run.prepared.data
    with compiled(model) if settings.compile else contextlib.nullcontext():
        if run.resumed is None and settings.expand_rank_from is not None:
            start_from(run.forecaster, settings, data.dates)
        examples = run.prepared.examples
        outcome = train(
            model, examples["train"], examples["validation"], data.levels, settings, accelerator,
            data.dates_of("validation"), run.checkpoints, run.resumed,
            standardize=settings.expand_rank_from is None,
            states=run.states, lessons=run.prepared.lessons,
        )  # fmt: skip
    run.forecaster.device = accelerator.device
    if outcome.interrupted and run.checkpoints.newest:
        say(f"state saved; to go on: {resume_command(settings, accelerator.num_processes)}")
    return outcome


def calibrate_and_score(run: PreparedRun) -> tuple[np.ndarray, dict[str, Scores]]:
    """Calibrate the forecaster on validation days; its quantiles of the test days, and all forecasters' scores there.

    Returns:
        (origins, horizon, levels) calibrated quantiles, and the scores by forecaster.
    """
    forecaster, accelerator, data = run.forecaster, run.accelerator, run.prepared.data
    model, examples = forecaster.model, run.prepared.examples
    validation = predict(
        model, examples["validation"], accelerator.device, accelerator=accelerator, states=run.states
    )  # fmt: skip
    calibration = fit_calibration(data.returns_of("validation"), validation, data.levels)
    forecaster.spec = replace(forecaster.spec, calibration=asdict(calibration))
    model.eval()
    test = predict(model, examples["test"], accelerator.device, accelerator=accelerator)
    quantiles = calibration.apply(test, data.levels)
    scores = {name: data.score(baseline_on_test(data, name), "test") for name in data.baselines}
    scores["model"] = data.score(quantiles, "test")
    return quantiles, scores


def baseline_on_test(data: ForecastData, name: str) -> np.ndarray:
    """A baseline's test forecasts; the volatility-scaled ones calibrated on validation days, as the model is."""
    quantiles = data.forecasts_of(name, "test")
    if name not in SCALES:
        return quantiles
    fitted = fit_calibration(data.returns_of("validation"), data.forecasts_of(name, "validation"), data.levels)
    return fitted.apply(quantiles, data.levels)


def save_finished(finished: FinetunedRun, run: PreparedRun) -> None:
    """Write what the run made, and take away its states unless it was interrupted or they are to be kept."""
    save_run(finished, run.settings)
    if not (finished.outcome.interrupted or run.settings.keep_checkpoints):
        run.checkpoints.remove()
