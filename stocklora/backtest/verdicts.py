"""A backtest's numbers in plain sentences, one for each model.

A model's pooled rows, one a day ahead, become clauses. A row is first turned into a template of what to say; days
with the same template are told together, with the range of their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SIGNIFICANCE = 0.05
COVERAGE_TOLERANCE = 2.0  # percentage points
SUSPICIOUS_RATIO = 0.97  # a Relative_MAE; no public model gets below it on daily prices

_Rows = Sequence[Mapping[str, Any]]


def verdict(model: str, rows: _Rows, whose_loss: str | None) -> str:
    """What can be said of a model, and what cannot.

    Args:
        rows: the model's pooled rows of metrics.csv, one a day ahead, each with three keys more: ``Same`` (bool, its
            point forecast is the last close on every date), ``Majority`` (up or down, the more frequent sign) and
            ``Coverage_Error`` (standard error of ``Coverage_80``, percentage points).
        whose_loss: whose quantile loss the model's stands beside, such as ``EWMA's``; None says nothing of it.
    """
    clauses = [*_point_clauses(rows), *_direction_clauses(rows), *_interval_clauses(rows)]
    if whose_loss is not None:
        clauses += _loss_clauses(rows, whose_loss)
    return f"{model}: {'; '.join(clauses)}."


def _point_clauses(rows: _Rows) -> list[str]:
    def template(row: Mapping[str, Any]) -> str:
        if row["Same"]:
            return "its point forecast is identical to the last close's"
        if math.isnan(row["Relative_MAE"]):
            return "it cannot be compared with the last close, which was never wrong"
        if math.isnan(row["DM_p"]) or math.isnan(row["Relative_MAE_Low"]):
            return "there are too few days to tell it from the last close (MAE {ratio} of it)"
        says = "not distinguishable from"
        if row["DM_p"] < SIGNIFICANCE and row["DM"] < 0.0 and row["Relative_MAE_High"] < 1.0:
            says = "better than"
        if row["DM_p"] < SIGNIFICANCE and row["DM"] > 0.0 and row["Relative_MAE_Low"] > 1.0:
            says = "worse than"
        return f"it is {says} the last close (MAE {{ratio}} of it, 95% {{interval}})"

    clauses = []
    for said, group in _grouped(rows, template):
        ends = (min(row["Relative_MAE_Low"] for row in group), max(row["Relative_MAE_High"] for row in group))
        digits = (
            _digits(group, ("Relative_MAE", "Relative_MAE_Low", "Relative_MAE_High")) if " than " in said else ".3f"
        )
        interval = f"{'interval' if len(group) == 1 else 'intervals within'} {ends[0]:{digits}} to {ends[1]:{digits}}"
        words = said.format(ratio=_span(group, "Relative_MAE", digits), interval=interval)
        clauses.append(f"at {_days(group)} ahead {words}")
    lowest = min([row["Relative_MAE"] for row in rows if not math.isnan(row["Relative_MAE"])], default=1.0)
    if lowest < SUSPICIOUS_RATIO:
        below = f"{100.0 * (1.0 - lowest):.0f}%"
        clauses.append(f"an error {below} below the last close's is rare: look for a leak (`--check-leakage`)")
    return clauses


def _direction_clauses(rows: _Rows) -> list[str]:
    def template(row: Mapping[str, Any]) -> str:
        guess = f"always guessing {row['Majority']}"
        if math.isnan(row["Direction"]):
            return "it forecasts no direction"
        if row["Direction"] <= row["Direction_Majority"]:
            return f"its direction is no better than {guess} ({{right}}% right against {{majority}}%)"
        if row["PT_p"] < SIGNIFICANCE:
            return f"its direction is better than {guess} ({{right}}% right against {{majority}}%)"
        return f"its direction is not distinguishable from chance ({{right}}% right, {guess} {{majority}}%)"

    return [
        _at(group, rows)
        + said.format(right=_span(group, "Direction", ".1f"), majority=_span(group, "Direction_Majority", ".1f"))
        for said, group in _grouped(rows, template)
    ]


def _interval_clauses(rows: _Rows) -> list[str]:
    def template(row: Mapping[str, Any]) -> str:
        off = row["Coverage_80"] - 80.0
        says = "too wide" if off > 0.0 else "too narrow"
        if abs(off) <= COVERAGE_TOLERANCE:
            says = "about right"
        elif abs(off) <= 1.96 * row["Coverage_Error"]:
            says = "no further off than chance"
        return f"its 80% interval covers {{share}}%: {says}"

    return [
        _at(group, rows) + said.format(share=_span(group, "Coverage_80", ".1f"))
        for said, group in _grouped(rows, template)
    ]


def _loss_clauses(rows: _Rows, whose: str) -> list[str]:
    def template(row: Mapping[str, Any]) -> str:
        says = "not distinguishable ({least})"
        if math.isnan(row["DM_Pinball_p"]):
            says = "identical" if row["Relative_Pinball"] == 1.0 else "too few days to judge"
        elif row["DM_Pinball_p"] < SIGNIFICANCE and row["DM_Pinball"] < 0.0 and row["Relative_Pinball"] < 1.0:
            says = "better ({most})"
        elif row["DM_Pinball_p"] < SIGNIFICANCE and row["DM_Pinball"] > 0.0 and row["Relative_Pinball"] > 1.0:
            says = "worse ({most})"
        return f"its quantile loss is {{ratio}} of {whose}: {says}"

    clauses = []
    for said, group in _grouped(rows, template):
        p_values = [row["DM_Pinball_p"] for row in group]
        digits = _digits(group, ("Relative_Pinball",)) if "{most}" in said else ".3f"
        words = said.format(
            ratio=_span(group, "Relative_Pinball", digits),
            most=_p_value(max(p_values), "at most" if len(group) > 1 else "="),
            least=_p_value(min(p_values), "at least" if len(group) > 1 else "="),
        )
        clauses.append(_at(group, rows) + words)
    return clauses


def _grouped(rows: _Rows, template: Callable[[Mapping[str, Any]], str]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Rows by what is said of them, in the order in which it is first said."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(template(row), []).append(row)
    return list(groups.items())


def _at(group: _Rows, rows: _Rows) -> str:
    return "" if len(group) == len(rows) else f"at {_days(group)} ahead "


def _days(group: _Rows) -> str:
    """``1 day``, ``1 and 3 days``, ``1 to 3 and 5 days``."""
    days = [row["Day"] for row in group]
    parts: list[str] = []
    for run in np.split(days, np.flatnonzero(np.diff(days) != 1) + 1):
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(day) for day in run]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{text} {'day' if days == [1] else 'days'}"


def _digits(group: _Rows, columns: Sequence[str]) -> str:
    """Three digits, or four where one would round to 1.000 what is said to differ from 1."""
    return ".4f" if any(f"{row[column]:.3f}" == "1.000" for row in group for column in columns) else ".3f"


def _span(group: _Rows, column: str, digits: str) -> str:
    values = [row[column] for row in group if not math.isnan(row[column])]
    if not values:
        return "-"
    ends = [format(value, digits) for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _p_value(value: float, bound: str) -> str:
    return "p < 0.001" if value < 0.001 else f"p {bound} {value:.3f}"
