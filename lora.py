"""LoRA in one file: fine-tune a large model by training two thin matrices beside each frozen one.

A linear layer computes ``h = W x``. Fine-tuning would change ``W`` by some ``dW`` of the same size. LoRA
(Hu et al. 2021, arXiv:2106.09685) assumes that ``dW`` has low rank and trains its two factors alone::

    h = W x + (alpha / rank) B A x        W: (out, in)   A: (rank, in)   B: (out, rank)

``A`` starts random and ``B`` at zero, so the adapted model starts equal to the base, and training can only
move away from it. ``W`` needs no gradient and no optimizer state, and can carry several adapters by name.

    apply_lora(model, LoRAConfig(rank=8, alpha=16))  # freezes the model, adds A and B, returns layer names
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-4)
    ...
    torch.save(lora_state_dict(model), "a.pth")      # a few MB; load_lora_state_dict brings it back
    merge(model)                                     # W <- W + (alpha / rank) B A, no cost at inference

Variants (DoRA, PiSSA, trained biases, quantized bases), a faster kernel and files, PEFT's too, are in
``stocklora/adapters``: a configuration whose ``layer`` returns a subclass of ``LoRALayer``.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL_LINEAR = "all-linear"
DEFAULT_ADAPTER = "default"


class LoRAError(ValueError):
    """A request that cannot be met as asked; the message is one line that says what exists."""


# ---------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how strongly; a value out of range is a ``LoRAError``.

    Args:
        rank: inner width of the update; the parameters added are ``rank * (in + out)`` a layer.
        alpha: the update is scaled by ``alpha / rank``, so that a change of rank needs no new learning rate.
        dropout: probability of dropping an input of ``A`` while training.
        target_modules: ``"all-linear"`` (all but the output head), or dotted names or their ends (``"q_proj"``).
        rslora: scale by ``alpha / sqrt(rank)``, for high ranks (Kalajdzievski 2023, arXiv:2312.03732).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, Iterable) and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))  # JSON's lists become hashable
        targets, numbers = self.target_modules, (self.alpha, self.dropout)
        alpha, dropout = (x if type(x) in (int, float) and math.isfinite(x) else -1.0 for x in numbers)
        named = isinstance(targets, str | tuple) and bool(targets) and all(isinstance(x, str) and x for x in targets)
        for name, rule, holds in (
            ("rank", "a whole number of at least 1", type(self.rank) is int and self.rank >= 1),
            ("alpha", "a positive number", alpha > 0),
            ("dropout", "at least 0 and below 1", 0 <= dropout < 1),
            ("target_modules", f"{ALL_LINEAR!r} or module names", named),
            ("rslora", "False or True", self.rslora in (False, True)),
        ):
            if not holds:
                raise LoRAError(f"{name} must be {rule}, not {getattr(self, name)!r}")

    @property
    def scaling(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def layer(self, base: nn.Module, name: str) -> LoRALayer:
        """The layer to put in the place of ``base``, called ``name`` in errors. Variants return one of their own."""
        return base if isinstance(base, LoRALayer) else LoRALayer(base)


# --------------------------------------------------------------------------------------------- the layer


class LoRALayer(nn.Module):
    """A linear layer with adapters beside it: ``y = base(x) + (alpha / rank) B A dropout(x)``.

    ``A`` and ``B`` stay in float32, since the small steps of training would round away in bfloat16; they compute in the
    base's type. A variant overrides ``PARTS``, ``shapes``, ``reset``, ``forward_adapted`` and ``merged_weight``.

    Args:
        base: ``nn.Linear`` or a subclass that quantizes, or GPT-2's ``Conv1D``, which keeps its weight as (in, out).
    """

    PARTS: tuple[str, ...] = ("lora_A", "lora_B")  # a ParameterDict each: adapter -> parameter
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        for part in self.PARTS:
            setattr(self, part, nn.ParameterDict())
        self.configs: dict[str, LoRAConfig] = {}
        self.active = DEFAULT_ADAPTER
        self.disabled = self.merged = False
        self.transposed = is_conv1d(base)
        self.train(base.training)

    @property
    def features(self) -> tuple[int, int]:
        """(out, in); not from the weight's shape, as a quantized weight is packed."""
        base: Any = self.base
        return (base.nf, base.weight.shape[0]) if self.transposed else (base.out_features, base.in_features)

    # What code around a linear layer reads of it: type and device of its weight, its sizes.
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    out_features = property(lambda self: self.features[0])
    in_features = property(lambda self: self.features[1])

    def shapes(self, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of the parts that an adapter has here."""
        return {"lora_A": (config.rank, self.in_features), "lora_B": (self.out_features, config.rank)}

    def add_adapter(self, name: str, config: LoRAConfig, initialize: bool = True) -> None:
        """Put a fresh adapter beside the base; all zero where its weights are about to be loaded."""
        for part, shape in self.shapes(config).items():
            getattr(self, part)[name] = nn.Parameter(torch.zeros(shape, device=self.base.weight.device))  # type: ignore
        self.configs[name] = config
        if initialize:
            self.reset(name)

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Start an adapter whose parts are zero: ``A`` Kaiming-uniform, as ``nn.Linear`` does it."""
        nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))

    def parts(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by the name of their part."""
        return {part: getattr(self, part)[name] for part in self.PARTS if name in getattr(self, part)}

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Whether an adapter's parameters need a gradient."""
        for parameter in self.parts(name).values():
            parameter.requires_grad_(trainable)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        as_base = self.disabled or self.merged or self.active not in self.configs
        return self.base(x) if as_base else self.forward_adapted(x)

    def forward_adapted(self, x: Tensor) -> Tensor:
        """What ``forward`` gives with the active adapter."""
        y = self.base(x)  # (..., in) (in, out) -> (..., out)
        x = F.dropout(x.to(y.dtype), self.configs[self.active].dropout, self.training)
        return y + self.update(x, self.lora_A[self.active], self.lora_B[self.active])

    def update(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """``(alpha / rank) B A x``, never forming ``B A``."""
        z = F.linear(x, A.to(x.dtype)) * self.configs[self.active].scaling  # (..., in) (in, rank) -> (..., rank)
        return F.linear(z, B.to(x.dtype))  # (..., rank) (rank, out) -> (..., out)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W + (alpha / rank) B A``, added in float32, in the base's layout and type."""
        A, B = self.lora_A[self.active].float(), self.lora_B[self.active].float()
        W = (self.weight.t() if self.transposed else self.weight).float()  # (out, in)
        W = torch.addmm(W, B, A, alpha=self.configs[self.active].scaling)  # (out, rank) (rank, in) -> (out, in)
        return (W.t() if self.transposed else W).to(self.weight.dtype).contiguous()

    def lay_aside(self, name: str) -> None:
        """Keep the base's parameter ``name`` as it is now, in a buffer, so that it follows to another device."""
        self.register_buffer(f"aside_{name}", getattr(self.base, name).detach().clone(), persistent=False)

    def swap(self) -> None:
        """Exchange the base's parameters with those laid aside. A Parameter stays the same object."""
        for buffer, aside in list(self.named_buffers(recurse=False)):
            parameter = getattr(self.base, buffer.removeprefix("aside_"))
            setattr(self, buffer, parameter.data)
            parameter.data = aside.to(parameter.dtype)


# ------------------------------------------------------------------------------------------ finding layers


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, told by name so that transformers need not be there."""
    return "Conv1D" in {cls.__name__ for cls in type(module).__mro__} and hasattr(module, "nf")


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can adapt this module; ``MultiheadAttention`` reads its projection without calling it."""
    if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return is_conv1d(module)
    W = module.weight
    if type(module).forward is nn.Linear.forward or type(W) is not nn.Parameter or not W.is_floating_point():
        return True  # a packed weight has a forward of its own
    with contextlib.suppress(Exception):  # a subclass, such as a router that also chooses, is tried
        y = module(x := torch.linspace(-1, 1, 2 * W.shape[1]).to(W).view(2, -1))
        return y.is_meta or torch.allclose(y, F.linear(x, W, module.bias), 1e-2)
    return False


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that LoRA can adapt, or has adapted, by the dotted name it has in the base model."""
    adapted = lora_layers(model)
    inside = tuple(f"{name}." for name in adapted)
    named = ((name, module) for name, module in model.named_modules() if name and not name.startswith(inside))
    return {name: module for name, module in named if is_linear(adapted[name].base if name in adapted else module)}


def output_heads(model: nn.Module) -> set[nn.Module]:
    heads = {module for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"}
    for module in model.modules():
        if callable(getter := getattr(module, "get_output_embeddings", None)):
            with contextlib.suppress(NotImplementedError, AttributeError):
                heads.add(getter())
    return heads


def find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Full names of the layers that ``target_modules`` selects, in the model's order.

    Raises:
        LoRAError: a name selects nothing, or something that is no linear layer; the message lists what exists.
    """
    layers = linear_layers(model)
    if not layers:
        raise LoRAError(f"no linear layer inside {type(model).__name__}")
    if target_modules == ALL_LINEAR:
        heads = output_heads(model)
        return [name for name, module in layers.items() if module not in heads]
    chosen: set[str] = set()
    ends = sorted({name.rpartition(".")[2] for name in layers})
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        # A full name means that one layer, even if another layer's name happens to end with it.
        matches = [target] if target in layers else [name for name in layers if name.endswith(f".{target}")]
        if not matches:
            near = difflib.get_close_matches(target, ends, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            other = [m for n, m in model.named_modules() if n == target or n.endswith(f".{target}")]
            what = f"is a {type(other[0]).__name__}, not a linear layer" if other else "matches no layer"
            raise LoRAError(f"target {target!r} {what}{hint}; linear layers here end in: {', '.join(ends)}")
        chosen.update(matches)
    return [name for name in layers if name in chosen]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters on the model, in the order they came."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.configs))


def adapter_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoRALayer]:
    """The layers that carry ``adapter`` (by default, the active one), or an error that says which exist."""
    layers = lora_layers(model)
    if not layers:
        raise LoRAError("the model has no LoRA layers; call apply_lora first")
    carrying = {name: layer for name, layer in layers.items() if (adapter or layer.active) in layer.configs}
    if not carrying:
        raise LoRAError(f"no adapter named {adapter!r}; the model has: {', '.join(adapter_names(model))}")
    return carrying


# ------------------------------------------------------------------------------- applying and switching


def apply_lora(
    model: nn.Module, config: LoRAConfig, adapter: str = DEFAULT_ADAPTER, initialize: bool = True
) -> list[str]:
    """Freeze ``model``, put a LoRA layer in the place of each target, and make ``adapter`` the active one.

    Returns their dotted names. Reentrant gradient checkpointing needs ``model.enable_input_require_grads()`` too.

    Raises:
        LoRAError: a target matches nothing, the adapter's name is taken, another adapter is merged, or a layer has no
            use for a variant. Nothing has changed then.
    """
    names = find_targets(model, config.target_modules)
    attach(model, names, config, adapter, initialize)
    return names


def attach(model: nn.Module, names: list[str], config: LoRAConfig, adapter: str, initialize: bool = True) -> None:
    """Put an adapter on the layers ``names``, all zero unless ``initialize``; as ``apply_lora``."""
    if not re.fullmatch(r"\w[\w-]*", adapter) or hasattr(nn.ParameterDict(), adapter):
        raise LoRAError(f"cannot name an adapter {adapter!r}; use letters, digits, '_' and '-'")
    if taken := [name for name, layer in lora_layers(model).items() if adapter in layer.configs]:
        raise LoRAError(f"adapter {adapter!r} is already on {len(taken)} layers ({taken[0]}, ...); use another name")
    refuse(model, "add an adapter", "merged")
    for name, layer in {name: config.layer(model.get_submodule(name), name) for name in names}.items():
        model.set_submodule(name, layer)
        layer.add_adapter(adapter, config, initialize)
    model.requires_grad_(False)  # a head of yours can be turned on again afterwards
    set_adapter(model, adapter)


def refuse(model: nn.Module, action: str, *states: str) -> None:
    """Raise a LoRAError where an adapter is in one of ``states``: ``merged``, ``disabled``."""
    ways_out = {"merged": "while an adapter is merged; call unmerge first", "disabled": "inside adapters_disabled"}
    for state in states:
        if any(getattr(layer, state) for layer in lora_layers(model).values()):
            raise LoRAError(f"cannot {action} {ways_out[state]}")


def set_adapter(model: nn.Module, adapter: str) -> None:
    """Compute with this adapter, and let it alone be trained; layers that do not carry it act as the base."""
    adapter_layers(model, adapter)
    refuse(model, "switch adapters", "merged")
    for layer in lora_layers(model).values():
        layer.active = adapter
        for name in layer.configs:
            layer.set_trainable(name, name == adapter)


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """An adapter's parameters (by default the active one's): ``<layer>.lora_A``, ``<layer>.lora_B``, ..."""
    layers = adapter_layers(model, adapter).items()
    return {f"{name}.{part}": p for name, layer in layers for part, p in layer.parts(adapter or layer.active).items()}


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable adapter parameters, for an optimizer."""
    return (parameter for parameter in adapter_parameters(model).values() if parameter.requires_grad)


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model inside the block, merged or not; nests, and ends in order when the block raises."""
    switched = [layer for layer in lora_layers(model).values() if not layer.disabled]

    def switch(disabled: bool) -> None:
        for layer in switched:
            layer.disabled = disabled
            layer.swap()

    switch(True)
    try:
        yield
    finally:
        switch(False)


# ------------------------------------------------------------------------------------------------- merging


def merge(model: nn.Module) -> None:
    """``W <- W + (alpha / rank) B A`` for the active adapter, in every layer or in none; or what its variant computes.

    The original weights are laid aside, so ``unmerge`` restores them bit for bit. Merging twice changes nothing more.

    Raises:
        LoRAError: a merged weight would not be finite, a base is quantized, or a weight is shared with another
            module that would change with it. Nothing has changed then.
    """
    layers = {name: layer for name, layer in adapter_layers(model).items() if not layer.merged}
    if layers:
        refuse(model, "merge", "disabled")
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    weights: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.active not in layer.lora_A:
            continue  # a variant that leaves the weight alone
        if not layer.weight.is_floating_point() or layer.weight.numel() != math.prod(layer.features):
            kind = f"quantized ({type(layer.base).__name__})"
            raise LoRAError(f"{name} is {kind}: load the base model unquantized and merge into that")
        if users[id(layer.weight)] > 1:
            raise LoRAError(f"the weight of {name} is shared with another module; untie them before merging")
        weights[name] = layer.merged_weight()
        if not torch.isfinite(weights[name]).all():
            raise LoRAError(f"merging would put numbers that are not finite into {name}; the adapter is broken")
    for name, layer in layers.items():
        layer.merged = True
        if name in weights:
            layer.lay_aside("weight")
            layer.weight.data = weights[name]


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, bit for bit. Does nothing when not merged."""
    merged = [layer for layer in lora_layers(model).values() if layer.merged]
    if merged:
        refuse(model, "unmerge", "disabled")
    for layer in merged:
        layer.merged = False
        if (aside := layer._buffers.pop("aside_weight", None)) is not None:
            layer.weight.data = aside


def remove_lora(model: nn.Module) -> None:
    """Put the plain layers back in place: with the adapter in their weights if merged, as they were if not."""
    for name, layer in lora_layers(model).items():
        if not (layer.merged or layer.disabled):
            layer.swap()
        model.set_submodule(name, layer.base)


# --------------------------------------------------------------------------------------------------- state


def lora_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Copies, on the CPU, of an adapter's parameters by name."""
    refuse(model, "read an adapter", "disabled")
    return {name: p.detach().to("cpu", copy=True) for name, p in adapter_parameters(model, adapter).items()}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], adapter: str | None = None) -> None:
    """Fill an adapter (by default the active one) from ``state``, all of it or nothing.

    Raises:
        LoRAError: names are missing or unexpected, or shapes differ, all named at once; or the adapter is merged.
    """
    parts = adapter_parameters(model, adapter)
    refuse(model, "load an adapter", "merged", "disabled")
    check_state({name: tuple(parameter.shape) for name, parameter in parts.items()}, state)
    with torch.no_grad():
        for name, parameter in parts.items():
            parameter.copy_(state[name])


def check_state(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Raise a LoRAError that names what ``state`` lacks, has too much, or has in another shape than expected."""
    faults = [f"{'missing' if key in expected else 'unexpected'} {key}" for key in expected.keys() ^ state.keys()]
    for key in expected.keys() & state.keys():
        if not isinstance(state[key], Tensor) or not state[key].is_floating_point():
            faults.append(f"{key} is no tensor of floating-point numbers")
        elif tuple(state[key].shape) != expected[key]:
            faults.append(f"{key} is {tuple(state[key].shape)}, the model needs {expected[key]}")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise LoRAError(f"the adapter does not fit the model: {'; '.join(sorted(faults)[:8])}{more}")
