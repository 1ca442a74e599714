"""The page before the first step: what trains, on which tokens, what is cut off, the memory, and one row as it is seen.

Most failed runs could have been seen to fail here: targets that match nothing, answers cut off, a loss on the wrong
tokens, memory that is not there.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stocklora.adapters.survey import HEAD, NO_LINEAR, print_survey
from stocklora.base_models import memory as sizes
from stocklora.base_models.memory import FLOAT_BYTES, Memory
from stocklora.cli.console import print_table, say, warn
from stocklora.instruct.rows.chat_template import IGNORED, end_token_id
from stocklora.instruct.sft.data import EncodedRow, InstructionData
from stocklora.instruct.sft.settings import SftSettings
from stocklora.instruct.sft.setup import Prepared

HEAD_TOKENS, HEAD_COLUMNS = 4096, 32768  # TRL computes the output head in tiles of so many tokens and tokens' scores
MOST_SCORES = 3 * HEAD_TOKENS * HEAD_COLUMNS  # more than a pass on a CPU has at once; see trainer.AnswerTrainer
SPARE_MB = 256.0  # that ``machine.keep_freed_memory`` lets the C library hold
OPEN, CLOSE = "⟦", "⟧"  # around supervised tokens where there are no colours
SHOWN_PROMPT, SHOWN_ANSWER = 700, 900  # characters of the example


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of some rows; ``supervised`` is what the loss is taken on."""

    rows: int
    tokens: int
    supervised: int
    lost: int
    rows_cut: int
    longest: int

    @property
    def share(self) -> float:
        return self.supervised / max(1, self.tokens)


def count_tokens(rows: Sequence[EncodedRow]) -> TokenCounts:
    encoded = [row.encoded for row in rows]
    return TokenCounts(
        rows=len(encoded),
        tokens=sum(len(row.input_ids) for row in encoded),
        supervised=sum(row.supervised for row in encoded),
        lost=sum(row.lost_tokens for row in encoded),
        rows_cut=sum(row.lost_tokens > 0 for row in encoded),
        longest=max((len(row.input_ids) for row in encoded), default=0),
    )


def expected_memory(prepared: Prepared, load: PassLoad) -> Memory:
    """Arithmetic on the model's sizes, see ``base_models/memory.py``.

    Args:
        load: what the largest forward and backward pass holds.
    """
    model, width, on_cpu = prepared.model, prepared.dtype.itemsize, prepared.device.type == "cpu"
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Memory(
        trainable,
        weights_mb=_weight_bytes(model) / 1e6,
        state_mb=sizes.optimizer_bytes(trainable) / 1e6,
        activations_mb=_activation_bytes(model, prepared.settings, load.tokens, width) / 1e6,
        program_mb=sizes.PROGRAM_MB + SPARE_MB if on_cpu else 0.0,
        head_mb=_head_bytes(model, load, width, on_cpu) / 1e6,
    )


def _weight_bytes(model: Any) -> float:
    """Bytes of all weights, those of quantized layers with their scales."""
    total = 0.0
    for parameter in model.parameters():
        each = float(parameter.element_size())
        total += parameter.numel() * each
        if _is_4bit(parameter):  # two codes in a byte, and their scales
            total += 2 * parameter.numel() * (sizes.NF4_BYTES - 0.5)
        elif type(parameter).__name__ == "Int8Params":
            total += parameter.numel() * (sizes.INT8_BYTES - each)
    return total


def _activation_bytes(model: Any, settings: SftSettings, tokens: int, width: int) -> float:
    """Bytes at the peak of a training step, but for the head, of ``tokens`` a pass and ``width`` bytes a number."""
    config = model.config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    full, low = settings.method == "full", width < FLOAT_BYTES
    a_token = sizes.bytes_a_token(hidden, sizes.inner_size(config), width, full)
    adapted_inputs = sum(weight.shape[1] for name, weight in model.named_parameters() if ".lora_A." in name)
    if not full and adapted_inputs:
        # Each adapter keeps its input, and with dropout a mask and what it let through.
        copies = 1 + (settings.lora_dropout > 0) * 1.25
        a_token += copies * adapted_inputs * (FLOAT_BYTES if low else width) / layers
    activations = sizes.backward_bytes(tokens, a_token, hidden, layers, width, settings.gradient_checkpointing)
    linear = [
        _numbers(weight)
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "lora_" not in name and "embed" not in name
    ]
    if settings.quantization != "none":
        activations += 2.0 * max(linear, default=0) * width  # unpacked for each use
    elif full and low:
        activations += sum(linear) * width  # autocast's copies
    return activations


def _head_bytes(model: Any, load: PassLoad, width: int, on_cpu: bool) -> float:
    """Bytes of the output head's scores."""
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    hidden = int(model.config.get_text_config().hidden_size)
    if on_cpu and load.scored * vocabulary <= MOST_SCORES:
        # Scores of the kept positions with their gradient, and three float32 copies of the supervised ones.
        return vocabulary * (2.0 * width * load.scored + 3.0 * FLOAT_BYTES * load.supervised)
    # A tile of scores in the computing type; where no Triton kernel folds it, the backward pass has eight in float32.
    tile = min(load.tokens, HEAD_TOKENS) * min(vocabulary, HEAD_COLUMNS)
    return tile * (width + (8 if on_cpu else 0) * FLOAT_BYTES) + 2 * load.tokens * hidden * FLOAT_BYTES


@dataclass(frozen=True)
class PassLoad:
    """The largest forward and backward pass: its padded tokens, those supervised, and those whose scores are computed.

    Rows are scored at the positions that are supervised in any of them; see ``trainer.AnswerTrainer``.
    """

    tokens: int
    supervised: int
    scored: int


def load_of_a_pass(settings: SftSettings, rows: Sequence[EncodedRow], counts: TokenCounts) -> PassLoad:
    together = min(settings.batch_size, len(rows))
    if settings.packing:
        longest, most = settings.max_length, round(counts.share * settings.max_length)
    else:
        longest, most = counts.longest, max((row.encoded.supervised for row in rows), default=0)
    return PassLoad(longest * together, most * together, min(longest, most * together) * together)


def matched_modules(model: Any) -> Counter[str]:
    """How many layers carry an adapter, by the last part of their names."""
    adapted = (name for name, module in model.named_modules() if len(getattr(module, "lora_A", ())))
    return Counter(name.rpartition(".")[2] for name in adapted)


def print_preflight(prepared: Prepared, *, steps: int, sequences: int) -> dict[str, Any]:
    """Print the page; the same facts are returned, for training_info.json.

    Args:
        steps: that the run will take at most.
        sequences: that an epoch has, which are fewer than rows when packed.
    """
    settings, data, tokenizer = prepared.settings, prepared.data, prepared.tokenizer
    total = sum(_numbers(parameter) for parameter in prepared.model.parameters())
    modules = matched_modules(prepared.model)
    counts = {name: count_tokens(rows) for name, rows in data.parts.items()}
    load = load_of_a_pass(settings, data.train, counts["train"])
    memory = expected_memory(prepared, load)
    trainable = memory.trainable
    say()
    say("Pre-flight")
    _print_fact("model", f"{settings.model_path} ({total:,} parameters)")
    quantized = f", {settings.quantization} weights" if settings.quantization != "none" else ""
    _print_fact(
        "method", f"{settings.method}{quantized}, {str(prepared.dtype).removeprefix('torch.')} on {prepared.device}"
    )
    if modules:
        _print_fact("adapted layers", f"{sum(modules.values())}: " + ", ".join(f"{k} x{n}" for k, n in modules.items()))
    _print_fact("trainable", f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f}%)")
    end = tokenizer.convert_ids_to_tokens(end_token_id(tokenizer))
    _print_fact("tokens", f"answers end with {end}, padding {tokenizer.pad_token}")
    _print_steps(data, settings, steps, sequences)
    _print_token_counts(counts, data, settings)
    print_survey(prepared.survey)
    _print_memory(memory, load, prepared.device)
    _warn_of_disk(settings, trainable)
    print_example(tokenizer, data.train[0])
    return {
        "parameters": total,
        "trainable": trainable,
        "adapted_layers": dict(modules),
        "left_out": {kind.name: kind.note for kind in prepared.survey if kind.note not in ("", NO_LINEAR, HEAD)},
        "sequences": sequences,
        "expected_memory_mb": round(memory.total_mb),
        "tokens": {name: c.__dict__ | {"share_supervised": round(c.share, 4)} for name, c in counts.items()},
    }


def _print_steps(data: InstructionData, settings: SftSettings, steps: int, sequences: int) -> None:
    rows = len({(row.record.file, row.record.row) for row in data.train})
    packed = f", packed into {sequences:,} sequences" if settings.packing else ""
    if rows < len(data.train):
        # See chat_template.encode_answers.
        packed = f", {len(data.train):,} sequences as the chat template writes their earlier answers otherwise{packed}"
    _print_fact("steps", f"{steps:,} at most, {settings.num_epochs} epochs of {rows:,} rows{packed}")


def _print_token_counts(counts: Mapping[str, TokenCounts], data: InstructionData, settings: SftSettings) -> None:
    """The table of tokens by part, and warnings of rows that are left out, cut or missing."""
    print_table(
        "Tokens",
        ("part", "rows", "tokens", "supervised", "share", "longest row", "rows cut", "tokens lost"),
        [
            (name, f"{c.rows:,}", f"{c.tokens:,}", f"{c.supervised:,}", f"{100 * c.share:.1f}%", f"{c.longest:,}",
             f"{c.rows_cut:,}", f"{c.lost:,}")
            for name, c in counts.items()
        ],
    )  # fmt: skip
    for reason, number in data.skipped.items():
        warn(f"{number} row(s) {reason} left out")
    if counts["train"].rows_cut:
        c = counts["train"]
        warn(
            f"--max_length {settings.max_length} cuts {c.rows_cut} of {c.rows} training rows: their ends, and so the "
            f"token that ends the answer, are not learned; give a larger one, or shorter rows"
        )
    if not data.validation:
        warn("no validation rows: nothing tells when the model begins to learn its rows by heart")


def _print_memory(memory: Memory, load: PassLoad, device: torch.device) -> None:
    """The table of expected memory, and a warning where less is free."""
    print_table(
        sizes.memory_title(load.tokens, device.type == "cpu"),
        ("weights", "gradients, optimizer", "activations", "output head", "program", "total"),
        [[f"{part:,.0f}" for part in (memory.weights_mb, memory.state_mb, memory.activations_mb, memory.head_mb,
                                      memory.program_mb, memory.total_mb)]],
    )  # fmt: skip
    # This process holds the weights already, and on a CPU they count as free for it.
    needed = memory.total_mb - (memory.weights_mb if device.type != "cpu" else 0.0)
    advice = "; try --batch_size 1, --gradient_checkpointing, --use_qlora or a smaller --max_length"
    sizes.warn_if_short(needed, device, lambda free: advice)


def print_example(tokenizer: Any, row: EncodedRow) -> None:
    """One row as the model sees it, with what is supervised marked: green on a terminal, in brackets elsewhere."""
    pairs = zip(row.encoded.labels, row.encoded.input_ids, strict=True)
    spans = []
    for marked, run in itertools.groupby(pairs, lambda pair: pair[0] != IGNORED):
        text = tokenizer.decode([token for _, token in run])
        spans.append((marked, _shortened(text, SHOWN_ANSWER if marked else SHOWN_PROMPT)))
    cut = f" (cut: {row.encoded.lost_tokens} tokens lost)" if row.encoded.lost_tokens else ""
    say(f"Example: {row.record.where}{cut}; the loss is taken on what is marked")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        Console().print(Text.assemble(*((text, "bold green" if marked else "dim") for marked, text in spans)))
    else:
        say("".join(f"{OPEN}{text}{CLOSE}" if marked else text for marked, text in spans))
    say()


def _shortened(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} [...] {text[-half:]}"


def _print_fact(name: str, words: str) -> None:
    say(f"{name:<16}{words}")


def _is_4bit(parameter: Any) -> bool:
    return type(parameter).__name__ == "Params4bit"


def _numbers(parameter: Any) -> int:
    """How many numbers a parameter holds; a byte of 4-bit weights holds two."""
    return int(parameter.numel()) * (2 if _is_4bit(parameter) else 1)


def _warn_of_disk(settings: SftSettings, trainable: int) -> None:
    # A checkpoint holds the weights that train and two moments of each; the best one is kept beside the last ones.
    needed = trainable * FLOAT_BYTES * 3 * (settings.save_total_limit + 1)
    folder = settings.output_dir.absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if needed > sizes.WARN_AT * free:
        warn(
            f"{settings.save_total_limit + 1} checkpoints take about {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB "
            f"of the disk are free; lower --save_total_limit or free some space"
        )
