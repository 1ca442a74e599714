"""What training a base model takes in memory: the arithmetic that forecasting and instruction tuning share.

A decoder layer with a gated feed-forward part is assumed (Llama, Qwen): about eleven tensors of the hidden size and
five of the inner size a token are kept for the backward pass, counted in torch's saved tensors. Attention keeps no
square of the sequence's length, since its kernels do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stocklora.cli.console import warn

FLOAT_BYTES = 4
NF4_BYTES = 0.5 + 1 / 64 + 4 / 64 / 256  # a code, and the scale of 64 of them, itself a code of 8 bits
INT8_BYTES = 1.0
PROGRAM_MB = 700.0  # Python, torch and transformers, measured; a graphics card holds none of it
WARN_AT = 0.95  # of the free memory


@dataclass(frozen=True)
class Memory:
    """Memory that a run is expected to take, MB, on the device that trains.

    Attributes:
        trainable: numbers that train.
        state_mb: gradients, Adam's two moments, and on a CPU a forecaster's copies of the best epoch.
        activations_mb: but for the output head. head_mb: tiles of the output head's scores.
    """

    trainable: int
    weights_mb: float
    state_mb: float
    activations_mb: float
    program_mb: float
    head_mb: float = 0.0

    @property
    def total_mb(self) -> float:
        return self.weights_mb + self.state_mb + self.activations_mb + self.head_mb + self.program_mb


def memory_title(tokens: int, on_cpu: bool) -> str:
    """The heading of a table of ``Memory``."""
    where = "memory" if on_cpu else "memory of the graphics card"
    return f"Expected {where}, MB, at {tokens:,} tokens a pass"


def warn_if_short(needed_mb: float, device: torch.device, advice: Callable[[float], str]) -> None:
    """A warning where a run is not expected to fit.

    Args:
        advice: what would, by the free MB.
    """
    free = free_memory_mb(device)
    if free is not None and needed_mb > WARN_AT * free:
        warn(
            f"this run is expected to take {needed_mb:,.0f} MB, and about {free:,.0f} MB are free: it may end "
            f"half-way{advice(free)}"
        )


def inner_size(config: Any) -> int:
    """Width of the feed-forward part's inner layer, from a model's configuration."""
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    if isinstance(inner, list | tuple):  # one for each layer
        inner = max(inner, default=0)
    return int(inner or 4 * config.hidden_size)


def optimizer_bytes(trainable: int) -> int:
    """Bytes of the gradient and Adam's two moments of ``trainable`` numbers, float32."""
    return trainable * FLOAT_BYTES * 3


def bytes_a_token(hidden: int, inner: int, width: int, full: bool) -> float:
    """Bytes that one layer keeps of one token for the backward pass.

    Args:
        hidden: size of the hidden state.
        inner: size of the feed-forward part's inner layer.
        width: bytes of a number that the pass computes in.
        full: every weight trains, in float32; the norms' own gradients then want float32 as well.
    """
    kept = float((11 * hidden + 5 * inner) * width)
    return kept + 4 * hidden * FLOAT_BYTES if full and width < FLOAT_BYTES else kept


def backward_bytes(tokens: int, a_token: float, hidden: int, layers: int, width: int, checkpointing: bool) -> float:
    """Bytes of activations at the peak of a training step.

    Args:
        tokens: padded tokens of one forward and backward pass.
        a_token: bytes that a layer keeps of a token, see ``bytes_a_token``.
        hidden: size of the hidden state.
        layers: number of layers.
        width: bytes of a number that the pass computes in.
        checkpointing: activations are computed anew for the backward pass.
    """
    kept = tokens * a_token
    if checkpointing:
        # Each layer's input, and in turn one layer's activations and their gradients.
        return 3 * kept + layers * tokens * hidden * width
    return (layers + 1.5) * kept  # the last layer's gradients while all is still there


def free_memory_mb(device: torch.device) -> float | None:
    """What a run could take in all, MB: free memory and what this process holds already; None if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) / 1e6
    if device.type != "cpu":
        return None
    import psutil

    held = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # a container is often allowed less than the machine has
        group = Path("/sys/fs/cgroup")
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(facts["inactive_file"])  # files that can be let go
        free = min(free, int((group / "memory.max").read_text()) - used)
    return (max(free, 0) + held) / 1e6
