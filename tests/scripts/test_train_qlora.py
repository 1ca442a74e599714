"""scripts/qlora/train_qlora.py as a user runs it, and runs that are stopped, killed and taken up again."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from script_calls import ForkedScript
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


def start(nursery: Any, folder: Path, number: int, *arguments: str) -> ForkedScript:
    return ForkedScript(
        nursery, REPO_ROOT / "fine_tune_qwen.py", *arguments, cwd=folder, printed=folder / f"printed-{number}"
    )


def wait_for(pattern: str, folder: Path, script: ForkedScript) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert script.process.is_alive(), script.stderr
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

    script = start(nursery, folder, 1, *shlex.split(LONG), "--output_dir", "interrupted")
    wait_for("interrupted/checkpoint-2/stocklora_checkpoint.json", folder, script)
    script.interrupt()
    out, code = script.stdout.read(), script.wait(120)
    err = script.stderr.read_text(encoding="utf-8")
    assert code == 130, (out, err)
    assert "Traceback" not in err
    command = out.splitlines()[-1].strip()
    assert command.startswith("python fine_tune_qwen.py --use_lora")
    assert not (folder / "interrupted/adapter_model.safetensors").exists()

    script = start(nursery, folder, 2, *shlex.split(command)[2:])
    wait_for("interrupted/checkpoint-6/stocklora_checkpoint.json", folder, script)
    script.end()
    assert not (folder / "interrupted/adapter_model.safetensors").exists()
    arguments = [*shlex.split(LONG), "--output_dir", "interrupted", "--resume_from_checkpoint", "last"]
    result = call_script("fine_tune_qwen.py", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr

    found = load_file(folder / "interrupted/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)
    assert info_of(folder / "interrupted")["losses"] == info_of(folder / "alone")["losses"]
