"""The assistant's room: ``inference_lora.py --serve`` runs as a process of its own, and the page talks through here."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

from stocklora.cli.console import PROJECT, UserError
from stocklora.runtime.machine import HOST
from stocklora.web.runs import Runs

SERVING = re.compile(rf"serving http://{re.escape(HOST)}:(\d+)/v1")
CONNECT_S, ANSWER_S = 5.0, 600.0
SCHEMAS = PROJECT / "stocklora" / "instruct" / "chat" / "schemas"


def server_of(runs: Runs) -> dict[str, Any] | None:
    """The newest chat server that runs: its ``run`` and its ``port``, None while it loads its model."""
    for run in runs.all(50):
        if run["script"] == "inference_lora" and run["state"] == "running":
            found = SERVING.search(runs.log(run["id"], 0)["text"])
            return {"run": run, "port": int(found[1]) if found else None}
    return None


def models_of(port: int) -> list[str]:
    """Names of the models that a server answers with: adapters, and the base.

    Raises:
        UserError: it does not answer.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=CONNECT_S)
    try:
        connection.request("GET", "/v1/models")
        return [str(card["id"]) for card in json.load(connection.getresponse())["data"]]
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise UserError(f"the chat server does not answer: {error}") from None
    finally:
        connection.close()


def schemas() -> dict[str, Any]:
    """The schemas that come along, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(SCHEMAS.glob("*.json"))}


async def relay(port: int, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """The server's events as they come; a reader that goes away ends the answer.

    Raises:
        UserError: the server refuses, in its own words, or does not answer.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_S)
    try:
        try:
            data = json.dumps({**body, "stream": True}).encode()
            await asyncio.to_thread(
                connection.request, "POST", "/v1/chat/completions", data, {"Content-Type": "application/json"}
            )
            answer = await asyncio.to_thread(connection.getresponse)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"the chat server does not answer: {error}") from None
        if answer.status != 200:
            raise UserError(_refusal(await asyncio.to_thread(answer.read)))
        yield b""  # the status is known: what follows is the stream
        while line := await asyncio.to_thread(answer.readline):
            yield line
    finally:
        with contextlib.suppress(OSError, AttributeError):
            connection.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that still reads
        connection.close()


def _refusal(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the chat server refused the request"


def check_request(body: Any) -> dict[str, Any]:
    """A chat request of the page: only what it may say.

    Raises:
        UserError: naming what is missing.
    """
    known = ("model", "messages", "temperature", "max_tokens", "response_format")
    if (
        not isinstance(body, dict)
        or not isinstance(body.get("model"), str)
        or not isinstance(body.get("messages"), list)
    ):
        raise UserError("a chat request needs a model and messages")
    return {name: body[name] for name in known if body.get(name) is not None}
