"""Rows to train on: read, checked, split, as tokens and labels, and laid into sequences."""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, progress, warn
from stocklora.instruct.rows.chat_template import Encoded
from stocklora.instruct.rows.formats import Record
from stocklora.instruct.rows.records import PARTS, first_of, given_part, read_with_faults, split_records
from stocklora.instruct.sft.settings import SftSettings
from stocklora.runtime.files import sha256_of

NOTHING_LEARNED = "without supervised token"
Sequences = dict[tuple[Path, int], list[Encoded]]  # by file and row


@dataclass(frozen=True)
class EncodedRow:
    """A conversation and its tokens. One of several answers may need several; see ``chat_template.encode_answers``."""

    record: Record
    encoded: Encoded


@dataclass
class InstructionData:
    """What a run trains on.

    Attributes:
        parts: rows by part: ``train``, ``validation``, ``test`` (never looked at here).
        skipped: rows left out, by reason.
        files: each file's path, sha256 and whether its rows only validate.
        split: shares, seed and numbers of rows. split_by_rows: each row says itself which part it is of.
    """

    parts: dict[str, list[EncodedRow]]
    skipped: dict[str, int]
    files: list[dict[str, Any]]
    split: dict[str, Any] = field(default_factory=dict)
    split_by_rows: bool = False

    @property
    def train(self) -> list[EncodedRow]:
        return self.parts["train"]

    @property
    def validation(self) -> list[EncodedRow]:
        return self.parts["validation"]


def read_data(settings: SftSettings, tokenizer: Any) -> InstructionData:
    """The rows of ``settings``, checked and split, as tokens.

    Raises:
        UserError: bad rows, unless they are to be skipped; no row left to train on.
    """
    # With files of their own to validate by, what would have validated trains.
    validating = 0.0 if settings.validation_path else settings.validation_fraction
    fractions = (1.0 - validating - settings.test_fraction, validating, settings.test_fraction)
    skipped: Counter[str] = Counter()
    records, sequences = _checked(settings.data_path, settings, tokenizer, skipped)
    split = split_records(records, fractions, settings.seed)
    if settings.validation_path:
        split["validation"], more = _checked(settings.validation_path, settings, tokenizer, skipped)
        sequences |= more
    parts = {name: _cut_rows(split[name], sequences, settings, skipped) for name in PARTS}
    if not parts["train"] and (cut := skipped[NOTHING_LEARNED]):
        raise UserError(
            f"no row left to train on: --max_length {settings.max_length} cuts all {cut} of them before their answers "
            f"begin; give a larger one (the longest row has {_longest(sequences):,} tokens), or shorter questions"
        )
    if not parts["train"]:
        raise UserError(
            f"no row left to train on in {', '.join(map(str, settings.data_path))}: {len(records)} read, skipped: "
            f"{dict(skipped) or 'none'}; lower --validation_fraction and --test_fraction, or give more rows"
        )
    files = [
        {"path": str(path), "sha256": sha256_of(path), "validation_only": path in settings.validation_path}
        for path in [*settings.data_path, *settings.validation_path]
    ]
    given = sum(given_part(record) is not None for record in records)
    how = {"fractions": list(fractions), "seed": settings.seed}
    how |= {name: len(rows) for name, rows in parts.items()}
    return InstructionData(parts, dict(skipped), files, how, given == len(records))


def _checked(
    paths: Sequence[Path], settings: SftSettings, tokenizer: Any, skipped: Counter[str]
) -> tuple[list[Record], Sequences]:
    """The rows without faults, and their tokens; what has faults stops the run, or is counted in ``skipped``."""
    from stocklora.instruct.rows.lint import check_records

    records, unreadable = read_with_faults(paths)
    with progress() as bar:
        # Not by max_length: a smaller one is the way out of too little memory. What it cuts is counted and warned of.
        report = check_records(bar.track(records, description="tokens"), tokenizer)
    sequences = {(record.file, record.row): encoded for record, encoded in zip(records, report.sequences, strict=True)}
    faults = [*unreadable, *report.faults]
    if not faults:
        return records, sequences
    bad = {(fault.file, fault.row) for fault in faults}
    if not settings.skip_bad_rows:
        raise UserError(
            f"{len(bad)} bad row(s): {first_of(faults)}. Mend them (all of them: python -m stocklora.instruct.lint "
            f"{faults[0].file}), or leave them out with --skip_bad_rows"
        )
    skipped["with faults"] += len(bad)
    warn(f"{len(bad)} bad row(s) left out, the first: {faults[0]}")
    return [record for record in records if (record.file, record.row) not in bad], sequences


def _cut_rows(
    records: Sequence[Record], sequences: Sequences, settings: SftSettings, skipped: Counter[str]
) -> list[EncodedRow]:
    """The rows' sequences, cut to ``--max_length``; those with nothing to learn from are counted in ``skipped``."""
    rows = []
    for record in records:
        encoded = sequences[record.file, record.row]
        if settings.mask_history:
            encoded = [encoded[-1].without_history()]
        for sequence in encoded:
            cut = sequence.cut(settings.max_length)
            if cut.supervised:
                rows.append(EncodedRow(record, cut))
                continue
            # The prompt alone fills max_length.
            skipped[NOTHING_LEARNED] += 1
    return rows


def _longest(sequences: Sequences) -> int:
    return max(len(encoded.input_ids) for row in sequences.values() for encoded in row)


def dataset_of(rows: Sequence[EncodedRow], max_length: int | None = None) -> Any:
    """A ``datasets.Dataset`` with ``input_ids`` and ``labels``, which TRL trains on as they are.

    Args:
        max_length: lay rows together into sequences of at most so many tokens; ``seq_lengths`` then tells them apart.
    """
    from datasets import Dataset

    groups = [[row] for row in rows] if max_length is None else _packed(rows, max_length)
    columns: dict[str, list[Any]] = {
        "input_ids": [[token for row in group for token in row.encoded.input_ids] for group in groups],
        "labels": [[label for row in group for label in row.encoded.labels] for group in groups],
    }
    if max_length is not None:
        columns["seq_lengths"] = [[len(row.encoded.input_ids) for row in group] for group in groups]
    return Dataset.from_dict(columns)


def _packed(rows: Sequence[EncodedRow], max_length: int) -> list[list[EncodedRow]]:
    """Best-fit decreasing: the longest rows first, each into the fullest sequence that still has room.

    By hand, since ``trl.pack_dataset`` is free to change its order from version to version, and a resumed run must
    find the sequences of the run it continues.
    """
    groups: list[list[EncodedRow]] = []
    # Rooms that sequences have left, in order, and for each the sequences, the earliest on top.
    rooms: list[int] = []
    places: dict[int, list[int]] = {}
    for row in sorted(rows, key=lambda row: -len(row.encoded.input_ids)):  # stable: rows of one length keep their order
        length = len(row.encoded.input_ids)
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            left = rooms[at]
            place = heapq.heappop(places[left])
            if not places[left]:
                del places[left], rooms[at]
            groups[place].append(row)
        else:
            left, place = max_length, len(groups)
            groups.append([row])
        if left - length not in places:
            bisect.insort(rooms, left - length)
            places[left - length] = []
        heapq.heappush(places[left - length], place)
    return groups


def check_packing(model: Any, tokenizer: Any) -> None:
    """Refuse to pack where the model's attention lets one row of a sequence see another.

    Without FlashAttention, Transformers makes a block-diagonal mask from positions that begin anew; whether a model
    does is asked of the model itself: a row's outputs must not depend on the row before it.

    Raises:
        UserError: it does.
    """
    import torch

    device = next(model.parameters()).device
    words = [token % len(tokenizer) for token in range(3, 11)]
    row = torch.tensor([words], device=device)
    other = torch.tensor([[(token + 5) % len(tokenizer) for token in words]], device=device)
    positions = torch.arange(len(words), device=device)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ends = [
                model(
                    input_ids=torch.cat([before, row], dim=1), position_ids=positions.repeat(1, 2), use_cache=False
                ).logits[0, len(words) :]
                for before in (row, other)
            ]
        apart = torch.equal(*ends)
    except (TypeError, ValueError):  # a model that is not told positions
        apart = False
    model.train(was_training)
    if not apart:
        raise UserError(
            "--packing: in this model rows of one sequence see each other, which would train on the wrong context; "
            "leave out --packing"
        )
