"""From a conversation to token ids and labels, by the model's own chat template.

The loss is taken on answers and the tokens that end them, nothing else. What precedes an answer is exactly what the
model is asked with later: the template's rendering of the conversation so far with its invitation to answer. That it
is a beginning of the whole conversation's rendering is checked for every row, so that no template need mark its
answers (``{% generation %}``).

What people write is text: a control token in it (``<|im_end|>``) is encoded as the characters that it is spelled with,
so that no row and no question can end a turn or forge one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, one_line
from stocklora.instruct.rows.formats import Message, Record, Tools, turn_of
from stocklora.instruct.rows.template_process import render_template
from stocklora.runtime.files import json_of

IGNORED = -100  # a label that the loss passes over
ADDED_PAD = "<|pad|>"
# Tokens that makers set aside for padding or left unused, the likeliest first.
SPARE_TOKENS = (
    "<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", ADDED_PAD, "<|PAD|>", "<|fim_pad|>",
    "<|vision_pad|>", "<|reserved_special_token_0|>", "<unused0>", "<unk>", "[UNK]",
)  # fmt: skip
PROBE = "0123456789"
CUT = "\ufdd0"  # marks where text is cut before it becomes tokens; Unicode keeps this code free of any character
# Where a model's maker names the tokens that end an answer; the first of these files that names some holds.
END_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        input_ids: prompt, answer and end token, cut to ``max_length``.
        labels: as long; the token itself where it is supervised, else ``IGNORED``.
        lost_tokens: tokens that ``max_length`` cut off.
        last_answer: place of the last answer's first token.
    """

    input_ids: list[int]
    labels: list[int]
    lost_tokens: int
    last_answer: int

    @property
    def supervised(self) -> int:
        """Tokens that the loss is taken on. The first token of a sequence is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, max_length: int | None) -> Encoded:
        """Its first ``max_length`` tokens; None keeps all."""
        whole = len(self.input_ids)
        kept = whole if max_length is None else min(whole, max_length)
        return Encoded(self.input_ids[:kept], self.labels[:kept], self.lost_tokens + whole - kept, self.last_answer)

    def without_history(self) -> Encoded:
        """The same tokens, of which the last answer alone is supervised."""
        history = min(self.last_answer, len(self.labels))
        return replace(self, labels=[IGNORED] * history + self.labels[history:])


def prepare_tokenizer(
    folder: Path | str, trust_remote_code: bool = False, model_folder: Path | str | None = None
) -> Any:
    """The tokenizer in ``folder``, with a chat template and a padding token that ends nothing.

    It knows the end tokens that the model's own files name (``generation_config.json``): GLM-4 and Phi-3 name their
    turn's end nowhere else. See ``end_token_ids``.

    Where padding and end are one token, a collator or a reader that masks padding masks the end as well, and the model
    never learns to stop. Any other token will do, since padding is neither attended to nor supervised: one that the
    model has and does not use is taken, or one is added (see ``fit_embeddings``).

    Args:
        folder: of the tokenizer, an adapter's or a model's.
        trust_remote_code: run the folder's own Python code.
        model_folder: of the model that the tokenizer is for (default: the same folder).

    Raises:
        UserError: no tokenizer there, or one without a chat template.
    """
    from stocklora.base_models.loading import load_tokenizer

    if not Path(folder).is_dir():
        raise UserError(f"no model folder {folder}; fetch one with download_model.py, or give --model_path FOLDER")
    tokenizer = load_tokenizer(Path(folder), trust_remote_code)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {folder} has no chat template: that is a base model; take its instruct or chat version, "
            f"such as Qwen2.5-0.5B-Instruct"
        )
    tokenizer.model_end_ids = _ends_of_model(Path(model_folder or folder)) & set(range(len(tokenizer)))
    ends = end_token_ids(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        # Not `tokenizer.pad_token = ...`, which gives a new token no id.
        tokenizer.add_special_tokens({"pad_token": _token_to_pad_with(tokenizer, ends)})
    tokenizer.padding_side = "right"
    return tokenizer


def _ends_of_model(folder: Path) -> set[int]:
    """Ids of the end tokens that the files of a model name; none where no file names one."""
    for name in END_FILES:
        try:
            content = json_of((folder / name).read_text(encoding="utf-8"))
            given = content.get("eos_token_id", content.get("text_config", {}).get("eos_token_id"))
        except (OSError, ValueError, AttributeError):  # not there; a damaged one is told where the model is loaded
            continue
        ids = given if isinstance(given, list) else [given]
        if found := {token for token in ids if isinstance(token, int) and token >= 0}:
            return found
    return set()


def _token_to_pad_with(tokenizer: Any, ends: set[int]) -> str:
    """A spare token, if possible one that conversations do not hold; else one to add."""
    vocabulary, written = tokenizer.get_vocab(), _probe(tokenizer)
    spare = [
        name
        for name in SPARE_TOKENS
        # An ordinary token made special would vanish from decoded text.
        if vocabulary.get(name) in tokenizer.added_tokens_decoder and vocabulary[name] not in ends
    ]
    unused = [name for name in spare if name != tokenizer.bos_token and name not in written]
    return next(iter(unused or spare), ADDED_PAD)


def fit_embeddings(model: Any, tokenizer: Any) -> int:
    """Give ``model`` embedding rows for all of the tokenizer's tokens; how many rows that added, mostly 0.

    Before an adapter is put on or loaded. Models often have more rows than tokens, and then nothing changes.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    missing = len(tokenizer) - rows
    if missing > 0:
        model.resize_token_embeddings(len(tokenizer))
    return max(0, missing)


def end_token_id(tokenizer: Any) -> int:
    """The token with which an answer ends, in training and in use.

    The first special token that the chat template writes behind an answer; where it writes none, the one with which
    the next turn begins, if the model's files call that an end (GLM-4's ``<|user|>``); else the tokenizer's own.

    Raises:
        UserError: there is none.
    """
    ids = _ids(tokenizer, _probe(tokenizer).rpartition(PROBE)[2])
    found = _first_special(tokenizer, ids)
    if found is not None:
        return ids[found]
    ends: set[int] = getattr(tokenizer, "model_end_ids", set())
    if ends - {tokenizer.eos_token_id}:
        turns = [Message("user", PROBE), Message("assistant", PROBE), Message("user", PROBE)]
        after = _ids(tokenizer, _render(tokenizer, turns, False).split(PROBE)[2])
        if after and after[0] in ends:
            return after[0]
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    if ends:
        return min(ends)
    raise UserError("the tokenizer has no end token, and its chat template ends answers with none: use another model")


def end_token_ids(tokenizer: Any) -> set[int]:
    """Every token at which generation stops, wherever it is asked: chat, batch, server, evaluation, merged model.

    The union of what the chat template, the tokenizer and the model's ``generation_config.json`` call an end.
    """
    named: set[int] = getattr(tokenizer, "model_end_ids", set())
    return ({end_token_id(tokenizer), tokenizer.eos_token_id} | named) - {None}


def control_tokens(tokenizer: Any) -> list[str]:
    """What the tokenizer would read as a token with a meaning of its own, the longest first."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = tokenizer.convert_ids_to_tokens(sorted(getattr(tokenizer, "model_end_ids", ())))
    names = {*special, *tokenizer.all_special_tokens, *ends}
    return sorted((name for name in names if len(name) > 1), key=lambda name: (-len(name), name))


def prompt_ids(tokenizer: Any, messages: Sequence[Message], *, tools: Tools = (), **options: Any) -> list[int]:
    """Token ids that ask for an answer to ``messages``: exactly what stands before the supervised tokens in training.

    Args:
        tokenizer: of ``prepare_tokenizer``.
        messages: the conversation so far.
        tools: functions that the answer may call.
        options: what else the template is told. ``enable_thinking=False`` asks one that can (Qwen3's) for an answer
            without a chain of thought; a tuned model was trained on either form.

    Raises:
        UserError: the chat template refuses the conversation, or knows no tools.
    """
    return _ids(tokenizer, _render(tokenizer, messages, True, tools=tools, **options))


def answer_text(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> str:
    """What the chat template writes for the last message, an answer, up to the token that ends it.

    Raises:
        UserError: it refuses the conversation, or knows no tools.
    """
    prompt = _render(tokenizer, messages[:-1], True, tools=tools)
    answer = _render(tokenizer, messages, False, tools=tools).removeprefix(prompt)
    for end in tokenizer.convert_ids_to_tokens(sorted(end_token_ids(tokenizer))):
        answer = answer.partition(end)[0]
    return answer.replace(CUT, "")


def encode_answers(tokenizer: Any, record: Record, max_length: int | None) -> list[Encoded]:
    """Sequences in which every answer of a conversation is supervised, mostly a single one.

    An answer that the template writes otherwise once others follow it (Qwen3 puts an empty chain of thought before the
    last one alone) gets a sequence that ends with it, since only there does it stand as it will be generated.

    Args:
        tokenizer, max_length: as ``encode`` takes them.

    Returns:
        Sequences in the order of their last answers; the last one is the whole conversation.

    Raises:
        UserError: as ``encode`` does.
    """
    whole = encode(tokenizer, record, None)
    labels = list(whole.labels)
    apart = []
    for place, message in enumerate(record.messages[:-1]):
        if message.role != "assistant":
            continue
        part = encode(tokenizer, replace(record, messages=record.messages[: place + 1]), None)
        length = len(part.input_ids)
        if whole.input_ids[:length] == part.input_ids:
            labels[:length] = [
                label if label != IGNORED else other for label, other in zip(part.labels, labels[:length], strict=True)
            ]
        else:
            apart.append(part)
    return [sequence.cut(max_length) for sequence in (*apart, replace(whole, labels=labels))]


def encode(tokenizer: Any, record: Record, max_length: int | None) -> Encoded:
    """Token ids of a conversation, and labels on its last answer and the token that ends it.

    Args:
        tokenizer: of ``prepare_tokenizer``.
        max_length: tokens to keep, from the beginning; None keeps all.

    Raises:
        UserError: the chat template refuses the row, or renders its beginning otherwise than the whole.
    """
    where = record.where
    try:
        prompt = _render(tokenizer, record.prompt, True, tools=record.tools)
        whole = _render(tokenizer, record.messages, False, tools=record.tools)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not whole.startswith(prompt):
        raise UserError(
            f"{where}: the model's chat template asks for an answer with other words than it then puts before one, as "
            f"reasoning models do: what would be trained is not what is used; take an instruct model"
        )
    before, ids = _ids(tokenizer, prompt), _ids(tokenizer, whole)
    if ids[: len(before)] != before:
        # A token spans the border, as where an answer begins with a line break. In use the prompt is tokenized alone.
        ids = before + _ids(tokenizer, whole[len(prompt) :])
        if tokenizer.decode(ids) != tokenizer.decode(_ids(tokenizer, whole)):
            raise UserError(
                f"{where}: prompt and answer cannot be told apart in tokens; begin the answer without blanks"
            )
    answer = _ended(tokenizer, ids[len(before) :])
    ids = before + answer
    return Encoded(ids, [IGNORED] * len(before) + answer, 0, len(before)).cut(max_length)


def _ended(tokenizer: Any, answer: list[int]) -> list[int]:
    """The answer up to its end token; what templates put behind it (a line break) is never generated."""
    end = end_token_id(tokenizer)
    # Text holds no special token, see ``_render``: the first end token is the answer's.
    return answer[: answer.index(end) + 1] if end in answer else [*answer, end]


def _first_special(tokenizer: Any, ids: Sequence[int]) -> int | None:
    """Place of the first token, white space before it aside, if it is one of the special ones."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for place, token in enumerate(ids):
        if token in special and tokenizer.decode([token]).strip():
            return place
        if tokenizer.decode([token]).strip():
            return None
    return None


def _probe(tokenizer: Any) -> str:
    """The rendering of a conversation whose question and answer are ``PROBE``."""
    return _render(tokenizer, [Message("user", PROBE), Message("assistant", PROBE)], False)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of what ``_render`` gave."""
    # The template has written the special tokens that belong there already.
    return [
        token for piece in text.split(CUT) if piece for token in tokenizer(piece, add_special_tokens=False)["input_ids"]
    ]


def _render(tokenizer: Any, messages: Sequence[Message], invite: bool, tools: Tools = (), **options: Any) -> str:
    """``messages`` as the chat template writes them, with ``CUT`` inside every control token that people wrote.

    A template that knows no system role (Gemma's) gets its words at the head of the first question.
    """
    from jinja2 import TemplateError

    pattern = re.compile("|".join(map(re.escape, control_tokens(tokenizer))) or r"(?!)")
    turns = [_as_text(turn_of(message), pattern) for message in messages]
    functions = _as_text(list(tools), pattern) if tools else None
    try:
        text = _apply(tokenizer, turns, functions, invite, options)
        if tools and text == _apply(tokenizer, turns, None, invite, options):
            raise UserError("the model's chat template has no place for tools: leave them out, or use another model")
        return text
    except TemplateError as error:
        if [message.role for message in messages[:2]] != ["system", "user"]:
            raise UserError(f"the model's chat template refuses the conversation: {one_line(str(error))}") from None
        both = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
        return _render(tokenizer, [both, *messages[2:]], invite, tools=tools, **options)


def _apply(tokenizer: Any, turns: list[Any], tools: list[Any] | None, invite: bool, options: dict[str, Any]) -> str:
    """The chat template's text; a tokenizer whose own code writes it (with ``--trust_remote_code``) is asked for it."""
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return str(
            tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=invite, **options)
        )
    template = tokenizer.get_chat_template(None, tools)
    return render_template(template, turns, tools, invite, {**tokenizer.special_tokens_map, **options})


def _as_text(value: Any, control: re.Pattern[str]) -> Any:
    """``value`` with ``CUT`` behind the first character of every control token in its texts; roles stay."""
    if isinstance(value, str):
        return control.sub(lambda found: f"{found[0][0]}{CUT}{found[0][1:]}", value.replace(CUT, "\ufffd"))
    if isinstance(value, Mapping):
        return {_as_text(key, control): _as_text(item, control) for key, item in value.items()}
    return [_as_text(item, control) for item in value] if isinstance(value, (list, tuple)) else value
