"""What a training run takes in memory, by method and option, told before any weight is read.

Counted: the weights, gradients and Adam's two moments of what trains, the activations kept for the backward pass (see
``base_models/memory.py``), the copies of the best epoch (in the machine's memory), and the program itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llm_model import blocks_of, facts_of, padded_tokens, text_config_of
from lora import LoRAError, find_targets, linear_layers
from stocklora.base_models import memory as sizes
from stocklora.base_models.loading import (
    UNLOADABLE,
    backbone_class,
    backbone_config,
    first_layers,
    language_model,
    unloadable,
)
from stocklora.base_models.memory import FLOAT_BYTES, Memory
from stocklora.base_models.split import inside_last_layers
from stocklora.cli.console import UserError, print_table, say
from stocklora.dataset.prepare import Example
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.batches import FORECAST_TOKENS, MEMORY_BYTES, training_tokens

FEWER_LAYERS = 8  # to adapt, in the plan of a run that adapts all


@dataclass(frozen=True)
class ModelShape:
    """A base model's sizes, from its configuration.

    Attributes:
        parameters: all of the backbone's. linear: (out, in) of the linear layers by name. targets: those to adapt.
        blocks: names of the layers of the stack, in order, each with its dot; none where no stack is found.
    """

    hidden: int
    inner: int
    layers: int
    parameters: int
    linear: dict[str, tuple[int, int]]
    targets: tuple[str, ...]
    blocks: tuple[str, ...] = ()

    def adapted(self, last_layers: int | None) -> list[tuple[int, int]]:
        """(out, in) of the layers to adapt, in the whole model or in the last so many layers of its stack."""
        inside = self.blocks[-last_layers:] if last_layers is not None else ("",)
        return [self.linear[name] for name in self.targets if name.startswith(inside)]

    @property
    def linear_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.linear.values())


@dataclass(frozen=True)
class Setup:
    """What the cost depends on.

    Attributes:
        width: bytes of a number that the base computes in. tokens: padded tokens of one forward and backward pass.
        longest: tokens of the longest sequence. head: numbers of the forecast head.
        adapt_layers: the last so many layers are adapted; None for all. kept: tokens whose states are kept with it.
    """

    method: str
    quantization: str
    checkpointing: bool
    rank: int
    dora: bool
    width: int
    tokens: int
    longest: int
    on_cpu: bool
    head: int
    adapt_layers: int | None = None
    kept: int = 0


def shape_of(settings: TrainLoraSettings, config: Any = None) -> ModelShape:
    """The base model's sizes; no weight is read or made.

    Args:
        config: the ``backbone_config`` of all its layers, where it was read before.

    Raises:
        UserError: a configuration that cannot be read, or targets that the model does not have.
    """

    try:
        if config is None:
            config = backbone_config(settings.model_path, None, settings.trust_remote_code)
        config = first_layers(config, settings.backbone_layers)
        with torch.device("meta"):
            model = language_model(
                backbone_class(config).from_config(config, trust_remote_code=settings.trust_remote_code)
            )
    except UNLOADABLE as error:
        raise unloadable(settings.model_path, "layers", error, settings.backbone_layers) from None
    names = settings.target_modules
    try:
        targets = find_targets(model, "all-linear" if names == ["all-linear"] else names)
    except LoRAError as error:
        raise UserError(str(error)) from None
    if settings.adapt_layers is not None:
        inside_last_layers(model, targets, settings.adapt_layers)
    blocks = {id(block) for block in blocks_of(model)}
    places = [f"{name}." for name, module in model.named_modules() if id(module) in blocks]
    facts, config = facts_of(config), text_config_of(config)
    linear = {}
    for name, layer in linear_layers(model).items():
        rows, columns = layer.weight.shape  # type: ignore[union-attr, misc]
        linear[name] = (int(columns), int(rows)) if type(layer).__name__ == "Conv1D" else (int(rows), int(columns))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(
        facts.hidden_size, sizes.inner_size(config), facts.layers, parameters, linear, tuple(targets), tuple(places)
    )


def tokens_of_a_step(settings: TrainLoraSettings, device_type: str, longest: int, sequences: int) -> int:
    """Padded tokens of the largest pass of a training step.

    Args:
        longest: tokens of the longest sequence.
        sequences: of a step.
    """
    most = training_tokens(settings.max_tokens_per_batch, device_type)
    return longest * sequences if most is None else min(longest * sequences, max(longest, most))


def setup_of(
    settings: TrainLoraSettings, shape: ModelShape, examples: Sequence[Example], dtype: torch.dtype, device: Any
) -> Setup:
    """What a run of these settings depends on.

    Args:
        examples: to learn from.
    """
    longest = padded_tokens(max(len(example.encoded.input_ids) for example in examples))
    tokens = tokens_of_a_step(settings, device.type, longest, min(settings.batch_size, len(examples)))
    outputs = examples[0].scale.shape[1] * 9
    kept = sum(len(example.encoded.input_ids) for example in examples)
    return Setup(
        settings.method, settings.quantization, settings.gradient_checkpointing, settings.lora_rank, settings.use_dora,
        dtype.itemsize, tokens, longest, device.type == "cpu", (shape.hidden + 1) * outputs, settings.adapt_layers,
        kept,
    )  # fmt: skip


def cost_of(shape: ModelShape, setup: Setup) -> Memory:
    """The memory that ``setup`` takes, in training or in a forecast, whichever takes more."""
    adapted = shape.adapted(setup.adapt_layers)
    trainable = setup.head
    if setup.method == "full":
        trainable += shape.parameters
    elif setup.method != "head":
        trainable += sum(setup.rank * (rows + columns) + rows * setup.dora for rows, columns in adapted)
    # Gradient and two moments; the state of the start and that of the best epoch, which lie in the machine's memory.
    state = sizes.optimizer_bytes(trainable) + (2 * trainable * FLOAT_BYTES if setup.on_cpu else 0)
    transient = _activations(shape, setup, adapted)
    program = sizes.PROGRAM_MB if setup.on_cpu else 0.0
    return Memory(trainable, _weights(shape, setup) / 1e6, state / 1e6, transient / 1e6, program)


def _weights(shape: ModelShape, setup: Setup) -> float:
    """Bytes of the base and, for a method with adapters, of the float32 adapters beside it."""
    linear, others = shape.linear_parameters, shape.parameters - shape.linear_parameters
    if setup.method == "full":
        return shape.parameters * FLOAT_BYTES
    each = {"none": float(setup.width), "8bit": sizes.INT8_BYTES, "4bit": sizes.NF4_BYTES}[setup.quantization]
    adapters = 0
    if setup.method != "head":
        adapters = sum(setup.rank * sum(sizes) for sizes in shape.adapted(setup.adapt_layers)) * FLOAT_BYTES
    return linear * each + others * setup.width + adapters


def _activations(shape: ModelShape, setup: Setup, adapted: Sequence[tuple[int, int]]) -> float:
    """Bytes at the peak of a training step, or of a forecast if that takes more."""
    low = setup.width < FLOAT_BYTES
    passing = (4 * shape.hidden + 3 * shape.inner) * setup.width  # a token's, where nothing is kept
    largest = max((rows * columns for rows, columns in shape.linear.values()), default=0)
    # A quantized weight is unpacked for each use; in a full run the weights are kept in the type it computes in too.
    unpacked = 2.0 * largest * setup.width if setup.quantization != "none" else 0.0
    if setup.method == "head":
        return passing * setup.longest + unpacked
    a_token = sizes.bytes_a_token(shape.hidden, shape.inner, setup.width, setup.method == "full")
    if setup.method == "full" and low:
        unpacked = float(shape.linear_parameters * setup.width)
    if setup.method == "peft" and low:  # PEFT turns the input of each adapter to float32 and keeps that
        a_token += sum(columns for _, columns in adapted) * FLOAT_BYTES / shape.layers
    if setup.method == "peft" and setup.dora:  # and its DoRA keeps the wide outputs and the weights they came from
        a_token += sum(rows for rows, _ in adapted) * (setup.width + FLOAT_BYTES) / shape.layers
        unpacked += sum(rows * columns for rows, columns in adapted) * FLOAT_BYTES
    elif setup.dora:
        unpacked += 2.0 * largest * FLOAT_BYTES
    layers = shape.layers if setup.adapt_layers is None else setup.adapt_layers
    training = sizes.backward_bytes(setup.tokens, a_token, shape.hidden, layers, setup.width, setup.checkpointing)
    kept = 0.0
    if layers < shape.layers and setup.on_cpu:  # what enters them, in the machine's memory or else in a file
        kept = min(float(setup.kept * shape.hidden * setup.width), MEMORY_BYTES)
    return max(training, passing * max(FORECAST_TOKENS, setup.longest)) + unpacked + kept


def print_plan(shape: ModelShape, setup: Setup) -> None:
    """What this run is expected to take, and a table of it beside its alternatives."""
    own = cost_of(shape, setup)
    say(f"{'memory expected':<19} about {own.total_mb:,.0f} MB")
    if setup.method == "full":
        size = shape.parameters * FLOAT_BYTES / 1e6
        say(f"{'weights file':<19} about {size:,.0f} MB, the whole base, unless the weights stay at the start")
    adapters = setup.method if setup.method in ("lora", "peft") else "lora"
    ways = [
        setup,
        replace(setup, method="head", quantization="none", checkpointing=False, adapt_layers=None),
        replace(setup, method=adapters, quantization="none", checkpointing=False),
        replace(setup, method=adapters, quantization="none", checkpointing=False, adapt_layers=fewer_layers(shape)),
        replace(setup, method=adapters, quantization="none", checkpointing=True),
        replace(setup, method=adapters, quantization="8bit", checkpointing=setup.checkpointing),
        replace(setup, method=adapters, quantization="4bit", checkpointing=setup.checkpointing),
        replace(setup, method="full", quantization="none", checkpointing=setup.checkpointing, dora=False,
                adapt_layers=None),
    ]  # fmt: skip
    rows = []
    for way in dict.fromkeys(ways):
        cost = cost_of(shape, way)
        cells = (cost.weights_mb, cost.state_mb, cost.activations_mb, cost.program_mb, cost.total_mb)
        mark = "this run: " if way == setup else ""
        rows.append([mark + flags_of(way), f"{cost.trainable:,}", *(f"{cell:,.0f}" for cell in cells)])
    header = ["", "trainable", "weights", "gradients, optimizer", "activations", "program", "total"]
    print_table(sizes.memory_title(setup.tokens, setup.on_cpu), header, rows)


def fewer_layers(shape: ModelShape) -> int | None:
    """The last layers to adapt where less is to train than all: ``FEWER_LAYERS``, if there are more."""
    return FEWER_LAYERS if len(shape.blocks) > FEWER_LAYERS else None


def flags_of(setup: Setup) -> str:
    """A way as it is typed."""
    words = [f"--method {setup.method}"]
    words += [f"--quantization {setup.quantization}"] if setup.quantization != "none" else []
    words += [f"--adapt_layers {setup.adapt_layers}"] if setup.adapt_layers is not None else []
    words += ["--gradient_checkpointing"] if setup.checkpointing else []
    return " ".join(words)


def warn_if_too_large(shape: ModelShape, setup: Setup, device: torch.device) -> None:
    """Before anything large is read: a warning where this run is not expected to fit, and what would."""
    sizes.warn_if_short(cost_of(shape, setup).total_mb, device, lambda free: f". {advice(shape, setup, free)}")


def advice(shape: ModelShape, setup: Setup, free_mb: float) -> str:
    """The change that fits and costs least, in a sentence."""
    if setup.method == "full":
        ways = [replace(setup, checkpointing=True), replace(setup, method="lora")]
    elif setup.method == "head":
        ways = [replace(setup, quantization="4bit")]
    else:
        smaller = replace(setup, tokens=setup.longest)
        fewer = fewer_layers(shape) if setup.adapt_layers is None else setup.adapt_layers
        ways = [
            smaller,
            replace(smaller, adapt_layers=fewer),
            replace(smaller, checkpointing=True),
            replace(smaller, checkpointing=True, quantization="8bit"),
            replace(smaller, checkpointing=True, quantization="4bit"),
        ]
    for way in ways:
        cost = cost_of(shape, way)
        if cost.total_mb <= sizes.WARN_AT * free_mb:
            alone = " --max_tokens_per_batch 1" if way.tokens < setup.tokens else ""
            return f"Expected to fit, with {cost.total_mb:,.0f} MB: {flags_of(way)}{alone}"
    return "Use a smaller base model, --backbone_layers, or a shorter --max_tokens_per_sequence"
