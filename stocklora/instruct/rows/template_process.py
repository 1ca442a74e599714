"""Chat templates rendered where they can do no harm: in a process of their own, with limits on time, memory and files.

A chat template is a program that comes with a model. Jinja's sandbox, in which transformers renders it, keeps it from
Python's inside, but not from an endless loop or a text of gigabytes. So one small process is forked before the model is
loaded, and renders all templates of this program. It may open no file, write none, and grow by ``MOST_MEMORY_BYTES``;
the program waits ``MOST_SECONDS`` for a rendering and takes ``MOST_CHARACTERS`` of it. A process that does not answer
is killed, and the next rendering begins another one.

Where processes cannot be forked (Windows) templates are rendered in the program itself, in the sandbox alone.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from stocklora.cli.console import UserError, one_line

MOST_SECONDS = 20.0  # a rendering takes a millisecond; a machine that swaps takes longer
MOST_CHARACTERS = 32_000_000
MOST_MEMORY_BYTES = 1 << 30  # beyond what the process was born with

REFUSED, FAILED, TOO_LARGE, RENDERED = range(4)
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
        self._process, self._owner = 0, 0
        self._connection: Any = None

    def ask(self, request: tuple[Any, ...]) -> tuple[int, str]:
        """What ``_render`` says of ``request``."""
        with self._lock:
            if self._owner != os.getpid():  # a process forked from this one must not speak over the same pipe
                self._begin()
            try:
                self._connection.send(request)
                if not self._connection.poll(MOST_SECONDS):
                    self._end()
                    return TOO_LARGE, f"it was not done after {MOST_SECONDS:.0f} seconds"
                status, text = self._connection.recv()
                return status, text
            except (EOFError, OSError):
                self._end()
                return TOO_LARGE, "it brought its process down"
            except BaseException:  # Ctrl-C: its answer is not to be taken for the next one's
                self._end()
                raise

    def _begin(self) -> None:
        # Imported before the fork, since a process that may open no file can import nothing.
        from transformers.utils import chat_template_utils  # noqa: F401

        self._connection, theirs = multiprocessing.connection.Pipe()
        process = os.fork()
        if process == 0:
            try:
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._process, self._owner = process, os.getpid()

    def _end(self) -> None:
        self._connection.close()
        self._owner = 0
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)


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
    status, text = _renderer.ask(request) if hasattr(os, "fork") else _render(*request)
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


def _serve(connection: Any) -> None:
    """Render until the program at the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which goes, and then this process does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    kept = connection.fileno()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.closerange(3, kept)
    os.closerange(kept + 1, 65536)  # sockets and pipes whose other ends would wait for this process
    for template in WARM_UP:
        _render(template, [{"role": "user", "content": "x"}], None, True, {})
    _limit()
    gc.freeze()  # what the program had is not walked over
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        request = connection.recv()
        signal.setitimer(signal.ITIMER_REAL, 1.5 * MOST_SECONDS)  # an endless loop outlives no program that was killed
        answer = _render(*request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _limit() -> None:
    import resource
    import time

    time.localtime()  # which reads the time zone's file
    with open("/proc/self/statm" if os.path.exists("/proc/self/statm") else os.devnull, encoding="ascii") as stream:
        pages = (stream.read().split() or ["0"])[0]
    if int(pages):
        size = int(pages) * resource.getpagesize() + MOST_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
