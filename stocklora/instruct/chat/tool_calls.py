"""Functions that an answer may call: how a chat template writes calls, their form, and calls read from an answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stocklora.cli.console import UserError
from stocklora.instruct.chat.constrained import STYLE, AnswerForm, form_of_lark
from stocklora.instruct.rows.chat_template import answer_text
from stocklora.instruct.rows.formats import Message, Tools

PROBE_NAME, PROBE_ARGUMENTS = "probe_function", {"probe_key": "probe_value"}
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "-",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]},
    },
}


@dataclass(frozen=True)
class CallFormat:
    """How a model writes a call: ``before``, a JSON object with the name and the arguments, ``after``."""

    before: str
    after: str
    arguments_key: str


def call_format(tokenizer: Any) -> CallFormat:
    """The way of calls in the chat template, asked of the template itself.

    Raises:
        UserError: it knows no tools, or writes calls otherwise than as one JSON object.
    """
    call = {"id": "callprobe", "name": PROBE_NAME, "arguments": PROBE_ARGUMENTS}
    text = answer_text(tokenizer, [Message("user", "-"), Message("assistant", "", (call,))], [PROBE_TOOL])
    decoder = json.JSONDecoder()
    for place in (place for place, character in enumerate(text) if character == "{"):
        try:
            found, end = decoder.raw_decode(text, place)
        except ValueError:
            continue
        keys = [key for key in found if found[key] == PROBE_ARGUMENTS]
        if found.get("name") == PROBE_NAME and keys:
            return CallFormat(text[:place], text[end:].rstrip(), keys[0])
    raise UserError("the model's chat template writes no calls of functions that are read here: leave out tools")


def form_of_calls(tokenizer: Any, tools: Tools, choice: str | None, *, free: bool) -> AnswerForm | None:
    """The form of an answer that calls one of ``tools``.

    Args:
        tokenizer: whose chat template says how calls are written.
        tools: that there are.
        choice: the only one that may be called; None leaves the choice.
        free: the answer may also be text, and takes the form where it begins a call. None is returned where the
            template gives no sign of such a beginning.

    Raises:
        UserError: no tools in the template, or parameters that are no schema.
    """
    way = call_format(tokenizer)
    functions = [tool["function"] for tool in tools if choice in (None, tool["function"]["name"])]
    calls = [_schema_of_call(function, way) for function in functions]
    schema = {"x-guidance": STYLE, "anyOf": calls}
    trigger = way.before.strip()
    if free and not trigger:
        return None
    before = way.before.lstrip().removeprefix(trigger) if free else way.before.lstrip()
    parts = [json.dumps(before, ensure_ascii=False)] if before else []
    parts += ["call", *([json.dumps(way.after, ensure_ascii=False)] if way.after else [])]
    lark = f"start: {' '.join(parts)}\ncall: %json {json.dumps(schema, ensure_ascii=False)}\n"
    return form_of_lark(lark, "tools", trigger if free else "")


def _schema_of_call(function: Mapping[str, Any], way: CallFormat) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, way.arguments_key: parameters},
        "required": ["name", way.arguments_key],
        "additionalProperties": False,
    }


def calls_in(text: str, tokenizer: Any, tools: Tools) -> tuple[str, list[dict[str, Any]]]:
    """The text before the call that an answer makes, and the call as OpenAI's API writes it; no call is mostly none."""
    way = call_format(tokenizer)
    names = {tool["function"]["name"] for tool in tools}
    said, found, rest = text.partition(way.before.strip()) if way.before.strip() else (text, "", "")
    body = (rest if found else text).lstrip()
    if not body.startswith("{"):
        return text, []
    try:
        call, _ = json.JSONDecoder().raw_decode(body)
    except (ValueError, RecursionError):
        return text, []
    if call.get("name") not in names or not isinstance(call.get(way.arguments_key), Mapping):
        return text, []
    function = {
        "name": call["name"],
        "arguments": json.dumps(call[way.arguments_key], ensure_ascii=False),
    }
    return (said if found else ""), [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}]


def names_of(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(tool["function"]["name"]) for tool in tools]
