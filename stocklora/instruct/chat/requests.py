"""What a request of OpenAI's chat API may say, and what of it this server does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stocklora.instruct.chat.model import Sampling
from stocklora.instruct.chat.text_stream import holds_no_character
from stocklora.instruct.rows.formats import Message

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_STOPS = 4  # as OpenAI has it
# Refused where they ask for something; what only labels a request (user, metadata ...) is passed over.
UNSUPPORTED = (
    "tools", "tool_choice", "functions", "function_call", "logprobs", "top_logprobs", "logit_bias", "audio",
    "frequency_penalty", "presence_penalty", "prediction", "web_search_options",
)  # fmt: skip


class APIError(Exception):
    """A request that is refused, as OpenAI's errors are written."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def body(self) -> dict[str, Any]:
        """The error in JSON types."""
        message = str(self).encode(errors="backslashreplace").decode()  # it may quote half a surrogate pair
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = None


def conversation_of(request: ChatRequest) -> list[Message]:
    """The request's messages.

    Raises:
        APIError: an unknown role, content other than text, or nothing to answer.
    """
    messages = []
    for index, message in enumerate(request.messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise APIError(
                f"messages[{index}].role must be one of {', '.join(ROLES)}, got {role!r}",
                param=f"messages[{index}].role",
            )
        where = f"messages[{index}].content"
        if isinstance(content, list):
            if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
                raise APIError(f"{where} may hold parts of type 'text' alone", param=where)
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise APIError(f"{where} must be text", param=where)
        if "\0" in content or holds_no_character(content):
            raise APIError(f"{where} holds what is no character", param=where)
        messages.append(Message(ROLES[role], content))
    if any(message.role == "system" for message in messages[1:]):
        raise APIError("a system message must be the first, and the only one", param="messages")
    if messages[-1].role != "user":
        raise APIError("the last message must be the user's", param="messages")
    return messages


def sampling_of(request: ChatRequest, default: Sampling) -> Sampling:
    """How the request wants its answer made.

    Raises:
        APIError: something that this server does not do.
    """
    extra = request.model_extra or {}
    for name in UNSUPPORTED:
        if extra.get(name) not in (None, 0, False, [], {}, "none", "auto"):
            raise APIError(f"'{name}' is not supported here; leave it out", param=name, code="unsupported_parameter")
    wanted = extra.get("response_format")
    if wanted is not None and not (isinstance(wanted, dict) and wanted.get("type") == "text"):
        raise APIError(
            "response_format other than text is not supported here",
            param="response_format",
            code="unsupported_parameter",
        )
    if request.n not in (None, 1):
        raise APIError("n must be 1: one answer a request", param="n", code="unsupported_parameter")
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or [])
    if len(stops) > MOST_STOPS or any(not stop for stop in stops):
        raise APIError(f"stop must be at most {MOST_STOPS} texts, none of them empty", param="stop")
    longest = request.max_completion_tokens or request.max_tokens or default.max_new_tokens
    return replace(
        default,
        max_new_tokens=longest,
        temperature=default.temperature if request.temperature is None else request.temperature,
        top_p=default.top_p if request.top_p is None else request.top_p,
        seed=None if request.seed is None else request.seed % 2**63,
        stop=tuple(stops),
    )
