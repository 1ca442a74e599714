"""Prompts from a file, answers to a file: JSON lines that a second run continues where the first one ended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, progress, say, warn
from stocklora.instruct.chat.constrained import form_of_schema
from stocklora.instruct.chat.model import Answer, ChatModel, Question, Sampling
from stocklora.instruct.chat.settings import InferenceSettings
from stocklora.instruct.chat.sources import ADAPTER_WEIGHTS, TRAINING_INFO, first_file
from stocklora.instruct.chat.text_stream import holds_no_character, without_reasoning
from stocklora.instruct.rows.formats import Message, Tools, parse_row
from stocklora.runtime.files import as_json_types, json_of, read_chinese_text, sha256_of, write_errors

PLACEHOLDER = "-"  # stands for the answer that a prompt does not have yet


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        key: the row's own ``id`` or ``key``; else a hash of the conversation, with a count where it occurs again.
        meta: the row's other keys, which go along into the output. expected: the row's own answer, if it has one.
        row: where it stands in the file, from 1.
    """

    key: str
    messages: tuple[Message, ...]
    meta: Mapping[str, Any]
    expected: str | None = None
    row: int = 0

    @property
    def tools(self) -> Tools:
        """Functions that the answer may call."""
        return self.meta.get("tools") or ()


def read_prompts(path: Path, system: str | None = None) -> list[Prompt]:
    """The prompts in a file: records of any form, with or without an answer, ``{"prompt": ...}``, or lines of text.

    Args:
        system: put before every conversation that has no system message.

    Raises:
        UserError: a missing or unreadable file, a row that is no prompt, a key that stands twice.
    """
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    own: set[str] = set()
    for row, content in _rows(path):
        messages, meta, expected = _conversation(content, path, row)
        if system and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        given = meta.get("id", meta.get("key"))
        if given is not None:
            key = str(given)
            if key in own:
                raise UserError(f"{path}, row {row}: the key '{key}' stands there twice; keys tell rows apart")
            own.add(key)
        else:
            text = json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False)
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            seen[digest] = seen.get(digest, 0) + 1
            key = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        prompts.append(Prompt(key, messages, meta, expected, row))
    if not prompts:
        raise UserError(f"{path} has no prompts; write one a line")
    return prompts


def run_batch(
    model: ChatModel,
    settings: InferenceSettings,
    adapter: str | None,
    sampling: Sampling,
    schema: Mapping[str, Any] | None = None,
) -> None:
    """Answer what of ``--batch`` has no answer in ``--output`` yet; with ``schema`` in JSON that fits it.

    Each answer is written the moment it is there, in one piece, so that a run can be killed and started again.

    Raises:
        UserError: unreadable input, a prompt that does not fit the model, or an output that another model, other
            settings or other prompts made.
    """
    source = settings.batch
    assert source is not None
    output = settings.output or source.with_name(f"{source.stem}.answers.jsonl")
    if output.exists() and output.resolve() == source.resolve():
        raise UserError(f"--output {output} is the file of prompts; give another name")
    prompts = read_prompts(source, settings.system)
    made_by = recipe(model, adapter, sampling, schema)
    form = None if schema is None else form_of_schema(schema, "--json_schema")
    questions = {prompt.key: Question(prompt.messages, prompt.tools, form=form) for prompt in prompts}
    done = answered(output, made_by)
    for prompt in prompts:
        if done.get(prompt.key, prompt.messages) != prompt.messages:
            raise UserError(
                f"{output} answers another prompt under the key '{prompt.key}' than {source}, row {prompt.row}, asks; "
                f"give another --output, or remove it"
            )
    todo = [prompt for prompt in prompts if prompt.key not in done]
    for prompt in todo:  # all of them before the first answer: the last one's fault would cost hours
        try:
            tokenizer, question = model.tokenizer(adapter), questions[prompt.key]
            _, _, room = model.fitted(question, tokenizer, sampling.max_new_tokens)
            if question.form is not None:
                model.check_form(question.form, tokenizer, room)
        except UserError as error:
            raise UserError(f"{source}, row {prompt.row}: {error}") from None
    if len(todo) < len(prompts):
        say(f"{len(prompts) - len(todo)} of {len(prompts)} prompts are answered in {output} already")
    cut = closed = 0
    with progress() as bar, appending(output) as write:
        task = bar.add_task("answers", total=len(todo))
        for start in range(0, len(todo), settings.batch_size):
            part = todo[start : start + settings.batch_size]
            answers = model.answers([questions[prompt.key] for prompt in part], adapter=adapter, sampling=sampling)
            for prompt, answer in zip(part, answers, strict=True):
                write(answer_row(prompt, answer, made_by))
                cut += answer.finish == "length"
                closed += answer.closed
            bar.advance(task, len(part))
    if cut:
        warn(f"{cut} of {len(todo)} answers were cut at --max_new_tokens {sampling.max_new_tokens}")
    if closed:
        warn(
            f"{closed} of {len(todo)} answers were closed, in their form, at --max_new_tokens {sampling.max_new_tokens}"
        )
    say(f"{len(todo)} answers -> {output}")


def recipe(
    model: ChatModel, adapter: str | None, sampling: Sampling, schema: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What made an answer, so that answers of two models do not end up in one file."""
    # What files of earlier versions do not name is named where it is used.
    more: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k else {}
    if schema is not None:
        more["json_schema"] = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "base": model.base_name,
        "adapter": model.adapter_or_base(adapter),
        "weights": _trained_weights(model, adapter),
        "quantization": model.quantization,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed if sampling.temperature > 0.0 else None,  # greedy answers do not depend on it
        **more,
    }


def _trained_weights(model: ChatModel, adapter: str | None) -> str | None:
    """Tells one training from the next into the same folder: a digest of the adapter, or of a whole model's record."""
    folder = model.folders.get(model.adapter_or_base(adapter))
    path = first_file(folder, *ADAPTER_WEIGHTS, TRAINING_INFO) if folder else None
    return sha256_of(path)[:16] if path else None


def answer_row(prompt: Prompt, answer: Answer, made_by: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"key": prompt.key, "prompt": prompt.messages[-1].content}
    if len(prompt.messages) > 1:
        row["messages"] = [{"role": m.role, "content": m.content} for m in prompt.messages]
    row |= {
        "answer": without_reasoning(answer.text),
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "seconds": round(answer.seconds, 3),
    }
    if answer.closed:
        row["closed_at_limit"] = True
    if answer.dropped_messages:
        row["dropped_messages"] = answer.dropped_messages
    if prompt.expected is not None:
        row["expected"] = prompt.expected
    return {**{name: value for name, value in prompt.meta.items() if name not in row}, **row, "made_by": dict(made_by)}


def answered(output: Path, made_by: Mapping[str, Any]) -> dict[str, tuple[Message, ...]]:
    """Keys of the answers in ``output``, and what was asked; a last line that a killed run left half is removed.

    Raises:
        UserError: a damaged line before the last, or answers that were made otherwise.
    """
    if not output.exists():
        return {}
    try:
        data = output.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with output.open("rb+") as stream:
                stream.truncate(end)
            warn(f"the last line of {output} was half written and is made anew")
        lines = data[:end].decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {output}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{output} is not UTF-8 text; give another --output") from None
    asked: dict[str, tuple[Message, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json_of(line)
            key, other = str(row["key"]), dict(row["made_by"])
            turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            asked[key] = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{output}, line {number} is no answer of --batch; give another --output") from None
        if other != as_json_types(made_by):
            names = ", ".join(name for name in made_by if other.get(name) != as_json_types(made_by)[name])
            raise UserError(
                f"{output} holds answers that were made otherwise ({names}); give another --output, or remove it"
            )
    return asked


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A file to which whole JSON lines are added; ``with appending(path) as write: write(row)``."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab", buffering=0)  # one write a line

    def write(row: Mapping[str, Any]) -> None:
        text = json.dumps(as_json_types(row), ensure_ascii=False, allow_nan=False)
        line = text.encode(errors="backslashreplace") + b"\n"  # half a surrogate pair stays the escape that it was
        with write_errors(path):
            stream.write(line)
            os.fsync(stream.fileno())

    with stream:
        yield write


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row, content) of every row; content is text or a mapping."""
    text = read_chinese_text(path, f"no file {path} with prompts; write one a line, or JSON lines with a prompt each")
    suffix = path.suffix.lower()
    if suffix == ".json":
        try:
            rows = json_of(text)
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        rows = [rows] if isinstance(rows, dict) else rows
        if not isinstance(rows, list):
            raise UserError(f"{path} must hold a list of rows")
        yield from enumerate(rows, start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: it cuts at U+2028 too
        if not line.strip():
            continue
        if suffix != ".jsonl":
            yield number, line.strip()
            continue
        try:
            yield number, json_of(line)
        except ValueError as error:
            raise UserError(f"{path}, row {number}: not valid JSON: {error}") from None


def _conversation(content: Any, path: Path, row: int) -> tuple[tuple[Message, ...], dict[str, Any], str | None]:
    """Messages, other keys and the row's own answer, if any."""
    if isinstance(content, str):
        content = {"prompt": content}
    if isinstance(content, Mapping) and "prompt" in content and "messages" not in content:
        text = content["prompt"]
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}, row {row}, prompt: must be text, and not empty")
        if holds_no_character(text):
            raise UserError(f"{path}, row {row}, prompt: holds half of a surrogate pair, which is no character")
        return (Message("user", text),), {name: item for name, item in content.items() if name != "prompt"}, None
    completed, is_open = _completed(content)
    record, faults = parse_row(completed, path, row)
    if record is None:
        raise UserError(f'{faults[0]}; a prompt is a record of any form, {{"prompt": ...}}, or a line of text')
    return record.prompt, dict(record.meta), None if is_open else record.answer


def _completed(content: Any) -> tuple[Any, bool]:
    """A row with a placeholder where its answer is missing, and whether it was."""
    if not isinstance(content, Mapping):
        return content, False
    for name, turn in (
        ("messages", {"role": "assistant", "content": PLACEHOLDER}),
        ("conversations", {"from": "gpt", "value": PLACEHOLDER}),
    ):
        turns = content.get(name)
        if isinstance(turns, Sequence) and not isinstance(turns, str) and turns and isinstance(turns[-1], Mapping):
            last = turns[-1].get("role", turns[-1].get("from"))
            if last in ("user", "human"):
                return {**content, name: [*turns, turn]}, True
            return content, False
    if "instruction" in content and content.get("output") in (None, ""):
        return {**content, "output": PLACEHOLDER}, True
    return content, False
