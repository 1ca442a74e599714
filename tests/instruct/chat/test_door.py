"""The chat server against strangers: names, origins, keys, sizes, and connections that only cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from stocklora.cli.console import UserError
from stocklora.instruct.chat.door import Entrance, Limits, check_entrance, guarded_protocol
from stocklora.instruct.chat.model import Answer, Sampling
from stocklora.instruct.chat.server import make_app
from stocklora.runtime.machine import HOST, listen

SECRET = "降准的秘密"
KEY = "k" * 20
QUICK = Limits(body_bytes=100_000, bodies_bytes=300_000, request_s=1.0, stall_s=1.0, connections=64, waiting=6)


class Parrot:
    """Stands in for a model: says ``size`` letters, or fails."""

    adapters: tuple[str, ...] = ()
    base_name = "m"
    size = 20
    error: Exception | None = None
    wait: threading.Event | None = None

    def tokenizer(self, adapter: str) -> None:
        return None

    def fitted(self, *_: object, **__: object) -> tuple[list[int], int, int]:
        return [1], 0, 10

    def answer(self, messages: Any, *, on_text: Any, cancelled: Callable[[], bool], **_: object) -> Answer:
        if self.error is not None:
            raise self.error
        if self.wait is not None:
            self.wait.wait(20)
        said = 0
        while said < self.size and not cancelled():
            on_text("x" * 10_000 if self.size > 10_000 else "x")
            said += 10_000 if self.size > 10_000 else 1
        return Answer("x" * said, "stop", 1, said, 0.0)


class Running:
    """A server in a thread of this process."""

    def __init__(self, entrance: Entrance) -> None:
        self.parrot, self.listener = Parrot(), listen(0)
        self.port = self.listener.getsockname()[1]
        app = make_app(self.parrot, Sampling(), entrance=entrance)  # type: ignore[arg-type]
        config = uvicorn.Config(
            app, log_level="warning", http=guarded_protocol(entrance.limits), ws="none", timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=entrance.limits.header_bytes,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def ask(self, text: str = "x", stream: bool = False, **headers: str) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": stream}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"http://{HOST}:{self.port}/v1/chat/completions"
        return httpx.post(url, json=body, headers=given, timeout=20)

    def connect(self, *pieces: bytes) -> socket.socket:
        connection = socket.create_connection((HOST, self.port), timeout=20)
        for piece in pieces:
            connection.sendall(piece)
        return connection

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[Entrance], Running]]:
    running: list[Running] = []

    def begin(entrance: Entrance) -> Running:
        running.append(Running(entrance))
        return running[-1]

    yield begin
    for one in running:
        one.stop()


@pytest.fixture(scope="module")
def server(start: Callable[[Entrance], Running]) -> Running:
    return start(Entrance(limits=QUICK))


@pytest.fixture(autouse=True)
def _as_it_was(server: Running) -> Iterator[None]:
    yield
    server.parrot.size, server.parrot.error, server.parrot.wait = Parrot.size, None, None


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side ends the connection within the test's patience."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- who may come


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "", "[::2]:80"]
)
def test_a_foreign_name_is_refused(host: str, server: Running) -> None:
    assert server.ask(host=host).status_code == 400


def test_pages_of_other_origins_are_refused(server: Running) -> None:
    own = f"{HOST}:{server.port}"
    for headers in (
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": f"http://{HOST}:1"},
        {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"},
    ):  # fmt: skip
        refused = server.ask(**headers)
        assert refused.status_code == 403, headers
        assert "access-control-allow-origin" not in refused.headers
    assert server.ask(origin=f"http://{own}", sec_fetch_site="same-origin").status_code == 200
    assert server.ask().status_code == 200


def test_a_key_opens_and_nothing_else(start: Callable[[Entrance], Running], monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    from stocklora.instruct.chat import door

    real = door.hmac.compare_digest
    monkeypatch.setattr(door.hmac, "compare_digest", lambda a, b: (compared.append((a, b)), real(a, b))[1])
    locked = start(Entrance(host="0.0.0.0", key=KEY, limits=QUICK))
    for given in ("", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer ключ".encode()):
        refused = locked.ask(authorization=given)  # type: ignore[arg-type]
        assert refused.status_code == 401, given
        assert refused.headers["www-authenticate"] == "Bearer"
        assert KEY not in refused.text
    assert locked.ask(authorization=f"Bearer {KEY}").status_code == 200
    assert httpx.get(f"http://{HOST}:{locked.port}/v1/models").status_code == 401
    assert httpx.get(f"http://{HOST}:{locked.port}/health").status_code == 200
    assert len(compared) >= 8  # in constant time
    named = {"authorization": f"Bearer {KEY}"}
    assert locked.ask(host="evil.example", **named).status_code == 400
    assert locked.ask(host=f"192.168.1.5:{locked.port}", **named).status_code == 200
    assert locked.ask(host=socket.gethostname(), **named).status_code == 200


def test_an_open_address_needs_a_key_that_cannot_be_guessed() -> None:
    check_entrance(HOST, None)
    for key in (None, "short"):
        with pytest.raises(UserError, match="16 characters"):
            check_entrance("0.0.0.0", key)
    check_entrance("0.0.0.0", KEY)
    with pytest.raises(UserError, match="address of this machine"):
        listen(0, "203.0.113.7")


def test_the_script_asks_for_the_key(tiny_model: Any, call_script: Any, tmp_path: Any) -> None:
    command = ("inference_lora.py", "--base_model", tiny_model, "--serve", "--host", "0.0.0.0")
    result = call_script(*command, cwd=tmp_path, env={"STOCKLORA_API_KEY": ""})
    assert result.returncode == 2
    assert "STOCKLORA_API_KEY" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    short = call_script(*command, cwd=tmp_path, env={"STOCKLORA_API_KEY": "short"})
    assert "too short" in short.stderr
    with listen(0) as sock:  # the key in the environment is enough: it gets as far as the port
        port = sock.getsockname()[1]
        result = call_script(*command, "--port", port, cwd=tmp_path, env={"STOCKLORA_API_KEY": KEY})
    assert f"cannot listen on port {port}" in result.stderr


# --------------------------------------------------------------------------------------------- how much, how long

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("length", [b"9" * 30, b"100001", b"-1", b"1e3", "٣".encode()])
def test_a_body_that_is_announced_too_large_is_not_read(length: bytes, server: Running) -> None:
    with server.connect(HEAD + b"Content-Length: " + length + b"\r\n\r\n") as connection:
        assert connection.recv(200).split(b" ")[1] in (b"400", b"413")


def test_a_body_without_an_end_is_cut_off(server: Running) -> None:
    before = psutil.Process().memory_info().rss
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with server.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as connection, contextlib.suppress(OSError):
        for _ in range(2000):  # 130 MB
            connection.sendall(chunk)
    assert psutil.Process().memory_info().rss - before < 50e6
    assert server.ask().status_code == 200


def test_headers_have_a_limit(server: Running) -> None:
    with server.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n") as connection:
        with contextlib.suppress(OSError):
            for number in range(2000):
                connection.sendall(f"X-{number}: {'y' * 100}\r\n".encode())
        assert is_closed(connection)


def test_deep_and_odd_bodies_are_refused(server: Running) -> None:
    url = f"http://{HOST}:{server.port}/v1/chat/completions"
    deep = b'{"model": "m", "messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}"
    for content in (deep, b"[" * 90_000, b'{"model": "m"}' * 2, b'{"messages": 1e999999}', b"\xff\xfe", b"9" * 9_000):
        answer = httpx.post(url, content=content, headers={"content-type": "application/json"}, timeout=20)
        assert 400 <= answer.status_code < 500, content[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_slow_clients_are_let_go_and_others_answered(server: Running) -> None:
    slow = [
        server.connect(),
        server.connect(b"GET /hea"),
        server.connect(HEAD),
        server.connect(HEAD + b"Content-Length: 100\r\n\r\n{"),
        server.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he"),  # a second request that never comes
    ]
    started = time.monotonic()
    dripping = threading.Thread(target=_drip, args=(slow[1],))
    dripping.start()
    assert server.ask().status_code == 200
    assert time.monotonic() - started < 5
    for connection in slow:
        assert is_closed(connection)
        connection.close()
    dripping.join()


def _drip(connection: socket.socket) -> None:
    """A byte now and then, so that the connection is never still."""
    with contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.05)


def test_a_thousand_connections_leave_room_for_one_that_asks(server: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    before, idle = psutil.Process().memory_info().rss, []
    try:
        for number in range(1000):
            with contextlib.suppress(OSError):
                idle.append(server.connect(b"" if number % 2 else HEAD))
            if number % 250 == 249:
                assert server.ask().status_code == 200
        assert len(server.server.server_state.connections) <= QUICK.connections
        assert psutil.Process().memory_info().rss - before < 100e6
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert server.ask().status_code == 200


def test_a_stream_that_nobody_reads_gives_its_turn_back(server: Running) -> None:
    server.parrot.size = 200_000_000
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((HOST, server.port))
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    time.sleep(0.3)
    server.parrot.size = 20
    assert server.ask().status_code == 200
    connection.close()


def test_who_waits_is_limited_and_told(server: Running) -> None:
    server.parrot.wait = threading.Event()
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(server.ask) for _ in range(12)]
        busy = _until(lambda: sum(one.done() for one in asked) >= 12 - QUICK.waiting)
        server.parrot.wait.set()
        codes = sorted(one.result().status_code for one in asked)
    assert busy
    assert codes == [200] * QUICK.waiting + [503] * (12 - QUICK.waiting)


def _until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 15
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# ------------------------------------------------------------------------------------------------ what is told


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [RuntimeError, UserError])
def test_an_error_carries_no_path_and_no_text(
    kind: type[Exception], stream: bool, server: Running, capfd: pytest.CaptureFixture[str]
) -> None:
    server.parrot.error = kind(f"cannot open /srv/models/mine for {SECRET}" if kind is RuntimeError else "no /srv/x")
    said = server.ask(SECRET, stream=stream)
    assert "/srv" not in said.text
    assert SECRET not in said.text
    assert "the server failed" in said.text
    told = capfd.readouterr()
    assert "a request failed" in told.err
    assert SECRET not in told.out + told.err
    assert "Traceback" not in told.err


def test_logs_hold_no_text_of_messages(server: Running, capfd: pytest.CaptureFixture[str]) -> None:
    assert server.ask(SECRET).status_code == 200
    assert server.ask(SECRET, host="evil.example").status_code == 400
    httpx.post(f"http://{HOST}:{server.port}/v1/chat/completions", content=SECRET.encode())
    httpx.get(f"http://{HOST}:{server.port}/{SECRET}")
    told = capfd.readouterr()
    assert SECRET not in told.out + told.err


def test_the_answers_of_others_are_not_in_an_error(server: Running) -> None:
    assert server.ask(SECRET).status_code == 200
    refused = [server.ask("", host="evil.example"), server.ask("\0"), server.ask("x" * 200_000)]
    assert [one.status_code for one in refused] == [400, 400, 413]
    assert not any(SECRET in one.text for one in refused)


def test_many_bodies_at_once_are_weighed_together() -> None:
    """Without waiting for a model: the bytes of all requests that are read at once."""
    from stocklora.instruct.chat.door import Door

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("too large a body came through")

    async def ask(door: Door, hold: asyncio.Event, statuses: list[int]) -> None:
        pieces = iter([90_000, 9_000])

        async def receive() -> dict[str, Any]:
            size = next(pieces)
            if size == 9_000:
                await hold.wait()
            return {"type": "http.request", "body": b" " * size, "more_body": True}

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status", 0))

        scope = {"type": "http", "path": "/v1/x", "headers": [(b"host", b"localhost")]}
        await door(scope, receive, send)  # type: ignore[arg-type]

    async def all_of_them() -> list[int]:
        door, hold, statuses = Door(app, Entrance(limits=QUICK)), asyncio.Event(), list[int]()
        waiting = [asyncio.create_task(ask(door, hold, statuses)) for _ in range(5)]
        await asyncio.sleep(0.05)
        refused = [status for status in statuses if status]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert door.bytes_inside == 0
        assert door.inside == 0
        return refused

    assert asyncio.run(all_of_them()) == [503, 503]
