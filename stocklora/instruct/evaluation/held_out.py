"""The rows that a model is scored on: what its own training kept aside, or a file of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, warn
from stocklora.instruct.chat.settings import EvaluateSettings
from stocklora.instruct.chat.sources import TRAINING_INFO, training_info
from stocklora.instruct.evaluation.bootstrap import spread
from stocklora.instruct.rows.formats import Record
from stocklora.instruct.rows.records import PARTS, prompt_key, read_records, read_with_faults, split_records
from stocklora.runtime.files import sha256_of

DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class HeldOut:
    """Rows to score.

    Attributes:
        files: path and sha256 of each. split: which part of them. note: the same in words.
        available: rows before ``--num_samples``.
    """

    records: list[Record]
    files: list[dict[str, str]]
    split: str
    note: str
    available: int


def held_out_rows(settings: EvaluateSettings) -> HeldOut:
    """The rows that ``settings`` ask for.

    Raises:
        UserError: training data that is gone or was changed since, or no rows.
    """
    info = training_info(settings.model_path)
    found = _of_files(settings, info) if settings.data else _of_training(settings, info)
    if not found.records:
        raise UserError(f"no rows to score: {found.note} is empty; give --data FILE, or another --split")
    if settings.num_samples is None or settings.num_samples >= len(found.records):
        return found
    kinds = [str(record.meta.get("kind", "")) for record in found.records]
    # By their text, so that the same rows are chosen whatever their order in the file.
    order = {index: prompt_key(record)[::-1] for index, record in enumerate(found.records)}
    return replace(found, records=[found.records[index] for index in spread(kinds, order, settings.num_samples)])


def _of_files(settings: EvaluateSettings, info: dict[str, Any]) -> HeldOut:
    records = read_records(settings.data)
    split = "all" if settings.split == "auto" else settings.split
    if split != "all":
        records = split_records(records, *_how(info))[split]
    names = ", ".join(map(str, settings.data))
    note = f"all rows of {names}" if split == "all" else f"the {split} rows of {names}"
    _warn_of_training_rows(records, settings, info)
    return HeldOut(records, _described(settings.data), split, note, len(records))


def _of_training(settings: EvaluateSettings, info: dict[str, Any]) -> HeldOut:
    """A part of the files that the model was trained on, split as training split them."""
    if not _files_of(info):
        raise UserError(
            f"{settings.model_path} has no {TRAINING_INFO} that names its data; give the rows to score: --data FILE"
        )
    parts, paths, judged_by = _parts_of_training(settings.model_path, info)
    split = settings.split
    if split == "auto":
        split = "test" if parts["test"] else "validation"
        if split == "validation":
            warn("training kept no test rows; scoring the validation rows, by which its best step was chosen")
    elif split in ("train", "all"):
        warn("the model was trained on these rows: the scores say nothing about new ones")
    rows = [record for part in parts.values() for record in part] if split == "all" else parts[split]
    recorded = info["data"].get("split", {}).get(split)
    if isinstance(recorded, int) and recorded != len(rows):
        warn(f"training counted {recorded} {split} rows, and {len(rows)} are found now")
    used = judged_by if split == "validation" and judged_by else paths
    note = f"the {split} rows of {', '.join(map(str, used))}, as training split them"
    return HeldOut(rows, _described(used), split, note, len(rows))


def _files_of(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Path, sha256 and ``validation_only`` of each file that the model was trained on."""
    data = info.get("data")
    files = data.get("files") if isinstance(data, dict) else None
    entries = files if isinstance(files, list) else []
    return [entry if isinstance(entry, dict) else {"path": entry} for entry in entries]


def _parts_of_training(
    folder: Path, info: dict[str, Any], given: Sequence[Path] = ()
) -> tuple[dict[str, list[Record]], list[Path], list[Path]]:
    """The rows of each part as training split all its files together; its files; those that only validate.

    Args:
        given: files that may take the place of one that is gone, if their bytes are the same.

    Raises:
        UserError: a file that is gone, was changed since, or has faults that training did not know.
    """
    others = {sha256_of(path): path for path in given}
    paths: list[Path] = []
    judged_by: list[Path] = []
    for entry in _files_of(info):
        path, digest = Path(str(entry.get("path"))), entry.get("sha256")
        if digest in others:
            path = others[str(digest)]
        elif not path.is_file():
            raise UserError(f"{path}, which the model was trained on, is not here; give the rows to score: --data FILE")
        elif digest not in (None, sha256_of(path)):
            raise UserError(
                f"{path} has changed since the model was trained on it, so which rows it never saw is unknown; give "
                f"--data FILE"
            )
        (judged_by if entry.get("validation_only") else paths).append(path)
    records, faults = read_with_faults(paths)
    skipped = info["data"].get("skipped")
    if faults and not skipped:
        raise UserError(f"{faults[0]}; give --data FILE")
    left_out = isinstance(skipped, dict) and "with faults" in skipped
    parts = split_records(_sound(records, folder) if left_out else records, *_how(info))
    if judged_by:
        parts["validation"] = read_with_faults(judged_by)[0]
    return parts, paths, judged_by


def _sound(records: Sequence[Record], folder: Path) -> list[Record]:
    """Without the rows that training left out: the split depends on which rows there are."""
    from stocklora.instruct.rows.chat_template import prepare_tokenizer
    from stocklora.instruct.rows.lint import check_records

    report = check_records(records, prepare_tokenizer(folder))  # rows cut by --max_length were trained all the same
    bad = {(fault.file, fault.row) for fault in report.faults}
    return [record for record in records if (record.file, record.row) not in bad]


def _how(info: dict[str, Any]) -> tuple[Sequence[float], int]:
    """Fractions and seed with which training split."""
    data = info.get("data")
    split = data.get("split") if isinstance(data, dict) else None
    if not isinstance(split, dict):
        return DEFAULT_FRACTIONS, 42
    return split.get("fractions", DEFAULT_FRACTIONS), int(split.get("seed", 42))


def _warn_of_training_rows(records: Sequence[Record], settings: EvaluateSettings, info: dict[str, Any]) -> None:
    """Say so if the model was trained on what it is scored on, or if that cannot be known."""
    if not _files_of(info):
        return
    try:
        parts = _parts_of_training(settings.model_path, info, settings.data)[0]
    except UserError as error:
        warn(f"whether training saw any of these rows is unknown: {str(error).partition(';')[0]}")
        return
    seen = {prompt_key(record) for part in PARTS[:2] for record in parts[part]}
    count = sum(prompt_key(record) in seen for record in records)
    if count:
        trained = {entry.get("sha256") for entry in _files_of(info) if not entry.get("validation_only")}
        same = trained == {sha256_of(path) for path in settings.data}
        advice = "add --split test" if same else "leave out --data to score the rows that training kept aside"
        warn(f"the model was trained on, or judged by, {count} of these {len(records)} rows; {advice}")


def _described(paths: Sequence[Path]) -> list[dict[str, str]]:
    return [{"path": str(path), "sha256": sha256_of(path)} for path in paths]
