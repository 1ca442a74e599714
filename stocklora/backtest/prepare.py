"""What a backtest needs before its first fit: models, dates, and what a base model may remember of the days scored.

``CUTOFFS`` says how far the training text of a base model reaches: a model may remember the prices of days before
that. Dates are those that the makers state in the model's card or paper; where they state none, the day the weights
were published is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from stocklora.backtest.parts import PARTS, REFITS
from stocklora.backtest.settings import BacktestSettings
from stocklora.backtest.walk_forward import (
    BASELINES,
    Baselines,
    LanguageModel,
    Model,
    Peer,
    Plan,
    Simple,
    choose_cuts,
    models_compared,
)
from stocklora.cli.console import UserError
from stocklora.dataset.windows import as_date, calendar_of
from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.volatility.prior import MarketPrior, prior_named

# beginning of the name, without the owner, in lower case -> (date, whether the makers state it)
CUTOFFS: dict[str, tuple[str, bool]] = {
    "gpt2": ("2017-12-31", True),
    "distilgpt2": ("2017-12-31", True),
    "llama-2": ("2022-09-30", True),
    "meta-llama-3-8b": ("2023-03-31", True),
    "meta-llama-3-70b": ("2023-12-31", True),
    "llama-3.1": ("2023-12-31", True),
    "llama-3.2": ("2023-12-31", True),
    "llama-3.3": ("2023-12-31", True),
    "phi-3": ("2023-10-31", True),
    "phi-4": ("2024-06-30", True),
    "gemma-3": ("2024-08-31", True),
    "smollm2": ("2024-10-31", False),
    "smollm3": ("2025-07-08", False),
    "qwen2.5": ("2024-09-19", False),
    "qwen2": ("2024-06-07", False),
    "qwen3": ("2025-04-29", False),
    "deepseek-r1": ("2025-01-20", False),
    "tinyllama": ("2023-12-30", False),
    "mistral-7b": ("2023-09-27", False),
}


def prepare_run(
    settings: BacktestSettings, prices: Mapping[str, pd.DataFrame], is_main: bool = True
) -> tuple[list[Model], Plan, Any]:
    """The models and the dates; refuses days that the weights were trained on.

    Args:
        settings: what ``backtest.py`` was told.
        prices: ticker -> its table.
        is_main: whether this process trains weights anew where ``--refit`` asks for it.

    Returns:
        Models, plan, and the ensemble of weights (None without ``llm``).

    Raises:
        UserError: a ticker, weights or dates that do not go together.
    """
    if settings.show is not None and settings.show not in prices:
        raise UserError(
            f"--show {settings.show}: no such ticker in the files; they have {', '.join(list(prices)[:20])}"
        )
    if settings.base_cutoff is not None:
        as_date(settings.base_cutoff, "--base_cutoff")  # read at the end; a mistake is told before the work
    ensemble = load_ensemble(settings) if "llm" in settings.models else None
    plan = choose_plan(settings, calendar_of(prices), ensemble)
    return build_models(settings, plan, ensemble, is_main), plan, ensemble


def load_ensemble(settings: BacktestSettings) -> Any:
    """The weights files that forecast together.

    Raises:
        UserError: they forecast other days ahead or other quantiles than this backtest scores.
    """
    from stocklora.forecaster.ensemble import Ensemble
    from stocklora.runtime.machine import choose_device, choose_dtype

    device = choose_device(settings.device)
    folders = settings.model_path * len(settings.lora_weights) if len(settings.model_path) == 1 else settings.model_path
    members = list(zip(settings.lora_weights, folders, strict=True))
    dtype = choose_dtype(settings.dtype, device)
    ensemble = Ensemble(members, settings.ensemble, device, dtype, settings.trust_remote_code, keep=True)
    spec = ensemble.weights[0].spec
    if spec.horizon != settings.horizon:
        raise UserError(
            f"--horizon {settings.horizon}: {settings.lora_weights[0]} forecasts {spec.horizon} days; give "
            f"--horizon {spec.horizon} or train again"
        )
    if spec.levels != list(QUANTILE_LEVELS):
        raise UserError(f"{settings.lora_weights[0]} forecasts other quantile levels; train it anew")
    return ensemble


def choose_plan(settings: BacktestSettings, calendar: pd.DatetimeIndex, ensemble: Any) -> Plan:
    """When to fit and what to score.

    Raises:
        UserError: dates that cannot be read, or days that the weights learned from.
    """
    window_size, unseen_from = settings.window_size, None
    if ensemble is not None:
        window_size = max(window_size, *(content.spec.window_size for content in ensemble.weights))
        unseen_from = max(pd.Timestamp(content.training["data"]["test_from"]) for content in ensemble.weights)
    if settings.start is not None:
        first = as_date(settings.start, "--from")
    elif unseen_from is not None:
        first = unseen_from
    else:  # the last 30% of the days that have a window behind them
        days = max(0, len(calendar) - window_size)
        first = calendar[math.ceil(0.7 * days) - days - 1]
    if unseen_from is not None and first < unseen_from and settings.refit == "never":
        raise UserError(
            f"--from {first:%Y-%m-%d}: the weights were trained and calibrated on days before {unseen_from:%Y-%m-%d}, "
            f"and a score on days it learned from means nothing; give a later date, or --refit yearly to train anew"
        )
    end = as_date(settings.end, "--to") if settings.end is not None else calendar[-1]
    cuts = choose_cuts(calendar, first, end, settings.refit)
    return Plan(cuts, end, window_size, settings.horizon, settings.train_days)


def build_models(settings: BacktestSettings, plan: Plan, ensemble: Any, is_main: bool) -> list[Model]:
    """What is compared: all baselines as one model, then the others in the order asked for."""
    names, levels = models_compared(settings.models), np.array(QUANTILE_LEVELS)
    prior = prior_of(settings)
    models: list[Model] = [Baselines([name for name in names if name in BASELINES], levels, prior)]
    for name in names:
        if name == "simple":
            models.append(Simple(plan.window_size, settings.seed, settings.device))
        elif name == "llm":
            refits = settings.output_dir / PARTS / REFITS if settings.refit != "never" else None
            models.append(LanguageModel(ensemble, refits, is_main))
        elif name not in BASELINES:
            models.append(Peer(name, levels))
    return models


def prior_of(settings: BacktestSettings) -> MarketPrior | None:
    """The prior that a backtest forecasts from; None without the model ``prior``."""
    return prior_named(settings.prior) if "prior" in settings.models else None


def priors_used(settings: BacktestSettings, ensemble: Any) -> list[Mapping[str, Any]]:
    """What the priors were made from that the compared models start from, each once."""
    prior = prior_of(settings)
    used = [] if prior is None else [prior.made_from]
    if ensemble is not None:
        used += [content.training["data"].get("prior") for content in ensemble.weights]
    return list({made_from["prices_sha256"]: made_from for made_from in used if made_from}.values())


def cutoff_of(name: str) -> tuple[pd.Timestamp, bool] | None:
    """The date for a base model's name, and whether its makers state it; None where nothing is known."""
    short = name.rsplit("/", 1)[-1].lower()
    matches = [start for start in CUTOFFS if short.startswith(start)]
    if not matches:
        return None
    date, stated = CUTOFFS[max(matches, key=len)]
    return pd.Timestamp(date), stated


def cutoff_note(ensemble: Any, given: str | None, days: np.ndarray) -> list[str]:
    """What the reader of a report must know of the base model's memory.

    Args:
        given: ``--base_cutoff``.
        days: (n,) datetime64[D] forecast dates.
    """
    names = list(dict.fromkeys(content.spec.base_model["name"] for content in ensemble.weights))
    anonymous = all(content.spec.anonymize for content in ensemble.weights)
    prompt = "The prompt names neither ticker nor date." if anonymous else "The prompt names the ticker and a date."
    return [f"{_about(name, given, days)} {prompt}" for name in names]


def _about(name: str, given: str | None, days: Sequence[np.datetime64] | np.ndarray) -> str:
    known = cutoff_of(name) if given is None else (as_date(given, "--base_cutoff"), True)
    if known is None:
        return (
            f"How far the training text of {name} reaches is not known here (say it with --base_cutoff): it may "
            f"remember some of the {len(days)} days scored."
        )
    date, stated = known
    before = int(np.sum(np.asarray(days) <= np.datetime64(date, "D")))
    end = f"The training text of {name} ends on {date:%Y-%m-%d}"
    published = f"The makers of {name} state no end of its training text; it was published on {date:%Y-%m-%d}"
    whose = end if stated else published
    if before == 0:
        return f"{whose}, before all of the {len(days)} days scored."
    share = "all" if before == len(days) else f"{before} of"
    return f"{whose}: {share} the {len(days)} days scored lie before that, and it may remember them."
