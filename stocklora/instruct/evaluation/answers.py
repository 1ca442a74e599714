"""Answers to the rows that are scored: rows that do not fit are found first, and no finished answer is made twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, progress, say, warn
from stocklora.instruct.chat.batch import appending, recipe
from stocklora.instruct.chat.constrained import AnswerForm, form_of_schema, read_schema
from stocklora.instruct.chat.model import Answer, ChatModel, ContextError, Question, Sampling
from stocklora.instruct.chat.settings import EvaluateSettings
from stocklora.instruct.rows.formats import Record
from stocklora.runtime.files import as_json_types, json_of

# Which of the shipped schemas an answer of a kind fits.
SCHEMA_OF_KIND = {"extraction": "market_reaction", "release_extraction": "release"}
Answered = tuple[Answer, int]  # and the batch that it was made in


def forms_of(records: Sequence[Record]) -> list[AnswerForm | None]:
    """The form of each row's answer, where its kind has a schema."""
    made: dict[str, AnswerForm] = {}
    for name in {SCHEMA_OF_KIND.get(str(record.meta.get("kind"))) for record in records} - {None}:
        made[str(name)] = form_of_schema(read_schema(str(name)))
    return [made.get(str(SCHEMA_OF_KIND.get(str(record.meta.get("kind"))))) for record in records]


def answered(
    model: ChatModel,
    adapter: str,
    records: Sequence[Record],
    settings: EvaluateSettings,
    partial: Path,
    name: str,
    forms: Sequence[AnswerForm | None] | None = None,
) -> list[Answered | None]:
    """Answers to ``records`` in their order, made in batches of like length, so that little is padding.

    Each batch is kept in ``partial`` the moment it is there; a run that was stopped takes them up.

    Args:
        model: that answers.
        adapter: with it on.
        records: to answer.
        settings: how, and how many at once.
        partial: file in which finished answers are kept until the results are written.
        name: of what answers, for messages.
        forms: of the answers; none by default.

    Returns:
        An answer for each record; None for one that does not fit the model's context, which is warned of.
    """
    sampling, tokenizer = Sampling.of(settings), model.tokenizer(adapter)
    forms = forms or [None] * len(records)
    questions = [Question(record.prompt, record.tools, form=form) for record, form in zip(records, forms, strict=True)]
    made_by = {"name": name, "batch_size": settings.batch_size, **recipe(model, adapter, sampling)}
    keys = [_key(question, made_by) for question in questions]
    found: dict[int, Answered] = {}
    kept = _kept(partial)
    for index, key in enumerate(keys):
        if key in kept:
            found[index] = kept[key]
    if found:
        say(f"{len(found)} of {len(records)} answers of {name} were made by a run that was stopped")
    fits = _that_fit(model, questions, tokenizer, sampling, records, name)
    order = sorted(fits, key=lambda index: sum(len(message.content) for message in records[index].prompt))
    with progress() as bar, appending(partial) as write:
        task = bar.add_task(f"answers, {name}", total=len(order))
        for start in range(0, len(order), settings.batch_size):
            part = [index for index in order[start : start + settings.batch_size] if index not in found]
            answers = model.answers([questions[index] for index in part], adapter=adapter, sampling=sampling)
            for index, answer in zip(part, answers, strict=True):
                found[index] = answer, start
                write({"key": keys[index], "batch": start, "answer": asdict(answer)})
            bar.advance(task, len(order[start : start + settings.batch_size]))
    if any(answer.dropped_messages for answer, _ in found.values()):
        warn("some conversations were longer than the model's context; their oldest turns were left out")
    return [found.get(index) for index in range(len(records))]


def _that_fit(
    model: ChatModel,
    questions: Sequence[Question],
    tokenizer: Any,
    sampling: Sampling,
    records: Sequence[Record],
    name: str,
) -> list[int]:
    """Indices of the rows that the model can be asked; all of them are looked at before the first answer."""
    fits, too_long = [], []
    for index, question in enumerate(questions):
        try:
            _, _, room = model.fitted(question, tokenizer, sampling.max_new_tokens)
            if question.form is not None:
                model.check_form(question.form, tokenizer, room)
            fits.append(index)
        except ContextError as error:
            too_long.append((index, error))
        except UserError as error:
            raise UserError(f"{records[index].where}: {error}") from None
    if too_long:
        index, first = too_long[0]
        warn(f"{len(too_long)} row(s) do not fit the model ({name}) and are left out, the first: "
             f"{records[index].where}: {first}")  # fmt: skip
    return fits


def _key(question: Question, made_by: Mapping[str, Any]) -> str:
    content = [
        [[message.role, message.content] for message in question.messages],
        list(question.tools),
        question.form and question.form.grammar,
        dict(made_by),
    ]
    return hashlib.sha256(json.dumps(as_json_types(content), sort_keys=True).encode()).hexdigest()[:24]


def _kept(path: Path) -> dict[str, Answered]:
    """Answers of a run that was stopped, by key; a damaged line is passed over, and its answer made anew."""
    kept: dict[str, Answered] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return kept
    for line in lines:
        try:
            row = json_of(line)
            kept[str(row["key"])] = Answer(**row["answer"]), int(row["batch"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return kept
