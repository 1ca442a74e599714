"""The machine: where to compute, in which number format, what it is, the memory a program took, and a port of it.

torch is imported where it is used: what a machine is can be told without it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocklora.cli.console import UserError

if TYPE_CHECKING:
    import torch

TRAINING_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "pandas")

_highest_mb = 0.0  # the system counts in batches of pages: what it calls the peak may fall a little


# ------------------------------------------------------------------------------------------ where to compute


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto``: CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: the named device is not there.
    """
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    if not present[name]:
        raise UserError(f"--device {name}: this machine has none; leave the flag out or use --device cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format that ``--dtype`` names; ``auto``: see ``best_dtype``."""
    import torch

    return best_dtype(device) if name == "auto" else {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it, float32 elsewhere."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        # Without these instructions bfloat16 on a CPU is emulated, and slower than float32. torch has no public name
        # for the question; Windows and macOS have no list of instructions to be read in its place.
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.float32


# ---------------------------------------------------------------------------------------------------- memory


@contextlib.contextmanager
def memory_errors(remedies: str) -> Iterator[None]:
    """Turn a graphics card's out-of-memory error into advice.

    Args:
        remedies: flags that need less memory, to be tried before ``--device cpu``.

    Raises:
        UserError: naming the remedies.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"the graphics card's memory is full; try {remedies}, or --device cpu") from None


def peak_memory_mb(device_type: str = "cpu") -> float:
    """Most memory taken so far, in MB: of the graphics card for ``cuda``, else of this process."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    global _highest_mb
    _highest_mb = max(_highest_mb, _peak_of_this_process_mb())
    return _highest_mb


def _peak_of_this_process_mb() -> float:
    with contextlib.suppress(OSError, StopIteration):
        # Not getrusage on Linux: a process starts there with the peak of the one that started it.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6  # KiB
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB here


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next pass of a model instead of handing it back to the system.

    A training step frees and asks again for gigabytes of activations; having the system clear those pages anew each
    time took up to half of the step's time, and a tenth of a forecast's. Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    import ctypes

    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of mallopt(3)
    library = ctypes.CDLL(None)
    # Older versions allow no more than 32 MB. Without this one, the other two would only do harm.
    if library.mallopt(mmap_threshold, 2**30) or library.mallopt(mmap_threshold, 2**25):
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(top_pad, 2**28)


# --------------------------------------------------------------------------------------------- what it is


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, system and library versions: what a benchmark's figures belong to."""
    import psutil

    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        # A container is often allowed fewer than the machine has.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions_of("torch", "transformers", "peft", "accelerate"),
    }
    if "torch" in sys.modules:
        import torch

        facts["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return facts


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python's and the training libraries' versions, as far as they are installed."""
    installed = {name: version for name, version in versions_of(*TRAINING_LIBRARIES).items() if version is not None}
    return {"python": platform.python_version(), **installed}


def versions_of(*packages: str) -> dict[str, str | None]:
    """The installed version of each package; None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# ------------------------------------------------------------------------------------------- a port of it

HOST = "127.0.0.1"


def listen(port: int, host: str = HOST) -> socket.socket:
    """A socket that listens on ``port``; 0 takes a free one. Clients that come early wait.

    Args:
        host: an address of this machine; by default nobody but this machine itself can come.

    Raises:
        UserError: the port is taken, or the address is none of this machine's.
    """
    try:
        # One that listens: bound alone, it could be bound again by a second server while the first loads its model.
        made = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if host != HOST and error.errno != errno.EADDRINUSE:
            raise UserError(
                f"cannot listen on --host {host}: {error.strerror or error}; give an address of this machine"
            ) from None
        raise UserError(
            f"cannot listen on port {port}: {os.strerror(error.errno or 0)}; give another --port, or 0 for a free one"
        ) from None
    # asyncio sets TCP_NODELAY only where a socket says that it is TCP's. Without, each answer on a connection that is
    # kept, and each piece of a stream, waits some 40 ms for the client's acknowledgement of what went before.
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
