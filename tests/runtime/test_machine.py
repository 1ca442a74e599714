"""Machine facts and peak memory: what result files and scripts print."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
from source_tree import REPO_ROOT

from stocklora.cli.console import UserError
from stocklora.runtime.machine import best_dtype, listen, machine_facts, memory_errors, versions, versions_of


def test_facts_are_plain_and_complete() -> None:
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert 1 <= facts["cores"] <= psutil.cpu_count()
    assert facts["memory_gb"] == pytest.approx(psutil.virtual_memory().total / 1e9, abs=0.1)
    assert facts["python"].startswith("3.")
    assert facts["torch"].startswith("2.")


def test_facts_do_not_import_torch(repo_root: Path) -> None:
    code = (
        "import sys; from stocklora.runtime.machine import machine_facts; machine_facts(); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "False"


def test_versions_are_those_that_are_installed() -> None:
    assert versions_of("torch", "no-such-package") == {"torch": metadata.version("torch"), "no-such-package": None}
    assert None not in versions().values()
    assert versions()["python"] == machine_facts()["python"]


def test_a_full_card_is_advice() -> None:
    advice = "memory is full; try --batch_size 1, or --device cpu"
    with pytest.raises(UserError, match=advice), memory_errors("--batch_size 1"):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="no list of the processor's instructions")
def test_bfloat16_is_for_processors_that_compute_in_it() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    has_bf16 = "avx512_bf16" in flags or "amx_tile" in flags
    assert best_dtype(torch.device("cpu")) is (torch.bfloat16 if has_bf16 else torch.float32)


def test_peak_memory_grows_with_what_is_used_and_stays() -> None:
    # In a process of its own: training elsewhere in this one may have told it to keep what it frees.
    code = """
import numpy as np, psutil
from stocklora.runtime.machine import peak_memory_mb
before = max(peak_memory_mb(), psutil.Process().memory_info().rss / 1e6)
block = np.ones(50_000_000)  # 400 MB, touched
during = peak_memory_mb()
del block
assert during > psutil.Process().memory_info().rss / 1e6
assert during >= before + 300
assert peak_memory_mb() >= during
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


def test_answers_on_a_connection_that_is_kept_go_out_at_once() -> None:
    """Over sockets that do not say that they are TCP's, asyncio leaves the waiting for acknowledgements on."""

    async def served() -> int:
        found = asyncio.get_running_loop().create_future()

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen(0)
        async with await asyncio.start_server(answer, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            try:
                return int(await found)
            finally:
                writer.close()

    assert asyncio.run(served()) != 0
