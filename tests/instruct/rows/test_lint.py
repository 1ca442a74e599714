"""The linter: every kind of fault is named by file, row and field, and the exit code says whether there are any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from script_calls import call_in_process
from source_tree import REPO_ROOT

from stocklora.instruct.rows.chat_template import prepare_tokenizer
from stocklora.instruct.rows.formats import Message, Record
from stocklora.instruct.rows.lint import Report, check_records
from stocklora.instruct.rows.records import read_records

GOOD = {"instruction": "What is a bond?", "output": "A loan that can be traded."}


def lint(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return call_in_process(REPO_ROOT / "stocklora" / "instruct" / "lint.py", list(map(str, arguments)), cwd)


def lint_as_documented(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stocklora.instruct.lint", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def record(question: str, answer: str, row: int, **meta: Any) -> Record:
    return Record((Message("user", question), Message("assistant", answer)), meta, Path("f"), row)


def faults_of(report: Report) -> list[tuple[int, str]]:
    return [(fault.row, fault.field) for fault in report.faults]


def test_good_rows_have_no_faults(tmp_path: Path) -> None:
    result = lint_as_documented(write(tmp_path / "rows.jsonl", [GOOD]), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no faults" in result.stdout
    for name in ("chinese_instructions.json", "store_xhs_sft_samples.jsonl"):
        records = read_records(REPO_ROOT / "data" / name)
        assert check_records(records).faults == []
        assert check_records(records).warnings == []


def test_every_fault_is_a_line_with_its_place(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {"instruction": "q", "output": ""},
        {"instruction": " what is a BOND? ", "output": "A loan that can be traded.\n"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "q"}]},
        {"instruction": "q", "output": "half a char\ufffd"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n{not json\n")
    result = lint("rows.jsonl", cwd=tmp_path)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "rows.jsonl, row 2, output: is empty"
    assert lines[1] == "rows.jsonl, row 3: repeats row 1"
    assert lines[2].startswith("rows.jsonl, row 4, messages: turn 2 is by user")
    assert lines[3].startswith("rows.jsonl, row 5, turn 2: holds U+FFFD")
    assert lines[4].startswith("rows.jsonl, row 6: not valid JSON")
    assert lines[-1] == "5 fault(s) in 5 row(s)"


def test_another_answer_to_a_question_is_a_warning() -> None:
    report = check_records([record("q", "a", 1), record("q", "b", 2)])
    assert report.faults == []
    assert [warning.row for warning in report.warnings] == [2]


def test_a_question_in_two_parts_is_a_leak() -> None:
    report = check_records([record("q", "a", 1, split="train"), record("q", "b", 2, split="test")])
    assert faults_of(report) == [(2, "split")]
    assert "'test'" in report.faults[0].message


def test_an_event_in_two_parts_is_a_leak_and_a_part_has_a_known_name() -> None:
    rows = [
        record("q1", "a", 1, event_id="e1", split="train"),
        record("q2", "a", 2, event_id="e1", split="test"),
        record("q3", "a", 3, event_id="e2", split="dev"),
        record("q4", "a", 4, event_id="e2", split="validation"),  # another name of the same part
        record("q5", "a", 5, event_id="e1"),  # goes where its event is
        record("q6", "a", 6, split="holdout"),
        record("q7", "a", 7, split=["train"]),
    ]
    report = check_records(rows)
    assert faults_of(report) == [(2, "split"), (6, "split"), (7, "split")]
    assert "row 1 is of the same event in 'train'" in report.faults[0].message
    assert report.faults[1].message == "must be one of train, validation, test; got 'holdout'"


@pytest.mark.parametrize(
    ("answer", "meta", "field"),
    [
        ("情绪：利好\n理由：涨", {"label": "利空"}, "label"),
        ("情绪：利好\n理由：涨", {"label": "利好"}, None),
        ('{"a": 1}', {"fields": {"a": 1}}, None),
        ('{"a": 2}', {"fields": {"a": 1}}, "fields"),
        ("not json", {"fields": {"a": 1}}, "fields"),
        ("[" * 100_000, {"fields": {"a": 1}}, "fields"),
    ],
)
def test_labels_and_fields_agree_with_the_answer(answer: str, meta: dict[str, Any], field: str | None) -> None:
    report = check_records([record("q", answer, 1, kind="sentiment", event_id="e1", **meta)])
    assert [fault.field for fault in report.faults] == ([] if field is None else [field])
    assert check_records([record("q", answer, 1, **meta)]).faults == []  # not our rows: `label` may mean anything


def test_rows_that_lose_tokens_and_rows_without_supervision(tiny_model: Path) -> None:
    tokenizer = prepare_tokenizer(tiny_model)
    rows = [record("short", "yes", 1), record("short too", "word " * 60, 2), record("long " * 60, "yes", 3)]
    whole = check_records(rows, tokenizer)
    assert whole.faults == []
    assert whole.supervised_share is not None
    assert 0 < whole.supervised_share < 1
    report = check_records(rows, tokenizer, max_length=80)
    assert faults_of(report) == [(2, "answer"), (3, "answer")]
    assert "its end token among them" in report.faults[0].message
    assert "no supervised token is left" in report.faults[1].message
    lost = whole.lengths[1] - 80
    assert f"{lost:,} of {whole.lengths[1]:,} tokens" in report.faults[0].message


def test_with_a_model_the_share_of_supervised_tokens_is_shown(tiny_model: Path, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [GOOD])
    result = lint("rows.jsonl", "--model_path", tiny_model, "--max_length", 512, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "tokens supervised" in result.stdout
    cut = lint("rows.jsonl", "--model_path", tiny_model, "--max_length", 10, "--quiet", cwd=tmp_path)
    assert cut.returncode == 1
    assert "1 fault(s) in 1 row(s)" in cut.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.jsonl"], "no file none.jsonl"),
        (["rows.jsonl", "--max_length", "9"], "--model_path"),
        (["rows.jsonl", "--model_path", "nowhere"], "nowhere"),
    ],
)
def test_user_errors_are_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [GOOD])
    result = lint(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr
