"""What of a base model is adapted, in which number format, and what is not: a table by kind of layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import lora
from stocklora.adapters.probe import kind_of
from stocklora.cli.console import print_table

NO_LINEAR, HEAD, EXPERTS = "no linear layer", "output head", "experts in one tensor"
LEAST_SHARE = 0.01  # of all weights: smaller ones are listed only if they are linear layers
QUANTIZED = {"Linear8bitLt": "int8", "Linear4bit": "nf4"}


@dataclass(frozen=True)
class LayerKind:
    """The layers of one kind.

    Attributes:
        name: with ``*`` for the numbers in it. layers: how many. parameters: of the weights of all of them.
        dtype: that the weights are stored in. note: why it is not adapted; empty where it is.
    """

    name: str
    layers: int
    parameters: int
    dtype: str
    note: str

    @property
    def adapted(self) -> bool:
        """Whether adapters stand beside these layers."""
        return not self.note


def survey_of(backbone: nn.Module, fields: Mapping[str, Any], lost: Mapping[str, str]) -> list[LayerKind]:
    """Every kind of linear layer and of large weight (embeddings, experts), in the model's order.

    Args:
        backbone: without adapters. fields: of ``AdapterConfig``; none for a method without adapters.
        lost: layers that were left out, with the reason of each.
    """
    if not fields:
        return []
    adapted, linear = set(lora.find_targets(backbone, fields["target_modules"])), lora.linear_layers(backbone)
    heads = lora.output_heads(backbone)
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for name, module in backbone.named_modules():
        for part, weight in module.named_parameters(recurse=False):
            if part == "bias" or (weight.squeeze().ndim < 2 and type(module).__name__ not in QUANTIZED):
                continue
            if name in linear:
                out_features, in_features = lora.LoRALayer(linear[name]).features
                other = HEAD if linear[name] in heads else "not asked for"
                note = "" if name in adapted else lost.get(name, other)
                key, count = (kind_of(name), number_format(module, weight), note), out_features * in_features
            else:
                full = f"{name}.{part}" if part != "weight" else name
                experts = "expert" in f"{full} {type(module).__name__}".lower()
                stacked = EXPERTS if experts else "matrices in one tensor"
                convolves = isinstance(module, nn.modules.conv._ConvNd)
                note = stacked if weight.ndim == 3 and not convolves else NO_LINEAR
                key, count = (kind_of(full), number_format(module, weight), note), weight.numel()
            kinds.setdefault(key, []).append(count)
    found = [LayerKind(name, len(counts), sum(counts), dtype, note) for (name, dtype, note), counts in kinds.items()]
    least = LEAST_SHARE * sum(kind.parameters for kind in found)
    return [kind for kind in found if kind.note != NO_LINEAR or kind.parameters >= least]


def print_survey(survey: Sequence[LayerKind]) -> None:
    """Which kinds of layers are adapted, in which format their weights are, and which are not and why."""
    if not survey:
        return
    total = sum(kind.parameters for kind in survey)
    rows = [
        [kind.name, kind.dtype, f"{kind.layers:,}", f"{100 * kind.parameters / total:.1f}%", kind.note or "adapted"]
        for kind in survey
    ]
    print_table("Layers of the base model", ["", "weights in", "layers", "of all weights", "LoRA"], rows)


def number_format(module: nn.Module, weight: Tensor) -> str:
    """What a weight is stored in."""
    return QUANTIZED.get(type(module).__name__, str(weight.dtype).removeprefix("torch."))
