"""``quick_start.py --track instruct``: bundled news -> instructions -> LoRA -> is it better than its base?"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocklora.cli.console import UserError, say
from stocklora.demo.prices_track import QuickStartSettings, base_model
from stocklora.runtime.files import json_of

if TYPE_CHECKING:
    from stocklora.instruct.rows.formats import Record

# Short questions with answers of a fixed form: what a model of 135 M weights learns in minutes. The label is the sum of
# many small decisions, so all of its rows are learned from, and those with one for each window beside them.
KINDS = ("sentiment", "window_sentiment", "extraction")
ROWS: dict[str, Any] = {
    "shares": [1.0, 0.0, 0.0], "split": [0.6, 0.15, 0.25], "max_characters": 60, "num_samples": 2000,
    "short_answers": True,
}  # fmt: skip
# Rows of a part, at most, in the order of KINDS; None: all that there are. The settings below were chosen on validation
# rows; the test rows are looked at once, by the demo itself. See docs/experiments.md.
MOST: dict[str, tuple[int | None, ...]] = {"train": (None, 50, 24), "validation": (8, 4, 2), "test": (None, 6, 6)}
FAST_MOST: dict[str, tuple[int | None, ...]] = {"train": (24, 10, 6), "validation": (4, 2, 2), "test": (8, 4, 4)}
TRAINING: dict[str, Any] = {
    "use_lora": True, "lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "learning_rate": 1e-3, "batch_size": 2,
    "gradient_accumulation_steps": 1, "max_length": 768, "warmup_ratio": 0.06, "logging_steps": 5,
    "early_stopping_patience": 0,
}  # fmt: skip
EPOCHS, FAST_EPOCHS = 2, 1
ANSWER_TOKENS, FAST_ANSWER_TOKENS = 64, 48


def run_instruct_track(settings: QuickStartSettings) -> None:
    """The whole story; pictures, scores and the adapter lie in ``settings.output_dir / "instruct"``."""
    started = time.perf_counter()
    folder = settings.output_dir / "instruct"
    say("[1/5] Instructions, made of the bundled news and the price moves measured after them")
    data = make_rows(folder / "instructions.jsonl", settings)

    say("[2/5] Base model")
    model_path = base_model(settings)

    say("[3/5] LoRA fine-tuning, the loss on the answers alone")
    adapter = folder / "adapter"
    train(data, model_path, adapter, settings)

    say("[4/5] Is it better than its base? Held-out rows, later in time than those it was trained on")
    from stocklora.instruct.chat.settings import EvaluateSettings, PlotSettings
    from stocklora.instruct.evaluation.plots import plot_results
    from stocklora.instruct.evaluation.run import evaluate

    tokens = FAST_ANSWER_TOKENS if settings.fast else ANSWER_TOKENS
    results = evaluate(EvaluateSettings(model_path=adapter, max_new_tokens=tokens, device=settings.device))
    pictures = plot_results(PlotSettings(model_path=adapter, output_dir=folder))

    say("[5/5] An answer of each")
    show_answers(adapter)
    say()
    say(f"adapter    {adapter}")
    say(f"scores     {results}")
    say(f"charts     {', '.join(map(str, pictures))}")
    from stocklora.runtime.machine import peak_memory_mb

    say(f"took {time.perf_counter() - started:.0f} s, peak memory {peak_memory_mb():,.0f} MB")
    say()
    say("The labels describe the price move that the question names; they are no forecast. Next: a chat with it,")
    say(f"python inference_lora.py --base_model {model_path} --lora_model {adapter} --chat")
    say()
    say(f"look at all of it in a browser: python web.py --workspace {settings.output_dir}")


def make_rows(path: Path, settings: QuickStartSettings) -> Path:
    from stocklora.instruct.news.dataset import InstructionSettings, build_dataset
    from stocklora.instruct.rows.records import write_records

    built = build_dataset(InstructionSettings(output=path, seed=settings.seed, **ROWS))
    records = chosen_rows(built.records, FAST_MOST if settings.fast else MOST)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(records, path, "alpaca")
    parts = Counter(record.meta["split"] for record in records)
    say(f"      {', '.join(KINDS)}: {', '.join(f'{count} {part}' for part, count in parts.items())} rows -> {path}")
    return path


def chosen_rows(records: Sequence[Record], most: Mapping[str, tuple[int | None, ...]]) -> list[Record]:
    """The rows of ``KINDS``, at most as many of each part and kind as ``most`` says, spread evenly over time."""
    places: set[int] = set()
    for part, counts in most.items():
        for kind, count in zip(KINDS, counts, strict=True):
            of_kind = [
                place for place, record in enumerate(records)
                if (record.meta["split"], record.meta["kind"]) == (part, kind)
            ]  # fmt: skip
            wanted = len(of_kind) if count is None else min(count, len(of_kind))
            places |= {of_kind[number * len(of_kind) // wanted] for number in range(wanted)}
    return [records[place] for place in sorted(places)]


def train(data: Path, model_path: Path, adapter: Path, settings: QuickStartSettings) -> None:
    """As ``fine_tune_qwen.py`` does, with settings for a small model and short rows."""
    from stocklora.instruct.sft.run import run_training
    from stocklora.instruct.sft.settings import Resolved, SftSettings

    chosen: dict[str, Any] = TRAINING | {
        "data_path": [data], "model_path": model_path, "output_dir": adapter, "seed": settings.seed,
        "device": settings.device, "num_epochs": settings.epochs or (FAST_EPOCHS if settings.fast else EPOCHS),
    }  # fmt: skip
    sources = {
        field.name: "quick_start.py" if field.name in chosen else "default" for field in dataclasses.fields(SftSettings)
    }
    flags = []
    for name, value in chosen.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value[0] if name == "data_path" else value)]
    if run_training(Resolved(SftSettings(**chosen), sources), "fine_tune_qwen.py", flags):
        raise UserError("training was stopped before its end; go on as said above, or start quick_start.py anew")


def show_answers(adapter: Path) -> None:
    """A row of each kind: what was asked and expected, and what both models said."""
    from stocklora.instruct.evaluation.run import PREDICTIONS

    shown: set[str] = set()
    for line in (adapter / PREDICTIONS).read_text(encoding="utf-8").splitlines():
        row = json_of(line)
        if row.get("kind") in shown:
            continue
        shown.add(row.get("kind"))
        say(f"      {row['prompt'][-1]['content']}".replace("\n", "\n      "))
        for name in ("expected", "base", "tuned"):
            if name in row:
                text = row[name] if name == "expected" else row[name]["answer"]
                say(f"{name:>14}: " + (text.strip() or "(nothing)").replace("\n", "\n" + " " * 16))
        say()
