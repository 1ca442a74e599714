"""What a run knows before torch is imported, which takes seconds: whole folders, its days, splits and start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from stocklora.base_models.folders import check_model_folder
from stocklora.cli.console import listed, say
from stocklora.dataset.prepare import ForecastData, prepare, with_a_day_to_learn_from
from stocklora.dataset.windows import SPLITS
from stocklora.finetune.settings import PRIOR_TEACHER, TrainLoraSettings
from stocklora.prices.quality import short_form
from stocklora.runtime.distributed import launched
from stocklora.runtime.files import check_writable
from stocklora.volatility.prior import MarketPrior, prior_named

SCALE_NAMES = {
    "ewma": "EWMA volatility", "har": "HAR-range volatility", "harx": "HAR-X volatility",
    "prior": "the market prior's volatility, moved by the training days",
}  # fmt: skip


@dataclass(frozen=True)
class SplitPrices:
    """Prices cut into train, validation and test, with what training starts from.

    Attributes:
        scale_kind: of the volatility that the forecaster starts from.
        prior: the market prior, if the start is made from one.
    """

    data: ForecastData
    scale_kind: str
    prior: MarketPrior | None


def before_torch(prices: Mapping[str, pd.DataFrame], settings: TrainLoraSettings) -> SplitPrices | None:
    """``split_prices`` once the folders are checked; None where several processes were launched, which torch joins.

    Raises:
        UserError: no whole base model, a folder that cannot be written, a prior that cannot be read, or too few days.
    """
    if launched():
        return None
    check_model_folder(settings.model_path)
    check_writable(settings.save_dir)
    return split_prices(prices, settings)


def split_prices(prices: Mapping[str, pd.DataFrame], settings: TrainLoraSettings) -> SplitPrices:
    """Cut the days, fit the start on training days, and say what is learned from.

    Args:
        prices: ticker -> table of days.

    Raises:
        UserError: a prior that cannot be read, or too few days.
    """
    prior = prior_named(settings.prior)
    prices = with_a_day_to_learn_from(prices, settings.window_size + settings.horizon + 1)
    data = prepare(
        prices, settings.window_size, settings.horizon, settings.validation_fraction, settings.test_fraction,
        settings.validation_from, settings.test_from, prior,
    )  # fmt: skip
    scale_kind = settings.scale
    if scale_kind == "auto":  # where the prior teaches, it is not where the run starts
        scale_kind = "ewma" if settings.teacher == PRIOR_TEACHER else data.better_scale()
    print_data_facts(data, scale_kind, settings)
    return SplitPrices(data, scale_kind, prior)


def print_data_facts(data: ForecastData, scale_kind: str, settings: TrainLoraSettings) -> None:
    """Print which days are learned from, judged on and tested on, and where the forecast begins."""
    days = {split: sum(len(parts[split]) for parts in data.origins.values()) for split in SPLITS}
    facts = [
        ("prices", short_form(data.prices)),
        *([("tickers", listed(list(data.prices)))] if len(data.prices) > 1 else []),
        ("days to learn from", f"{days['train']:,}; to validate {days['validation']:,} (from "
                               f"{data.dates.validation:%Y-%m-%d}); to test {days['test']:,} (from "
                               f"{data.dates.test:%Y-%m-%d})"),
        ("starts at", f"the random walk scaled by {SCALE_NAMES[scale_kind]}"
                      if settings.expand_rank_from is None else f"the forecasts of {settings.expand_rank_from}"),
    ]  # fmt: skip
    print_facts(facts)


def print_facts(facts: list[tuple[str, str]]) -> None:
    """Print names and what is said of each, in two columns."""
    for name, text in facts:
        say(f"{name:<19} {text}")
