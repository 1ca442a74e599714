"""Training on one graphics card: every method on a Qwen3-0.6B of random weights, and how much of the card is used.

    python bench/gpu.py                      # some minutes on one GPU, writes bench/results/gpu.json
    python bench/gpu.py --methods lora-packed qlora-2gib
    python bench/gpu.py --ladder             # levers on a step of packed LoRA, bench/gpu_ladder.py; 8 minutes at most
    python bench/gpu.py --tiny --device cpu  # two small layers, to try the script where there is no GPU; --ladder too

Nothing is downloaded: the model is built from its configuration, with a tokenizer that splits digits as Qwen's does,
and the prices are the bundled ones. Each row is one run of what ``train_lora.py`` runs, in a process of its own
(``bench/methods.py``). Random weights cost what trained ones cost; their losses mean nothing and are not shown.

"Of peak" is over the card's bf16 peak without sparsity, as its maker gives it, or that of a large matrix product
measured here where it is not known. Counted are the operations that the method needs: 2 a weight and token forward,
2 for the gradient of what a layer read, 2 for that of its weight where that trains, and half of a square of attention.
What is computed twice (``--gradient_checkpointing``) or beside it (norms, unpacking of 4 bits) counts as nothing.

``assistant-7b`` is ``scripts/qlora/train_qlora.py`` on a model of DeepSeek-7B's shape, allowed 16 GiB of the card; its
tokens are those of answers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, error_of, run_benchmark

QWEN3_0_6B = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip
TINY = QWEN3_0_6B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
DEEPSEEK_7B = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
}  # fmt: skip
TINY_7B = DEEPSEEK_7B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
# Dense bf16 peaks from the makers' data sheets, TFLOP/s; the first name found in the card's counts.
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10G": 70.0,
         "RTX 4090": 165.0, "RTX 3090": 71.0}  # fmt: skip
TICKERS, FIRST = ("AAPL", "IBM", "MSFT"), "2002-01-02"
PACKED = {"batch_size": 16, "epochs": 2, "patience": 2}
QLORA = {"method": "lora", "quantization": "4bit", "gradient_checkpointing": True, "batch_size": 1,
         "gradient_accumulation_steps": 16}  # fmt: skip
# row -> settings of train_lora.py
METHODS: dict[str, dict[str, Any]] = {
    "lora-packed": PACKED | {"method": "lora"},
    "lora-compiled": PACKED | {"method": "lora", "compile": True},
    "lora-checkpointing": PACKED | {"method": "lora", "gradient_checkpointing": True},
    "peft": PACKED | {"method": "peft"},
    "full": PACKED | {"method": "full", "learning_rate": 1e-5},
    "head": PACKED | {"method": "head"},
    "lora-8bit": PACKED | {"method": "lora", "quantization": "8bit"},
    "lora-4bit": PACKED | {"method": "lora", "quantization": "4bit"},
    "qlora-2gib": PACKED | QLORA,
    "250-days": {"method": "lora", "epochs": 20, "patience": 20, "batch_size": 4},
}
ASSISTANT = "assistant-7b"
ASSISTANT_BYTES, ASSISTANT_STEPS = 16 * 2**30, 8
PEAK_TARGET, SECONDS_TARGET, MEMORY_TARGET_MB = 0.35, 15.0, 2 * 2**30 / 1e6
LADDER_MINUTES = 8.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, ASSISTANT), default=[*METHODS, ASSISTANT])
    parser.add_argument("--ladder", action="store_true", help="one row a lever, in place of the methods")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="with --ladder: these alone, after the plain one")
    parser.add_argument(
        "--minutes", type=float, help=f"begin no row that would end later (default: {LADDER_MINUTES:g} with --ladder)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, and fewer days")
    parser.add_argument("--output", type=Path, help="default: bench/results/gpu.json, or gpu_ladder.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    from stocklora.cli.console import UserError, say
    from stocklora.runtime.machine import choose_device

    started = time.perf_counter()
    if arguments.rows and not arguments.ladder:
        raise UserError("bench/gpu.py: --rows are those of --ladder, which is missing")
    device = choose_device(arguments.device)
    if device.type != "cuda" and not arguments.tiny:
        raise UserError("bench/gpu.py: no CUDA device here; --tiny --device cpu tries the script without one")
    minutes = arguments.minutes or (LADDER_MINUTES if arguments.ladder else math.inf)

    def out_of_time(expected_s: float) -> bool:
        return time.perf_counter() - started + expected_s > 60 * minutes

    output = arguments.output or RESULTS / ("gpu_ladder.json" if arguments.ladder else "gpu.json")
    with tempfile.TemporaryDirectory() as scratch:
        (run_ladder if arguments.ladder else run_methods)(arguments, device, Path(scratch), output, out_of_time)
    say(f"took {time.perf_counter() - started:,.0f} s; saved: {output}")
    return 0


def run_methods(
    arguments: argparse.Namespace, device: Any, scratch: Path, output: Path, out_of_time: Callable[[float], bool]
) -> None:
    """Each method as a training run of its own."""
    from bench.methods import measure
    from stocklora.cli.console import print_table, say
    from stocklora.prices.sources.fetch import sample_prices
    from stocklora.prices.tables import write_prices

    peak = card_peak(device)
    judged = device.type == "cuda" and not arguments.tiny
    model, shared, operations = base_and_days(arguments.tiny, scratch)
    last_year = scratch / "last_year.csv"
    write_prices(sample_prices("AAPL", "1y")[0], last_year, {"source": "sample"})
    rows: list[dict[str, Any]] = []
    longest_s = 0.0
    for name in arguments.methods:
        began = time.perf_counter()
        row: dict[str, Any] = {"name": name}
        rows.append(row)
        if out_of_time(longest_s):
            row["error"] = "not measured: no time left"
        else:
            say(f"{name} ...")
            try:
                if name == ASSISTANT:
                    row |= measure_assistant(scratch, device, arguments.tiny)
                else:
                    data = {"data": [str(last_year)]} if name == "250-days" else shared
                    row |= measure(METHODS[name] | data | {"model_path": str(model), "device": device.type}, scratch)
            except RuntimeError as error:  # the other rows are worth having all the same
                say(str(error))
                row["error"] = str(error).splitlines()[-1]
        row["process_s"] = time.perf_counter() - began
        longest_s = max(longest_s, row["process_s"])
        # With ``head`` the base reads each sequence once in a run: its share says nothing.
        if "error" not in row and name not in ("head", ASSISTANT):
            trains_weights = METHODS[name]["method"] == "full"
            row["tflops"] = operations(row["longest_tokens"], trains_weights) * row["tokens_per_s"] / 1e12
            row["of_peak"] = row["tflops"] / peak["tflops"]
        save(output, peak, {"rows": rows, "targets": targets_met(rows) if judged else {}})
    header = ("method", "trainable", "step s", "tokens/s", "of peak", "peak MB", "training s")
    print_table(f"{peak['card']}, bf16 peak {peak['tflops']:,.1f} TFLOP/s", header, [cells(row) for row in rows])
    for name, (value, target, met) in (targets_met(rows) if judged else {}).items():
        say(f"{name}: {value} (target: {target}): {'met' if met else 'not met'}")


def run_ladder(
    arguments: argparse.Namespace, device: Any, scratch: Path, output: Path, out_of_time: Callable[[float], bool]
) -> None:
    """Levers on one training step, each beside what was best before it."""
    from bench.gpu_ladder import LADDER, ladder
    from stocklora.cli.console import UserError, print_table, say

    unknown = [name for name in arguments.rows or () if name not in LADDER]
    if unknown:
        raise UserError(f"--rows: no row is called {unknown[0]}; there are: {', '.join(LADDER)}")
    names = [name for name in LADDER if name in ("plain", *(arguments.rows or LADDER))]
    peak = card_peak(device)
    model, shared, operations = base_and_days(arguments.tiny, scratch)
    settings = METHODS["lora-packed"] | shared
    settings |= {"model_path": str(model), "device": device.type, "save_dir": str(scratch / "run")}
    rows: list[dict[str, Any]] = []

    def finished(found: list[dict[str, Any]], longest_tokens: int) -> None:
        rows[:] = found
        row = rows[-1]
        if "error" in row:
            say(f"{row['name']}: {row['error']}")
        else:
            row["tflops"] = operations(longest_tokens, False) * row["tokens_per_s"] / 1e12
            row["of_peak"] = row["tflops"] / peak["tflops"]
            say(f"{row['name']}: {row['step_s']:.3f} s, {row['of_peak']:.1%} of peak")
        save(output, peak, {"rows": rows})

    ladder(settings, device, names, arguments.tiny, out_of_time, finished)
    header = ("row", "step s", "of best before", "kept", "tokens/s", "of peak", "peak MB", "gradients differ")
    title = f"{peak['card']}, bf16 peak {peak['tflops']:,.1f} TFLOP/s; each row beside what was kept before it"
    print_table(title, header, [ladder_cells(row) for row in rows])


def base_and_days(tiny: bool, scratch: Path) -> tuple[Path, dict[str, Any], Callable[[int, bool], float]]:
    """A base model's folder, settings of the prices to train on, and ``operations_a_token`` of that model."""
    from transformers import Qwen3Config

    from bench.methods import SPLIT, bundled_days
    from stocklora.finetune.memory import shape_of
    from stocklora.finetune.settings import TrainLoraSettings

    model = scratch / "Qwen3-0.6B"
    # No padding token: its embedding would be zero, the first token's too, and a norm of zeros makes the gradients a
    # hundred times larger with every layer.
    make_model(model, Qwen3Config(**(TINY if tiny else QWEN3_0_6B), bos_token_id=0, eos_token_id=0, pad_token_id=None))
    days = bundled_days(scratch, *((TICKERS[:1],) if tiny else (TICKERS, FIRST)))
    shape = shape_of(TrainLoraSettings(model_path=model))
    return model, {"data": [str(days)], **SPLIT}, functools.partial(operations_a_token, shape, model_width(model))


def save(output: Path, peak: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """After each row: a machine may be taken away before the last."""
    import torch

    from stocklora.runtime.files import write_json
    from stocklora.runtime.machine import machine_facts

    write_json(output, {"machine": machine_facts(), "peak": peak, "torch_cuda": torch.version.cuda, **content})


def ladder_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the ladder's table, or the reason why there is none."""
    if "error" in row:
        return [row["name"], "none, see above", *[""] * 6]
    return [
        row["name"], f"{row['step_s']:.3f}", f"{row['of_best_before']:.3f}", "yes" if row["kept"] else "no",
        f"{row['tokens_per_s']:,.0f}", f"{row['of_peak']:.1%}", f"{row['peak_mb']:,.0f}", f"{row['differs']:.1e}",
    ]  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table, or the reason why there is none."""
    if "error" in row:
        return [row["name"], row["error"], "", "", "", "", ""]
    share = f"{100 * row['of_peak']:.1f}%" if "of_peak" in row else "-"
    return [
        row["name"], f"{row['trainable']:,}", f"{row['step_s']:.3f}", f"{row['tokens_per_s']:,.0f}", share,
        f"{row['peak_mb']:,.0f}", f"{row['training_s']:.1f}",
    ]  # fmt: skip


def targets_met(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, bool]]:
    """What was aimed at, what came, and whether that is enough; of the rows that were measured."""
    by_name = {row["name"]: row for row in rows if "error" not in row}
    packed = [row["of_peak"] for name, row in by_name.items() if name in ("lora-packed", "lora-compiled")]
    found = {}
    if packed:
        share = max(packed)
        found["share of peak, packed bf16 LoRA"] = (f"{share:.1%}", f"{PEAK_TARGET:.0%}", share >= PEAK_TARGET)
    if row := by_name.get("250-days"):
        seconds = row["training_s"]
        found["20 epochs over 250 days"] = (f"{seconds:.1f} s", f"{SECONDS_TARGET:.0f} s", seconds <= SECONDS_TARGET)
    if row := by_name.get("qlora-2gib"):
        found["QLoRA of a 0.6B model"] = (
            f"{row['peak_mb']:,.0f} MB", f"{MEMORY_TARGET_MB:,.0f} MB", row["peak_mb"] <= MEMORY_TARGET_MB,
        )  # fmt: skip
    if row := by_name.get(ASSISTANT):
        limit_mb = ASSISTANT_BYTES / 1e6
        found["QLoRA of a 7B model"] = (f"{row['peak_mb']:,.0f} MB", f"{limit_mb:,.0f} MB", row["peak_mb"] <= limit_mb)
    return found


def operations_a_token(shape: Any, width: Mapping[str, int], tokens: int, trains_weights: bool) -> float:
    """Floating point operations of a training step, a token.

    Args:
        shape: ``memory_plan.ModelShape``. width: ``attention``, the heads' total width. tokens: of a sequence.
        trains_weights: of the base; adapters of rank 8 are added otherwise.
    """
    weights = (6.0 if trains_weights else 4.0) * shape.linear_parameters
    adapters = 0.0 if trains_weights else 6.0 * 8 * sum(rows + columns for rows, columns in shape.linear.values())
    # Scores and their sum over values: 2 operations each over half the square, forward and twice that backward.
    attention = 3 * 2 * 2 * (tokens / 2) * width["attention"] * shape.layers
    return weights + adapters + attention


def model_width(folder: Path) -> dict[str, int]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return {"attention": config.num_attention_heads * config.head_dim}


def card_peak(device: Any) -> dict[str, Any]:
    """The device's bf16 peak, TFLOP/s: from its data sheet where known, and that of a matrix product measured here."""
    import torch

    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(3):
        rounds = 20 if device.type == "cuda" else 2
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(rounds):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, rounds * 2 * side**3 / (time.perf_counter() - began) / 1e12)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    known = next((tflops for name, tflops in PEAKS.items() if name in card), None)
    return {"card": card, "tflops": known or best, "from": "data sheet" if known else "measured", "measured": best}


def make_model(folder: Path, config: Any, device: str = "cpu") -> None:
    """A base model folder with random weights, and a tokenizer with digits, and the blank before a sign, as Qwen's."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    special = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [special, *alphabet, "Ġ-"]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[("Ġ", "-")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special, pad_token=special, bos_token=special)
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    torch.manual_seed(0)
    with torch.device(device):  # billions of random numbers take a processor minutes
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def measure_assistant(scratch: Path, device: Any, tiny: bool) -> dict[str, Any]:
    """A few steps of ``train_qlora.py`` in a process of its own, which may have no more than ``ASSISTANT_BYTES``."""
    import torch
    from transformers import LlamaConfig

    model, rows, output = (scratch / name for name in ("deepseek-llm-7b", "rows.jsonl", "assistant"))
    make_model(model, LlamaConfig(**(TINY_7B if tiny else DEEPSEEK_7B), bos_token_id=0, eos_token_id=0), device.type)
    # As long as rows are allowed to be: each character is a token here.
    rows.write_text("".join(
        json.dumps({"instruction": f"Say {number} times what a close is.", "output": f"{number} closes. " * 30}) + "\n"
        for number in range(100, 164)
    ))  # fmt: skip
    limit = ""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        share = ASSISTANT_BYTES / torch.cuda.get_device_properties(device).total_memory
        limit = f"import torch; torch.cuda.set_per_process_memory_fraction({share!r}); "
    script = ROOT / "scripts" / "qlora" / "train_qlora.py"
    flags = ["--model_path", str(model), "--data_path", str(rows), "--output_dir", str(output)]
    flags += ["--batch_size", "2", "--max_length", "256", "--device", device.type, "--max_steps", str(ASSISTANT_STEPS)]
    flags += ["--eval_steps", str(ASSISTANT_STEPS), "--logging_steps", "1"]
    code = f"{limit}import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__')"
    if error := error_of([sys.executable, "-c", code, str(script), *flags], ASSISTANT, cwd=ROOT):
        return error
    info = json.loads((output / "training_info.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [entry["seconds"] for entry in log if "loss" in entry]
    step_s = (times[-1] - times[1]) / (len(times) - 2)
    counts = info["model"]["tokens"]["train"]
    return {
        "trainable": info["model"]["trainable"], "step_s": step_s, "peak_mb": info["peak_memory_mb"],
        "announced_mb": info["model"]["expected_memory_mb"], "training_s": info["seconds"],
        "tokens_per_s": 2 * counts["supervised"] / counts["rows"] / step_s,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
