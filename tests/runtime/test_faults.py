"""Every writer under faults: each call that touches the disk fails in turn, or the process is killed there.

Afterwards the old file or the new one is there, whole, with nothing stray beside it, and the same write goes through.
How calls are broken stands in ``tests/fixtures/faults.py``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from faults import (
    ERRORS,
    MOST_CALLS,
    content_of,
    copied_at_each_call,
    failing,
    in_a_child,
    is_written,
    killed,
    most_bytes,
)
from price_tables import random_prices
from torch import nn

from stocklora.adapters.files import export_peft, load_lora, read_peft, save_lora
from stocklora.adapters.layer import AdapterConfig, apply_lora
from stocklora.backtest.parts import part_path, write_part
from stocklora.base_models.folders import made_whole
from stocklora.cli.console import UserError
from stocklora.finetune.resume import Checkpoints
from stocklora.forecaster.predictions import write_predictions
from stocklora.instruct.rows.formats import Message, Record
from stocklora.instruct.rows.records import read_records, write_records
from stocklora.ledger.chain import LedgerError, append, read_entries
from stocklora.prices.tables import read_prices, write_prices
from stocklora.runtime.files import load_plain, read_text, replacing, write_json, write_text

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

# ------------------------------------------------------------------------------------------------------ writers


@dataclass(frozen=True)
class Writer:
    """One kind of file.

    Attributes:
        write: folder, version (1 or 2) -> nothing.
        read: folder -> the version that lies there; raises where it is not whole.
        survives: whether it carries on, with a warning, where it cannot write.
        files: that one after the other take their place; a fault between two leaves the first one new.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Path], int]
    survives: bool = False
    files: int = 1


def adapted(version: int | None) -> nn.Module:
    """A model, with adapters filled with a number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if version is None:
        return model
    apply_lora(model, AdapterConfig(rank=2, alpha=4.0, target_modules=("0", "1")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.fill_(float(version))
    return model


def of_lora(suffix: str) -> Writer:
    def read(folder: Path) -> int:
        model = adapted(None)
        load_lora(model, folder / f"adapter{suffix}")
        return version_of(parameter for name, parameter in model.named_parameters() if "lora" in name)

    return Writer(lambda folder, version: save_lora(adapted(version), folder / f"adapter{suffix}"), read)


def version_of(tensors: Any) -> int:
    """The one number that all hold."""
    (value,) = {float(value) for tensor in tensors for value in tensor.flatten()}
    return int(value)


def write_prediction(folder: Path, version: int) -> None:
    row = {"Ticker": "AAPL", "Origin": pd.Timestamp("2024-01-02"), "Date": pd.Timestamp("2024-01-03"), "Day": 1}
    write_predictions(folder / "predictions.csv", [row | {"Last_Close": 10.0, "P50": float(version)}] * 50)


def read_prediction(folder: Path) -> int:
    table = pd.read_csv(folder / "predictions.csv")
    assert len(table) == 50
    return int(table["P50"].unique().item())


PRICES = {version: {"AAPL": random_prices(20, seed=version)} for version in (1, 2)}


def write_version_of_prices(folder: Path, version: int) -> None:
    write_prices(PRICES[version], folder / "AAPL.csv", {"source": "t", "adjust": "all", "interval": "1d"})


def read_version_of_prices(folder: Path) -> int:
    with contextlib.redirect_stderr(io.StringIO()):  # a sidecar of the other version is not believed, with a word
        close = read_prices(folder / "AAPL.csv")["AAPL"]["Close"]
    return next(version for version in (1, 2) if abs(close - PRICES[version]["AAPL"]["Close"]).max() < 1e-6)


IDENTITY = {"settings": {}, "data": {}, "base_model": "", "teacher": None, "processes": 1, "place": {}}


def save_state(folder: Path, version: int) -> None:
    Checkpoints(folder / "last", IDENTITY).save({"optimization": {"steps": version}}, epoch=1, step=version)


def read_state(folder: Path) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        content = Checkpoints(folder / "last", IDENTITY).load()
    assert content is not None
    return int(content["optimization"]["steps"])


def write_backtest_part(folder: Path, version: int) -> None:
    write_part(part_path(folder, 0, 0), range(3), {"ewma": np.full((3, 2, 5), float(version))})


def read_backtest_part(folder: Path) -> int:
    with np.load(part_path(folder, 0, 0)) as content:
        return version_of([torch.as_tensor(content["ewma"])])


def write_network(folder: Path, version: int) -> None:
    with replacing(folder / "net.pth") as temporary:
        torch.save({"format": "x", "format_version": 1, "weights": torch.full((9,), float(version))}, temporary)


def read_network(folder: Path) -> int:
    return version_of([load_plain(folder / "net.pth", "x", 1, "train.py")["weights"]])


def draw_picture(folder: Path, version: int) -> None:
    from matplotlib.figure import Figure

    from stocklora.plots.style import save_figure

    save_figure(Figure(figsize=(version, 1)), folder / "curve.png")


def read_picture(folder: Path) -> int:
    from PIL import Image

    with Image.open(folder / "curve.png") as image:
        image.load()  # a PNG that is cut short is refused
        return round(image.width / image.height)


def row_of(version: int) -> Record:
    return Record((Message("user", "?"), Message("assistant", str(version))))


WRITERS: dict[str, Writer] = {
    "JSON": Writer(
        lambda folder, version: write_json(folder / "a.json", {"version": version, "text": "x" * 5000}),
        lambda folder: int(json.loads(read_text(folder / "a.json"))["version"]),
    ),
    "prices and their sidecar": Writer(write_version_of_prices, read_version_of_prices),
    "predictions": Writer(write_prediction, read_prediction),
    "adapter, .pth": of_lora(".pth"),
    "adapter, .safetensors": of_lora(".safetensors"),
    "PEFT folder": Writer(
        lambda folder, version: export_peft(adapted(version), folder / "peft", base_model="a-base"),
        lambda folder: version_of(read_peft(folder / "peft")[1].values()),
        files=2,
    ),
    "state of a run": Writer(save_state, read_state, survives=True),
    "part of a backtest": Writer(write_backtest_part, read_backtest_part),
    "weights of the simple network": Writer(write_network, read_network),
    "picture": Writer(draw_picture, read_picture),
    "page of a report": Writer(  # what ``write_report`` ends with
        lambda folder, version: write_text(folder / "report.html", f"{version}\n" * 9_000),
        lambda folder: int(set((folder / "report.html").read_text().split()).pop()),
    ),
    "instructions": Writer(
        lambda folder, version: write_records([row_of(version)] * 40, folder / "rows.jsonl"),
        lambda folder: int(read_records(folder / "rows.jsonl")[39].messages[1].content),
    ),
}


def write_folder(folder: Path, version: int) -> None:
    """As base models and merged ones are written; ``made_whole`` takes no folder that is there."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    with made_whole(folder / "model") as unfinished:
        for name in ("config.json", "model.safetensors"):
            (unfinished / name).write_text(f"{version}" * 3000, encoding="utf-8")


def read_whole_folder(folder: Path) -> int:
    """0 where there is none, which is seen as none: another name."""
    if not (folder / "model").exists():
        return 0
    texts = [path.read_text(encoding="utf-8") for path in (folder / "model").iterdir()]
    assert [len(text) for text in texts] == [3000, 3000]
    return version_of([torch.tensor([float(character) for text in texts for character in text])])


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


def test_a_call_that_fails(writer: Writer, tmp_path: Path) -> None:
    def every_call() -> None:
        writer.write(tmp_path, 1)
        before, refused = content_of(tmp_path), 0
        for at in range(1, MOST_CALLS):
            for error in ERRORS:
                with failing(tmp_path, at, error) as calls:
                    written = is_written(lambda: writer.write(tmp_path, 2))
                if calls.number < at:
                    break
                assert written or not writer.survives, f"call {at}"
                refused += not written
                assert writer.read(tmp_path) in ({1, 2} if written or writer.files > 1 else {1}), f"call {at}"
                if not writer.survives:  # whose files have a number of their own each time
                    assert content_of(tmp_path) == before, f"call {at}"
                writer.write(tmp_path, 1)
            if calls.number < at:
                break
        assert calls.number < at, "too many calls"
        assert refused >= 9 or writer.survives
        writer.write(tmp_path, 2)
        assert writer.read(tmp_path) == 2

    assert in_a_child(every_call) == 0


def test_a_process_killed_at_any_call(writer: Writer, tmp_path: Path) -> None:
    states, folder, whole = tmp_path / "states", tmp_path / "folder", tmp_path / "whole"
    writer.write(whole, 1)

    def write(watching: Callable[[], Any]) -> None:
        writer.write(folder, 1)
        with watching():
            writer.write(folder, 2)

    assert in_a_child(lambda: write(lambda: copied_at_each_call(folder, states))) == 0
    left = sorted(states.iterdir())
    assert in_a_child(lambda: write(lambda: killed(folder, 3))) == -signal.SIGKILL
    for state in [*left, folder]:
        assert writer.read(state) in {1, 2}, state.name
        writer.write(state, 1)  # by a process of its own, as a user who starts the command again
        assert writer.read(state) == 1
        if not writer.survives:
            assert content_of(state) == content_of(whole), f"call {state.name}: something is left over"
    assert len(left) >= 3
    writer.write(folder, 2)
    assert writer.read(folder) == 2


def test_a_disk_that_is_full_amid_the_bytes(writer: Writer, tmp_path: Path) -> None:
    def full() -> None:
        writer.write(tmp_path, 1)
        before = content_of(tmp_path)
        for limit in (0, 40):
            with most_bytes(limit):
                assert is_written(lambda: writer.write(tmp_path, 2)) == writer.survives
            assert writer.read(tmp_path) == 1
            assert content_of(tmp_path) == before
        writer.write(tmp_path, 2)
        assert writer.read(tmp_path) == 2

    assert in_a_child(full) == 0


def test_two_that_write_at_once_do_not_tear_it(writer: Writer, tmp_path: Path) -> None:
    writer.write(tmp_path, 1)
    children = []
    for version in (1, 2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    for _ in range(10):
                        writer.write(tmp_path, version)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert writer.read(tmp_path) in {1, 2}


def test_a_folder_of_a_model_is_whole_or_not_there(tmp_path: Path) -> None:
    whole = {"model", "model/config.json", "model/model.safetensors"}
    folder, states = tmp_path / "folder", tmp_path / "states"
    folder.mkdir()

    def every_call() -> None:
        for at in range(1, MOST_CALLS):
            with failing(folder, at, ERRORS[at % len(ERRORS)]) as calls:
                written = is_written(lambda: write_folder(folder, 2))
            if calls.number < at:
                break
            assert read_whole_folder(folder) == (2 if written else 0), f"call {at}"
            write_folder(folder, 2)
            assert content_of(folder) == whole
            shutil.rmtree(folder / "model")
        assert 5 < at < MOST_CALLS - 1
        shutil.rmtree(folder / "model")
        for limit in (0, 40):
            with most_bytes(limit):
                assert not is_written(lambda: write_folder(folder, 2))
            assert content_of(folder) == set()
        with copied_at_each_call(folder, states):
            write_folder(folder, 2)

    assert in_a_child(every_call) == 0
    for state in states.iterdir():
        assert read_whole_folder(state) in {0, 2}
        write_folder(state, 2)
        assert content_of(state) == whole


def append_entries(path: Path, count: int) -> None:
    for number in range(count):
        try:
            append(path, [{"kind": "note", "number": number}])
        except LedgerError as error:  # which its callers make a line of
            raise UserError(str(error)) from None


@pytest.mark.parametrize("limit", [0, 5000, 9000, 13_000])
def test_a_ledger_whose_disk_is_full_verifies_and_goes_on(limit: int, tmp_path: Path) -> None:
    path = tmp_path / "forecasts.db"
    append_entries(path, 3)

    def fill() -> None:
        with most_bytes(limit):
            is_written(lambda: append_entries(path, 40))

    assert in_a_child(fill) == 0
    before = len(read_entries(path))
    assert before >= 3
    append_entries(path, 1)
    assert len(read_entries(path)) == before + 1


def test_a_ledger_whose_writer_is_killed_verifies_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "forecasts.db"
    append_entries(path, 1)
    for pause in (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05):
        child = os.fork()
        if child == 0:
            try:
                append_entries(path, 100_000)
            finally:
                os._exit(1)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = len(read_entries(path))
        append_entries(path, 1)
        assert len(read_entries(path)) == before + 1
    assert before > 1
