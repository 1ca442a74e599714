"""PyTorch's ``.bin`` weights -> safetensors, read as plain tensors: a pickle can run code, and here none ever does."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocklora.base_models.folders import read_json
from stocklora.cli.console import UserError, one_line
from stocklora.runtime.files import replacing, write_json

CHOOSE = "choose a model with safetensors weights"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class UnusableWeights(UserError):
    """Weights that cannot be read as plain tensors, today or tomorrow."""


def convert_bins(folder: Path, model: str) -> list[Path]:
    """Write the ``.bin`` weights in ``folder`` as safetensors beside them; the files that they replace.

    One shard is held at a time, and where its format allows only the part of it that is being written.

    Args:
        folder: that holds ``pytorch_model.bin`` or its index with all shards; nothing is done where it holds neither.
        model: what messages call it.

    Raises:
        UnusableWeights: a file holds code or anything but plain tensors, is damaged, or lacks what the index names.
    """
    if (folder / BIN).is_file():
        _convert(folder / BIN, folder / "model.safetensors", model)
        return [folder / BIN]
    if not (folder / BIN_INDEX).is_file():
        return []
    index = read_json(folder / BIN_INDEX)
    bins = sorted(set(index["weight_map"].values()))
    where: dict[str, str] = {}
    for name in bins:
        target = name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"
        where |= dict.fromkeys(_convert(folder / name, folder / target, model), target)
    if missing := sorted(index["weight_map"].keys() - where.keys()):
        raise UnusableWeights(f"{model}: {missing[0]}, which {BIN_INDEX} names, is in none of its files; {CHOOSE}")
    total = sum((folder / target).stat().st_size for target in set(where.values()))
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(folder / "model.safetensors.index.json", content)
    return [folder / name for name in (*bins, BIN_INDEX)]


def _convert(source: Path, target: Path, model: str) -> list[str]:
    """Write one file as safetensors; the names of its tensors."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = _plain_tensors(source, model)
    storages: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        # Two names of one memory, such as tied embeddings, get a copy each: safetensors refuses what overlaps.
        shared = place in storages
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        storages.add(place)
    try:
        with replacing(target) as unfinished:
            save_file(tensors, unfinished, metadata={"format": "pt"})
    except (SafetensorError, ValueError, KeyError) as error:
        detail = one_line(str(error))[:200]
        raise UnusableWeights(f"{source.name} of {model} is not fit for safetensors: {detail}; {CHOOSE}") from None
    return list(tensors)


def _plain_tensors(path: Path, model: str) -> dict[str, Any]:
    """What a ``.bin`` file holds by name, on the CPU."""
    import zipfile

    import torch

    try:
        with warnings.catch_warnings():  # torch remarks on a foreign pickle before it refuses it
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        message = f"{path.name} of {model} is damaged, or holds more than tensors, such as code, which is never run"
        raise UnusableWeights(f"{message}; {CHOOSE}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        detail = one_line(str(error))[:200]
        raise UnusableWeights(f"{path.name} of {model} cannot be read: {detail}; {CHOOSE}") from None
    plain = isinstance(content, Mapping) and bool(content)
    if not plain or not all(isinstance(name, str) and _is_dense(value) for name, value in content.items()):
        raise UnusableWeights(f"{path.name} of {model} is no table of named tensors; {CHOOSE}")
    tensors = {name: value.detach() for name, value in content.items()}
    # A file of a few bytes can claim a tensor of terabytes by repeating one number.
    if sum(value.numel() * value.itemsize for value in tensors.values()) > 2 * path.stat().st_size:
        raise UnusableWeights(f"{path.name} of {model} claims to hold more than its size allows; {CHOOSE}")
    return tensors


def _is_dense(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
