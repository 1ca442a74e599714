"""Conversations: three forms read and written without loss, bad rows named, splits without leaks."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_tree import RunScript

from stocklora.cli.console import UserError
from stocklora.instruct.rows.formats import FORMS, Message, Record, parse_row, row_of
from stocklora.instruct.rows.records import (
    PARTS,
    prompt_key,
    read_records,
    read_with_faults,
    split_records,
    write_records,
)

ALPACA = {"instruction": "问", "input": "料", "output": "答", "system": "你是助手", "history": [["早", "早上好"]]}
SHAREGPT = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "kind": "k"}
MESSAGES = {
    "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
    "date": "2024-01-02",
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def asked(question: str, **meta: Any) -> Record:
    return Record((Message("user", question), Message("assistant", "a")), meta)


def test_forms_are_told_apart_row_by_row(tmp_path: Path) -> None:
    records = read_records(write_lines(tmp_path / "mixed.jsonl", [ALPACA, SHAREGPT, MESSAGES]))
    assert [record.form for record in records] == ["alpaca", "sharegpt", "messages"]
    assert [record.row for record in records] == [1, 2, 3]
    assert [m.role for m in records[0].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert records[0].prompt[-1].content == "问\n料"
    assert {record.answer for record in records} == {"答"}
    assert records[1].meta == {"kind": "k"}
    assert records[2].meta == {"date": "2024-01-02"}


@given(
    system=st.none() | TEXT,
    turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    extra=st.none() | TEXT,
    meta=st.dictionaries(st.sampled_from(["kind", "event_id", "date", "note"]), TEXT, max_size=3),
    form=st.sampled_from(FORMS),
)
def test_every_form_holds_every_conversation(
    system: str | None,
    turns: list[tuple[str, str]],
    extra: str | None,
    meta: dict[str, Any],
    form: str,
) -> None:
    messages = [] if system is None else [Message("system", system)]
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    if extra is not None:
        messages[-2] = Message("user", f"{turns[-1][0]}\n{extra}")
        meta = {**meta, "input": extra}
    record = Record(tuple(messages), meta)
    again, faults = parse_row(json.loads(json.dumps(row_of(record, form))))
    assert faults == []
    assert again is not None
    assert (again.messages, again.meta, again.form) == (record.messages, record.meta, form)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_files_round_trip(form: str, suffix: str, tmp_path: Path) -> None:
    first = read_records(write_lines(tmp_path / "in.jsonl", [ALPACA, SHAREGPT, MESSAGES, {**MESSAGES, "n": "\u2028"}]))
    write_records(first, tmp_path / f"out.{suffix}", form)
    second = read_records(tmp_path / f"out.{suffix}")
    assert [(r.messages, r.meta) for r in second] == [(r.messages, r.meta) for r in first]


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({"instruction": "q", "output": " "}, "output", "is empty"),
        ({"instruction": "q"}, "output", "is missing"),
        ({"output": "a"}, "instruction", "is missing"),
        ({"instruction": "q", "output": 3}, "output", "must be text"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history[0]", "pair"),
        ({"instruction": "q", "output": "a", "messages": []}, "messages", "one form a row"),
        ({"messages": []}, "messages", "an empty list"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "user first"),
        ({"messages": [{"role": "user", "content": "q"}]}, "messages", "must end with an answer"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "messages[0].role", "must be one of"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]},
            "messages[1].content",
            "must be text",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [1]}]},
            "messages[1].tool_calls",
            "not supported",
        ),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "conversations[0].from", "must be one of"),
        ({**MESSAGES, "input": "elsewhere"}, "input", "not the end"),
        ({"instruction": "q", "output": "\ud800"}, "output", "surrogate"),
        ({"text": "q"}, "", "neither alpaca"),
        ([1], "", "must be a JSON object"),
    ],
)
def test_a_bad_row_names_its_field(row: Any, field: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(MESSAGES) + "\n\n" + json.dumps(row), encoding="utf-8")
    records, faults = read_with_faults(path)
    assert len(records) == 1
    assert [(fault.row, fault.field) for fault in faults] == [(3, field)]
    assert says in faults[0].message
    with pytest.raises(UserError, match=r"rows.jsonl, row 3"):
        read_records(path)


def test_bad_rows_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(MESSAGES) + '\n{"a": \n{"instruction": "q", "output": ""}\n', encoding="utf-8")
    assert len(read_records(path, skip_bad=True)) == 1
    assert "2 bad row(s) skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"[1,", "not valid JSON"),
        (b"", "no usable row"),
        (b'{"a": 1}', "neither alpaca"),
        (b'[{"instruction": "q", "output": "a", "n": NaN}]', "not valid JSON"),  # as in JSON lines
        (b'[{"instruction": "q", "output": "a", "output": "b"}]', "twice"),
    ],
)
def test_unreadable_files_say_so(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_records(tmp_path / "f.json")
    with pytest.raises(UserError, match="no file"):
        read_records(tmp_path / "none.json")


def test_what_is_nested_too_deeply_is_not_written(tmp_path: Path) -> None:
    note: list[Any] = []
    for _ in range(2_000):
        note = [note]
    with pytest.raises(UserError, match="nested too deeply"):
        write_records([asked("q", note=note)], tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_byte_order_mark_and_a_list_in_jsonl_are_read(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps([MESSAGES, ALPACA]), encoding="utf-8-sig")
    assert len(read_records([tmp_path / "f.jsonl"])) == 2


@given(
    days=st.lists(st.integers(0, 40), min_size=3, max_size=60),
    events=st.integers(1, 30),
    questions=st.integers(1, 30),
)
def test_split_by_date_never_lets_an_event_or_a_question_straddle(days: list[int], events: int, questions: int) -> None:
    records = [
        asked(
            f"q{index % questions}",
            event_id=f"e{day % events}",
            date=f"2024-{1 + day // 28:02d}-{1 + day % 28:02d}",
        )
        for index, day in enumerate(days)
    ]
    parts = split_records(records)
    assert sum(map(len, parts.values())) == len(records)
    for key in (prompt_key, lambda record: record.meta["event_id"]):
        seen = [{key(record) for record in parts[name]} for name in PARTS]
        assert not seen[0] & seen[1]
        assert not seen[0] & seen[2]
        assert not seen[1] & seen[2]


def test_split_by_date_keeps_time_in_order_and_shares() -> None:
    records = [asked(f"q{n}", date=f"2024-{1 + n // 25:02d}-{1 + n % 25:02d}") for n in range(250)]
    parts = split_records(list(reversed(records)), (0.6, 0.2, 0.2))
    days = {name: [record.meta["date"] for record in rows] for name, rows in parts.items()}
    assert max(days["train"]) < min(days["validation"]) <= max(days["validation"]) < min(days["test"])
    assert [len(parts[name]) for name in PARTS] == [150, 50, 50]


def test_split_without_dates_is_seeded_and_blind_to_order() -> None:
    records = [asked(f"q{n}") for n in range(100)] + [asked("ｑ5 ")]
    one, other = split_records(records, seed=1), split_records(list(reversed(records)), seed=1)
    for name in PARTS:
        assert {r.prompt for r in one[name]} == {r.prompt for r in other[name]}
    assert abs(len(one["train"]) - 80) <= 2
    assert {prompt_key(r) for r in one["test"]} != {prompt_key(r) for r in split_records(records, seed=2)["test"]}
    holders = [name for name in PARTS for r in one[name] if prompt_key(r) == prompt_key(asked("q5"))]
    assert len(holders) == 2
    assert len(set(holders)) == 1


def test_a_rows_own_split_decides() -> None:
    records = [asked("a", split="test"), asked("b", split="dev"), asked("c", split="train"), asked("a ")]
    parts = split_records(records)
    assert [r.prompt[0].content for r in parts["test"]] == ["a", "a "]
    assert [len(parts[name]) for name in PARTS] == [1, 1, 2]
    with pytest.raises(UserError, match="'holdout'"):
        split_records([asked("a", split="holdout")])


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.6, 0.1), (1.2, -0.1, -0.1), (0.0, 0.5, 0.5)])
def test_fractions_must_be_shares(fractions: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="three shares"):
        split_records([asked("a")], fractions)


@given(st.text(string.ascii_letters + "問 1", max_size=8))
def test_question_keys_ignore_case_width_and_blanks(text: str) -> None:
    assert prompt_key(asked(f"x{text}")) == prompt_key(asked(f"  X{text.upper()}　"))


def test_prepare_data_makes_the_bundled_instructions(run_script: RunScript, repo_root: Path, tmp_path: Path) -> None:
    """`python data/prepare_data.py` from any folder; the bundled file is what the lessons give."""
    before = (repo_root / "data" / "chinese_instructions.json").read_bytes()
    result = run_script("data/prepare_data.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "verified" in result.stdout
    assert (repo_root / "data" / "chinese_instructions.json").read_bytes() == before
    rows = json.loads(before)
    assert len(rows) >= 60
    assert all(set(row) == {"instruction", "input", "output"} for row in rows)
    store = read_records(repo_root / "data" / "store_xhs_sft_samples.jsonl")
    assert len(store) >= 30


def test_prepare_data_converts_and_splits(call_script: RunScript, tmp_path: Path) -> None:
    rows = [{**ALPACA, "instruction": f"问{n}", "date": f"2024-02-{1 + n:02d}"} for n in range(20)]
    write_lines(tmp_path / "in.jsonl", rows)
    command = ["data/prepare_data.py", "--convert", "in.jsonl", "--to", "sharegpt", "--output", "chats.json"]
    assert call_script(*command, cwd=tmp_path).returncode == 0
    first = json.loads((tmp_path / "chats.json").read_text(encoding="utf-8"))[0]
    assert [turn["from"] for turn in first["conversations"]] == ["system", "human", "gpt", "human", "gpt"]
    result = call_script("data/prepare_data.py", "--split", "chats.json", "--output", "parts", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    parts = {name: read_records(tmp_path / "parts" / f"{name}.jsonl") for name in PARTS}
    assert [len(parts[name]) for name in PARTS] == [16, 2, 2]
    assert all(record.form == "sharegpt" for part in parts.values() for record in part)
    (tmp_path / "afile").write_text("", encoding="utf-8")
    write_lines(tmp_path / "tests.jsonl", [{**ALPACA, "split": "test"}])  # no row for the first part
    blocked = call_script("data/prepare_data.py", "--split", "tests.jsonl", "--output", "afile", cwd=tmp_path)
    assert (blocked.returncode, len(blocked.stderr.splitlines())) == (2, 1), blocked.stderr
    missing = call_script("data/prepare_data.py", "--convert", "in.jsonl", cwd=tmp_path)
    assert missing.returncode == 2
    assert "--output" in missing.stderr


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ('{"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}', "问"),
        ('{"messages": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}', "问"),
        ('{\n  "instruction": "判断情绪",\n  "input": "公司增长",\n  "output": "利好。"\n}\n', "判断情绪\n公司增长"),
        ('{"instruction": "判断情绪", "input": "公司增长", "output": "利好"}'.encode("gbk"), "判断情绪\n公司增长"),
    ],
    ids=["messages' turns under conversations", "ShareGPT's turns under messages", "an indented object", "GBK"],
)
def test_what_is_unambiguous_is_read(content: str | bytes, question: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (record,) = read_records(path)
    assert record.prompt[-1].content == question
    assert record.row == 1


def test_tools_of_a_row_are_checked(tmp_path: Path) -> None:
    tool = {"name": "price", "parameters": {"type": "object"}}
    row = {"instruction": "q", "output": "a"}
    (record,) = read_records(write_lines(tmp_path / "a.jsonl", [{**row, "tools": json.dumps([tool])}]))
    assert record.tools == [{"type": "function", "function": tool}]
    for wrong in ("no JSON", [1], [{"type": "function", "function": {}}]):
        _, (fault,) = read_with_faults(write_lines(tmp_path / "b.jsonl", [{**row, "tools": wrong}]))
        assert fault.field.startswith("tools")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "alpaca"], "--to needs --convert FILE"),
        (["--convert", "in.jsonl", "--output", "x.jsonl", "--seed", "3"], "--seed needs --split FILE"),
        (["--skip_bad"], "--skip_bad needs --convert FILE or --split FILE"),
    ],
)
def test_prepare_data_refuses_flags_of_another_task(
    call_script: RunScript, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = call_script("data/prepare_data.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert words in result.stderr
