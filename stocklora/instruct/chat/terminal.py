"""Answers in the terminal: a chat, single questions, and what base and tuned model say to the same ones."""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stocklora.cli.console import UserError, draw, say
from stocklora.instruct.chat.settings import CompareSettings, InferenceSettings
from stocklora.instruct.chat.sources import BASE, find_sources
from stocklora.instruct.chat.text_stream import printable, without_reasoning
from stocklora.instruct.rows.formats import Message, joined
from stocklora.runtime.files import write_json

if TYPE_CHECKING:
    from stocklora.instruct.chat.constrained import AnswerForm
    from stocklora.instruct.chat.model import Answer, ChatModel, Sampling

# What the scripts ask where nobody asks anything else: one of each kind that the data sets teach.
QUESTIONS = (
    "分析以下财经快讯的市场情绪，并说明理由：央行宣布下调存款准备金率0.5个百分点，释放长期资金约1万亿元。",
    "分析以下财经快讯对市场的影响：美联储宣布加息25个基点。",
    "从以下快讯中抽取指标、前值、预期值和公布值，只输出JSON：美国10月CPI同比，前值3.7%，预期3.3%，公布3.2%。",
    "公司公布财报：营收同比增长12%，净利润同比下降5%，低于市场预期。请判断利好还是利空，并说明理由。",
    "什么是“预期兑现”？请用一个例子说明。",
)
DEFAULT_CASES = (
    "美联储宣布加息25个基点",
    "央行下调存款准备金率0.5个百分点",
    "公司三季度净利润同比下降35%，低于市场预期",
)
PAGE_WIDTH = 120  # columns, where the output is no terminal
HELP = """\
/adapters        the adapters there are; the one in use has a star
/adapter NAME    go on with that adapter (none: the base model alone)
/reset           forget the conversation
/help            these lines
/exit            end (so does Ctrl-D; Ctrl-C ends an answer)"""


def talk(
    model: ChatModel,
    settings: InferenceSettings,
    adapter: str | None,
    sampling: Sampling,
    schema: Mapping[str, Any] | None = None,
) -> None:
    """A chat, one prompt, what comes through a pipe, or questions of its own: what ``inference_lora.py`` does here.

    Args:
        model: that answers.
        settings: of the script.
        adapter: that answers first.
        sampling: how answers are made.
        schema: that every answer has to fit, in JSON.

    Raises:
        UserError: the prompt is empty.
    """
    form = None
    if schema is not None:
        from stocklora.instruct.chat.constrained import form_of_schema

        form = form_of_schema(schema, "--json_schema")
    if settings.chat:
        chat(model, adapter, sampling, settings.system, form)
        return
    prompt = piped_text() if settings.prompt is None else settings.prompt
    if prompt is None:
        ask_questions(model, adapter, sampling, settings.system, form)
        return
    if settings.prompt == "-":
        prompt = read_stdin()
    if not prompt.strip():
        raise UserError("the prompt is empty; give some text after --prompt")
    print_answer(model, [*opening(settings.system), Message("user", prompt)], adapter, sampling, form)


def ask_questions(
    model: ChatModel,
    adapter: str | None,
    sampling: Sampling,
    system: str | None = None,
    form: AnswerForm | None = None,
) -> None:
    """Each of ``QUESTIONS`` with its answer below it."""
    for number, question in enumerate(QUESTIONS, start=1):
        say(f"{'' if number == 1 else chr(10)}[{number}/{len(QUESTIONS)}] {question}")
        print_answer(model, [*opening(system), Message("user", question)], adapter, sampling, form)


def opening(system: str | None) -> list[Message]:
    """How a conversation begins."""
    return [Message("system", system)] if system else []


def print_answer(
    model: ChatModel,
    messages: Sequence[Message],
    adapter: str | None,
    sampling: Sampling,
    form: AnswerForm | None = None,
) -> Answer:
    """Write an answer to stdout piece by piece, and in brackets what the reader should know of it.

    Raises:
        KeyboardInterrupt: Ctrl-C, after what was said so far.
    """

    on_terminal = sys.stdout.isatty()

    def show(piece: str) -> None:
        sys.stdout.write(printable(piece) if on_terminal else piece)
        sys.stdout.flush()

    from stocklora.instruct.chat.model import Question

    question = Question(messages, form=form)
    answer = model.answer(question, adapter=adapter, sampling=sampling, on_text=show)
    notes = []
    if answer.dropped_messages:
        notes.append(
            f"the {answer.dropped_messages} oldest messages no longer fit the model's context of "
            f"{model.context_tokens:,} tokens and were left out"
        )
    if answer.finish == "length":
        notes.append(f"cut at {answer.new_tokens:,} tokens")
    if answer.closed:
        notes.append(f"closed, in its form, at {sampling.max_new_tokens:,} tokens")
    say("".join(f"\n({note})" for note in notes))
    return answer


def chat(
    model: ChatModel,
    adapter: str | None,
    sampling: Sampling,
    system: str | None = None,
    form: AnswerForm | None = None,
) -> None:
    """Talk until /exit or the end of the input. A question without an answer leaves the conversation as it was."""
    current = model.adapter_or_base(adapter)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history, where there is one
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text cost the question, not the chat; and a pipe is UTF-8, whatever the system's habit.
        sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else "utf-8", errors="surrogateescape")
    say(f"Chat with {described(model, current)}. /help lists the commands.")
    history = opening(system)
    while True:
        try:
            line = input("\nyou> ").strip()
        except EOFError:
            say()
            return
        command, _, argument = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            history = opening(system)
            say("The conversation begins anew.")
        elif line.startswith("/"):
            current = _obey(command, argument.strip(), model, current)
        elif line:
            history += _ask(model, [*history, Message("user", line)], current, sampling, form)


def _obey(command: str, argument: str, model: ChatModel, current: str) -> str:
    """Do what a command says; the adapter that is in use after it."""
    names = [*model.adapters, BASE]
    if command == "/adapters":
        say("\n".join(f"{'*' if name == current else ' '} {name}" for name in names))
    elif command == "/adapter":
        try:
            if not argument:
                raise UserError(f"which one? {', '.join(names)}")
            current = model.adapter_or_base(argument)
            say(f"From here on {described(model, current)} answers; the conversation goes on.")
        except UserError as error:
            say(str(error))
    else:
        say(HELP if command == "/help" else f"No command {command}.\n{HELP}")
    return current


def _ask(
    model: ChatModel, messages: Sequence[Message], adapter: str, sampling: Sampling, form: AnswerForm | None
) -> list[Message]:
    """The question that ends ``messages``, and its answer; nothing where it was interrupted or cannot be answered."""
    try:
        answer = print_answer(model, messages, adapter, sampling, form)
    except UserError as error:
        say(str(error))
    except KeyboardInterrupt:
        say("\n(interrupted; the question is forgotten)")
    else:
        return [messages[-1], Message("assistant", without_reasoning(answer.text))]
    return []


def described(model: ChatModel, adapter: str) -> str:
    """``adapter`` in words."""
    if adapter != BASE:
        return f"the adapter '{adapter}' on {model.base_name}"
    return f"the base {model.base_name} alone" if model.adapters else model.base_name


def piped_text() -> str | None:
    """What came through a pipe or a redirected file on standard input; None where nothing waits there.

    A pipe that stays silent is not waited for: many programs that start others leave one open.
    """
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or a test's stand-in
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return None  # a terminal, or /dev/null
    if stat.S_ISFIFO(mode) and sys.platform != "win32" and not select.select([descriptor], [], [], 0.2)[0]:
        return None
    return read_stdin() or None


def read_stdin() -> str:
    """All of standard input, as UTF-8.

    Raises:
        UserError: it is something else.
    """
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text; save it as UTF-8, or use --prompt TEXT") from None


# ---------------------------------------------------------------------------------------------- base and tuned


def compare(settings: CompareSettings) -> None:
    """Answer every case with both models, print the answers beside each other, and write them where that is wanted.

    Raises:
        UserError: no adapter there, or no cases.
    """
    if not settings.adapter_path.is_dir():
        raise UserError(
            f"no adapter at {settings.adapter_path}; train one: python scripts/qlora/train_qlora.py --output_dir "
            f"{settings.adapter_path}"
        )
    sources = find_sources(settings.base_model, [f"tuned={settings.adapter_path}"], settings.any_base)
    if not sources.adapters:
        raise UserError(
            f"{settings.adapter_path} is a whole model; to compare it with its base use training/evaluate.py"
        )
    conversations = _conversations(settings)
    from stocklora.instruct.chat.load import load_sources
    from stocklora.instruct.chat.model import Sampling

    model = load_sources(sources, settings)
    sampling, rows = Sampling.of(settings), []
    for number, (case, messages) in enumerate(conversations, start=1):
        base, tuned = (model.answer(messages, adapter=name, sampling=sampling) for name in (BASE, "tuned"))
        answers = {f"base: {model.base_name}": base, f"tuned: {settings.adapter_path}": tuned}
        print_answers(f"[{number}/{len(conversations)}] {case}", answers)
        rows.append(
            {
                "case": case,
                "base": without_reasoning(base.text),
                "tuned": without_reasoning(tuned.text),
                "base_seconds": round(base.seconds, 3),
                "tuned_seconds": round(tuned.seconds, 3),
            }
        )
    if settings.output is not None:
        content = {"base_model": model.base_name, "adapter": str(settings.adapter_path), "answers": rows}
        write_json(settings.output, content)
        say(f"answers: {settings.output}")


def _conversations(settings: CompareSettings) -> list[tuple[str, list[Message]]]:
    """Each case, and the messages to ask it with."""
    cases = settings.test_cases or ([] if settings.cases_file else DEFAULT_CASES)
    instruction = settings.instruction
    conversations = [(case, [Message("user", joined(instruction, case) if instruction else case)]) for case in cases]
    if settings.cases_file is not None:
        from stocklora.instruct.chat.batch import read_prompts

        prompts = read_prompts(settings.cases_file)
        conversations += [(prompt.messages[-1].content, list(prompt.messages)) for prompt in prompts]
    return conversations


def print_answers(title: str, answers: Mapping[str, Answer]) -> None:
    """A column for each name, as wide as the terminal; words wrap, nothing is cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name, answer in answers.items():
        table.add_column(Text(f"{name} ({answer.seconds:.1f} s)"), ratio=1, overflow="fold")
    said = [
        printable(without_reasoning(answer.text)) + (" … (cut)" if answer.finish == "length" else "")
        for answer in answers.values()
    ]
    table.add_row(*[Text(text or "(nothing)") for text in said])
    draw(table, PAGE_WIDTH)
    say()
