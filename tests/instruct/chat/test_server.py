"""inference_lora.py --serve: a server in a process of its own, asked by the real openai client."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from chat_models import make_adapter
from script_calls import ForkedScript

from stocklora.cli.console import UserError
from stocklora.instruct.chat.model import Answer, Sampling
from stocklora.instruct.chat.server import make_app
from stocklora.runtime.machine import listen

Start = Callable[..., "Server"]
ASKED = [{"role": "user", "content": "央行降准50个基点"}]


class Server:
    """A running ``inference_lora.py --serve``."""

    def __init__(self, script: ForkedScript, url: str) -> None:
        self.script, self.url = script, url
        self.client = openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=60)

    def busy_s(self) -> float:
        """Processor time that it has had: other programs' load does not count."""
        times = psutil.Process(self.script.process.pid).cpu_times()
        return times.user + times.system

    def ask(self, model: str = "first", **options: object):  # type: ignore[no-untyped-def]
        options = {"messages": ASKED, "max_tokens": 6, "temperature": 0, **options}
        return self.client.chat.completions.create(model=model, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def start_server(repo_root: Path, tmp_path_factory: pytest.TempPathFactory, nursery: Any) -> Iterator[Start]:
    """Starts ``inference_lora.py --serve`` with the flags given."""
    scripts: list[ForkedScript] = []

    def start(*flags: str) -> Server:
        folder = tmp_path_factory.mktemp("server")
        script = ForkedScript(
            nursery, repo_root / "inference_lora.py", *flags, "--serve", "--port", "0", "--dtype", "float32",
            cwd=folder, printed=folder / "printed",
        )  # fmt: skip
        scripts.append(script)
        for line in script.stdout:
            if found := re.search(r"serving (http://127\.0\.0\.1:\d+/v1)", line):
                return Server(script, found[1])
        raise AssertionError(script.stderr)

    yield start
    for script in scripts:
        script.end()


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, start_server: Start) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    adapters = [
        f"{name}={make_adapter(tiny_model, folder / name, seed)}" for seed, name in enumerate(["first", "2.nd"])
    ]
    running = start_server("--base_model", str(tiny_model), "--lora_model", *adapters)
    yield running
    running.script.interrupt()
    running.script.wait(20)
    assert "Traceback" not in (errors := running.script.stderr.read_text(encoding="utf-8")), errors


def test_base_and_adapters_are_models_of_their_own(server: Server, tiny_model: Path) -> None:
    names = [model.id for model in server.client.models.list()]
    assert names == ["first", "2.nd", tiny_model.name]
    assert server.client.models.retrieve("2.nd").id == "2.nd"
    assert len({server.ask(name).choices[0].message.content for name in names}) == 3


def test_an_answer_has_text_usage_and_an_end(server: Server) -> None:
    answer = server.ask()
    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    longer = server.ask(messages=[{"role": "system", "content": "简短回答"}, *ASKED])
    assert longer.usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_stream_says_the_same(server: Server) -> None:
    whole = server.ask(max_tokens=20)
    chunks = list(server.ask(max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(piece != "" for piece in pieces) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert not any(chunk.usage for chunk in server.ask(stream=True))


def test_a_stop_text_ends_an_answer_before_it(server: Server) -> None:
    text = server.ask(max_tokens=20).choices[0].message.content
    stop = text[4:6]
    stopped = server.ask(max_tokens=20, stop=[stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    chunks = server.ask(max_tokens=20, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == stopped.message.content


def test_a_seed_repeats_a_sampled_answer(server: Server) -> None:
    def sampled(seed: int | None) -> str:
        return server.ask(temperature=1.5, top_p=0.95, seed=seed, max_tokens=12).choices[0].message.content

    assert sampled(7) == sampled(7)
    assert len({sampled(seed) for seed in (7, 8, 9)}) == 3
    assert sampled(None) != sampled(None)


def test_text_parts_and_the_developer_role_are_understood(server: Server) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": ASKED[0]["content"]}]}]
    assert server.ask(messages=parts).choices[0].message.content == server.ask().choices[0].message.content
    systems = [[{"role": role, "content": "x"}, *ASKED] for role in ("developer", "system")]
    assert len({server.ask(messages=messages).choices[0].message.content for messages in systems}) == 1


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", "'critic'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content", "text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "last message"),
        ({"messages": []}, "messages", "at least 1"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 2}, "n", "must be 1"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"response_format": {"type": "yaml"}}, "response_format", "must be of type text"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
         "response_format", "Invalid type: strin"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}}, "max_tokens": 3},
         "response_format", "does not fit into 3 tokens"),
        ({"tools": [{"type": "function", "function": {"name": "px"}}]}, "tools", "no place for tools"),
        ({"response_format": {"type": "json_object"}, "stop": ["}"]}, "stop", "before it is whole"),
        ({"response_format": {"type": "json_object", "schema": 5}}, "response_format", "must be a JSON schema"),
        ({"messages": [{**ASKED[0], "prefix": True}]}, "messages[0].prefix", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "there are none"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"frequency_penalty": 1.0}, "frequency_penalty", "not supported"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "not supported"),
        ({"extra_body": {"guided_regex": "a+"}}, "guided_regex", "not supported"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
         "chat_template_kwargs.enable_thinking", "no such setting"),
        ({"messages": [{"role": "user", "content": "x" * 6000}]}, "messages", "context"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_as_openai_does(
    server: Server, options: dict[str, object], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        server.ask(**options)
    error = refusal.value.body
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    with pytest.raises(openai.BadRequestError):  # a status of its own, not half a stream
        server.ask(**options, stream=True)


def test_options_of_a_stream_are_honoured_or_refused(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="are for stream: true"):
        server.ask(stream_options={"include_usage": True})
    with pytest.raises(openai.BadRequestError, match="stream_options.include_obfuscation"):
        server.ask(stream=True, stream_options={"include_obfuscation": True})
    last = list(server.ask(stream=True, stream_options={"include_usage": True, "include_obfuscation": False}))[-1]
    assert last.usage.completion_tokens == 6


def test_an_unknown_model_is_not_found(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        server.ask("gpt-4")
    assert refusal.value.body["code"] == "model_not_found"
    assert "first, 2.nd" in refusal.value.body["message"]
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["type"] == "invalid_request_error"


def test_foreign_hosts_and_broken_json_are_refused(server: Server) -> None:
    address = f"{server.url}/chat/completions"
    foreign = httpx.post(address, headers={"Host": "evil.example"}, json={})
    assert foreign.status_code == 400
    assert "evil.example" in foreign.json()["error"]["message"]
    for path in ("completions", "embeddings"):
        answer = httpx.post(f"{server.url}/{path}", json={"model": "first", "prompt": "x", "input": "x"})
        assert answer.status_code == 404
        assert f"/v1/{path} is not served here" in answer.json()["error"]["message"]
    answer = httpx.get(address)
    assert (answer.status_code, answer.json()["error"]["message"]) == (405, "/v1/chat/completions is asked with POST")
    as_json = {"Content-Type": "application/json"}
    for content, headers, words in [
        (b'{"model"', as_json, "not valid JSON"),
        (b"{}", {"Content-Type": "text/plain"}, "Content-Type: application/json"),
        (b"[]", as_json, "a JSON object"),
        ('{"model": "café à la carte"}'.encode("latin-1"), as_json, "byte 14 of the body is not UTF-8, nor Chinese"),
        (b'{"model": "\xff"}', as_json, "name the encoding"),
        ('{"model": "降准"}'.encode("gbk"), {"Content-Type": "application/json; charset=utf-8"}, "is not utf-8"),
        ('{"model": "降准"}'.encode("gbk"), {"Content-Type": "application/json; charset=nope"}, "'nope'"),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', as_json, "does not exist"),
    ]:
        answer = httpx.post(address, content=content, headers=headers)
        assert answer.status_code in (400, 404)
        assert words in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] in (None, "model")


def test_a_body_in_another_encoding_is_read(server: Server) -> None:
    body = {"model": "first", "messages": [{"role": "user", "content": "央行降准50个基点，朱镕基"}], "max_tokens": 6}
    text = json.dumps(body, ensure_ascii=False)

    def said(content: bytes, charset: str = "") -> str:
        headers = {"Content-Type": f"application/json{charset}"}
        answer = httpx.post(f"{server.url}/chat/completions", content=content, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    plain = said(text.encode())
    assert said(text.encode("gbk")) == said(text.encode("gb18030"), '; charset="GB18030"') == plain
    assert said(text.encode("utf-8-sig")) == said(text.encode("utf-16")) == plain


def test_several_clients_all_get_their_own_answer(server: Server) -> None:
    names = ["first", "2.nd"] * 4
    alone = {name: server.ask(name, max_tokens=20).choices[0].message.content for name in set(names)}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: server.ask(name, max_tokens=20).choices[0].message.content, names))
    assert answers == [alone[name] for name in names]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_answer(server: Server, stream: bool) -> None:
    body = {"model": "first", "messages": ASKED, "max_tokens": 4000, "temperature": 0, "stream": stream}

    def leave_early() -> None:
        try:
            with httpx.stream("POST", f"{server.url}/chat/completions", json=body, timeout=0.5) as answer:
                for _ in answer.iter_lines():
                    return
        except httpx.TimeoutException:
            return

    started = server.busy_s()
    whole = server.ask(max_tokens=200)
    of_200_s = server.busy_s() - started
    assert whole.choices[0].finish_reason == "length"  # so the long one would take some 20 times as long
    thread = threading.Thread(target=leave_early)
    thread.start()
    thread.join()
    started = server.busy_s()
    server.ask(max_tokens=1)
    assert server.busy_s() - started < max(2.0, 5 * of_200_s)


def test_ctrl_c_ends_a_stream_with_a_word_and_no_traceback(tiny_model: Path, start_server) -> None:
    server = start_server("--base_model", str(tiny_model))
    stream = server.ask(tiny_model.name, max_tokens=4000, stream=True)
    next(stream)
    server.script.interrupt()
    with pytest.raises(openai.APIError, match="being stopped"):
        list(stream)
    assert server.script.wait(20) == 130
    assert server.script.stderr.read_text(encoding="utf-8") == "interrupted\n"


class Speaker:
    """Stands in for a ``ChatModel``: says "x" until it is stopped, or fails."""

    adapters: tuple[str, ...] = ()
    base_name = "m"

    def __init__(self, error: Exception | None = None, length: int = 20) -> None:
        self.error, self.length = error, length
        self.answers: list[Answer] = []

    def tokenizer(self, adapter: str) -> None:
        return None

    def fitted(self, *_: object, **__: object) -> tuple[list[int], int, int]:
        return [1], 0, 10

    def answer(self, messages: object, *, on_text, cancelled, **_: object) -> Answer:  # type: ignore[no-untyped-def]
        if self.error is not None:
            raise self.error
        count = 0
        while count < self.length and not cancelled():
            on_text("x")
            count += 1
            time.sleep(0.01)
        self.answers.append(Answer("x" * count, "stop" if count == self.length else "cancelled", 1, count, 0.0))
        return self.answers[-1]


async def ask_app(app: Any, stream: bool, leave_in_write: bool = False, gone: bool = False) -> list[dict[str, Any]]:
    """What an application sends.

    Args:
        leave_in_write: the client goes away while one of its answers is being written.
        gone: it went away once it had asked.
    """
    body = {"model": "m", "messages": ASKED, "stream": stream}
    requests = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])
    left, sent = asyncio.Event(), []
    if gone:
        left.set()

    async def receive() -> dict[str, Any]:
        if request := next(requests, None):
            return request
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if leave_in_write and len(sent) == 4:
            asyncio.get_running_loop().call_later(0.1, left.set)
            await asyncio.Event().wait()

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"", "root_path": "", "scheme": "http",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


def test_a_client_that_leaves_in_the_middle_of_a_write_gives_its_turn_back() -> None:
    app = make_app(Speaker(), Sampling())  # type: ignore[arg-type]

    async def both() -> int:
        gc.disable()  # the collector would close the stream at a time of its own
        try:
            await ask_app(app, True, leave_in_write=True)
            return len(await asyncio.wait_for(ask_app(app, True), 5))
        finally:
            gc.enable()

    assert asyncio.run(both()) > 20


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_is_missed_however_fast_the_pieces_come(stream: bool) -> None:
    speaker = Speaker(length=500)  # five seconds
    asyncio.run(ask_app(make_app(speaker, Sampling()), stream, gone=True))  # type: ignore[arg-type]
    assert [answer.finish for answer in speaker.answers] in ([["cancelled"], []] if stream else [["cancelled"]])


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_is_told_as_openai_does(stream: bool) -> None:
    for error, words in [
        (UserError("memory is full"), "memory is full"),
        (RuntimeError("secret"), "the server failed"),
    ]:
        app = make_app(Speaker(error), Sampling())  # type: ignore[arg-type]
        sent: list[dict[str, Any]] = []
        with contextlib.suppress(RuntimeError):  # goes on to the server's own output
            asyncio.run(ask_app(_recording(app, sent), stream))
        said = b"".join(message.get("body", b"") for message in sent)
        assert sent[0]["status"] == (200 if stream else 500)
        body = json.loads(said.split(b"data: ")[-1])
        assert words in body["error"]["message"]
        assert b"secret" not in said


def _recording(app: Any, sent: list[dict[str, Any]]) -> Any:
    async def recorded(scope: Any, receive: Any, send: Any) -> None:
        async def keep(message: dict[str, Any]) -> None:
            sent.append(message)
            await send(message)

        await app(scope, receive, keep)

    return recorded


def test_a_port_is_taken_before_the_model_is_loaded() -> None:
    with listen(0) as listener, pytest.raises(UserError, match="cannot listen on port"):
        listen(listener.getsockname()[1])


def test_a_taken_port_is_one_line(server: Server, tiny_model: Path, call_script, tmp_path: Path) -> None:
    port = server.url.split(":")[2].split("/")[0]
    result = call_script("inference_lora.py", "--base_model", tiny_model, "--serve", "--port", port, cwd=tmp_path)
    assert result.returncode == 2
    assert f"cannot listen on port {port}" in result.stderr
    assert len(result.stderr.splitlines()) == 1
