"""What is in the workspace's files: price tables with their oddities, instruction rows with the linter's findings."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError
from stocklora.instruct.rows.formats import Fault, Record
from stocklora.instruct.rows.lint import check_records
from stocklora.instruct.rows.records import read_with_faults
from stocklora.prices.exchanges import exchange_of
from stocklora.prices.quality import findings_of, source_text
from stocklora.prices.tables import is_table, read_prices, trusted_meta
from stocklora.web.prices import is_plain_table
from stocklora.web.workspace import PRICES, Workspace

LARGEST_ROWS_FILE = 64 * 2**20
MOST_SHOWN = 200  # tickers, findings, faults; the counts are of all
MOST_EXAMPLES = 20
MOST_TEXT = 1500  # characters of a turn


def files_of(workspace: Workspace) -> list[dict[str, Any]]:
    """Price tables and instruction rows, the newest first: ``name``, ``kind``, ``bytes``, ``modified``."""
    found = []
    for path in workspace.files():
        kind = _kind(path, workspace)
        if kind is not None:
            stat = path.stat()
            modified = dt.datetime.fromtimestamp(stat.st_mtime, dt.UTC).isoformat(timespec="seconds")
            found.append({"name": workspace.name_of(path), "kind": kind, "bytes": stat.st_size, "modified": modified})
    return sorted(found, key=lambda file: file["modified"], reverse=True)


def _kind(path: Path, workspace: Workspace) -> str | None:
    if path.name == "training_log.jsonl":
        return None
    if is_table(path):
        return "prices" if path.parent == workspace.root / PRICES or is_plain_table(path) else None
    if path.suffix == ".jsonl":
        return "rows"
    if path.suffix == ".json" and not path.name.endswith(".meta.json"):
        try:
            with path.open(encoding="utf-8-sig", errors="replace") as stream:
                start = stream.read(400).split()
        except OSError:
            return None
        return "rows" if start and "".join(start).startswith("[{") else None
    return None


def describe_file(name: str, workspace: Workspace) -> dict[str, Any]:
    """What is in a file.

    Raises:
        UserError: it is not in the workspace, or can be read as neither prices nor rows.
    """
    path = workspace.inside(name)
    if not path.is_file():
        raise UserError(f"no file {name[:80]}")
    kind = _kind(path, workspace)
    try:
        if kind == "prices":
            return {"name": name, "kind": kind, **_prices(path)}
        if kind == "rows":
            return {"name": name, "kind": kind, **_rows(path)}
    except UserError as error:
        return {"name": name, "kind": kind, "error": str(error).replace(f"{workspace.root}/", "")}
    raise UserError(f"{name[:80]} is neither a price table nor a file of instruction rows")


def _prices(path: Path) -> dict[str, Any]:
    meta = trusted_meta(path)
    frames = read_prices(path, any_interval=True)
    tickers: list[dict[str, Any]] = []
    total: Counter[str] = Counter()
    for ticker, frame in frames.items():
        findings = findings_of(ticker, frame, meta)
        total.update({finding.kind.split(" (")[0]: finding.count for finding in findings})
        tickers.append({
            "ticker": ticker, "exchange": exchange_of(ticker), "rows": len(frame),
            "first": f"{frame.index[0]:%Y-%m-%d}", "last": f"{frame.index[-1]:%Y-%m-%d}",
            "findings": [
                {"kind": finding.kind, "count": finding.count, "details": list(finding.details[:8])}
                for finding in findings
            ],
        })  # fmt: skip
    tickers.sort(key=lambda line: -sum(finding["count"] for finding in line["findings"]))
    return {
        "rows": sum(map(len, frames.values())), "count": len(frames), "source": source_text(meta),
        "totals": dict(total), "tickers": tickers[:MOST_SHOWN],
    }  # fmt: skip


def _rows(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_ROWS_FILE:
        size = path.stat().st_size / 2**20
        raise UserError(f"{path.name} has {size:,.0f} MB; look at it with: python -m stocklora.instruct.lint {path}")
    records, unreadable = read_with_faults([path])
    report = check_records(records)
    faults = [*unreadable, *report.faults]
    return {
        "count": len(records), "bad_rows": len({fault.row for fault in faults}),
        "parts": {
            name: dict(sorted(Counter(str(r.meta[name]) for r in records if r.meta.get(name)).items()))
            for name in ("split", "kind")
        },
        "faults": [_fault(fault) for fault in faults[:MOST_SHOWN]], "fault_count": len(faults),
        "warnings": [_fault(fault) for fault in report.warnings[:MOST_SHOWN]], "warning_count": len(report.warnings),
        "examples": [_example(record) for record in records[:MOST_EXAMPLES]],
    }  # fmt: skip


def _fault(fault: Fault) -> dict[str, Any]:
    return {"row": fault.row, "field": fault.field, "message": fault.message}


def _example(record: Record) -> dict[str, Any]:
    turns = [{"role": message.role, "text": message.content[:MOST_TEXT]} for message in record.messages]
    return {"row": record.row, "turns": turns}
