"""Exit codes, one-line errors, tables that lose nothing, progress that stays out of the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stocklora.cli.console import UserError, one_line, print_table, progress, run_script, say, warn

PRELUDE = "import sys\nfrom stocklora.cli.console import *\nfrom stocklora.cli.console import progress\n"


def python(code: str, repo_root: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        cwd=repo_root,
        env={**os.environ, **env},
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_body_gives_the_exit_code(result: int | None, code: int) -> None:
    assert run_script(lambda: result) == code


def test_a_user_error_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise UserError("row 3:\n   Close is 'abc';\tgive a number")

    assert run_script(body) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: row 3: Close is 'abc'; give a number\n"
    assert captured.out == ""


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise KeyboardInterrupt

    assert run_script(body) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_our_own_fault_keeps_its_traceback(repo_root: Path) -> None:
    result = python("def body(): raise KeyError('fault')\nsys.exit(run_script(body))", repo_root)
    assert result.returncode == 1
    assert b"Traceback" in result.stderr
    assert b"KeyError: 'fault'" in result.stderr


@pytest.mark.parametrize("script", ["download.py", "train.py", "backtest.py", "quick_start.py", "training/evaluate.py"])
def test_an_environment_that_is_not_active_is_one_line(script: str, repo_root: Path, tmp_path: Path) -> None:
    """``-S``: no installed packages, as with the system's Python; ``--help`` needs none."""
    command = [sys.executable, "-S", str(repo_root / script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "pip install -r requirements_stable.txt" in done.stderr
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shown.returncode == 0


def test_another_pipe_that_breaks_is_not_silenced() -> None:
    def body() -> int:
        raise BrokenPipeError("a worker went away")

    with pytest.raises(BrokenPipeError, match="a worker"):
        run_script(body)


@pytest.mark.parametrize("write", ["say('x' * 100)", "print('x' * 100)"])
def test_a_reader_that_leaves_ends_the_run_quietly(repo_root: Path, tmp_path: Path, write: str) -> None:
    code = f"def body():\n    for _ in range(5000): {write}\nsys.exit(run_script(body))"
    result = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$CODE" 2>"$ERRORS" | head -n 1; echo "${{PIPESTATUS[0]}}"'],
        cwd=repo_root,
        env={**os.environ, "CODE": PRELUDE + code, "ERRORS": str(tmp_path / "errors")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.splitlines() == ["x" * 100, "141"]
    assert (tmp_path / "errors").read_text() == ""


def test_a_terminal_without_a_character_gets_an_escape(repo_root: Path) -> None:
    result = python(
        "def body():\n    say('价格 done')\nsys.exit(run_script(body))", repo_root, PYTHONIOENCODING="ascii:strict"
    )
    assert result.returncode == 0
    assert result.stdout == b"\\u4ef7\\u683c done\n"


def test_importing_the_console_is_light(repo_root: Path) -> None:
    result = python(
        "import stocklora.cli.settings, stocklora.runtime.files\n"
        "print([name for name in ('rich', 'torch', 'numpy', 'pandas', 'yaml') if name in sys.modules])",
        repo_root,
    )
    assert result.stdout.strip() == b"[]"


@given(st.text())
def test_one_line_is_one_line(text: str) -> None:
    folded = one_line(text)
    assert len(folded.splitlines()) <= 1
    assert folded.split() == text.split()


def test_warn_and_say(capsys: pytest.CaptureFixture[str]) -> None:
    warn("low\nvolume")
    say("out")
    say()
    captured = capsys.readouterr()
    assert captured.err == "warning: low volume\n"
    assert captured.out == "out\n\n"


def test_table_shows_brackets_colons_and_wide_rows_whole(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    print_table("80% [interval]", ["Ticker", "[bold]Close", "Note"], [["[AAPL]", 1.5, ":smile:"], ["价格", 2, long]])
    out = capsys.readouterr().out
    for text in ("80% [interval]", "[bold]Close", "[AAPL]", "1.5", ":smile:", "价格", long):
        assert text in out
    assert "…" not in out
    assert "\x1b" not in out


def test_table_aligns_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("", ["Day", "Close"], [["1", "9.5"], ["2", "100.5"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    ends = {len(line) for line in lines if line.endswith((".5", "Close"))}
    assert len(ends) == 1


def test_table_on_a_narrow_terminal_folds_and_loses_no_digit(repo_root: Path) -> None:
    code = (
        "import rich.console\n"
        "sys.stdout.isatty = lambda: True\n"
        "rich.console.Console.is_dumb_terminal = False\n"  # or the width given below is not used
        "print_table('t', ['Ticker', 'Close', 'P05', 'P95'], [['AAPL', '1234567.25', '2345678.50', '3456789.75']])"
    )
    result = python(code, repo_root, COLUMNS="24", TERM="dumb", NO_COLOR="1", PYTHONIOENCODING="utf-8")
    shown = re.sub(r"\x1b\[\d+m", "", result.stdout.decode())
    assert result.returncode == 0, result.stderr.decode()
    assert max(map(len, shown.splitlines())) <= 24
    assert "…" not in shown
    digits = [character for character in shown if character.isdigit()]
    assert sorted(digits) == sorted("05951234567252345678503456789" + "75")


@pytest.mark.parametrize("cells", [[], [[]], [["a"]]])
def test_tables_with_little_in_them(cells: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", ["one", "two"], cells)
    assert "one" in capsys.readouterr().out


def test_progress_is_silent_off_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("loss {task.fields[loss]}") as bar:
        task = bar.add_task("train", total=10, loss="-")
        bar.update(task, advance=5, loss="1.0")
        print("kept")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == "kept\n"


def test_progress_on_a_terminal_leaves_redirected_output_alone(repo_root: Path) -> None:
    pty = pytest.importorskip("pty")
    code = PRELUDE + (
        "import time\n"
        "with progress('loss {task.fields[loss]}') as bar:\n"
        "    known = bar.add_task('train [1/2]', total=2, loss='-')\n"
        "    unknown = bar.add_task('fetch', total=None, loss='-')\n"
        "    for _ in range(2):\n"
        "        time.sleep(0.02)\n"
        "        bar.update(known, advance=1, loss='0.5')\n"
        "        bar.update(unknown, advance=1)\n"
        "    print('in the log')\n"
    )
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=repo_root,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=child,
    )
    os.close(child)
    drawn = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        drawn += part
    os.close(parent)
    assert process.stdout is not None
    assert process.stdout.read() == b"in the log\n"
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    for text in (b"train [1/2]", b"2/2", b"2/?", b"/s", b"loss 0.5"):
        assert text in drawn


def test_a_message_as_long_as_a_damaged_file_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("x" * 100_000)

    assert run_script(fail) == 2
    assert len(capsys.readouterr().err) < 2100


def test_progress_is_told_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "progress.jsonl"
    monkeypatch.setenv("STOCKLORA_PROGRESS", str(path))
    with progress("loss {task.fields[loss]}") as bar:
        task = bar.add_task("train", total=1000, loss="-")
        for step in range(1000):
            bar.update(task, advance=1, loss=f"{1000 - step}")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) < 50  # a line a second at most, and the last
    assert {name: lines[-1][name] for name in ("what", "done", "total", "loss")} == {
        "what": "train", "done": 1000, "total": 1000, "loss": "1",
    }  # fmt: skip
    monkeypatch.setenv("STOCKLORA_PROGRESS", str(tmp_path))  # a folder takes no lines, and costs no run
    with progress() as bar:
        bar.update(bar.add_task("train", total=1), advance=1)
