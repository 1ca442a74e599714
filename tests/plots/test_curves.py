"""The log of a training run, as it is read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stocklora.cli.console import UserError
from stocklora.plots.curves import logged, read_training_log

ENTRIES = [
    {"step": 0, "eval_loss": 3.0, "seconds": 0.5},
    {"step": 5, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": None, "seconds": 2.0},
]


def test_a_log_that_was_cut_short_is_read_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    log = tmp_path / "training_log.jsonl"
    assert read_training_log(log) == []
    whole = "".join(json.dumps(entry) + "\n" for entry in ENTRIES)
    log.write_text(whole + '{"step": 20, "lo', encoding="utf-8")
    assert read_training_log(log) == ENTRIES
    log.write_text("nonsense\n" + whole, encoding="utf-8")
    with pytest.raises(UserError, match="line 1"):
        read_training_log(log)
    for line in ("[1]", '{"loss": 1.0}', '{"step": 1, "loss": "high"}', "\ufffd"):
        log.write_bytes(line.encode().replace("\ufffd".encode(), b"\xff") + b"\n" + whole.encode())
        with pytest.raises(UserError, match="line 1 is no entry"):
            read_training_log(log)


def test_a_series_is_of_the_entries_that_have_a_number() -> None:
    assert logged(ENTRIES, "loss") == [(5, 2.5)]
    assert logged(ENTRIES, "grad_norm") == []
