"""The machine a number was measured on, and the memory a program took."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_highest_mb = 0.0  # the system counts in batches of pages: what it calls the peak may fall a little


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
    """Let glibc keep freed memory for the next training step instead of handing it back to the system.

    A step frees and asks again for gigabytes of activations; having the system clear those pages anew each
    time took up to half of the step's time. Does nothing where the C library is another one.
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


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, system and library versions: what a benchmark's figures belong to."""
    import psutil

    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in ("torch", "transformers", "peft", "accelerate"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    if "torch" in sys.modules:
        import torch

        facts["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return facts


def usable_cores() -> int:
    """Cores this process may run on; a container is often allowed fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python's and the libraries' versions, for the record."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "pandas"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
