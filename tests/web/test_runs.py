"""Runs outlive the server that started them, and say how they ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from source_tree import REPO_ROOT
from web_workspaces import end_runs, write_sample

from stocklora.cli.console import UserError
from stocklora.web.reports import training_curve
from stocklora.web.runs import Runs
from stocklora.web.workspace import Workspace

STARTER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from stocklora.web.runs import Runs
from stocklora.web.workspace import Workspace
run = Runs(Workspace(Path(sys.argv[1]), Path(sys.argv[1]))).start("framework_llm", {{"test_csv": ["pipe.csv"]}})
print(run["id"], flush=True)
time.sleep(60)
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    found = Runs(Workspace(tmp_path, tmp_path))
    yield found
    end_runs(tmp_path)


def wait_for(found: Callable[[], bool], within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def ended(runs: Runs, name: str) -> dict:
    wait_for(lambda: runs.describe(name)["state"] != "running")
    return runs.describe(name)


def test_a_run_is_told_by_its_folder(runs: Runs) -> None:
    write_sample(runs.workspace.root, "AAPL")
    first = runs.start("framework", {"model_path": "prior", "test_csv": ["prices/AAPL.csv"]})
    second = runs.start("framework", {"model_path": "nowhere.pth"})
    done, failed = ended(runs, first["id"]), ended(runs, second["id"])
    assert (done["state"], done["code"]) == ("done", 0)
    assert (runs.workspace.root / "predictions.csv").exists()
    assert "framework.py --test_csv prices/AAPL.csv --model_path prior" in done["command"]
    assert done["command"].startswith(f"cd {runs.workspace.root}\n")
    assert (failed["state"], failed["code"]) == ("failed", 2)
    assert failed["last"].startswith("error: no model file nowhere.pth")
    log = runs.log(first["id"], 0)
    assert "forecast by the market prior" in log["text"]
    rest = runs.log(first["id"], log["next"])
    assert (rest["text"], rest["next"]) == ("", log["size"])
    assert [run["id"] for run in runs.all()] == sorted([first["id"], second["id"]], reverse=True)


def test_values_that_a_script_refuses_start_nothing(runs: Runs) -> None:
    with pytest.raises(UserError, match="epochs"):
        runs.start("train", {"epochs": -1})
    assert runs.ids() == []


@pytest.mark.skipif(os.name == "nt", reason="pipes with a name")
def test_a_killed_server_finds_its_run_again_and_stops_it(runs: Runs) -> None:
    root = runs.workspace.root
    os.mkfifo(root / "pipe.csv")  # the script waits at its prices until somebody writes some
    server = subprocess.Popen(
        [sys.executable, "-c", STARTER.format(root=str(REPO_ROOT)), str(root)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    name = server.stdout.readline().strip()
    wait_for(lambda: (root / "runs" / name / "process.json").exists())
    server.kill()
    server.wait()
    assert runs.describe(name)["state"] == "running"
    wait_for(lambda: _has_default_interrupt(runs, name))
    runs.stop(name)
    stopped = ended(runs, name)
    assert stopped["state"] == "stopped"
    assert runs.describe(name)["seconds"] == stopped["seconds"]  # its time stands still


def _has_default_interrupt(runs: Runs, name: str) -> bool:
    """Whether the script has come to its file: its main module is loaded and it waits."""
    pid = json.loads((runs.folder / name / "process.json").read_text())["pid"]
    process = psutil.Process(pid)
    return process.status() == psutil.STATUS_SLEEPING and process.cpu_times().user > 0.2


@pytest.mark.skipif(os.name == "nt", reason="pipes with a name")
def test_a_run_whose_processes_were_killed_is_lost_not_running(runs: Runs) -> None:
    os.mkfifo(runs.workspace.root / "pipe.csv")
    name = runs.start("train", {"data": ["pipe.csv"]})["id"]
    told = runs.folder / name / "process.json"
    wait_for(told.exists)
    process = json.loads(told.read_text())
    os.kill(process["runner"], signal.SIGKILL)
    wait_for(lambda: psutil.Process(process["runner"]).status() == psutil.STATUS_ZOMBIE)
    assert runs.describe(name)["state"] == "running"  # the script itself still is
    os.kill(process["pid"], signal.SIGKILL)
    assert ended(runs, name)["state"] == "lost"


@pytest.mark.parametrize("name", ["../../etc", "20260101-000000-train-abcdef", "", "20260101-000000-train-abcdef/.."])
def test_a_run_that_is_none(runs: Runs, name: str) -> None:
    with pytest.raises(UserError, match="no run"):
        runs.describe(name)


@pytest.mark.slow
def test_a_training_is_stopped_and_resumed_to_the_end(runs: Runs, tiny_models: dict[str, Path]) -> None:
    root = runs.workspace.root
    write_sample(root, "AAPL")
    shutil.copytree(tiny_models["shallow_qwen3"], root / "base")
    values = {
        "data": ["prices"], "model_path": "base", "epochs": 8, "patience": 8, "batch_size": 1,
        "targets_per_sequence": 20, "device": "cpu",
    }  # fmt: skip
    name = runs.start("train_lora", values)["id"]
    wait_for(lambda: runs.describe(name)["progress"] is not None, within_s=90)
    progress = runs.describe(name)["progress"]
    assert 0 < progress["done"] < progress["total"]
    assert float(progress["loss"]) > 0
    runs.stop(name)
    stopped = ended(runs, name)
    assert stopped["state"] == "stopped", runs.log(name, 0)["text"]
    assert "state saved; to go on" in runs.log(name, 0)["text"]
    again = runs.start(stopped["script"], {**stopped["values"], **stopped["resume"]})["id"]
    wait_for(lambda: runs.describe(again)["state"] != "running", within_s=90)
    assert runs.describe(again)["state"] == "done", runs.log(again, 0)["text"]
    assert "resum" in runs.log(again, 0)["text"]
    done = [line["done"] for line in runs.losses(again)]
    assert done == sorted(done)
    assert done[0] >= progress["done"]  # it went on, and did not begin again
    curve = training_curve(runs.workspace, "train_lora", values)
    assert [point["x"] for point in curve] == list(range(9))


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"script": 3}',
        '{"script": "train", "values": {}, "argv": ["a"], "folder": "", "started": "x"}', "[" * 100_000,
    ],
    ids=["empty", "list", "nothing", "number", "no run", "a pit of brackets"],
)  # fmt: skip
def test_a_folder_that_is_no_run_is_passed_over(runs: Runs, content: str) -> None:
    folder = runs.folder / "20260101-000000-train-abcdef"
    folder.mkdir(parents=True)
    (folder / "command.json").write_text(content)
    assert runs.all() == []


def test_a_foreign_process_is_neither_taken_for_a_run_nor_stopped(runs: Runs) -> None:
    folder = runs.folder / "20260101-000000-train-abcdef"
    folder.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "train.py"])
    command = {
        "script": "train",
        "values": {},
        "argv": [sys.executable, "train.py"],
        "folder": "/",
        "started": "2026-01-01",
    }
    (folder / "command.json").write_text(json.dumps(command))
    (folder / "process.json").write_text(json.dumps({"pid": other.pid, "runner": other.pid}))
    assert runs.stop(folder.name)["state"] == "lost"
    assert other.poll() is None
    other.kill()
    other.wait()
