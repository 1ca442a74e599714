"""Check instruction rows before anything is trained on them.

    python -m stocklora.instruct.lint data/qlora/instructions.jsonl
    python -m stocklora.instruct.lint data/*.json --model_path models/smollm2-135m --max_length 512

Every fault is a line: file, row, field, what is wrong. Without a model the rows are checked as text: form, roles and
their order, empty answers, repeated rows, a question or an event in two parts of the split, labels and JSON that do
not agree with the answer; control tokens inside text are warned of. With --model_path rows are also rendered by the
model's chat template: rows that lose tokens to --max_length, rows without a supervised token, and the share of tokens
that the loss is taken on.

Exit code: 0 without faults, 1 with faults, 2 where a file or the model cannot be read.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocklora.cli.console import UserError, print_table, run_script, say
from stocklora.cli.settings import ScriptParser
from stocklora.instruct.rows.formats import Fault, Record
from stocklora.instruct.rows.records import given_part, prompt_key, read_with_faults
from stocklora.runtime.files import json_of

if TYPE_CHECKING:
    from stocklora.instruct.rows.chat_template import Encoded

EXIT_FAULTS = 1
# The control tokens of the common chat formats; a tokenizer knows its own.
CONTROL = re.compile(r"<\|[A-Za-z_]+\|>|<｜[^｜]{1,30}｜>|<(?:start|end)_of_turn>|\[/?INST\]")


@dataclass(frozen=True)
class Report:
    """What the linter found.

    Attributes:
        faults: rows that must not be trained on as they are.
        warnings: what deserves a look and may be meant.
        rows: rows that could be read.
        sequences: of each row its tokens, see ``chat_template.encode_answers``; none without a tokenizer, and of a row
            that the chat template refuses.
    """

    faults: list[Fault]
    warnings: list[Fault]
    rows: int
    sequences: list[list[Encoded]] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence before cutting."""
        return [len(encoded.input_ids) + encoded.lost_tokens for row in self.sequences for encoded in row]

    @property
    def supervised_share(self) -> float | None:
        """Share of all tokens that the loss is taken on."""
        total = sum(self.lengths)
        return sum(encoded.supervised for row in self.sequences for encoded in row) / total if total else None


def check_records(records: Iterable[Record], tokenizer: Any = None, max_length: int | None = None) -> Report:
    """Faults and warnings of ``records``, in their order, and their tokens.

    Args:
        tokenizer: of ``chat_template.prepare_tokenizer``; None checks the text alone.
        max_length: tokens a row may have; needs a tokenizer.
    """
    faults: list[Fault] = []
    warnings: list[Fault] = []
    sequences: list[list[Encoded]] = []
    first_row: dict[tuple[str, str], Record] = {}
    first_answer: dict[str, Record] = {}
    first_part: dict[tuple[str, str], Record] = {}
    control = CONTROL if tokenizer is None else _control_of(tokenizer)
    rows = 0
    for record in records:
        rows += 1
        question = prompt_key(record)
        earlier = first_row.setdefault((question, record.answer.strip()), record)
        if earlier is not record:
            faults.append(_fault(record, "", f"repeats {_place(earlier, record)}"))
        elif (other := first_answer.setdefault(question, record)) is not record:
            warnings.append(_fault(record, "", f"the question of {_place(other, record)} with another answer"))
        faults.extend(_split_faults(record, question, first_part))
        faults.extend(_text_faults(record))
        warnings.extend(_control_warnings(record, control))
        if tokenizer is not None:
            sequences.append([])
            faults.extend(_token_faults(record, tokenizer, max_length, sequences[-1]))
    return Report(faults, warnings, rows, sequences)


def _split_faults(record: Record, question: str, first: dict[tuple[str, str], Record]) -> Iterator[Fault]:
    """A part that is none, and a question or an event that stands in two: the test would be known from training."""
    try:
        part = given_part(record)
    except UserError as error:
        yield _fault(record, "split", str(error).removeprefix(f"{record.where}, split: "))
        return
    if part is None:
        return
    keys = {("question", question): "asks the same"}
    if record.meta.get("event_id") not in (None, ""):
        keys["event", str(record.meta["event_id"])] = "is of the same event"
    for key, words in keys.items():
        same = first.setdefault(key, record)
        if given_part(same) != part:
            text = f"'{record.meta['split']}', but {_place(same, record)} {words} in '{same.meta['split']}'"
            yield _fault(record, "split", text)
            return


def _text_faults(record: Record) -> Iterator[Fault]:
    for index, message in enumerate(record.messages):
        if "\ufffd" in message.content:
            yield _fault(record, f"turn {index + 1}", "holds U+FFFD: the text was once read in the wrong encoding")
    if not {"kind", "event_id"} <= record.meta.keys():  # other files may mean other things by `label`
        return
    label, fields = record.meta.get("label"), record.meta.get("fields")
    if isinstance(label, str) and label and label not in record.answer.split("\n", 1)[0]:
        yield _fault(record, "label", f"'{label}' does not stand in the answer's first line")
    if isinstance(fields, dict):
        try:
            agrees = json_of(record.answer) == fields
        except ValueError:
            agrees = False
        if not agrees:
            yield _fault(record, "fields", "the answer is not this JSON object")


def _control_of(tokenizer: Any) -> re.Pattern[str]:
    from stocklora.instruct.rows.chat_template import control_tokens

    return re.compile("|".join(map(re.escape, control_tokens(tokenizer))) or r"(?!)")


def _control_warnings(record: Record, control: re.Pattern[str]) -> Iterator[Fault]:
    """Control tokens in text: they count as the characters they are spelled with, and may be remains of a chat."""
    for index, message in enumerate(record.messages):
        if found := control.search(message.content):
            words = f"holds the control token {found[0]}, which counts as plain text; a rest of another chat format?"
            yield _fault(record, f"turn {index + 1}", words)


def _token_faults(record: Record, tokenizer: Any, max_length: int | None, sequences: list[Encoded]) -> Iterator[Fault]:
    """Faults that the row's tokens show; the tokens go into ``sequences``."""
    from stocklora.instruct.rows.chat_template import encode_answers

    try:
        sequences += encode_answers(tokenizer, record, max_length)
    except UserError as error:
        yield _fault(record, "", str(error).removeprefix(f"{record.where}: "))
        return
    whole = sequences[-1]  # the conversation to its end, and so the longest one
    if whole.lost_tokens:
        length = len(whole.input_ids) + whole.lost_tokens
        lost = f"{whole.lost_tokens:,} of {length:,} tokens lie beyond max_length {max_length:,}"
        rest = "its end token among them" if whole.supervised else "no supervised token is left"
        yield _fault(record, "answer", f"{lost}, {rest}")
    elif not whole.supervised:
        yield _fault(record, "answer", "no supervised token")


def _fault(record: Record, name: str, message: str) -> Fault:
    return Fault(record.file, record.row, name, message)


def _place(record: Record, seen_from: Record) -> str:
    return f"row {record.row}" if record.file == seen_from.file else record.where


def build_parser() -> argparse.ArgumentParser:
    parser = ScriptParser(prog="python -m stocklora.instruct.lint", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="instruction rows, .json or .jsonl")
    parser.add_argument("--model_path", type=Path, metavar="FOLDER", help="model whose tokenizer and template to use")
    parser.add_argument(
        "--max_length", type=int, metavar="TOKENS", help="tokens that training will keep of a row; needs --model_path"
    )
    parser.add_argument("--quiet", action="store_true", help="the summary alone, without a line for each fault")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    if arguments.max_length is not None and arguments.max_length < 1:
        raise UserError(f"--max_length must be at least 1, got {arguments.max_length}")
    if arguments.max_length is not None and arguments.model_path is None:
        raise UserError("--max_length counts tokens of a model: give --model_path FOLDER as well")
    records, unreadable = read_with_faults(arguments.files)
    tokenizer = None
    if arguments.model_path is not None:
        from stocklora.instruct.rows.chat_template import prepare_tokenizer

        tokenizer = prepare_tokenizer(arguments.model_path)
    report = check_records(records, tokenizer, arguments.max_length)
    order = {path: place for place, path in enumerate(arguments.files)}
    faults = sorted([*unreadable, *report.faults], key=lambda fault: (order[fault.file], fault.row))
    if not records and not faults:
        raise UserError(f"{', '.join(map(str, arguments.files))}: no rows")
    if not arguments.quiet:
        for fault in faults:
            say(str(fault))
        for warning in report.warnings:
            say(f"warning: {warning}")
    summarize(records, faults, report)
    return EXIT_FAULTS if faults else 0


def summarize(records: Sequence[Record], faults: Sequence[Fault], report: Report) -> None:
    """A table of what the files hold, and one line with the verdict."""
    bad = len({(fault.file, fault.row) for fault in faults})
    rows = [("rows", f"{len(records):,}")]
    for name in ("split", "kind"):
        counts = Counter(str(record.meta[name]) for record in records if record.meta.get(name))
        rows += [(f"{name} {value}", f"{count:,}") for value, count in sorted(counts.items())]
    sizes = {
        "characters of a question": [sum(len(message.content) for message in record.prompt) for record in records],
        "characters of an answer": [len(record.answer) for record in records],
        "tokens of a row": report.lengths,
    }
    rows += [(f"{of}, median", f"{statistics.median(found):,.0f}") for of, found in sizes.items() if found]
    if report.lengths:
        rows.append(("tokens of a row, most", f"{max(report.lengths):,}"))
        rows.append(("tokens supervised", f"{100 * (report.supervised_share or 0):.1f}%"))
    print_table("Instruction rows", ("", "value"), rows)
    warned = f", {len(report.warnings):,} warning(s)" if report.warnings else ""
    say(f"{len(faults):,} fault(s) in {bad:,} row(s){warned}" if faults else f"no faults{warned}")
