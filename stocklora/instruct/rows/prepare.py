"""The bundled finance instructions, and files of conversations turned into another form or split into parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stocklora.cli.console import UserError, print_table, say
from stocklora.cli.settings import default_of, setting
from stocklora.instruct.rows.formats import FORMS, Record, parse_row
from stocklora.instruct.rows.lint import check_records
from stocklora.instruct.rows.records import PARTS, read_records, split_records, write_records
from stocklora.runtime.files import read_text

# What each flag belongs to.
FOR = {
    "to": ("convert",), "fractions": ("split",), "seed": ("split",), "output": ("convert", "split"),
    "skip_bad": ("convert", "split"),
}  # fmt: skip
SOURCE, BUNDLED = "finance_lessons.md", "chinese_instructions.json"


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of ``data/prepare_data.py``."""

    convert: Path | None = setting(None, "file to convert", section="convert", metavar="FILE")
    to: str = setting("messages", "form of the rows", choices=FORMS, section="convert")
    split: Path | None = setting(
        None, "file to split into train, validation and test files", section="split", metavar="FILE"
    )
    fractions: list[float] = setting(
        [0.8, 0.1, 0.1], "shares of train, validation and test, where rows have no split of their own",
        section="split", nargs="+", metavar="SHARE",
    )  # fmt: skip
    seed: int = setting(42, "of the split of rows without dates", section="split")
    output: Path | None = setting(
        None, "file to write (--convert), or folder of the parts (--split)", section="output", metavar="PATH"
    )
    skip_bad: bool = setting(False, "leave out bad rows instead of stopping", section="output")


def prepare(settings: PrepareSettings, folder: Path) -> None:
    """What ``settings`` ask for; without any, make or verify the bundled instructions in ``folder``."""
    if settings.convert and settings.split:
        raise UserError("--convert and --split are two runs: convert first, then split what that wrote")
    for name, modes in FOR.items():
        given = getattr(settings, name) != default_of(PrepareSettings.__dataclass_fields__[name])
        if given and not any(getattr(settings, mode) for mode in modes):
            raise UserError(f"--{name} needs {' or '.join(f'--{mode} FILE' for mode in modes)}")
    if settings.convert:
        convert(settings.convert, settings)
    elif settings.split:
        split(settings.split, settings)
    else:
        bundle(folder)


def bundle(folder: Path) -> None:
    """Make ``chinese_instructions.json`` from ``finance_lessons.md``, unless it is there and the same."""
    target = folder / BUNDLED
    records = read_lessons(folder / SOURCE)
    faults = check_records(records).faults
    if faults:
        raise UserError(f"{len(faults)} fault(s) in {folder / SOURCE}, the first: {faults[0]}")
    if target.is_file() and _contents(target) == [(r.messages, r.meta.get("input")) for r in records]:
        say(f"verified: {target}, {len(records)} rows, as in {SOURCE}")
    else:
        write_records(records, target, "alpaca")
        say(f"saved: {target}, {len(records)} rows")
    with_input = sum("input" in record.meta for record in records)
    say(f"{with_input} rows have an input of their own; fields: instruction, input, output")


def _contents(path: Path) -> list[tuple[object, object]]:
    try:
        return [(record.messages, record.meta.get("input")) for record in read_records(path)]
    except UserError:
        return []  # damaged: made anew


def read_lessons(path: Path) -> list[Record]:
    """Rows of a Markdown file: ``##`` begins an instruction, ``>`` its input, the rest is the output.

    Raises:
        UserError: no such file, or an instruction without an output.
    """
    lines = read_text(path).splitlines()
    records = []
    starts = [number for number, line in enumerate(lines) if line.startswith("## ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        body = [line for line in lines[start + 1 : end] if not line.startswith("# ")]
        row = {
            "instruction": lines[start].removeprefix("## ").strip(),
            "input": "\n".join(line.removeprefix(">").strip() for line in body if line.startswith(">")),
            "output": "\n".join(line for line in body if not line.startswith(">")).strip(),
        }
        record, faults = parse_row(row, path, start + 1)
        if record is None:
            raise UserError(f"{faults[0]} (line {start + 1})")
        records.append(record)
    return records


def convert(path: Path, settings: PrepareSettings) -> None:
    """Write the rows of ``path`` in another form."""
    if settings.output is None:
        raise UserError(f"give --output FILE for the rows of {path} (.json or .jsonl)")
    records = read_records(path, skip_bad=settings.skip_bad)
    write_records(records, settings.output, settings.to)
    say(f"saved: {settings.output}, {len(records):,} rows as {settings.to}")


def split(path: Path, settings: PrepareSettings) -> None:
    """Write ``train``, ``validation`` and ``test`` files, in the form that the rows have."""
    if settings.output is None:
        raise UserError(f"give --output FOLDER for the parts of {path}")
    records = read_records(path, skip_bad=settings.skip_bad)
    parts = split_records(records, settings.fractions, settings.seed)
    form = records[0].form
    rows = []
    for name in PARTS:
        target = settings.output / f"{name}.jsonl"
        if parts[name]:
            write_records(parts[name], target, form)
        else:
            _remove(target)  # an older run's part would pass for one of this
        days = sorted(str(record.meta["date"])[:10] for record in parts[name] if record.meta.get("date"))
        rows.append((name, f"{len(parts[name]):,}", f"{days[0]} to {days[-1]}" if days else "-", str(target)))
    print_table("", ("part", "rows", "dates", "file"), rows)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror or error}") from None
