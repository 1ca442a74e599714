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

Variants are settings of ``LoRAConfig``: rsLoRA, DoRA, PiSSA, trained biases; LoRA+ is ``lora_plus_groups``.

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
INITS = ("kaiming", "pissa")
TRAIN_BIAS = ("none", "all", "lora_only")


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
        rslora: scale by ``alpha / sqrt(rank)``, which keeps the update's size at high ranks (Kalajdzievski 2023,
            arXiv:2312.03732).
        dora: train the length of each row of the weight apart from its direction: ``W' = m V / |V|``, where
            ``V = W + (alpha / rank) B A`` (Liu et al. 2024, arXiv:2402.09353). Slower, as V is needed at each pass.
        init: ``"kaiming"``, or ``"pissa"`` to start A and B at the weight's leading singular vectors and to keep what
            is left of it frozen (Meng et al. 2024, arXiv:2404.02948); takes an SVD of each weight.
        train_bias: as PEFT's ``bias``. ``"lora_only"`` also trains the biases of the adapted layers, ``"all"`` every
            bias of the model; such an adapter must be the only one.

    Raises:
        LoRAError: a value is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"
    train_bias: str = "none"

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
        for name, choices in (("rslora", (False, True)), ("dora", (False, True)), ("init", INITS)):
            if getattr(self, name) not in choices:
                raise LoRAError(f"{name} must be {' or '.join(map(repr, choices))}, not {getattr(self, name)!r}")
        if self.train_bias not in TRAIN_BIAS:
            raise LoRAError(f"train_bias must be {', '.join(map(repr, TRAIN_BIAS))}, not {self.train_bias!r}")

    @property
    def scaling(self) -> float:
        """What the update is multiplied by: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

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
    in ``dtype``. For the gradient g of y: ``gx = g W + s (g B) A``, ``gA = s (g B)' x``, ``gB = s g' (x A')``, and
    the sum over g's rows for the bias.
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
        gx = gA = gB = g_bias = None
        with torch.autocast(x.device.type, enabled=False):  # the casts below are all there should be
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (n, in)
            g = grad.reshape(-1, grad.shape[-1])  # (n, out)
            low_A = A.to(dtype)
            if torch.is_grad_enabled():  # a second derivative is wanted: z must lead back to x and A
                z = F.linear(rows, low_A)
            gz = g @ (B.to(dtype) * ctx.scaling)  # (n, rank)
            if ctx.needs_input_grad[0]:
                gx = (g @ weight.to(dtype)).addmm_(gz, low_A).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[2]:
                g_bias = g.sum(0, dtype=torch.float32)
            if ctx.needs_input_grad[3]:
                gA = (gz.t() @ rows).to(A.dtype)
            if ctx.needs_input_grad[4]:
                # (z' g)' rather than g' z: the same numbers, and up to three times faster at a small rank.
                gB = (z.t() @ g).t().to(B.dtype) * ctx.scaling
        return gx, None, g_bias, gA, gB, None, None


def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """``(A, B)`` such that ``scaling B A`` is the best approximation of ``weight`` (out, in) of that rank."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


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


def _base_of(layer: nn.Module) -> nn.Module:
    return layer.base if isinstance(layer, LoRALayer) else layer


def _shapes(layer: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's parts, beside a linear layer that is adapted already or is not."""
    out_features, in_features = _out_and_in_features(_base_of(layer))
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (config.rank, in_features), "lora_B": (out_features, config.rank)}
    if config.dora:
        shapes["lora_magnitude"] = (out_features,)
    if config.init == "pissa":
        shapes |= {"pissa_A": shapes["lora_A"], "pissa_B": shapes["lora_B"]}
    return shapes


@torch.no_grad()
def dense_weight(base: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in) in float32, dequantized where it is quantized."""
    weight: Any = base.weight
    dense = weight.detach()
    if "Linear4bit" in _class_names(base):
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(weight.data, weight.quant_state)
    elif "Linear8bitLt" in _class_names(base) and not weight.is_floating_point():
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The first pass moves the scales from the weight into the layer's state.
        dense = int8_vectorwise_dequant(weight.data, weight.SCB if base.state.SCB is None else base.state.SCB)  # type: ignore
    return (dense.t() if _is_conv1d(base) else dense).float()


def _row_norms(weight: Tensor) -> Tensor:
    """(out, in) -> (out,); never zero, so that a row of zeros stays one when it is brought to its length."""
    return weight.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


class LoRALayer(nn.Module):
    """A linear layer with adapters beside it: ``y = base(x) + (alpha / rank) B A dropout(x)``.

    Args:
        base: ``nn.Linear``, GPT-2's ``Conv1D``, or bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``.

    Shapes: x (..., in) -> (..., out). ``A`` (rank, in) is Kaiming-uniform with ``a = sqrt(5)``, the default of
    ``nn.Linear``; ``B`` (out, rank) is zero. Both are kept in float32, whatever the base is in, since the small
    steps of training would round away in bfloat16; they compute in the type that the base computes in (that of
    autocast where it is on), which is also the type of the output. ``model.to(dtype)`` would cast them: give the
    base its type first.

    DoRA adds ``lora_magnitude`` (out,). PiSSA starts ``A`` and ``B`` at A0 and B0, and trains against the residual
    ``W - (alpha / rank) B0 A0``. The base keeps W, bit for bit, for other adapters and for the way back; the frozen
    ``pissa_A`` and ``pissa_B`` hold A0 and B0, which are subtracted in the same products at twice the rank.
    """

    _base_weight: Tensor | None
    # Every ParameterDict of adapters by its name in a state dict.
    PARTS = ("lora_A", "lora_B", "lora_magnitude", "pissa_A", "pissa_B")

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude = nn.ParameterDict()
        self.pissa_A = nn.ParameterDict()
        self.pissa_B = nn.ParameterDict()
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

    def add_adapter(self, name: str, config: LoRAConfig, initialize: bool = True) -> None:
        """Put a fresh adapter beside the base; all zero where its weights are about to be loaded."""
        for part, shape in _shapes(self, config).items():
            zeros = torch.zeros(shape, device=self.weight.device, dtype=torch.float32)
            getattr(self, part)[name] = nn.Parameter(zeros, requires_grad=part.startswith("lora"))
        self.configs[name] = config
        if initialize:
            self._initialize(name)

    @torch.no_grad()
    def _initialize(self, name: str) -> None:
        config = self.configs[name]
        nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
        if config.init == "pissa":
            A, B = principal_factors(dense_weight(self.base), config.rank, config.scaling)
            for part, start in (("lora_A", A), ("pissa_A", A), ("lora_B", B), ("pissa_B", B)):
                getattr(self, part)[name].copy_(start)
        if config.dora:  # the update is zero now, in either init
            self.lora_magnitude[name].copy_(dense_weight(self.base).norm(dim=1))

    def parts(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters; those whose name starts with ``lora`` are trained."""
        return {part: getattr(self, part)[name] for part in self.PARTS if name in getattr(self, part)}

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Whether an adapter's parameters need a gradient."""
        for part, parameter in self.parts(name).items():
            parameter.requires_grad_(trainable and part.startswith("lora"))

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``(A, B)`` whose product is the whole update: at twice the rank for PiSSA, ``B A - B0 A0``."""
        A, B = self.lora_A[name], self.lora_B[name]
        if name not in self.pissa_A:
            return A, B
        return torch.cat([A, self.pissa_A[name]]), torch.cat([B, -self.pissa_B[name]], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled or self.merged or self.active not in self.configs:
            return self.base(x)
        config = self.configs[self.active]
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        drops = config.dropout > 0 and self.training
        plain = not drops and not config.dora and (autocast or dtype == self.weight.dtype)
        if plain and self._has_plain_frozen_base():
            weight = self.weight.t() if self.transposed else self.weight
            return _FrozenLinearLoRA.apply(x, weight, self.bias, *self._factors(self.active), config.scaling, dtype)
        # Quantized, hooked or trainable bases, dropout, DoRA, and torch.compile, which fuses better than we do.
        y, x = self.base(x), x.to(dtype)
        A, B = self._factors(self.active)
        if drops:
            if config.init == "pissa":  # its frozen part sees all of x; dropout is for what is trained
                y = y - self._update(x, self.pissa_A[self.active], self.pissa_B[self.active]).to(y.dtype)
            x = F.dropout(x, config.dropout)
            A, B = self.lora_A[self.active], self.lora_B[self.active]
        update = self._update(x, A, B).to(y.dtype)
        if not config.dora:
            return y + update
        if drops:
            wx = F.linear(x, self._residual().to(dtype)).to(y.dtype)
        else:
            wx = y if self.bias is None else y - self.bias.to(y.dtype)
        # The norm of V is taken as a constant in the backward pass, as in section 4.3 of DoRA's paper.
        stretch = self.lora_magnitude[self.active] / _row_norms(self._tuned_weight()) - 1  # (out,)
        return y + update + stretch.to(y.dtype) * (wx + update)

    def _update(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        z = F.linear(x, A.to(x.dtype)) * self.configs[self.active].scaling  # (..., rank)
        return F.linear(z, B.to(x.dtype))

    @torch.no_grad()
    def _residual(self) -> Tensor:
        """What the adapter trains against, (out, in) in float32: W, or with PiSSA what is left of it."""
        weight = dense_weight(self.base)
        if self.active not in self.pissa_A:
            return weight
        A, B = self.pissa_A[self.active].float(), self.pissa_B[self.active].float()
        return torch.addmm(weight, B, A, alpha=-self.configs[self.active].scaling)

    @torch.no_grad()
    def _tuned_weight(self) -> Tensor:
        """``W`` plus the update, (out, in) in float32, before DoRA's change of length."""
        A, B = self._factors(self.active)
        return torch.addmm(dense_weight(self.base), B.float(), A.float(), alpha=self.configs[self.active].scaling)

    def _has_plain_frozen_base(self) -> bool:
        """Whether computing with the base's weight is the same as calling the base."""
        base = self.base
        return (
            (type(base) is nn.Linear or self.transposed)
            and not torch.compiler.is_compiling()
            and type(base.weight) is nn.Parameter
            and not base.weight.requires_grad
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
            and "forward" not in base.__dict__  # accelerate's offloading replaces it on the instance
        )

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W + (alpha / rank) B A``, added in float32, in the base's layout and type."""
        weight = self._tuned_weight()
        if self.configs[self.active].dora:
            weight = weight * (self.lora_magnitude[self.active].float() / _row_norms(weight))[:, None]
        return (weight.t() if self.transposed else weight).to(self.weight.dtype).contiguous()

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


def _refuse_disabled(model: nn.Module, action: str) -> None:
    if any(layer.disabled for layer in lora_layers(model).values()):
        raise LoRAError(f"cannot {action} inside adapters_disabled")


# ------------------------------------------------------------------------------- applying and switching


def apply_lora(
    model: nn.Module, config: LoRAConfig, adapter: str = DEFAULT_ADAPTER, initialize: bool = True
) -> list[str]:
    """Freeze ``model``, put a LoRA layer in the place of each target, and make ``adapter`` the active one.

    Without ``initialize`` the adapter is zero until ``load_lora_state_dict``, which spares PiSSA its SVDs.

    Under reentrant gradient checkpointing the input of the checkpointed blocks must need a gradient, which
    transformers arranges with ``model.enable_input_require_grads()``.

    Returns:
        The dotted names of the adapted layers.

    Raises:
        LoRAError: a target matches nothing, the adapter's name is taken, another adapter is merged, or the layers
            have no use for a variant. Nothing has changed then.
    """
    names = find_targets(model, config.target_modules)
    if config.train_bias != "none" and not _selected_biases(model, config, names):
        raise LoRAError(f"train_bias={config.train_bias!r} finds no bias in this model; leave it at 'none'")
    _attach(model, names, config, adapter, initialize)
    return names


def _attach(model: nn.Module, names: list[str], config: LoRAConfig, adapter: str, initialize: bool = True) -> None:
    if not re.fullmatch(r"\w[\w-]*", adapter) or hasattr(nn.ParameterDict(), adapter):
        raise LoRAError(f"cannot name an adapter {adapter!r}; use letters, digits, '_' and '-'")
    if taken := [name for name, layer in lora_layers(model).items() if adapter in layer.configs]:
        raise LoRAError(f"adapter {adapter!r} is already on {len(taken)} layers ({taken[0]}, ...); use another name")
    _refuse_merged(model, "add an adapter")
    if (others := adapter_names(model)) and (config.train_bias != "none" or _trained_biases(model)):
        raise LoRAError(f"an adapter that trains biases must be the only one; the model has: {', '.join(others)}")
    if initialize and config.init == "pissa":
        _check_pissa({name: model.get_submodule(name) for name in names}, config.rank)
    prevent_cpu_repacking(model)
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, LoRALayer):
            parent, _, child = name.rpartition(".")
            layer = LoRALayer(layer)
            setattr(model.get_submodule(parent), child, layer)
        layer.add_adapter(adapter, config, initialize)
    for module in _selected_biases(model, config, names).values():
        # What adapters_disabled and remove_lora go back to.
        module.register_buffer("_lora_base_bias", module.bias.detach().clone(), persistent=False)  # type: ignore
    set_adapter(model, adapter)
    only_lora_trainable(model)


def _check_pissa(layers: Mapping[str, nn.Module], rank: int) -> None:
    for name, layer in layers.items():
        if rank > (most := min(_out_and_in_features(_base_of(layer)))):
            raise LoRAError(f"PiSSA at rank {rank} is too much for {name}, which has {most} singular vectors")


def prevent_cpu_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU, where that would end their training.

    On a processor with AVX512-BF16 a ``Linear4bit`` repacks its weight at its first pass in eval mode. From then on
    its numbers differ (scales rounded to bfloat16) and no gradient goes through it, in train mode either.

    Raises:
        LoRAError: a weight is repacked already, which cannot be undone exactly.
    """
    layers = {name: module for name, module in model.named_modules() if "Linear4bit" in _class_names(module)}
    for name, layer in layers.items():
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise LoRAError(f"{name} was repacked by a pass in eval mode; load the 4-bit base anew and adapt it first")
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def only_lora_trainable(model: nn.Module) -> None:
    """Freeze every parameter but the active adapter's. A head of yours can be turned on again afterwards."""
    model.requires_grad_(False)
    for layer in _adapted(model).values():
        layer.set_trainable(layer.active, True)
    for module in _trained_biases(model).values():
        module.bias.requires_grad_()  # type: ignore[union-attr]


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base model's modules by the names they have there."""
    bases: dict[nn.Module, str] = {layer.base: name for name, layer in lora_layers(model).items()}
    for name, module in model.named_modules():
        if not isinstance(module, LoRALayer | nn.ParameterDict):
            yield bases.get(module, name), module


def _selected_biases(model: nn.Module, config: LoRAConfig, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules whose bias an adapter of the layers ``names`` trains, by that bias's name in the base model."""
    layers = set(names)
    return {
        f"{name}.bias".removeprefix("."): module
        for name, module in _base_modules(model)
        if module._parameters.get("bias") is not None
        and (config.train_bias == "all" or (config.train_bias == "lora_only" and name in layers))
    }


def _trained_biases(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose bias is trained now, by that bias's name in the base model."""
    found = ((name, module) for name, module in _base_modules(model) if "_lora_base_bias" in module._buffers)
    return {f"{name}.bias".removeprefix("."): module for name, module in found}


def _swap_biases(model: nn.Module) -> None:
    """Exchange trained biases with the base's, which are laid aside."""
    for module in _trained_biases(model).values():
        trained = module.bias.data  # type: ignore[union-attr]
        module.bias.data, module._lora_base_bias = module._lora_base_bias.to(trained.dtype), trained  # type: ignore


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
            layer.set_trainable(name, name == adapter)


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable adapter parameters, for an optimizer."""
    for layer in _adapted(model).values():
        yield from (p for p in layer.parts(layer.active).values() if p.requires_grad)
    biases = (module.bias for module in _trained_biases(model).values())
    yield from (bias for bias in biases if bias.requires_grad)  # type: ignore[union-attr, misc]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer with LoRA+: ``B`` learns ``ratio`` times as fast as ``A``.

    At equal rates the features of a wide model hardly move (Hayou et al. 2024, arXiv:2402.12354). The lengths of
    DoRA and trained biases learn as fast as ``B``, biases without weight decay, as in PEFT.

    Raises:
        LoRAError: a ratio below 1.
    """
    if not _is_number(ratio) or ratio < 1:
        raise LoRAError(f"the ratio of LoRA+ must be a number of at least 1, not {ratio!r}")
    trained = list(lora_parameters(model))
    slow = {id(layer.lora_A[layer.active]) for layer in _adapted(model).values()}
    biases = {id(module.bias) for module in _trained_biases(model).values()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) in slow], "lr": lr},
        {"params": [p for p in trained if id(p) not in slow | biases], "lr": lr * ratio},
        {"params": [p for p in trained if id(p) in biases], "lr": lr * ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model inside the block, merged or not; nests, and ends in order when the block raises."""
    switched = [layer for layer in lora_layers(model).values() if not layer.disabled]

    def switch(disabled: bool) -> None:
        for layer in switched:
            layer.disabled = disabled
            if layer.merged:
                layer.swap_weight()
        if switched:
            _swap_biases(model)

    switch(True)
    try:
        yield
    finally:
        switch(False)


# ------------------------------------------------------------------------------------------------- merging


def merge(model: nn.Module) -> None:
    """``W <- W + (alpha / rank) B A`` for the active adapter, in every layer or in none; or what its variant computes.

    The original weights are laid aside, not subtracted back, so ``unmerge`` restores them bit for bit in any
    precision; the adapted weights take twice their memory meanwhile. ``remove_lora`` lets the originals go.
    Merging twice changes nothing more. A merged model computes no gradient for its adapters.

    Raises:
        LoRAError: a merged weight would not be finite, a base is quantized, or a weight is shared with another
            module that would change with it. Nothing has changed then.
    """
    layers = {name: layer for name, layer in _adapted(model).items() if not layer.merged}
    if layers:
        _refuse_disabled(model, "merge")
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    merged = {}
    for name, layer in layers.items():
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
    merged = [layer for layer in lora_layers(model).values() if layer.merged]
    if merged:
        _refuse_disabled(model, "unmerge")
    for layer in merged:
        layer.swap_weight()
        layer._base_weight = None


def remove_lora(model: nn.Module) -> None:
    """Put the plain layers back in place: with the adapter in their weights if merged, as they were if not."""
    layers = lora_layers(model)
    if not any(layer.merged or layer.disabled for layer in layers.values()):
        _swap_biases(model)
    for module in _trained_biases(model).values():
        del module._lora_base_bias
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


# --------------------------------------------------------------------------------------------------- state


def lora_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Copies, on the CPU, of an adapter (by default the active one) by name.

    ``<layer>.lora_A`` and ``<layer>.lora_B``; ``<layer>.lora_magnitude`` with DoRA, ``<layer>.pissa_A`` and ``pissa_B``
    with PiSSA, ``<module>.bias`` with trained biases.
    """
    _refuse_disabled(model, "read an adapter")
    state: dict[str, Tensor] = {}
    for name, layer in _adapted(model, adapter).items():
        state |= {f"{name}.{part}": parameter for part, parameter in layer.parts(adapter or layer.active).items()}
    state |= {name: module.bias for name, module in _trained_biases(model).items()}  # type: ignore[misc]
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], adapter: str | None = None) -> None:
    """Fill an adapter (by default the active one) from ``state``, all of it or nothing.

    Raises:
        LoRAError: names are missing or unexpected, shapes differ, or the adapter is merged; all named at once.
    """
    layers = _adapted(model, adapter)
    _refuse_merged(model, "load an adapter")
    _refuse_disabled(model, "load an adapter")
    biases = _trained_biases(model)
    _check_state(layers, _config(model, adapter), biases, state)
    with torch.no_grad():
        for name, layer in layers.items():
            for part, parameter in layer.parts(adapter or layer.active).items():
                parameter.copy_(state[f"{name}.{part}"])
        for name, module in biases.items():
            module.bias.copy_(state[name])  # type: ignore[operator]


def _check_state(
    layers: Mapping[str, nn.Module], config: LoRAConfig, biases: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    expected = {name: tuple(module.bias.shape) for name, module in biases.items()}
    for name, layer in layers.items():
        expected |= {f"{name}.{part}": shape for part, shape in _shapes(layer, config).items()}
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


def adapted_names(state: Mapping[str, Tensor]) -> list[str]:
    """The layers that a state holds an adapter for."""
    found = (re.fullmatch(rf"(.+)\.({'|'.join(LoRALayer.PARTS)})", key) for key in state)
    return list(dict.fromkeys(match[1] for match in found if match))


def _attach_state(model: nn.Module, config: LoRAConfig, state: Mapping[str, Tensor], adapter: str) -> list[str]:
    """Add an adapter to exactly the layers that ``state`` names, once it is known to fit."""
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise LoRAError("the adapter holds no named weights")
    wanted = set(adapted_names(state))
    layers = {name: layer for name, layer in linear_layers(model).items() if name in wanted}
    _check_state(layers, config, _selected_biases(model, config, layers), state)
    _attach(model, list(layers), config, adapter, initialize=False)
    load_lora_state_dict(model, state, adapter)
    return list(layers)


def without_pissa(state: Mapping[str, Tensor], config: LoRAConfig) -> tuple[dict[str, Tensor], LoRAConfig]:
    """The same adapter as plain LoRA of twice the rank: ``B A - B0 A0`` is ``[B, -B0]`` times ``A`` above ``A0``."""
    if config.init != "pissa":
        return dict(state), config
    plain = {key: tensor for key, tensor in state.items() if not re.search(r"\.pissa_[AB]$", key)}
    for name in adapted_names(state):
        plain[f"{name}.lora_A"] = torch.cat([state[f"{name}.lora_A"], state[f"{name}.pissa_A"]])
        plain[f"{name}.lora_B"] = torch.cat([state[f"{name}.lora_B"], -state[f"{name}.pissa_B"]], dim=1)
    rank = 2 * config.rank
    return plain, replace(config, rank=rank, alpha=rescaled_alpha(config, rank), init="kaiming")


def rescaled_alpha(config: LoRAConfig, rank: int) -> float:
    """The alpha that keeps ``config``'s scaling at another rank."""
    return config.scaling * (math.sqrt(rank) if config.rslora else rank)


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
_PEFT_HANDLED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_lora_weights"}
# Initialisations that leave the base as it is. The others train against a changed base, of which only PiSSA's can be
# found again: by the same SVD.
_PEFT_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PEFT_KEY = re.compile(r"base_model\.model\.(.+\.(lora_[AB]\.weight|lora_magnitude_vector)|(.+\.)?bias)")


def export_peft(
    model: nn.Module, folder: str | Path, adapter: str | None = None, base_model: str | None = None
) -> None:
    """Write an adapter as PEFT does: ``adapter_model.safetensors``, then ``adapter_config.json``.

    One that began with PiSSA is written as plain LoRA of twice the rank, which needs no SVD to be loaded.

    Args:
        base_model: what PEFT should load the base from; by default the name that ``model.config`` carries.
    """
    from safetensors.torch import save

    layers = _adapted(model, adapter)
    state, config = without_pissa(lora_state_dict(model, adapter), _config(model, adapter))
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
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": config.train_bias,
        "inference_mode": True,
    }
    renamed = {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        inside = {"lora_magnitude": "lora_magnitude_vector", "bias": "base_layer.bias" if name in layers else "bias"}
        renamed[f"{_PEFT_PREFIX}{name}.{inside.get(part, f'{part}.weight')}"] = tensor
    folder = Path(folder)
    _write(folder / "adapter_model.safetensors", save(renamed, metadata={"format": "pt"}))
    _write(folder / "adapter_config.json", (json.dumps(content, indent=2) + "\n").encode())


def read_peft(folder: str | Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """An adapter saved by PEFT: its settings, and its weights by our names; PiSSA's start is not among them.

    Raises:
        LoRAError: files are missing or broken, or the adapter uses a feature that would not be reproduced (a rank per
            layer, whole trained modules, ...).
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoRAError(f"cannot read {folder / 'adapter_config.json'}: {_first_line(error)}") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise LoRAError(f"{folder} is no LoRA adapter of PEFT's")
    strange = [key for key, value in content.items() if value and key not in _PEFT_HARMLESS | _PEFT_HANDLED]
    init = content.get("init_lora_weights", True)
    if init not in _PEFT_PLAIN_INITS and init != "pissa":
        strange.append("init_lora_weights")
    if strange:
        named = ", ".join(f"{key}={content[key]!r}" for key in sorted(strange))
        raise LoRAError(f"{folder} uses PEFT features that are not supported here: {named}")
    config = LoRAConfig(
        content.get("r", 8),
        content.get("lora_alpha", 8),
        content.get("lora_dropout", 0.0),
        rslora=bool(content.get("use_rslora")),
        dora=bool(content.get("use_dora")),
        init="pissa" if init == "pissa" else "kaiming",
        train_bias=content.get("bias", "none"),
    )
    weights, _ = _read_safetensors(folder / "adapter_model.safetensors")
    if foreign := [key for key in weights if not _PEFT_KEY.fullmatch(key)]:
        raise LoRAError(f"{folder} holds weights that are not LoRA's: {', '.join(foreign[:8])}")
    state = {_our_name(key): tensor for key, tensor in weights.items()}
    return replace(config, target_modules=tuple(adapted_names(state)) or ALL_LINEAR), state


def import_peft(model: nn.Module, folder: str | Path, adapter: str = DEFAULT_ADAPTER) -> list[str]:
    """Add an adapter saved by PEFT, and make it the active one; returns the names of the adapted layers.

    An adapter of a whole model fits its backbone alone and the other way round: where layers are not found by their
    names (``model.layers.0.mlp``), they are by names without the first part, or with one before (``layers.0.mlp``).

    Raises:
        LoRAError: as ``read_peft``, or the adapter does not fit the model, or fits in more than one way.
    """
    config, state = read_peft(folder)
    state = _renamed_to_fit(model, state)
    names = adapted_names(state)
    if config.init == "pissa":
        layers = {name: layer for name, layer in linear_layers(model).items() if name in names}
        _check_pissa(layers, config.rank)
        for name, layer in layers.items():
            factors = principal_factors(dense_weight(_base_of(layer)), config.rank, config.scaling)
            state[f"{name}.pissa_A"], state[f"{name}.pissa_B"] = factors
    return _attach_state(model, replace(config, target_modules=tuple(names) or ALL_LINEAR), state, adapter)


def _our_name(key: str) -> str:
    """PEFT's name of a weight -> ours."""
    name = key.removeprefix(_PEFT_PREFIX).removesuffix(".weight").removesuffix("_vector")
    return re.sub(r"\.base_layer\.bias$", ".bias", name)


def _renamed_to_fit(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the first part of its names cut off, or one put before them, where that alone makes it fit."""
    names, there = adapted_names(state), set(linear_layers(model))
    if not names or there.issuperset(names):
        return state
    first = names[0]
    prefixes = [("", name.removesuffix(first)) for name in there if name.endswith(f".{first}")]
    prefixes += [(first.removesuffix(name), "") for name in there if first.endswith(f".{name}")]
    fits = []
    for old, new in prefixes:
        renamed = {new + name.removeprefix(old) for name in names}
        if renamed <= there and len(renamed) == len(names):
            fits.append((old, new))
    if len(fits) > 1:
        found = ", ".join(sorted(new + first.removeprefix(old) for old, new in fits))
        raise LoRAError(f"the adapter's {first} could be any of {found}; import it into the part that it was made for")
    # Where nothing fits, the check that follows names what is missing.
    return {new + key.removeprefix(old): tensor for old, new in fits for key, tensor in state.items()} or state
