"""Training on one graphics card: every method on a Qwen3-0.6B of random weights, and how much of the card is used.

    python bench/gpu.py                      # some minutes on one GPU, writes bench/results/gpu.json
    python bench/gpu.py --methods lora-packed qlora-2gib
    python bench/gpu.py --tiny --device cpu  # two small layers, to try the script where there is no GPU

Nothing is downloaded: the model is built from its configuration, with a tokenizer that splits digits as Qwen's does,
and the prices are the bundled ones. Each row is one run of what ``train_lora.py`` runs, in a process of its own
(``bench/methods.py``). Random weights cost what trained ones cost; their losses mean nothing and are not shown.

"Of peak" is over the card's bf16 peak without sparsity, as its maker gives it, or that of a large matrix product
measured here where it is not known. Counted are the operations that the method needs: 2 a weight and token forward,
2 for the gradient of what a layer read, 2 for that of its weight where that trains, and half of a square of attention.
What is computed twice (``--gradient_checkpointing``) or beside it (norms, unpacking of 4 bits) counts as nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, run_benchmark

QWEN3_0_6B = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip
TINY = QWEN3_0_6B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
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
PEAK_TARGET, SECONDS_TARGET, MEMORY_TARGET_MB = 0.40, 15.0, 2 * 2**30 / 1e6


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, and fewer days")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(build_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from bench.methods import SPLIT, bundled_days, measure
    from stocklora.cli.console import UserError, print_table, say
    from stocklora.finetune.memory import shape_of
    from stocklora.finetune.settings import TrainLoraSettings
    from stocklora.prices.sources.fetch import sample_prices
    from stocklora.prices.tables import write_prices
    from stocklora.runtime.files import write_json
    from stocklora.runtime.machine import choose_device, machine_facts

    device = choose_device(arguments.device)
    if device.type != "cuda" and not arguments.tiny:
        raise UserError("bench/gpu.py: no CUDA device here; --tiny --device cpu tries the script without one")
    started = time.perf_counter()
    peak = card_peak(device)
    judged = device.type == "cuda" and not arguments.tiny
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "Qwen3-0.6B"
        make_model(model, TINY if arguments.tiny else QWEN3_0_6B)
        shape = shape_of(TrainLoraSettings(model_path=model))
        years = bundled_days(Path(scratch), *((TICKERS[:1],) if arguments.tiny else (TICKERS, FIRST)))
        last_year = Path(scratch) / "last_year.csv"
        write_prices(sample_prices("AAPL", "1y")[0], last_year, {"source": "sample"})
        for name in arguments.methods:
            settings = METHODS[name] | {"model_path": str(model), "device": device.type}
            if name == "250-days":
                settings["data"] = [str(last_year)]
            else:
                settings |= {"data": [str(years)], **SPLIT}
            say(f"{name} ...")
            began = time.perf_counter()
            try:
                found = measure(settings, Path(scratch))
            except RuntimeError as error:  # the other rows are worth having all the same
                say(str(error))
                found = {"error": str(error).splitlines()[-1]}
            row = {"name": name, **found, "process_s": time.perf_counter() - began}
            if "error" not in row:
                trains_weights = settings["method"] == "full"
                # With ``head`` the base reads each sequence once in a run: its share says nothing.
                if settings["method"] != "head":
                    operations = operations_a_token(shape, model_width(model), row["longest_tokens"], trains_weights)
                    row["tflops"] = operations * row["tokens_per_s"] / 1e12
                    row["of_peak"] = row["tflops"] / peak["tflops"]
            rows.append(row)
            # After each row: a machine may be taken away before the last.
            facts = {"machine": machine_facts(), "peak": peak, "torch_cuda": torch.version.cuda}
            facts |= {
                "seconds": time.perf_counter() - started,
                "rows": rows,
                "targets": targets_met(rows) if judged else {},
            }
            write_json(arguments.output, facts)
    header = ("method", "trainable", "step s", "tokens/s", "of peak", "peak MB", "training s")
    print_table(f"{peak['card']}, bf16 peak {peak['tflops']:,.1f} TFLOP/s", header, [cells(row) for row in rows])
    for name, (value, target, met) in (targets_met(rows) if judged else {}).items():
        say(f"{name}: {value} (target: {target}): {'met' if met else 'not met'}")
    say(f"took {time.perf_counter() - started:,.0f} s; saved: {arguments.output}")
    return 0


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
        rounds = 20
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


def make_model(folder: Path, shape: Mapping[str, Any]) -> None:
    """A base model folder with random weights, and a tokenizer with digits, and the blank before a sign, as Qwen's."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    special = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [special, *alphabet, "Ġ-"]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[("Ġ", "-")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special, pad_token=special, bos_token=special)
    torch.manual_seed(0)
    # No padding token in the configuration: its embedding would be zero, the first token's too, and a norm of zeros
    # makes the gradients a hundred times larger with every layer.
    config = Qwen3Config(**shape, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
