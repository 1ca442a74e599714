"""Chat templates rendered where they can do no harm: in a process of their own, with limits on time, memory and files.

A chat template is a program that comes with a model. Jinja's sandbox, in which transformers renders it, keeps it from
Python's inside, but not from an endless loop or a text of gigabytes. So one small process renders all templates of
this program. It may open no file, import nothing, and grow by ``MOST_MEMORY_BYTES``; the program waits ``MOST_SECONDS``
for a rendering and takes ``MOST_CHARACTERS`` of it. A process that does not answer is killed, and the next rendering
begins another one.

It is forked before the model is loaded. Where processes cannot be forked (Windows) Python starts it anew. What passes
between the two is text, so that a template which got out of the sandbox has nothing to send that would run. An audit
hook (PEP 578) keeps files shut on every system; where the system has limits of its own, they hold as well, and where it
has none on memory, the program looks at the process's size while it waits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from stocklora.cli.console import UserError, one_line

MOST_SECONDS = 20.0  # a rendering takes a millisecond; a machine that swaps takes longer
MOST_CHARACTERS = 32_000_000
MOST_MEMORY_BYTES = 1 << 30  # beyond what the process was born with
START_SECONDS = 300.0  # to import transformers from a slow disk
LOOK_SECONDS = 0.02  # between two looks at a process's size
FORKED = hasattr(os, "fork")

REFUSED, FAILED, TOO_LARGE, RENDERED = range(4)
LIMITED, UNLIMITED = b"limited", b"unlimited"  # whether the system holds the process to its memory
# Audit events that no template has a need for; the first names ``open`` alone.
SHUT = (
    "open", "import", "os.", "shutil.", "subprocess.", "socket.", "ctypes.", "mmap.", "winreg.", "_winapi.", "fcntl.",
)  # fmt: skip
# What Python imports only when it is first used, which is too late in a process that may open no file.
WARM_UP = (
    r"{{ '\u4e2d\n' }}{{ 'a b'|wordwrap(1)|urlencode|pprint|random }}{{ 'x.com'|urlize|striptags }}{{ lipsum(n=1) }}"
    r"{{ [{'a': 1}]|groupby('a')|list|tojson(indent=1) }}{{ strftime_now('%d %b %Y') }}{{ 'x'|escape|xmlattr }}",
    "{{ strftime_now('%d') }}{{ raise_exception('x') }}", "{% if %}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}",
    "{{ 'x' * 'x' }}", "{{ '\ud800'|urlencode }}{{ nothing.more }}",
)  # fmt: skip


class _Renderer:
    """The process, and the way to it. One rendering at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner, self._most_bytes = 0, 0
        self._process: Any = None
        self._connection: Any = None

    def ask(self, request: tuple[Any, ...]) -> tuple[int, str]:
        """What ``_render`` says of ``request``."""
        asked = json.dumps(request).encode()
        with self._lock:
            if self._owner != os.getpid():  # a process forked from this one must not speak over the same pipe
                self._begin()
            try:
                self._connection.send_bytes(asked)
                if (reason := self._kept_waiting()) is not None:
                    self._end()
                    return TOO_LARGE, reason
                answer = self._connection.recv_bytes(4 * MOST_CHARACTERS + 1)
                return answer[0], answer[1:].decode("utf-8", "surrogatepass")
            except (EOFError, OSError, ValueError, IndexError):
                self._end()
                return TOO_LARGE, "it brought its process down"
            except BaseException:  # Ctrl-C: its answer is not to be taken for the next one's
                self._end()
                raise

    def _kept_waiting(self) -> str | None:
        """Wait for the answer; what the process took too much of, None where the answer is there."""
        end = time.monotonic() + MOST_SECONDS
        while not self._connection.poll(LOOK_SECONDS if self._most_bytes else MOST_SECONDS):
            if time.monotonic() >= end:
                return f"it was not done after {MOST_SECONDS:.0f} seconds"
            if self._most_bytes and _size_of(self._process.pid) > self._most_bytes:
                return "it asks for more memory than there is for it"
        return None

    def _begin(self) -> None:
        if FORKED:
            # Imported before the fork, since a process that may open no file can import nothing.
            from transformers.utils import chat_template_utils  # noqa: F401
        context: Any = multiprocessing.get_context("fork" if FORKED else "spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, FORKED), daemon=True)
        self._process.start()
        theirs.close()
        self._owner = os.getpid()
        try:
            limited = self._connection.poll(START_SECONDS) and self._connection.recv_bytes(100)
        except (EOFError, OSError):
            limited = b""
        if limited not in (LIMITED, UNLIMITED):
            self._end()
            raise UserError(f"the process that renders chat templates did not start ({sys.executable})")
        self._most_bytes = 0 if limited == LIMITED else _size_of(self._process.pid) + MOST_MEMORY_BYTES

    def _end(self) -> None:
        self._connection.close()
        self._owner = 0
        with contextlib.suppress(OSError):
            self._process.kill()
            self._process.join()


def _size_of(process: int) -> int:
    """Bytes of memory that a process has; 0 of one that is gone, which the pipe to it tells."""
    import psutil

    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return 0


_renderer = _Renderer()


def render_template(
    template: str, conversation: Sequence[Any], tools: Sequence[Any] | None, invite: bool, values: dict[str, Any]
) -> str:
    """``conversation`` as transformers renders it with ``template``.

    Args:
        template: Jinja.
        conversation: messages in plain types.
        tools: functions that may be called, as OpenAI's API describes them.
        invite: end with the invitation to answer.
        values: what else the template may read, special tokens among it.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
        UserError: it fails, or takes more time or memory than a chat template may.
    """
    from jinja2 import TemplateError

    request = (template, conversation, tools, invite, values)
    status, text = _renderer.ask(request)
    if status == RENDERED:
        return text
    if status == REFUSED:
        raise TemplateError(text)
    said = "takes more than a chat template may" if status == TOO_LARGE else "cannot be rendered"
    raise UserError(
        f"the model's chat template {said}: {one_line(text)[:300]}; use another model, or mend the template"
    )


def _render(
    template: str, conversation: Sequence[Any], tools: Sequence[Any] | None, invite: bool, values: dict[str, Any]
) -> tuple[int, str]:
    """How it went, and the text or what was wrong."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.exceptions import SecurityError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # transformers leaves out keys without a value: templates would write "None".
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in conversation]
        made: Any = render_jinja_template(  # (renderings, places of answers), whatever its annotation says
            conversations=[turns],
            tools=None if tools is None else list(tools),
            chat_template=template,
            add_generation_prompt=invite,
            **values,
        )
        text = str(made[0][0])
        if len(text) > MOST_CHARACTERS:
            return TOO_LARGE, f"it writes {len(text):,} characters"
        return RENDERED, text
    except (TemplateSyntaxError, SecurityError) as error:  # kinds of TemplateError that no other conversation mends
        return FAILED, str(error)
    except TemplateError as error:
        return REFUSED, str(error)
    except MemoryError:
        return TOO_LARGE, "it asks for more memory than there is for it"
    except Exception as error:  # a template can raise anything
        return FAILED, f"{type(error).__name__}: {error}"


def _serve(connection: Any, forked: bool) -> None:
    """Render until the program at the other end is gone.

    Args:
        forked: from the program, on a system that can; otherwise nothing of the system's own is relied on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which goes, and then this process does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    if forked:
        os.closerange(3, connection.fileno())
        os.closerange(connection.fileno() + 1, 65536)  # sockets and pipes whose other ends would wait for this process
    for template in WARM_UP:
        _render(template, [{"role": "user", "content": "x"}], None, True, {})
    limited = _limit() if forked else False
    gc.freeze()  # what the program had is not walked over
    sys.addaudithook(_keep_shut)
    connection.send_bytes(LIMITED if limited else UNLIMITED)
    while True:
        request = json.loads(connection.recv_bytes())
        # an endless loop outlives no program that was killed, and this clock waits for no lock of Python's
        faulthandler.dump_traceback_later(1.5 * MOST_SECONDS, exit=True, file=2)
        status, text = _render(*request)
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(bytes([status]) + text.encode("utf-8", "surrogatepass"))


def _keep_shut(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(SHUT):
        raise PermissionError("a chat template opens nothing")


def _limit() -> bool:
    """Limits by the system on memory and files; whether it knows any on memory."""
    import resource

    time.localtime()  # which reads the time zone's file
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            size = int(stream.read().split()[0]) * resource.getpagesize() + MOST_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except OSError:  # macOS, which has the limit and does not keep to it
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    return True
