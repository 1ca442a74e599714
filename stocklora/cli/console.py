"""The terminal: user errors, exit codes, tables and progress bars.

Only the standard library is imported at the top, so that ``--help`` answers at once;
rich is loaded when there is something to draw.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocklora.cli import EXIT_INTERRUPTED, leave_at_once_if_asked_again

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

PROJECT = Path(__file__).resolve().parents[2]
EXIT_USER_ERROR = 2
LONGEST_ERROR = 2000  # characters: a damaged file's own content may be a message's longest part
PROGRESS_FILE = "STOCKLORA_PROGRESS"  # environment variable: a file that is told what progress bars show
TOLD_EVERY_S = 1.0
EXIT_BROKEN_PIPE = 141  # what a shell reports for any tool whose reader went away


class UserError(Exception):
    """A mistake the user can mend: one line saying what is wrong, where, and what to do next."""


def run_script(body: Callable[[], int | None]) -> int:
    """Run a script's body and turn how it ends into an exit code.

    A ``UserError`` becomes one line on stderr and exit code 2; Ctrl-C becomes 130, a second one at any moment of the
    answer to the first as well; a reader of our stdout that went away (``... | head``) 141. A package that is not
    installed, most often since the environment is not active, is a line as well. Any other exception is a fault of
    ours and keeps its traceback.
    """
    try:
        return _run(body)
    except KeyboardInterrupt:
        leave_at_once_if_asked_again()
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(body: Callable[[], int | None]) -> int:
    collect_garbage_seldom()
    # Hub and tokenizer libraries write their own bars and warnings; ours are enough.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character shows an escape instead of ending the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = body() or 0
        sys.stdout.flush()  # here, where a reader that went away is still understood
        return code
    except UserError as error:
        said = one_line(str(error))
        print(f"error: {said if len(said) <= LONGEST_ERROR else said[:LONGEST_ERROR] + ' ...'}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or (PROJECT / package).exists() or (PROJECT / f"{package}.py").exists():
            raise  # ours, or unknown
        advice = "activate the environment (. .venv/bin/activate), or: pip install -r requirements_stable.txt"
        print(f"error: {sys.executable} has no package {package}; {advice}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise  # some other pipe: a fault, not an impatient reader
        return EXIT_BROKEN_PIPE


def collect_garbage_seldom() -> None:
    """Look for unreachable cycles after 10,000 new objects, not 700, and not at all when the process ends.

    Importing torch and transformers makes some millions of objects that stay: going through them again and again,
    and once more at the end, takes a quarter of the time of a short run.
    """
    gc.set_threshold(10_000, 10, 100)
    atexit.register(gc.freeze)


def _stdout_is_broken() -> bool:
    """Whether nobody reads our stdout any more; if so, what is left in its buffer goes nowhere, quietly."""
    try:
        descriptor = sys.stdout.fileno()
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    except OSError:  # not a real file, as under a test's capture
        return False
    return True


def one_line(text: str) -> str:
    """Fold any run of white space into one blank."""
    return " ".join(text.split())


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names in one line, the first ``most`` of them and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def warn(message: str) -> None:
    """One line of warning on stderr; the run goes on."""
    print(f"warning: {one_line(message)}", file=sys.stderr)


def say(message: str = "") -> None:
    """A line of normal output, flushed so that logs and pipes see it in order."""
    print(message, flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table: first column left-aligned, the rest right-aligned, never cut, markup never read.

    On a terminal that is too narrow a cell is folded; elsewhere the table is as wide as it needs.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    folded = sys.stdout.isatty()
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="left" if index == 0 else "right", no_wrap=not folded, overflow="fold")
    for row in rows:
        # Text, not str: "[AAPL]" is a cell, not a style
        table.add_row(*[Text(str(cell)) for cell in row])
    draw(table, max(160, Console(width=100_000).measure(table).maximum, len(title)))


def draw(table: Table, width: int) -> None:
    """Print a table as wide as the terminal; where the output is none, in ``width`` columns."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(table)
        return
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    # logs and copied text want no blanks at the ends of lines
    print("\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()), flush=True)


@contextlib.contextmanager
def progress(*extra_columns: str, shown: bool = True) -> Iterator[Progress]:
    """A progress display on stderr with rate and time left; draws nothing when not a terminal.

    Where the environment variable ``PROGRESS_FILE`` names a file, it gets a line of JSON a second at most:
    ``time``, ``what``, ``done``, ``total`` and the task's named fields.

    A task's ``total`` may be None (length unknown).

    Args:
        extra_columns: rich format strings over a task's fields, such as ``"loss {task.fields[loss]}"``.
            Give every named field in ``add_task(..., loss="-")``.
        shown: False draws nothing anywhere.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class CountColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            total = "?" if task.total is None else f"{task.total:,.0f}"
            rate = "" if not task.speed else f" {task.speed:,.1f}/s"
            return Text(f"{task.completed:,.0f}/{total}{rate}")

    told = Path(name) if (name := os.environ.get(PROGRESS_FILE)) and shown else None

    class ToldProgress(Progress):
        last_s = 0.0

        def update(self, task_id: Any, *arguments: Any, **options: Any) -> None:
            super().update(task_id, *arguments, **options)
            now = time.monotonic()
            task = next((task for task in self.tasks if task.id == task_id), None)
            if told is None or task is None or (now - self.last_s < TOLD_EVERY_S and not task.finished):
                return
            self.last_s = now
            line = {"time": time.time(), "what": task.description, "done": task.completed, "total": task.total}
            with contextlib.suppress(OSError), told.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**task.fields, **line}, default=str) + "\n")

    console = Console(stderr=True)
    with ToldProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        CountColumn(),
        *[TextColumn(column) for column in extra_columns],
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
        # rich would send stdout to this display on stderr; a redirected stdout must stay where it points
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:
        yield bar
