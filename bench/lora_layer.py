"""Our LoRA layer against PEFT's: time of a training step and peak memory, on the same model and ranks.

    python bench/lora_layer.py                                   # writes bench/results/lora_layer.json
    python bench/lora_layer.py --model_path models/SmolLM2-135M  # a model of yours instead of random weights
    python bench/lora_layer.py --loss language --output /tmp/language.json

Each variant runs in a process of its own, so that its peak memory is its own; both are alive at once and take
turns step by step, so that whatever else the machine does falls on both. A step is forward, backward and an
AdamW update. Ratios below 1 mean that ours is faster or smaller. Where other programs want the cores, give
``--threads 1`` and read the processor time, above all its least value: a step that is put aside, or finds its
caches taken, can only become slower.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import RESULTS

VARIANTS = ("ours", "peft")
MEASURES = {
    "step_s": "step [s]",
    "step_cpu_s": "step, CPU time [s]",
    "step_cpu_least_s": "... the least of all [s]",
    "peak_mb": "peak memory [MB]",
    "training_mb": "... above the model [MB]",
}


def build_parser() -> argparse.ArgumentParser:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="folder of a base model (default: SmolLM2-135M's shape, random weights)")
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2's shape (default: %(default)s, all)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="timed steps a variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: as torch chooses)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16_autocast", "bf16_base"),
        default=["fp32", "bf16_autocast", "bf16_base"],
        help="fp32; bf16 autocast over an fp32 base; a bf16 base, as train_lora.py (default: all three)",
    )
    parser.add_argument(
        "--loss",
        choices=("forecast", "language"),
        default="forecast",
        help="forecast: the backbone and a small head, as train_lora.py; language: next-token loss over the "
        "vocabulary, whose logits outweigh the layers in memory (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "lora_layer.json")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, print a table, write the JSON."""
    args = build_parser().parse_args(argv)
    if args.worker:
        work(args)
        return 0
    results = []
    for precision in args.precision:
        results.append(compare(args, precision))
    settings = {key: value for key, value in vars(args).items() if key not in ("worker", "output", "threads")}
    from stocklora.runtime.files import write_json
    from stocklora.runtime.machine import machine_facts

    facts = {**machine_facts(), "threads": args.threads or None}
    write_json(args.output, {"settings": settings, "machine": facts, "results": results})
    print(f"{'':32}{'ours':>10}{'peft':>10}{'ratio':>8}")
    for result in results:
        for name, label in MEASURES.items():
            ours, peft = (result[variant][name] for variant in VARIANTS)
            print(f"{result['precision'] + ' ' + label:32}{ours:10.2f}{peft:10.2f}{result['ratio'][name]:8.3f}")
    return 0


def compare(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Both variants in one precision, a step at a time in turn: ABBA, so that neither always comes first."""
    print(f"{precision}: loading", file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        workers = {variant: stack.enter_context(worker(args, variant, precision)) for variant in VARIANTS}
        steps: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for variant in VARIANTS:
            ask(workers[variant], "step")  # the first step allocates, and is not counted
        for repeat in range(args.repeats):
            for variant in VARIANTS if repeat % 2 == 0 else reversed(VARIANTS):
                steps[variant].append(ask(workers[variant], "step"))
            print(f"{precision}: {repeat + 1}/{args.repeats}", file=sys.stderr, flush=True)
        results = {variant: ask(workers[variant], "report") for variant in VARIANTS}
    for variant in VARIANTS:
        for name in ("step_s", "step_cpu_s"):
            results[variant][name] = statistics.median(step[name] for step in steps[variant])
        results[variant]["step_cpu_least_s"] = min(step["step_cpu_s"] for step in steps[variant])
        results[variant]["steps"] = steps[variant]
    ratio = {name: results["ours"][name] / results["peft"][name] for name in MEASURES}
    return {"precision": precision, **results, "ratio": ratio}


@contextlib.contextmanager
def worker(args: argparse.Namespace, variant: str, precision: str) -> Iterator[subprocess.Popen[str]]:
    """A process that steps when asked."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", variant, "--precision", precision]
    command += ["--rank", str(args.rank), "--dropout", str(args.dropout), "--tokens", str(args.tokens)]
    command += ["--batch_size", str(args.batch_size), "--loss", args.loss, "--threads", str(args.threads)]
    command += ["--layers", str(args.layers)]
    command += ["--model_path", args.model_path] if args.model_path else []
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.communicate()  # closes its stdin, at which it ends


def ask(process: subprocess.Popen[str], request: str) -> dict[str, Any]:
    """Send one request and wait for its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit("a worker failed; what it said stands above")
    return json.loads(answer)


def work(args: argparse.Namespace) -> None:
    """The worker: builds the model, then answers requests from stdin."""
    import peft  # in both variants, so that what is compared is the layer and not the weight of an import
    import torch

    from stocklora.adapters.layer import AdapterConfig, apply_lora
    from stocklora.runtime.machine import keep_freed_memory

    keep_freed_memory()  # on both sides, as train_lora.py does: else the system clears pages for every step
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = args.precision[0]
    torch.manual_seed(0)
    model = build_model(args, torch.bfloat16 if precision == "bf16_base" else torch.float32).to(device)
    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    tokens = torch.randint(vocabulary, (args.batch_size, args.tokens), device=device)
    head = torch.randn(width, device=device) / width**0.5
    if args.worker == "ours":
        apply_lora(model, AdapterConfig(args.rank, 2.0 * args.rank, args.dropout))
    else:
        config = peft.LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout, target_modules=peft_targets(model)
        )
        model = peft.get_peft_model(model, config)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    loaded_mb, loss, first_loss = resident_mb(), float("nan"), None

    def step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16_autocast"):
            if args.loss == "language":
                total = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                hidden = model(input_ids=tokens, use_cache=False).last_hidden_state
                total = ((hidden.float() @ head) - 1.0).square().mean()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()  # waits for the device

    for line in sys.stdin:
        if line.strip() == "step":
            started, cpu_started = time.perf_counter(), time.process_time()
            loss = step()
            answer: dict[str, Any] = {
                "step_s": time.perf_counter() - started,
                "step_cpu_s": time.process_time() - cpu_started,
            }
            first_loss = loss if first_loss is None else first_loss
        else:
            peak_mb = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_resident_mb()
            answer = {"peak_mb": peak_mb, "loaded_mb": loaded_mb, "training_mb": peak_mb - loaded_mb}
            answer |= {"trainable": sum(p.numel() for p in parameters), "first_loss": first_loss, "last_loss": loss}
        print(json.dumps(answer), flush=True)


def build_model(args: argparse.Namespace, dtype: Any) -> Any:
    """The base model from a folder, or SmolLM2-135M's shape with random weights."""
    import transformers

    if args.model_path:
        auto = transformers.AutoModelForCausalLM if args.loss == "language" else transformers.AutoModel
        return auto.from_pretrained(args.model_path, dtype=dtype)
    config = transformers.LlamaConfig(
        hidden_size=576,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    kind = transformers.LlamaForCausalLM if args.loss == "language" else transformers.LlamaModel
    return kind(config).to(dtype)


def peft_targets(model: Any) -> list[str]:
    """The same layers by name: PEFT's own ``all-linear`` wants a model with an output head."""

    from lora import ALL_LINEAR, find_targets

    return find_targets(model, ALL_LINEAR)


def resident_mb() -> float:
    """Memory that this process holds now (on CUDA: that its tensors hold)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def peak_resident_mb() -> float:
    """The most memory that this process ever held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


if __name__ == "__main__":
    sys.exit(main())
