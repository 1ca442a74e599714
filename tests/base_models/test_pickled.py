"""PyTorch's ``.bin`` weights become safetensors with the same numbers, and no code in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stocklora.base_models.pickled import UnusableWeights, convert_bins


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    embedding = torch.randn(6, 4, generator=draw)
    return {
        "embed.weight": embedding,
        "head.weight": embedding,  # tied
        "transposed": (wide := torch.randn(3, 5, generator=draw)).T,
        "wide": wide,
        "half": torch.randn(2, 2, generator=draw).bfloat16(),
        "part": torch.randn(8, generator=draw)[2:4],
        "steps": torch.tensor(3),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "parameter": nn.Parameter(torch.randn(2, generator=draw)),
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("zipped", [True, False])
def test_one_file(tmp_path: Path, zipped: bool) -> None:
    torch.save(tensors(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert convert_bins(tmp_path, "org/m") == [tmp_path / "pytorch_model.bin"]
    same(load_file(tmp_path / "model.safetensors"), tensors())


def test_shards_and_their_index(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    items = list(tensors().items())
    parts = [dict(items[:3]), dict(items[3:])]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, tmp_path / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert {path.name for path in convert_bins(tmp_path, "org/m")} == {*names, index.name}
    written = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    renamed = {name: name.replace("pytorch_", "").replace("bin", "safetensors") for name in names}
    assert written == {key: renamed[name] for key, name in weight_map.items()}
    same({key: load_file(tmp_path / name)[key] for key, name in written.items()}, tensors())

    index.write_text(json.dumps({"weight_map": weight_map | {"lost": names[0]}}))
    with pytest.raises(UnusableWeights, match="lost, which pytorch_model.bin.index.json names, is in none"):
        convert_bins(tmp_path, "org/m")


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    content = tensors() | {"x": Code(tmp_path / "ran")}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnusableWeights, match="such as code, which is never run") as caught:
        convert_bins(tmp_path, "org/m")
    assert "\n" not in str(caught.value)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(UnusableWeights):
        convert_bins(tmp_path, "org/m")
    assert {path.name for path in tmp_path.iterdir()} == {"pytorch_model.bin"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": torch.zeros(2), "epoch": 3}, "no table of named tensors"),
        ({"state_dict": {"a": torch.zeros(2)}}, "no table of named tensors"),
        ([torch.zeros(2)], "no table of named tensors"),
        ({}, "no table of named tensors"),
        ({"a": torch.zeros(2).to_sparse()}, "no table of named tensors"),
        ({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, "more than its size allows"),
        (b"PK\x03\x04 cut short", "org/m"),
        (b"", "org/m"),
        (b"<html>", "org/m"),
    ],
)
def test_what_is_no_table_of_tensors_is_one_line(tmp_path: Path, content: object, words: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UnusableWeights, match=words) as caught:
        convert_bins(tmp_path, "org/m")
    assert "\n" not in str(caught.value)
    assert "choose a model with safetensors weights" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"pytorch_model.bin"}


def test_nothing_to_do_without_bins(tmp_path: Path) -> None:
    assert convert_bins(tmp_path, "org/m") == []
