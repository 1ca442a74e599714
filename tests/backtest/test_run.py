"""backtest.py: honest dates, the same numbers however it is run, and mistakes in one line."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from price_tables import random_prices
from script_calls import ACCELERATE_LAUNCH, ForkedScript

from stocklora.backtest.run import run_backtest
from stocklora.backtest.settings import BacktestSettings
from stocklora.backtest.walk_forward import Baselines, Plan, choose_cuts
from stocklora.cli.console import UserError
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.metrics.scores import QUANTILE_LEVELS, pinball_loss
from stocklora.prices.tables import read_prices, write_prices

pytestmark = pytest.mark.usefixtures("undrawn")

LEVELS = np.array(QUANTILE_LEVELS)
META = {"source": "test", "adjust": "all", "interval": "1d"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six tickers of random prices, one file each; the last is listed late."""
    home = tmp_path_factory.mktemp("prices")
    for seed in range(6):
        frame = random_prices(520, seed)
        write_prices({f"T{seed}": frame.iloc[400:] if seed == 5 else frame}, home / f"T{seed}.csv", META)
    return home


@pytest.fixture(scope="module")
def weights(folder, tmp_path_factory, tiny_model) -> Path:
    """A tiny model trained on two of the tickers; its first test day is 2021-09-01."""
    from stocklora.finetune.fit import finetune

    home = tmp_path_factory.mktemp("weights")
    prices = read_prices([folder / "T0.csv", folder / "T1.csv"])
    settings = TrainLoraSettings(
        model_path=tiny_model, save_dir=home, epochs=1, lora_rank=2, dtype="float32", device="cpu",
        validation_from="2021-05-03", test_from="2021-09-01",
    )  # fmt: skip
    finetune(prices, settings)
    return home / "best_lora_weights.pth"


def settings_for(folder: Path, out: Path, **changes) -> BacktestSettings:
    base = BacktestSettings(data=[folder], start="2021-07-01", output_dir=out, forecasts_format="csv")
    return dataclasses.replace(base, **changes)


def outputs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def whole_run(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "backtest"
    assert run_backtest(settings_for(folder, out)) == 0
    return out


def test_the_script_as_a_user_runs_it(folder, tmp_path, run_script):
    result = run_script("backtest.py", "--data", folder, "--models", "ewma", "har", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "of last close" in result.stdout
    assert re.search(r"ewma: at 1 to 3 days ahead it is not distinguishable from the last close", result.stdout)
    assert {path.name for path in (tmp_path / "backtest").iterdir()} >= {"report.html", "metrics.csv"}
    assert "<html" in (tmp_path / "backtest" / "report.html").read_text(encoding="utf-8")


def test_metrics_are_those_of_the_forecasts_on_file(whole_run, folder):
    metrics = pd.read_csv(whole_run / "metrics.csv")
    forecasts = pd.read_csv(whole_run / "forecasts.csv.gz", parse_dates=["Origin", "Date"])
    prices = read_prices(folder)
    one = forecasts[(forecasts["Model"] == "har") & (forecasts["Ticker"] == "T2") & (forecasts["Day"] == 2)]
    row = metrics[(metrics["Model"] == "har") & (metrics["Ticker"] == "T2") & (metrics["Day"] == 2)].iloc[0]
    came = prices["T2"]["Close"].reindex(one["Date"]).to_numpy()
    np.testing.assert_allclose(one["Close"], came, rtol=1e-6)
    assert row["Origins"] == len(one)
    assert row["MAE"] == pytest.approx(np.abs(one["P50"] - came).mean(), rel=1e-4)
    inside = (came >= one["P10"]) & (came <= one["P90"])
    assert row["Coverage_80"] == pytest.approx(100 * inside.mean(), rel=1e-4)
    columns = [f"P{round(100 * level):02d}" for level in LEVELS]
    returns = np.log(came / one["Last_Close"].to_numpy())[:, None]
    quantiles = np.log(one[columns].to_numpy() / one["Last_Close"].to_numpy()[:, None])[:, None]
    assert row["Pinball_bp"] == pytest.approx(1e4 * pinball_loss(returns, quantiles, LEVELS).mean(), rel=1e-3)


def test_every_day_that_can_be_scored_is_scored_once(whole_run, folder):
    forecasts = pd.read_csv(whole_run / "forecasts.csv.gz", parse_dates=["Origin"])
    for ticker, frame in read_prices(folder).items():
        own = forecasts[(forecasts["Ticker"] == ticker) & (forecasts["Model"] == "naive") & (forecasts["Day"] == 1)]
        first = max(30, int(frame.index.searchsorted(pd.Timestamp("2021-07-01"))))
        assert own["Origin"].tolist() == frame.index[first:-3].tolist()


def test_nothing_is_fitted_on_targets_or_days_near_the_first_forecast():
    frame = random_prices(300, 1)
    plan = Plan((frame.index[200],), frame.index[-1], 30, 3)
    training = plan.training(frame.index, frame.index[200])
    # The last training target is training.stop - 1 + 3; then three days of embargo.
    assert training == range(30, 194)
    assert plan.origins(frame.index, 0) == range(200, 300)
    rolling = dataclasses.replace(plan, train_days=50)
    assert rolling.training(frame.index, frame.index[200]) == range(144, 194)


def test_refits_cut_the_calendar():
    calendar = pd.bdate_range("2019-06-03", "2021-12-31")
    first, end = calendar[0], calendar[-1]
    assert choose_cuts(calendar, first, end, "never") == (first,)
    assert [f"{date:%Y-%m-%d}" for date in choose_cuts(calendar, first, end, "yearly")] == [
        "2019-06-03", "2020-01-01", "2021-01-01",
    ]  # fmt: skip
    assert choose_cuts(calendar, first, end, "100") == tuple(calendar[::100])
    for wrong in ("sometimes", "0", "-5", "1.5"):
        with pytest.raises(UserError, match="--refit"):
            choose_cuts(calendar, first, end, wrong)


def test_a_refit_learns_what_came_since(folder, tmp_path):
    """With refits the drift forecast changes at each cut, and equals the mean training return known there."""
    assert run_backtest(settings_for(folder, tmp_path / "b", models=["drift"], refit="60")) == 0
    forecasts = pd.read_csv(tmp_path / "b" / "forecasts.csv.gz", parse_dates=["Origin"])
    own = forecasts[(forecasts["Model"] == "drift") & (forecasts["Day"] == 1)]
    drift = np.log(own["P50"] / own["Last_Close"]).round(6).groupby(own["Origin"]).first()
    prices = read_prices(folder)
    calendar = sorted(set().union(*[frame.index for frame in prices.values()]))
    cuts = [day for day in calendar if day >= pd.Timestamp("2021-07-01")][::60]
    for cut in cuts[:2]:
        moves = []
        for frame in prices.values():
            stop = int(frame.index.searchsorted(cut)) - 6
            moves += np.diff(np.log(frame["Close"].to_numpy()))[30 : max(30, stop)].tolist()
        assert drift[cut] == pytest.approx(np.mean(moves), abs=2e-6)
    assert drift.nunique() >= 2


def test_a_language_model_is_scored_on_days_it_never_saw(folder, weights, tiny_model, tmp_path):
    settings = settings_for(
        folder, tmp_path / "b", start=None, models=["ewma", "llm"], lora_weights=[weights], model_path=[tiny_model],
        device="cpu", dtype="float32",
    )  # fmt: skip
    assert run_backtest(settings) == 0
    forecasts = pd.read_csv(tmp_path / "b" / "forecasts.csv.gz", parse_dates=["Origin"])
    assert forecasts["Origin"].min() == pd.Timestamp("2021-09-01")
    assert set(forecasts["Model"]) == {"naive", "ewma", "llm"}
    report = (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
    assert "training text" in report  # what the base model may remember
    with pytest.raises(UserError, match="learned from means nothing"):
        run_backtest(dataclasses.replace(settings, start="2021-08-02"))


def test_its_forecasts_are_those_of_the_forecasting_script(folder, weights, tiny_model, tmp_path, call_script):
    """One pass over the test days and a forecast from a table that ends there agree."""
    settings = settings_for(
        folder, tmp_path / "b", start=None, models=["llm"], lora_weights=[weights], model_path=[tiny_model],
        device="cpu", dtype="float32",
    )  # fmt: skip
    run_backtest(settings)
    forecasts = pd.read_csv(tmp_path / "b" / "forecasts.csv.gz", parse_dates=["Origin"])
    origin = pd.Timestamp("2021-11-15")
    cut = tmp_path / "cut"
    cut.mkdir()
    for ticker, frame in read_prices(folder).items():
        if frame.index[0] < pd.Timestamp("2021-01-01"):
            write_prices({ticker: frame[frame.index <= origin]}, cut / f"{ticker}.csv", META)
    result = call_script(
        "framework_llm.py", "--test_csv", cut, "--lora_weights", weights, "--model_path", tiny_model, "--device", "cpu",
        "--dtype", "float32", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    predicted = pd.read_csv(tmp_path / "predictions.csv")
    own = forecasts[(forecasts["Model"] == "llm") & (forecasts["Origin"] == origin)]
    both = predicted.merge(own, on=["Ticker", "Day"], suffixes=("", "_backtest"))
    assert len(both) == 15
    # The market and the length of the sequence differ a little (a ticker that was listed later), the model not.
    np.testing.assert_allclose(both["P50"], both["P50_backtest"], rtol=2e-3)
    np.testing.assert_allclose(both["P90"], both["P90_backtest"], rtol=4e-3)


def test_refits_of_the_learned_models(folder, weights, tiny_model, tmp_path):
    settings = settings_for(
        folder, tmp_path / "b", models=["simple", "llm"], lora_weights=[weights], model_path=[tiny_model],
        device="cpu", dtype="float32", refit="80", start="2021-06-01", end="2021-11-30",
    )  # fmt: skip
    assert run_backtest(settings) == 0
    metrics = pd.read_csv(tmp_path / "b" / "metrics.csv")
    pooled = metrics[metrics["Ticker"] == "(all)"].set_index(["Model", "Day"])
    for model in ("simple", "llm"):  # random prices: nobody beats the last close, nobody is far off
        assert 0.95 < pooled.loc[(model, 1), "Relative_MAE"] < 1.15


def test_a_stopped_run_goes_on_and_ends_the_same(folder, whole_run, tmp_path, monkeypatch):
    out = tmp_path / "backtest"
    real, calls = Baselines.quantiles, []

    def stops(self, ticker, frame, origins):
        calls.append(ticker)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, ticker, frame, origins)

    monkeypatch.setattr(Baselines, "quantiles", stops)
    with pytest.raises(UserError, match="--resume"):
        run_backtest(settings_for(folder, out))
    assert not (out / "metrics.csv").exists()
    monkeypatch.setattr(Baselines, "quantiles", real)
    with pytest.raises(UserError, match="another seed"):
        run_backtest(settings_for(folder, out, resume=True, seed=7))
    again = []
    monkeypatch.setattr(Baselines, "quantiles", lambda self, *rest: again.append(rest[0]) or real(self, *rest))
    assert run_backtest(settings_for(folder, out, resume=True)) == 0
    assert again == ["T3", "T4", "T5"]
    assert outputs(out) == outputs(whole_run)


def test_two_processes_give_identical_results(folder, whole_run, tmp_path, repo_root, nursery):
    launch = [ACCELERATE_LAUNCH, "--cpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    script = [str(repo_root / "backtest.py"), "--data", str(folder), "--from", "2021-07-01", "--output_dir", "backtest",
              "--forecasts_format", "csv"]  # fmt: skip
    launcher = ForkedScript(nursery, *launch, *script, cwd=tmp_path, printed=tmp_path / "printed")
    printed = launcher.stdout.read()
    assert launcher.wait(300) == 0, launcher.stderr.read_text()[-2000:]
    assert printed.count("Mean of 1 to 3 days ahead") == 1
    assert outputs(tmp_path / "backtest") == outputs(whole_run)


def test_one_file_or_a_folder_is_the_same(folder, whole_run, tmp_path):
    write_prices(read_prices(folder), tmp_path / "all.csv", META)
    assert run_backtest(settings_for(tmp_path / "all.csv", tmp_path / "backtest")) == 0
    ours, theirs = outputs(tmp_path / "backtest"), outputs(whole_run)
    assert ours["metrics.csv"] == theirs["metrics.csv"]
    assert ours["forecasts.csv.gz"] == theirs["forecasts.csv.gz"]


def test_parquet_holds_what_the_csv_holds(folder, whole_run, tmp_path):
    pytest.importorskip("pyarrow")
    assert run_backtest(settings_for(folder, tmp_path / "backtest", forecasts_format="parquet")) == 0
    packed = pd.read_parquet(tmp_path / "backtest" / "forecasts.parquet")
    plain = pd.read_csv(whole_run / "forecasts.csv.gz")
    assert list(packed.columns) == list(plain.columns)
    np.testing.assert_allclose(packed["P95"], plain["P95"], rtol=1e-6)
    assert [str(day) for day in packed["Date"]] == plain["Date"].tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no price file"),
        (["--data", "none.csv"], "no such file"),
        (["--data", "{folder}", "--models", "llm"], "needs --lora_weights"),
        (["--data", "{folder}", "--lora_weights", "a.pth"], "add it: --models"),
        (["--data", "{folder}", "--models", "llm", "--lora_weights", "a.pth"], "no weights file a.pth"),
        (["--data", "{folder}", "--from", "tomorrow-ish"], "is not a date"),
        (["--data", "{folder}", "--from", "2035-01-01"], "no prices between"),
        (["--data", "{folder}", "--from", "2020-02-01"], "days to fit on"),
        (["--data", "{folder}", "--window_size", "600"], "days to fit on"),
        (["--data", "{folder}", "--to", "2020-02-01", "--from", "2021-02-01"], "no prices between"),
        (["--data", "{folder}", "--refit", "often"], "--refit often"),
        (["--data", "{folder}", "--base_cutoff", "long ago"], "is not a date"),
        (["--data", "{folder}", "--tickers", "NONE"], "no prices of NONE"),
        (["--data", "{folder}", "--show", "NONE"], "no such ticker"),
        (["--data", "{folder}", "--models", "best"], "invalid choice"),
        (["--data", "{folder}", "--train_days", "0"], "must be above 0"),
    ],
)
def test_mistakes_are_one_line(options, words, folder, tmp_path, capsys):
    import backtest

    try:
        code = backtest.main([str(folder) if option == "{folder}" else option for option in
                              [*options, "--output_dir", str(tmp_path / "out")]])  # fmt: skip
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    errors = capsys.readouterr().err
    assert code == 2
    assert words in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_failed_run_leaves_the_last_report(folder, whole_run, tmp_path):
    out = tmp_path / "backtest"
    shutil.copytree(whole_run, out)
    with pytest.raises(UserError):
        run_backtest(settings_for(folder, out, start="2035-01-01"))
    assert outputs(out) == outputs(whole_run)


def test_base_models_whose_training_text_ends_late_are_said_to_remember():
    from stocklora.backtest.prepare import cutoff_of

    assert cutoff_of("openai-community/gpt2") == (pd.Timestamp("2017-12-31"), True)
    assert cutoff_of("meta-llama/Llama-3.2-1B") == (pd.Timestamp("2023-12-31"), True)
    assert cutoff_of("Qwen/Qwen2.5-0.5B") == (pd.Timestamp("2024-09-19"), False)  # not Qwen2's
    assert cutoff_of("somebody/new-model") is None
