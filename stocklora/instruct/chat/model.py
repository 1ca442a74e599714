"""A chat model with any number of adapters on one base: answers one by one, their text as it comes, or batched."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from stocklora.cli.console import UserError
from stocklora.instruct.chat.constrained import AnswerForm, FormProcessor
from stocklora.instruct.chat.settings import AnswerSettings
from stocklora.instruct.chat.sources import BASE, BASE_NAMES
from stocklora.instruct.chat.text_stream import TextStream, holds_no_character
from stocklora.instruct.rows.chat_template import end_token_ids, prompt_ids
from stocklora.instruct.rows.formats import Message, Tools
from stocklora.runtime.machine import memory_errors

LESS_MEMORY = "--load_in_4bit, --batch_size 1, a smaller --max_new_tokens"
COLDEST = 1e-6  # below it logits over temperature leave float32; the likeliest token is drawn all the same


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where an answer ends beside its end token.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_k: 0 leaves all tokens to be sampled.
        seed: of sampled answers; None leaves them to chance.
        stop: texts before which an answer ends.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: AnswerSettings) -> Sampling:
        """The flags' values, as a ``Sampling``."""
        return cls(**{one.name: getattr(settings, one.name) for one in fields(AnswerSettings)})


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        finish: ``stop`` (the model ended it, or a stop text did), ``length`` (cut at the token limit) or ``cancelled``.
        prompt_tokens, new_tokens: of the question, and of the answer with its end token.
        seconds: wall time; of a batch, its time over its answers.
        dropped_messages: oldest messages that were left out to fit the model's context.
        closed: it was to have a form, and was closed in that form because of the token limit.
    """

    text: str
    finish: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    dropped_messages: int = 0
    closed: bool = False


@dataclass(frozen=True)
class Question:
    """What is asked, where it is more than a conversation.

    Attributes:
        messages: the conversation, which ends with the user's message or a function's result.
        tools: functions that the answer may call.
        template: what else the chat template is told, such as ``enable_thinking``.
        form: what the answer must look like; None leaves it free.
    """

    messages: Sequence[Message]
    tools: Tools = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    form: AnswerForm | None = None


Asked = Sequence[Message] | Question  # a conversation alone, or with more


def question_of(asked: Asked) -> Question:
    return asked if isinstance(asked, Question) else Question(asked)


class ContextError(UserError):
    """A conversation that does not fit the model's context."""


class ChatModel:
    """A base model, its adapters by name, and a tokenizer for each. One answer is computed at a time.

    Attributes:
        adapters: their names, in the order given. base_name: what the base is called.
        context_tokens: most tokens that question and answer may have together.
        folders: where the base and each adapter were loaded from. quantization: of the base.
    """

    folders: Mapping[str, Path] = {}
    quantization = "none"

    def __init__(self, model: Any, tokenizers: Mapping[str, Any], adapters: Sequence[str], base_name: str) -> None:
        """``model`` is a causal language model, or a ``PeftModel`` whose adapters are called by ``internal_name``."""
        self.model = model.eval()
        self.adapters = list(adapters)
        self.base_name = base_name
        self._tokenizers = dict(tokenizers)
        self._lock = threading.RLock()
        config = model.config
        self.context_tokens = int(getattr(config, "max_position_embeddings", 0) or 2**20)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def adapter_or_base(self, adapter: str | None) -> str:
        """A name in its canonical form; None is the first adapter, or the base where there is none.

        Raises:
            UserError: no such adapter.
        """
        if adapter is None:
            return self.adapters[0] if self.adapters else BASE
        if adapter in self.adapters:
            return adapter
        if adapter.lower() in BASE_NAMES or adapter == self.base_name:
            return BASE
        raise UserError(f"no adapter '{adapter}'; there are: {', '.join([*self.adapters, BASE])}")

    def tokenizer(self, adapter: str | None = None) -> Any:
        return self._tokenizers[self.adapter_or_base(adapter)]

    @contextlib.contextmanager
    def using(self, adapter: str | None = None) -> Iterator[Any]:
        """The model with that adapter on (``none``: with all of them off), for this thread alone."""
        name = self.adapter_or_base(adapter)
        with self._lock, contextlib.ExitStack() as stack:
            if name != BASE:
                self.model.set_adapter(internal_name(self.adapters.index(name)), inference_mode=True)
            elif self.adapters:
                stack.enter_context(self.model.disable_adapter())
            stack.enter_context(torch.inference_mode())
            yield self.model

    # ------------------------------------------------------------------------------------------------- answers

    def reply(self, messages: Asked, *, adapter: str | None = None, **sampling: Any) -> str:
        """The answer to ``messages``, of which the last is the user's; ``sampling`` are fields of ``Sampling``."""
        return self.answer(messages, adapter=adapter, sampling=Sampling(**sampling)).text

    def answer(
        self,
        messages: Asked,
        *,
        adapter: str | None = None,
        sampling: Sampling = Sampling(),
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        cut_history: bool = True,
    ) -> Answer:
        """One answer, in this thread.

        Args:
            on_text: called with every piece of text as it comes.
            cancelled: asked before every token; True ends the answer.
            cut_history: leave out the oldest messages where all do not fit.

        Raises:
            ContextError: what must not be left out does not fit.
        """
        tokenizer, question = self.tokenizer(adapter), question_of(messages)
        ids, dropped, room = self.fitted(question, tokenizer, sampling.max_new_tokens, cut_history)
        watcher = _Watcher(tokenizer, sampling.stop, len(ids), on_text, cancelled)
        started = time.perf_counter()
        _, closed = self._generate([ids], adapter, replace(sampling, max_new_tokens=room), [question.form], [watcher])
        return watcher.answer(len(ids), time.perf_counter() - started, dropped, closed[0])

    def answers(
        self,
        conversations: Sequence[Asked],
        *,
        adapter: str | None = None,
        sampling: Sampling = Sampling(),
    ) -> list[Answer]:
        """Answers to several conversations at once, padded on the left.

        Greedy answers are those of ``answer``, as far as the processor rounds alike for one row and for several:
        in float32 it does but for ties. One that the context leaves less room than ``max_new_tokens`` is computed
        alone, since it would cut the others as short.

        Raises:
            ContextError: a conversation does not fit.
        """
        if sampling.stop:
            raise ValueError("stop texts are for single answers")
        if not conversations:
            return []
        tokenizer = self.tokenizer(adapter)
        fits = [self.fitted(messages, tokenizer, sampling.max_new_tokens, True) for messages in conversations]
        tight = [index for index, (_, _, room) in enumerate(fits) if room < sampling.max_new_tokens]
        result: dict[int, Answer] = {}
        for group in [[index for index in range(len(fits)) if index not in tight], *[[index] for index in tight]]:
            if group:
                forms = [question_of(conversations[index]).form for index in group]
                found = self._together([fits[index] for index in group], forms, adapter, sampling)
                result.update(zip(group, found, strict=True))
        return [result[index] for index in range(len(fits))]

    def _together(
        self,
        fits: Sequence[tuple[list[int], int, int]],
        forms: Sequence[AnswerForm | None],
        adapter: str | None,
        sampling: Sampling,
    ) -> list[Answer]:
        """Answers to what ``fitted`` gave for each of several conversations that have the same room."""
        started = time.perf_counter()
        limited = replace(sampling, max_new_tokens=fits[0][2])
        rows, closed = self._generate([ids for ids, _, _ in fits], adapter, limited, forms)
        seconds = (time.perf_counter() - started) / len(fits)
        result = []
        for (ids, dropped, _), row, by_limit in zip(fits, rows, closed, strict=True):
            watcher = _Watcher(self.tokenizer(adapter))
            for token in row:
                if watcher.take(token):
                    break
            result.append(watcher.answer(len(ids), seconds, dropped, by_limit))
        return result

    def _generate(
        self,
        prompts: Sequence[list[int]],
        adapter: str | None,
        sampling: Sampling,
        forms: Sequence[AnswerForm | None],
        criteria: Sequence[Any] = (),
    ) -> tuple[list[list[int]], list[bool]]:
        """The tokens behind each of ``prompts``, which are padded on the left; and which were closed at their limit."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        tokenizer, longest = self.tokenizer(adapter), max(map(len, prompts))
        draws = sampling.temperature >= COLDEST
        # By default the library looks at the 50 likeliest tokens alone.
        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=draws,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=sorted(end_token_ids(tokenizer)),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **(sampled if draws else {}),
        )
        holders = []
        if any(form is not None for form in forms):
            holders = [self._holder(forms, tokenizer, longest, sampling.max_new_tokens, draws)]
        pad = int(tokenizer.pad_token_id)
        with self.using(adapter) as model, _seeded(sampling.seed), memory_errors(LESS_MEMORY):
            inputs = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])  # (rows, tokens)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
            output = model.generate(
                input_ids=inputs.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=config,
                logits_processor=LogitsProcessorList(holders),
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        closed = [bool(holders) and holders[0].closed(place) for place in range(len(prompts))]
        return output[:, longest:].tolist(), closed

    def _holder(
        self, forms: Sequence[AnswerForm | None], tokenizer: Any, prompt: int, room: int, draws: bool
    ) -> FormProcessor:
        rows = int(self.model.get_output_embeddings().weight.shape[0])
        return FormProcessor(forms, tokenizer, rows=rows, prompt=prompt, room=room, draws=draws)

    def check_form(self, form: AnswerForm, tokenizer: Any, room: int) -> None:
        """Raise a ``FormError`` where no answer of that form is as short as ``room`` tokens."""
        self._holder([form], tokenizer, 0, room, False)

    def fitted(
        self, asked: Asked, tokenizer: Any, max_new_tokens: int, cut_history: bool = True
    ) -> tuple[list[int], int, int]:
        """The conversation's token ids, cut from its oldest turn until an answer fits behind it.

        The system message and the last question always stay; if they leave less than ``max_new_tokens``, the answer
        may have what they leave.

        Returns:
            Token ids, messages left out, room for the answer in tokens.

        Raises:
            ContextError: there is no room at all.
            UserError: nothing to answer, or text that is none.
        """
        question = question_of(asked)
        messages, template = question.messages, question.template
        if question.form and not question.form.trigger and "enable_thinking" in str(tokenizer.chat_template):
            template = {"enable_thinking": False, **template}  # a chain of thought is not of the form
        if any(holds_no_character(message.content) for message in messages):
            raise UserError("the text holds bytes that are not UTF-8; save or type it as UTF-8")
        if not messages or messages[-1].role not in ("user", "tool"):
            raise UserError("a conversation must end with a message of the user")
        head = [message for message in messages[:1] if message.role == "system"]
        rest = list(messages[len(head) :])
        questions = [index for index, message in enumerate(rest) if message.role == "user"]
        for first in [0, *[index for index in questions if index > 0]] if cut_history else [0]:
            ids = prompt_ids(tokenizer, [*head, *rest[first:]], tools=question.tools, **template)
            if len(ids) + max_new_tokens <= self.context_tokens:
                return ids, first, max_new_tokens
        room = self.context_tokens - len(ids)
        if room < 1:
            raise ContextError(
                f"the prompt has {len(ids):,} tokens and the model's context {self.context_tokens:,}: shorten it"
            )
        return ids, first, room


class _Watcher:
    """Sees every token of one answer: hands its text on, and says when to end. A stopping criterion of ``generate``."""

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        prompt_tokens: int = 0,
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self.stream = TextStream(tokenizer, stops)
        self.new_tokens = 0
        self.finish = "length"
        self._ends, self._seen = end_token_ids(tokenizer), prompt_tokens
        self._on_text, self._cancelled = on_text, cancelled

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether to end, (1,) bool; ``input_ids`` is (1, tokens so far)."""
        done = False
        for token in input_ids[0, self._seen :].tolist():
            self._seen += 1
            done = done or self.take(token)
        return torch.tensor([done], device=input_ids.device)

    def take(self, token: int) -> bool:
        """Count a token, hand its text on; whether it is the last one."""
        if self.finish != "length":
            return True  # some devices compute one token more than was asked for
        self.new_tokens += 1
        if token in self._ends:
            self.finish = "stop"
        else:
            self._say(self.stream.push(token))
            if self.stream.ended:
                self.finish = "stop"
            elif self._cancelled is not None and self._cancelled():
                self.finish = "cancelled"
        return self.finish != "length"

    def answer(self, prompt_tokens: int, seconds: float, dropped: int, closed: bool = False) -> Answer:
        """What was said, now that no token follows."""
        self._say(self.stream.finish())
        return Answer(self.stream.text, self.finish, prompt_tokens, self.new_tokens, seconds, dropped, closed)

    def _say(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(piece)


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from ``seed`` inside, and leave the program's own random numbers as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def internal_name(index: int) -> str:
    """What PEFT calls an adapter; names that people give may hold dots, which it cannot take."""
    return f"adapter{index}"
