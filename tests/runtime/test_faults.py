"""Every writer under faults: each call that touches the disk fails in turn, or the process is killed there.

Afterwards the old file or the new one is there, whole, with nothing stray beside it, and the same write goes through.
A process of its own runs each attempt. Its calls are counted and broken by an audit hook (PEP 578), which sees every
``open``, ``rename`` and ``mkdir`` of Python's own; ``fsync`` is replaced; writes fail at a limit on file sizes, which
binds libraries in C++ too.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from price_tables import random_prices
from torch import nn

from lora import LoRAError
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

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
COUNTED = {"open", "os.rename", "os.mkdir", "os.chmod", "os.fsync"}
OK, REFUSED, CRASHED, FEWER_CALLS = 0, 3, 4, 9
MOST_CALLS = 60


@dataclass
class Fault:
    """What goes wrong in this process.

    Attributes:
        folder: calls on paths outside it are left alone.
        at: the number of the call that fails, from 1; 0 for none.
        error: its ``errno``; None where the process is killed instead.
        calls: counted so far.
    """

    folder: str = ""
    at: int = 0
    error: int | None = None
    calls: int = 0

    def meet(self, event: str, path: Any) -> None:
        """Count a call, and fail if it is the one."""
        if not self.at or event not in COUNTED or not str(path).startswith(self.folder):
            return
        self.calls += 1
        if self.calls == self.at:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            assert self.error is not None
            raise OSError(self.error, os.strerror(self.error), str(path))


FAULT = Fault()


def install() -> None:
    """In a child alone: an audit hook cannot be taken away."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in COUNTED and arguments and not isinstance(arguments[0], int):  # a number is a file that is open
            path = arguments[0]
            FAULT.meet(event, path.decode() if isinstance(path, bytes) else path)

    sys.addaudithook(hook)
    real = os.fsync

    def fsync(handle: int) -> None:
        FAULT.meet("os.fsync", FAULT.folder)
        real(handle)

    os.fsync = fsync


def attempt(write: Callable[[], None], folder: Path, at: int = 0, error: int | None = None, limit: int = -1) -> int:
    """Write in a child: its exit status, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        status = CRASHED
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                install()
                if limit >= 0:
                    import resource

                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                FAULT.folder, FAULT.at, FAULT.error = str(folder), at, error
                write()
            status = OK if FAULT.calls >= at else FEWER_CALLS
        except (UserError, LoRAError) as refused:
            status = REFUSED if "\n" not in str(refused) else CRASHED
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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

    figure = Figure(figsize=(version, 1))
    figure.subplots().plot([0, version])
    save_figure(figure, folder / "curve.png")


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


def test_a_folder_of_a_model_is_whole_or_not_there(tmp_path: Path) -> None:
    for errors in (ERRORS, [None]):
        for at in range(1, MOST_CALLS):
            shutil.rmtree(tmp_path / "model", ignore_errors=True)
            status = attempt(lambda: write_folder(tmp_path, 2), tmp_path, at, errors[at % len(errors)])
            if status == FEWER_CALLS:
                break
            assert status in {OK, REFUSED, -signal.SIGKILL}, f"call {at} ended with {status}"
            assert read_whole_folder(tmp_path) == (2 if status == OK else 0), f"call {at}"
            write_folder(tmp_path, 2)
            assert content_of(tmp_path) == {"model", "model/config.json", "model/model.safetensors"}
        assert at > 3
    shutil.rmtree(tmp_path / "model")
    for limit in (0, 40):
        assert attempt(lambda: write_folder(tmp_path, 2), tmp_path, limit=limit) == REFUSED
        assert content_of(tmp_path) == set()


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
    status = attempt(lambda: append_entries(path, 40), tmp_path, limit=limit)
    assert status in {OK, REFUSED}
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


def content_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


def places(writer: Writer, folder: Path, errors: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """Break the first, the second, ... call of a write of version 2; the number of the call, and how it ended.

    Args:
        errors: taken in turn.
    """
    for at in range(1, MOST_CALLS):
        status = attempt(lambda: writer.write(folder, 2), folder, at, errors[at % len(errors)])
        if status == FEWER_CALLS:
            return
        yield at, status
    raise AssertionError(f"more than {MOST_CALLS} calls")


def test_a_call_that_fails(writer: Writer, tmp_path: Path) -> None:
    writer.write(tmp_path, 1)
    before, refused = content_of(tmp_path), 0
    for at, status in places(writer, tmp_path, ERRORS):
        assert status in ({OK} if writer.survives else {OK, REFUSED}), f"call {at} ended with {status}"
        refused += status == REFUSED
        assert writer.read(tmp_path) in ({1} if status == REFUSED and writer.files == 1 else {1, 2}), f"call {at}"
        if not writer.survives:  # whose files have a number of their own each time
            assert content_of(tmp_path) == before, f"call {at}"
        writer.write(tmp_path, 1)
    assert refused >= 3 or writer.survives
    writer.write(tmp_path, 2)
    assert writer.read(tmp_path) == 2


def test_a_process_killed_at_any_call(writer: Writer, tmp_path: Path) -> None:
    def again(version: int) -> None:
        """By a process of its own, as a user who starts the command again."""
        assert attempt(lambda: writer.write(tmp_path, version), tmp_path) == OK

    again(1)
    before, killed = content_of(tmp_path), 0
    for at, status in places(writer, tmp_path, [None]):
        assert status == -signal.SIGKILL, f"call {at} ended with {status}"
        killed += 1
        assert writer.read(tmp_path) in {1, 2}, f"call {at}"
        again(1)
        assert writer.read(tmp_path) == 1
        if not writer.survives:
            assert content_of(tmp_path) == before, f"call {at}: something is left over"
    assert killed >= 3
    again(2)
    assert writer.read(tmp_path) == 2


@pytest.mark.parametrize("limit", [0, 40])
def test_a_disk_that_is_full_amid_the_bytes(limit: int, writer: Writer, tmp_path: Path) -> None:
    writer.write(tmp_path, 1)
    before = content_of(tmp_path)
    status = attempt(lambda: writer.write(tmp_path, 2), tmp_path, limit=limit)
    assert status == (OK if writer.survives else REFUSED)
    assert writer.read(tmp_path) == 1
    assert content_of(tmp_path) == before
    writer.write(tmp_path, 2)
    assert writer.read(tmp_path) == 2


def test_two_that_write_at_once_do_not_tear_it(writer: Writer, tmp_path: Path) -> None:
    writer.write(tmp_path, 1)
    children = []
    for version in (1, 2):
        child = os.fork()
        if child == 0:
            status = CRASHED
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    for _ in range(10):
                        writer.write(tmp_path, version)
                status = OK
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [OK, OK]
    assert writer.read(tmp_path) in {1, 2}
