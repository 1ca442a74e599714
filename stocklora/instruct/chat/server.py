"""OpenAI's chat API on this machine: FastAPI for the requests, uvicorn for the connections, ``ChatModel`` for answers.

``transformers serve`` speaks the same API, but knows no adapters. Here the base and each adapter are a model of their
own by name; one answer is computed at a time, and a client that goes away ends its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Send

from stocklora.cli.console import UserError, say, warn
from stocklora.instruct.chat.bodies import AnyEncoding
from stocklora.instruct.chat.constrained import FormError
from stocklora.instruct.chat.door import AT_HOME, Door, Entrance, guarded_protocol
from stocklora.instruct.chat.model import Answer, ChatModel, ContextError, Question, Sampling
from stocklora.instruct.chat.requests import APIError, ChatRequest, question_of_request, sampling_of
from stocklora.instruct.chat.tool_calls import calls_in

POLL_S = 0.1  # how often a request looks whether its client is still there
GRACE_S = 10  # for answers to end after Ctrl-C: one token each, or the reading of a long prompt


def serve(
    model: ChatModel,
    listener: socket.socket,
    sampling: Sampling,
    adapter: str,
    system: str | None = None,
    entrance: Entrance = AT_HOME,
) -> None:
    """Answer requests until Ctrl-C.

    Args:
        model: that answers.
        listener: of ``listen``.
        sampling: what holds where a request does not say otherwise.
        adapter: the model that is listed first.
        system: put before conversations that have no system message.
        entrance: who may come in.
    """
    host = f"[{entrance.host}]" if ":" in entrance.host else entrance.host
    address = f"http://{host}:{listener.getsockname()[1]}/v1"
    app = make_app(model, sampling, adapter, system, entrance)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S, server_header=False,
        ws="none", http=guarded_protocol(entrance.limits), h11_max_incomplete_event_size=entrance.limits.header_bytes,
    )  # fmt: skip
    server = _Server(config, app.state.closing)

    @contextlib.asynccontextmanager
    async def announce(_: FastAPI) -> AsyncIterator[None]:
        say(f"models: {', '.join(model_names(model, adapter))}")
        key = "-" if entrance.key is None else "the key"
        say(f'serving {address} (Ctrl-C ends); with the openai client: OpenAI(base_url="{address}", api_key="{key}")')
        yield

    app.router.lifespan_context = announce
    with listener:
        server.run(sockets=[listener])


def model_names(model: ChatModel, first: str | None = None) -> list[str]:
    """What requests may call ``model``: its adapters, and the base by its name."""
    base = model.base_name if model.base_name not in model.adapters else "base"
    names = [*model.adapters, base]
    if first in names:
        names.remove(first)
        names.insert(0, first)
    return names


def make_app(
    model: ChatModel,
    sampling: Sampling,
    adapter: str | None = None,
    system: str | None = None,
    entrance: Entrance = AT_HOME,
) -> FastAPI:
    """The web application; ``sampling`` holds where a request does not say otherwise."""
    app = FastAPI(title="stocklora", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Door, entrance=entrance)
    app.router.route_class = AnyEncoding
    names = model_names(model, adapter)
    started = int(time.time())
    turn = asyncio.Lock()
    closing = app.state.closing = threading.Event()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(name, started) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _model_card(_known(name, names), started)

    @app.post("/v1/chat/completions")
    async def complete(request: Request, asked: ChatRequest) -> Any:
        name = _known(asked.model, names)
        chosen = sampling_of(asked, sampling)
        # Refused before a stream begins, when an error can still have a status of its own.
        question = await asyncio.to_thread(question_of_request, asked, model.tokenizer(name), system)
        ids = await asyncio.to_thread(_prompt_tokens, model, question, name, chosen)
        job = _Job(model, question, name, chosen, asyncio.get_running_loop(), closing)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if asked.stream:
            wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return _EventStream(_events(job, head, turn, request, wants_usage), headers={"Cache-Control": "no-cache"})
        async with _our_turn(turn, request, closing):
            async for _ in job.pieces(request):
                pass
        answer = job.answer or Answer("", "cancelled", ids, 0, 0.0)
        return {**head, "object": "chat.completion", **_completion(answer, *job.said(answer))}

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def not_served(rest: str) -> None:
        if rest == "chat/completions" or rest.partition("/")[0] == "models":  # asked in another way than it is answered
            way = "POST" if rest == "chat/completions" else "GET"
            raise APIError(f"/v1/{rest} is asked with {way}", status=405, code="method_not_allowed")
        there = "there are /v1/chat/completions and /v1/models"
        raise APIError(f"/v1/{rest} is not served here; {there}", status=404, code="unknown_url")

    _answer_errors(app)
    return app


def _completion(answer: Answer, said: str | None, calls: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said, "refusal": None, **calls},
        "logprobs": None,
        "finish_reason": _finish_reason(answer, calls),
        **_notes(answer),
    }
    return {"choices": [choice], "usage": _usage(answer)}


def _answer_errors(app: FastAPI) -> None:
    """Every failure becomes a JSON body in the form of OpenAI's API."""

    @app.exception_handler(APIError)
    @app.exception_handler(UserError)
    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _answer(_public(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            message = f"the body is not valid JSON: {first['ctx']['error']}, at character {first['loc'][-1]}"
            return _answer(APIError(message))
        if first["loc"] == ("body",):
            return _answer(APIError("the body must be a JSON object, and the header Content-Type: application/json"))
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        return _answer(APIError(f"{param or 'the request'}: {first['msg']}", param=param))

    @app.exception_handler(HTTPException)
    async def unknown_address(request: Request, error: HTTPException) -> JSONResponse:
        return _answer(APIError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code))


class _Server(uvicorn.Server):
    """Told to stop, it ends the answers that are being computed."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._closing.set()
        super().handle_exit(sig, frame)


class _EventStream(StreamingResponse):
    """Closes what it streams when the client leaves in the middle of a write; else its turn would not end."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


@dataclass
class _Job:
    """One answer, computed in a thread and read in the event loop."""

    model: ChatModel
    question: Question
    name: str
    sampling: Sampling
    loop: asyncio.AbstractEventLoop
    closing: threading.Event
    answer: Answer | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    queue: asyncio.Queue[str | BaseException | None] = field(default_factory=asyncio.Queue)

    async def pieces(self, request: Request) -> AsyncGenerator[str]:
        """The answer's text as it comes; ends it when the client or the reader goes away."""
        worker = asyncio.ensure_future(asyncio.to_thread(self._compute))
        look_at = self.loop.time() + POLL_S
        try:
            while True:
                # By the clock: a fast model's pieces never let the queue be empty for so long.
                if self.loop.time() >= look_at:
                    if await request.is_disconnected():
                        return
                    look_at = self.loop.time() + POLL_S
                try:
                    piece = await asyncio.wait_for(self.queue.get(), POLL_S)
                except TimeoutError:
                    continue
                if piece is None:
                    return
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.stop.set()
            # The next answer's turn comes when this computation is over, even if nobody reads its end.
            await asyncio.shield(worker)

    def said(self, answer: Answer) -> tuple[str | None, dict[str, Any]]:
        """The answer's text, and its calls as fields of the message."""
        if not self.question.tools:
            return answer.text, {}
        text, calls = calls_in(answer.text, self.model.tokenizer(self.name), self.question.tools)
        return (text.strip() or None, {"tool_calls": calls}) if calls else (text, {})

    def _compute(self) -> None:
        def put(item: str | BaseException | None) -> None:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

        try:
            self.answer = self.model.answer(
                self.question,
                adapter=self.name,
                sampling=self.sampling,
                # Where tools may be called, text is told from a call only at its end.
                on_text=None if self.question.tools else put,
                cancelled=lambda: self.stop.is_set() or self.closing.is_set(),
                cut_history=False,
            )
            put(_stopping() if self.closing.is_set() and self.answer.finish == "cancelled" else None)
        except BaseException as error:
            put(error)


async def _events(
    job: _Job, head: dict[str, Any], turn: asyncio.Lock, request: Request, wants_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: the role, each piece of text, how it ended, the usage if wanted, and ``[DONE]``."""

    def event(
        delta: dict[str, Any] | None,
        finish: str | None = None,
        usage: dict[str, Any] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **(notes or {})}
        choices = [] if delta is None else [choice]
        body = {**head, "object": "chat.completion.chunk", "choices": choices}
        if wants_usage:
            body["usage"] = usage
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    try:
        async with _our_turn(turn, request, job.closing), contextlib.aclosing(job.pieces(request)) as pieces:
            yield event({"role": "assistant", "content": ""})
            async for piece in pieces:
                yield event({"content": piece})
    except Exception as error:  # the status line is gone out already
        yield f"data: {json.dumps(_public(error).body(), ensure_ascii=False)}\n\n"
        if not isinstance(error, (UserError, APIError)):
            raise
        return
    if job.answer is None:
        return
    calls: dict[str, Any] = {}
    if job.question.tools:
        said, calls = job.said(job.answer)
        if said:
            yield event({"content": said})
        if calls:
            yield event({"tool_calls": [{"index": index, **call} for index, call in enumerate(calls["tool_calls"])]})
    yield event({}, _finish_reason(job.answer, calls), notes=_notes(job.answer))
    if wants_usage:
        yield event(None, usage=_usage(job.answer))
    yield "data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def _our_turn(turn: asyncio.Lock, request: Request, closing: threading.Event) -> AsyncIterator[None]:
    """Wait until no other answer is computed, but not longer than the client or the server does."""
    while True:
        try:
            await asyncio.wait_for(turn.acquire(), 10 * POLL_S)
            break
        except TimeoutError:
            if await request.is_disconnected():
                raise APIError("the client went away", status=499) from None
    try:
        if closing.is_set():
            raise _stopping()
        yield
    finally:
        turn.release()


def _prompt_tokens(model: ChatModel, question: Question, name: str, sampling: Sampling) -> int:
    """Length of the prompt.

    Raises:
        APIError: it does not fit the model, or the model's chat template refuses it.
    """
    try:
        tokenizer = model.tokenizer(name)
        ids, _, room = model.fitted(question, tokenizer, sampling.max_new_tokens, cut_history=False)
        if question.form is not None:
            model.check_form(question.form, tokenizer, room)
    except ContextError as error:
        raise APIError(str(error), param="messages", code="context_length_exceeded") from None
    except UserError as error:
        raise APIError(str(error), param="response_format" if isinstance(error, FormError) else "messages") from None
    return len(ids)


def _stopping() -> APIError:
    return APIError("the server is being stopped", status=503, kind="server_error")


def _public(error: Exception) -> APIError:
    """What a client may read of an error."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, FormError):
        return APIError(str(error), param="response_format")
    message = "the server failed; see its output"
    if isinstance(error, UserError):
        if re.search(r"[/\\]", str(error)):  # a path is for whoever runs the server
            warn(f"a request failed: {error}")
        else:
            message = str(error)
    return APIError(message, status=500, kind="server_error")


def _known(name: str, names: list[str]) -> str:
    if name not in names:
        message = f"The model '{name}' does not exist; there are: {', '.join(names)}"
        raise APIError(message, status=404, param="model", code="model_not_found")
    return name


def _model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "stocklora"}


def _finish_reason(answer: Answer, calls: dict[str, Any]) -> str:
    if calls:
        return "tool_calls"
    return "length" if answer.finish == "length" else "stop"


def _notes(answer: Answer) -> dict[str, Any]:
    """What OpenAI's API has no field for: an answer that is whole in form alone."""
    return {"closed_at_limit": True} if answer.closed else {}


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
    }


def _answer(error: APIError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status)
