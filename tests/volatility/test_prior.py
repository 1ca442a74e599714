"""The market prior: what ships, that it is made of the days it names alone, and how far own days move it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from price_tables import random_prices
from source_tree import REPO_ROOT

from stocklora.cli.console import UserError
from stocklora.metrics.scores import QUANTILE_LEVELS
from stocklora.prices.tables import log_returns_ahead, read_prices
from stocklora.volatility import prior as prior_module
from stocklora.volatility.market import Market
from stocklora.volatility.prior import (
    BUILTIN,
    MOST_HORIZON,
    MarketPrior,
    fit_prior,
    load_prior,
    prior_named,
    prior_note,
)
from stocklora.volatility.random_walk import fit_baselines
from stocklora.volatility.scales import HARX_INPUTS, VolatilityScale, fit_scale

LEVELS = np.array(QUANTILE_LEVELS)
DEVELOPMENT = REPO_ROOT.parent / "shared" / "data"  # not part of the project; see scripts/make_prior.py
MADE_FROM = [
    *[f"markets/{name}.csv.gz" for name in ("us", "ashares", "hk", "india", "crypto", "indices", "japan")],
    "prices/us_large_2012_2017.csv.gz",
]
MADE_SINCE = pd.Timestamp("2013-03-04")

Markets = dict[str, dict[str, pd.DataFrame]]


def made_up_markets() -> Markets:
    one = {f"A{seed}": random_prices(300, seed) for seed in range(2)}
    return {"one": one, "two": {"B": random_prices(260, 9, start="2020-06-01", volatility=0.01)}}


@pytest.fixture(scope="module")
def small() -> MarketPrior:
    """Of three made-up tickers, for three days ahead."""
    return fit_prior(made_up_markets(), horizon=3)


def assert_same(one: MarketPrior, other: MarketPrior) -> None:
    assert one.scale == other.scale
    np.testing.assert_array_equal(one.table, other.table)
    np.testing.assert_array_equal(one.paths, other.paths)
    assert one.made_from == other.made_from


# --- what ships -------------------------------------------------------------------------------------------


def test_the_prior_that_ships_reaches_as_far_as_any_horizon_and_names_its_inputs() -> None:
    prior = load_prior()
    assert prior.scale.kind == "prior"
    assert prior.scale.horizon == MOST_HORIZON == 20
    tables = np.array([prior.scale.coefficients, prior.scale.centre, prior.scale.spread])
    assert tables.shape == (3, 20, len(HARX_INPUTS))
    assert np.isfinite(tables).all()
    assert (tables[2] > 0).all()
    assert prior.table.shape == (20, len(QUANTILE_LEVELS))
    assert (np.diff(prior.table, axis=1) > 0).all()
    assert tuple(json.loads(BUILTIN.read_text())["inputs"]) == HARX_INPUTS


def test_its_file_is_small_and_says_what_it_was_made_from() -> None:
    assert BUILTIN.stat().st_size < 100_000
    made_from = json.loads(BUILTIN.read_text())["made_from"]
    assert made_from["tickers"] == sum(len(market["tickers"]) for market in made_from["markets"].values())
    assert made_from["rows"] == sum(market["rows"] for market in made_from["markets"].values())
    assert made_from["first_day"] == min(market["first_day"] for market in made_from["markets"].values())
    assert made_from["last_day"] == max(market["last_day"] for market in made_from["markets"].values())
    assert len(made_from["prices_sha256"]) == 64
    assert set(made_from["versions"]) == {"numpy", "pandas", "python"}
    assert str(load_prior()) == f"{made_from['tickers']} tickers, {made_from['first_day']} to {made_from['last_day']}"


def test_its_paths_spread_as_its_quantiles_say() -> None:
    prior = load_prior()
    assert prior.paths.shape[1] == 20
    inner = [QUANTILE_LEVELS.index(level) for level in (0.1, 0.9)]
    np.testing.assert_allclose(np.quantile(prior.paths, [0.1, 0.9], axis=0).T, prior.table[:, inner], rtol=0.25)


def test_the_file_that_ships_is_written_again_byte_for_byte(tmp_path: Path) -> None:
    load_prior().save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == BUILTIN.read_bytes()


@pytest.mark.slow
def test_the_prices_it_was_made_from_give_the_same_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [name for name in MADE_FROM if not (DEVELOPMENT / name).is_file()]
    if missing:
        pytest.skip(f"the prices that the prior was made from are not here: no {DEVELOPMENT / missing[0]}")
    markets = {Path(name).name.removesuffix(".csv.gz"): read_prices(DEVELOPMENT / name) for name in MADE_FROM}
    inputs_of, regress, fitted = prior_module.regression_inputs, prior_module.harx_regression, []

    # Two of the twenty days ahead: the rest would take minutes and go the same way.
    def first_inputs(frame: pd.DataFrame, market: Market, horizon: int) -> np.ndarray:
        found = inputs_of(frame, market, 2)
        return np.concatenate([found, np.zeros((horizon - 2, *found.shape[1:]))])

    def first_regressions(inputs: np.ndarray, sizes: np.ndarray, ridge_days: float) -> np.ndarray:
        fitted.append(len(sizes))
        return regress(inputs, sizes, ridge_days) if len(fitted) <= 2 else np.zeros(inputs.shape[1])

    monkeypatch.setattr(prior_module, "regression_inputs", first_inputs)
    monkeypatch.setattr(prior_module, "harx_regression", first_regressions)
    made, ships = fit_prior(markets, start=MADE_SINCE), load_prior()
    facts = ("tickers", "rows", "origins", "first_day", "last_day", "prices_sha256", "markets")
    assert {name: made.made_from[name] for name in facts} == {name: ships.made_from[name] for name in facts}
    assert made.scale.usual == pytest.approx(ships.scale.usual, rel=1e-3)
    for name in ("coefficients", "centre", "spread"):
        found, expected = (np.array(getattr(prior.scale_for(2), name)) for prior in (made, ships))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(made.table[:2], ships.table[:2], rtol=1e-3, atol=1e-5)


# --- files ------------------------------------------------------------------------------------------------


def test_a_file_keeps_every_number(small: MarketPrior, tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        small.save(tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert_same(load_prior(tmp_path / "one.json"), small)


def test_of_a_prior_the_first_days_ahead_can_be_had_and_no_more(small: MarketPrior) -> None:
    assert small.scale_for(3) == small.scale
    assert small.scale_for(1).coefficients == small.scale.coefficients[:1]
    with pytest.raises(ValueError, match="reaches 3 days ahead, not 4"):
        small.scale_for(4)


def test_a_prior_is_named(small: MarketPrior, tmp_path: Path) -> None:
    small.save(tmp_path / "mine.json")
    assert prior_named("none") is None
    assert prior_named("builtin") is load_prior()  # read once
    mine = prior_named(str(tmp_path / "mine.json"))
    assert mine is not None
    assert_same(mine, small)


def test_a_file_that_was_written_anew_is_read_anew(small: MarketPrior, tmp_path: Path) -> None:
    load_prior().save(tmp_path / "mine.json")
    assert load_prior(tmp_path / "mine.json").scale.horizon == 20
    small.save(tmp_path / "mine.json")
    assert load_prior(tmp_path / "mine.json").scale.horizon == 3


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(name)


def set_first_cell(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def spoil(content: dict[str, Any]) -> None:
        content[name][0][0] = value

    return spoil


def set_input(part: str, value: list[float]) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["inputs"]["volume"].update({part: value})


def made_from_changed(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["made_from"].update({name: value})


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an input less": (lambda content: content["inputs"].pop("volume"), "made for other inputs"),
    "an input more": (lambda content: content["inputs"].update(tweets={}), "made for other inputs"),
    "inputs in another order": (
        lambda content: content.update(inputs=dict(reversed(content["inputs"].items()))),
        "made for other inputs",
    ),
    "other quantiles": (lambda content: content["levels"].pop(), "made for other inputs or quantiles"),
    "no levels": (without("levels"), "not a file of scripts/make_prior.py"),
    "no quantiles": (without("quantiles"), "not a file of scripts/make_prior.py"),
    "no paths": (without("paths_in_hundredths"), "not a file of scripts/make_prior.py"),
    "a quantile less": (lambda content: [row.pop() for row in content["quantiles"]], "do not go together"),
    "a ragged table": (lambda content: content["quantiles"][1].pop(), ""),
    "days ahead missing": (lambda content: content["quantiles"].pop(), ""),
    "a path's day missing": (lambda content: [row.pop() for row in content["paths_in_hundredths"]], "go together"),
    "a text for a number": (set_input("coefficients", ["x"]), ""),
    "not a number": (set_input("coefficients", [float("nan")]), "a number in it cannot be"),
    "an infinite quantile": (set_first_cell("quantiles", float("-inf")), "a number in it cannot be"),
    "no spread": (set_input("spread", [0.0]), "a number in it cannot be"),
    "quantiles that fall": (set_first_cell("quantiles", 1.0), "its quantiles do not increase"),
    "no origin": (without("made_from"), "not a file of scripts/make_prior.py"),
    "no sha256": (lambda content: content["made_from"].pop("prices_sha256"), "not a file of scripts/make_prior.py"),
    "no such day": (made_from_changed("last_day", "yesterday"), ""),
    "a list": (lambda content: content.update(made_from=[]), "not a file of scripts/make_prior.py"),
}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        prior_named(str(path))
    text = str(caught.value)
    assert text.startswith(f"--prior {path}: ")
    assert "make_prior.py" in text
    return text


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_said(name: str, small: MarketPrior, tmp_path: Path) -> None:
    small.save(tmp_path / "good.json")
    content = json.loads((tmp_path / "good.json").read_text())
    spoil, says = DAMAGED[name]
    spoil(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    assert says in refused(tmp_path / "bad.json")


@pytest.mark.parametrize("content", [b"", b"Date,Open\n", b"[1, 2]", b"3", b"{}", b"\xff\xfe\x00", b'{"inputs": 1}'])
def test_any_other_file_is_said(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_bytes(content)
    refused(tmp_path / "other.json")


def test_no_file_is_said(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "nowhere.json")
    assert "directory" in refused(tmp_path)


# --- fitting ----------------------------------------------------------------------------------------------


def test_the_same_prices_give_the_same_prior(small: MarketPrior) -> None:
    assert_same(fit_prior(made_up_markets(), horizon=3), small)


def test_it_says_what_it_was_made_from(small: MarketPrior) -> None:
    made_from = small.made_from
    assert (made_from["tickers"], made_from["rows"]) == (3, 860)
    assert (made_from["first_day"], made_from["last_day"]) == ("2020-01-01", "2021-05-28")
    assert made_from["markets"]["two"] == {
        "tickers": ["B"], "rows": 260, "first_day": "2020-06-01", "last_day": "2021-05-28",
    }  # fmt: skip
    other = made_up_markets()
    other["one"]["A0"].iloc[5, 4] += 1.0
    assert fit_prior(other, horizon=1).made_from["prices_sha256"] != made_from["prices_sha256"]


@pytest.mark.parametrize("change", ["scaled", "deleted"])
def test_nothing_before_the_first_day_or_from_the_last_on_is_read(change: str) -> None:
    start, before = pd.Timestamp("2020-03-02"), pd.Timestamp("2021-02-01")
    prices = made_up_markets()
    expected = fit_prior(prices, before, horizon=2, start=start)
    assert expected.made_from["first_day"] == "2020-03-02"
    assert expected.made_from["last_day"] == "2021-01-29"
    changed = copy.deepcopy(prices)
    for market in changed.values():
        for ticker, frame in market.items():
            inside = (frame.index >= start) & (frame.index < before)
            assert not inside.all()
            if change == "deleted":
                market[ticker] = frame[inside]
            else:
                draw = np.random.default_rng(1)
                frame.loc[~inside] *= np.exp(draw.uniform(-3, 3, ((~inside).sum(), 1)))
    assert_same(fit_prior(changed, before, horizon=2, start=start), expected)
    edge = copy.deepcopy(prices)
    edge["one"]["A0"].loc[pd.Timestamp("2021-01-29"), "Close"] *= 1.5  # the last day inside counts
    assert fit_prior(edge, before, horizon=2, start=start).scale != expected.scale


def test_a_ticker_with_too_few_days_teaches_nothing(small: MarketPrior) -> None:
    markets = made_up_markets()
    markets["one"]["SHORT"] = random_prices(99, 5)
    markets["three"] = {"SHORT2": random_prices(99, 6)}
    assert_same(fit_prior(markets, horizon=3), small)
    with pytest.raises(ValueError, match="no ticker has the 100 days"):
        fit_prior({"three": markets["three"]}, horizon=1)


def test_what_it_learns_is_how_far_prices_go() -> None:
    """Of random walks of two volatilities the scale is each one's, and the quantiles those of a normal."""
    prices = {f"T{seed}": random_prices(900, seed, volatility=0.01 if seed % 2 else 0.03) for seed in range(6)}
    prior = fit_prior({"one": prices}, horizon=2)
    for volatility in (0.01, 0.03):
        frame = random_prices(600, 50, volatility=volatility)
        scale = prior.scale.on({"X": frame})["X"][100:]
        for step in (0, 1):
            expected = volatility * np.sqrt(2 / np.pi) * np.sqrt(step + 1)  # a scale is a mean size
            assert np.median(scale[:, step]) == pytest.approx(expected, rel=0.15)
    place = QUANTILE_LEVELS.index(0.9)
    assert prior.table[0, place] == pytest.approx(1.2816 / np.sqrt(2 / np.pi), rel=0.1)


# --- own days move it -------------------------------------------------------------------------------------


def moved(origins: list[int], frame: pd.DataFrame, returns: np.ndarray) -> VolatilityScale:
    start = load_prior().scale_for(returns.shape[1])
    return fit_scale("prior", {"X": frame}, {"X": origins}, {"X": returns}, start)  # type: ignore[dict-item]


def test_without_origins_it_is_the_prior_itself() -> None:
    frame = random_prices(100)
    assert moved([], frame, log_returns_ahead(frame["Close"].to_numpy(), 3)) == load_prior().scale_for(3)
    own = load_prior().table[:3] * 2.0
    np.testing.assert_array_equal(load_prior().moved_table(own, 0), load_prior().table[:3])


def test_a_few_days_move_the_scale_a_little_and_many_all_the_way() -> None:
    frame = random_prices(700, 3)
    returns = 2.0 * log_returns_ahead(frame["Close"].to_numpy(), 2)  # closes go twice as far as the prior expects
    days = list(range(30, 690))
    own = fit_scale("harx", {"X": frame}, {"X": range(30, 690)}, {"X": returns})
    market = own.markets_of({"X": frame}).of("X")
    start, there = (np.log(scale.before_adapting(frame, market)[30:]) for scale in (load_prior().scale_for(2), own))
    shares = []
    for origins in (days[:30], days[:200], days[:660], days * 70):  # the last: 46,200
        here = np.log(moved(origins, frame, returns).before_adapting(frame, market)[30:])
        shares.append(float(np.median(here - start) / np.median(there - start)))
    assert shares == sorted(shares)
    assert 0.0 < shares[0] < 0.25
    assert 0.95 < shares[-1] < 1.05


def test_a_few_days_move_the_quantiles_a_little_and_many_all_the_way() -> None:
    prior = load_prior()
    own = prior.table[:3] * 1.5
    shares = [
        float(((prior.moved_table(own, origins) - prior.table[:3]) / (own - prior.table[:3])).mean())
        for origins in (20, 700, 46_000)
    ]
    np.testing.assert_allclose(shares, [20 / 720, 0.5, 46_000 / 46_700])


def test_the_baseline_joins_both() -> None:
    """With thirty origins a forecast is the prior's, within a tenth of its spread, and its quantiles increase."""
    frame = random_prices(63, 8)
    prices, origins = {"X": frame}, {"X": range(30, 60)}
    returns = {"X": log_returns_ahead(frame["Close"].to_numpy(), 3)}
    baseline = fit_baselines(prices, origins, returns, LEVELS, ("prior",), prior=load_prior())["prior"]
    assert baseline.scale is not None
    assert baseline.scale.kind == "prior"
    found = baseline.quantiles(baseline.scale.on(prices)["X"][-1:])[0]
    expected = load_prior().scale_for(3).on(prices)["X"][-1][:, None] * load_prior().table[:3]
    spread = (expected[:, -1] - expected[:, 0])[:, None]
    assert (np.abs(found - expected) < 0.1 * spread).all()
    assert (np.diff(found, axis=1) > 0).all()


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_surprise_of_many_tickers_is_believed_further(count: int) -> None:
    prices = {f"T{seed}": random_prices(300, seed, volatility=0.05) for seed in range(count)}
    scale = load_prior().scale_for(1)
    market = scale.markets_of(prices).of("T0")
    surprise, tickers = market.running_surprise(pd.DatetimeIndex(prices["T0"].index), scale.usual)
    np.testing.assert_allclose(tickers[20:], count)
    factor = scale.surprise_factor(prices["T0"], market)
    np.testing.assert_allclose(factor, (surprise / scale.usual) ** (count / (count + 1)), rtol=1e-12)
    np.testing.assert_allclose(
        factor, scale.at(prices["T0"], market)[:, 0] / scale.before_adapting(prices["T0"], market)[:, 0]
    )


# --- honest about itself ----------------------------------------------------------------------------------


def test_a_note_counts_the_days_inside() -> None:
    made_from = {"tickers": 7, "first_day": "2020-01-02", "last_day": "2020-12-31"}

    def note(*days: str) -> str:
        return prior_note(made_from, np.array(days, dtype="datetime64[D]"))

    whole = "The market prior was made from 7 tickers, 2020-01-02 to 2020-12-31: "
    assert note("2020-01-01", "2021-01-01") == f"{whole}none of the 2 days scored lies between these."
    some = note("2019-12-31", "2020-01-02", "2020-12-31", "2021-01-04")
    assert some == f"{whole}2 of the 4 days scored lie between these, and a score on them may be flattered."
    assert (
        note("2020-05-05") == f"{whole}all the 1 days scored lie between these, and a score on them may be flattered."
    )
