"""LoRA in one file: fine-tune a large model by training two thin matrices beside each frozen one.

A linear layer computes ``h = W x``. Fine-tuning would change ``W`` by some ``dW`` of the same size. LoRA
(Hu et al. 2021, arXiv:2106.09685) assumes that ``dW`` has low rank and trains its two factors alone::

    h = W x + (alpha / rank) B A x        W: (out, in)   A: (rank, in)   B: (out, rank)

``A`` starts random and ``B`` at zero, so the adapted model starts equal to the base, and training can only
move away from it. At rank 8 that is about 2% of the weights of a 135M model. ``W`` needs no gradient and no
optimizer state, may be quantized, and can carry several named adapters.

    config = LoRAConfig(rank=8, alpha=16)
    apply_lora(model, config)                        # freezes the model, adds A and B, returns layer names
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-4)
    ...
    save_lora(model, "adapter.safetensors")          # a few MB; load_lora(model, path) brings it back
    merge(model)                                     # W <- W + (alpha / rank) B A, no cost at inference

Sections: configuration, the arithmetic, the layer, finding layers, applying and switching, merging, state,
files, PEFT folders. This file needs torch alone (and safetensors to write that format).
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
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
    """What to adapt and how strongly.

    Args:
        rank: inner width of the update; the parameters added are ``rank * (in + out)`` a layer.
        alpha: the update is scaled by ``alpha / rank``, so that a change of rank needs no new learning rate.
        dropout: probability of dropping an input of ``A`` while training.
        target_modules: ``"all-linear"`` (every linear layer but the output head), or names: a full dotted
            name, or its end from a dot on (``"q_proj"``, ``"self_attn.q_proj"``).

    Raises:
        LoRAError: a value is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise LoRAError(f"rank must be a whole number of at least 1, not {self.rank!r}")
        if not _is_number(self.alpha) or self.alpha <= 0:
            raise LoRAError(f"alpha must be a positive number, not {self.alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise LoRAError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        targets = self.target_modules
        if not isinstance(targets, str):
            targets = tuple(targets) if isinstance(targets, Iterable) else ()
            object.__setattr__(self, "target_modules", targets)  # a list, as JSON gives it, becomes hashable
        if not targets or not all(isinstance(name, str) and name for name in targets):
            raise LoRAError(f"target_modules must be {ALL_LINEAR!r} or module names, not {targets!r}")

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @classmethod
    def from_dict(cls, content: Any) -> LoRAConfig:
        """The inverse of ``dataclasses.asdict``; an unknown key is a ``LoRAError``."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(content) - set(known)) if isinstance(content, Mapping) else [repr(content)]
        if unknown:
            raise LoRAError(f"unknown LoRA setting {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**content)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------------------------------- the arithmetic


class _FrozenLinearLoRA(torch.autograd.Function):
    """``y = x W' + bias + s (x A') B'`` for a frozen ``W``, with no wide temporary and no second copy of ``x``.

    Written as separate operations, the update costs three tensors as wide as ``y`` (``B A x``, its scaled copy,
    the sum) and under autocast keeps low-precision copies of ``W`` and ``x`` until the backward pass. Here the
    update is added in place, the scale goes into the small ``B``, and what is kept is what exists anyway.

    Shapes: x (..., in), weight (out, in), bias (out,) or None, A (rank, in), B (out, rank); returns (..., out)
    in ``dtype``. For the gradient g of y: ``gx = g W + s (g B) A``, ``gA = s (g B)' x``, ``gB = s g' (x A')``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (n, in)
        y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))  # (n, out)
        z = F.linear(rows, A.to(dtype))  # (n, rank)
        y.addmm_(z, B.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, weight, A, B, z)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, A, B, z = ctx.saved_tensors
        dtype = grad.dtype
        gx = gA = gB = None
        with torch.autocast(x.device.type, enabled=False):  # the casts below are all there should be
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (n, in)
            g = grad.reshape(-1, grad.shape[-1])  # (n, out)
            low_A = A.to(dtype)
            if torch.is_grad_enabled():  # a second derivative is wanted: z must lead back to x and A
                z = F.linear(rows, low_A)
            gz = g @ (B.to(dtype) * ctx.scaling)  # (n, rank)
            if ctx.needs_input_grad[0]:
                gx = (g @ weight.to(dtype)).addmm_(gz, low_A).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[3]:
                gA = (gz.t() @ rows).to(A.dtype)
            if ctx.needs_input_grad[4]:
                # (z' g)' rather than g' z: the same numbers, and up to three times faster at a small rank.
                gB = (z.t() @ g).t().to(B.dtype) * ctx.scaling
        return gx, None, None, gA, gB, None, None


# --------------------------------------------------------------------------------------------- the layer


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _is_quantized(module: nn.Module) -> bool:
    """bitsandbytes' layers, told by name so that the package need not be there."""
    return bool(_class_names(module) & {"Linear4bit", "Linear8bitLt"})


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, which stores its weight as (in, out)."""
    return "Conv1D" in _class_names(module) and hasattr(module, "nf")


def _is_linear(module: nn.Module) -> bool:
    """Whether LoRA can adapt this module; ``MultiheadAttention`` reads its projection without calling it."""
    skipped = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return (isinstance(module, nn.Linear) and not skipped) or _is_conv1d(module)


def _out_and_in_features(base: nn.Module) -> tuple[int, int]:
    # Not from the weight's shape: a quantized weight is packed.
    return (base.nf, base.weight.shape[0]) if _is_conv1d(base) else (base.out_features, base.in_features)  # type: ignore


class LoRALayer(nn.Module):
    """A linear layer with adapters beside it: ``y = base(x) + (alpha / rank) B A dropout(x)``.

    Args:
        base: ``nn.Linear``, GPT-2's ``Conv1D``, or bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``.

    Shapes: x (..., in) -> (..., out). ``A`` (rank, in) is Kaiming-uniform with ``a = sqrt(5)``, the default of
    ``nn.Linear``; ``B`` (out, rank) is zero. Both are kept in float32, whatever the base is in, since the small
    steps of training would round away in bfloat16; they compute in the type that the base computes in (that of
    autocast where it is on), which is also the type of the output. ``model.to(dtype)`` would cast them: give the
    base its type first.
    """

    _base_weight: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.configs: dict[str, LoRAConfig] = {}
        self.active = DEFAULT_ADAPTER
        self.disabled = False
        self.transposed = _is_conv1d(base)
        # The weight to go back to, while merged. A buffer, so that it follows the model to another device.
        self.register_buffer("_base_weight", None, persistent=False)
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models read a layer's dtype or device from it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        """Whether an adapter is part of the base's weight now."""
        return self._base_weight is not None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank={c.rank}, alpha={c.alpha:g}" for name, c in self.configs.items())

    def add_adapter(self, name: str, config: LoRAConfig) -> None:
        """Put a fresh adapter beside the base."""
        out_features, in_features = _out_and_in_features(self.base)
        device = self.weight.device
        self.lora_A[name] = nn.Parameter(torch.empty(config.rank, in_features, device=device, dtype=torch.float32))
        self.lora_B[name] = nn.Parameter(torch.zeros(out_features, config.rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
        self.configs[name] = config

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled or self.merged or self.active not in self.configs:
            return self.base(x)
        A, B = self.lora_A[self.active], self.lora_B[self.active]
        config = self.configs[self.active]
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        drops = config.dropout > 0 and self.training
        if not drops and (autocast or dtype == self.weight.dtype) and self._has_plain_frozen_base():
            weight = self.weight.t() if self.transposed else self.weight
            return _FrozenLinearLoRA.apply(x, weight, self.bias, A, B, config.scaling, dtype)
        # Quantized, hooked or trainable bases, dropout, and torch.compile, which fuses better than we do.
        y = self.base(x)
        x = x.to(dtype)
        z = F.linear(F.dropout(x, config.dropout) if drops else x, A.to(dtype)) * config.scaling  # (..., rank)
        return y + F.linear(z, B.to(dtype)).to(y.dtype)

    def _has_plain_frozen_base(self) -> bool:
        """Whether computing with the base's weight is the same as calling the base."""
        base = self.base
        return (
            (type(base) is nn.Linear or self.transposed)
            and not torch.compiler.is_compiling()
            and type(base.weight) is nn.Parameter
            and not any(parameter.requires_grad for parameter in base._parameters.values() if parameter is not None)
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
            and "forward" not in base.__dict__  # accelerate's offloading replaces it on the instance
        )

    def merged_weight(self) -> Tensor:
        """``W + (alpha / rank) B A``, added in float32, in the base's layout and type."""
        A, B = self.lora_A[self.active].detach().float(), self.lora_B[self.active].detach().float()
        weight = self.weight.detach()
        first, second = (A.t(), B.t()) if self.transposed else (B, A)
        scaling = self.configs[self.active].scaling
        return torch.addmm(weight.float(), first, second, alpha=scaling).to(weight.dtype)

    def swap_weight(self) -> None:
        """Exchange the base's weight with the one laid aside. The Parameter stays the same object."""
        assert self._base_weight is not None
        aside = self.weight.data
        self.weight.data, self._base_weight = self._base_weight.to(aside.dtype), aside


# ------------------------------------------------------------------------------------------ finding layers


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that LoRA can adapt, or has adapted, by the dotted name it has in the base model."""
    adapted = lora_layers(model)
    inside = tuple(f"{name}." for name in adapted)
    return {
        name: module
        for name, module in model.named_modules()
        if name and (name in adapted or (_is_linear(module) and not name.startswith(inside)))
    }


def _output_heads(model: nn.Module) -> set[nn.Module]:
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
        heads = _output_heads(model)
        return [name for name, module in layers.items() if module not in heads]
    chosen: set[str] = set()
    ends = sorted({name.rpartition(".")[2] for name in layers})
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        # A full name means that one layer, even if another layer's name happens to end with it.
        found = [target] if target in layers else [name for name in layers if name.endswith(f".{target}")]
        if not found:
            near = difflib.get_close_matches(target, ends, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            other = [m for n, m in model.named_modules() if n == target or n.endswith(f".{target}")]
            what = f"is a {type(other[0]).__name__}, not a linear layer" if other else "matches no layer"
            raise LoRAError(f"target {target!r} {what}{hint}; linear layers here end in: {', '.join(ends)}")
        chosen.update(found)
    return [name for name in layers if name in chosen]


def _adapted(model: nn.Module, adapter: str | None = None) -> dict[str, LoRALayer]:
    """The layers that carry ``adapter`` (by default, the active one), or an error that says which exist."""
    layers = lora_layers(model)
    if not layers:
        raise LoRAError("the model has no LoRA layers; call apply_lora first")
    carrying = {name: layer for name, layer in layers.items() if (adapter or layer.active) in layer.configs}
    if not carrying:
        raise LoRAError(f"no adapter named {adapter!r}; the model has: {', '.join(adapter_names(model))}")
    return carrying


def _config(model: nn.Module, adapter: str | None = None) -> LoRAConfig:
    layer = next(iter(_adapted(model, adapter).values()))  # a name is given once, to all of an adapter's layers
    return layer.configs[adapter or layer.active]


def _refuse_merged(model: nn.Module, action: str) -> None:
    if any(layer.merged for layer in lora_layers(model).values()):
        raise LoRAError(f"cannot {action} while an adapter is merged; call unmerge first")


# ------------------------------------------------------------------------------- applying and switching


def apply_lora(model: nn.Module, config: LoRAConfig, adapter: str = DEFAULT_ADAPTER) -> list[str]:
    """Freeze ``model``, put a LoRA layer in the place of each target, and make ``adapter`` the active one.

    Under reentrant gradient checkpointing the input of the checkpointed blocks must need a gradient, which
    transformers arranges with ``model.enable_input_require_grads()``.

    Returns:
        The dotted names of the adapted layers.

    Raises:
        LoRAError: a target matches nothing, the adapter's name is taken, or another adapter is merged.
    """
    names = find_targets(model, config.target_modules)
    _attach(model, names, config, adapter)
    return names


def _attach(model: nn.Module, names: list[str], config: LoRAConfig, adapter: str) -> None:
    if not re.fullmatch(r"\w[\w-]*", adapter) or hasattr(nn.ParameterDict(), adapter):
        raise LoRAError(f"cannot name an adapter {adapter!r}; use letters, digits, '_' and '-'")
    if taken := [name for name, layer in lora_layers(model).items() if adapter in layer.configs]:
        raise LoRAError(f"adapter {adapter!r} is already on {len(taken)} layers ({taken[0]}, ...); use another name")
    _refuse_merged(model, "add an adapter")
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, LoRALayer):
            parent, _, child = name.rpartition(".")
            layer = LoRALayer(layer)
            setattr(model.get_submodule(parent), child, layer)
        layer.add_adapter(adapter, config)
    set_adapter(model, adapter)
    only_lora_trainable(model)


def only_lora_trainable(model: nn.Module) -> None:
    """Freeze every parameter but the active adapter's. A head of yours can be turned on again afterwards."""
    model.requires_grad_(False)
    for layer in _adapted(model).values():
        layer.lora_A[layer.active].requires_grad_()
        layer.lora_B[layer.active].requires_grad_()


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters on the model, in the order they came."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.configs))


def set_adapter(model: nn.Module, adapter: str) -> None:
    """Compute with this adapter, and let it alone be trained. Layers that do not carry it act as the base."""
    _adapted(model, adapter)
    _refuse_merged(model, "switch adapters")
    for layer in lora_layers(model).values():
        layer.active = adapter
        for name in layer.configs:
            layer.lora_A[name].requires_grad_(name == adapter)
            layer.lora_B[name].requires_grad_(name == adapter)


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable adapter parameters, for an optimizer."""
    for layer in _adapted(model).values():
        yield from (p for p in (layer.lora_A[layer.active], layer.lora_B[layer.active]) if p.requires_grad)


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model inside the block, merged or not; nests, and ends in order when the block raises."""
    switched = [layer for layer in lora_layers(model).values() if not layer.disabled]
    for layer in switched:
        layer.disabled = True
        if layer.merged:
            layer.swap_weight()
    try:
        yield
    finally:
        for layer in switched:
            layer.disabled = False
            if layer.merged:
                layer.swap_weight()


# ------------------------------------------------------------------------------------------------- merging


def merge(model: nn.Module) -> None:
    """``W <- W + (alpha / rank) B A`` for the active adapter, in every layer or in none.

    The original weights are laid aside, not subtracted back, so ``unmerge`` restores them bit for bit in any
    precision; the adapted weights take twice their memory meanwhile. ``remove_lora`` lets the originals go.
    Merging twice changes nothing more. A merged model computes no gradient for its adapters.

    Raises:
        LoRAError: a merged weight would not be finite, a base is quantized, or a weight is shared with another
            module that would change with it. Nothing has changed then.
    """
    layers = {name: layer for name, layer in _adapted(model).items() if not layer.merged}
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    merged = {}
    for name, layer in layers.items():
        if layer.disabled:
            raise LoRAError("cannot merge inside adapters_disabled")
        if _is_quantized(layer.base):
            kind = type(layer.base).__name__
            raise LoRAError(f"{name} is quantized ({kind}): load the base model unquantized and merge into that")
        if users[id(layer.weight)] > 1:
            raise LoRAError(f"the weight of {name} is shared with another module; untie them before merging")
        merged[name] = layer.merged_weight()
        if not torch.isfinite(merged[name]).all():
            raise LoRAError(f"merging would put numbers that are not finite into {name}; the adapter is broken")
    for name, layer in layers.items():
        layer._base_weight = merged[name]
        layer.swap_weight()


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, bit for bit. Does nothing when not merged."""
    for layer in lora_layers(model).values():
        if layer.merged:
            if layer.disabled:
                raise LoRAError("cannot unmerge inside adapters_disabled")
            layer.swap_weight()
            layer._base_weight = None


def remove_lora(model: nn.Module) -> None:
    """Put the plain layers back in place: with the adapter in their weights if merged, as they were if not."""
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


# --------------------------------------------------------------------------------------------------- state


def lora_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Copies, on the CPU, of an adapter (by default the active one): ``<layer>.lora_A`` and ``<layer>.lora_B``."""
    state = {}
    for name, layer in _adapted(model, adapter).items():
        key = adapter or layer.active
        state[f"{name}.lora_A"] = layer.lora_A[key].detach().to("cpu", copy=True)
        state[f"{name}.lora_B"] = layer.lora_B[key].detach().to("cpu", copy=True)
    return state


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], adapter: str | None = None) -> None:
    """Fill an adapter (by default the active one) from ``state``, all of it or nothing.

    Raises:
        LoRAError: names are missing or unexpected, shapes differ, or the adapter is merged; all named at once.
    """
    layers = _adapted(model, adapter)
    _refuse_merged(model, "load an adapter")
    _check_state(layers, _config(model, adapter).rank, state)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A[adapter or layer.active].copy_(state[f"{name}.lora_A"])
            layer.lora_B[adapter or layer.active].copy_(state[f"{name}.lora_B"])


def _check_state(layers: Mapping[str, nn.Module], rank: int, state: Mapping[str, Tensor]) -> None:
    expected = {}
    for name, layer in layers.items():
        out_features, in_features = _out_and_in_features(layer.base if isinstance(layer, LoRALayer) else layer)
        expected[f"{name}.lora_A"] = (rank, in_features)
        expected[f"{name}.lora_B"] = (out_features, rank)
    faults = [f"missing {key}" for key in expected if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in expected]
    for key in expected.keys() & state.keys():
        if not isinstance(state[key], Tensor) or not state[key].is_floating_point():
            faults.append(f"{key} is no tensor of floating-point numbers")
        elif tuple(state[key].shape) != expected[key]:
            faults.append(f"{key} is {tuple(state[key].shape)}, the model needs {expected[key]}")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise LoRAError(f"the adapter does not fit the model: {'; '.join(sorted(faults)[:8])}{more}")


def _attach_state(model: nn.Module, config: LoRAConfig, state: Mapping[str, Tensor], adapter: str) -> list[str]:
    """Add an adapter to exactly the layers that ``state`` names, once it is known to fit."""
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise LoRAError("the adapter holds no named weights")
    wanted = {re.sub(r"\.lora_[AB]$", "", key) for key in state}
    layers = {name: layer for name, layer in linear_layers(model).items() if name in wanted}
    _check_state(layers, config.rank, state)
    _attach(model, list(layers), config, adapter)
    load_lora_state_dict(model, state, adapter)
    return list(layers)


# --------------------------------------------------------------------------------------------------- files


def _write(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename: the file is the old or the new one, whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise LoRAError(f"cannot write {path}: {error.strerror or error}") from error


def save_lora(model: nn.Module, path: str | Path, adapter: str | None = None) -> None:
    """Write an adapter and its configuration to ``.pth``/``.pt`` or ``.safetensors``, whole or not at all.

    Raises:
        LoRAError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    config, state = _config(model, adapter), lora_state_dict(model, adapter)
    _check_suffix(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        _write(path, save(state, metadata={"lora_config": json.dumps(asdict(config))}))
    else:
        buffer = io.BytesIO()
        torch.save({"lora_config": asdict(config), "state": state}, buffer)
        _write(path, buffer.getvalue())


def load_lora(model: nn.Module, path: str | Path, adapter: str = DEFAULT_ADAPTER) -> list[str]:
    """Add an adapter saved by ``save_lora`` to the layers it was made for, and make it the active one.

    ``.pth`` is read with ``weights_only=True``: a pickle can run code, so anything but plain data is refused.

    Returns:
        The dotted names of the adapted layers.

    Raises:
        LoRAError: the file is missing, broken, unsafe, or does not fit the model, which is unchanged then.
    """
    path = Path(path)
    _check_suffix(path)
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
        try:
            settings = json.loads(metadata["lora_config"])
        except (KeyError, ValueError):
            message = f"{path} carries no lora_config; for an adapter of PEFT's use import_peft on its folder"
            raise LoRAError(message) from None
    else:
        content = _read_pth(path)
        if not isinstance(content, dict) or set(content) != {"lora_config", "state"}:
            raise LoRAError(f"{path} is no LoRA adapter written by save_lora")
        settings, state = content["lora_config"], content["state"]
    return _attach_state(model, LoRAConfig.from_dict(settings), state, adapter)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise LoRAError(f"cannot tell the format of {path}; name it .pth or .safetensors")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LoRAError(f"cannot read {path}: {_first_line(error)}") from error


def _read_pth(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LoRAError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch reports a broken or unsafe file in several ways
        raise LoRAError(f"cannot read {path}: broken, or it holds more than plain tensors") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# -------------------------------------------------------------------------------------------- PEFT folders

_PEFT_PREFIX = "base_model.model."
# Settings that say where the adapter came from or how it was found; its weights mean the same whatever they are.
_PEFT_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
}
_PEFT_HANDLED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, ...) train against a changed base.
_PEFT_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def export_peft(
    model: nn.Module, folder: str | Path, adapter: str | None = None, base_model: str | None = None
) -> None:
    """Write an adapter as PEFT does: ``adapter_model.safetensors``, then ``adapter_config.json``.

    Args:
        base_model: what PEFT should load the base from; by default the name that ``model.config`` carries.
    """
    from safetensors.torch import save

    config, layers = _config(model, adapter), _adapted(model, adapter)
    # Short names where they select these layers and no other module, as most readers of PEFT folders expect.
    ends = {name.rpartition(".")[2] for name in layers}
    modules = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends]
    targets = sorted(ends) if set(modules) == set(layers) else list(layers)
    kind = type(model).__name__
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": base_model or getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "fan_in_fan_out": all(layer.transposed for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    state = {f"{_PEFT_PREFIX}{key}.weight": tensor for key, tensor in lora_state_dict(model, adapter).items()}
    folder = Path(folder)
    _write(folder / "adapter_model.safetensors", save(state, metadata={"format": "pt"}))
    _write(folder / "adapter_config.json", (json.dumps(content, indent=2) + "\n").encode())


def import_peft(model: nn.Module, folder: str | Path, adapter: str = DEFAULT_ADAPTER) -> list[str]:
    """Add an adapter saved by PEFT, and make it the active one; returns the names of the adapted layers.

    rsLoRA's scale ``alpha / sqrt(rank)`` is kept by adopting ``alpha * sqrt(rank)`` as alpha.

    Raises:
        LoRAError: files are missing or broken, the adapter uses a feature that would not be reproduced (DoRA, a
            rank per layer, trained biases, whole trained modules, ...), or it does not fit the model.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoRAError(f"cannot read {folder / 'adapter_config.json'}: {_first_line(error)}") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise LoRAError(f"{folder} is no LoRA adapter of PEFT's")
    strange = [key for key, value in content.items() if value and key not in _PEFT_HARMLESS | _PEFT_HANDLED]
    if content.get("bias", "none") != "none":
        strange.append("bias")
    if content.get("init_lora_weights", True) not in _PEFT_PLAIN_INITS:
        strange.append("init_lora_weights")
    if strange:
        named = ", ".join(f"{key}={content[key]!r}" for key in sorted(strange))
        raise LoRAError(f"{folder} uses PEFT features that are not supported here: {named}")
    config = LoRAConfig(content.get("r", 8), content.get("lora_alpha", 8), content.get("lora_dropout", 0.0))
    if content.get("use_rslora"):
        config = replace(config, alpha=config.alpha * math.sqrt(config.rank))
    weights, _ = _read_safetensors(folder / "adapter_model.safetensors")
    if foreign := [key for key in weights if not re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key)]:
        raise LoRAError(f"{folder} holds weights that are not plain LoRA: {', '.join(foreign[:8])}")
    state = {key.removeprefix(_PEFT_PREFIX).removesuffix(".weight"): tensor for key, tensor in weights.items()}
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in state))
    return _attach_state(model, replace(config, target_modules=tuple(names) or ALL_LINEAR), state, adapter)
