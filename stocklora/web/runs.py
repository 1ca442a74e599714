"""Runs: each a script in a process of its own, with a folder that outlives page and server.

``runs/ID/`` has ``command.json`` (what and when), ``process.json``, ``log``, ``progress.jsonl`` and, once it is over,
``exit.json``. Whatever the page says of a run is read from there.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocklora.cli.console import PROGRESS_FILE, UserError
from stocklora.runtime.files import json_of, write_json
from stocklora.web.reports import fetched_bytes
from stocklora.web.scripts import SCRIPTS, argv_of, command_text, script_file, settings_of
from stocklora.web.workspace import RUNS, Workspace

RUN_ID = re.compile(r"\d{8}-\d{6}-[a-z_]+-[0-9a-f]{6}")
LOG_PART = 256 * 1024  # bytes of a log that are sent at once
STARTING_S = 15.0  # how long a run may take to say its process
RUNNER = Path(__file__).with_name("runner.py")


class Runs:
    """All runs of a workspace.

    Args:
        workspace: whose folder ``runs`` is theirs.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.folder = workspace, workspace.root / RUNS
        self._runners: list[subprocess.Popen[bytes]] = []  # of this server, to be told of their end

    def start(self, script: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Start a script; its description.

        Raises:
            UserError: values that the script would refuse, or the system starts no process.
        """
        argv = argv_of(script, settings_of(script, values, self.workspace))
        started = dt.datetime.now(dt.UTC)
        folder = self.folder / f"{started:%Y%m%d-%H%M%S}-{script}-{secrets.token_hex(3)}"
        environment = {
            "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1",
            PROGRESS_FILE: str(folder / "progress.jsonl"),
        }  # fmt: skip
        write_json(folder / "command.json", {
            "script": script, "values": dict(values), "argv": argv, "folder": str(self.workspace.root),
            "environment": environment, "started": started.isoformat(timespec="seconds"),
        })  # fmt: skip
        try:
            # A session of its own: Ctrl-C in the server's terminal and the server's end do not reach it.
            self._runners.append(
                subprocess.Popen(
                    [sys.executable, "-I", str(RUNNER), str(folder)],
                    cwd=self.workspace.root,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        except OSError as error:
            raise UserError(f"cannot start {script}.py: {error.strerror or error}") from None
        return self.describe(folder.name)

    def ids(self) -> list[str]:
        """Newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((name for name in os.listdir(self.folder) if RUN_ID.fullmatch(name)), reverse=True)

    def all(self, most: int = 200) -> list[dict[str, Any]]:
        """Descriptions, newest first."""
        described = []
        for name in self.ids()[:most]:
            with contextlib.suppress(UserError):  # one that is being written
                described.append(self.describe(name))
        return described

    def describe(self, name: str) -> dict[str, Any]:
        """What is known of a run.

        Returns:
            ``id``, ``script``, ``values``, ``command`` (to copy), ``started``, ``seconds``, ``code`` (None while it
            runs), ``last`` (its log's last line), ``progress`` (the newest, or None), ``resume`` (values that make its
            script go on with it, None where it cannot), and ``state``: ``running``, ``done``, ``failed``, ``stopped``
            (as it was asked to) or ``lost`` (the machine or its runner died).
        """
        folder = self._folder(name)
        command = _command_of(folder)
        started = dt.datetime.fromisoformat(command["started"]).timestamp()
        ended, asked = _read(folder / "exit.json"), (folder / "stop").exists()
        alive = ended is None and self._is_alive(folder, started)
        if ended is None and not alive:
            ended = _read(folder / "exit.json")  # it may have ended between the two looks
        code = None if ended is None else ended.get("code")
        if code is None:
            state = "running" if alive else "lost"
        else:
            # A training that was asked to stop saves its state and ends well.
            state = "stopped" if asked else "done" if code == 0 else "failed"
        last, progress = _last_line(folder / "log"), _last_json(folder / "progress.jsonl")
        if state == "running" and progress is None and command["script"] == "download_model":
            progress = {"bytes": fetched_bytes(self.workspace, command["values"])}
        script = SCRIPTS.get(command["script"])
        return {
            "id": name, "script": command["script"], "values": command["values"], "started": command["started"],
            "command": command_text(command["argv"], Path(command["folder"])), "code": code, "state": state,
            "seconds": self._seconds(folder, started, ended, state), "last": last,
            "stopping": asked and state == "running", "progress": progress,
            "resume": None if script is None else script.resume,
        }  # fmt: skip

    def log(self, name: str, start: int) -> dict[str, Any]:
        """Text of a run's log from byte ``start`` on, and where the next part begins; a negative start: its end."""
        path = self._folder(name) / "log"
        running = self.describe(name)["state"] == "running"  # asked first: what has ended writes no more
        size = path.stat().st_size if path.exists() else 0
        start = max(0, size - LOG_PART) if start < 0 else min(start, size)
        data = b""
        if size:
            with path.open("rb") as stream:
                stream.seek(start)
                data = stream.read(min(LOG_PART, size - start))
        if len(data) == LOG_PART or running:
            whole = data.rfind(b"\n") + 1  # no character is cut in two
            data = data[:whole] if whole else data
        return {"text": data.decode("utf-8", errors="replace"), "next": start + len(data), "size": size}

    def losses(self, name: str) -> list[dict[str, Any]]:
        """Every progress line that a run wrote, thinned to some hundreds."""
        path = self._folder(name) / "progress.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().splitlines()
        step = max(1, len(lines) // 400)
        found = []
        for line in [*lines[:-1:step], *lines[-1:]]:
            with contextlib.suppress(ValueError):
                found.append(json_of(line))
        return found

    def stop(self, name: str) -> dict[str, Any]:
        """Ask a run to end, as Ctrl-C does: a training run saves its state. Asked again, it ends at once."""
        folder = self._folder(name)
        process = _read(folder / "process.json")
        script = _command_of(folder)["script"]
        if process is not None and self.describe(name)["state"] == "running" and _runs(process.get("pid"), script):
            again = (folder / "stop").exists()
            (folder / "stop").touch()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.name == "nt":
                    os.kill(process["pid"], signal.SIGTERM)
                else:
                    os.kill(process["pid"], signal.SIGTERM if again else signal.SIGINT)
        return self.describe(name)

    def _seconds(self, folder: Path, started: float, ended: Mapping[str, Any] | None, state: str) -> float:
        """How long a run took, or takes; of a lost one until it last wrote something."""
        end = time.time() if ended is None else float(ended.get("ended") or started)
        if state == "lost":
            end = max(path.stat().st_mtime for path in folder.iterdir())
        return round(max(0.0, end - started), 1)

    def _folder(self, name: str) -> Path:
        if not RUN_ID.fullmatch(name) or not (self.folder / name).is_dir():
            raise UserError(f"no run {name[:60]!r}")
        return self.folder / name

    def _is_alive(self, folder: Path, started: float) -> bool:
        """Whether a run's runner, or its script without one, still lives: not others that have their numbers now."""
        for runner in self._runners:
            runner.poll()
        process = _read(folder / "process.json")
        if process is None:
            return time.time() - started < STARTING_S
        script = _command_of(folder)["script"]
        return _lives(process.get("runner"), str(folder)) or _runs(process.get("pid"), script)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _command_of(folder: Path) -> dict[str, Any]:
    """What a run is; a workspace may come from elsewhere, so nothing is taken for granted.

    Raises:
        UserError: no run of this program.
    """
    command = _read(folder / "command.json") or {}
    kinds = {"script": str, "values": dict, "argv": list, "folder": str, "started": str}
    if not all(isinstance(command.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"run {folder.name} has no command.json that this program wrote")
    try:
        dt.datetime.fromisoformat(command["started"])
    except ValueError:
        raise UserError(f"run {folder.name} does not say when it was started") from None
    return {**command, "argv": [str(item) for item in command["argv"]]}


def _runs(number: Any, script: str) -> bool:
    """Whether the process of that number runs one of our scripts."""
    return script in SCRIPTS and _lives(number, script_file(script))


def _lives(number: Any, sign: str) -> bool:
    """Whether there is a process of that number, with ``sign`` among its arguments."""
    import psutil

    if not isinstance(number, int):
        return False
    with contextlib.suppress(psutil.Error, ValueError, OverflowError):
        found = psutil.Process(number)
        return found.status() != psutil.STATUS_ZOMBIE and sign in found.cmdline()
    return False


def _tail(path: Path, size: int = 4096) -> list[bytes]:
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - size))
            return [line for line in stream.read().splitlines() if line.strip()]
    except OSError:
        return []


def _last_line(path: Path) -> str:
    lines = _tail(path)
    return lines[-1].decode("utf-8", errors="replace")[:500].strip() if lines else ""


def _last_json(path: Path) -> Any:
    for line in reversed(_tail(path)):
        with contextlib.suppress(ValueError):
            return json_of(line)
    return None
