"""The tables of the backtest's page: scores by model, by ticker, the worst days, and what their columns mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from stocklora.backtest.report.style import DASH, as_float, formatted, iso_date, name_of, p_value
from stocklora.backtest.results import INTERVALS, REFERENCE, BacktestResult, WorstDay

MOST_TICKERS = 50
MOST_WORST = 10
COVERAGE_KEYS = tuple(f"Coverage_{100 * share:.0f}" for share in INTERVALS)


# --- columns of the tables -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column of scores: what it shows, a second line below it, and what it means in plain words."""

    key: str
    head: str
    kind: str  # price, ratio, percent, bp, p or count
    meaning: str
    under: tuple[str, ...] = ()  # keys of the second line: one value, or the two ends of an interval
    under_head: str = ""
    marks_best: bool = False

    def cells(self, rows: _Rows, keys: Sequence[str]) -> list[str]:
        """One line of each row's cell; two keys are the ends of an interval."""
        values = [[row.get(key) for key in keys] for row in rows]
        decimals = {"ratio": 4, "percent": 1, "bp": 2, "count": 0}.get(self.kind)
        if decimals is None:
            decimals = _price_decimals(value for row in values for value in row)
        show: Callable[[Any], str] = p_value if self.kind == "p" else lambda value: formatted(value, decimals)
        lines = [[show(value) for value in row] for row in values]
        return [DASH if DASH in line else DASH.join(line) for line in lines]


GROUPS: tuple[tuple[str, tuple[_Column, ...]], ...] = (
    ("Point forecast", (
        _Column("MAE", "MAE", "price", "Mean absolute error of the forecast close, in the currency of the prices. Over "
                "several tickers the expensive ones weigh most.", marks_best=True),
        _Column("RMSE", "RMSE", "price", "Root of the mean squared error of the close, in the currency: few large "
                "misses weigh more than many small ones.", marks_best=True),
        _Column("MAPE", "MAPE %", "price", "Mean absolute error in percent of the close that came: comparable between "
                "tickers.", marks_best=True),
        _Column("MASE", "MASE", "price", "Mean absolute error divided by the mean change of the close over as many "
                "days in the training part (Hyndman and Koehler, 2006). Above 1 can mean no more than that the test "
                "days were wilder.", marks_best=True),
        _Column("Relative_MAE", "Relative MAE", "ratio", "The model's mean absolute error of the log return divided by "
                "that of the last close on the same days: below 1 is better than a random walk. The interval is where "
                "it falls in 95 of 100 redraws of blocks of days (Politis and Romano, 1992).",
                ("Relative_MAE_Low", "Relative_MAE_High"), "95% interval"),
        _Column("DM_p", "DM p", "p", "Chance of a difference in absolute error from the last close at least this "
                "large, either way, if both were equally good (Diebold and Mariano, 1995). A date counts once, "
                "however many tickers it has. Small: corrected for the number of tickers (Holm, 1979).",
                ("DM_p_Holm",), "Holm"),
    )),
    ("Direction", (
        _Column("Direction", "Right %", "percent", "How often the sign of the change was right; days without a move "
                "are left out. Small: what always saying the more frequent sign would have got.",
                ("Direction_Majority",), "majority"),
        _Column("PT_p", "PT p", "p", "Chance of as many right signs if forecast and outcome had nothing to do with "
                "each other (Pesaran and Timmermann, 1992)."),
    )),
    ("Whole distribution", (
        _Column("Pinball_bp", "Pinball bp", "bp", "Mean quantile loss of the log return over all quantiles, in basis "
                "points (Koenker and Bassett, 1978): rewards intervals that are narrow and hold.", marks_best=True),
        _Column("Relative_Pinball", "Relative pinball", "ratio", "Quantile loss divided by that of the last close with "
                "EWMA volatility, the harder opponent (by the plain last close's where EWMA was not asked for)."),
        _Column("DM_Pinball_p", "DM p", "p", "As the DM p of the point forecast, for the quantile loss against the "
                "opponent of the relative pinball.", ("DM_Pinball_p_Holm",), "Holm"),
        _Column("CRPS_bp", "CRPS bp", "bp", "Continuous ranked probability score of the log return in basis points: "
                "the absolute error of a whole distribution, here from its quantiles (Gneiting and Ranjan, 2011).",
                marks_best=True),
    )),
    ("Coverage, %", (
        *(_Column(key, f"{100 * share:.0f}%", "percent", f"Percent of closes inside the {100 * share:.0f}% interval: "
                  f"{100 * share:.0f} is right, more is too wide, less too narrow.")
          for key, share in zip(COVERAGE_KEYS, INTERVALS, strict=True)),
    )),
)  # fmt: skip
_ORIGINS = _Column("Origins", "Days", "count", "Days at whose close a forecast was made.")
_TICKER_KEYS = (
    "MAE", "Relative_MAE", "DM_p", "Direction", "PT_p", "Pinball_bp", "Relative_Pinball", "DM_Pinball_p", "Coverage_80",
)  # fmt: skip


_Groups = Sequence[tuple[str, Sequence[_Column]]]
_Rows = Sequence[Mapping[str, Any]]


def _speaks(column: _Column, rows: _Rows) -> bool:
    """Whether the second line of a column holds any number."""
    return any(not math.isnan(as_float(row.get(key))) for row in rows for key in column.under)


def _score_head(groups: _Groups, rows: _Rows, first: str) -> str:
    top = "".join(f'<th scope="colgroup" colspan="{len(columns)}">{escape(name)}</th>' for name, columns in groups)
    cells = "".join(
        f'<th scope="col"{_first(index)}><abbr title="{escape(column.meaning)}">{escape(column.head)}</abbr>'
        + (f"<small>{escape(column.under_head)}</small>" if _speaks(column, rows) else "")
        + "</th>"
        for _, columns in groups
        for index, column in enumerate(columns)
    )
    spans = "".join(f'<colgroup span="{len(columns)}"></colgroup>' for _, columns in groups)
    corner = f'<th scope="col" rowspan="2">{escape(first)}</th>'
    return f"<colgroup></colgroup>{spans}<thead><tr>{corner}{top}</tr><tr>{cells}</tr></thead>"


def _first(index: int) -> str:
    """Room before each group of columns."""
    return _class("first" if index == 0 else "")


def _score_rows(groups: _Groups, rows: _Rows, mark_best: bool) -> list[str]:
    """The cells of each row, without the row's head."""
    lines = [""] * len(rows)
    for _, columns in groups:
        for index, column in enumerate(columns):
            values = column.cells(rows, [column.key])
            under = column.cells(rows, column.under) if _speaks(column, rows) else []
            best = _best(rows, column.key, values) if mark_best and column.marks_best else set()
            for at, value in enumerate(values):
                text = f"<b>{escape(value)}</b>" if at in best else escape(value)
                # no second dash below a dash, no interval that is a point
                silent = not under or under[at] == f"{value}{DASH}{value}" or {value, under[at]} == {DASH}
                small = "" if silent else f"<small>{escape(under[at])}</small>"
                lines[at] += f"<td{_first(index)}>{text}{small}</td>"
    return lines


def _best(rows: _Rows, key: str, shown: Sequence[str]) -> set[int]:
    """Rows with the lowest value as it is printed; none where all look the same."""
    values = np.array([as_float(row.get(key)) for row in rows])
    if np.isfinite(values).sum() < 2:
        return set()
    lowest = shown[int(np.nanargmin(values))]
    best = {at for at, text in enumerate(shown) if text == lowest}
    return best if len(best) < np.isfinite(values).sum() else set()


def _table(caption: str, head: str, rows: str, kind: str) -> str:
    """A table in a box that scrolls sideways where the screen is too narrow (and so can be reached by keyboard)."""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table class="{kind}">'
        f"<caption><span>{escape(caption)}</span></caption>{head}<tbody>{rows}</tbody></table></div>\n"
    )


def _price_decimals(values: Iterable[Any]) -> int:
    """As many as give the smallest of a column four digits, so that all stand on one decimal point."""
    sizes = [abs(as_float(value)) for value in values]
    sizes = [size for size in sizes if size > 0]
    return min(max(3 - math.floor(math.log10(min(sizes))), 0), 6) if sizes else 2


def score_table(caption: str, rows: Sequence[tuple[str, Mapping[str, Any]]], focus: str) -> str:
    """Every column of scores, a row a model, the lowest errors in bold.

    Args:
        rows: (model, its row of metrics.csv) in order.
        focus: the model whose row stands out.
    """
    numbers = [row for _, row in rows]
    body = ""
    for (model, _), line in zip(rows, _score_rows(GROUPS, numbers, mark_best=True), strict=True):
        kind = _class("reference" if model == REFERENCE else "focus" if model == focus else "")
        body += f'<tr{kind}><th scope="row">{escape(name_of(model))}</th>{line}</tr>'
    return _table(caption, _score_head(GROUPS, numbers, "Forecast"), body, "scores")


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


_WORST_HEAD = "".join(
    f'<th scope="col"><abbr title="{escape(meaning)}">{head}</abbr></th>' if meaning else f'<th scope="col">{head}</th>'
    for head, meaning in (
        ("Ticker", ""),
        ("Close of", "The day whose close was forecast."),
        ("Forecast at", "The day at whose close the forecast was made."),
        ("5%", "Lower end of the 90% interval of the one-day log return, basis points."),
        ("Median", "Median forecast of the one-day log return, basis points."),
        ("95%", "Upper end of the 90% interval of the one-day log return, basis points."),
        ("Came", "The log return that came, basis points."),
        ("Outside by", "How far beyond the 90% interval the return fell, basis points."),
        ("Pinball", "Quantile loss of that forecast, basis points."),
    )
)


def worst_table(model: str, days: Sequence[WorstDay]) -> str:
    """A model's worst days, worst first."""
    if not days:
        return '<p class="empty">No days to show.</p>'
    rows = []
    for day in days[:MOST_WORST]:
        low, median, high = day.forecast_bp
        beyond = max(low - day.came_bp, day.came_bp - high, 0.0)
        numbers = (low, median, high, day.came_bp, beyond if beyond > 0 else float("nan"))
        cells = "".join(f"<td>{formatted(value, 0)}</td>" for value in numbers)
        rows.append(
            f'<tr><th scope="row">{escape(day.ticker)}</th><td>{iso_date(day.date)}</td><td>{iso_date(day.origin)}</td>'
            f"{cells}<td>{formatted(day.pinball_bp, 1)}</td></tr>"
        )
    caption = f"{len(rows)} worst days of the forecast: {name_of(model)}"
    return _table(caption, f"<thead><tr>{_WORST_HEAD}</tr></thead>", "".join(rows), "worst")


def ticker_table(result: BacktestResult, model: str) -> str:
    """A model's scores one day ahead, ticker by ticker, and in how many it did better than the last close."""
    rows = [row for row in result.by_ticker if row["Model"] == model and int(row["Day"]) == 1]
    if not rows:
        return '<p class="empty">No rows to show.</p>'
    rows.sort(key=lambda row: (math.isnan(as_float(row.get("Relative_MAE"))), as_float(row.get("Relative_MAE"))))
    ratios = np.array([as_float(row.get("Relative_MAE")) for row in rows])
    p_values = np.array([as_float(row.get("DM_p_Holm")) for row in rows])
    total = len(rows)
    summary = ""
    if model != REFERENCE:
        clear = p_values < 0.05
        summary = (
            f"Lower error than the last close in {int((ratios < 1).sum()):,} of {total:,} tickers. By more than chance "
            f"(Holm's correction for their number, 5%): lower in {int((clear & (ratios < 1)).sum()):,}, higher in "
            f"{int((clear & (ratios > 1)).sum()):,}. "
        )
    groups = [("Sample", (_ORIGINS,))] + [
        (name, tuple(column for column in columns if column.key in _TICKER_KEYS)) for name, columns in GROUPS
    ]
    left_out = total - MOST_TICKERS
    half = MOST_TICKERS // 2
    if left_out > 0:
        # Both ends: the lowest alone would flatter the model.
        rows = rows[:half] + rows[-(MOST_TICKERS - half) :]
        summary += (
            f"Shown are the {half} lowest and the {MOST_TICKERS - half} highest of {total:,} relative errors; all "
            "tickers and days ahead are in metrics.csv."
        )
    else:
        summary += "All days ahead are in metrics.csv."
    cells = _score_rows(groups, rows, mark_best=False)  # rows are tickers, not rivals
    lines = [
        f'<tr><th scope="row">{escape(str(row["Ticker"]))}</th>{line}</tr>'
        for row, line in zip(rows, cells, strict=True)
    ]
    if left_out > 0:
        width = 1 + sum(len(columns) for _, columns in groups)
        lines.insert(half, f'<tr class="gap"><td colspan="{width}">{left_out:,} more in metrics.csv</td></tr>')
    caption = f"{name_of(model)}, one day ahead, by relative error"
    return f"<p>{escape(summary)}</p>{_table(caption, _score_head(groups, rows, 'Ticker'), ''.join(lines), 'scores')}"


def reading_guide() -> str:
    """The columns once more in plain words, for screens without a pointer and for paper, and the sources."""
    terms = "".join(
        f"<div><dt>{escape(column.head)}{f' ({escape(name.lower())})' if column.head == 'DM p' else ''}</dt>"
        f"<dd>{escape(column.meaning)}</dd></div>"
        for name, columns in GROUPS
        for column in columns
        if not column.key.startswith("Coverage")
    )
    coverage = (
        "<div><dt>Coverage</dt><dd>Percent of closes inside an interval. A 50% interval should hold half of them, "
        "neither fewer nor more.</dd></div>"
    )
    sources = "".join(f"<li>{escape(source)}</li>" for source in _SOURCES)
    return (
        "<p>The last close is the yardstick: of the forecasts one can make from daily prices alone, saying that "
        "tomorrow closes where today did is very hard to beat. A relative error between 0.99 and 1.01 is an honest "
        "result; one far below 1 is first of all a reason to look for a leak of the future into the past. A model "
        "may add nothing to the point forecast and still be worth having, if its intervals are narrower and hold; "
        "that is what the quantile loss measures.</p>"
        f'<dl class="terms">{terms}{coverage}</dl><h3>Sources</h3><ul class="sources">{sources}</ul>'
    )


_SOURCES = (
    "Diebold and Mariano, Comparing predictive accuracy, Journal of Business & Economic Statistics 13, 1995; small "
    "samples after Harvey, Leybourne and Newbold, International Journal of Forecasting 13, 1997.",
    "Diebold, Gunther and Tay, Evaluating density forecasts, International Economic Review 39, 1998: the histogram of "
    "the probability integral transform.",
    "Gneiting and Ranjan, Comparing density forecasts using threshold- and quantile-weighted scoring rules, Journal of "
    "Business & Economic Statistics 29, 2011.",
    "Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.",
    "Hyndman and Koehler, Another look at measures of forecast accuracy, International Journal of Forecasting 22, "
    "2006.",
    "Koenker and Bassett, Regression quantiles, Econometrica 46, 1978.",
    "Pesaran and Timmermann, A simple nonparametric test of predictive performance, Journal of Business & Economic "
    "Statistics 10, 1992; over several tickers and days ahead with the standard errors of Driscoll and Kraay, Review "
    "of Economics and Statistics 80, 1998.",
    "Politis and Romano, A circular block-resampling procedure for stationary data, in LePage and Billard, Exploring "
    "the Limits of Bootstrap, 1992; block length after Politis and White, Econometric Reviews 23, 2004.",
)
