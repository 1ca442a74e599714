"""What an earlier run's weights give a new run: its start at a larger rank, or a teacher's quantiles to learn from."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from stocklora.adapters.arithmetic import expand_rank
from stocklora.adapters.layer import AdapterConfig
from stocklora.cli.console import UserError, say, warn
from stocklora.dataset.prepare import Example, ForecastData
from stocklora.dataset.windows import SplitDates
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.forecaster import Forecaster, assemble
from stocklora.forecaster.methods import load_trained_state
from stocklora.forecaster.weights import ForecasterSpec, WeightsFile, load_weights, other_setting
from stocklora.runtime.machine import choose_dtype


def check_days(content: WeightsFile, path: Path, dates: SplitDates, flag: str) -> None:
    """Refuse weights that have seen days on which the new run is judged: its scores would be those of a memory.

    Raises:
        UserError: their training reaches into the new run's validation part, or their validation into its test part.
    """
    facts = content.training.get("data") or {}
    if "validation_from" not in facts:
        warn(f"{path} does not say which days it was trained on: make sure that none of them is validated or tested")
        return
    for name, ours in (("validation_from", dates.validation), ("test_from", dates.test)):
        if facts[name] > f"{ours:%Y-%m-%d}":
            raise UserError(
                f"{flag} {path} knows days up to {facts[name]}, and this run's --{name} is {ours:%Y-%m-%d}: its scores "
                f"would be those of a memory; give --validation_from {facts['validation_from']} --test_from "
                f"{facts['test_from']} or later, or weights that were trained on earlier days"
            )


# --------------------------------------------------------------------------------------- a start at a larger rank


def start_from(forecaster: Forecaster, settings: TrainLoraSettings, dates: SplitDates) -> None:
    """Give a fresh forecaster the adapters and the head of ``--expand_rank_from``, at its own larger rank.

    The scaled quantiles are the same function of the prices as before. The volatility scale and the location around
    which they stand are fitted anew, on the days given now.

    Raises:
        UserError: weights of another model, method or input, of no smaller rank, or that have seen later days.
    """
    path = settings.expand_rank_from
    assert path is not None
    content = load_weights(path)
    check_days(content, path, dates, "--expand_rank_from")
    old, new = _configs(content.spec, forecaster.spec, path)
    adapters, grown = expand_rank(content.adapters, old, new.rank, settings.seed)
    for name in adapters:
        if name.endswith(".lora_B"):  # --lora_alpha and --use_rslora may be others than before
            adapters[name] = adapters[name] * (grown.scaling / new.scaling)
    try:
        load_trained_state(forecaster.model, {"adapters": adapters, "head": content.head})
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--expand_rank_from {path} does not fit {settings.model_path}: {error}") from None


def _configs(old: ForecasterSpec, new: ForecasterSpec, path: Path) -> tuple[AdapterConfig, AdapterConfig]:
    if old.base_model["config_sha256"] != new.base_model["config_sha256"]:
        raise UserError(f"--expand_rank_from {path} was trained on {old.base_model['name']}; give that --model_path")
    if found := other_setting(old, new):
        flag, before, now = found
        raise UserError(
            f"--expand_rank_from {path} was trained with {flag} {before}, and this run has {now}: its adapters would "
            f"be another function; use the same"
        )
    configs = AdapterConfig.from_dict(old.lora), AdapterConfig.from_dict(new.lora)
    if configs[0].rank >= configs[1].rank:
        raise UserError(
            f"--expand_rank_from {path} has rank {configs[0].rank}; give a larger --lora_rank than that, not "
            f"{configs[1].rank}"
        )
    if configs[0].init == "pissa":
        raise UserError(f"--expand_rank_from {path}: adapters that began as PiSSA cannot be expanded; train anew")
    for name, flag in (("dora", "--use_dora"), ("train_bias", "--train_bias"), ("target_modules", "--target_modules")):
        if getattr(configs[0], name) != getattr(configs[1], name):
            raise UserError(f"--expand_rank_from {path} was trained with another {flag}; use the same")
    return configs


# ------------------------------------------------------------------------------------------------------ a teacher


def with_teacher(
    examples: Sequence[Example], data: ForecastData, settings: TrainLoraSettings, device: torch.device
) -> list[Example]:
    """Training examples with the calibrated quantiles of ``--teacher`` at their origins.

    The teacher may have another base model, prompt, window and scale; it reads each day once, here, and is gone.
    Days without enough past for its window have no quantiles of it.

    Raises:
        UserError: weights that forecast other days or levels, or have seen later days.
    """
    path = settings.teacher
    assert path is not None
    content = load_weights(path)
    check_days(content, path, data.dates, "--teacher")
    spec = content.spec
    if spec.horizon != data.horizon or list(spec.levels) != data.levels.tolist():
        raise UserError(
            f"--teacher {path} forecasts {spec.horizon} days ahead at {len(spec.levels)} quantile levels, and this run "
            f"{data.horizon} at {len(data.levels)}; they must be the same"
        )
    dtype = choose_dtype(settings.dtype, device)
    model_path = settings.teacher_model_path or settings.model_path
    forecaster = assemble(content, path, model_path, device, dtype, settings.trust_remote_code)
    origins = {
        ticker: range(max(parts["train"].start, spec.window_size), parts["train"].stop)
        for ticker, parts in data.origins.items()
    }
    quantiles = iter(forecaster.quantiles(forecaster.packed_examples(data.prices, origins)))
    known = {(ticker, row): next(quantiles) for ticker, rows in origins.items() for row in rows}
    del forecaster
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a graphics card
    nothing = np.full((data.horizon, len(data.levels)), np.nan)
    taught = []
    for example in examples:
        sequence = example.encoded.sequence
        rows = [known.get((sequence.ticker, row), nothing) for row in sequence.origins]
        taught.append(replace(example, teacher=np.stack(rows)))
    total = sum(len(parts["train"]) for parts in data.origins.values())
    say(f"{'teacher':<19} {path} ({spec.base_model['name']}), for {len(known):,} of {total:,} training days")
    return taught
