"""Every script at the command line: help at once, wrong flags, missing files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import REPO_ROOT, RunScript, python_files, scripts

# The flag by which a script is told its main input, and what else it needs to get that far.
INPUTS = {
    "train.py": "--data",
    "train_lora.py": "--data",
    "framework.py": "--test_csv",
    "framework_llm.py": "--test_csv",
    "merge_lora.py": "--lora_weights",
    "backtest.py": "--data",
    "fine_tune_qwen.py": "--data_path",
    "inference_lora.py": "--lora_model",
}
SLOW_TO_IMPORT = ["torch", "transformers", "pandas", "numpy", "matplotlib", "yfinance", "peft", "rich"]


@pytest.mark.parametrize("name", scripts())
def test_help_answers_without_heavy_imports(name: str, repo_root: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{name!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(repo_root / name)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        f"import json; print(json.dumps([code, [m for m in {SLOW_TO_IMPORT!r} if m in sys.modules]]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, timeout=60, check=False
    )
    lines = result.stdout.splitlines()
    assert json.loads(lines[-1]) == [0, []], result.stderr
    assert f"python {name}" in result.stdout
    assert "usage:" in lines[0]


@pytest.mark.parametrize(
    "name",
    [
        path.as_posix()
        for path in python_files()
        if path.parts[0] in ("data", "examples", "scripts", "training", "visualization")
    ],
)
def test_a_script_in_a_folder_finds_the_package_from_anywhere(name: str, run_script: RunScript, tmp_path: Path) -> None:
    result = run_script(name, "--help", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"python {name}" in result.stdout


@pytest.mark.parametrize("name", scripts())
def test_a_wrong_flag_is_one_line(name: str, run_script: RunScript, call_script: RunScript, tmp_path: Path) -> None:
    for flags, says in (
        (["--no_such_flag", "3"], "unknown flag --no_such_flag"),
        (["--hepl"], "unknown flag --hepl; did you mean --help?"),
        (["--config"], "argument --config"),
        (["stray"], "unknown argument stray"),
    ):
        run = run_script if flags[0] == "--no_such_flag" else call_script
        result = run(name, *flags, cwd=tmp_path)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith(f"error: {says}"), result.stderr
        assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in scripts() if name in INPUTS])
def test_a_missing_data_file_is_one_line(name: str, call_script: RunScript, tmp_path: Path) -> None:
    result = call_script(name, INPUTS[name], "nowhere.csv", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    # either the data file, or what the script needs before it looks at data
    assert "nowhere.csv" in lines[0] or "model" in lines[0] or "weights" in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in scripts() if name != "quick_start.py"])
def test_a_wrong_config_key_names_the_nearest(name: str, call_script: RunScript, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"outptu": "x", "modle_path": "y", "save_drr": "z"}')
    result = call_script(name, "--config", "c.json", cwd=tmp_path)
    assert result.returncode == 2
    assert "c.json: unknown setting" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_script_that_is_called_here_says_and_leaves_what_it_does_in_a_process(
    run_script: RunScript, call_script: RunScript, tmp_path: Path
) -> None:
    """Both fixtures are one promise: exit code, both streams, files; and the calling process is as it was."""
    import random

    import torch

    script = tmp_path / "script.py"
    script.write_text(
        "import os, random, signal, sys, warnings\n"
        "from stocklora.cli.console import UserError, run_script, say\n"
        "import torch\n"
        "def body():\n"
        "    say(f'{sys.argv[1:]} 价格 {sys.stdin.read()!r} {os.environ[\"GIVEN\"]}')\n"
        "    warnings.warn('careful', stacklevel=1)\n"
        "    random.seed(1); torch.manual_seed(1); torch.set_num_threads(3)\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    os.environ['LEFT'] = 'x'\n"
        "    open('made', 'w').close()\n"
        "    if sys.argv[1] == 'bad': raise UserError('wrong\\nhere')\n"
        "sys.exit(run_script(body))\n",
        encoding="utf-8",
    )

    def state() -> list[object]:
        handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
        return [handler, threads, dict(os.environ), Path.cwd(), sys.argv[:], sys.path[:], random.getstate(), sys.stdin]

    for word, code in (("good", 0), ("bad", 2)):
        told = []
        for name, run in (("process", run_script), ("call", call_script)):
            (tmp_path / name / word).mkdir(parents=True)
            before, drawn = state(), torch.get_rng_state()
            env = {"GIVEN": "a word", "PYTHONPATH": str(REPO_ROOT)}
            result = run(str(script), word, cwd=tmp_path / name / word, env=env)
            assert state() == before
            assert torch.equal(torch.get_rng_state(), drawn)
            assert [path.name for path in (tmp_path / name / word).iterdir()] == ["made"]
            told.append((result.returncode, result.stdout, result.stderr))
        assert told[0] == told[1]
        assert told[0][0] == code
