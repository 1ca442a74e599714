"""One row: the three forms of a conversation, told apart, checked, and turned into one another.

- alpaca: ``instruction``, ``input``, ``output``; where wanted ``system`` and ``history`` (pairs of question, answer)
- ShareGPT: ``conversations``, a list of ``{"from": "human" | "gpt" | "system", "value": ...}``
- messages: ``messages``, a list of ``{"role": "user" | "assistant" | "system", "content": ...}``

Turns in the words of the one are also read under the name of the other. ``tools``, where a row has them, are functions
that its answers may call, in OpenAI's form; the chat template writes them into the prompt. All other keys of a row are
its ``meta``; they go along when it is written again. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stocklora.runtime.files import json_of

Tools = Sequence[Mapping[str, Any]]  # functions to call, as OpenAI describes them

FORMS = ("alpaca", "sharegpt", "messages")
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
# How a form writes turns: the key of their list, of a turn's role and text, and the roles by their names.
LISTS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "sharegpt": ("conversations", "from", "value", SHAREGPT_ROLES),
    "messages": ("messages", "role", "content", {role: role for role in ROLES}),
}
SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SENTIMENTS = ("利好", "利空", "中性")  # labels of good, bad and neutral news: made in news/, scored in evaluation/
ALPACA_KEYS = ("instruction", "output", "history")  # `input` alone may also be another form's own key


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user``, ``assistant``; in requests also ``tool``, whose content is what a function gave.
        content: the text.
        calls: functions that an assistant's turn calls: ``{"id": ..., "name": ..., "arguments": {...}}`` each.
        call_id: of a ``tool`` turn, the call that it answers.
    """

    role: str
    content: str
    calls: tuple[Mapping[str, Any], ...] = ()
    call_id: str | None = None


def turn_of(message: Message) -> dict[str, Any]:
    """``message`` as chat templates take it; arguments of calls are objects there, not text."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        turn["tool_calls"] = [
            {
                "id": call.get("id"),
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in message.calls
        ]
    return turn if message.call_id is None else {**turn, "tool_call_id": message.call_id}


@dataclass(frozen=True)
class Record:
    """One conversation that ends with the answer to learn.

    Attributes:
        messages: an optional system message, then user and assistant in turn, the last an assistant's.
        meta: every other key of the row (``kind``, ``event_id``, ``date``, ``split``, ``label`` ...). ``input`` there
            is the part of the last question that an alpaca row held apart.
        form: the form that the row had, one of ``FORMS``.
        file, row: where it stands. Rows count from 1; in JSON lines they are the file's lines.
    """

    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    file: Path = Path("-")
    row: int = 0
    form: str = field(default="messages", compare=False)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All but the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text that the loss is taken on."""
        return self.messages[-1].content

    @property
    def tools(self) -> Tools:
        """Functions that the answer may call; mostly none."""
        return self.meta.get("tools") or ()

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, and where: file, row (from 1; 0 is the whole file) and field."""

    file: Path
    row: int
    field: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}, row {self.row}" if self.row else str(self.file)
        return f"{place}, {self.field}: {self.message}" if self.field else f"{place}: {self.message}"


def parse_row(content: Any, file: Path = Path("-"), row: int = 0) -> tuple[Record | None, list[Fault]]:
    """A row as a ``Record``, or None and its faults."""
    try:
        form = _form_of(content)
        messages, meta = _from_alpaca(content) if form == "alpaca" else _from_list(content, form)
        _check_conversation(messages, form)
        if meta.get("tools") not in (None, "", []):
            meta["tools"] = tools_of(meta["tools"])
        if meta.get("input") in (None, ""):
            meta.pop("input", None)
        elif not isinstance(meta["input"], str) or not messages[-2].content.endswith("\n" + meta["input"]):
            raise _BadFieldError("input", "is not the end of the last question; rename the key, or use alpaca's fields")
    except _BadFieldError as error:
        return None, [Fault(file, row, *error.args)]
    return Record(tuple(messages), meta, file, row, form), []


def _form_of(content: Any) -> str:
    """Which of ``FORMS`` a row has."""
    if not isinstance(content, Mapping):
        raise _BadFieldError("", f"a row must be a JSON object, not {_kind(content)}")
    lists = [name for name in ("messages", "conversations") if name in content]
    alpaca = [name for name in ALPACA_KEYS if name in content]
    if len(lists) + bool(alpaca) > 1:
        raise _BadFieldError(lists[0], f"the row also has '{(lists[1:] + alpaca)[0]}': one form a row")
    if lists:
        return "messages" if lists[0] == "messages" else "sharegpt"
    if "instruction" in content or "output" in content:
        return "alpaca"
    keys = ", ".join(map(str, list(content)[:6])) or "none"
    raise _BadFieldError("", f"neither alpaca (instruction, output) nor ShareGPT nor messages; keys: {keys}")


class _BadFieldError(Exception):
    """Field and message of a fault."""


def _from_alpaca(content: Mapping[str, Any]) -> tuple[list[Message], dict[str, Any]]:
    instruction, extra = _text(content, "instruction"), content.get("input")
    extra = "" if extra is None or not str(extra).strip() else _checked(extra, "input")
    messages = _system_of(content)
    history = content.get("history") or []
    if not isinstance(history, list):
        raise _BadFieldError("history", f"must be a list of [question, answer] pairs, not {_kind(history)}")
    for index, pair in enumerate(history):
        name = f"history[{index}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _BadFieldError(name, "must be a pair [question, answer]")
        messages += [Message("user", _checked(pair[0], name)), Message("assistant", _checked(pair[1], name))]
    messages += [Message("user", joined(instruction, extra)), Message("assistant", _text(content, "output"))]
    meta = _rest(content, "instruction", "output", "history", "system")
    if not extra:
        meta.pop("input", None)
    return messages, meta


def tools_of(given: Any) -> list[dict[str, Any]]:
    """A row's ``tools``: a list of functions in OpenAI's form, or the same as JSON text."""
    if isinstance(given, str):
        try:
            given = json_of(given)
        except ValueError:
            raise _BadFieldError("tools", "is text, but not JSON") from None
    if not isinstance(given, list) or not all(isinstance(tool, Mapping) for tool in given):
        raise _BadFieldError("tools", "must be a list of functions, each an object")
    tools = [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in given]
    for index, tool in enumerate(tools):
        function = tool["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise _BadFieldError(f"tools[{index}]", "must have a function with a name")
    return tools


def _turn_keys(turns: Sequence[Any], form: str) -> tuple[str, str, dict[str, str]]:
    """Role key, text key and roles of the turns: those of ``form``, or of the other form where all turns have them."""
    for _, role_key, text_key, roles in LISTS.values():
        if all(isinstance(turn, Mapping) and {role_key, text_key} <= turn.keys() for turn in turns):
            # Words for roles are not mixed up by the wrong list's name: nobody means two things by "human".
            return role_key, text_key, SHAREGPT_ROLES if role_key == "role" and form == "sharegpt" else roles
    return LISTS[form][1:]


def _from_list(content: Mapping[str, Any], form: str) -> tuple[list[Message], dict[str, Any]]:
    name = LISTS[form][0]
    turns = content[name]
    if not isinstance(turns, list) or not turns:
        raise _BadFieldError(name, f"must be a list of turns, not {_kind(turns)}")
    role_key, text_key, roles = _turn_keys(turns, form)
    messages = _system_of(content)
    for index, turn in enumerate(turns):
        place = f"{name}[{index}]"
        if not isinstance(turn, Mapping):
            raise _BadFieldError(place, f"must be an object with '{role_key}' and '{text_key}', not {_kind(turn)}")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise _BadFieldError(f"{place}.{role_key}", f"must be one of {', '.join(roles)}; got {role!r}")
        # A turn with more than words (tool calls, weights) would lose them unseen.
        for key, value in turn.items():
            if key not in (role_key, text_key) and value not in (None, [], ""):
                raise _BadFieldError(f"{place}.{key}", "is not supported; a turn is its role and its text")
        text = turn.get(text_key)
        if isinstance(text, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in text):
            text = "".join(str(part.get("text", "")) for part in text)  # OpenAI's list of text parts
        messages.append(Message(roles[role], _checked(text, f"{place}.{text_key}")))
    return messages, _rest(content, name, "system")


def _check_conversation(messages: Sequence[Message], form: str) -> None:
    """System first if at all, then user and assistant in turn, an assistant last."""
    name = "history" if form == "alpaca" else LISTS[form][0]
    turns = messages[1:] if messages[0].role == "system" else messages
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise _BadFieldError(
                name, f"turn {index + 1} is by {message.role}; user and assistant take turns, user first"
            )
    if not turns or turns[-1].role != "assistant":
        raise _BadFieldError(name, "must end with an answer by the assistant")


def _system_of(content: Mapping[str, Any]) -> list[Message]:
    text = content.get("system")
    return [] if text in (None, "") else [Message("system", _checked(text, "system"))]


def _text(content: Mapping[str, Any], name: str) -> str:
    if name not in content:
        raise _BadFieldError(name, "is missing")
    return _checked(content[name], name)


def _checked(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise _BadFieldError(name, f"must be text, not {_kind(text)}")
    if not text.strip():
        raise _BadFieldError(name, "is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _BadFieldError(name, "holds half of a surrogate pair, which is no character; save the file anew as UTF-8")
    return text


def _rest(content: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {str(key): value for key, value in content.items() if key not in used}


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "an empty list" if value == [] else names.get(type(value), "a number")


def joined(instruction: str, extra: str) -> str:
    """The question of an alpaca row."""
    return f"{instruction}\n{extra}" if extra else instruction


def row_of(record: Record, form: str) -> dict[str, Any]:
    """``record`` as a row of ``form``."""
    meta = dict(record.meta)
    if form == "messages":
        return {"messages": [{"role": m.role, "content": m.content} for m in record.messages], **meta}
    if form == "sharegpt":
        turns = [{"from": SHAREGPT_NAMES[m.role], "value": m.content} for m in record.messages]
        return {"conversations": turns, **meta}
    messages = list(record.messages)
    system = messages.pop(0).content if messages[0].role == "system" else None
    question, extra = messages[-2].content, meta.pop("input", "")
    if extra:
        question = question.removesuffix("\n" + extra)
    row: dict[str, Any] = {"instruction": question, "input": extra, "output": record.answer}
    if system is not None:
        row["system"] = system
    if len(messages) > 2:
        row["history"] = [[messages[i].content, messages[i + 1].content] for i in range(0, len(messages) - 2, 2)]
    return {**row, **meta}
