"""Every way to tune the assistant on the same rows: step time, memory, file size, held-out loss before and after.

    python bench/instruct.py                                   # SmolLM2-135M; see docs/benchmarks.md for the time
    python bench/instruct.py --methods lora lora-packed --steps 20
    python bench/instruct.py --db finance_analysis.db --model_path models/Qwen2.5-0.5B-Instruct --device cuda

Each method is one run of ``fine_tune_qwen.py`` as a user starts it, in a process of its own, so that its peak memory
is its own. The rows are those of ``build_instruction_dataset.py``, the same for all; a step's time is the median of
all steps but the first two. ``lora-packed`` reads the same rows laid into sequences. Writes
bench/results/instruct.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, error_of, run_benchmark, save_result

MAX_LENGTH = 1024
# name -> flags of fine_tune_qwen.py
METHODS: dict[str, list[str]] = {
    "full": [],
    "lora": ["--use_lora"],
    "qlora-8bit": ["--use_qlora", "--quantization_bit", "8"],
    "qlora-4bit": ["--use_qlora", "--quantization_bit", "4"],
    # One sequence of MAX_LENGTH tokens is about as much as four rows and their padding.
    "lora-packed": ["--use_lora", "--packing", "--batch_size", "1"],
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--db", type=Path, help="news database (default: the bundled one)")
    parser.add_argument("--rows", type=int, default=120, help="instruction rows (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step (default: %(default)s)")
    parser.add_argument("--lora_r", type=int, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=RESULTS / "instruct.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.base_models.folders import check_model_folder
    from stocklora.cli.console import print_table, say
    from stocklora.instruct.news.dataset import InstructionSettings, build_dataset
    from stocklora.instruct.rows.records import write_records

    check_model_folder(arguments.model_path)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        built = build_dataset(InstructionSettings(db=arguments.db, num_samples=arguments.rows, output=data))
        write_records(built.records, data, "alpaca")
        settings = {name: getattr(arguments, name) for name in ("rows", "steps", "batch_size", "lora_r", "device")}
        settings |= {"model": arguments.model_path.name, "db": "bundled" if arguments.db is None else arguments.db.name}
        rows = []
        for name in arguments.methods:
            say(f"{name} ...")
            rows.append({"name": name, **measure(name, data, arguments, Path(scratch) / name)})
            save_result(arguments.output, {"settings": settings, "rows": rows})
    print_table(f"{arguments.model_path.name}, {arguments.steps} steps", HEADER, [cells(row) for row in rows])
    say(f"saved: {arguments.output}")
    return 0


HEADER = ("method", "trainable", "step s", "answer tokens/s", "peak MB", "announced MB", "file MB", "held-out loss")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table, or the reason why there is none."""
    if "error" in row:
        return [row["name"], row["error"], *[""] * (len(HEADER) - 2)]
    return [
        row["name"], f"{row['trainable']:,}", f"{row['step_s']:.2f}", f"{row['answer_tokens_per_s']:,.0f}",
        f"{row['peak_mb']:,}", f"{row['announced_mb']:,}", f"{row['file_mb']:,.1f}",
        f"{row['loss_before']:.3f} -> {row['loss_after']:.3f}",
    ]  # fmt: skip


def measure(name: str, data: Path, arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    """One training run in a process of its own; ``{"error": ...}`` where it says in a line why it cannot be."""
    flags: dict[str, Any] = {
        "model_path": arguments.model_path, "data_path": data, "output_dir": output, "max_steps": arguments.steps,
        "num_epochs": 1000, "eval_steps": arguments.steps, "batch_size": arguments.batch_size,
        "gradient_accumulation_steps": 1, "lora_r": arguments.lora_r, "max_length": MAX_LENGTH, "logging_steps": 1,
        "device": arguments.device,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "fine_tune_qwen.py")]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    if error := error_of([*command, *METHODS[name]], name):
        return error
    info = json.loads((output / "training_info.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    times = {entry["step"]: entry["seconds"] for entry in log if "loss" in entry}
    step_s = statistics.median(times[step] - times[step - 1] for step in range(3, arguments.steps + 1))
    counts = info["model"]["tokens"]["train"]
    rows_a_step = arguments.batch_size if name != "lora-packed" else counts["rows"] / info["model"]["sequences"]
    weights = "model.safetensors" if info["method"] == "full" else "adapter_model.safetensors"
    return {
        "trainable": info["model"]["trainable"],
        "step_s": step_s,
        "answer_tokens_per_s": counts["supervised"] / counts["rows"] * rows_a_step / step_s,
        "peak_mb": info["peak_memory_mb"],
        "announced_mb": info["model"]["expected_memory_mb"],
        "file_mb": (output / weights).stat().st_size / 1e6,
        "loss_before": info["losses"]["validation_start"],
        "loss_after": info["losses"]["validation_best"],
        "number_format": info["dtype"],
    }


if __name__ == "__main__":
    sys.exit(main())
