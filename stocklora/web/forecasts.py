"""The forecasts of the watch list, as the scripts wrote them, and what became of earlier ones."""

from __future__ import annotations

import csv
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError
from stocklora.metrics.scores import INTERVAL_COLUMNS
from stocklora.runtime.files import from_cell
from stocklora.web.prices import WatchedPrices
from stocklora.web.workspace import EXPLANATION, LEDGER, PREDICTIONS, Workspace

QUANTILES = tuple(INTERVAL_COLUMNS.values())
PATHS = 4000  # as many as --above and --below count


class Forecasts:
    """Forecasts and their record.

    Args:
        workspace: where ``predictions.csv``, ``explanation.csv`` and ``forecasts.db`` lie.
        prices: of the watch list.
    """

    def __init__(self, workspace: Workspace, prices: WatchedPrices) -> None:
        self.workspace, self.prices = workspace, prices
        self._tables: dict[str, tuple[str, Any]] = {}
        self._record: tuple[Any, dict[str, Any]] = (None, {})
        self._lock = threading.Lock()

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Ticker -> rows of ``predictions.csv``: ``origin``, ``date``, ``day``, ``last_close`` and the quantiles."""

        def read(path: Path) -> dict[str, list[dict[str, Any]]]:
            found: dict[str, list[dict[str, Any]]] = {}
            with path.open(encoding="utf-8", newline="") as stream:
                for row in csv.DictReader(stream):
                    found.setdefault(from_cell(row["Ticker"]), []).append(
                        {"origin": row["Origin"], "date": row["Date"], "day": int(row["Day"]),
                         "last_close": float(row["Last_Close"]), **{name: float(row[name]) for name in QUANTILES}}
                    )  # fmt: skip
            return found

        found: dict[str, list[dict[str, Any]]] = self._cached(PREDICTIONS, read) or {}
        return found

    def explanation(self, ticker: str) -> dict[str, Any] | None:
        """Factors of the width of a ticker's last day ahead: ``level`` and ``scale`` in percent, and each factor."""
        from stocklora.forecaster.explain import WORDS

        def read(path: Path) -> dict[str, list[dict[str, str]]]:
            found: dict[str, list[dict[str, str]]] = {}
            with path.open(encoding="utf-8", newline="") as stream:
                for row in csv.DictReader(stream):
                    found.setdefault(from_cell(row["Ticker"]), []).append(row)
            return found

        rows, forecast = (self._cached(EXPLANATION, read) or {}).get(ticker), self.rows().get(ticker)
        if not rows or not forecast or rows[-1]["Origin"] != forecast[-1]["origin"]:
            return None  # made of an older forecast
        row = rows[-1]
        factors = [
            {"name": name, "words": words, "percent": float(row[f"{name}_%"]) - 100.0}
            for name, words in WORDS.items()
            if row.get(f"{name}_%")
        ]
        return {
            "date": row["Date"], "scale": float(row["Scale_%"]), "level": float(row["Level_%"]),
            "factors": sorted(factors, key=lambda factor: -abs(factor["percent"])),
        }  # fmt: skip

    def paths(self, ticker: str) -> dict[str, Any]:
        """Joint paths of the days ahead, as ``--above`` counts them: (paths, days) closes.

        Raises:
            UserError: there is no forecast of the ticker.
        """
        from stocklora.forecaster.paths import paths_of

        rows = self.rows().get(ticker)
        if not rows:
            raise UserError(f"no forecast of {ticker[:40]} yet")
        known = [{"Ticker": ticker, "Last_Close": row["last_close"], **row} for row in rows]
        (closes,) = paths_of(known, PATHS).values()
        return {
            "dates": [row["date"] for row in rows],
            "closes": [[float(f"{c:.7g}") for c in path] for path in closes],
        }

    def record(self) -> dict[str, Any]:
        """What became of the forecasts on record, by the prices of the watch list.

        Returns:
            Empty where there is no ledger; ``error`` where it is broken. ``entries``, ``head``, ``tickers`` (ticker ->
            ``inside`` and ``of``: scored closes one day ahead in the 80% interval; ``alert``: the newest scored close,
            if it lies outside), and ``forecasters``, see ``_forecaster``.
        """
        path = self.workspace.root / LEDGER
        if not path.is_file() or path.is_symlink():
            return {}
        stat = path.stat()
        with self._lock:
            key = (stat.st_mtime_ns, stat.st_size, self.prices.version, sorted(self.prices.files().items()))
            if self._record[0] != key:
                self._record = (key, self._scored(path))
            return self._record[1]

    def _scored(self, path: Path) -> dict[str, Any]:
        from stocklora.ledger.chain import head_of, read_entries
        from stocklora.ledger.score import records_of
        from stocklora.ledger.table import NO_CLOSE, judged, table_of, with_closes
        from stocklora.prices.calendar import utc_now

        try:
            entries = read_entries(path)
            table = judged(table_of(entries), utc_now())
            due = list(dict.fromkeys(table.loc[table["state"] == NO_CLOSE, "ticker"]))
            table = with_closes(table, self.prices.frames(due))
        except UserError as error:
            return {"error": str(error).replace(f"{self.workspace.root}/", "")}
        return {
            "entries": len(entries), "head": head_of(entries), "tickers": _by_ticker(table),
            "forecasters": [_forecaster(record) for record in records_of(table)] if len(table) else [],
            "states": {str(state): int(count) for state, count in table["state"].value_counts().items()},
        }  # fmt: skip

    def _cached(self, name: str, read: Any) -> Any:
        """What ``read`` makes of a file, once a version; None where there is none or it is not understood."""
        path = self.workspace.root / name
        try:
            stat = self.workspace.inside(name).stat()
            stamp = f"{stat.st_mtime_ns}-{stat.st_size}"
            if self._tables.get(name, ("",))[0] != stamp:
                self._tables[name] = (stamp, read(path))
        except (OSError, UserError, KeyError, TypeError, ValueError, csv.Error):
            return None
        return self._tables[name][1]


def _by_ticker(table: Any) -> dict[str, dict[str, Any]]:
    """Hit rate and alert of every ticker with scored closes."""
    import numpy as np

    from stocklora.ledger.table import SCORED

    scored = table[(table["state"] == SCORED) & (table["day"] == 1)].sort_values("date")
    found: dict[str, dict[str, Any]] = {}
    for ticker, rows in scored.groupby("ticker", sort=False):
        close = rows["last_close"].to_numpy() * np.exp(rows["came"].to_numpy())
        low, high = rows["P10"].to_numpy(), rows["P90"].to_numpy()
        inside = (close >= low) & (close <= high)
        line: dict[str, Any] = {"inside": int(inside.sum()), "of": len(rows), "alert": None}
        if not inside[-1]:
            line["alert"] = {
                "date": f"{rows['date'].iloc[-1]:%Y-%m-%d}", "close": float(f"{close[-1]:.7g}"),
                "low": float(low[-1]), "high": float(high[-1]), "said": f"{rows['origin'].iloc[-1]:%Y-%m-%d}",
            }  # fmt: skip
        found[str(ticker)] = line
    return found


def _forecaster(record: Any) -> Mapping[str, Any]:
    """One forecaster's record: counts by state, and for each day ahead shares inside and losses beside others."""
    days = [
        {
            "day": day.day, "closes": day.closes, "on_days": day.origins, "losses": day.losses or None,
            "inside": [
                {"wanted": share.wanted, "found": share.found, "low": share.low, "high": share.high}
                for share in day.inside
            ],
        }
        for day in record.days
    ]  # fmt: skip
    states = record.table["state"].value_counts()
    return {
        "name": record.name, "sha256": record.sha256, "days": days,
        "states": {str(name): int(count) for name, count in states.items()},
    }  # fmt: skip
