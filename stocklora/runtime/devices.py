"""Where to compute, and in which number format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from stocklora.cli.console import UserError


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: the named device is not there.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    if not present[name]:
        raise UserError(f"--device {name}: this machine has none; leave the flag out or use --device cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    return best_dtype(device) if name == "auto" else {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a graphics card's out-of-memory error into advice.

    Raises:
        UserError: naming the flags that need less.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "the graphics card's memory is full; try --batch_size 1, --gradient_checkpointing, --backbone_layers 8, "
            "a smaller base model, or --device cpu"
        ) from None


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        # Without these instructions bfloat16 on a CPU is emulated, and slower than float32.
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.float32
