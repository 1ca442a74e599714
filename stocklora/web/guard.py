"""What keeps others out of the page, and what a file says out of its program.

A page of another origin can make a browser ask 127.0.0.1, and can give its own name that address (DNS rebinding). So
the Host must be ours, the Origin too (and there must be one where something changes), and every request needs the
random token that only the printed address has; the browser keeps it in a cookie that other sites' requests do not
carry. The Content-Security-Policy lets no script run but the package's own files.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stocklora.runtime.machine import HOST

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; font-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# A backtest's report stands in a frame of its own: no script, no origin, nothing from anywhere.
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
READING = {"GET", "HEAD"}


class Guard:
    """Lets through what comes from this page, and gives every answer its headers.

    Args:
        app: what is guarded.
        token: of this server's life.
        port: that it listens on.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token, self.cookie = app, token, f"stocklora_{port}"
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        by_address = scope["path"] == "/" and self._is_token(parse_qs(scope["query_string"].decode()).get("token"))

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer.setdefault(name, value)
                if by_address:
                    answer.append("Set-Cookie", f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        refused = self._why_not(scope["method"], headers, by_address)
        if refused:
            await PlainTextResponse(refused, status_code=403)(scope, receive, send_guarded)
        else:
            await self.app(scope, receive, send_guarded)

    def _why_not(self, method: str, headers: Headers, by_address: bool) -> str | None:
        if headers.get("host") not in self.hosts:
            return "this page is reached by the address that web.py printed, and by no other name"
        origin = headers.get("origin")
        if origin is None and method not in READING:
            return "a request that changes something must say its Origin"
        if origin is not None and origin not in {f"http://{host}" for host in self.hosts}:
            return "another site's page may not ask this one"
        if not by_address and not self._is_token([self._cookie_of(headers)]):
            return "open the address that web.py printed when it was started last; it holds a token"
        return None

    def _cookie_of(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _is_token(self, given: list[str] | None) -> bool:
        return given is not None and hmac.compare_digest("".join(given).encode(), self.token.encode())
