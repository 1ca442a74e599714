"""The charts of the backtest's page: SVG drawn by matplotlib.

Colours become CSS variables, so that one drawing serves light screens, dark screens and paper. Every function that
gives text gives it ready for the page, with data escaped; charts are drawn under ``RC``.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stocklora.backtest.report.style import as_float, formatted, iso_date, name_of
from stocklora.backtest.results import PIT_BINS, BacktestResult
from stocklora.metrics.scores import INTERVAL_COLUMNS, level_index
from stocklora.plots.forecasts import BANDS
from stocklora.plots.style import DOWN, GRID, INK, MODEL, MUTED, WALK

MOST_POINTS = 400  # of a line: more than a panel has pixels to show
FONT = 10.0
_PAPER = "#fefefe"  # the page's own ground, behind hollow dots
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", MODEL: "model", WALK: "walk", DOWN: "down", _PAPER: "paper"}
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "path.simplify": False,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def _axes(width: float, height: float, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Any]:
    """A figure whose units are the points of its viewBox, with margins in the same unit."""
    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_visible(False)
    axis = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    axis.patch.set_visible(False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(WALK)
    axis.tick_params(length=0, colors=MUTED, labelsize=FONT, pad=4)
    axis.set_axisbelow(True)
    return figure, axis


def _svg(figure: Figure, key: str, label: str) -> str:
    """The figure as an inline SVG: text as text, ids unique on the page, colours as CSS variables."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(stream, format="svg", metadata=_NO_METADATA)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # would reach the page
    used = set(re.findall(r"#([pmC][0-9a-f]{6,}(?:_[0-9a-f_]+)?)\b", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r"<[^>]+>", _tidied, text)
    text = re.sub(r">\s+<", "><", text)
    name = f'role="img" aria-label="{escape(label)}"'
    return re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', lambda tag: f"<svg {tag[1]} {name}>", text, count=1).strip()


def _tidied(tag: re.Match[str]) -> str:
    """One tag without what the page's style sheet sets, and with two decimals, a hundredth of a pixel."""
    text = tag[0].replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", text)
    text = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return " ".join(text.split())


def figures(panels: Sequence[tuple[str, str]], caption: str, legend: str = "", kind: str = "panels") -> str:
    """Small charts side by side as far as the screen allows, each with its name, and what they show."""
    inner = "".join(f'<div class="panel"><h4>{escape(name)}</h4>{picture}</div>' for name, picture in panels)
    return f'<figure><div class="{kind}">{inner}</div>{legend}<figcaption>{escape(caption)}</figcaption></figure>\n'


class Whisker(NamedTuple):
    """A number and the interval around it."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(row: Mapping[str, Any], key: str) -> Whisker:
        """From a row of metrics.csv: the columns ``key``, ``key_Low`` and ``key_High``."""
        return Whisker(*(as_float(row.get(name)) for name in (key, f"{key}_Low", f"{key}_High")))


def day_alpha(day: int, horizon: int) -> float:
    """Days further ahead are drawn paler."""
    return 1.0 if horizon == 1 else 1.0 - 0.65 * (day - 1) / (horizon - 1)


def reach_of(values: Iterable[float], line: float) -> float:
    """Largest distance from ``line``; 0 without any value."""
    return max((abs(value - line) for value in values if math.isfinite(value)), default=0.0)


def _usual_reach(reaches: Sequence[float], least: float) -> float:
    """The largest that is no outlier: one hopeless model must not press the others into a line."""
    typical = max(float(np.median(reaches)) if reaches else 0.0, least)
    return max([least, *(reach for reach in reaches if reach <= 4.0 * typical)])


def forest_limits(rows: Sequence[tuple[str, Sequence[Whisker]]], line: float, least: float) -> tuple[float, float]:
    """(low, high) of an axis around ``line`` that holds all whiskers but outliers', and ``least`` either side."""
    reaches = [reach_of((end for point in points for end in point), line) for _, points in rows]
    reach = 1.08 * _usual_reach(reaches, least)
    return line - reach, line + reach


def forest(
    rows: Sequence[tuple[str, Sequence[Whisker]]],
    line: float,
    limits: tuple[float, float],
    focus: str,
    key: str,
    label: str,
    decimals: int | None = None,
) -> str:
    """Dots with whiskers, a row a model; several dots in a row are days ahead.

    Args:
        rows: (model, its points), from the top.
        line: where a vertical line stands: what the values are compared with.
        limits: (low, high) of the axis; values beyond are written at its ends.
        focus: the model whose row stands out.
        key: makes ids unique on the page.
        label: the chart in words.
        decimals: of the values written at the right end; None writes none.
    """
    most = max((len(points) for _, points in rows), default=1)
    step = max(32.0, 8.0 * most + 12.0)
    height = step * len(rows) + 30.0
    figure, axis = _axes(340.0, height, 122.0, 12.0 if decimals is None else 48.0, 6.0, 24.0)
    axis.set_xlim(*limits)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_yticks([])
    step_x, places = _nice_step(0.85 * (limits[1] - line))
    axis.set_xticks([line - step_x, line, line + step_x], [f"{line + side * step_x:.{places}f}" for side in (-1, 0, 1)])
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.axvline(line, color=MUTED, linewidth=1.2)
    for at, (model, points) in enumerate(rows):
        colour = MODEL if model == focus else MUTED
        _row_label(axis, at, step, name_of(model), INK if model == focus else MUTED)
        for number, point in enumerate(points):
            y = at + (number - (len(points) - 1) / 2) * 8.0 / step
            alpha = day_alpha(number + 1, len(points))
            if not math.isfinite(point.value):
                continue
            if limits[0] <= point.value <= limits[1]:
                is_clear = decimals is None or point.high < line or point.low > line
                _dot_with_whiskers(axis, point, y, colour, alpha, is_clear)
            else:
                _outlier(axis, point.value, y, limits, 2 if decimals else 1, FONT - 2 if len(points) > 1 else FONT)
        if decimals is not None and points and limits[0] <= points[0].value <= limits[1]:
            axis.text(1.02, at, formatted(points[0].value, decimals), transform=axis.get_yaxis_transform(),
                      color=INK if model == focus else MUTED, fontsize=FONT, va="center_baseline")  # fmt: skip
    return _svg(figure, key, label)


def _dot_with_whiskers(axis: Any, point: Whisker, y: float, colour: str, alpha: float, is_filled: bool) -> None:
    if math.isfinite(point.low) and math.isfinite(point.high):
        axis.plot([point.low, point.high], [y, y], color=colour, alpha=alpha, linewidth=1.8, solid_capstyle="round")
    axis.plot([point.value], [y], "o", color=colour, alpha=alpha, markersize=5.5, markeredgewidth=1.6,
              markerfacecolor=colour if is_filled else _PAPER)  # fmt: skip


def _outlier(axis: Any, value: float, y: float, limits: tuple[float, float], decimals: int, size: float) -> None:
    """A value beyond the axis, written at the end it lies beyond."""
    is_low, number = value < limits[0], formatted(value, decimals)
    axis.text(limits[0] if is_low else limits[1], y, f"← {number}" if is_low else f"{number} →", color=DOWN,
              fontsize=size, ha="left" if is_low else "right", va="center_baseline")  # fmt: skip


def _nice_step(most: float) -> tuple[float, int]:
    """The largest of 1, 2, 5 times a power of ten that is at most ``most``, and the decimals it needs."""
    power = math.floor(math.log10(most))
    factor = next(factor for factor in (5, 2, 1) if factor * 10.0**power <= most)
    return factor * 10.0**power, max(0, -power)


def _row_label(axis: Any, at: int, step: float, name: str, colour: str) -> None:
    """A model's name left of its row, on as many lines as it needs; one text a line, so that ends stay aligned."""
    whole = [name] if len(name) <= 20 else re.split(r"(?<=,) | (?=\()", name)
    lines = [line for part in whole for line in textwrap.wrap(part, 20, break_on_hyphens=False)][:3] or [""]
    for number, text in enumerate(lines):
        y = at + (number - (len(lines) - 1) / 2) * (FONT + 1.5) / step
        axis.text(-0.04, y, text, transform=axis.get_yaxis_transform(), color=colour, fontsize=FONT, ha="right",
                  va="center_baseline")  # fmt: skip


def line_limits(
    series: Mapping[str, np.ndarray], line: float, least: float = 0.0
) -> dict[str, tuple[float, float, str]]:
    """(low, high, remark) of each panel: one axis for all, but for a panel that would press the others flat."""
    reaches = {name: reach_of(values, line) for name, values in series.items()}
    usual = _usual_reach(list(reaches.values()), least)
    limits = {}
    for name, values in series.items():
        if reaches[name] <= usual:
            limits[name] = (line - usual, line + usual, "")
        else:
            own = np.append(values[np.isfinite(values)], line)
            limits[name] = (float(own.min()), float(own.max()), " (own scale)")
    return limits


def line_chart(
    dates: np.ndarray,
    values: np.ndarray,
    line: float,
    limits: tuple[float, float, str],
    is_focus: bool,
    key: str,
    label: str,
    band: float | None = None,
    top: float = math.inf,
) -> str:
    """One model's series against a level line.

    Args:
        dates: (n,) datetime64[D].
        values: (n,) NaN where there is none.
        line: what the values are compared with.
        limits: (low, high, remark) from ``line_limits``.
        is_focus: whether the series stands out.
        key: makes ids unique on the page.
        label: the chart in words.
        band: half-width of the grey band around the line.
        top: the axis ends here at most.
    """
    keep = np.unique(np.linspace(0, len(dates) - 1, min(len(dates), MOST_POINTS)).round().astype(int))
    figure, axis = _axes(340.0, 150.0, 36.0, 20.0, 8.0, 22.0)
    margin = 0.06 * (limits[1] - limits[0])
    axis.set_ylim(limits[0] - margin, min(limits[1] + margin, top))
    first, last = dates[0], dates[-1]
    axis.set_xlim(0.0, max((last - first) / np.timedelta64(1, "D"), 1.0))
    at = (dates[keep] - first) / np.timedelta64(1, "D")
    axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    if band is not None and math.isfinite(band):
        axis.axhspan(max(line - band, 0.0), min(line + band, 100.0), color=WALK, alpha=0.16, linewidth=0)
    axis.axhline(line, color=MUTED, linewidth=1.0)
    axis.plot(at, values[keep], color=MODEL if is_focus else MUTED, linewidth=1.4, solid_joinstyle="round",
              marker="o" if len(keep) < 3 else None, markersize=4)  # fmt: skip
    _time_ticks(axis, first, last)
    return _svg(figure, key, label)


def _time_ticks(axis: Any, first: np.datetime64, last: np.datetime64) -> None:
    """About four dates at the starts of years, quarters or months; the ends where there are fewer than two."""
    months = np.arange(first.astype("datetime64[M]") + 1, last.astype("datetime64[M]") + 1)
    for step in (1, 3, 6, 12, 24, 60, 120):
        ticks = months[months.astype(int) % step == 0]
        if len(ticks) <= 4:
            break
    days = ticks.astype("datetime64[D]")
    texts = [str(tick)[: 4 if step >= 12 else 7] for tick in ticks]
    if len(ticks) < 2:
        days = np.array([first, last] if last > first else [first])
        texts = [iso_date(day) for day in days]
    axis.set_xticks((days - first) / np.timedelta64(1, "D"), texts)
    if len(ticks) < 2:
        for text, side in zip(axis.get_xticklabels(), ("left", "right"), strict=False):
            text.set_horizontalalignment(side)


def pit_edges(levels: np.ndarray) -> np.ndarray:
    """The bins, numbered from 0 to PIT_BINS, at which a quantile level stands, and both ends.

    Between two levels the transform only interpolates, which spreads the closes of even a perfect forecast unevenly
    over the bins there (by 20% between the 10% and 25% quantile of a normal one); from level to level it is exact.
    """
    at = np.asarray(levels) * PIT_BINS
    inner = np.round(at[np.abs(at - np.round(at)) < 1e-6]).astype(int)
    return np.unique([0, *inner, PIT_BINS])


def pit_chart(edges: np.ndarray, heights: np.ndarray, band: np.ndarray, top: float, is_focus: bool, model: str) -> str:
    """A histogram of the probability integral transform against the level of 1.

    Args:
        edges: (parts + 1,) in bins.
        heights: (parts,) relative to a perfect forecast's.
        band: (parts,) half-widths.
    """
    figure, axis = _axes(230.0, 132.0, 26.0, 6.0, 6.0, 20.0)
    places = edges / PIT_BINS
    axis.bar(places[:-1], np.nan_to_num(heights), width=np.diff(places) - 0.007, align="edge",
             color=MODEL if is_focus else WALK, alpha=0.75, linewidth=0)  # fmt: skip
    if np.isfinite(band).all():
        axis.stairs(1.0 + band, places, baseline=np.maximum(1.0 - band, 0.0), fill=True, color=MUTED, alpha=0.22,
                    linewidth=0)  # fmt: skip
    axis.axhline(1.0, color=INK, linewidth=1.0)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, top)
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    outside = int(np.sum(np.abs(heights - 1.0) > band))
    label = (
        f"{name_of(model)}: histogram of the probability integral transform, heights from "
        f"{formatted(np.min(heights), 2)} to {formatted(np.max(heights), 2)}, {outside} of {len(heights)} outside "
        "the band"
    )
    return _svg(figure, f"pit-{model}", label)


def fan_chart(result: BacktestResult, forecast: np.ndarray, came: np.ndarray, label: str) -> str:
    """Intervals as bars, a day apart.

    Args:
        result: whose ``fan`` the days are.
        forecast: (n, levels) closes.
        came: (n,) closes.
        label: the chart in words.
    """
    figure, axis = _axes(1080.0, 380.0, 52.0, 8.0, 8.0, 24.0)
    at = np.arange(len(came))
    column = {name: forecast[:, level_index(result.levels, level)] for level, name in INTERVAL_COLUMNS.items()}
    for lower, upper, alpha, _ in BANDS:
        axis.bar(at, column[upper] - column[lower], bottom=column[lower], width=0.92, color=MODEL, alpha=alpha,
                 linewidth=0)  # fmt: skip
    axis.add_collection(LineCollection(
        [[(x - 0.46, y), (x + 0.46, y)] for x, y in zip(at, column["P50"], strict=True)], colors=MODEL, linewidths=1.4
    ))  # fmt: skip
    inside = (came >= column["P10"]) & (came <= column["P90"])
    axis.plot(at, came, color=INK, linewidth=0.8, alpha=0.45)
    axis.plot(at[inside], came[inside], "o", color=INK, markersize=4, markeredgewidth=0)
    axis.plot(at[~inside], came[~inside], "o", color=DOWN, markersize=5.5, markeredgewidth=0)
    ends = np.concatenate([forecast[:, [0, -1]].ravel(), came])
    low, high = float(ends.min()), float(ends.max())
    room = 0.04 * (high - low) or 0.01 * high
    axis.set_ylim(low - room, high + room)
    shown = range(len(came) - 1, -1, -math.ceil(len(came) / 8))[::-1]
    axis.set_xticks(shown, [iso_date(result.fan.targets[index, 0]) for index in shown])
    axis.set_xlim(-0.9, max(len(came), 8) - 0.1)
    axis.get_xticklabels()[-1].set_horizontalalignment("right" if len(came) > 8 else "center")
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.yaxis.set_major_locator(MaxNLocator(6))
    decimals = max(0, math.ceil(0.5 - math.log10(high - low + 2 * room)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.{decimals}f}"))
    axis.tick_params(labelsize=FONT + 1.5)
    return _svg(figure, "fan", label)
