"""Backtests and training runs that lie in the workspace, as their own files tell them."""

from __future__ import annotations

import csv
import datetime as dt
from pathlib import Path
from typing import Any

from stocklora.base_models.download import DownloadModelSettings, model_folder
from stocklora.base_models.folders import INCOMPLETE
from stocklora.cli.settings import restored
from stocklora.runtime.files import json_of
from stocklora.web.workspace import Workspace

REPORT, METRICS = "report.html", "metrics.csv"
MOST_ROWS = 400


def backtests(workspace: Workspace) -> list[dict[str, Any]]:
    """Every folder with a report and its metrics, the newest first.

    Returns:
        ``folder``, ``report``, ``made``, ``columns``, and ``rows`` of ``metrics.csv``: those that pool all tickers.
    """
    found = []
    for path in workspace.files():
        if path.name == REPORT and (path.parent / METRICS).is_file():
            made = dt.datetime.fromtimestamp(path.stat().st_mtime, dt.UTC).isoformat(timespec="seconds")
            columns, rows = _metrics(workspace.inside(path.parent / METRICS))
            found.append({
                "folder": workspace.name_of(path.parent), "report": workspace.name_of(path), "made": made,
                "columns": columns, "rows": rows,
            })  # fmt: skip
    return sorted(found, key=lambda report: report["made"], reverse=True)


def _metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return [], []
    pooled = [row for row in rows if "(all)" in row.values()]
    return columns, (pooled or rows)[:MOST_ROWS]


def training_curve(workspace: Workspace, script: str, values: dict[str, Any]) -> list[dict[str, float]]:
    """Losses that a training run's own files hold: an epoch or an entry of its log each, oldest first."""
    if script == "train_lora":
        return _history(workspace, str(values.get("save_dir", "checkpoints")))
    if script == "fine_tune_qwen":
        return _log(workspace, str(values.get("output_dir", "output_qwen")))
    return []


def _history(workspace: Workspace, folder: str) -> list[dict[str, float]]:
    path = workspace.inside(Path(folder) / "training_history.csv")
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return [
                {"x": float(row["epoch"]), "loss": float(row["train_loss"] or "nan"),
                 "validation": float(row["validation_ratio"])}
                for row in csv.DictReader(stream)
            ]  # fmt: skip
    except (OSError, KeyError, ValueError, csv.Error):
        return []


def _log(workspace: Workspace, folder: str) -> list[dict[str, float]]:
    path = workspace.inside(Path(folder) / "training_log.jsonl")
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json_of(line)
            found.append({
                "x": float(entry["step"]), "loss": entry.get("loss"), "validation": entry.get("eval_loss"),
            })  # fmt: skip
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return found
    return found


def fetched_bytes(workspace: Workspace, values: dict[str, Any]) -> int:
    """What has come so far of a base model that is being fetched."""
    folder = workspace.root / model_folder(restored(values, DownloadModelSettings))
    return sum(path.stat().st_size for path in folder.with_name(folder.name + INCOMPLETE).rglob("*") if path.is_file())
