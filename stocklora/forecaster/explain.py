"""Why is this interval as wide as it is? The scale of a forecast as a product of factors.

Every scale is the exponential of a sum with one term an input. Each group of inputs is set against its own mean over
the ticker's last year: its factor says by how much today's values widen the interval beyond that year's usual. What is
left is the *level*, the scale's geometric mean over the year. Level times factors is the scale, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stocklora.cli.console import say
from stocklora.forecaster.paths import paths_of, print_probabilities, write_paths
from stocklora.forecaster.settings import MoreOutputs
from stocklora.runtime.files import write_csv
from stocklora.volatility.harx import AHEAD_INPUTS
from stocklora.volatility.market import Market, Markets
from stocklora.volatility.prior import MarketPrior
from stocklora.volatility.scales import HARX_INPUTS, VolatilityScale

YEAR_DAYS = 250
NAMED_FROM = 0.01  # a factor closer to 1 is left out of the words, not of the file

MARKET = "Market"

# column -> (what it is called in words, which inputs). The EWMA's half-life is eleven days, most of them in its weight.
FACTORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Last_Days": ("the last days", ("log_ewma", "log_range_1", "log_range_5", "last_move", "last_move_size", "move_5",
                                    "log_overnight_1", "log_overnight_5")),
    "Last_Month": ("the last month", ("log_range_22", "move_22", "log_overnight_22")),
    "Long_Run": ("the long run", ("log_range_66", "log_range_250", "log_range_500", "log_size_66", "log_size_250",
                                  "log_overnight_66")),
    "Volume": ("trading volume", ("volume", "volume_5")),
    MARKET: ("the market's days", tuple(name for name in HARX_INPUTS if name.startswith("market_"))),
    "Report_Expected": ("the company's calendar", AHEAD_INPUTS),
}  # fmt: skip
# A market of one ticker says again what the ticker's own days say, and is told as them.
MARKET_AS_OWN = {"22": "Last_Month", "66": "Long_Run"}
SURPRISES, LIMIT, MODEL = "Recent_Surprises", "Limit", "Language_Model"
WORDS = {
    **{name: words for name, (words, _) in FACTORS.items()},
    SURPRISES: "recent surprises",
    LIMIT: "the limit to three times the EWMA scale",
    MODEL: "the language model and its calibration",
}


def inputs_of_factors(one_ticker: bool) -> dict[str, list[str]]:
    """Which inputs make each factor.

    Args:
        one_ticker: whether the market is the ticker itself.
    """
    inputs = {column: list(names) for column, (_, names) in FACTORS.items()}
    if one_ticker:
        for name in FACTORS[MARKET][1]:
            inputs[MARKET_AS_OWN.get(name.rpartition("_")[2], "Last_Days")].append(name)
        inputs[MARKET] = []
    return inputs


def width_factors(scale: VolatilityScale, frame: pd.DataFrame, market: Market) -> list[dict[str, float]]:
    """The scale at the last row as a product.

    Args:
        scale: of any kind.
        frame: one ticker's prices.
        market: as ``scale.markets_of`` has it for this ticker.

    Returns:
        For each day ahead ``Scale`` (of the log return), ``Level`` in the same unit, and a factor a group of inputs;
        ``Level`` times all factors is ``Scale``.
    """
    terms = scale.terms(frame, market)
    excess = terms[:, -1] - terms[:, -YEAR_DAYS:].mean(axis=1)  # (horizon, inputs)
    names = HARX_INPUTS[: terms.shape[2]]
    surprise = float(scale.surprise_factor(frame, market)[-1]) if scale.adapts else 1.0
    rows = []
    for step, whole in enumerate(scale.at(frame, market)[-1]):
        factors = {
            column: float(np.exp(sum(excess[step, names.index(name)] for name in inputs if name in names)))
            for column, inputs in inputs_of_factors(market.is_one_ticker).items()
        }
        factors[SURPRISES] = surprise
        factors[LIMIT] = float(whole / (np.exp(terms[step, -1].sum()) * surprise))
        level = float(whole / np.prod(list(factors.values())))
        rows.append({"Scale": float(whole), "Level": level, **factors})
    return rows


def explain(
    rows: Sequence[Mapping[str, Any]],
    prices: Mapping[str, pd.DataFrame],
    scale: VolatilityScale,
    markets: Markets,
    table: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Why the forecasts are as wide as they are.

    Args:
        rows: of ``predictions.csv``.
        prices: ticker -> its table.
        scale: that the forecasts were made with; ``markets`` as it has them.
        table: (horizon, 2) the 10% and 90% quantiles of the scaled return that a language model started from; with it
            the width that the model and its calibration gave is a factor too.

    Returns:
        A row a ticker and day: shares in percent that multiply exactly to ``Scale_%``, with ``Level_%``.
    """
    by_ticker = {name: width_factors(scale, prices[name], markets.of(name)) for name in {row["Ticker"] for row in rows}}
    result = []
    for row in rows:
        factors = dict(by_ticker[row["Ticker"]][row["Day"] - 1])
        if table is not None:
            low, high = table[row["Day"] - 1]
            model = float(np.log(row["P90"] / row["P10"]) / (factors["Scale"] * (high - low)))
            factors |= {MODEL: model, "Scale": factors["Scale"] * model}
        result.append(
            {name: row[name] for name in ("Ticker", "Origin", "Date", "Day", "Last_Close", "P10", "P90")}
            | {f"{name}_%": 100.0 * value for name, value in factors.items()}
        )
    return result


def write_explanation(path: Path, explained: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of ``explain``, with digits enough that the product holds."""
    write_csv(path, pd.DataFrame(list(explained)), date_format="%Y-%m-%d", float_format="%.12g")


def say_more(
    rows: Sequence[Mapping[str, Any]],
    settings: MoreOutputs,
    explained: Callable[[], list[dict[str, Any]]] | None,
    prior: MarketPrior | None = None,
) -> None:
    """Explanations, paths and probabilities, as far as they were asked for.

    Args:
        rows: of ``predictions.csv``.
        settings: what was asked for.
        explained: the rows of ``explain``; None for a forecaster that has no scale of its own.
        prior: whose paths are drawn from; by default the one that comes along.

    Raises:
        UserError: a file that cannot be written.
    """
    if settings.explain and explained is not None:
        content = explained()
        print_explanation(content)
        write_explanation(settings.explain_output, content)
        say(f"saved: {settings.explain_output}")
    if settings.paths is not None:
        write_paths(settings.paths_output, rows, paths_of(rows, settings.paths, prior))
        say(f"saved: {settings.paths_output}")
    if settings.above is not None or settings.below is not None:
        print_probabilities(rows, settings.above, settings.below, prior)


def print_explanation(explained: Sequence[Mapping[str, Any]]) -> None:
    """In words, for each ticker's last day ahead."""
    for name, row in {row["Ticker"]: row for row in explained}.items():
        sizes = {key: np.log(row[f"{key}_%"] / 100.0) for key in WORDS if f"{key}_%" in row}
        shown = sorted((key for key in sizes if abs(sizes[key]) >= NAMED_FROM), key=lambda key: -abs(sizes[key]))
        parts = "".join(f", {WORDS[key]} {row[f'{key}_%'] - 100.0:+.0f}%" for key in shown)
        say(
            f"why this wide: {name} by {row['Date']:%Y-%m-%d} moves by {row['Scale_%']:.2f}% as a rule: its year's "
            f"{row['Level_%']:.2f}%{parts or ', nothing out of the ordinary'}"
        )
