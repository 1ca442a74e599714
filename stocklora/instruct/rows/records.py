"""Conversations to train on: read from JSON or JSON lines, written, split without leaks.

The forms that a row may have are in ``formats.py``. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, one_line, warn
from stocklora.cli.settings import parse_json
from stocklora.instruct.rows.formats import FORMS, Fault, Record, parse_row, row_of
from stocklora.runtime.files import as_json_types, read_chinese_text, write_text

PARTS = ("train", "validation", "test")
PART_NAMES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "eval": "validation", "test": "test",
}  # fmt: skip
MOST_FAULTS_SHOWN = 3


def read_records(paths: Path | str | Sequence[Path | str], *, skip_bad: bool = False) -> list[Record]:
    """The conversations in JSON (a list) or JSON-lines files, in order.

    Args:
        skip_bad: pass over rows that are no conversation, with a warning that counts them.

    Raises:
        UserError: a missing or unreadable file, no usable row, or a bad row where they are not skipped.
    """
    records, faults = read_with_faults(paths)
    if faults and not skip_bad:
        raise UserError(f"{first_of(faults)}. List all with: python -m stocklora.instruct.lint {faults[0].file}")
    if faults:
        rows = {(fault.file, fault.row) for fault in faults}
        warn(f"{len(rows)} bad row(s) skipped, the first: {faults[0]}")
    if not records:
        names = ", ".join(map(str, _as_paths(paths))) or "nothing"
        raise UserError(f"no usable row in {names}; a row is alpaca, ShareGPT or messages JSON")
    return records


def first_of(faults: Sequence[Fault]) -> str:
    """The first of ``faults``, and how many more there are."""
    more = f"; and {len(faults) - MOST_FAULTS_SHOWN} more" if len(faults) > MOST_FAULTS_SHOWN else ""
    return "; ".join(str(fault) for fault in faults[:MOST_FAULTS_SHOWN]) + more


def read_with_faults(paths: Path | str | Sequence[Path | str]) -> tuple[list[Record], list[Fault]]:
    """The good rows, and what is wrong with each of the others.

    Raises:
        UserError: a file that is missing, unreadable, or not UTF-8.
    """
    records: list[Record] = []
    faults: list[Fault] = []
    for path in _as_paths(paths):
        for row, content, problem in _rows_of(path):
            if problem:
                faults.append(Fault(path, row, "", problem))
                continue
            record, found = parse_row(content, path, row)
            faults.extend(found)
            if record is not None:
                records.append(record)
    return records, faults


def _rows_of(path: Path) -> Iterator[tuple[int, Any, str]]:
    """(row, content, what is wrong) of every row: of a JSON list, of one JSON object, or of JSON lines."""
    text = read_chinese_text(
        path, f"no file {path}; make one with data/prepare_data.py or build_instruction_dataset.py"
    )
    if text.lstrip().startswith("["):
        try:
            rows = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        yield from ((number, content, "") for number, content in enumerate(rows, start=1))
        return
    if text.lstrip().startswith("{") and "\n" in text.strip():
        with contextlib.suppress(ValueError, RecursionError):
            yield 1, parse_json(text), ""  # one row, indented over several lines
            return
    # Not splitlines: that also cuts at U+2028, which a JSON string may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line), ""
            except (ValueError, RecursionError) as error:
                yield number, None, f"not valid JSON: {one_line(str(error))}"


def write_records(records: Iterable[Record], path: Path, form: str = "messages") -> None:
    """Write ``records`` atomically: ``.json`` is an indented list, ``.jsonl`` one row a line.

    Args:
        form: ``alpaca``, ``sharegpt`` or ``messages``; each holds whole conversations, and ``meta`` goes along.

    Raises:
        UserError: another suffix, or a path that cannot be written.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    try:
        rows = [as_json_types(row_of(record, form)) for record in records]
    except RecursionError:
        raise UserError(f"cannot write {path}: a row holds lists or objects that are nested too deeply") from None
    if path.suffix.lower() == ".json":
        write_text(path, json.dumps(rows, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    elif path.suffix.lower() == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
    else:
        raise UserError(f"cannot write {path}: the name must end in .json or .jsonl")


def _as_paths(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]


def prompt_key(record: Record) -> str:
    """What makes two questions the same one: their text without letter case, width and white space."""
    text = "\n".join(f"{m.role}:{m.content}" for m in record.prompt if m.role != "system")
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_records(
    records: Sequence[Record], fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 42
) -> dict[str, list[Record]]:
    """Records by part: ``train``, ``validation``, ``test``; rows that share a question or an event stay together.

    A row's own ``split`` decides where it has one. The others are cut by ``date``, the latest being the test, if all of
    them have a date and there are dates enough; else by a hash of the question and ``seed``, whatever their order.

    Args:
        fractions: shares of the rows, in the order of ``PARTS``; 0 leaves a part empty.

    Raises:
        UserError: fractions that are no shares of 1, or an unknown ``split``.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise UserError(f"the split must be three shares that sum to 1, the first above 0; got {list(fractions)}")
    part_of: dict[int, str] = {}
    open_groups: list[list[int]] = []
    for group in _groups(records):
        given = {given_part(records[index]) for index in group} - {None}
        # Two parts in one group is the file's own doing, which the linter reports; each row then keeps its part.
        for index in group:
            if given:
                part_of[index] = given_part(records[index]) or min(str(name) for name in given)
        if not given:
            open_groups.append(group)
    part_of.update(_cut_by_date(records, open_groups, fractions) or _cut_by_hash(records, open_groups, fractions, seed))
    parts: dict[str, list[Record]] = {name: [] for name in PARTS}
    for index, record in enumerate(records):
        parts[part_of[index]].append(record)
    return parts


def _groups(records: Sequence[Record]) -> list[list[int]]:
    """Indices of records that share a question or an event, directly or through others."""
    parent = list(range(len(records)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[Any, int] = {}
    for index, record in enumerate(records):
        keys: list[Any] = [prompt_key(record)]
        if record.meta.get("event_id") not in (None, ""):
            keys.append(("event", str(record.meta["event_id"])))
        for key in keys:
            parent[root(index)] = root(first.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(records)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def given_part(record: Record) -> str | None:
    """The part that a row's own ``split`` names.

    Raises:
        UserError: it names none.
    """
    name = record.meta.get("split")
    if name in (None, ""):
        return None
    if not isinstance(name, str) or name.lower() not in PART_NAMES:
        raise UserError(f"{record.where}, split: must be one of {', '.join(PARTS)}; got {name!r}")
    return PART_NAMES[name.lower()]


def _cut_by_date(
    records: Sequence[Record], groups: Sequence[Sequence[int]], fractions: Sequence[float]
) -> dict[int, str] | None:
    """Part of each index by date, or None where dates are missing or too few. A group counts as of its first day."""
    first_day = []
    for group in groups:
        days = [_day_of(records[index]) for index in group]
        if None in days:
            return None
        first_day.append(min(day for day in days if day is not None))
    sizes: Counter[date] = Counter()
    for day, group in zip(first_day, groups, strict=True):
        sizes[day] += len(group)
    part_of_day = cut_days(sizes, fractions)
    if part_of_day is None:
        return None
    return {index: part_of_day[day] for day, group in zip(first_day, groups, strict=True) for index in group}


def cut_days(sizes: Mapping[date, int], fractions: Sequence[float]) -> dict[date, str] | None:
    """Part of each day, in order of time and by the number of rows on each; None where the days are too few.

    A day goes where its middle row lies, but every part whose share is above 0 gets a day.
    """
    wanted = [name for name, share in zip(PARTS, fractions, strict=True) if share > 0]
    if len(sizes) < len(wanted):
        return None
    total, done, place = sum(sizes.values()), 0.0, 0
    ends = [sum(fractions[: PARTS.index(name) + 1]) * total for name in wanted]
    part_of_day: dict[date, str] = {}
    for number, day in enumerate(sorted(sizes)):
        days_left, parts_left = len(sizes) - number, len(wanted) - place - 1
        if number and parts_left and (done + sizes[day] / 2 > ends[place] or days_left <= parts_left):
            place += 1
        part_of_day[day] = wanted[place]
        done += sizes[day]
    return part_of_day


def _cut_by_hash(
    records: Sequence[Record], groups: Sequence[Sequence[int]], fractions: Sequence[float], seed: int
) -> dict[int, str]:
    """Part of each index by the order of a seeded hash, so that neither row order nor Python's own hash matters."""

    def rank(group: Sequence[int]) -> str:
        key = min(prompt_key(records[index]) for index in group)
        return hashlib.sha256(f"{seed}\0{key}".encode()).hexdigest()

    total, done = sum(map(len, groups)), 0
    part_of: dict[int, str] = {}
    ends = [sum(fractions[: place + 1]) * total for place in range(3)]
    for group in sorted(groups, key=rank):
        middle = done + len(group) / 2
        name = next((part for part, end in zip(PARTS, ends, strict=True) if middle <= end + 1e-9), PARTS[-1])
        part_of.update(dict.fromkeys(group, name))
        done += len(group)
    return part_of


def _day_of(record: Record) -> date | None:
    try:
        return date.fromisoformat(str(record.meta.get("date", ""))[:10])
    except ValueError:
        return None
