"""Chat templates that would never end, fill the memory, or get out of the sandbox."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from jinja2 import TemplateError

from stocklora.cli.console import UserError
from stocklora.instruct.rows import template_process
from stocklora.instruct.rows.chat_template import prepare_tokenizer, prompt_ids
from stocklora.instruct.rows.formats import Message
from stocklora.instruct.rows.template_process import render_template

forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

TURNS = [{"role": "user", "content": "x", "name": None}]


def render(template: str, **values: Any) -> str:
    return render_template(template, TURNS, None, True, values)


def test_where_processes_cannot_be_forked_the_limits_hold_too(monkeypatch: pytest.MonkeyPatch, in_folder: Path) -> None:
    """As on Windows: a process that is begun anew, and no limit by the system."""
    monkeypatch.setattr(template_process, "FORKED", False)
    monkeypatch.setattr(template_process, "_renderer", template_process._Renderer())
    assert (
        render("{{ bos }}{{ messages[0].content }}中\ud800{{ strftime_now('%d') | length }}", bos="<s>")
        == "<s>x中\ud8002"
    )
    with pytest.raises(TemplateError, match="no systems here"):
        render("{{ raise_exception('no systems here') }}")
    with pytest.raises(UserError, match="cannot be rendered"):
        render("{{ cycler.__init__.__globals__.os.mkdir('owned') }}")
    with pytest.raises(UserError, match="writes 40,000,000 characters"):
        render("{{ 'x' * 40000000 }}")
    monkeypatch.setattr(template_process._renderer, "_most_bytes", template_process._renderer._most_bytes - (3 << 28))
    with pytest.raises(UserError, match="more memory than there is for it"):
        render("{{ 'x' * 3000000000 }}")
    assert render("ok") == "ok"  # by another process
    monkeypatch.setattr(template_process, "MOST_SECONDS", 1.0)
    with pytest.raises(UserError, match="not done after 1 seconds"):
        render("{{ (10 ** 10) ** (10 ** 9) }}")
    assert os.listdir() == []


def test_it_writes_what_transformers_does(tiny_model: Path) -> None:
    tokenizer = prepare_tokenizer(tiny_model)
    conversation = [{"role": "user", "content": "{{ 1 }} <中>"}]
    expected = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids = prompt_ids(tokenizer, [Message("user", "{{ 1 }} <中>")])
    assert tokenizer.decode(ids) == expected
    assert render("{{ bos }}{{ messages[0].content }}{{ messages[0].name is defined }}", bos="<s>") == "<s>xFalse"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (10 ** 10) ** (10 ** 9) }}",
        "{% macro again(n) %}{% for a in range(9) %}{{ again(n + 1) }}{% endfor %}{% endmacro %}{{ again(0) }}",
        "{{ lipsum(n=99999999) }}",
    ],
)
def test_an_endless_one_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert render("ok") == "ok"
    started = time.monotonic()
    with monkeypatch.context() as impatient:
        impatient.setattr(template_process, "MOST_SECONDS", 0.3)
        with pytest.raises(UserError, match="chat template (takes more than|cannot be rendered)"):
            render(template)
    assert time.monotonic() - started < 30
    assert render("ok") == "ok"  # by another process


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 2000000000 }}", "memory"),
        ("{% set n = namespace(x='x' * 99) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "memory"),
        ("{{ '%2000000000d' | format(1) }}", "memory"),
        ("{{ 'x' | center(2000000000) }}", "memory"),
        ("{{ 'x' * 40000000 }}", "40,000,000 characters"),
    ],
)
def test_gigabytes_of_text_are_refused(template: str, said: str) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(UserError, match=f"takes more than a chat template may: .*{said}"):
        render(template)
    assert psutil.Process().memory_info().rss - before < 200e6


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('owned') }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% include '/etc/passwd' %}",
        "{{ ",
        "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    ],
)
def test_tricks_are_one_line(template: str, in_folder: Path) -> None:
    with pytest.raises(UserError) as refused:
        render(template)
    assert "\n" not in str(refused.value)
    assert not Path("owned").exists()


def test_a_refusal_is_the_templates_own() -> None:
    with pytest.raises(TemplateError, match="no systems here"):
        render("{{ raise_exception('no systems here') }}")


@forked
@pytest.mark.parametrize(("hook", "said"), [(True, "opens nothing"), (False, "Too many open files")])
def test_who_gets_out_of_the_sandbox_opens_no_file_and_writes_none(
    hook: bool, said: str, in_folder: Path, monkeypatch: Any
) -> None:
    """By the hook, which is there on every system, and by the system's own limits where it has them."""
    if not hook:
        monkeypatch.setattr(template_process, "SHUT", ())
    monkeypatch.setattr(template_process, "_renderer", template_process._Renderer())
    monkeypatch.setattr(template_process, "WARM_UP", ())

    def escaped(*_: Any) -> tuple[int, str]:
        try:
            Path("owned").write_text("x", encoding="utf-8")
        except OSError as error:
            return template_process.RENDERED, str(error)
        return template_process.RENDERED, "written"

    monkeypatch.setattr(template_process, "_render", escaped)
    assert said in render("")
    assert os.listdir() == []


@forked
def test_a_process_that_was_killed_is_begun_anew_and_a_forked_program_has_its_own(monkeypatch: Any) -> None:
    renderer = template_process._Renderer()
    monkeypatch.setattr(template_process, "_renderer", renderer)
    assert render("1") == "1"
    os.kill(renderer._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="brought its process down"):
        render("2")
    assert render("3") == "3"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if render("4") == "4" and renderer._owner == os.getpid() else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render("5") == "5"


@forked
@pytest.mark.parametrize("template", ["x", "{{ (10 ** 10) ** (10 ** 9) }}"], ids=["idle", "amid an endless one"])
def test_it_goes_when_its_program_is_killed(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "MOST_SECONDS", 0.5)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            renderer = template_process._Renderer()
            renderer.ask(("x", TURNS, None, True, {}))
            renderer._connection.send_bytes(json.dumps((template, TURNS, None, True, {})).encode())
            os.write(writer, str(renderer._process.pid).encode())
            signal.pause()
        finally:
            os._exit(1)
    process = psutil.Process(int(os.read(reader, 20)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    process.wait(timeout=10)
