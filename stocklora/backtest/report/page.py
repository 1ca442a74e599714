"""``report.html``: a backtest on one page that needs no network, script, font or picture.

Its sections stand here; ``tables`` and ``charts`` fill them, ``style`` dresses them. The same result gives the same
bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from stocklora.backtest.report import charts
from stocklora.backtest.report.style import STYLE, as_float, days_ahead, formatted, iso_date, name_of
from stocklora.backtest.report.tables import COVERAGE_KEYS, reading_guide, score_table, ticker_table, worst_table
from stocklora.backtest.results import (
    CHANCE,
    INTERVALS,
    PIT_BINS,
    REFERENCE,
    BacktestResult,
    design_effect,
    rolling,
    standard_error,
)
from stocklora.metrics.scores import inside_interval
from stocklora.plots.forecasts import BANDS
from stocklora.runtime.files import write_text

MIDDLE = INTERVALS.index(0.80)


def write_report(path: Path, result: BacktestResult) -> None:
    """Write the report as one HTML file, atomically.

    Args:
        path: where; parent folders are made.
        result: what was scored. Texts in it (tickers, facts, notes, verdicts) are escaped.

    Raises:
        UserError: ``path`` cannot be written.
    """
    write_text(path, report_html(result))


@matplotlib.rc_context(charts.RC)
def report_html(result: BacktestResult) -> str:
    """The page as text; a pure function of ``result``."""
    focus = focus_of(result.models)
    sections = [
        ("verdict", "Verdict", "Verdict", _verdicts(result, focus)),
        ("scores", "Scores", "Scores beside the random walk", _scores(result, focus)),
        ("error", "Error", "Error relative to the last close", _relative_errors(result, focus)),
        ("calibration", "Calibration", "Do the intervals hold what they promise?", _calibration(result, focus)),
        ("time", "Over time", "Over time", _over_time(result, focus)),
        ("fan", "Last days", f"The last {len(result.fan.origins)} days of {result.fan.ticker}", _fan(result, focus)),
        ("worst", "Worst days", "The worst days", _worst(result, focus)),
        ("tickers", "Tickers", "Ticker by ticker", _tickers(result, focus)),
        ("reading", "How to read this", "How to read this", reading_guide()),
    ]
    tickers = str(result.tickers[0]) if len(result.tickers) == 1 else f"{len(result.tickers):,} tickers"
    title = f"Backtest of {tickers} beside the random walk"
    links = "".join(f'<a href="#{key}">{escape(short)}</a>' for key, short, _, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(heading)}</h2>{content}'
        "</section>\n"
        for key, _, heading, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{_what_was_run(result)}{_notes(result)}"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


def focus_of(models: Sequence[str]) -> str:
    """The model whose days are shown in full: the language model, else the last one asked for."""
    return "llm" if "llm" in models else models[-1]


# --- sections --------------------------------------------------------------------------------------------------


def _what_was_run(result: BacktestResult) -> str:
    dates, counts = result.daily.dates, result.daily.counts
    others = len(result.models) - 1
    beside = f"{others} model{'s' if others > 1 else ''} beside the last close" if others else "the last close alone"
    ahead = "one day" if result.horizon == 1 else f"1 to {result.horizon} days"
    lead = (
        f"{int(np.sum(counts)):,} forecasts of each model, made at the closes of {len(dates):,} days from "
        f'<span class="date">{iso_date(dates[0])}</span> to <span class="date">{iso_date(dates[-1])}</span>, {ahead} '
        f"ahead: {beside}."
    )
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{_prose(text)}</dd></div>" for name, text in result.facts)
    return f'<p class="lead">{lead}</p>' + (f'<dl class="facts">{facts}</dl>' if facts else "")


def _notes(result: BacktestResult) -> str:
    if not result.notes:
        return ""
    lines = "".join(f"<li>{_prose(note)}</li>" for note in result.notes)
    return f'<div class="notes" role="note" aria-label="Read this first"><h2>Read this first</h2><ul>{lines}</ul></div>'


def _verdicts(result: BacktestResult, focus: str) -> str:
    others = [model for model in result.models if model != REFERENCE]
    if not result.verdicts:
        return '<p class="empty">Only the last close was scored, so there is nothing to compare it with.</p>'
    # A sentence each for the models but the reference, in their order; the one the reader cares about goes first.
    models = others if len(others) == len(result.verdicts) else [""] * len(result.verdicts)
    first, rest = "", []
    for model, sentence in zip(models, result.verdicts, strict=True):
        name = f"<b>{escape(name_of(model))}</b>"
        text = sentence.removeprefix(f"{model}: ") if model else sentence
        if model == focus:
            lines = "".join(
                f"<li>{_prose(clause[:1].upper() + clause[1:])}</li>" for clause in text.rstrip(".").split("; ")
            )
            first = f'<div class="verdict">{name}<ul>{lines}</ul></div>'
        else:
            rest.append(f"<li>{f'{name}: ' if text != sentence else ''}{_prose(text)}</li>")
    return first + (f'<ul class="verdicts">{"".join(rest)}</ul>' if rest else "")


def _prose(text: str) -> str:
    """Escaped; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _by_day(result: BacktestResult, day: int) -> list[tuple[str, Mapping[str, Any]]]:
    """(model, pooled row) of one day ahead, in the models' order."""
    rows = {row["Model"]: row for row in result.pooled if int(row["Day"]) == day}
    return [(model, rows[model]) for model in result.models if model in rows]


def _scores(result: BacktestResult, focus: str) -> str:
    tables = []
    for day in range(1, result.horizon + 1):
        rows = _by_day(result, day)
        origins = max((as_float(row.get("Origins")) for _, row in rows), default=float("nan"))
        tables.append(score_table(f"{days_ahead(day)}, {formatted(origins, 0)} forecasts", rows, focus))
    hint = (
        "Bold marks the lowest of a column as printed; whether it is lower by more than chance is what the intervals "
        "and the p-values beside it say. Each column is explained when you rest on its head, and "
        '<a href="#reading">below</a>.'
    )
    return f'{"".join(tables)}<p class="hint">{hint}</p>'


def _relative_errors(result: BacktestResult, focus: str) -> str:
    models = [model for model in result.models if model != REFERENCE]
    if not models:
        return '<p class="empty">Only the last close was scored: its error relative to itself is 1.</p>'
    points = [
        [(model, [charts.Whisker.of(row, "Relative_MAE")]) for model, row in _by_day(result, day) if model in models]
        for day in range(1, result.horizon + 1)
    ]
    limits = charts.forest_limits([row for rows in points for row in rows], 1.0, 0.004)
    panels = []
    for day, rows in enumerate(points, start=1):
        texts = [f"{name_of(model)} {formatted(line[0].value, 4)}" for model, line in rows]
        label = f"{days_ahead(day)}, mean absolute error relative to the last close: {', '.join(texts)}"
        panels.append((days_ahead(day), charts.forest(rows, 1.0, limits, focus, f"error-{day}", label, decimals=4)))
    return charts.figures(
        panels,
        "Mean absolute error divided by that of the last close, with its 95% block-bootstrap interval. Left of the "
        "line is better than the random walk. A filled dot: the interval leaves 1 out. A hollow one: chance could "
        "have put it on either side.",
    )


def _calibration(result: BacktestResult, focus: str) -> str:
    panels = []
    for at, (key, share) in enumerate(zip(COVERAGE_KEYS, INTERVALS, strict=True)):
        nominal = 100.0 * share
        points: dict[str, list[charts.Whisker]] = {model: [] for model in result.models}
        for day in range(1, result.horizon + 1):
            for model, row in _by_day(result, day):
                value, inside = as_float(row.get(key)), result.daily.inside[model][:, day - 1, at]
                half = CHANCE * 100.0 * standard_error(inside, result.daily.counts, day)
                points[model].append(charts.Whisker(value, value - half, value + half))
        rows = list(points.items())
        texts = [f"{name_of(model)} {'/'.join(formatted(point.value, 1) for point in line)}" for model, line in rows]
        label = f"Coverage of the {nominal:.0f}% interval, percent, by day ahead: {'; '.join(texts)}"
        limits = charts.forest_limits(rows, nominal, 3.0)
        panels.append(
            (f"{nominal:.0f}% interval", charts.forest(rows, nominal, limits, focus, f"coverage-{at}", label))
        )
    legend = "".join(
        f'<li><i style="opacity:{charts.day_alpha(day, result.horizon):.2f}"></i>{escape(days_ahead(day))}</li>'
        for day in range(1, result.horizon + 1)
    )
    coverage = charts.figures(
        panels,
        "Percent of closes inside each interval; the line is what the interval promises. Right of it the intervals "
        "are too wide, left of it too narrow. Whiskers are 95% intervals that count all tickers of a day as one draw.",
        f'<ul class="legend">{legend}</ul>' if result.horizon > 1 else "",
    )
    return f"{coverage}<h3>Where in the forecast distribution closes fell</h3>{_pits(result, focus)}"


def _pits(result: BacktestResult, focus: str) -> str:
    edges = charts.pit_edges(result.levels)
    shares = np.diff(edges) / PIT_BINS  # what a perfect forecast puts between one quantile and the next
    heights, bands = {}, {}
    for model in result.models:
        counts = np.add.reduceat(np.asarray(result.pit[model], dtype=float)[0], edges[:-1])
        total = counts.sum() or math.nan
        heights[model] = counts / total / shares
        bands[model] = CHANCE * np.sqrt(shares * (1.0 - shares) / total * design_effect(result, model)) / shares
    limits = charts.line_limits({model: np.append(heights[model], 1.0 + bands[model]) for model in result.models}, 1.0)
    panels = []
    for model in result.models:
        top = 1.08 * max(limits[model][1], 1.4)
        picture = charts.pit_chart(edges, heights[model], bands[model], top, model == focus, model)
        panels.append((name_of(model) + limits[model][2], picture))
    return charts.figures(
        panels,
        "How many closes fell between one quantile of the one-day-ahead forecast and the next, from the lowest (left) "
        "to the highest, relative to what the forecast promised: a perfect one is flat at 1. A hump: intervals too "
        "wide. High ends: too narrow. A slope: the forecast leans. About one bar in twenty leaves the grey band by "
        "chance; it allows, roughly, for the tickers of a day moving together.",
        kind="small",
    )


def _over_time(result: BacktestResult, focus: str) -> str:
    days = len(result.daily.dates)
    window = next(size for most, size in ((750, 21), (2500, 63), (math.inf, 126)) if days <= most)
    window = min(window, max(1, days // 3))
    return _rolling_errors(result, focus, window) + _rolling_coverage(result, focus, window)


def _rolling_errors(result: BacktestResult, focus: str, window: int) -> str:
    """Each model's error over the last close's, over ``window`` days; nothing where only the last close was scored."""
    daily, counts = result.daily, np.asarray(result.daily.counts, dtype=float)
    means = {model: rolling(daily.abs_error_bp[model][:, 0], counts, window) for model in result.models}
    walk = means.pop(REFERENCE)
    if not means:
        return ""
    walk[walk == 0] = np.nan
    errors = {model: values / walk for model, values in means.items()}
    same = [model for model, values in errors.items() if charts.reach_of(values, 1.0) < 1e-9]
    drawn = {model: values for model, values in errors.items() if model not in same}
    names = "; ".join(escape(name_of(model)) for model in same)
    hint = f'<p class="hint">Not drawn, because their error is the last close\'s on every day: {names}.</p>'
    text = "<h3>Error</h3>" + (hint if same else "")
    if not drawn:
        return text
    limits = charts.line_limits(drawn, 1.0, 0.01)
    panels = []
    for model, values in drawn.items():
        label = f"{name_of(model)}: rolling error relative to the last close, {_range_in_words(values, 3)}"
        picture = charts.line_chart(
            daily.dates[window - 1 :], values, 1.0, limits[model], model == focus, f"rolling-{model}", label
        )
        panels.append((name_of(model) + limits[model][2], picture))
    return text + charts.figures(
        panels,
        f"Mean absolute error of the one-day-ahead forecasts over {_days_in_words(window)}, divided by that of the "
        "last close over the same days. Below the line is better than the random walk.",
    )


def _rolling_coverage(result: BacktestResult, focus: str, window: int) -> str:
    daily, counts = result.daily, np.asarray(result.daily.counts, dtype=float)
    shares = {model: 100.0 * rolling(daily.inside[model][:, 0, MIDDLE], counts, window) for model in result.models}
    limits = charts.line_limits(shares, 80.0, 5.0)
    panels = []
    for model, values in shares.items():
        label = f"{name_of(model)}: rolling coverage of the 80% interval, percent, {_range_in_words(values, 1)}"
        band = CHANCE * 100.0 * float(np.nanstd(daily.inside[model][:, 0, MIDDLE])) / math.sqrt(window)
        picture = charts.line_chart(
            daily.dates[window - 1 :], values, 80.0, limits[model], model == focus, f"share-{model}", label, band, 100.5
        )
        panels.append((name_of(model) + limits[model][2], picture))
    return "<h3>Coverage of the 80% interval</h3>" + charts.figures(
        panels,
        f"Percent of closes inside the one-day-ahead 80% interval over {_days_in_words(window)}, and the nominal line. "
        "The grey band holds 95% of what chance gives at any one time; a model whose line leaves it for long stretches "
        "misses calm and storm.",
    )


def _days_in_words(count: int) -> str:
    return "one day" if count == 1 else f"{count} days"


def _range_in_words(values: np.ndarray, decimals: int) -> str:
    known = values[np.isfinite(values)]
    if not known.size:
        return "no values"
    low, high, last = (formatted(value, decimals) for value in (known.min(), known.max(), known[-1]))
    return f"between {low} and {high}, at the end {last}"


def _fan(result: BacktestResult, focus: str) -> str:
    fan = result.fan
    came = fan.last_close * np.exp(fan.returns[:, 0])
    forecast = fan.last_close[:, None] * np.exp(fan.quantiles[focus][:, 0])
    inside = f"{int(inside_interval(came, forecast, result.levels, 0.80).sum())} of {len(came)}"
    label = (
        f"{fan.ticker}: closes from {iso_date(fan.targets[0, 0])} to {iso_date(fan.targets[-1, 0])} and the intervals "
        f"the {name_of(focus)} forecast the day before; {inside} closes inside the 80% interval"
    )
    shown = 1.0
    legend = []
    for _, _, alpha, name in BANDS:
        shown *= 1.0 - alpha  # wider bands lie below narrower ones
        legend.append(f'<li><i class="band" style="opacity:{1 - shown:.2f}"></i>{name} interval</li>')
    legend += [
        '<li><i class="median"></i>median forecast</li>',
        '<li><i class="came"></i>close that came</li>',
        '<li><i class="missed"></i>close outside 80%</li>',
    ]
    caption = (
        f"One-day-ahead intervals of the {name_of(focus)} and the closes that came: {inside} "
        f"inside the 80% interval. Each day's forecast was made at the close before it."
    )
    picture = charts.fan_chart(result, forecast, came, label)
    return (
        '<figure class="wide"><div class="scroll" role="region" aria-label="Intervals and closes" tabindex="0">'
        f"{picture}</div>"
        f'<ul class="legend">{"".join(legend)}</ul><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _worst(result: BacktestResult, focus: str) -> str:
    tables = {model: worst_table(model, result.worst.get(model, ())) for model in result.models}
    hint = '<p class="hint">By one-day quantile loss. All returns are log returns in basis points.</p>'
    return f"{tables[focus]}{hint}{_folded(tables, focus)}"


def _tickers(result: BacktestResult, focus: str) -> str:
    tables = {model: ticker_table(result, model) for model in result.models}
    return tables[focus] + _folded(tables, focus)


def _folded(tables: Mapping[str, str], focus: str) -> str:
    """The tables of all models but one, each to be opened by the reader."""
    return "".join(
        f"<details><summary>{escape(name_of(model))}</summary>{table}</details>"
        for model, table in tables.items()
        if model != focus
    )
