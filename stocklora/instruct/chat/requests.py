"""What a request of OpenAI's chat API may say, and what of it this server does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stocklora.cli.console import UserError
from stocklora.instruct.chat.constrained import AnswerForm, form_of_schema
from stocklora.instruct.chat.model import Question, Sampling
from stocklora.instruct.chat.text_stream import holds_no_character
from stocklora.instruct.chat.tool_calls import form_of_calls, names_of
from stocklora.instruct.rows.formats import Message, Tools
from stocklora.runtime.files import json_of

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MOST_STOPS = 4  # as OpenAI has it
# Beside these and the fields of ``ChatRequest`` a request may have what only labels it ...
LABELS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",  # an answer makes one call at a time, which either value allows
)  # fmt: skip
# ... and what asks for nothing, as it stands here. Anything else is refused by name: ignored, it would seem served.
NOTHING: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "frequency_penalty": (0,),
    "presence_penalty": (0,), "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],),
    "echo": (False,), "min_p": (0,), "ignore_eos": (False,), "best_of": (1,), "min_tokens": (0,),
}  # fmt: skip
# Of a message: what is read of it, and what an earlier answer brings back that is no part of a prompt.
OF_MESSAGES = ("role", "content", "tool_calls", "tool_call_id")
BROUGHT_BACK = ("name", "refusal", "annotations", "parsed", "reasoning", "reasoning_content")
OF_THE_TEMPLATE = {"messages", "tools", "documents", "add_generation_prompt", "tokenize", "continue_final_message"}


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
    """``stream_options``; what else stands in it is looked at with the other fields."""

    model_config = ConfigDict(extra="allow")

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
    top_k: int | None = Field(None, ge=-1)
    repetition_penalty: float | None = Field(None, gt=0.0)
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def question_of_request(request: ChatRequest, tokenizer: Any, system: str | None = None) -> Question:
    """What the request asks.

    Args:
        request: its body.
        tokenizer: of the model that is asked.
        system: put before a conversation that has no system message.

    Raises:
        APIError: an unknown role, content other than text, nothing to answer, or a form that cannot be held.
    """
    _check_fields(request)
    messages = conversation_of(request)
    if system and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    template = _template_of(request, tokenizer)
    try:
        form = _form_of(request)
        tools = [] if request.tool_choice == "none" else _tools_of(request)
        if form is not None and request.stop:
            raise APIError("stop could end the JSON that the answer must be before it is whole; leave it out",
                           param="stop")  # fmt: skip
        if tools and form is not None:
            raise APIError("tools and response_format exclude each other here; give one", param="response_format")
        if tools:
            form = _form_of_choice(request, tokenizer, tools)
    except UserError as error:
        raise APIError(str(error), param="tools" if request.tools else "response_format") from None
    return Question(messages, tools, template, form)


def _check_fields(request: ChatRequest) -> None:
    """Refuse what this server does not do, by name."""
    for name, value in (request.model_extra or {}).items():
        if value is None or name in LABELS or value in NOTHING.get(name, ()):
            continue
        raise APIError(f"'{name}' is not supported here; leave it out", param=name, code="unsupported_parameter")
    if request.stream_options is not None:
        if not request.stream:
            raise APIError("stream_options are for stream: true; leave them out", param="stream_options")
        # Without that padding, streams are as this server makes them.
        for name, value in (request.stream_options.model_extra or {}).items():
            if value not in (None, False):
                where = f"stream_options.{name}"
                raise APIError(f"'{where}' is not supported here; leave it out", param=where,
                               code="unsupported_parameter")  # fmt: skip
    if request.n not in (None, 1):
        raise APIError("n must be 1: one answer a request", param="n", code="unsupported_parameter")


def _template_of(request: ChatRequest, tokenizer: Any) -> dict[str, Any]:
    """``chat_template_kwargs``; a name that the template never reads would be ignored by it."""
    given = request.chat_template_kwargs or {}
    for name in given:
        if name in OF_THE_TEMPLATE or not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            where = f"chat_template_kwargs.{name}"
            raise APIError(f"{where}: the model's chat template has no such setting", param=where)
    return dict(given)


def _form_of(request: ChatRequest) -> AnswerForm | None:
    """The form that ``response_format`` or vLLM's ``guided_json`` asks for."""
    if request.guided_json is not None:
        if request.response_format is not None:
            raise APIError("response_format and guided_json exclude each other; give one", param="guided_json")
        schema: Any = request.guided_json
        try:
            schema = json_of(schema) if isinstance(schema, str) else schema
        except ValueError:
            schema = ""
        if not isinstance(schema, dict):
            raise APIError("guided_json must be a JSON schema, which is an object", param="guided_json")
        return form_of_schema(schema, "guided_json")
    wanted = request.response_format or {"type": "text"}
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = wanted.get("schema")  # as llama.cpp and Together write it
        if schema is not None and not isinstance(schema, dict):
            raise APIError("response_format.schema must be a JSON schema, which is an object", param="response_format")
        return form_of_schema(schema or {"type": "object"}, "response_format.schema")
    described = wanted.get("json_schema")
    if kind == "json_schema" and isinstance(described, dict) and isinstance(described.get("schema"), dict):
        return form_of_schema(described["schema"], "response_format.json_schema.schema")
    raise APIError(
        "response_format must be of type text, json_object, or json_schema with json_schema.schema",
        param="response_format",
    )


def _tools_of(request: ChatRequest) -> list[dict[str, Any]]:
    """``tools``, checked: functions with a name each."""
    if not request.tools and request.tool_choice not in (None, "none", "auto"):
        raise APIError("tool_choice is for tools, and there are none; leave it out", param="tool_choice")
    for index, tool in enumerate(request.tools or []):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict) or not function.get("name"):
            where = f"tools[{index}]"
            raise APIError(f"{where} must be of type function, with a function that has a name", param=where)
    return request.tools or []


def _form_of_choice(request: ChatRequest, tokenizer: Any, tools: Tools) -> AnswerForm | None:
    """The form that ``tool_choice`` gives an answer."""
    choice = request.tool_choice
    if choice in (None, "auto", "required"):
        return form_of_calls(tokenizer, tools, None, free=choice != "required")
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    if name not in names_of(tools):
        raise APIError(
            f"tool_choice must be none, auto, required, or name one of tools: {', '.join(names_of(tools))}",
            param="tool_choice",
        )
    return form_of_calls(tokenizer, tools, str(name), free=False)


def conversation_of(request: ChatRequest) -> list[Message]:
    """The request's messages; leading system messages are one.

    Raises:
        APIError: an unknown role, content other than text, or nothing to answer.
    """
    messages: list[Message] = []
    for index, given in enumerate(request.messages):
        message = _message(given, f"messages[{index}]")
        if message.role == "system" and messages and all(one.role == "system" for one in messages):
            messages[0] = Message("system", f"{messages[0].content}\n\n{message.content}")
        else:
            messages.append(message)
    if any(message.role == "system" for message in messages[1:]):
        raise APIError("system messages must come before all others", param="messages")
    if messages[-1].role not in ("user", "tool"):
        raise APIError("the last message must be the user's, or a tool's", param="messages")
    return messages


def _message(given: dict[str, Any], where: str) -> Message:
    """One message of the request, which stands at ``where``."""
    role, content, calls = given.get("role"), given.get("content"), given.get("tool_calls") or []
    if not isinstance(role, str) or role not in ROLES:
        raise APIError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", param=f"{where}.role")
    for name, value in given.items():
        if name not in (*OF_MESSAGES, *BROUGHT_BACK) and value not in (None, [], {}, False):
            field = f"{where}.{name}"
            raise APIError(f"'{field}' is not supported here; leave it out", param=field, code="unsupported_parameter")
    place = f"{where}.content"
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise APIError(f"{place} may hold parts of type 'text' alone", param=place)
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise APIError(f"{place} must be text", param=place)
    if "\0" in content or holds_no_character(content):
        raise APIError(f"{place} holds what is no character", param=place)
    if role != "assistant" and calls:
        raise APIError(f"{where}.tool_calls: only the assistant calls tools", param=f"{where}.tool_calls")
    made = tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls))
    return Message(ROLES[role], content, made, str(given.get("tool_call_id", "")) if role == "tool" else None)


def _call(given: Any, where: str) -> dict[str, Any]:
    """A call that an earlier answer made."""
    try:
        arguments = json_of(given["function"]["arguments"] or "{}")
        if not isinstance(arguments, dict):
            raise ValueError
        return {"id": given.get("id"), "name": str(given["function"]["name"]), "arguments": arguments}
    except (ValueError, KeyError, TypeError, AttributeError):
        message = f"{where} must have a function with a name, and arguments that are a JSON object"
        raise APIError(message, param=where) from None


def sampling_of(request: ChatRequest, default: Sampling) -> Sampling:
    """How the request wants its answer made.

    Raises:
        APIError: stop texts that are none, or too many.
    """
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or [])
    if len(stops) > MOST_STOPS or any(not stop for stop in stops):
        raise APIError(f"stop must be at most {MOST_STOPS} texts, none of them empty", param="stop")
    longest = request.max_completion_tokens or request.max_tokens or default.max_new_tokens
    given: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(0, request.top_k),
        "repetition_penalty": request.repetition_penalty,
    }
    return replace(
        default,
        max_new_tokens=longest,
        seed=None if request.seed is None else request.seed % 2**63,
        stop=tuple(stops),
        **{name: value for name, value in given.items() if value is not None},
    )
