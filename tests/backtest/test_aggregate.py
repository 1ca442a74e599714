"""The aggregate of a backtest, against a table of all ticker-days in memory, and what its words promise."""

from __future__ import annotations

import csv
import gc
import math
import weakref

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sign_tests import pesaran_timmermann
from statsmodels.stats.multitest import multipletests

from stocklora.backtest.aggregate import Aggregate
from stocklora.backtest.results import ALL_TICKERS, METRIC_COLUMNS, PIT_BINS, TickerForecasts, write_metrics
from stocklora.metrics.scores import QUANTILE_LEVELS, score
from stocklora.metrics.significance import (
    crps_from_quantiles,
    diebold_mariano,
    pit,
    relative_mean_interval,
)

LEVELS = np.array(QUANTILE_LEVELS)
NORMAL = stats.norm.ppf(LEVELS)
HORIZON = 3
CALENDAR = np.arange("2012-01-01", "2016-01-01", dtype="datetime64[D]")


def simulate(ticker, seed, days=200, first=0, missing=0, models=None, drift=0.0):
    """One ticker's forecasts of overlapping normal returns of 1% a day, from ``days`` days but ``missing`` of them.

    Args:
        models: name -> function of (returns, draw) that gives ((days, horizon) median, spread relative to the truth).
    """
    draw = np.random.default_rng(seed)
    moves = 0.01 * draw.standard_normal(days + HORIZON) + drift
    level = np.concatenate([[0.0], np.cumsum(moves)])
    returns = np.stack([level[h : h + days] - level[:days] for h in range(1, HORIZON + 1)], axis=1)
    close = 50.0 * np.exp(level[:days])
    spread = 0.01 * np.sqrt(np.arange(1, HORIZON + 1))
    models = models or {
        "naive": lambda r, d: (np.zeros_like(r), 1.3),
        "ewma": lambda r, d: (np.full_like(r, 1e-4), 1.0),
        "noisy": lambda r, d: (0.004 * d.standard_normal(r.shape), 0.8),
    }
    quantiles = {}
    for name, make in models.items():
        median, width = make(returns, draw)
        quantiles[name] = median[..., None] + (width * spread)[None, :, None] * NORMAL
    kept = np.sort(draw.permutation(days)[: days - missing])
    at = first + kept
    return TickerForecasts(
        ticker=ticker,
        origins=CALENDAR[at],
        targets=np.stack([CALENDAR[at + h] for h in range(1, HORIZON + 1)], axis=1),
        last_close=close[kept],
        returns=returns[kept],
        quantiles={name: values[kept] for name, values in quantiles.items()},
        naive_mae=np.array([0.4, 0.6, 0.7]) * (1.0 + 0.1 * seed),
    )


def aggregate_of(tickers, models=("naive", "ewma", "noisy"), horizon=HORIZON, **options):
    aggregate = Aggregate(models, horizon, LEVELS, **options)
    for forecasts in tickers:
        aggregate.add(forecasts)
    return aggregate


def row_of(rows, model, day, ticker=ALL_TICKERS):
    [row] = [row for row in rows if (row["Model"], row["Day"], row["Ticker"]) == (model, day, ticker)]
    return row


@pytest.fixture(scope="module")
def tickers():
    """Four tickers of different length, start and gaps."""
    return [
        simulate("AAA", 1, missing=20, drift=0.001),
        simulate("BBB", 2, days=260, first=30, missing=50),
        simulate("CCC", 3, days=90),
        simulate("DDD", 4, days=40, first=280),
    ]


@pytest.fixture(scope="module")
def result(tickers):
    return aggregate_of(tickers).result(facts=[("seed", "1")], notes=["a warning"])


@pytest.fixture(scope="module")
def table(tickers):
    """Every ticker-day, model and day ahead as a row of a table: what the aggregate never holds."""
    parts = []
    for forecasts in tickers:
        for model, quantiles in forecasts.quantiles.items():
            for step in range(HORIZON):
                came, forecast = forecasts.returns[:, step], quantiles[:, step]
                median, close = forecast[:, 4], forecasts.last_close * np.exp(came)
                pinball = np.stack(
                    [np.where(came >= q, level * (came - q), (1 - level) * (q - came)) for level, q in
                     zip(LEVELS, forecast.T, strict=True)]
                ).mean(axis=0)  # fmt: skip
                parts.append(
                    pd.DataFrame({
                        "ticker": forecasts.ticker, "model": model, "day": step + 1, "date": forecasts.origins,
                        "came": came, "median": median, "error": forecasts.last_close * np.exp(median) - close,
                        "close": close, "bp": 1e4 * abs(median - came), "pinball": 1e4 * pinball,
                        "crps": 1e4 * crps_from_quantiles(came, forecast, LEVELS),
                        "pit": pit(came, forecast, LEVELS), "naive_mae": forecasts.naive_mae[step],
                        "in50": (came >= forecast[:, 2]) & (came <= forecast[:, 6]),
                        "in80": (came >= forecast[:, 1]) & (came <= forecast[:, 7]),
                        "in90": (came >= forecast[:, 0]) & (came <= forecast[:, 8]),
                    })
                )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def expected_row(rows, reference, comparator, day):
    """A row of metrics.csv from ticker-days of a model, of the last close and of the quantile loss's comparator."""
    moved = rows[(rows.came != 0) & (rows["median"].abs() > 1e-12)]
    row = {
        "Origins": len(rows),
        "MAE": rows.error.abs().mean(),
        "RMSE": math.sqrt((rows.error**2).mean()),
        "MAPE": 100 * (rows.error.abs() / rows.close).mean(),
        "MASE": (rows.error.abs() / rows.naive_mae).mean(),
        "MAE_bp": rows.bp.mean(),
        "Relative_MAE": rows.bp.mean() / reference.bp.mean(),
        "Direction": 100 * (np.sign(moved.came) == np.sign(moved["median"])).mean() if len(moved) else math.nan,
        "Direction_Majority": 100 * max((rows.came > 0).mean(), (rows.came < 0).mean()),
        "Pinball_bp": rows.pinball.mean(),
        "Relative_Pinball": rows.pinball.mean() / comparator.pinball.mean(),
        "CRPS_bp": rows.crps.mean(),
        "Coverage_50": 100 * rows.in50.mean(),
        "Coverage_80": 100 * rows.in80.mean(),
        "Coverage_90": 100 * rows.in90.mean(),
    }

    def by_date(other, column):
        return (rows.groupby("date")[column].mean() - other.groupby("date")[column].mean()).to_numpy()

    row["DM"], row["DM_p"] = diebold_mariano(by_date(reference, "bp"), day)
    row["DM_Pinball"], row["DM_Pinball_p"] = diebold_mariano(by_date(comparator, "pinball"), day)
    sums = [other.groupby("date").bp.sum().to_numpy() for other in (rows, reference)]
    row["Relative_MAE_Low"], row["Relative_MAE_High"] = relative_mean_interval(*sums, least_block_days=day)
    return row


@pytest.mark.parametrize("ticker", [ALL_TICKERS, "AAA", "CCC"])
@pytest.mark.parametrize("model", ["naive", "ewma", "noisy"])
def test_rows_against_the_table_of_all_ticker_days(result, table, ticker, model):
    chosen = table if ticker == ALL_TICKERS else table[table.ticker == ticker]
    for day in range(1, HORIZON + 1):
        rows = dict(list(chosen[chosen.day == day].groupby("model")))
        found = row_of([*result.pooled, *result.by_ticker], model, day, ticker)
        assert set(found) == set(METRIC_COLUMNS)
        expected = expected_row(rows[model], rows["naive"], rows["ewma"], day)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9, nan_ok=True)
        if ticker != ALL_TICKERS:
            p_value = pesaran_timmermann(rows[model]["median"].to_numpy(), rows[model].came.to_numpy(), day)[1]
            assert found["PT_p"] == pytest.approx(p_value, nan_ok=True)


def test_every_model_ticker_and_day_has_its_row(result):
    assert result.models == ("naive", "ewma", "noisy")
    assert result.tickers == ("AAA", "BBB", "CCC", "DDD")
    keys = [(row["Ticker"], row["Model"], row["Day"]) for row in (*result.pooled, *result.by_ticker)]
    assert keys == [
        (ticker, model, day)
        for ticker in (ALL_TICKERS, *result.tickers)
        for model in result.models
        for day in range(1, HORIZON + 1)
    ]
    assert (result.facts, result.notes) == ((("seed", "1"),), ("a warning",))


def test_measures_agree_with_the_scores_of_one_run(tickers, result):
    for forecasts in tickers:
        for step in range(HORIZON):
            returns, quantiles = forecasts.returns[:, [step]], forecasts.quantiles["noisy"][:, [step]]
            scores = score(forecasts.last_close, returns, quantiles, LEVELS)
            row = row_of(result.by_ticker, "noisy", step + 1, forecasts.ticker)
            columns = ("MAE", "RMSE", "MAPE", "MAE_bp", "Direction", "Pinball_bp", "Coverage_80")
            expected = [getattr(scores, column.lower()) for column in columns]
            assert [row[column] for column in columns] == pytest.approx(expected)


def test_the_reference_is_compared_with_nothing_but_the_volatility_baseline(result):
    for row in (*result.pooled, *result.by_ticker):
        if row["Model"] == "naive":
            assert (row["Relative_MAE"], row["Relative_MAE_Low"], row["Relative_MAE_High"]) == (1.0, 1.0, 1.0)
            assert np.isnan([row["DM"], row["DM_p"], row["DM_p_Holm"], row["Direction"], row["PT_p"]]).all()
            assert row["Relative_Pinball"] > 1.0
            assert math.isfinite(row["DM_Pinball"])
        if row["Model"] == "ewma":
            assert row["Relative_Pinball"] == 1.0
            assert np.isnan([row["DM_Pinball"], row["DM_Pinball_p"], row["DM_Pinball_p_Holm"]]).all()
            assert math.isfinite(row["DM_p"])


def test_without_the_volatility_baseline_quantile_losses_stand_beside_the_last_close(tickers):
    result = aggregate_of(tickers, ("noisy", "naive")).result()
    assert result.models == ("naive", "noisy")  # the reference first
    noisy, naive = row_of(result.pooled, "noisy", 1), row_of(result.pooled, "naive", 1)
    assert noisy["Relative_Pinball"] == pytest.approx(noisy["Pinball_bp"] / naive["Pinball_bp"])
    assert naive["Relative_Pinball"] == 1.0
    assert math.isnan(naive["DM_Pinball"])
    assert "of the last close's" in result.verdicts[0]


def test_holm_runs_across_tickers_for_each_model_and_day(result):
    for column in ("DM_p", "DM_Pinball_p"):
        rows = [row_of(result.by_ticker, "noisy", 2, ticker) for ticker in result.tickers]
        adjusted = multipletests([row[column] for row in rows], method="holm")[1]
        assert [row[f"{column}_Holm"] for row in rows] == pytest.approx(list(adjusted))
        assert all(math.isnan(row[f"{column}_Holm"]) for row in result.pooled)


def test_pooled_rows_of_one_ticker_are_its_own(tickers):
    result = aggregate_of(tickers[:1]).result()
    for pooled, own in zip(result.pooled, result.by_ticker, strict=True):
        names = [name for name in METRIC_COLUMNS if name != "Ticker" and not name.endswith("Holm")]
        assert {name: pooled[name] for name in names} == pytest.approx({name: own[name] for name in names}, nan_ok=True)


def test_tickers_that_move_as_one_are_no_more_evidence_than_one(tickers):
    alone = aggregate_of(tickers[:1]).result()
    copies = [TickerForecasts(**{**vars(tickers[0]), "ticker": f"COPY{index}"}) for index in range(12)]
    together = aggregate_of(copies).result()
    assert row_of(together.pooled, "noisy", 1)["Origins"] == 12 * row_of(alone.pooled, "noisy", 1)["Origins"]
    tests = ("Relative_MAE", "Relative_MAE_Low", "Relative_MAE_High", "DM", "DM_p", "DM_Pinball", "DM_Pinball_p")
    for one, many in zip(alone.pooled, together.pooled, strict=True):
        assert {name: many[name] for name in tests} == pytest.approx(
            {name: one[name] for name in tests}, rel=1e-6, nan_ok=True
        )
        assert many["PT_p"] == pytest.approx(one["PT_p"], rel=0.05 if one["Day"] == 1 else 1e-6, nan_ok=True)


def test_daily_series_are_means_over_the_tickers_of_a_date(result, table):
    one = table[(table.model == "noisy") & (table.day == 2)].groupby("date")
    daily = result.daily
    assert (np.diff(daily.dates) > np.timedelta64(0, "D")).all()
    assert (daily.dates == one.bp.mean().index.to_numpy().astype("datetime64[D]")).all()
    np.testing.assert_array_equal(daily.counts, one.size())
    np.testing.assert_allclose(daily.abs_error_bp["noisy"][:, 1], one.bp.mean())
    np.testing.assert_allclose(daily.inside["noisy"][:, 1], one[["in50", "in80", "in90"]].mean())


def test_pit_counts(result, table):
    for model in result.models:
        for step in range(HORIZON):
            values = table[(table.model == model) & (table.day == step + 1)].pit
            counts = np.histogram(values, PIT_BINS, (0.0, 1.0))[0]
            np.testing.assert_array_equal(result.pit[model][step], counts)


def test_the_ten_worst_days_of_all_tickers(result, table, tickers):
    rows = table[(table.model == "noisy") & (table.day == 1)].sort_values("pinball", ascending=False).head(10)
    worst = result.worst["noisy"]
    assert [(day.ticker, day.origin) for day in worst] == list(
        zip(rows.ticker, rows.date.to_numpy().astype("datetime64[D]"), strict=True)
    )
    assert [day.pinball_bp for day in worst] == pytest.approx(list(rows.pinball))
    assert [day.came_bp for day in worst] == pytest.approx(list(1e4 * rows.came))
    first = worst[0]
    forecasts = {forecasts.ticker: forecasts for forecasts in tickers}[first.ticker]
    at = int(np.flatnonzero(forecasts.origins == first.origin)[0])
    assert first.date == forecasts.targets[at, 0]
    assert first.forecast_bp == pytest.approx(tuple(1e4 * forecasts.quantiles["noisy"][at, 0, [0, 4, 8]]))


def test_of_equally_bad_days_the_first_added_stay(tickers):
    copies = [TickerForecasts(**{**vars(tickers[0]), "ticker": name}) for name in ("X", "Y", "Z")]
    worst = aggregate_of(copies).result().worst["noisy"]
    assert [day.ticker for day in worst[:3]] == ["X", "Y", "Z"]
    assert [day.ticker for day in worst] == ["X", "Y", "Z"] * 3 + ["X"]


def test_the_fan_is_of_the_first_ticker_or_the_one_named(tickers):
    fan = aggregate_of(tickers).result().fan
    assert (fan.ticker, len(fan.origins)) == ("AAA", 60)
    for name in ("origins", "targets", "last_close", "returns"):
        np.testing.assert_array_equal(getattr(fan, name), getattr(tickers[0], name)[-60:])
    np.testing.assert_array_equal(fan.quantiles["noisy"], tickers[0].quantiles["noisy"][-60:])
    named = aggregate_of(tickers, show="DDD").result()
    assert (named.fan.ticker, len(named.fan.origins), named.notes) == ("DDD", 40, ())
    absent = aggregate_of(tickers, show="ZZZ").result(notes=["first"])
    assert absent.fan.ticker == "AAA"
    assert absent.notes == ("first", "ZZZ has no forecasts; AAA is shown instead")


def test_the_same_order_gives_the_same_result_bit_for_bit(tickers):
    first, second = aggregate_of(tickers).result(), aggregate_of(tickers).result()
    np.testing.assert_equal(first.pooled, second.pooled)
    np.testing.assert_equal(first.by_ticker, second.by_ticker)
    assert first.verdicts == second.verdicts
    turned = aggregate_of(tickers[::-1]).result()
    for one, other in zip(first.pooled, turned.pooled, strict=True):
        assert one == pytest.approx(other, nan_ok=True)


def test_the_result_does_not_end_the_aggregate(tickers):
    aggregate = aggregate_of(tickers[:2])
    before = aggregate.result()
    pooled, dates = [dict(row) for row in before.pooled], before.daily.dates.copy()
    for forecasts in tickers[2:]:
        aggregate.add(forecasts)
    np.testing.assert_equal(aggregate.result().pooled, aggregate_of(tickers).result().pooled)
    np.testing.assert_equal([dict(row) for row in before.pooled], pooled)
    np.testing.assert_array_equal(before.daily.dates, dates)


def test_no_ticker_is_kept():
    aggregate = Aggregate(("naive", "ewma", "noisy"), HORIZON, LEVELS)
    kept = []
    for index in range(4):
        forecasts = simulate(f"T{index}", index, days=100)
        kept += [weakref.ref(forecasts), weakref.ref(forecasts.returns), weakref.ref(forecasts.last_close)]
        kept += [weakref.ref(values) for values in forecasts.quantiles.values()]
        aggregate.add(forecasts)
        del forecasts
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


def changed(forecasts, **fields):
    return TickerForecasts(**{**vars(forecasts), **fields})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"quantiles": {"naive": f.quantiles["naive"]}}, "no forecasts of ewma, noisy"),
        (lambda f: {"quantiles": {**f.quantiles, "noisy": f.quantiles["noisy"][:-1]}}, "noisy has shape"),
        (lambda f: {"quantiles": {**f.quantiles, "ewma": f.quantiles["ewma"][..., :-1]}}, "ewma has shape"),
        (lambda f: {"returns": f.returns[:, :-1]}, "returns has shape"),
        (lambda f: {"targets": f.targets[:-1]}, "targets has shape"),
        (lambda f: {"last_close": f.last_close[:, None]}, "last_close has shape"),
        (lambda f: {"naive_mae": f.naive_mae[:-1]}, "naive_mae has shape"),
        (lambda f: {"returns": np.where(f.returns == f.returns[3, 1], np.nan, f.returns)}, "returns has numbers"),
        (lambda f: {"origins": f.origins[::-1]}, "do not increase"),
        (lambda f: {"origins": f.origins[:0]}, "no forecasts"),
        (lambda f: {}, "added before"),
    ],
)
def test_forecasts_that_do_not_fit_are_refused_and_leave_the_aggregate_as_it_was(tickers, change, message):
    aggregate = aggregate_of(tickers[:2])
    before = aggregate.result()
    wrong = changed(tickers[2], **change(tickers[2])) if change(tickers[2]) else tickers[0]
    with pytest.raises(ValueError, match=message):
        aggregate.add(wrong)
    np.testing.assert_equal(aggregate.result().pooled, before.pooled)


@pytest.mark.parametrize(
    ("models", "horizon", "levels", "message"),
    [
        (["ewma"], 3, LEVELS, "naive"),
        (["naive", "ewma", "ewma"], 3, LEVELS, "distinct"),
        (["naive"], 0, LEVELS, "horizon"),
        (["naive"], 3, LEVELS[1:], "level 0.050"),
        (["naive"], 3, LEVELS[::-1], "increase"),
    ],
)
def test_a_aggregate_that_cannot_be_is_refused(models, horizon, levels, message):
    with pytest.raises(ValueError, match=message):
        Aggregate(models, horizon, levels)


def test_a_aggregate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no ticker"):
        Aggregate(["naive"], 3, LEVELS).result()


def test_a_price_that_never_moves_has_no_ratios(tickers):
    still = changed(tickers[2], returns=np.zeros_like(tickers[2].returns), naive_mae=np.zeros(3), ticker="STILL")
    result = aggregate_of([still]).result()
    row = row_of(result.pooled, "noisy", 1)
    assert np.isnan([row[name] for name in ("Relative_MAE", "Relative_MAE_Low", "MASE", "Direction", "PT_p")]).all()
    assert row_of(result.pooled, "naive", 1)["Relative_MAE"] == 1.0
    assert "cannot be compared with the last close, which was never wrong" in result.verdicts[1]
    both = aggregate_of([still, tickers[0]]).result()  # its MASE counts for nothing, its origins no weight
    own = row_of(both.by_ticker, "noisy", 1, "AAA")["MASE"]
    assert row_of(both.pooled, "noisy", 1)["MASE"] == pytest.approx(own)


# Verdicts


def verdict_of(model, days=600, drift=0.0, reference=None, tickers=1, **others):
    models = {"naive": reference or (lambda r, d: (np.zeros_like(r), 1.0)), **others, "it": model}
    parts = [simulate(f"T{index}", index + 40, days=days, models=models, drift=drift) for index in range(tickers)]
    result = aggregate_of(parts, list(models)).result()
    assert len(result.verdicts) == len(models) - 1
    assert result.verdicts[-1].startswith("it: ")
    assert result.verdicts[-1].endswith(".")
    return result, result.verdicts[-1]


def test_an_identical_model():
    result, words = verdict_of(lambda r, d: (np.zeros_like(r), 1.0))
    for row in (row_of(result.pooled, "it", day) for day in (1, 2, 3)):
        assert (row["Relative_MAE"], row["Relative_MAE_Low"], row["Relative_MAE_High"]) == (1.0, 1.0, 1.0)
        assert row["Relative_Pinball"] == 1.0
        assert np.isnan([row[name] for name in ("DM", "DM_p", "DM_Pinball", "DM_Pinball_p", "PT_p")]).all()
    assert words.startswith("it: at 1 to 3 days ahead its point forecast is identical to the last close's; ")
    assert "it forecasts no direction" in words
    assert words.endswith("its quantile loss is 1.000 of the last close's: identical.")


def test_a_difference_by_rounding_alone_is_no_difference():
    result, words = verdict_of(lambda r, d: (1e-17 * d.standard_normal(r.shape), 1.0))
    assert "identical to the last close's; it forecasts no direction" in words
    assert math.isnan(row_of(result.pooled, "it", 1)["DM_p"])


def test_a_model_that_knows_nothing_is_not_called_better():
    result, words = verdict_of(lambda r, d: (0.0002 * d.standard_normal(r.shape), 1.0))
    rows = [row_of(result.pooled, "it", day) for day in (1, 2, 3)]
    low, high = min(row["Relative_MAE_Low"] for row in rows), max(row["Relative_MAE_High"] for row in rows)
    assert words.startswith("it: at 1 to 3 days ahead it is not distinguishable from the last close (MAE ")
    assert f"95% intervals within {low:.3f} to {high:.3f})" in words
    assert "leak" not in words


def test_a_noisy_model_is_worse_and_skill_on_one_day_is_told_apart():
    def half_blind(returns, draw):
        median = 0.004 * draw.standard_normal(returns.shape)
        median[:, 0] = 0.02 * returns[:, 0]
        return median, 1.0

    result, words = verdict_of(half_blind, days=1200)
    first = row_of(result.pooled, "it", 1)
    assert first["Relative_MAE"] == pytest.approx(0.98)
    assert first["Relative_MAE_High"] < 1.0
    assert words.startswith(
        "it: at 1 day ahead it is better than the last close (MAE 0.980 of it, 95% interval 0.980 to"
    )
    assert "; at 2 and 3 days ahead it is worse than the last close (MAE 1.0" in words
    assert "at 1 day ahead its direction is better than always guessing" in words
    assert "leak" not in words


def test_an_error_too_good_to_be_true_is_flagged():
    _, words = verdict_of(lambda r, d: (0.1 * r, 1.0))
    assert "an error 10% below the last close's is rare: look for a leak (`--check-leakage`)" in words


@pytest.mark.parametrize(
    ("statistic", "p_value", "interval", "words"),
    [
        (-3.0, 0.01, (0.9, 0.999), "better than"),
        (-3.0, 0.01, (0.9, 1.001), "not distinguishable from"),
        (-1.0, 0.06, (0.9, 0.999), "not distinguishable from"),
        (3.0, 0.01, (0.9, 0.999), "not distinguishable from"),  # dates and ticker-days disagree
        (3.0, 0.01, (1.001, 1.1), "worse than"),
        (3.0, 0.01, (0.999, 1.1), "not distinguishable from"),
        (1.0, 0.06, (1.001, 1.1), "not distinguishable from"),
    ],
)
def test_both_the_test_and_the_interval_must_say_so(monkeypatch, tickers, statistic, p_value, interval, words):
    monkeypatch.setattr("stocklora.backtest.aggregate.diebold_mariano", lambda *_: (statistic, p_value))
    monkeypatch.setattr("stocklora.backtest.aggregate.relative_mean_interval", lambda *_, **__: interval)
    assert f"noisy: at 1 to 3 days ahead it is {words} the last close" in aggregate_of(tickers).result().verdicts[1]


@pytest.mark.parametrize(
    ("p_value", "words"), [(0.01, "better than always guessing"), (0.06, "not distinguishable from chance (")]
)
def test_a_direction_must_beat_both_the_majority_and_chance(monkeypatch, p_value, words):
    monkeypatch.setattr("stocklora.backtest.aggregate.directional_skill", lambda *_: (2.0, p_value))
    _, verdict = verdict_of(lambda r, d: (0.01 * r, 1.0), days=60)  # right every day
    assert verdict.count("its direction is ") == verdict.count(f"its direction is {words}") > 0


def test_a_few_days_decide_nothing():
    # 15 days: enough for both one day ahead, too few for either further ahead.
    result, words = verdict_of(lambda r, d: (0.002 * d.standard_normal(r.shape), 1.0), days=15)
    assert np.isnan(row_of(result.pooled, "it", 2)["DM_p"])
    assert "at 2 and 3 days ahead there are too few days to tell it from the last close (MAE " in words
    assert "too few days to judge" in words


def test_always_up_is_no_better_than_always_guessing_up():
    result, words = verdict_of(lambda r, d: (np.full_like(r, 0.0005), 1.0), drift=0.001)
    for row in (row_of(result.pooled, "it", day) for day in (1, 2, 3)):
        assert row["Direction"] == row["Direction_Majority"]
    assert "its direction is no better than always guessing up (" in words
    _, words = verdict_of(lambda r, d: (np.full_like(r, 0.0005), 1.0), drift=-0.001)
    assert "its direction is no better than always guessing down (" in words


@pytest.mark.parametrize(("width", "words"), [(1.0, "about right"), (1.3, "too wide"), (0.8, "too narrow")])
def test_error_bars(width, words):
    result, verdict = verdict_of(lambda r, d: (np.zeros_like(r), width), days=1000, tickers=2)
    shares = [row_of(result.pooled, "it", day)["Coverage_80"] for day in (1, 2, 3)]
    assert f"; its 80% interval covers {min(shares):.1f} to {max(shares):.1f}%: {words}; " in verdict


def test_error_bars_of_a_few_days_are_judged_by_what_chance_does():
    models = {"naive": lambda r, d: (np.zeros_like(r), 1.0), "it": lambda r, d: (np.zeros_like(r), 0.85)}
    said = set()
    for seed in range(40):
        forecasts = simulate("T", seed, days=40, models=models)
        one_day = changed(
            forecasts,
            targets=forecasts.targets[:, :1],
            returns=forecasts.returns[:, :1],
            naive_mae=forecasts.naive_mae[:1],
            quantiles={name: values[:, :1] for name, values in forecasts.quantiles.items()},
        )
        result = aggregate_of([one_day], list(models), horizon=1).result()
        share = result.pooled[1]["Coverage_80"]
        chance = 1.96 * math.sqrt(share * (100 - share) / 40)  # forty days apart from each other
        words = "too wide" if share > 80 else "too narrow"
        if abs(share - 80) <= chance:
            words = "no further off than chance"
        if abs(share - 80) <= 2:
            words = "about right"
        assert f"its 80% interval covers {share:.1f}%: {words}; " in result.verdicts[0]
        said.add(words)
    assert said >= {"about right", "no further off than chance", "too narrow"}


def test_quantile_loss_stands_beside_ewma():
    def narrow(returns, draw):
        return np.zeros_like(returns), 1.0

    _, words = verdict_of(narrow, ewma=lambda r, d: (np.zeros_like(r), 1.6), days=900)
    assert " of EWMA's: better (p < 0.001)." in words
    _, words = verdict_of(lambda r, d: (np.zeros_like(r), 1.8), ewma=narrow, days=900)
    assert " of EWMA's: worse (p < 0.001)." in words
    result, words = verdict_of(lambda r, d: (0.0001 * d.standard_normal(r.shape), 1.0), ewma=narrow, days=900)
    assert " of EWMA's: not distinguishable (p at least 0." in words
    assert "quantile loss" not in result.verdicts[0]  # EWMA's own


# metrics.csv


def test_metrics_file(result, tmp_path):
    path = tmp_path / "reports" / "metrics.csv"
    write_metrics(path, result)
    assert b"\r" not in path.read_bytes()
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        assert tuple(reader.fieldnames or ()) == METRIC_COLUMNS
        read = list(reader)
    written = [*result.pooled, *result.by_ticker]
    assert [row["Ticker"] for row in read[:9]] == [ALL_TICKERS] * 9
    assert len(read) == len(written)
    for cells, row in zip(read, written, strict=True):
        assert (cells["Model"], cells["Ticker"]) == (row["Model"], row["Ticker"])
        assert (cells["Day"], cells["Origins"]) == (str(row["Day"]), str(row["Origins"]))
        for name in METRIC_COLUMNS[4:]:
            if math.isnan(row[name]):
                assert cells[name] == ""
            else:
                assert float(cells[name]) == pytest.approx(row[name], rel=5e-6)
                assert len(cells[name].split("e")[0].lstrip("-0.").replace(".", "")) <= 6
