"""What a script meets outside its files: no home, no /tmp, no working folder, a clock that jumps, an early Ctrl-C."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and folders as Unix has them")

COMMAND = ("download.py", "--source", "sample", "--ticker", "AAPL", "--period", "1y")
# Sends itself Ctrl-C at the n-th import, as a user would at any moment of the first second.
STOPPED = """
import os, runpy, signal, sys
number, sys.argv = int(sys.argv[1]), sys.argv[2:]
seen = 0
def hook(event, arguments):
    global seen
    if event == "import" and (seen := seen + 1) == number:
        os.kill(os.getpid(), signal.SIGINT)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
sys.addaudithook(hook)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Once more while the word is written, or when Python waits for a thread at its end.
AGAIN = """
import sys, threading, time
when = sys.argv.pop(1)
def ask():
    os.kill(os.getpid(), signal.SIGINT)
class Answer:
    def write(self, text):
        sys.__stderr__.write(text)
        if "interrupted" in text:
            ask()
    def flush(self):
        sys.__stderr__.flush()
def late():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    for _ in range(120):  # one that comes as Python begins to wait for its threads is not seen
        ask()
        time.sleep(0.5)
if when == "end":
    threading.Thread(target=late).start()
else:
    sys.stderr = Answer()
"""


def test_a_working_folder_that_is_gone_is_one_line(repo_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    script, *arguments = COMMAND
    stay = f"cd {folder} && rmdir {folder} && exec {sys.executable} {repo_root / script} {' '.join(arguments)}"
    result = subprocess.run(["sh", "-c", stay], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "cannot write sample_test.csv" in result.stderr


def test_neither_home_nor_tmp_is_needed(repo_root: Path, tmp_path: Path) -> None:
    nowhere = {"HOME": "/proc/1/nowhere", "TMPDIR": "/proc/1/nowhere", "XDG_CACHE_HOME": "/proc/1/nowhere"}
    script, *arguments = COMMAND
    result = subprocess.run(
        [sys.executable, str(repo_root / script), *arguments],
        cwd=tmp_path, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "sample_test.csv").is_file()
    assert result.stderr == ""


def test_a_tmp_that_is_full_is_one_line(repo_root: Path, sample_csv: Path, tmp_path: Path) -> None:
    """For the one script that writes its scratch there; the others write beside what they make."""
    try:
        subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, str(repo_root / "backtest.py"), "--data", str(sample_csv), "--models", "prior"]
    full = f"mount -t tmpfs -o size=8k none tmp && exec {shlex.join([*command, '--check-leakage'])}"
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", full], cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "No space left on device" in result.stderr


@pytest.mark.parametrize("number", [25, 100, 400, 700])
def test_ctrl_c_while_importing_is_one_word_and_leaves_nothing(number: int, repo_root: Path, tmp_path: Path) -> None:
    script, *arguments = COMMAND
    command = [sys.executable, "-c", STOPPED, str(number), str(repo_root / script), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode in (130, -signal.SIGINT), result.stderr
    assert result.stderr == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "when"), [(100, "end"), (700, "word"), (700, "end")])
def test_ctrl_c_amid_the_answer_to_ctrl_c_is_quiet(number: int, when: str, repo_root: Path, tmp_path: Path) -> None:
    script, *arguments = COMMAND
    command = [sys.executable, "-c", AGAIN + STOPPED, when, str(number), str(repo_root / script), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == 130, result.stderr
    assert result.stderr.strip() in ("", "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_jumps_back_makes_no_entry_fresh(tmp_path: Path) -> None:
    import datetime as dt

    from price_tables import random_prices

    from stocklora.prices.sources.fetch import PriceCache
    from stocklora.prices.sources.request import Answer, Request

    now, hour = dt.datetime(2026, 1, 5, 12, tzinfo=dt.UTC), dt.timedelta(hours=1)
    cache, request = PriceCache(tmp_path), Request()
    cache.put("yahoo", "AAPL", request, Answer(random_prices(30, seed=1), now, fresh_until=now + hour))
    assert cache.get("yahoo", "AAPL", request, now) is not None
    assert cache.get("yahoo", "AAPL", request, now - hour) is None
    assert cache.get("yahoo", "AAPL", request, now + 1000 * hour) is None
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps_while_a_download_waits_changes_no_wait(years: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on the wall, that is: each wait is as long as it was going to be, by the clock that never jumps."""
    import random
    import time
    from types import SimpleNamespace

    from stocklora.prices.sources import fetch
    from stocklora.prices.sources.request import Request, SourceError

    steady, wall, asked = [100.0], [time.time()], []

    def sleep(seconds: float) -> None:
        assert 0 < seconds <= 0.5
        assert steady[0] < 200.0, "it waits for ever"
        steady[0] += seconds
        wall[0] += seconds + years * 365 * 86400

    def once(ticker: str, request: Request) -> Any:
        asked.append(steady[0])
        if len(asked) < 3:
            raise SourceError("rate", "429", 7.0 * len(asked))
        return "answer"

    monkeypatch.setattr(fetch.time, "sleep", sleep)
    monkeypatch.setattr(fetch.time, "monotonic", lambda: steady[0])
    monkeypatch.setattr(fetch.time, "time", lambda: wall[0])
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    patience = fetch.Patience(retries=4, wait_s=1.0)
    assert patience.fetch(SimpleNamespace(fetch=once), "AAPL", Request()) == "answer"  # type: ignore[arg-type]
    assert [round(later - earlier, 6) for earlier, later in itertools.pairwise(asked)] == [7.0, 14.0]
