"""train_lora.py, framework_llm.py and quick_start.py as a user runs them, with right input and wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from price_tables import random_prices
from source_tree import RunScript

from stocklora.forecaster.weights import load_weights
from stocklora.prices.calendar import sessions_between
from stocklora.prices.tables import write_prices
from stocklora.volatility.prior import fit_prior, load_prior

pytestmark = pytest.mark.usefixtures("undrawn")

COLUMNS = "Ticker,Origin,Date,Day,Last_Close,Predicted_Close,P05,P10,P25,P50,P75,P90,P95"
META = {"source": "test", "adjust": "all", "interval": "1d"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script: RunScript, tiny_model: Path, sample_csv: Path) -> tuple[Path, str]:
    """A folder with a short run's checkpoints, and what the run printed."""
    folder = tmp_path_factory.mktemp("trained")
    result = run_script("train_lora.py", "--data", sample_csv, "--model_path", tiny_model, "--epochs", 1, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def error_line(result) -> str:
    assert result.returncode == 2, (result.stdout, result.stderr)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")
    return errors[0]


def test_training_announces_itself_and_reports_beside_the_random_walk(trained):
    folder, printed = trained
    for word in ("parameters", "trainable", "tokens a day", "sequences", "tokens an epoch", "memory expected"):
        assert word in printed
    for word in ("MAE", "RMSE", "MAPE", "direction", "pinball", "80% covers", "last close (random walk)", "this model"):
        assert word in printed
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "best_lora_weights.pth", "training_history.csv", "training_curve.png",
    }  # fmt: skip
    assert (folder / "checkpoints/training_curve.png").read_bytes()[:4] == b"\x89PNG"


def test_weights_load_as_plain_data_and_hold_the_metadata(trained, tiny_model):
    folder, _ = trained
    raw = torch.load(folder / "checkpoints/best_lora_weights.pth", weights_only=True)
    assert raw["spec"]["base_model"]["config_sha256"]
    assert raw["spec"]["window_size"] == 30
    assert raw["spec"]["lora"]["rank"] == 8
    training = raw["training"]
    assert training["seed"] == 42
    assert training["data"]["tickers"] == ["AAPL"]
    assert len(training["data"]["sha256"]) == 64
    assert set(training["test_scores"]) == {"naive", "drift", "ewma", "har", "harx", "prior", "model"}
    assert "torch" in training["versions"]


def test_the_forecast_is_three_real_sessions_with_ordered_quantiles(trained, call_script, tiny_model, sample_csv):
    folder, _ = trained
    result = call_script(
        "framework_llm.py", "--test_csv", sample_csv, "--model_path", tiny_model, "--plot", "chart.png", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    for word in ("trainable parameters", "peak memory", "2013-03-04", "80% from"):
        assert word in result.stdout
    text = (folder / "predictions.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    table = pd.read_csv(folder / "predictions.csv", parse_dates=["Origin", "Date"])
    assert table["Date"].tolist() == list(pd.to_datetime(["2013-03-04", "2013-03-05", "2013-03-06"]))
    assert (table["Origin"] == pd.Timestamp("2013-03-01")).all()
    assert table["Day"].tolist() == [1, 2, 3]
    quantiles = table[["P05", "P10", "P25", "P50", "P75", "P90", "P95"]].to_numpy()
    assert (np.diff(quantiles, axis=1) > 0).all()
    assert (table["Predicted_Close"] == table["P50"]).all()
    # Days further ahead are less certain, and no honest forecast of AAPL strays far from the last close.
    assert (np.diff(table["P90"] - table["P10"]) > 0).all()
    assert ((table["Predicted_Close"] / table["Last_Close"] - 1).abs() < 0.03).all()
    assert (folder / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_many_tickers_are_trained_and_forecast_together(call_script, tiny_models, tmp_path):
    days = sessions_between("AAA", "2022-01-03", "2022-12-30")
    frames = {f"T{index}": random_prices(len(days), index).set_index(days) for index in range(5)}
    write_prices(frames, tmp_path / "many.csv", META)
    options = ["--model_path", tiny_models["gpt2"]]
    result = call_script("train_lora.py", "--data", "many.csv", *options, "--epochs", 1, "--prompt", "returns",
                        "--tickers", "T0", "T1", "T2", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "T0, T1, T2" in result.stdout
    result = call_script("framework_llm.py", "--test_csv", "many.csv", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table["Ticker"].tolist() == [name for name in frames for _ in range(3)]
    # One batch or one by one: the same forecast, for the market is every ticker in the file.
    result = call_script("framework_llm.py", "--test_csv", "many.csv", "--tickers", "T3", "--output", "one.csv",
                        *options, cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    alone = pd.read_csv(tmp_path / "one.csv").drop(columns=["Ticker", "Origin", "Date"]).to_numpy()
    together = table[table["Ticker"] == "T3"].drop(columns=["Ticker", "Origin", "Date"]).to_numpy()
    np.testing.assert_allclose(alone, together, rtol=2e-3)


def test_the_documents_prompt_trains_and_forecasts(call_script, tiny_models, sample_csv, tmp_path):
    options = ["--model_path", tiny_models["llama"]]
    result = call_script("train_lora.py", "--data", sample_csv, *options, "--prompt", "ohlcv", "--epochs", 1,
                        "--max_tokens_per_sequence", 3000, cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    result = call_script("framework_llm.py", "--test_csv", sample_csv, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def trained_for_nothing(call_script, tiny_model, sample_csv, folder, *options):
    """What the weights file of no epoch says, and what the run printed."""
    result = call_script(
        "train_lora.py", "--data", sample_csv, "--model_path", tiny_model, "--epochs", 0, *options, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "checkpoints/best_lora_weights.pth", weights_only=True), result.stdout


def test_training_starts_from_the_prior_that_it_is_told(call_script, tiny_model, sample_csv, tmp_path):
    given = (call_script, tiny_model, sample_csv, tmp_path)
    content, printed = trained_for_nothing(*given, "--scale", "prior")
    made_from = load_prior().made_from
    assert content["spec"]["scale"]["kind"] == "prior"
    assert content["training"]["data"]["prior"] == {key: made_from[key] for key in made_from if key != "markets"}
    assert "scaled by the market prior's volatility, moved by the training days" in printed
    assert "random walk, market prior" in printed  # its row
    fit_prior({"one": {f"T{seed}": random_prices(300, seed) for seed in range(2)}}).save(tmp_path / "mine.json")
    other, printed = trained_for_nothing(*given, "--scale", "prior", "--prior", "mine.json")
    assert other["training"]["data"]["prior"]["tickers"] == 2
    assert other["spec"]["scale"]["coefficients"] != content["spec"]["scale"]["coefficients"]
    content, printed = trained_for_nothing(*given, "--prior", "none")
    assert content["spec"]["scale"]["kind"] in ("ewma", "har", "harx")
    assert "prior" not in content["training"]["data"]
    assert set(content["training"]["test_scores"]) == {"naive", "drift", "ewma", "har", "harx", "model"}
    assert "market prior" not in printed


def test_weights_that_start_from_a_prior_forecast_without_its_file(call_script, tiny_model, sample_csv, tmp_path):
    fit_prior({"one": {f"T{seed}": random_prices(300, seed) for seed in range(2)}}).save(tmp_path / "mine.json")
    trained_for_nothing(call_script, tiny_model, sample_csv, tmp_path, "--scale", "prior", "--prior", "mine.json")
    (tmp_path / "mine.json").unlink()
    result = call_script("framework_llm.py", "--test_csv", sample_csv, "--model_path", tiny_model, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 3


def test_a_config_file_speaks_and_flags_win(call_script, tiny_model, sample_csv, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"data: ['{sample_csv}']\nmodel_path: '{tiny_model}'\nepochs: 0\nlora_rank: 4\nsave_dir: here\n"
    )
    result = call_script("train_lora.py", "--config", "run.yaml", "--lora_rank", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert load_weights(tmp_path / "here/best_lora_weights.pth").spec.lora["rank"] == 2
    (tmp_path / "run.yaml").write_text("lora_rnak: 4\n")
    assert "did you mean 'lora_rank'?" in error_line(call_script("train_lora.py", "--config", "run.yaml", cwd=tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --data"),
        (["--data", "SAMPLE", "--model_path", "nowhere"], "no model at nowhere; run: python download_model.py"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--target_modules", "q_proj", "nonsense"], "nonsense"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--window_size", "240"], "too few days"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--tickers", "TSLA"], "no prices of TSLA"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--epochs", "-1"], "--epochs must be 0 or more"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--lora_rank", "0"], "--lora_rank must be above 0"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--learning_rate", "-1"], "--learning_rate must be above 0"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--test_from", "1999-01-01"], "must lie in order"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--seed", "-1"], "--seed must be from 0"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--save_dir", "/dev/null/x"], "cannot write into --save_dir"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--backbone_layers", "9"], "has 2 layers"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--targets_per_sequence", "400", "--epochs", "0"], None),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--device", "cuda"], "--device cuda"),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--scale", "prior", "--prior", "none"], "drop one of the two"),
        (
            ["--data", "SAMPLE", "--model_path", "MODEL", "--prior", "nowhere.json"],
            "--prior nowhere.json: No such file",
        ),
        (["--data", "SAMPLE", "--model_path", "MODEL", "--prior", "SAMPLE"], "make it anew with scripts/make_prior.py"),
    ],
)
def test_mistakes_in_training_are_one_line_and_write_nothing(
    call_script, tiny_model, sample_csv, tmp_path, options, message
):
    if message == "--device cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    given = [{"SAMPLE": sample_csv, "MODEL": tiny_model}.get(option, option) for option in options]
    result = call_script("train_lora.py", *given, cwd=tmp_path)
    if message is None:  # more targets than days only means one sequence: no mistake
        assert result.returncode == 0, result.stderr
        return
    assert message in error_line(result)
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_beyond_the_context_is_an_error_not_a_cut(call_script, tiny_models, sample_csv, tmp_path):
    options = ["--data", sample_csv, "--model_path", tiny_models["gpt2"], "--targets_per_sequence", 100]
    assert "lower --targets_per_sequence" in error_line(call_script("train_lora.py", *options, cwd=tmp_path))
    options = ["--data", sample_csv, "--model_path", tiny_models["gpt2"], "--prompt", "ohlcv"]
    assert "lower --window_size or use --prompt words" in error_line(
        call_script("train_lora.py", *options, cwd=tmp_path)
    )


def test_a_failed_run_leaves_the_previous_artefacts(trained, call_script, tiny_model, sample_csv, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    (tmp_path / "bad.csv").write_text("Date,Open,High,Low,Close,Volume\n2024-01-02,1,2,3,x,5\n")
    error_line(call_script("train_lora.py", "--data", "bad.csv", "--model_path", tiny_model, cwd=tmp_path))
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


class Evil:
    def __reduce__(self):
        return (Path("ran_code").touch, ())


def damaged_weights(kind: str, good: Path, path: Path) -> None:
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:5000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "code inside torch":
        torch.save({"format": "stocklora-forecaster", "x": Evil()}, path)
    elif kind == "foreign":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "newer":
        torch.save({**torch.load(good, weights_only=True), "format_version": 99}, path)
    elif kind == "incomplete":
        content = torch.load(good, weights_only=True)
        del content["head"]
        torch.save(content, path)
    elif kind == "other shape":
        content = torch.load(good, weights_only=True)
        content["adapters"].popitem()
        torch.save(content, path)


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "code", "code inside torch", "foreign", "newer", "incomplete", "other shape"]
)
def test_damaged_weights_are_one_line_and_never_run_code(trained, call_script, tiny_model, sample_csv, tmp_path, kind):
    damaged_weights(kind, trained[0] / "checkpoints/best_lora_weights.pth", tmp_path / "weights.pth")
    (tmp_path / "predictions.csv").write_text("old")
    result = call_script("framework_llm.py", "--test_csv", sample_csv, "--model_path", tiny_model,
                        "--lora_weights", "weights.pth", cwd=tmp_path)  # fmt: skip
    assert "weights.pth" in error_line(result)
    assert (tmp_path / "predictions.csv").read_text() == "old"
    assert not (tmp_path / "ran_code").exists()


def test_mistakes_in_forecasting_are_one_line(trained, call_script, tiny_models, sample_csv, tmp_path):
    folder, _ = trained
    weights = folder / "checkpoints/best_lora_weights.pth"

    def error_of(*options: object) -> str:
        return error_line(call_script("framework_llm.py", *options, cwd=tmp_path))

    good = ["--test_csv", sample_csv, "--lora_weights", weights]
    assert "is another model" in error_of(*good, "--model_path", tiny_models["llama"])
    assert "trained with a window of 30 days" in error_of(
        *good, "--model_path", tiny_models["qwen3"], "--window_size", 20
    )
    assert "no weights file" in error_of("--test_csv", sample_csv, "--model_path", tiny_models["qwen3"])
    write_prices({"X": random_prices(30)}, tmp_path / "short.csv", META)
    assert "a forecast needs 31" in error_of(
        "--test_csv", "short.csv", "--lora_weights", weights, "--model_path", tiny_models["qwen3"]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"short.csv", "short.csv.meta.json"}


def test_quick_start_tells_the_whole_story(call_script, tiny_model, tmp_path):
    result = call_script("quick_start.py", "--model_path", tiny_model, "--epochs", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for step in range(1, 6):
        assert f"[{step}/5]" in result.stdout
    assert "read from the text  R² " in result.stdout
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    assert made == {"sample_test.csv", "sample_test.csv.meta.json", "checkpoints", "predictions.csv", "forecast.png",
                    "backtest.png"}  # fmt: skip
    assert len(pd.read_csv(tmp_path / "demo/predictions.csv")) == 3
    assert json.loads((tmp_path / "demo/sample_test.csv.meta.json").read_text())["source"] == "sample"
