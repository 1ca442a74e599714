"""Who may come into the chat server, how much they may bring, and how long they may take.

``Door`` looks at requests (names, origins, the key, sizes), ``guarded_protocol`` at connections (slow, idle, stalled
ones), before anything of the model is touched. Both hold for strangers; whoever has the key may still ask much.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from stocklora.cli.console import PROJECT, UserError, warn
from stocklora.instruct.chat.requests import APIError
from stocklora.runtime.machine import HOST

LOOPBACK = (HOST, "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """What a client may take.

    Attributes:
        body_bytes: of one request; the longest contexts need a few hundred KB.
        bodies_bytes: of all requests that are in the server at once.
        header_bytes: of a request's first line and headers.
        request_s: seconds from a connection, or from an answer's end, to the end of the next request.
        stall_s: seconds that a client may leave its answer in the pipe.
        connections: open at once; beyond them the longest idle one is closed.
        waiting: requests that are in the server at once, all but one of them waiting for their turn.
    """

    body_bytes: int = 4 * 2**20
    bodies_bytes: int = 32 * 2**20
    header_bytes: int = 16 * 2**10
    request_s: float = 20.0
    stall_s: float = 30.0
    connections: int = 256
    waiting: int = 64


@dataclass(frozen=True)
class Entrance:
    """Where the server is, and what it asks of those who come.

    Attributes:
        host: the address that it listens on. key: that requests must bring; None asks for none.
        names: by which it may be called beside its own.
    """

    host: str = HOST
    key: str | None = None
    names: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach it."""
        return self.host not in LOOPBACK

    def may_be_called(self, name: str) -> bool:
        """Whether a header Host may name the server so.

        A page of another origin reaches this machine under a name of its own that it has made point here; an address
        it cannot use so. Where others may come, they know it by an address or by the machine's name.
        """
        if name.lower() in (*LOOPBACK, self.host.lower(), *(own.lower() for own in self.names)):
            return True
        if not self.is_open:
            return False
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name.lower() in (socket.gethostname().lower(), socket.getfqdn().lower())


AT_HOME = Entrance()  # this machine alone


class Door:
    """ASGI middleware: refuses what an ``Entrance`` does not allow, and passes whole requests on.

    An exception that nobody answered is told in the server's output by its kind and place, without its words: they may
    quote what was asked.
    """

    def __init__(self, app: ASGIApp, entrance: Entrance) -> None:
        self.app, self.entrance, self.limits = app, entrance, entrance.limits
        self.inside = self.bytes_inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        brought = 0

        def weigh(size: int) -> None:
            nonlocal brought
            brought += size
            self.bytes_inside += size
            if brought > self.limits.body_bytes:
                raise APIError(f"the body has more than {self.limits.body_bytes:,} bytes", status=413)
            if self.bytes_inside > self.limits.bodies_bytes:
                raise _busy()

        self.inside += 1
        try:
            self._check(Headers(scope=scope), scope["path"])
            if self.inside > self.limits.waiting:
                raise _busy()
            body = await _whole_body(receive, weigh)
            if body is not None:  # None: the client went away
                await self.app(scope, _replayed(body, receive), noting)
        except APIError as refused:
            await _refusal(refused)(scope, receive, noting)
        except Exception as error:
            warn(f"a request failed: {type(error).__name__} at {_place(error)}")
            if started:  # the end of a stream that has told its error already
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                failed = APIError("the server failed; see its output", status=500, kind="server_error")
                await _refusal(failed)(scope, receive, noting)
        finally:
            self.inside -= 1
            self.bytes_inside -= brought

    def _check(self, headers: Headers, path: str) -> None:
        """Raise an ``APIError`` for a request that may not come in."""
        host = headers.get("host", "")
        if not self.entrance.may_be_called(_without_port(host)):
            own = f"{HOST} or localhost" if not self.entrance.is_open else "an address or name of this machine"
            raise APIError(f"the header Host must be {own}, got {host[:80]!r}")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if (origin is not None and urlsplit(origin).netloc != host) or site not in ("none", "same-origin"):
            raise APIError("pages of other origins may not ask this server", status=403)
        if self.entrance.key is not None and path != "/health":
            kind, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self.entrance.key.encode())
            if kind.lower() != "bearer" or not same:
                raise APIError("give the server's key: Authorization: Bearer KEY", status=401, code="invalid_api_key")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self.limits.body_bytes:
            raise APIError(f"the body may have {self.limits.body_bytes:,} bytes at most", status=413)


def _busy() -> APIError:
    return APIError("the server has too much to do; ask again later", status=503, kind="server_error", code="busy")


def _refusal(error: APIError) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}.get(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def _without_port(host: str) -> str:
    """``127.0.0.1:80`` -> ``127.0.0.1``, ``[::1]:80`` -> ``::1``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


async def _whole_body(receive: Receive, weigh: Callable[[int], None]) -> bytes | None:
    """All of a request's body, each piece weighed as it comes; None where the client went away."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        weigh(len(pieces[-1]))
        if not message.get("more_body", False):
            return b"".join(pieces)


def _replayed(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """``receive`` of a request whose body was read already."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _place(error: BaseException) -> str:
    """Where an exception comes from: file and line of its last steps, innermost first."""
    steps = traceback.extract_tb(error.__traceback__)[-4:]
    names = []
    for step in reversed(steps):
        path = Path(step.filename)
        shown = path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path.name
        names.append(f"{shown}:{step.lineno}")
    return " < ".join(names) or "an unknown place"


def guarded_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP, with an end for connections that bring no request or take no answer."""
    there: dict[Any, None] = {}  # in the order in which they came or were last answered

    class Guarded(H11Protocol):
        """One connection. uvicorn itself limits the wait for a second request alone, and only until its first byte."""

        _request_due: asyncio.TimerHandle | None = None
        _answer_due: asyncio.TimerHandle | None = None

        @property
        def _is_idle(self) -> bool:
            cycle = self.cycle
            return cycle is None or cycle.response_complete or cycle.more_body

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            there[self] = None
            if len(there) > limits.connections:
                longest = next((other for other in there if other._is_idle), self)
                longest.transport.abort()
                there.pop(longest, None)
            self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            there.pop(self, None)
            for timer in (self._request_due, self._answer_due):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self._is_idle and self._request_due is not None:
                self._request_due.cancel()
                self._request_due = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self in there:
                there[self] = there.pop(self)
            self._await_request()

        def _await_request(self) -> None:
            if self._request_due is not None:
                self._request_due.cancel()
            self._request_due = self.loop.call_later(limits.request_s, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer_due = self.loop.call_later(limits.stall_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._answer_due is not None:
                self._answer_due.cancel()
                self._answer_due = None

    return Guarded


def check_entrance(host: str, key: str | None) -> None:
    """Raise a UserError where other machines could come in without a key, or with one that can be guessed."""
    if host in LOOPBACK:
        return
    if key is None:
        raise UserError(
            f"--host {host} lets other machines in: give a key of 16 characters or more that they must know, in the "
            f"environment as STOCKLORA_API_KEY or with --api_key, or leave out --host"
        )
    if len(key) < 16:
        raise UserError(
            "the key (--api_key) is too short for a server that others can reach: take 16 characters or more"
        )
