"""The backtest's page: complete, valid, self-contained, safe with any text, and the same for the same result."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stocklora.backtest.report.page import (
    focus_of,
    report_html,
    write_report,
)
from stocklora.backtest.report.style import NAMES
from stocklora.backtest.results import (
    ALL_TICKERS,
    INTERVALS,
    METRIC_COLUMNS,
    PIT_BINS,
    REFERENCE,
    BacktestResult,
    DailySeries,
    TickerForecasts,
    WorstDay,
    design_effect,
    standard_error,
)
from stocklora.cli.console import UserError
from stocklora.metrics.scores import BASIS_POINTS, QUANTILE_LEVELS, coverage, pinball_loss

LEVELS = np.array(QUANTILE_LEVELS)
MIDDLE = len(LEVELS) // 2
MODELS = ("naive", "drift", "ewma", "har", "llm")
SECTIONS = ("verdict", "scores", "error", "calibration", "time", "fan", "worst", "tickers", "reading")
VOID = {"meta", "br", "hr", "img", "input", "link", "col", "wbr", "source", "area", "base", "embed", "track"}


# --- a result from simulated forecasts ---------------------------------------------------------------------------


def forecasts(ticker: str, models: tuple[str, ...], days: int, horizon: int, seed: int) -> TickerForecasts:
    """A ticker whose volatility wanders and whose days share a common shock with every other ticker's.

    Models know the volatility as well as their name says: ``naive`` and ``drift`` its average, ``har`` and ``llm``
    all of it; ``simple`` is far off, as a model of price levels is.
    """
    market, own = np.random.default_rng(0), np.random.default_rng(seed)
    length = days + horizon
    logs = 0.2 * market.standard_normal(length)
    own_logs = 0.1 * own.standard_normal(length)
    for at in range(1, length):
        logs[at] += 0.97 * logs[at - 1]
        own_logs[at] += 0.95 * own_logs[at - 1]
    volatility = 0.013 * np.exp(0.5 * logs + own_logs - 0.2)
    shocks = math.sqrt(0.4) * market.standard_t(6, length) + math.sqrt(0.6) * own.standard_t(6, length)
    daily = volatility * shocks / math.sqrt(1.5) + 3e-4
    close = (20.0 + 40.0 * (seed % 5)) * np.exp(np.cumsum(daily))
    dates = np.busday_offset("2021-01-04", np.arange(length), roll="forward")
    at = np.arange(days)
    returns = np.stack([np.log(close[at + h] / close[at]) for h in range(1, horizon + 1)], axis=1)
    steps = np.sqrt(np.arange(1, horizon + 1))
    normal = stats.norm.ppf(LEVELS)
    known = volatility[at + 1][:, None] * steps
    average = np.full((days, 1), volatility.mean()) * steps
    quantiles = {}
    for number, model in enumerate(models):
        noise = np.exp(0.25 * np.random.default_rng(1000 + number).standard_normal((days, 1)))
        scale = {"naive": average, "drift": average, "har": known, "llm": known}.get(model, known * noise)
        shift = np.zeros((days, horizon))
        if model == "drift":
            shift += 3e-4 * steps**2
        elif model == "llm":
            shift += 0.008 * returns + 0.05 * known * own.standard_normal((days, horizon))
        elif model == "simple":
            shift += 0.15 * own.standard_normal((days, horizon)) + 0.1
        elif model.startswith("auto"):
            shift += 0.15 * known * own.standard_normal((days, horizon))
        quantiles[model] = shift[..., None] + scale[..., None] * normal
    targets = np.stack([dates[at + h] for h in range(1, horizon + 1)], axis=1)
    naive_mae = np.abs(np.diff(close[:200])).mean() * steps
    return TickerForecasts(ticker, dates[:days], targets, close[at], returns, quantiles, naive_mae)


def p_of_difference(differences: np.ndarray) -> float:
    """Two-sided p of a mean over days, normal, days taken as independent."""
    spread = differences.std() / math.sqrt(len(differences))
    return float(2.0 * stats.norm.sf(abs(differences.mean()) / spread)) if spread > 0 else float("nan")


def metric_row(model: str, ticker: str, day: int, parts: list[TickerForecasts]) -> dict[str, Any]:
    """A row of metrics.csv; intervals and p-values by the simplest formula that gives plausible ones."""
    h = day - 1
    last = np.concatenate([part.last_close for part in parts])
    came = np.concatenate([part.returns[:, h] for part in parts])
    known = {
        name: np.concatenate([part.quantiles[name][:, h] for part in parts]) for name in {model, REFERENCE, "ewma"}
        if name in parts[0].quantiles
    }  # fmt: skip
    close = last * np.exp(came)
    errors = {name: np.abs(last * np.exp(table[:, MIDDLE]) - close) for name, table in known.items()}
    losses = {name: BASIS_POINTS * pinball_loss(came, table, LEVELS) for name, table in known.items()}
    error, median = errors[model], known[model][:, MIDDLE]
    days = len(parts[0].origins)
    per_day = {name: values.reshape(len(parts), days).mean(axis=0) for name, values in errors.items()}
    ratio = error.mean() / errors[REFERENCE].mean()
    half = 1.96 * (per_day[model] - ratio * per_day[REFERENCE]).std() / math.sqrt(days) / errors[REFERENCE].mean()
    is_flat = bool(np.all(np.abs(median) < 1e-12))
    right = 100.0 * float((np.sign(median) == np.sign(came)).mean())
    is_reference = model == REFERENCE
    p, p_loss = p_of_difference(per_day[model] - per_day[REFERENCE]), float("nan")
    if "ewma" in losses:
        p_loss = p_of_difference((losses[model] - losses["ewma"]).reshape(len(parts), days).mean(axis=0))
    nan = float("nan")
    row = {
        "Model": model, "Ticker": ticker, "Day": day, "Origins": len(last),
        "MAE": error.mean(), "RMSE": math.sqrt((error**2).mean()), "MAPE": 100.0 * (error / close).mean(),
        "MASE": float(np.mean([error.mean() / part.naive_mae[h] for part in parts])),
        "MAE_bp": BASIS_POINTS * np.abs(median - came).mean(),
        "Relative_MAE": ratio, "Relative_MAE_Low": 1.0 if is_reference else ratio - half,
        "Relative_MAE_High": 1.0 if is_reference else ratio + half,
        "Direction": nan if is_flat else right, "Direction_Majority": 100.0 * max((came > 0).mean(), (came < 0).mean()),
        "PT_p": nan if is_flat else float(stats.norm.sf((right - 50.0) / 50.0 * math.sqrt(len(last)))),
        "Pinball_bp": losses[model].mean(), "Relative_Pinball": losses[model].mean() / losses[REFERENCE].mean(),
        "CRPS_bp": 2.0 * losses[model].mean(),
        **{f"Coverage_{100 * share:.0f}": coverage(came, known[model], LEVELS, share) for share in INTERVALS},
        "DM": nan if is_reference else -1.0, "DM_p": nan if is_reference else p,
        "DM_p_Holm": nan if is_reference or ticker == ALL_TICKERS else min(4 * p, 1.0),
        "DM_Pinball": nan if model == "ewma" else 1.0, "DM_Pinball_p": nan if model == "ewma" else p_loss,
        "DM_Pinball_p_Holm": nan if model == "ewma" or ticker == ALL_TICKERS else min(4 * p_loss, 1.0),
    }  # fmt: skip
    assert tuple(row) == METRIC_COLUMNS
    return row


def simulated(
    models: tuple[str, ...] = MODELS, tickers: int = 5, days: int = 400, horizon: int = 3, **changes: Any
) -> BacktestResult:
    """What a backtest of simulated prices hands on."""
    names = [f"TICK{number}" for number in range(tickers)]
    parts = [forecasts(name, models, days, horizon, seed) for seed, name in enumerate(names, start=1)]
    ahead = range(1, horizon + 1)
    returns = np.stack([part.returns for part in parts])  # (tickers, days, horizon)
    tables = {model: np.stack([part.quantiles[model] for part in parts]) for model in models}
    ends = [(int(np.argmin(abs(LEVELS - (1 - s) / 2))), int(np.argmin(abs(LEVELS - (1 + s) / 2)))) for s in INTERVALS]
    inside, pit, losses, worst = {}, {}, {}, {}
    for model, table in tables.items():
        hits = [(returns >= table[..., low]) & (returns <= table[..., high]) for low, high in ends]
        inside[model] = np.stack(hits, axis=-1).mean(axis=0)
        place = stats.norm.cdf(
            (returns - table[..., MIDDLE]) / (table[..., -1] - table[..., MIDDLE]) * stats.norm.ppf(LEVELS[-1])
        )
        pit[model] = np.stack([np.histogram(place[..., h], PIT_BINS, (0, 1))[0] for h in range(horizon)])
        losses[model] = BASIS_POINTS * pinball_loss(returns, table, LEVELS)
        order = np.argsort(-losses[model][..., 0], axis=None, kind="stable")[:10]
        worst[model] = []
        for which, day in zip(*np.unravel_index(order, (tickers, days)), strict=True):
            low, median, high = (BASIS_POINTS * float(table[which, day, 0, at]) for at in (0, MIDDLE, -1))
            part = parts[which]
            came = BASIS_POINTS * float(part.returns[day, 0])
            loss = float(losses[model][which, day, 0])
            dates = (part.origins[day], part.targets[day, 0])
            worst[model].append(WorstDay(part.ticker, *dates, (low, median, high), came, loss))
    daily = DailySeries(
        parts[0].origins,
        np.full(days, tickers),
        {model: BASIS_POINTS * np.abs(table[..., MIDDLE] - returns).mean(axis=0) for model, table in tables.items()},
        inside,
    )
    last = slice(max(0, days - 60), None)
    shown = parts[0]
    fan = TickerForecasts(
        shown.ticker, shown.origins[last], shown.targets[last], shown.last_close[last], shown.returns[last],
        {model: table[last] for model, table in shown.quantiles.items()}, shown.naive_mae,
    )  # fmt: skip
    result = BacktestResult(
        models=models,
        tickers=names,
        horizon=horizon,
        levels=LEVELS,
        pooled=[metric_row(model, ALL_TICKERS, day, parts) for model in models for day in ahead],
        by_ticker=[metric_row(model, part.ticker, day, [part]) for model in models for part in parts for day in ahead],
        daily=daily,
        pit=pit,
        fan=fan,
        worst=worst,
        verdicts=[
            f"{model}: at 1 to {horizon} days ahead it is not distinguishable from the last close (MAE 0.998 of it, "
            "95% interval 0.991 to 1.005); its direction is no better than always guessing up; its 80% interval "
            "covers 81.4%: about right."
            for model in models
            if model != REFERENCE
        ],
        facts=(
            ("Prices", "sample.csv, adjusted closes"),
            ("Test days", f"{days}, after 1,500 training and 250 validation days"),
            ("Model", "checkpoints/best_lora_weights.pth"),
            ("Base model", "SmolLM2-135M, LoRA rank 8, 2.4 M trainable parameters"),
            ("Scale", "HAR-range"),
            ("Seed", "42"),
        ),
        notes=("12 of the test days lie in the training part of the model; their scores flatter it.",),
    )
    return replace(result, **changes)


@pytest.fixture(scope="module")
def result() -> BacktestResult:
    return simulated()


@pytest.fixture(scope="module")
def page(result: BacktestResult) -> str:
    return report_html(result)


# --- reading the page --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are balanced and keeps what tests ask about.

    Attributes:
        text: section id -> its visible text (SVG text included); "" is what stands before the first section.
        tables: section id -> tables as rows of (tag, text) cells.
        tags: (tag, attributes) in order.
    """

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.section = ""
        self.text: dict[str, str] = {"": ""}
        self.tables: dict[str, list[list[list[tuple[str, str]]]]] = {}
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, found))
        if tag == "section":
            self.section = found["id"]
            self.text[self.section] = ""
            self.tables[self.section] = []
        elif tag == "table":
            self.tables[self.section].append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in {"td", "th"}:
            self.tables[self.section][-1][-1].append((tag, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID or "svg" in self.open, f"<{tag}/> outside an SVG is an open tag"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text[self.section] += data
        if {"td", "th"} & set(self.open):
            tag, so_far = self.tables[self.section][-1][-1][-1]
            # the second line of a cell is told apart by a bar
            self.tables[self.section][-1][-1][-1] = (tag, so_far + ("|" if "small" in self.open else "") + data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def rows(self, section: str, table: int = 0) -> dict[str, list[str]]:
        """head of a body row -> its cells."""
        return {
            row[0][1]: [text for _, text in row[1:]]
            for row in self.tables[section][table]
            if row and row[0][0] == "th" and all(tag == "td" for tag, _ in row[1:]) and len(row) > 1
        }


def number(text: str) -> float:
    return float(text.replace(",", "").replace("\N{MINUS SIGN}", "-"))


def label_of(page: Page, start: str) -> str:
    found = [tag["aria-label"] for tag in page.of("svg") if tag["aria-label"].startswith(start)]
    assert len(found) == 1, f"{len(found)} charts {start!r}"
    return found[0]


# --- the whole page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["usual", "only the last close", "two days", "one date"])
def test_page_is_well_formed_whole_and_labelled(case: str, page: str) -> None:
    if case == "only the last close":
        page = report_html(simulated(("naive",), 1, 40, 1, notes=(), facts=()))
    elif case == "two days":
        page = report_html(simulated(("naive", "simple"), 2, 2))
    elif case == "one date":
        page = report_html(simulated(("naive", "llm"), 1, 1))
    read = Page(page)
    assert page.startswith("<!DOCTYPE html>\n")
    assert read.of("html") == [{"lang": "en"}]
    assert len(read.of("title")) == len(read.of("h1")) == len(read.of("main")) == 1
    assert {"charset": "utf-8"} in read.of("meta")
    assert any(tag.get("name") == "viewport" for tag in read.of("meta"))
    assert tuple(read.text)[1:] == SECTIONS
    assert all(text.strip() for key, text in read.text.items() if key)
    identifiers = [tag["id"] for _, tag in read.tags if "id" in tag]
    assert not [name for name, count in Counter(identifiers).items() if count > 1]
    for attributes in read.of("svg"):
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
        assert "width" not in attributes  # scales with the screen
    for attributes in read.of("section"):
        assert attributes["aria-labelledby"] in identifiers
    for attributes in read.of("th"):
        assert attributes["scope"] in {"col", "row", "colgroup"}
    for table in [table for tables in read.tables.values() for table in tables]:
        assert table[-1][0][0] == "th"


def test_page_loads_nothing_and_its_references_resolve(page: str) -> None:
    read = Page(page)
    assert "http" not in page
    assert not re.search(r"@import|javascript:|\bon\w+=", page)
    assert not {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    assert not [tag for tag, attributes in read.tags if "src" in attributes or "srcset" in attributes]
    identifiers = {tag["id"] for _, tag in read.tags if "id" in tag}
    targets = [attributes["href"] for _, attributes in read.tags if "href" in attributes]
    targets += re.findall(r"url\(([^)]*)\)", page)
    assert len(targets) > 50
    for target in targets:
        assert target[0] == "#"
        assert target[1:] in identifiers


def test_what_the_reader_must_know_comes_first(result: BacktestResult) -> None:
    notes = ("the prices end in a split; see `quality`", "second note")
    page = report_html(replace(result, notes=notes))
    order = ["<h1>", "SmolLM2-135M, LoRA rank 8", "second note", 'id="verdict"', "<table"]
    places = [page.index(piece) for piece in order]
    assert places == sorted(places)
    assert "<code>quality</code>" in page
    read = Page(page)
    assert any(tag.get("role") == "note" for tag in read.of("div"))
    for name, text in result.facts:
        assert name in read.text[""]
        assert text in read.text[""]
    assert "2,000 forecasts of each model" in read.text[""]
    assert "2021-01-04 to 2022-07-15" in read.text[""]
    assert "1 to 3 days ahead" in read.text[""]


def test_every_verdict_is_told_the_language_models_first(page: str) -> None:
    told = Page(page).text["verdict"]
    starts = [told.index(NAMES[model]) for model in ("llm", "drift", "ewma", "har")]
    assert starts == sorted(starts)
    for piece in ("not distinguishable from the last close", "no better than always guessing up", "covers 81.4%"):
        assert told.count(piece) == 4
    assert "llm" not in told


def test_verdicts_that_match_no_model_are_told_as_they_are(tiny: BacktestResult) -> None:
    told = Page(report_html(replace(tiny, verdicts=("Nothing beats the last close; not one model.",)))).text
    assert "Nothing beats the last close; not one model." in told["verdict"]


def test_focus_is_the_language_model_or_the_last() -> None:
    assert focus_of(("naive", "llm", "har")) == "llm"
    assert focus_of(("naive", "drift", "har")) == "har"
    assert focus_of(("naive",)) == "naive"


# --- tables ------------------------------------------------------------------------------------------------------


def test_scores_show_the_pooled_rows(result: BacktestResult, page: str) -> None:
    read = Page(page)
    keys = (
        "MAE", "RMSE", "MAPE", "MASE", "Relative_MAE", "DM_p", "Direction", "PT_p", "Pinball_bp", "Relative_Pinball",
        "DM_Pinball_p", "CRPS_bp", "Coverage_50", "Coverage_80", "Coverage_90",
    )  # fmt: skip
    assert len(read.tables["scores"]) == result.horizon
    checked = 0
    for row in result.pooled:
        cells = read.rows("scores", row["Day"] - 1)[NAMES[row["Model"]]]
        assert len(cells) == len(keys)
        for key, cell in zip(keys, cells, strict=True):
            shown = cell.split("|")[0]
            if math.isnan(row[key]):
                assert shown == "–"
            elif shown == "<0.001":
                assert key.endswith("_p")
                assert row[key] < 0.0005
            else:
                decimals = len(shown.partition(".")[2])
                assert number(shown) == pytest.approx(row[key], abs=0.501 * 10.0**-decimals)
                # A difference of a thousandth must be seen: four digits of an error.
                assert not key.startswith(("M", "R")) or sum(map(str.isdigit, shown.lstrip("0."))) >= 4
                checked += 1
        if row["Model"] == "llm":
            low, high = map(number, cells[4].split("|")[1].split("–"))
            assert low == pytest.approx(row["Relative_MAE_Low"], abs=5.1e-5)
            assert high == pytest.approx(row["Relative_MAE_High"], abs=5.1e-5)
            assert number(cells[6].split("|")[1]) == pytest.approx(row["Direction_Majority"], abs=0.051)
            assert "|" not in cells[5]  # pooled rows are not adjusted: no second line
    assert checked > 150


def test_lowest_errors_are_marked_and_ties_of_all_are_not(result: BacktestResult) -> None:
    def with_errors(errors: dict[str, float]) -> str:
        rows = [{**row, "MAE": errors[row["Model"]], "RMSE": 2.0} for row in result.pooled]
        return report_html(replace(result, pooled=rows)).split('id="error"')[0]

    marked = with_errors({"naive": 1.5, "drift": 1.25, "ewma": 1.5, "har": 1.25, "llm": float("nan")})
    assert marked.count("<b>1.250</b>") == 2 * result.horizon  # both that share the lowest
    assert "<b>1.500</b>" not in marked
    assert "<b>2.000</b>" not in marked
    for row in result.pooled:  # only errors compete, not what is relative to the last close or a share
        assert f"<b>{row['Relative_MAE']:.4f}" not in marked
        assert f"<b>{row['Coverage_80']:.1f}" not in marked


def test_every_column_is_explained_in_its_head_and_below(page: str) -> None:
    read = Page(page)
    heads = {tag["title"] for tag in read.of("abbr")}
    assert len(heads) >= 15
    for term in ("MAE", "RMSE", "MAPE %", "MASE", "Relative MAE", "PT p", "Pinball bp", "CRPS bp", "Coverage"):
        assert term in read.text["reading"]
    for source in ("Diebold and Mariano", "Pesaran and Timmermann", "Hyndman and Koehler", "Holm", "Koenker"):
        assert source in read.text["reading"].split("Sources")[1]


def test_missing_numbers_are_dashes(result: BacktestResult) -> None:
    nan = float("nan")
    blank = dict.fromkeys(METRIC_COLUMNS[3:], nan)
    pooled = [{**row, **(blank if row["Model"] == "drift" else {})} for row in result.pooled]
    by_ticker = [{**row, **dict.fromkeys(METRIC_COLUMNS[4:], None)} for row in result.by_ticker]
    worst = {**result.worst, "llm": [replace(result.worst["llm"][0], forecast_bp=(nan, nan, nan), pinball_bp=nan)]}
    read = Page(report_html(replace(result, pooled=pooled, by_ticker=by_ticker, worst=worst)))
    assert set(read.rows("scores")[NAMES["drift"]]) == {"–"}
    assert set(read.rows("tickers")["TICK0"][1:]) == {"–"}
    assert read.rows("worst")[result.worst["llm"][0].ticker][2:5] == ["–"] * 3
    for text in read.text.values():
        assert not re.search(r"\b(nan|None|inf)\b", text)
    assert not [tag for tag in read.of("svg") if "nan" in tag["aria-label"]]


def test_worst_days_in_order_with_what_came(result: BacktestResult, page: str) -> None:
    read = Page(page)
    body = [row for row in read.tables["worst"][0] if row[0][0] == "th" and row[1][0] == "td"]
    days = result.worst["llm"]
    assert len(body) == len(days) == 10
    for row, day in zip(body, days, strict=True):
        texts = [text for _, text in row]
        assert texts[:3] == [day.ticker, str(day.date), str(day.origin)]
        low, median, high, came = (number(text) for text in texts[3:7])
        assert (low, median, high) == pytest.approx(day.forecast_bp, abs=0.51)
        assert came == pytest.approx(day.came_bp, abs=0.51)
        beyond = max(day.forecast_bp[0] - day.came_bp, day.came_bp - day.forecast_bp[2])
        assert number(texts[7]) == pytest.approx(beyond, abs=0.51)
    # the other models' days are there, folded away
    assert len(read.tables["worst"]) == len(MODELS)
    assert page.split('id="worst"')[1].split("</section>")[0].count("<details>") == len(MODELS) - 1


def test_tickers_are_sorted_and_both_ends_of_a_long_list_are_shown(result: BacktestResult, page: str) -> None:
    ratios = [number(cells[2].split("|")[0]) for cells in Page(page).rows("tickers").values()]
    assert len(ratios) == 5
    assert ratios == sorted(ratios)
    template = next(row for row in result.by_ticker if row["Model"] == "llm" and row["Day"] == 1)
    order = np.random.default_rng(1).permutation(120)
    rows = [
        {**template, "Ticker": f"N{at:03d}", "Relative_MAE": 0.9 + 0.002 * at, "DM_p_Holm": 0.001 if at < 7 else 1.0}
        for at in order
    ]
    rows[5]["Relative_MAE"] = float("nan")
    read = Page(report_html(replace(result, by_ticker=rows)))
    shown = list(read.rows("tickers"))
    known = sorted(row["Ticker"] for row in rows if not math.isnan(row["Relative_MAE"]))
    assert shown == [*known[:25], *known[-24:], rows[5]["Ticker"]]  # what has no ratio stands last
    text = read.text["tickers"]
    assert "70 more in metrics.csv" in text
    below = sum(row["Relative_MAE"] < 1 for row in rows)
    clear = sum(row["Relative_MAE"] < 1 and row["DM_p_Holm"] < 0.05 for row in rows)
    assert f"Lower error than the last close in {below} of 120 tickers" in text
    assert f"lower in {clear}, higher in 0" in text


# --- charts ------------------------------------------------------------------------------------------------------


def test_fan_counts_and_marks_the_closes_outside(result: BacktestResult, page: str) -> None:
    fan = result.fan
    low, high = (fan.quantiles["llm"][:, 0, int(np.argmin(abs(LEVELS - level)))] for level in (0.1, 0.9))
    outside = int(((fan.returns[:, 0] < low) | (fan.returns[:, 0] > high)).sum())
    assert 0 < outside < 60
    read = Page(page)
    label = label_of(read, "TICK0: closes from")
    assert f"{60 - outside} of 60 closes inside the 80% interval" in label
    assert f"from {fan.targets[0, 0]} to {fan.targets[-1, 0]}" in label
    picture = page.split('id="fan"')[1].split("</svg>")[0]
    assert len(re.findall(r"<use [^>]*fill: var\(--down\)", picture)) == outside
    assert len(re.findall(r"<use [^>]*fill: var\(--ink\)", picture)) == 60 - outside


def test_fan_follows_the_last_model_without_a_language_model() -> None:
    read = Page(report_html(simulated(("naive", "har"), 2, 80)))
    assert NAMES["har"] in label_of(read, "TICK0: closes from")


def test_rolling_errors_weigh_dates_by_their_tickers(result: BacktestResult) -> None:
    draw = np.random.default_rng(3)
    counts = draw.integers(1, 6, len(result.daily.dates))
    read = Page(report_html(replace(result, daily=replace(result.daily, counts=counts))))
    ours, walk = (result.daily.abs_error_bp[model][:, 0] for model in ("llm", "naive"))
    ratios = [
        sum(counts[at : at + 21] * ours[at : at + 21]) / sum(counts[at : at + 21] * walk[at : at + 21])
        for at in range(len(counts) - 20)
    ]
    expected = f"between {min(ratios):.3f} and {max(ratios):.3f}, at the end {ratios[-1]:.3f}"
    assert expected in label_of(read, "language model: rolling error")
    inside = result.daily.inside["har"][:, 0, 1]
    shares = [100.0 * np.average(inside[at : at + 21], weights=counts[at : at + 21]) for at in range(len(counts) - 20)]
    expected = f"between {min(shares):.1f} and {max(shares):.1f}, at the end {shares[-1]:.1f}"
    assert expected in label_of(read, "random walk, HAR-range volatility: rolling coverage")


def test_models_with_the_last_close_as_forecast_are_named_instead_of_drawn(page: str) -> None:
    read = Page(page)  # the simulated ewma and har forecast no move
    charts = [tag["aria-label"] for tag in read.of("svg") if "rolling error" in tag["aria-label"]]
    assert [chart.split(":")[0] for chart in charts] == [NAMES["drift"], NAMES["llm"]]
    assert "Not drawn" in read.text["time"]
    assert NAMES["ewma"] in read.text["time"].split("Not drawn")[1].split("last close + drift")[0]


def test_relative_errors_and_coverage_are_charted_for_each_day(result: BacktestResult, page: str) -> None:
    read = Page(page)
    for day in (1, 2, 3):
        label = label_of(read, f"{day} day{'s' if day > 1 else ''} ahead, mean absolute error")
        for row in result.pooled:
            if row["Day"] == day and row["Model"] != REFERENCE:
                assert f"{NAMES[row['Model']]} {row['Relative_MAE']:.4f}" in label
    for key in ("Coverage_50", "Coverage_80", "Coverage_90"):
        label = label_of(read, f"Coverage of the {key[-2:]}% interval")
        for model in MODELS:
            values = [f"{row[key]:.1f}" for row in result.pooled if row["Model"] == model]
            assert f"{NAMES[model]} {'/'.join(values)}" in label


def test_hopeless_model_leaves_the_others_readable() -> None:
    hopeless = simulated(("naive", "drift", "simple", "llm"), 2, 120)
    page = report_html(hopeless)
    ratio = next(row["Relative_MAE"] for row in hopeless.pooled if row["Model"] == "simple" and row["Day"] == 1)
    assert ratio > 5
    read = Page(page)
    assert f"{ratio:.2f} →" in read.text["error"]  # written at the edge, not drawn to scale
    ticks = re.findall(r">([01]\.\d+)</text>", page.split('id="error"')[1].split("</svg>")[0])
    assert max(map(float, ticks)) < 1.1
    assert f"{NAMES['simple']} (own scale)" in read.text["time"]
    assert f"{NAMES['llm']} (own scale)" not in read.text["time"]


def test_histogram_bars_stand_for_the_counts_between_quantiles(result: BacktestResult, page: str) -> None:
    picture = next(
        part for part in page.split("<svg ")[1:]
        if part.split('aria-label="')[1].startswith("last close (random walk): histogram")
    )  # fmt: skip
    bars = re.findall(r'<path d="M ([\d.]+) ([\d.]+) L ([\d.]+) [\d.]+ L [\d.]+ ([\d.]+) L', picture)
    ends = np.round(np.array([0, *LEVELS, 1]) * PIT_BINS).astype(int)
    parts = len(ends) - 1
    heights = np.array([float(foot) - float(top) for _, foot, _, top in bars[:parts]])
    counts = np.array([result.pit["naive"][0, low:high].sum() for low, high in pairwise(ends)])
    density = counts / np.diff(ends)
    assert heights / heights.max() == pytest.approx(density / density.max(), abs=0.01)
    widths = np.array([float(right) - float(left) for left, _, right, _ in bars[:parts]])
    assert np.ptp(widths / np.diff(ends)) < 1.5  # in pixels a bin, but for the gap between bars


def test_histogram_of_a_perfect_forecast_is_flat(tiny: BacktestResult) -> None:
    """Also where the transform interpolates linearly between quantiles a long way apart, as the aggregate's does."""
    returns = np.random.default_rng(2).standard_normal(400_000)
    places = np.interp(returns, [-9, *stats.norm.ppf(LEVELS), 9], [0, *LEVELS, 1])
    counts = np.histogram(places, PIT_BINS, (0, 1))[0][None]
    assert counts.max() > 1.15 * counts.mean()  # bin by bin it would look miscalibrated
    read = Page(report_html(replace(tiny, pit={"naive": counts})))
    low, high = map(
        float, re.findall(r"heights from ([\d.]+) to ([\d.]+)", label_of(read, "last close (random walk): hist"))[0]
    )
    assert 0.97 < low <= high < 1.03


@pytest.mark.parametrize("moves_together", [False, True])
def test_chance_allows_for_tickers_that_move_together(result: BacktestResult, moves_together: bool) -> None:
    draw = np.random.default_rng(5)
    tickers, days = 8, 4000
    place = draw.random((days, 1 if moves_together else tickers))
    inside = np.stack([(abs(place - 0.5) < share / 2).mean(axis=1) for share in INTERVALS], axis=-1)[:, None]
    counts = np.full(days, tickers)
    daily = replace(result.daily, dates=np.arange(days), counts=counts, inside={"llm": inside})
    # One draw a date in place of eight multiplies a share's variance by eight.
    assert design_effect(replace(result, daily=daily), "llm") == pytest.approx(8.0 if moves_together else 1.0, rel=0.1)
    error = standard_error(inside[:, 0, 1], counts, 1)
    draws = days if moves_together else days * tickers
    assert error == pytest.approx(math.sqrt(0.8 * 0.2 / draws), rel=0.1)


# --- any text, any size ------------------------------------------------------------------------------------------

NASTY = "<b>&amp;\"'</td><script>alert(1)</script>$x^2$"


def test_text_from_data_is_only_text(result: BacktestResult) -> None:
    def renamed(row: Any) -> Any:
        return {**row, "Ticker": NASTY} if row["Ticker"] == "TICK0" else row

    models = (*result.models[:-1], NASTY)
    small = simulated(models, 1, 40, 1)
    changed = replace(
        small,
        tickers=[NASTY],
        by_ticker=[renamed(row) for row in small.by_ticker],
        fan=replace(small.fan, ticker=NASTY),
        worst={model: [replace(day, ticker=NASTY) for day in days] for model, days in small.worst.items()},
        verdicts=[f"verdict {NASTY}"],
        facts=[(f"name {NASTY}", f"fact {NASTY}")],
        notes=[f"note {NASTY}"],
    )
    page = report_html(changed)
    read = Page(page)
    assert not read.of("script")
    assert "<b>&" not in page
    for key, piece in {
        "": f"note {NASTY}", "verdict": f"verdict {NASTY}", "scores": NASTY, "fan": NASTY, "worst": NASTY,
        "tickers": NASTY,
    }.items():  # fmt: skip
        assert piece in read.text[key]
    assert f"name {NASTY}fact {NASTY}" in read.text[""]
    assert any(NASTY in tag["aria-label"] for tag in read.of("svg"))


def test_a_models_name_is_no_formula_in_charts() -> None:
    name = "$x^2$ <i>&"
    read = Page(report_html(simulated(("naive", name), 1, 40, 1)))
    assert read.text["error"].count(name) == 1
    assert read.text["calibration"].count(name) == 4  # three coverage charts, one histogram


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
@settings(max_examples=8)
def test_wild_text_survives(text: str, tiny: BacktestResult) -> None:
    plain = text.replace("`", "")  # what stands between backticks becomes code
    changed = replace(tiny, facts=[("fact", plain)], fan=replace(tiny.fan, ticker=text), tickers=[text])
    read = Page(report_html(changed))
    assert plain in read.text[""]
    assert text in read.text["fan"]
    assert any(text in tag["aria-label"] for tag in read.of("svg"))


@pytest.fixture(scope="module")
def tiny() -> BacktestResult:
    return simulated(("naive",), 1, 5, 1)


def test_long_and_wide_results_stay_small(tmp_path: Path) -> None:
    models = ("naive", "drift", "ewma", "har", "garch", "autoarima", "autoets", "autotheta", "simple", "llm")
    long = simulated(models, 2, 5000)
    names = [f"TICKER{at}.EXCHANGE" for at in range(500)]
    rows = [{**row, "Ticker": name} for row in long.by_ticker if row["Ticker"] == "TICK0" for name in names]
    write_report(tmp_path / "report.html", replace(long, tickers=names, by_ticker=rows))
    assert (tmp_path / "report.html").stat().st_size < 1_500_000
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert max(len(path.split(" L ")) for path in re.findall(r' d="([^"]*)"', page)) <= 400
    assert "over 126 days" in Page(page).text["time"]  # a longer window for a longer time


def test_same_result_gives_the_same_bytes(tmp_path: Path, page: str, repo_root: Path) -> None:
    write_report(tmp_path / "here.html", simulated())
    assert (tmp_path / "here.html").read_text(encoding="utf-8") == page
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests/backtest/report'); "
        "import test_page as here; here.write_report(Path(sys.argv[1]), here.simulated())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1", "TZ": "Asia/Shanghai"}
    there = tmp_path / "there.html"
    subprocess.run([sys.executable, "-c", code, str(there)], check=True, cwd=repo_root, env=environment)
    assert there.read_bytes() == (tmp_path / "here.html").read_bytes()


def test_both_schemes_define_every_colour(page: str) -> None:
    style = page.split("<style>")[1].split("</style>")[0]
    light, dark = (re.findall(r"(--[a-z-]+):#", block) for block in re.findall(r":root\{([^}]*)\}", style))
    assert sorted(light) == sorted(dark)
    assert set(re.findall(r"var\((--[a-z-]+)\)", page)) <= set(light)
    charts = page.split("<main>")[1]
    assert "var(--model)" in charts
    assert not re.search(r"(fill|stroke): ?#", charts)  # a fixed colour would fail in one of the schemes


def test_failed_writes_leave_the_old_report(
    tmp_path: Path, tiny: BacktestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(path, tiny)  # makes the folder
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="report.html"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        write_report(path, replace(tiny, notes=("new",)))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["report.html"]
    with pytest.raises(UserError, match="it is a folder"):
        write_report(tmp_path / "deep", tiny)
    write_report(path, replace(tiny, notes=("new",)))
    assert b"<li>new</li>" in path.read_bytes()
