"""Answers in a form that cannot be wrong: at every token those that the form allows are left to choose from.

llguidance holds the form (a JSON schema as a grammar over the tokenizer's bytes). What is added here: an answer that
comes near its token limit is closed by the shortest way that the form has, so that it parses all the same.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stocklora.cli.console import UserError, one_line
from stocklora.cli.settings import parse_json
from stocklora.instruct.rows.chat_template import end_token_ids
from stocklora.runtime.files import read_text

# As json.dumps writes, which is what models are trained on; free white space would let a model write it without end.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
SCHEMAS = Path(__file__).with_name("schemas")
MARGIN = 16  # tokens beside the schema's own length by which one token may push the shortest end away
NEVER = 1 << 30
LOOKED_AT = 8  # likeliest tokens that are left to be sampled from where the end comes near
_tokenizers: weakref.WeakKeyDictionary[Any, dict[int, _Tokens]] = weakref.WeakKeyDictionary()


class FormError(UserError):
    """A form that cannot be held: it is no schema, or no answer of it is short enough."""


@dataclass(frozen=True)
class AnswerForm:
    """What an answer must look like.

    Attributes:
        grammar: llguidance's.
        size: bytes of what it was made from, a bound on how far its end can be.
        trigger: text behind which the form begins to hold; empty: from the first token on.
    """

    grammar: str
    size: int
    trigger: str = ""


def form_of_schema(schema: Mapping[str, Any], name: str = "the schema") -> AnswerForm:
    """The form of a JSON text that fits ``schema``.

    Raises:
        UserError: it is no JSON schema, or says something that cannot be held while an answer is made.
    """
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=STYLE)  # type: ignore[arg-type]
    except (ValueError, TypeError, RecursionError) as error:
        raise FormError(f"{name} cannot be used: {one_line(str(error))[:300]}") from None
    return _checked(grammar, len(json.dumps(schema, ensure_ascii=False).encode()), name)


def form_of_lark(lark: str, name: str, trigger: str = "") -> AnswerForm:
    """The form that a grammar in llguidance's Lark dialect describes.

    Raises:
        UserError: a schema within it cannot be held.
    """
    from llguidance import LLMatcher

    return _checked(LLMatcher.grammar_from_lark(lark), len(lark.encode()), name, trigger)


def _checked(grammar: str, size: int, name: str, trigger: str = "") -> AnswerForm:
    from llguidance import LLMatcher

    wrong, said = LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        raise FormError(f"{name} cannot be used: {one_line(said[0])[:300]}; leave that out of it")
    return AnswerForm(grammar, size, trigger)


def schema_names() -> list[str]:
    """The schemas that come with the program."""
    return sorted(path.stem for path in SCHEMAS.glob("*.json"))


def read_schema(given: str) -> dict[str, Any]:
    """The JSON schema in a file, or the shipped one of that name.

    Raises:
        UserError: neither, or no JSON object.
    """
    path = SCHEMAS / f"{given}.json" if given in schema_names() else Path(given)
    text = read_text(path, f"no schema {given}; give a file, or one of: {', '.join(schema_names())}")
    try:
        schema = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(str(error))}") from None
    if not isinstance(schema, dict):
        raise UserError(f"{path} must be a JSON schema, which is an object")
    return schema


class _Tokens:
    """A tokenizer as llguidance needs it, and how well each token closes what is open."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        from llguidance import hf

        self.ends = sorted(end_token_ids(tokenizer))
        try:
            self.library = hf.from_tokenizer(tokenizer, n_vocab=rows, eos_token=self.ends)
        except (ValueError, TypeError) as error:
            raise UserError(f"this tokenizer cannot hold an answer's form: {one_line(str(error))[:200]}") from None
        texts = [self.library.decode_bytes([token]) for token in range(rows)]
        places = {text: token for token, text in reversed(list(enumerate(texts)))}
        self.brackets = [places[text] for text in (b"]", b"}") if text in places]
        # Never an end, which is only there where the answer is over already.
        self.outside, self.inside = (
            np.array([NEVER if token in self.ends else rank(text) for token, text in enumerate(texts)])
            for rank in (_rank_outside, _rank_inside)
        )

    def way_on(self, allowed: Any) -> int | None:
        """The token that brings an answer nearest to its end, of those ``allowed``, (vocabulary,) bool."""
        # Both brackets may come at once only where they are characters of a string.
        in_string = len(self.brackets) == 2 and allowed[self.brackets].all()
        ranks = np.where(allowed, self.inside if in_string else self.outside, NEVER)
        token = int(ranks.argmin())
        return token if ranks[token] < NEVER else None


def _rank_outside(text: bytes) -> int:
    """The lower, the sooner an answer is over behind a token: brackets, a quote, a digit, then whatever is short."""
    if text and not text.strip(b"]}"):
        return 0
    if text.startswith(b'"') and not text.strip(b'"]}'):
        return 1 if len(text) > 1 else 2
    return 2 + len(text) if text.isdigit() else 16 + len(text) + (64 if not text.strip() else 0)


def _rank_inside(text: bytes) -> int:
    """The same within a string, where a bracket is a character."""
    if text.startswith(b'"') and not text.strip(b'"]}'):
        return 0 if len(text) > 1 else 1
    return 16 + len(text) + (64 if not text.strip() else 0)


def _tokens_of(tokenizer: Any, rows: int) -> _Tokens:
    """Made once a tokenizer: it takes a second."""
    made = _tokenizers.setdefault(tokenizer, {})
    if rows not in made:
        made[rows] = _Tokens(tokenizer, rows)
    return made[rows]


class _Row:
    """One answer of a batch: what may come next, and how far it is to the end."""

    def __init__(self, form: AnswerForm, tokens: _Tokens, tokenizer: Any, room: int, draws: bool) -> None:
        from llguidance import LLMatcher

        self.tokens, self.tokenizer, self.form = tokens, tokenizer, form
        self.matcher = LLMatcher(tokens.library, form.grammar, log_level=0)
        self.active, self.done, self.closed = not form.trigger, False, False
        self.said: list[int] = []  # before the trigger
        self.room = room
        self.script: list[int] = []  # the way to the end, once it has to be gone
        self.far = form.size // 3 + MARGIN  # a token has three bytes and more
        self.looked_at = LOOKED_AT if draws else 1
        if self.active and self._way_out(room) is None:
            raise FormError(
                f"the shortest answer of this form does not fit into {room} tokens; allow more (--max_new_tokens, "
                f"max_tokens)"
            )

    def take(self, token: int) -> None:
        """Count a token that was chosen."""
        self.room -= 1
        if self.done or token in self.tokens.ends:
            self.done = True
        elif self.active:
            self.matcher.consume_token(token)
        else:
            self.said.append(token)
            self.active = self.tokenizer.decode(self.said).endswith(self.form.trigger)

    def allow(self, scores: torch.Tensor) -> None:
        """Take every token out of ``scores``, (vocabulary,), that the form does not allow."""
        if self.done or not self.active:
            return
        if self.script:
            self._only(scores, [self.script.pop(0)])
            return
        if self.matcher.is_error():
            raise FormError(f"the form of the answer is too much to hold: {one_line(self.matcher.get_error())[:200]}")
        allowed = self._allowed()
        scores[torch.from_numpy(~allowed[: len(scores)]).to(scores.device)] = -torch.inf
        if not self.form.trigger and self.room <= 2 * self.far:
            self._keep_an_end_in_reach(scores)

    def _keep_an_end_in_reach(self, scores: torch.Tensor) -> None:
        """Near the limit: the likeliest tokens alone behind which the end can be reached; else the way there."""
        if self.matcher.is_stopped():
            return
        way = self._way_out(self.room) or []
        if way and self.room - len(way) > self.far:
            return
        likeliest = scores.topk(min(self.looked_at, len(scores)))
        kept = [
            token
            for token, score in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            if score > -torch.inf and self._leads_out(token)
        ]
        if kept:
            self._only(scores, kept)
            return
        self.script = [*way, self.tokens.ends[0]]
        self.closed = True
        self._only(scores, [self.script.pop(0)])

    def _leads_out(self, token: int) -> bool:
        if token in self.tokens.ends:
            return True
        copy = self.matcher.deep_copy()
        copy.consume_token(token)
        return self._way_out(self.room - 1, copy) is not None

    def _allowed(self, matcher: Any = None) -> Any:
        """Which tokens may come next, (vocabulary,) bool."""
        mask = np.frombuffer((matcher or self.matcher).compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(mask, bitorder="little")[: len(self.tokens.inside)].view(bool)

    def _way_out(self, most: int, matcher: Any = None) -> list[int] | None:
        """Tokens that end the answer, fewer than ``most``; None where no such way is found."""
        copy = (matcher or self.matcher).deep_copy()
        way: list[int] = []
        while len(way) < most:
            if copy.is_accepting():
                return way
            forced = copy.compute_ff_tokens()
            if not forced:
                token = self.tokens.way_on(self._allowed(copy))
                if token is None:
                    return None
                forced = [token]
            copy.consume_tokens(forced)
            if copy.is_error():
                return None
            way += forced
        return None

    def _only(self, scores: torch.Tensor, tokens: Sequence[int]) -> None:
        kept = scores[list(tokens)].nan_to_num(neginf=0.0)
        scores.fill_(-torch.inf)
        scores[list(tokens)] = kept


class FormProcessor:
    """A logits processor of ``generate``: holds each answer of a batch to its form."""

    def __init__(
        self, forms: Sequence[AnswerForm | None], tokenizer: Any, *, rows: int, prompt: int, room: int, draws: bool
    ) -> None:
        """Begin with answers of which nothing is said yet.

        Args:
            forms: of each answer; None is free.
            tokenizer: that the model speaks.
            rows: of the model's vocabulary.
            prompt: tokens before the answers.
            room: most tokens of an answer.
            draws: tokens are sampled, not the likeliest taken.

        Raises:
            UserError: no answer of that form is short enough.
        """
        tokens = _tokens_of(tokenizer, rows)
        self.rows = [None if form is None else _Row(form, tokens, tokenizer, room, draws) for form in forms]
        self._seen = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``input_ids`` is (answers, tokens so far), ``scores`` (answers, vocabulary)."""
        scores = scores.clone()
        for row, ids, one in zip(self.rows, input_ids[:, self._seen :].tolist(), scores, strict=True):
            if row is not None:
                for token in ids:
                    row.take(token)
                row.allow(one)
        self._seen = input_ids.shape[1]
        return scores

    def closed(self, answer: int) -> bool:
        """Whether that answer was closed because of its token limit."""
        row = self.rows[answer]
        return row is not None and row.closed
