"""Hours of use in small: download from a server that flaps, train, be killed, resume, forecast, serve, again and again.

One round runs with the tests; ``make soak`` goes on for an hour (``STOCKLORA_SOAK`` seconds). After every round prices
are whole, forecasts those of an undisturbed run, and no process has grown.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
import pytest
from script_calls import ForkedScript
from source_tree import REPO_ROOT, RunScript
from yahoo_server import BROKEN, DOWN, TOO_MANY, Stock, YahooServer, made_up_bars

from stocklora.prices.calendar import sessions_between
from stocklora.prices.tables import read_prices

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are killed")

SECONDS = float(os.environ.get("STOCKLORA_SOAK", "0"))
TRAIN = ("train_lora.py", "--data", "AAPL.csv", "--epochs", 4, "--checkpoint_every", 1, "--device", "cpu",
         "--dtype", "float32")  # fmt: skip
MOST_GROWTH_BYTES = 150e6


@pytest.fixture(scope="module")
def chat(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, nursery: Any
) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a chat server that lives through all rounds, and its process."""
    folder = tmp_path_factory.mktemp("chat")
    script = ForkedScript(
        nursery, REPO_ROOT / "inference_lora.py", "--base_model", tiny_model, "--serve", "--port", 0, "--device", "cpu",
        cwd=folder, printed=folder / "printed", together=True,
    )  # fmt: skip
    address = next(found[1] for line in script.stdout if (found := re.search(r"serving (http://\S+)", line)))
    yield address, psutil.Process(script.process.pid)
    script.end()


def test_prices_weights_forecasts_and_memory_hold(
    server: YahooServer,
    chat: tuple[str, psutil.Process],
    tiny_model: Path,
    call_script: RunScript,
    tmp_path: Path,
    nursery: Any,
) -> None:
    draw, end, rounds, kills, sizes = random.Random(18), time.monotonic() + SECONDS, 0, 0, []
    today = pd.Timestamp.now().normalize()
    days = sessions_between("AAPL", today - pd.DateOffset(years=1), today - pd.Timedelta(days=2))
    bars = made_up_bars(days)
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    while not rounds or time.monotonic() < end:
        folder = tmp_path / f"round {rounds}"
        folder.mkdir()
        _download(server, bars, call_script, folder, draw)
        if not rounds:
            (quiet / "AAPL.csv").write_bytes((folder / "AAPL.csv").read_bytes())
            result = call_script(*TRAIN, "--model_path", tiny_model, cwd=quiet)
            assert result.returncode == 0, result.stderr
            _forecast(call_script, tiny_model, quiet)
        kills += _train(nursery, call_script, tiny_model, folder, draw)
        _forecast(call_script, tiny_model, folder)
        assert (folder / "predictions.csv").read_bytes() == (quiet / "predictions.csv").read_bytes()
        _talk(chat[0])
        sizes.append((psutil.Process().memory_info().rss, chat[1].memory_info().rss))
        rounds += 1
        print(f"round {rounds}: {kills} kills, {sizes[-1][0] / 1e6:.0f} and {sizes[-1][1] / 1e6:.0f} MB", flush=True)
    for first, last in zip(sizes[min(2, rounds - 1)], sizes[-1], strict=True):  # the first rounds import
        assert last - first < MOST_GROWTH_BYTES
    assert kills >= 1


def _download(
    server: YahooServer, bars: pd.DataFrame, call_script: RunScript, folder: Path, draw: random.Random
) -> None:
    """From a server that refuses, breaks and lies down in between; a run that gives up leaves what was there."""
    path = folder / "AAPL.csv"
    options = ("--ticker", "AAPL", "--period", "1y", "--output", path, "--retry_wait_s", 0.01, "--retries", 2)
    env = {"STOCKLORA_YAHOO_URL": server.url, "STOCKLORA_CACHE": str(folder / "cache")}
    for attempt in range(6):
        faults = [draw.choice([BROKEN, TOO_MANY, DOWN]) for _ in range(draw.randint(0, 4) if attempt < 5 else 0)]
        server.plans["AAPL"] = [*faults, Stock(bars)] if attempt else [BROKEN]
        before = path.read_bytes() if path.exists() else None
        result = call_script("download.py", *options, cwd=folder, env=env)
        if result.returncode == 0:
            break
        assert result.returncode == 2, result.stderr
        assert (path.read_bytes() if path.exists() else None) == before
    assert len(read_prices(path)["AAPL"]) > 200


def _train(nursery: Any, call_script: RunScript, model: Path, folder: Path, draw: random.Random) -> int:
    """Kill a run at some moment, take it up, until it ends; how often it was killed."""
    kills, resume = 0, ()
    while kills < 1 + draw.randint(0, 1):
        command = (REPO_ROOT / TRAIN[0], *TRAIN[1:], "--model_path", model, *resume)
        script = ForkedScript(nursery, *command, cwd=folder, printed=folder / f"printed-{kills}", together=True)
        patience = time.monotonic() + 120
        last = folder / "checkpoints" / "last"
        while script.process.is_alive() and not any(last.glob("*state-*")) and time.monotonic() < patience:
            time.sleep(0.01)  # until a state is there, or begun
        time.sleep(draw.random() * 0.2)
        script.end()
        kills += 1
        resume = ("--resume",)
    result = call_script(*TRAIN, "--model_path", model, *resume, cwd=folder)
    assert result.returncode == 0, result.stderr
    return kills


def _forecast(call_script: RunScript, model: Path, folder: Path) -> None:
    result = call_script("framework_llm.py", "--test_csv", "AAPL.csv", "--model_path", model, "--device", "cpu",
                         "--dtype", "float32", "--no-ledger", cwd=folder)  # fmt: skip
    assert result.returncode == 0, result.stderr


def _talk(address: str) -> None:
    """Some answers, streams that are left, and nonsense."""
    name = httpx.get(f"{address}/models").json()["data"][0]["id"]
    body: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 8}
    for number in range(12):
        if number % 3 == 2:
            assert httpx.post(f"{address}/chat/completions", content=b"{" * number, timeout=60).status_code == 400
            continue
        with httpx.stream("POST", f"{address}/chat/completions", json=body | {"stream": True}, timeout=60) as answer:
            assert answer.status_code == 200
            for _ in answer.iter_lines():
                if number % 2:
                    break
