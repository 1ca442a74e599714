"""Names and numbers as the backtest's page writes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stocklora.metrics.scores import FORECASTERS

NAMES = {
    **FORECASTERS,
    "llm": "language model",
    "simple": "simple baseline",
    "garch": "GARCH(1,1)-t",
    "autoarima": "AutoARIMA",
    "autoets": "AutoETS",
    "autotheta": "AutoTheta",
}
DASH = "–"  # what has no meaning


def name_of(model: str) -> str:
    """A model's name in words; one that is not known keeps its key."""
    return NAMES.get(model, model)


def as_float(value: Any) -> float:
    """NaN for what is missing or has no finite value."""
    number = float("nan") if value is None else float(value)
    return number if math.isfinite(number) else float("nan")


def formatted(value: Any, decimals: int) -> str:
    """With separators of thousands and a true minus sign, never a negative zero; a dash for what is missing."""
    number = as_float(value)
    if math.isnan(number):
        return DASH
    text = f"{number:,.{decimals}f}"
    if text.startswith("-"):
        text = text[1:] if not text.strip("-0.,") else "\N{MINUS SIGN}" + text[1:]
    return text


def p_value(value: Any) -> str:
    """Three decimals, as far as they tell anything."""
    return "<0.001" if as_float(value) < 0.0005 else formatted(value, 3)


def iso_date(value: Any) -> str:
    """``2025-10-31``, of anything numpy takes for a date."""
    return str(np.datetime64(value, "D"))


def days_ahead(day: int) -> str:
    return f"{day} day{'s' if day > 1 else ''} ahead"
