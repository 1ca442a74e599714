"""What it costs to hold answers to a JSON schema: processor time a token, held and free, one answer or eight at once.

    python bench/constrained.py
    python bench/constrained.py --schemas sentiment risk --prompts 6 --model_path models/Qwen2.5-0.5B-Instruct

Each news item of the bundled database is answered held to a schema, then freely with as many tokens at most, in turn,
so that whatever else the machine does falls on both. Times are the processor's own, reading the prompt included; what
is made once for a tokenizer is measured apart. Writes bench/results/constrained.json. Target: at most 1.3 times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, run_benchmark, save_result

TOGETHER = 8
TARGET = 1.3


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", nargs="+", default=["event_extraction", "sentiment", "release"], metavar="NAME")
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--prompts", type=int, default=4, help="news items for each schema (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="longest answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "constrained.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.base_models.folders import check_model_folder
    from stocklora.cli.console import print_table, say
    from stocklora.instruct.chat.constrained import form_of_schema, read_schema
    from stocklora.instruct.chat.load import load_chat_model
    from stocklora.instruct.chat.model import Question, Sampling

    check_model_folder(arguments.model_path)
    model = load_chat_model(arguments.model_path, device="cpu", dtype="float32")
    news = flashes(max(arguments.prompts, TOGETHER))
    settings = {"model": arguments.model_path.name, "tokens": arguments.tokens, "target": TARGET}
    forms = {name: form_of_schema(read_schema(name)) for name in arguments.schemas}
    once_s = -time.process_time()
    model.answer(Question(news[0], form=next(iter(forms.values()))), sampling=Sampling(max_new_tokens=arguments.tokens))
    once_s += time.process_time()
    model.answer(news[0], sampling=Sampling(max_new_tokens=8))  # so that neither side pays for a first pass
    rows = []
    for name, form in forms.items():
        alone = [compared(model, [item], form, arguments.tokens) for item in news[: arguments.prompts]]
        rows.append({"schema": name, "at_once": 1, "compared": len(alone), **middle(alone)})
        together = [compared(model, news[:TOGETHER], form, arguments.tokens)]
        rows.append({"schema": name, "at_once": TOGETHER, "compared": len(together), **middle(together)})
        say(f"{name}: {rows[-2]['ratio']:.2f} alone, {rows[-1]['ratio']:.2f} with {TOGETHER} at once")
        save_result(arguments.output, {"settings": settings, "first_answer_s": once_s, "rows": rows})
    header = ("schema", "at once", "steps", "free ms", "held ms", "ratio", "from", "to")
    print_table(f"Processor time a token, {arguments.model_path.name}", header, [cells(row) for row in rows])
    say(f"the first held answer, with what is made once for a tokenizer: {once_s:.1f} s; saved: {arguments.output}")
    return 0


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{1000 * row[name]:.1f}" for name in ("free_s", "held_s"))
    ratios = (f"{row[name]:.2f}" for name in ("ratio", "lowest", "highest"))
    return (row["schema"], str(row["at_once"]), str(row["steps"]), *times, *ratios)


def flashes(count: int) -> list[Any]:
    """Conversations that ask about a news item each."""
    from stocklora.instruct.news.database import read_events
    from stocklora.instruct.rows.formats import Message

    contents = [event.content for event in read_events(None)[0] if event.content]
    return [[Message("user", f"分析这条快讯，用JSON回答：{content}")] for content in contents[:count]]


def compared(model: Any, asked: Sequence[Any], form: Any, most: int) -> dict[str, float]:
    """Held and free answers to the same questions, as many tokens each: steps, and processor seconds a step."""
    from stocklora.instruct.chat.model import Question, Sampling

    times: dict[str, float] = {}
    steps = most
    for name in ("held", "free"):
        questions = [Question(messages, form=form if name == "held" else None) for messages in asked]
        sampling = Sampling(max_new_tokens=steps)
        started = time.process_time()
        if len(questions) > 1:
            answers = model.answers(questions, sampling=sampling)
        else:
            answers = [model.answer(questions[0], sampling=sampling)]
        seconds = time.process_time() - started
        steps = max(answer.new_tokens for answer in answers)
        times[f"{name}_s"] = seconds / steps
        if name == "held":
            for answer in answers:
                json.loads(answer.text)
    return {"steps": steps, **times}


def middle(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The middle of what was compared, with the least and the largest ratio."""
    ratios = [one["held_s"] / one["free_s"] for one in found]
    return {
        "steps": sum(int(one["steps"]) for one in found),
        "free_s": statistics.median(one["free_s"] for one in found),
        "held_s": statistics.median(one["held_s"] for one in found),
        "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
