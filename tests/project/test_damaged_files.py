"""Every reader given damaged files: one line, within bounded memory, whatever stands in the file.

``make fuzz`` looks longer (``STOCKLORA_FUZZ`` examples each, drawn anew); what it found stands in ``FOUND``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from price_tables import random_prices
from torch import nn
from tuned_models import spec_of

from lora import LoRAError
from stocklora.adapters.files import export_peft, import_peft, load_lora, save_lora
from stocklora.adapters.layer import AdapterConfig, apply_lora
from stocklora.base_models.loading import BaseModel, load_causal_model
from stocklora.cli.console import UserError
from stocklora.cli.settings import checked_values, read_config
from stocklora.finetune.resume import FORMAT, read_state
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.weights import WeightsFile, load_weights, save_weights
from stocklora.instruct.news.database import read_events, sample_database
from stocklora.instruct.rows.records import read_records
from stocklora.instruct.sft.checkpoints import fault_of
from stocklora.ledger.chain import append, read_entries
from stocklora.prices.tables import read_prices, write_prices
from stocklora.runtime.files import load_plain
from stocklora.volatility.prior import BUILTIN, prior_named

EXAMPLES = int(os.environ.get("STOCKLORA_FUZZ", "12"))
MOST_MEMORY_BYTES = 2 * 2**30  # beyond what the process has when a file is read
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Door:
    """One reader.

    Attributes:
        file: that is damaged.
        make: writes a whole one into a folder, with what must lie beside it.
        read: reads it.
        is_json: whether values inside it are damaged as well, not bytes alone.
    """

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    is_json: bool = False


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def adapted() -> nn.Module:
    model = plain()
    apply_lora(model, AdapterConfig(rank=2, alpha=4.0, target_modules=("0", "1")))
    return model


BASE = Path()  # of the tiny model, set by the fixture below


def write_weights(folder: Path) -> None:
    head = {"mean": torch.zeros(16), "spread": torch.ones(16), "linear.weight": torch.zeros(27, 16),
            "linear.bias": torch.zeros(27)}  # fmt: skip
    save_weights(folder / "w.pth", WeightsFile(spec_of(BASE, "head"), {}, head, {}))


def copy_base(folder: Path) -> None:
    shutil.copytree(BASE, folder, dirs_exist_ok=True)


def write_table(folder: Path) -> None:
    write_prices({"AAPL": random_prices(12, seed=1)}, folder / "AAPL.csv", {"source": "t", "adjust": "all"})


ROWS = [
    {"instruction": "判断", "input": "央行降准", "output": "利好", "history": [["a", "b"]]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "tools": "[]"},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
]

DOORS: dict[str, Door] = {
    "weights file": Door("w.pth", write_weights, lambda folder: load_weights(folder / "w.pth")),
    "adapter, .pth": Door(
        "a.pth", lambda folder: save_lora(adapted(), folder / "a.pth"), lambda f: load_lora(plain(), f / "a.pth")
    ),
    "adapter, .safetensors": Door(
        "a.safetensors",
        lambda folder: save_lora(adapted(), folder / "a.safetensors"),
        lambda folder: load_lora(plain(), folder / "a.safetensors"),
    ),
    "PEFT's settings": Door(
        "adapter_config.json",
        lambda folder: export_peft(adapted(), folder, base_model="b"),
        lambda folder: import_peft(plain(), folder),
        is_json=True,
    ),
    "PEFT's weights": Door(
        "adapter_model.safetensors",
        lambda folder: export_peft(adapted(), folder, base_model="b"),
        lambda folder: import_peft(plain(), folder),
    ),
    "state": Door(
        "s.pth",
        lambda folder: torch.save({"format": FORMAT, "format_version": 1, "t": torch.zeros(9)}, folder / "s.pth"),
        lambda folder: load_plain(folder / "s.pth", FORMAT, 1, "train_lora.py"),
    ),
    "manifest of a state": Door(
        "s.json",
        lambda folder: [
            (folder / "s.pth").write_bytes(b"x"),
            (folder / "s.json").write_text('{"bytes": 1, "sha256": "0"}'),
        ],
        lambda folder: read_state(folder / "s.pth"),
        is_json=True,
    ),
    "prices": Door("AAPL.csv", write_table, lambda folder: read_prices(folder / "AAPL.csv")),
    "sidecar": Door("AAPL.csv.meta.json", write_table, lambda folder: read_prices(folder / "AAPL.csv"), is_json=True),
    "rows, .jsonl": Door(
        "rows.jsonl",
        lambda folder: (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS)),
        lambda folder: read_records(folder / "rows.jsonl"),
    ),
    "rows, .json": Door(
        "rows.json",
        lambda folder: (folder / "rows.json").write_text(json.dumps(ROWS)),
        lambda folder: read_records(folder / "rows.json"),
        is_json=True,
    ),
    "news": Door(
        "n.db", lambda folder: shutil.copy(sample_database(), folder / "n.db"), lambda f: read_events(f / "n.db")
    ),
    "ledger": Door(
        "l.db",
        lambda folder: append(folder / "l.db", [{"kind": "note", "n": number} for number in range(5)]),
        lambda folder: read_entries(folder / "l.db"),
    ),
    "configuration, YAML": Door(
        "c.yaml",
        lambda folder: (folder / "c.yaml").write_text("epochs: 3\nlearning_rate: 1e-4\ntickers: [A, B]\nseed: 1\n"),
        lambda folder: checked_values(read_config(folder / "c.yaml"), TrainLoraSettings, folder / "c.yaml"),
    ),
    "configuration, JSON": Door(
        "c.json",
        lambda folder: (folder / "c.json").write_text('{"epochs": 3, "learning_rate": 1e-4, "tickers": ["A"]}'),
        lambda folder: checked_values(read_config(folder / "c.json"), TrainLoraSettings, folder / "c.json"),
        is_json=True,
    ),
    "prior": Door(
        "p.json",
        lambda folder: shutil.copy(BUILTIN, folder / "p.json"),
        lambda folder: prior_named(str(folder / "p.json")),
        is_json=True,
    ),
    "manifest of a checkpoint": Door(
        "stocklora_checkpoint.json",
        lambda folder: [
            *((folder / name).touch() for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt")),
            (folder / "model.safetensors").touch(),
            (folder / "stocklora_checkpoint.json").write_text('{"files": {"optimizer.pt": 0}}'),
        ],
        fault_of,
        is_json=True,
    ),
    "base model's settings": Door("config.json", copy_base, lambda folder: load_base(folder), is_json=True),
    "base model's weights": Door("model.safetensors", copy_base, lambda folder: load_base(folder)),
    "tokenizer": Door("tokenizer.json", copy_base, lambda folder: BaseModel(folder).tokenizer, is_json=True),
    "tokenizer's settings": Door(
        "tokenizer_config.json", copy_base, lambda folder: BaseModel(folder).tokenizer, is_json=True
    ),
}


def load_base(folder: Path) -> object:
    return load_causal_model(folder, dtype=torch.float32, device=CPU)


# ------------------------------------------------------------------------------------------------------ damages

ODD: list[Any] = [
    None, True, False, -1, 0, 1e308, 10**30, 2**63, "", "x", "\ud800", "../../etc/passwd", [], {}, [[]], {"": {}},
    [None], ["x", 1], {"a": None}, "9" * 4000, 1.5, "NaN",
]  # fmt: skip
FOREIGN = [
    b"", b"\0", b"\0" * 5000, b"PK\x03\x04" + b"\0" * 40, b"SQLite format 3\0" + b"\xff" * 200, b"\x80\x04.", b"null",
    b"[]", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\0\0", b"- " * 2000, b"{" * 3000,
    b"a: &a [*a]", b"1" * 5000,
    struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"{}", b'"', b"version https://git-lfs", b"\x1f\x8b\x08\0",
    struct.pack("<Q", 74) + b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'[:74],
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c]",
]  # fmt: skip


def damaged(whole: bytes, seed: int, is_json: bool) -> bytes:
    """``whole`` after one to three harms."""
    draw = random.Random(seed)
    data = bytearray(whole)
    if is_json and draw.random() < 0.7:
        return json.dumps(with_odd_values(json.loads(whole), draw)).encode()
    for _ in range(draw.randint(1, 3)):
        kind, place = draw.randrange(7), draw.randrange(len(data) + 1)
        if kind == 0:
            del data[place:]
        elif kind == 1 and data:
            data[min(place, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[place:place] = draw.randbytes(draw.randint(1, 40))
        elif kind == 3:
            del data[place : place + draw.randint(1, 200)]
        elif kind == 4:
            data[place:place] = data[place : place + draw.randint(1, 2000)] * draw.randint(1, 4)
        elif kind == 5:
            data[place : place + 8] = draw.choice([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**40), b"99999999"])
        elif kind == 6:
            return draw.choice(FOREIGN)
    return bytes(data)


def with_odd_values(content: Any, draw: random.Random) -> Any:
    """``content`` with one value, at some depth, replaced, removed or put in."""
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        part = waiting.pop()
        keys = list(part) if isinstance(part, dict) else list(range(len(part))) if isinstance(part, list) else []
        places += [(part, key) for key in keys]
        waiting += [part[key] for key in keys]
    if not places or draw.random() < 0.05:
        return draw.choice(ODD)
    part, key = draw.choice(places if draw.random() < 0.5 else places[:40])
    if draw.random() < 0.15:
        del part[key]
    else:
        part[key] = draw.choice(ODD)
    return content


# ------------------------------------------------------------------------------------------------------- reading

# Found by longer runs: (door, seed).
FOUND = [
    ("weights file", 11),  # an IndexError of torch's
    ("state", 11),
    ("sidecar", 10),  # tickers that are a mapping, or a number
    ("sidecar", 18),
    ("prices", 444),  # a StopIteration in a generator
    ("sidecar", 423),  # half a surrogate pair
    ("ledger", 217),  # text that is no UTF-8
    ("tokenizer", 561),  # a panic of Rust's
    ("base model's settings", 1),  # the strict dataclasses of huggingface_hub
    ("base model's settings", 3),
]


@pytest.fixture(scope="module", autouse=True)
def _base(tiny_models: dict[str, Path]) -> None:
    global BASE
    BASE = tiny_models["shallow_qwen3"]


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """No more memory than a bit above what there is; beyond it a MemoryError, which is no refusal."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    size = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(door: Door, folder: Path, whole: bytes, seed: int) -> None:
    (folder / door.file).write_bytes(damaged(whole, seed, door.is_json))
    try:
        with bounded_memory(), contextlib.redirect_stderr(io.StringIO()):
            door.read(folder)
    except (UserError, LoRAError):
        return


@pytest.fixture(params=DOORS)
def door_and_whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Door, Path, bytes]:
    door, folder = DOORS[request.param], tmp_path_factory.mktemp("door")
    door.make(folder)
    return door, folder, (folder / door.file).read_bytes()


def test_a_damaged_file_is_one_line(door_and_whole: tuple[Door, Path, bytes]) -> None:
    door, folder, whole = door_and_whole
    door.read(folder) if door.file != "s.json" else None  # a whole one is read

    @settings(max_examples=EXAMPLES, derandomize="STOCKLORA_FUZZ" not in os.environ, database=None)
    @given(seed=st.integers(0, 2**32))
    def fuzz(seed: int) -> None:
        check(door, folder, whole, seed)

    fuzz()


@pytest.mark.parametrize("content", FOREIGN, ids=range(len(FOREIGN)))
def test_what_is_another_thing_altogether(content: bytes, tmp_path: Path) -> None:
    """Headers that claim terabytes, pits of brackets, other formats, given to the readers that are quick."""
    slow = {"base model's settings", "base model's weights"}
    for number, (name, door) in enumerate(DOORS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        door.make(folder) if name not in slow else None
        (folder / door.file).write_bytes(content)
        with (
            contextlib.suppress(UserError, LoRAError), contextlib.redirect_stderr(io.StringIO()), bounded_memory()
        ):  # fmt: skip
            door.read(folder)


@pytest.mark.parametrize(("name", "seed"), FOUND)
def test_what_fell_stands(name: str, seed: int, tmp_path: Path) -> None:
    door = DOORS[name]
    door.make(tmp_path)
    check(door, tmp_path, (tmp_path / door.file).read_bytes(), seed)
