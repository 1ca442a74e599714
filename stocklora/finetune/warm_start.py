"""What an earlier run's weights give a new run: its start at a larger rank, or a teacher's quantiles to learn from."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_model import StockForecaster
from stocklora.adapters.arithmetic import expand_rank
from stocklora.adapters.layer import AdapterConfig
from stocklora.base_models.loading import BaseModel
from stocklora.cli.console import UserError, say, warn
from stocklora.dataset.prepare import Example, ForecastData, fitted_to_context, make_examples
from stocklora.dataset.prompts import DayEncoder
from stocklora.dataset.simulated import simulated_stock
from stocklora.dataset.windows import SplitDates, pack
from stocklora.finetune.settings import PRIOR_TEACHER, TrainLoraSettings
from stocklora.forecaster.batches import KeptStates, collate
from stocklora.forecaster.forecaster import Forecaster, assemble
from stocklora.forecaster.methods import load_trained_state
from stocklora.forecaster.weights import ForecasterSpec, WeightsFile, load_weights, other_setting
from stocklora.runtime.distributed import is_sharded
from stocklora.runtime.machine import choose_dtype

RIDGES = tuple(10.0**power for power in range(-4, 3))
LEAST_SEQUENCES = 5  # fewer leave nothing to choose a ridge on


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
    """Training examples with the quantiles of ``--teacher`` at their origins.

    A weights file's are calibrated. It may have another base model, prompt, window and scale; it reads each day once,
    here, and is gone. Days without enough past for its window have no quantiles of it.

    Raises:
        UserError: weights that forecast other days or levels, or have seen later days.
    """
    assert settings.teacher is not None
    if settings.teacher == PRIOR_TEACHER:
        known, name = prior_quantiles(data), "the market prior, moved by the training days"
    else:
        known, name = _quantiles_of_weights(settings.teacher, data, settings, device)
    nothing = np.full((data.horizon, len(data.levels)), np.nan)
    taught = []
    for example in examples:
        sequence = example.encoded.sequence
        rows = [known.get((sequence.ticker, row), nothing) for row in sequence.origins]
        taught.append(replace(example, teacher=np.stack(rows)))
    total = sum(len(parts["train"]) for parts in data.origins.values())
    say(f"{'teacher':<19} {name}, for {len(known):,} of {total:,} training days")
    return taught


def prior_quantiles(data: ForecastData) -> dict[tuple[str, int], np.ndarray]:
    """(ticker, row) -> (horizon, levels) of the market prior at each training origin.

    They are a function of the days up to the origin alone: a target without the noise of what came.
    """
    baseline = data.baselines["prior"]
    known: dict[tuple[str, int], np.ndarray] = {}
    for ticker, parts in data.origins.items():
        rows = parts["train"]
        quantiles = baseline.quantiles(data.scales["prior"][ticker][list(rows)])
        known |= {(ticker, row): quantiles[at] for at, row in enumerate(rows)}
    return known


def simulated_lessons(
    data: ForecastData, scale_kind: str, targets: int, settings: TrainLoraSettings, base: BaseModel
) -> list[Example]:
    """Examples of ``--simulated_series``, whose quantiles are known, written and scaled as the real days are.

    Args:
        scale_kind: that the run starts from. targets: a sequence, at most.
    """
    if not settings.simulated_series:
        return []
    stocks = {
        f"simulated {number}": simulated_stock(settings.seed, number, horizon=data.horizon)
        for number in range(settings.simulated_series)
    }
    prices = {name: stock.prices for name, stock in stocks.items()}
    scale = data.baselines[scale_kind].scale
    assert scale is not None
    scales = {name: scale.on({name: frame})[name] for name, frame in prices.items()}  # each is a market of its own
    encoder = DayEncoder(base.tokenizer, settings.prompt, settings.indicators, anonymize=settings.anonymize)

    def examples_of(targets: int) -> list[Example]:
        return [
            example for name, frame in prices.items()
            for example in make_examples(
                {name: frame}, pack(name, range(data.window_size, len(frame)), data.window_size, targets), encoder,
                scales,
            )
        ]  # fmt: skip

    _, examples = fitted_to_context(examples_of, targets, base.context_tokens)
    days = sum(len(example.scale) for example in examples)
    say(f"{'simulated':<19} {len(stocks):,} series, {days:,} days whose quantiles are known")
    return [
        replace(each, teacher=stocks[each.encoded.sequence.ticker].quantiles[list(each.encoded.sequence.origins)])
        for each in examples
    ]


def fit_head(
    model: StockForecaster,
    examples: Sequence[Example],
    device: torch.device,
    states: KeptStates | None = None,
    targets: int = 30_000,
) -> None:
    """Set the head to the ridge regression of the teacher's quantiles on the states as they are now.

    What a step of training would find slowly is found in one pass over about ``targets`` origins, spread over all.
    The ridge is chosen on the last fifth of them, which are mostly other tickers than the first four.
    """
    taught = [example for example in examples if example.teacher is not None and np.isfinite(example.teacher).all()]
    every = max(1, sum(len(example.scale) for example in taught) // targets)
    chosen = taught[::every]
    if len(chosen) < LEAST_SEQUENCES or is_sharded(model):  # a shard of the head is no head to be set
        return
    was_training, head = model.training, model.head
    model.eval()
    with torch.no_grad():
        batches = (collate([example], states).to(device) for example in chosen)
        hidden = (model.hidden_at(batch.input_ids, batch.origin_tokens, batch.states)[0] for batch in batches)
        inputs = torch.cat([head.features(rows).double().cpu() for rows in hidden])
    model.train(was_training)
    location = model.location.double().cpu()[:, None]
    apart = 1e-5 * torch.arange(head.levels)  # quantiles that are equal, of a price that hardly moves
    scaled = [
        (torch.from_numpy(example.teacher) - location) / torch.from_numpy(example.scale)[..., None] + apart
        for example in chosen
    ]
    wanted = torch.cat([head.outputs_for(each) for each in scaled]).flatten(1)  # (n, horizon * levels)
    fitted_on = sum(len(example.scale) for example in chosen[: -(-4 * len(chosen) // 5)])
    errors = {
        ridge: float((inputs[fitted_on:] @ weight.T + bias - wanted[fitted_on:]).square().mean())
        for ridge, (weight, bias) in _ridge_regressions(inputs[:fitted_on], wanted[:fitted_on]).items()
    }
    best = min(errors, key=errors.__getitem__)
    weight, bias = _ridge_regressions(inputs, wanted)[best]
    with torch.no_grad():
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(bias)


def _ridge_regressions(inputs: Tensor, wanted: Tensor) -> dict[float, tuple[Tensor, Tensor]]:
    """Ridge -> (outputs, inputs) weight and (outputs,) bias, which is not shrunk."""
    centre, level = inputs.mean(dim=0), wanted.mean(dim=0)
    moved = inputs - centre
    values, vectors = torch.linalg.eigh(moved.T @ moved / len(moved))
    pull = vectors.T @ (moved.T @ (wanted - level) / len(moved))
    found = {}
    for ridge in RIDGES:
        weight = (vectors @ (pull / (values.clamp_min(0.0) + ridge)[:, None])).T
        found[ridge] = (weight, level - weight @ centre)
    return found


def _quantiles_of_weights(
    path: Path, data: ForecastData, settings: TrainLoraSettings, device: torch.device
) -> tuple[dict[tuple[str, int], np.ndarray], str]:
    """As ``prior_quantiles``, of a weights file; and how messages name it."""
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
    return known, f"{path} ({spec.base_model['name']})"
