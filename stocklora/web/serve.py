"""One life of the page's server: from a free port and a new token to Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI

from stocklora.cli.console import UserError, say
from stocklora.runtime.files import check_writable
from stocklora.runtime.machine import HOST, listen
from stocklora.web.app import make_app
from stocklora.web.settings import WebSettings
from stocklora.web.workspace import Workspace

TOKEN_BYTES = 24


def serve_page(settings: WebSettings) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the port is taken, or the workspace cannot be written.
    """
    if settings.workspace.exists() and not settings.workspace.is_dir():
        raise UserError(f"--workspace {settings.workspace} is a file; give a folder")
    check_writable(settings.workspace, "--workspace")
    listener = listen(settings.port)
    settings.workspace.mkdir(parents=True, exist_ok=True)
    port, token = listener.getsockname()[1], secrets.token_urlsafe(TOKEN_BYTES)
    workspace = Workspace(settings.workspace, settings.models)
    app = make_app(workspace, token, port)
    address = f"http://{HOST}:{port}/?token={token}"

    @contextlib.asynccontextmanager
    async def announce(_: FastAPI) -> AsyncIterator[None]:
        say(f"workspace: {workspace.root}")
        say(f"page: {address} (Ctrl-C ends the page; runs go on)")
        if settings.open and has_desktop():
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        yield
        app.state.planner.close()

    app.router.lifespan_context = announce
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def has_desktop() -> bool:
    """Whether a browser would have a window; one in the terminal would take it over."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
