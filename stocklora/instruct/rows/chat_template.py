"""From a conversation to token ids and labels, by the model's own chat template.

The loss is taken on answers and the tokens that end them, nothing else. What precedes an answer is exactly what the
model is asked with later: the template's rendering of the conversation so far with its invitation to answer. That it
is a beginning of the whole conversation's rendering is checked for every row, so that no template need mark its
answers (``{% generation %}``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError, one_line
from stocklora.instruct.rows.formats import Message, Record

IGNORED = -100  # a label that the loss passes over
ADDED_PAD = "<|pad|>"
# Tokens that makers set aside for padding or left unused, the likeliest first.
SPARE_TOKENS = (
    "<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", ADDED_PAD, "<|PAD|>", "<|fim_pad|>",
    "<|vision_pad|>", "<|reserved_special_token_0|>", "<unused0>", "<unk>", "[UNK]",
)  # fmt: skip
PROBE = "0123456789"


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


def prepare_tokenizer(folder: Path | str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in ``folder``, with a chat template and a padding token that ends nothing.

    Where padding and end are one token, a collator or a reader that masks padding masks the end as well, and the model
    never learns to stop. Any other token will do, since padding is neither attended to nor supervised: one that the
    model has and does not use is taken, or one is added (see ``fit_embeddings``).

    Raises:
        UserError: no tokenizer there, or one without a chat template.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"no model folder {folder}; fetch one with download_model.py, or give --model_path FOLDER")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"cannot load a tokenizer from {folder}: {one_line(str(error))[:300]}") from None
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {folder} has no chat template: that is a base model; take its instruct or chat version, "
            f"such as Qwen2.5-0.5B-Instruct"
        )
    ends = end_token_ids(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        # Not `tokenizer.pad_token = ...`, which gives a new token no id.
        tokenizer.add_special_tokens({"pad_token": _token_to_pad_with(tokenizer, ends)})
    tokenizer.padding_side = "right"
    return tokenizer


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
    """The token with which the chat template ends an answer; the tokenizer's own end token where it names none.

    Raises:
        UserError: neither is there.
    """
    ids = _ids(tokenizer, _probe(tokenizer).rpartition(PROBE)[2])
    found = _last_special(tokenizer, ids)
    if found is not None:
        return ids[found]
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token, and its chat template ends answers with none: use another model"
        )
    return int(tokenizer.eos_token_id)


def end_token_ids(tokenizer: Any) -> set[int]:
    """Tokens at which generation should stop: the end of an answer and the tokenizer's end of text."""
    return {end_token_id(tokenizer), tokenizer.eos_token_id} - {None}


def prompt_ids(tokenizer: Any, messages: Sequence[Message], *, thinking: bool | None = None) -> list[int]:
    """Token ids that ask for an answer to ``messages``: exactly what stands before the supervised tokens in training.

    Args:
        thinking: False asks a template that can (Qwen3's) for an answer without a chain of thought; a tuned model was
            trained on either form. None leaves it to the template.
    """
    options = {} if thinking is None else {"enable_thinking": thinking}
    return _ids(tokenizer, _render(tokenizer, messages, True, **options))


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
        prompt, whole = _render(tokenizer, record.prompt, True), _render(tokenizer, record.messages, False)
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
    end = _last_special(tokenizer, answer)
    return [*answer, end_token_id(tokenizer)] if end is None else answer[: end + 1]


def _last_special(tokenizer: Any, ids: Sequence[int]) -> int | None:
    """Place of the last token, white space behind it aside, if it is one of the special ones."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for place in reversed(range(len(ids))):
        if ids[place] in special:
            return place
        if tokenizer.decode([ids[place]]).strip():
            return None
    return None


def _probe(tokenizer: Any) -> str:
    """The rendering of a conversation whose question and answer are ``PROBE``."""
    return _render(tokenizer, [Message("user", PROBE), Message("assistant", PROBE)], False)


def _ids(tokenizer: Any, text: str) -> list[int]:
    # The template has written the special tokens that belong there already.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(tokenizer: Any, messages: Sequence[Message], invite: bool, **options: Any) -> str:
    """``messages`` as the chat template writes them.

    A template that knows no system role (Gemma's) gets its words at the head of the first question.
    """
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=invite, **options))
    except TemplateError as error:
        if [message.role for message in messages[:2]] != ["system", "user"]:
            raise UserError(f"the model's chat template refuses the conversation: {one_line(str(error))}") from None
        both = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
        return _render(tokenizer, [both, *messages[2:]], invite, **options)
