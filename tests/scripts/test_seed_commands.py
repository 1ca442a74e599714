"""Every documented command of the forecasting track, word for word, in one folder, against local servers."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hub_server import COMMIT, serving_hub
from source_tree import REPO_ROOT, RunScript
from yahoo_server import Stock, YahooServer, made_up_bars

from stocklora.prices.calendar import sessions_between

DOWNLOADS = """
python download_model.py --model gpt2-medium --save_dir ./models
python download_model.py --model Qwen/Qwen3-0.6B --save_dir ./Qwen3-0.6B
python download.py
python download.py --ticker AAPL --period 1y
python download.py --ticker AAPL --period 1y --output sample_test.csv
"""
SIMPLE = """
python train.py --data sample_test.csv --epochs 100
python framework.py --model_path model.pth --test_csv sample_test.csv
"""
GPT2 = """
python train_lora.py --data sample_test.csv --model_path ./models/gpt2-medium --epochs 20 --batch_size 4 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 16.0 --save_dir ./checkpoints
python framework_llm.py --test_csv sample_test.csv --model_path ./models/gpt2-medium --lora_weights ./checkpoints/best_lora_weights.pth --output predictions.csv
"""  # noqa: E501
QWEN = """
python train_lora.py --data sample_test.csv --model_path ./Qwen3-0.6B --epochs 20 --batch_size 4 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 16.0
python framework_llm.py --test_csv sample_test.csv --model_path ./Qwen3-0.6B --lora_weights ./checkpoints/best_lora_weights.pth --output predictions.csv
"""  # noqa: E501


@pytest.fixture(scope="module")
def user(tmp_path_factory, run_script: RunScript, call_script: RunScript, tiny_models):
    """A user's folder, Yahoo and a hub; calls run documented lines in it and return what was printed."""
    folder = tmp_path_factory.mktemp("user")
    yahoo = YahooServer().start()
    today = pd.Timestamp.now().normalize()
    days = sessions_between("AAPL", today - pd.DateOffset(years=2), today - pd.Timedelta(days=2))
    yahoo.plans["AAPL"] = Stock(made_up_bars(days))
    with serving_hub() as hub:
        for name, family in (("gpt2-medium", "shallow_gpt2"), ("Qwen/Qwen3-0.6B", "shallow_qwen3")):
            files = {path.name: path.read_bytes() for path in tiny_models[family].iterdir() if path.is_file()}
            hub.models[name] = {COMMIT: files}
        env = {
            "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / ".home"), "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1", "STOCKLORA_YAHOO_URL": yahoo.url, "STOCKLORA_CACHE": str(folder / ".cache"),
        }  # fmt: skip

        def run(commands: str, start: RunScript = call_script) -> str:
            printed = ""
            for command in commands.strip().splitlines():
                python, script, *options = shlex.split(command)
                assert python == "python"
                result = start(script, *options, cwd=folder, env=env)
                assert result.returncode == 0, (command, result.stdout, result.stderr)
                printed += result.stdout
            return printed

        run(DOWNLOADS, run_script)  # the hub's address is read when a library is imported
        yield folder, run
    yahoo.stop()


def test_downloads(user):
    folder, _ = user
    assert (folder / "models/gpt2-medium/config.json").exists()
    assert (folder / "Qwen3-0.6B/config.json").exists()
    assert len(pd.read_csv(folder / "sample_test.csv")) > 240


def test_simple_model(user):
    folder, run = user
    printed = run(SIMPLE)
    assert "trainable parameters" in printed.lower()
    assert "peak memory" in printed.lower()
    assert len(pd.read_csv(folder / "predictions.csv")) == 3


@pytest.mark.parametrize("commands", [GPT2, QWEN], ids=["gpt2-medium", "Qwen3-0.6B"])
def test_language_model(user, commands):
    folder, run = user
    (folder / "predictions.csv").unlink(missing_ok=True)
    run(commands)
    assert (folder / "checkpoints/best_lora_weights.pth").exists()
    assert len(pd.read_csv(folder / "predictions.csv")) == 3


def test_requirements_are_met_by_this_environment():
    # `pip install -r` as documented, without a network: everything asked for is here already.
    result = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-r", str(REPO_ROOT / "requirements.txt"),
         "-r", str(REPO_ROOT / "requirements_stable.txt")],
        cwd=Path.home(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Would install" not in result.stdout
