"""What a base model reads from the text of the days: measured on numbers that, unlike outcomes, hold no noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stocklora.base_models.loading import BaseModel
from stocklora.dataset.prepare import prepare
from stocklora.finetune.fit import prepare_data, specification
from stocklora.finetune.optimization import standardize_head
from stocklora.finetune.prepare import SplitPrices
from stocklora.finetune.settings import PRIOR_TEACHER, TrainLoraSettings
from stocklora.finetune.warm_start import fit_head, with_teacher
from stocklora.forecaster.forecaster import build_forecaster
from stocklora.metrics.scores import width_explained
from stocklora.runtime.machine import choose_device, choose_dtype
from stocklora.volatility.prior import prior_named
from stocklora.volatility.random_walk import QuantileBaseline

FIRST_LAYERS = 2  # read letters best, and take a second (docs/experiments.md)


@dataclass(frozen=True)
class Reading:
    """How much of the market prior's forecast stands in the text, for a frozen model.

    Attributes:
        r2: of how much wider or narrower than EWMA's the prior's forecasts are: 1 where all of it is read, 0 where
            nothing is. har_r2: the same of HAR-range's forecasts, which read the days as numbers.
        days: held-out days it was measured on.
        layers: of the base model.
    """

    r2: float
    har_r2: float
    days: int
    layers: int


def read_from_text(
    lessons: Mapping[str, pd.DataFrame], held_out: Mapping[str, pd.DataFrame], model_path: Path, device: str = "auto"
) -> Reading:
    """Teach a head over frozen layers the market prior's quantiles, and see what it gives back on other days.

    The quantiles are a function of the days up to each origin. So the ridge regression that sets the head learns no
    noise, and what it misses is what the text, or the model, does not tell.

    Args:
        lessons: ticker -> table that the head is set on. held_out: that it is measured on; no day of ``lessons``.

    Raises:
        UserError: too few days, or a base model that cannot be loaded.
    """
    base = BaseModel(model_path)
    layers = min(FIRST_LAYERS, base.config.get_text_config().num_hidden_layers)
    settings = TrainLoraSettings(
        model_path=model_path, backbone_layers=layers, prompt="words", scale="ewma", method="head",
        teacher=PRIOR_TEACHER, device=device,
    )  # fmt: skip
    prior = prior_named(settings.prior)
    data = prepare(lessons, settings.window_size, settings.horizon, prior=prior)
    prepared = prepare_data(SplitPrices(data, settings.scale, prior), settings, base)
    place = choose_device(device)
    taught = with_teacher(prepared.examples["train"], prepared.data, settings, place)
    forecaster = build_forecaster(
        specification(prepared, settings, base), base, place, choose_dtype(settings.dtype, place)
    )
    standardize_head(forecaster.model, taught, place)
    fit_head(forecaster.model, taught, place)
    origins = {name: range(settings.window_size, len(frame)) for name, frame in held_out.items()}
    wanted = {kind: forecasts_at(prepared.data.baselines[kind], held_out, origins) for kind in ("ewma", "har", "prior")}
    read = forecaster.quantiles(forecaster.packed_examples(held_out, origins), calibrated=False)
    by_text, by_numbers = (width_explained(each, wanted["prior"], wanted["ewma"]) for each in (read, wanted["har"]))
    return Reading(by_text, by_numbers, len(read), layers)


def forecasts_at(
    baseline: QuantileBaseline, prices: Mapping[str, pd.DataFrame], origins: Mapping[str, range]
) -> np.ndarray:
    """(origins, horizon, levels) quantiles of a baseline that has a scale, in the order of ``origins``."""
    assert baseline.scale is not None
    scales = baseline.scale.on(prices)
    return np.concatenate([baseline.quantiles(scales[name][list(rows)]) for name, rows in origins.items()])
