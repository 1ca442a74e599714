"""scripts/qlora/train_qlora.py as a user runs it, and runs that are stopped, killed and taken up again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sft_folders import info_of, lay_out
from source_tree import REPO_ROOT, RunScript

RESUME = (
    "python scripts/qlora/train_qlora.py --resume_from_checkpoint qlora_output/checkpoint-100 --batch_size 2 "
    "--max_length 256"
)
# Long enough to be stopped in the middle, with dropout and a judgement every few steps.
LONG = "--use_lora --lora_r 8 --num_epochs 2 --batch_size 2 --eval_steps 4 --learning_rate 1e-3 --logging_steps 1 --early_stopping_patience 0 --lora_dropout 0.1"  # noqa: E501


def test_the_documents_commands_work_as_written(
    run_script: RunScript, call_script: RunScript, tiny_model: Path, tmp_path: Path
) -> None:
    folder = lay_out(tmp_path / "project", tiny_model, rows=170)
    result = run_script("scripts/qlora/train_qlora.py", cwd=folder)
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


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(REPO_ROOT / "fine_tune_qwen.py"), *shlex.split(LONG), *arguments],
        cwd=folder, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, encoding="utf-8",
    )  # fmt: skip


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
def test_a_run_that_was_stopped_and_one_that_was_killed_end_as_one_left_alone(
    call_script: RunScript, tiny_model: Path, tmp_path: Path
) -> None:
    folder = lay_out(tmp_path / "project", tiny_model)
    result = call_script("fine_tune_qwen.py", *shlex.split(LONG), "--output_dir", "alone", cwd=folder)
    assert result.returncode == 0, result.stderr
    expected = load_file(folder / "alone/adapter_model.safetensors")

    process = start(folder, "--output_dir", "stopped")
    wait_for("stopped/checkpoint-4/stocklora_checkpoint.json", folder, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err
    command = out.splitlines()[-1].strip()
    assert command.startswith("python fine_tune_qwen.py --use_lora")
    assert not (folder / "stopped/adapter_model.safetensors").exists()
    words = shlex.split(command)
    result = call_script(words[1], *words[2:], cwd=folder)
    assert result.returncode == 0, result.stderr

    process = start(folder, "--output_dir", "killed")
    wait_for("killed/checkpoint-8/stocklora_checkpoint.json", folder, process)
    process.kill()
    process.communicate(timeout=120)
    arguments = [*shlex.split(LONG), "--output_dir", "killed", "--resume_from_checkpoint", "last"]
    result = call_script("fine_tune_qwen.py", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr

    for name in ("stopped", "killed"):
        found = load_file(folder / name / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(found[key].equal(expected[key]) for key in expected), name
        assert info_of(folder / name)["losses"] == info_of(folder / "alone")["losses"]
