"""The ledger's file: entries in a SQLite database, each with the hash of the one before it.

An entry is one forecast of one ticker, as JSON. Its hash is the SHA-256 of that text, and the text holds the hash of
the entry before it, so whoever changes, removes or inserts one has to write all later ones anew, and the last hash, the
*head*, becomes another. A head that was written down elsewhere (a mail, a commit) therefore vouches for everything
before it; without one, a whole record made anew cannot be told from a true one.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stocklora.cli.console import UserError
from stocklora.prices.calendar import Clock, utc_now
from stocklora.runtime.files import as_json_types, json_of

APPLICATION_ID = 0x53746C67  # in the database's header: a ledger of this program, and no other database
FORMAT_VERSION = 1
START = "0" * 64  # what the first entry has for the hash before it
WAIT_S = 30.0  # for another process that is writing

TABLES = (
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, content TEXT NOT NULL, hash TEXT NOT NULL)",
    # For whoever opens the file with another program; it holds nothing of its own that could differ.
    """CREATE VIEW forecasts AS SELECT number, json_extract(content, '$.made') AS made,
    json_extract(content, '$.ticker') AS ticker, json_extract(content, '$.origin') AS origin,
    json_extract(content, '$.last_close') AS last_close, json_extract(content, '$.model.name') AS model,
    json_extract(content, '$.days') AS days FROM entries""",
    # Against slips; who means it removes them, and the chain tells.
    "CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries never change'); END",
    "CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries always stay'); END",
)


class LedgerError(Exception):
    """Why a file cannot be used as a ledger."""


@dataclass(frozen=True)
class Entry:
    """One forecast on record.

    Attributes:
        number: from 1.
        content: what was said, as ``record.py`` describes it, with ``number``, ``made`` and ``previous``.
        digest: hex SHA-256 of the text that ``content`` is stored as.
    """

    number: int
    content: Mapping[str, Any]
    digest: str


def append(path: Path, contents: Sequence[Mapping[str, Any]], clock: Clock = utc_now) -> list[Entry]:
    """Add entries at the end, all or none, whoever else is adding some; a new file is made where there is none.

    Args:
        contents: without ``number``, ``made`` (now, UTC) and ``previous``, which are filled in.

    Returns:
        What was written.

    Raises:
        LedgerError: the file cannot be written, is no ledger, or stays locked.
    """
    with _errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")  # from here on this process alone writes
            try:
                _check_ours(database, may_be_new=True)
                last = database.execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1").fetchone()
                number, previous = last or (0, START)
                entries = []
                for content in contents:
                    number += 1
                    made = clock().astimezone(dt.UTC).isoformat(timespec="seconds")
                    whole = {**content, "number": number, "made": made, "previous": previous}
                    text = json.dumps(as_json_types(whole), sort_keys=True, separators=(",", ":"), allow_nan=False)
                    previous = _digest(text)
                    database.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, text, previous))
                    entries.append(Entry(number, whole, previous))
                database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                raise
    return entries


def read_entries(path: Path) -> list[Entry]:
    """All entries, the chain from the first to the last checked.

    Raises:
        UserError: there is no such file, it is no ledger, or an entry was changed, removed or put in.
    """
    if not path.is_file():
        raise UserError(
            f"no ledger {path}; framework.py and framework_llm.py write one with every forecast (--ledger FILE)"
        )
    entries: list[Entry] = []
    previous = START
    try:
        # To write, too: a writer that was killed leaves a journal, which whoever opens next has to undo. A file that
        # cannot be written is read all the same.
        with _errors(), contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True)) as database:
            _check_ours(database)
            for number, text, digest in database.execute("SELECT number, content, hash FROM entries ORDER BY number"):
                entries.append(_checked(number, text, digest, len(entries) + 1, previous))
                previous = digest
    except LedgerError as error:
        raise UserError(f"{path} {error}") from None
    return entries


def head_of(entries: Sequence[Entry]) -> str:
    """The hash of the last entry, which vouches for all of them."""
    return entries[-1].digest if entries else START


def _checked(number: int, text: str, digest: str, expected: int, previous: str) -> Entry:
    """The entry, if it is the ``expected``-th and follows the one whose hash is ``previous``.

    Raises:
        LedgerError: saying what is wrong with it.
    """
    advice = "the record from there on proves nothing: go back to a copy that verifies"
    if number != expected:
        raise LedgerError(f"lacks entry {expected}, it goes on with {number}; {advice}")
    if not isinstance(text, str) or _digest(text) != digest:
        raise LedgerError(f"was changed: entry {number} is not what its hash says; {advice}")
    try:
        content = json_of(text)
        told = content["number"], content["previous"]
    except (ValueError, TypeError, KeyError):
        raise LedgerError(f"was changed: entry {number} is none that this program writes; {advice}") from None
    if told != (number, previous):
        raise LedgerError(f"was changed: entry {number} does not follow the one before it; {advice}")
    return Entry(number, content, digest)


def _check_ours(database: sqlite3.Connection, may_be_new: bool = False) -> None:
    """Make the tables of an empty database, if it may be new; refuse another program's.

    Raises:
        LedgerError: it is not a ledger, or one of a newer version.
    """
    (application,), (version,) = (
        database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    if application == APPLICATION_ID:
        if version > FORMAT_VERSION:
            raise LedgerError("was written by a newer version of this program; update it")
        return
    (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables or application or not may_be_new:
        raise LedgerError("is not a ledger of forecasts; give another file with --ledger")
    for statement in TABLES:
        database.execute(statement)
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn the system's and SQLite's refusals into a ``LedgerError``."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if "not a database" in str(error) or "malformed" in str(error):
            raise LedgerError("is not a ledger of forecasts, or is damaged; give another file with --ledger") from None
        raise LedgerError(f"cannot be opened or written ({error})") from None
    except UnicodeDecodeError:
        raise LedgerError("is damaged; go back to a copy that verifies, or give another file with --ledger") from None
    except OSError as error:
        raise LedgerError(f"cannot be opened or written ({error.strerror or error})") from None
