"""`scripts/qlora/build_instruction_dataset.py` as a user runs it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from source_tree import RunScript

SCRIPT = "scripts/qlora/build_instruction_dataset.py"


def one_error(call_script: RunScript, cwd: Path, *arguments: object) -> str:
    result = call_script(SCRIPT, *arguments, cwd=cwd)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_the_documents_command(run_script: RunScript, repo_root: Path, tmp_path: Path) -> None:
    """As written, with a database of that name in the working folder; then the document's look at three rows."""
    sample = repo_root / "data" / "sample" / "finance_news.db"
    (tmp_path / "finance_analysis.db").write_bytes(sample.read_bytes())
    arguments = ["--db", "finance_analysis.db", "--output", "data/qlora/instructions.jsonl", "--num_samples", "300"]
    result = run_script(SCRIPT, *arguments, "--show", 3, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("=> ") == 3
    table = [line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["all"]]
    assert table == [["all", "300", "210", "30", "60"]]
    text = (tmp_path / "data" / "qlora" / "instructions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 300
    needed = {
        "instruction",
        "input",
        "output",
        "kind",
        "share",
        "event_id",
        "ticker",
        "windows",
        "date",
        "split",
        "seed",
    }
    assert all(needed <= set(row) for row in rows)
    again = run_script(SCRIPT, *arguments[:3], "again.jsonl", *arguments[4:], cwd=tmp_path)
    assert again.returncode == 0
    assert (tmp_path / "again.jsonl").read_text(encoding="utf-8") == text  # byte for byte, in another process


def test_without_a_database_the_bundled_one_is_used(call_script: RunScript, tmp_path: Path) -> None:
    result = call_script(SCRIPT, "--num_samples", 20, "--output", "rows.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))) == 20


def test_a_missing_database_names_the_bundled_one(call_script: RunScript, tmp_path: Path) -> None:
    line = one_error(call_script, tmp_path, "--db", "finance_analysis.db")
    assert "finance_analysis.db" in line
    assert "--db data/sample/finance_news.db" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DROP TABLE event_impacts", "no table event_impacts"),
        ("ALTER TABLE events DROP COLUMN consensus", "table events has no column consensus"),
        ("DELETE FROM events", "table events has no usable row"),
        ("DELETE FROM event_impacts; DELETE FROM events WHERE source = 'calendar'", "no event carries a question"),
        ("UPDATE events SET ts_local = '2025-01-06'", "too few for --split"),
    ],
)
def test_an_unfit_database_is_one_line(
    statement: str, says: str, call_script: RunScript, repo_root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "news.db"
    path.write_bytes((repo_root / "data" / "sample" / "finance_news.db").read_bytes())
    with sqlite3.connect(path) as connection:
        connection.executescript(statement)
    connection.close()
    line = one_error(call_script, tmp_path, "--db", "news.db")
    assert says in line
    assert "news.db" in line or "--split" in line


def test_a_file_that_is_no_database(call_script: RunScript, tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, only text " * 50, encoding="utf-8")
    assert "notes.db is not an SQLite database" in one_error(call_script, tmp_path, "--db", "notes.db")


def test_a_name_too_long_for_any_file(call_script: RunScript, tmp_path: Path) -> None:
    assert "cannot read" in one_error(call_script, tmp_path, "--db", "n" * 300)


def test_a_wrong_config_key_names_the_nearest(call_script: RunScript, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("num_sample: 3\n", encoding="utf-8")
    assert "did you mean 'num_samples'?" in one_error(call_script, tmp_path, "--config", "c.yaml")
