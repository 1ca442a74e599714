"""What the base and the tuned model say to the same questions, side by side."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stocklora.cli.console import UserError, say
from stocklora.instruct.chat.settings import CompareSettings
from stocklora.instruct.chat.sources import BASE, find_sources, quantization_note
from stocklora.instruct.chat.text_stream import printable, without_reasoning
from stocklora.instruct.rows.formats import Message, joined
from stocklora.runtime.files import write_json

DEFAULT_CASES = (
    "美联储宣布加息25个基点",
    "央行下调存款准备金率0.5个百分点",
    "公司三季度净利润同比下降35%，低于市场预期",
)
PAGE_WIDTH = 120  # columns, where the output is no terminal


@dataclass(frozen=True)
class Pair:
    """One case and both answers to it; ``cut`` tells of each whether it was cut at the token limit."""

    case: str
    base: str
    tuned: str
    seconds: tuple[float, float]
    cut: tuple[bool, bool]


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
    cases = settings.test_cases or ([] if settings.cases_file else list(DEFAULT_CASES))
    ask = settings.instruction
    conversations = [(case, [Message("user", joined(ask, case) if ask else case)]) for case in cases]
    if settings.cases_file is not None:
        from stocklora.instruct.chat.batch import read_prompts

        for prompt in read_prompts(settings.cases_file):
            conversations.append((prompt.messages[-1].content, list(prompt.messages)))
    if note := quantization_note(sources, settings.quantization):
        say(note)
    from stocklora.instruct.chat.load import load_sources
    from stocklora.instruct.chat.model import Sampling

    model = load_sources(sources, settings)
    sampling = Sampling.of(settings)
    pairs = []
    for number, (case, messages) in enumerate(conversations, start=1):
        base, tuned = (model.answer(messages, adapter=name, sampling=sampling) for name in (BASE, "tuned"))
        pairs.append(
            Pair(
                case,
                without_reasoning(base.text),
                without_reasoning(tuned.text),
                (base.seconds, tuned.seconds),
                (base.finish == "length", tuned.finish == "length"),
            )
        )
        print_pair(
            pairs[-1], f"{number}/{len(conversations)}", f"base: {model.base_name}", f"tuned: {settings.adapter_path}"
        )
    if settings.output is not None:
        write_pairs(pairs, settings.output, model.base_name, settings)
        say(f"answers: {settings.output}")


def print_pair(pair: Pair, number: str, base: str, tuned: str) -> None:
    """Two columns, as wide as the terminal; words wrap, nothing is cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    case, *answers = map(printable, (pair.case, pair.base, pair.tuned))
    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((PAGE_WIDTH, 24)).columns if on_terminal else PAGE_WIDTH
    table = Table(
        title=Text(f"[{number}] {case}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, width=width
    )
    for name, seconds in zip((base, tuned), pair.seconds, strict=True):
        table.add_column(Text(f"{name} ({seconds:.1f} s)"), ratio=1, overflow="fold")
    shown = [text + (" … (cut)" if cut else "") for text, cut in zip(answers, pair.cut, strict=True)]
    table.add_row(*[Text(text or "(nothing)") for text in shown])
    console = Console(width=width)
    if on_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)


def write_pairs(pairs: Sequence[Pair], path: Path, base_name: str, settings: CompareSettings) -> None:
    rows = [
        {
            "case": pair.case,
            "base": pair.base,
            "tuned": pair.tuned,
            "base_seconds": round(pair.seconds[0], 3),
            "tuned_seconds": round(pair.seconds[1], 3),
        }
        for pair in pairs
    ]
    write_json(path, {"base_model": base_name, "adapter": str(settings.adapter_path), "answers": rows})
