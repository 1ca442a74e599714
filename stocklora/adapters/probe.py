"""Which layers an adapter would be lost on, found by trying instead of by names.

Some models read a layer's weight themselves and never call it (the step projection of Mamba's kind), change weights
between training and use, or have a fast path that goes around a layer. An adapter there gets no gradient, or is another
function in training than in use. Random adapters on all layers at once tell, in a few passes over a few tokens.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

import lora
from stocklora.adapters.layer import AdapterConfig, attach
from stocklora.base_models.quantized import dense_weight

PROBE = "probe"
RANK = 4
STRENGTH = 0.3  # of the update's size to its weight's
Read = Callable[[], Tensor]  # a pass over the same tokens: (batch, tokens, hidden)


def kind_of(name: str) -> str:
    """A layer's name with its numbers left out: ``layers.3.mlp.up_proj`` -> ``layers.*.mlp.up_proj``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def lost_adapters(model: nn.Module, names: Iterable[str], read: Read) -> dict[str, str]:
    """Names of layers that an adapter would be lost on, each with the reason.

    A layer that the pass did not call, such as an expert that no token was sent to, is believed where another of its
    kind works. The model is as it was afterwards, random state included.

    Args:
        model: without adapters; in train or eval mode.
        names: of the layers that are to be adapted.
        read: a pass of the model as it is used in training and in forecasts.
    """
    asked, device = list(names), next(model.parameters()).device
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    shared = [name for name in asked if users[id(model.get_submodule(name).weight)] > 1]
    reason = "its weight is also another layer's, so an adapter could not be merged into it"
    lost = dict.fromkeys(shared, reason)
    if not (names := [name for name in asked if name not in lost]):
        return lost
    was_training = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            with probed(model, names):
                lost |= without_gradient(model, names, read)
                if trusted := [name for name in names if name not in lost]:
                    lost |= different_in_use(model, trusted, read)
            first = {kind_of(name): name for name in reversed(names) if name not in lost}
            whole = [name for name in first.values() if _is_whole(model.get_submodule(name))]
            if whole:
                with probed(model, whole):
                    wrong = different_when_merged(model, whole, read)
                lost |= {name: wrong[kind_of(name)] for name in names if kind_of(name) in wrong and name not in lost}
        finally:
            model.train(was_training)
    return {name: lost[name] for name in asked if name in lost}


@contextlib.contextmanager
def probed(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Random adapters on the layers ``names``, about a third as large as their weights; gone afterwards."""
    needs_grad = {parameter for parameter in model.parameters() if parameter.requires_grad}
    attach(model, names, AdapterConfig(RANK, RANK), PROBE, initialize=False)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            A, B = layer.lora_A[PROBE], layer.lora_B[PROBE]
            for part in (A, B):
                part.copy_(torch.randn(part.shape, generator=draw))
            size = (B.T @ B @ A @ A.T).trace().sqrt()  # |B A|
            B.mul_(STRENGTH * dense_weight(layer.base).norm().to(B.device) / size.clamp_min(1e-12))
    try:
        yield
    finally:
        lora.remove_lora(model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in needs_grad)


def without_gradient(model: nn.Module, names: list[str], read: Read) -> dict[str, str]:
    """Layers whose adapters got no gradient in a training pass, unless they just had no token in it."""
    layers = lora.lora_layers(model)
    called: set[str] = set()
    hooks = [layers[name].register_forward_hook(lambda *_, name=name: called.add(name)) for name in names]
    model.train()
    with torch.enable_grad():
        output = read().float()
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.device)
        if output.requires_grad:
            (output * direction).sum().backward()
    for hook in hooks:
        hook.remove()
    alive = {name for name in names if all(_has_gradient(part) for part in layers[name].parts(PROBE).values())}
    model.zero_grad(set_to_none=True)
    kinds = {kind_of(name) for name in alive}
    lost: dict[str, str] = {}
    for name in names:
        if name in alive or (name not in called and kind_of(name) in kinds):
            continue
        reason = "what it computes reaches no forecast" if name in called else "the model never calls it"
        lost[name] = f"{reason}, so an adapter on it would learn nothing"
    return lost


def different_in_use(model: nn.Module, names: list[str], read: Read) -> dict[str, str]:
    """Layers, kind by kind, whose adapters are another function in training than in use."""
    layers = lora.lora_layers(model)
    if _agrees(model, read):
        return {}
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    lost: dict[str, str] = {}
    for members in kinds.values():
        for name, layer in layers.items():
            layer.disabled = name not in members
        if not _agrees(model, read):
            lost |= dict.fromkeys(members, "an adapter on it acts otherwise in training than in a forecast")
    for layer in layers.values():
        layer.disabled = False
    return lost


def different_when_merged(model: nn.Module, names: list[str], read: Read) -> dict[str, str]:
    """Kinds of layers whose adapters are another function once they are in the weights."""
    layers, model = lora.lora_layers(model), model.eval()

    def merged_apart(only: set[str]) -> bool:
        for name, layer in layers.items():
            layer.disabled = name not in only
        beside, base = _read(read), _read_without(model, read)
        for name, layer in layers.items():
            if name in only:
                layer.lay_aside("weight")
                layer.weight.data, layer.merged = layer.merged_weight(), True
        try:
            return _far(beside, _read(read), base, model)
        finally:
            for name, layer in layers.items():
                layer.disabled = False
                if name in only:
                    layer.merged, layer.weight.data = False, layer._buffers.pop("aside_weight")  # type: ignore[assignment]

    if not merged_apart(set(names)):
        return {}
    reason = "merging an adapter into it would make another function of it"
    return {kind_of(name): reason for name in names if merged_apart({name})}


def _is_whole(layer: nn.Module) -> bool:
    """Whether a weight can be merged into: it is not quantized, and no other module's too."""
    return isinstance(layer.weight, Tensor) and layer.weight.is_floating_point() and layer.weight.ndim == 2


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _agrees(model: nn.Module, read: Read) -> bool:
    """Whether train and eval mode give the same, as far as the adapters make it."""
    base, trained = _read_without(model.train(), read), _read(read)
    base_in_use, used = _read_without(model.eval(), read), _read(read)
    if _far(base, base_in_use, trained, model):  # the base itself does not: nothing that an adapter could mend
        return True
    return not _far(trained, used, base, model)


def _far(first: Tensor, second: Tensor, base: Tensor, model: nn.Module) -> bool:
    """Whether two outputs differ by more than rounding, over what the adapters changed.

    By the median token: rounding can send a single token to another expert.
    """
    apart = (first - second).norm(dim=-1).median()
    changed = (first - base).norm(dim=-1).median()
    precise = next(model.parameters()).dtype == torch.float32
    if not (apart + changed).isfinite():  # too large for a half-precision type: nothing is known
        return False
    return bool(apart > (1e-2 if precise else 0.2) * changed)


@torch.no_grad()
def _read(read: Read) -> Tensor:
    return read().float()


@torch.no_grad()
def _read_without(model: nn.Module, read: Read) -> Tensor:
    """With the base alone."""
    on = [layer for layer in lora.lora_layers(model).values() if not layer.disabled]
    for layer in on:
        layer.disabled = True
    try:
        return read().float()
    finally:
        for layer in on:
            layer.disabled = False
