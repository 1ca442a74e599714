"""scripts/qlora/train_qlora.py as a user runs it, and runs that are stopped, killed and taken up again."""

from __future__ import annotations

import os
import runpy
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sft_folders import info_of, lay_out
from source_tree import REPO_ROOT, RunScript

RESUME = (
    "python scripts/qlora/train_qlora.py --resume_from_checkpoint qlora_output/checkpoint-100 --batch_size 2 "
    "--max_length 256"
)
# Long enough to be stopped in the middle, with dropout and a judgement every few steps.
LONG = "--use_lora --lora_r 8 --num_epochs 2 --batch_size 2 --eval_steps 2 --learning_rate 1e-3 --logging_steps 1 --early_stopping_patience 0 --lora_dropout 0.1"  # noqa: E501


def test_the_documents_commands_work_as_written(
    call_script: RunScript, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = lay_out(tmp_path / "project", tiny_models["shallow_qwen3"], rows=170)
    result = call_script("scripts/qlora/train_qlora.py", cwd=folder)
    assert result.returncode == 0, result.stderr
    info = info_of(folder / "qlora_output")
    assert info["quantization"] == "4bit"
    assert info["losses"]["validation_best"] < info["losses"]["validation_start"]
    assert (folder / "qlora_output/checkpoint-100").is_dir()
    # Another batch size and length on the way, as the document does it where memory is short: allowed, and said.
    words = shlex.split(RESUME)
    result = call_script(words[1], *words[2:], cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "batch_size 4 -> 2" in result.stderr
    assert "Traceback" not in result.stderr
    info = info_of(folder / "qlora_output")
    assert info["resumed_from"] == str(Path("qlora_output/checkpoint-100"))
    assert info["settings"]["max_length"] == 256
    assert (folder / "qlora_output/adapter_config.json").is_file()


def run_as_main(script: Path, arguments: list[str], folder: Path, printed: Path) -> None:
    """In a process of its own: as ``python script *arguments`` in ``folder``, with its words in files."""
    printed.mkdir(parents=True, exist_ok=True)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(folder)
    sys.argv[:] = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def start(nursery: Any, folder: Path, *arguments: str) -> Any:
    given = (REPO_ROOT / "fine_tune_qwen.py", list(arguments), folder, folder / "printed")
    process = nursery.Process(target=run_as_main, args=given)
    process.start()
    return process


def wait_for(pattern: str, folder: Path, process: Any) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.is_alive(), (folder / "printed/stderr").read_text(encoding="utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
def test_a_run_that_was_stopped_then_killed_ends_as_one_left_alone(
    call_script: RunScript, tiny_model: Path, tmp_path: Path, nursery: Any
) -> None:
    folder = lay_out(tmp_path / "project", tiny_model)
    result = call_script("fine_tune_qwen.py", *shlex.split(LONG), "--output_dir", "alone", cwd=folder)
    assert result.returncode == 0, result.stderr
    expected = load_file(folder / "alone/adapter_model.safetensors")

    process = start(nursery, folder, *shlex.split(LONG), "--output_dir", "interrupted")
    wait_for("interrupted/checkpoint-2/stocklora_checkpoint.json", folder, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    out, err = ((folder / "printed" / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    assert process.exitcode == 130, (out, err)
    assert "Traceback" not in err
    command = out.splitlines()[-1].strip()
    assert command.startswith("python fine_tune_qwen.py --use_lora")
    assert not (folder / "interrupted/adapter_model.safetensors").exists()

    process = start(nursery, folder, *shlex.split(command)[2:])
    wait_for("interrupted/checkpoint-6/stocklora_checkpoint.json", folder, process)
    process.kill()
    process.join(120)
    assert not (folder / "interrupted/adapter_model.safetensors").exists()
    arguments = [*shlex.split(LONG), "--output_dir", "interrupted", "--resume_from_checkpoint", "last"]
    result = call_script("fine_tune_qwen.py", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr

    found = load_file(folder / "interrupted/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)
    assert info_of(folder / "interrupted")["losses"] == info_of(folder / "alone")["losses"]
