"""Variants of LoRA and a kernel that costs less: DoRA, PiSSA, trained biases, quantized bases.

``AdapterConfig`` says which, ``AdapterLayer`` computes them all, and ``apply_lora`` puts them on a model. Everything
else (switching, merging, state) is that of ``lora.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from lora import DEFAULT_ADAPTER, LoRAConfig, LoRAError, LoRALayer
from stocklora.adapters.biases import TrainsBias, bias_modules, check_biases, train_biases
from stocklora.adapters.kernel import Product, SharedInput, frozen_linears, share_inputs, thin_linear
from stocklora.base_models.quantized import dense_weight, prevent_cpu_repacking

INITS = ("kaiming", "pissa")
TRAIN_BIAS = ("none", "all", "lora_only")


@dataclass(frozen=True)
class AdapterConfig(LoRAConfig):
    """``LoRAConfig`` and its variants.

    Args:
        dora: train the length of each row of the weight apart from its direction: ``W' = m V / |V|``, where
            ``V = W + (alpha / rank) B A`` (Liu et al. 2024, arXiv:2402.09353). Slower, as V is needed at each pass.
        init: ``"kaiming"``, or ``"pissa"`` to start A and B at the weight's leading singular vectors and to keep what
            is left of it frozen (Meng et al. 2024, arXiv:2404.02948); takes an SVD of each weight.
        train_bias: as PEFT's ``bias``. ``"lora_only"`` also trains the biases of the adapted layers, ``"all"`` every
            bias of the model; such an adapter must be the only one.

    Raises:
        LoRAError: a value is out of range.
    """

    dora: bool = False
    init: str = "kaiming"
    train_bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("dora", (False, True)), ("init", INITS)):
            if getattr(self, name) not in choices:
                raise LoRAError(f"{name} must be {' or '.join(map(repr, choices))}, not {getattr(self, name)!r}")
        if self.train_bias not in TRAIN_BIAS:
            raise LoRAError(f"train_bias must be {', '.join(map(repr, TRAIN_BIAS))}, not {self.train_bias!r}")

    def layer(self, base: nn.Module, name: str) -> AdapterLayer:
        """The layer around ``base``, or ``base`` itself where it is one.

        Raises:
            LoRAError: a rank that PiSSA cannot have here, or a layer that is not of this kind.
        """
        if isinstance(base, LoRALayer) and not isinstance(base, AdapterLayer):
            raise LoRAError(f"{name} carries plain adapters of lora.py; put those on by stocklora.adapters.layer too")
        layer = base if isinstance(base, AdapterLayer) else AdapterLayer(base)
        if self.init == "pissa" and self.rank > (most := min(layer.features)):
            raise LoRAError(f"PiSSA at rank {self.rank} is too much for {name}, which has {most} singular vectors")
        return layer

    @classmethod
    def from_dict(cls, content: Any) -> AdapterConfig:
        """The inverse of ``dataclasses.asdict``; an unknown key is a ``LoRAError``."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(content) - set(known)) if isinstance(content, Mapping) else [repr(content)]
        if unknown:
            raise LoRAError(f"unknown LoRA setting {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**content)


class AdapterLayer(TrainsBias):
    """A linear layer with adapters of any variant beside it.

    DoRA adds ``lora_magnitude`` (out,). PiSSA starts ``A`` and ``B`` at A0 and B0, and trains against the residual
    ``W - (alpha / rank) B0 A0``. The base keeps W, bit for bit, for other adapters and for the way back; the frozen
    ``pissa_A`` and ``pissa_B`` hold A0 and B0, which are subtracted in the same products at twice the rank.

    Args:
        base: ``nn.Linear``, GPT-2's ``Conv1D``, or bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``.
    """

    PARTS = ("lora_A", "lora_B", "lora_magnitude", "pissa_A", "pissa_B")
    lora_magnitude: nn.ParameterDict
    pissa_A: nn.ParameterDict
    pissa_B: nn.ParameterDict
    shared: SharedInput | None = None  # with the layers that read the same input

    def shapes(self, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
        """As the base's, with the parts of the variants; ``config`` is an ``AdapterConfig`` or a plain one."""
        shapes = super().shapes(config)
        if getattr(config, "dora", False):
            shapes["lora_magnitude"] = self.features[:1]
        if getattr(config, "init", "") == "pissa":
            shapes |= {"pissa_A": shapes["lora_A"], "pissa_B": shapes["lora_B"]}
        return shapes

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Start values: PiSSA's singular vectors, DoRA's lengths; the update is zero in either init."""
        super().reset(name)
        if name in self.pissa_A:
            config = self.configs[name]
            A, B = principal_factors(dense_weight(self.base), config.rank, config.scaling)
            for part, start in (("lora_A", A), ("pissa_A", A), ("lora_B", B), ("pissa_B", B)):
                getattr(self, part)[name].copy_(start)
        if name in self.lora_magnitude:
            self.lora_magnitude[name].copy_(dense_weight(self.base).norm(dim=1))

    def set_trainable(self, name: str, trainable: bool) -> None:
        """As ``lora.py``'s, but PiSSA's start stays frozen."""
        super().set_trainable(name, trainable)
        for start in (self.pissa_A, self.pissa_B):
            if name in start:
                start[name].requires_grad_(False)

    def forward_adapted(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); in one fused step where the base is a plain frozen matrix."""
        name, config = self.active, self.configs[self.active]
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if autocast or dtype == self.weight.dtype:
            if self.shared is not None and (y := self.shared.output(self, x, dtype)) is not None:
                return y
            if (product := self.product()) is not None:
                return frozen_linears(x, [product], dtype)[0]
        drops, dora = config.dropout > 0 and self.training, name in self.lora_magnitude
        # Quantized, hooked or trainable bases, dropout, DoRA, and torch.compile, which fuses better than we do.
        y, x = self.base(x), x.to(dtype)
        A, B = self.factors(name)
        if drops:
            if name in self.pissa_A:  # its frozen part sees all of x; dropout is for what is trained
                y = y - self.update(x, self.pissa_A[name], self.pissa_B[name]).to(y.dtype)
            x = F.dropout(x, config.dropout)
            A, B = self.lora_A[name], self.lora_B[name]
        update = self.update(x, A, B).to(y.dtype)  # (..., out)
        if not dora:
            return y + update
        if drops:
            wx = F.linear(x, self._residual().to(dtype)).to(y.dtype)  # (..., in) (in, out) -> (..., out)
        else:
            wx = y if self.bias is None else y - self.bias.to(y.dtype)
        # The norm of V is taken as a constant in the backward pass, as in section 4.3 of DoRA's paper.
        stretch = self.lora_magnitude[name] / row_norms(self._tuned_weight()) - 1  # (out,)
        return y + update + stretch.to(y.dtype) * (wx + update)

    def update(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """As ``lora.py``'s, with gradients that keep a graphics card busy."""
        z = thin_linear(x, A.to(x.dtype)) * self.configs[self.active].scaling  # (..., in) (in, rank) -> (..., rank)
        return thin_linear(z, B.to(x.dtype))  # (..., rank) (rank, out) -> (..., out)

    def product(self) -> Product | None:
        """What the fused step computes with; None where it does not, as base and adapter are now."""
        name = self.active
        config = None if self.disabled or self.merged else self.configs.get(name)
        if config is None or (config.dropout > 0 and self.training) or name in self.lora_magnitude:
            return None
        if not self._has_plain_frozen_base():
            return None
        weight = self.weight.t() if self.transposed else self.weight  # (out, in)
        return Product(weight, self.bias, *self.factors(name), config.scaling)

    def version(self) -> tuple[Any, ...]:
        """What the output for an input hangs on, besides the input."""
        tensors = [self.weight, self.bias, *self.parts(self.active).values()]
        return (self.active, *((id(part), part._version) for part in tensors if part is not None))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``(A, B)`` whose product is the whole update: at twice the rank for PiSSA, ``B A - B0 A0``."""
        A, B = self.lora_A[name], self.lora_B[name]
        if name not in self.pissa_A:
            return A, B
        return torch.cat([A, self.pissa_A[name]]), torch.cat([B, -self.pissa_B[name]], dim=1)

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
        A, B = self.factors(self.active)
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
        """As ``lora.py``'s, with what the variants make of it."""
        weight = self._tuned_weight()
        if self.active in self.lora_magnitude:
            weight = weight * (self.lora_magnitude[self.active].float() / row_norms(weight))[:, None]
        return (weight.t() if self.transposed else weight).to(self.weight.dtype).contiguous()


def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """``(A, B)`` such that ``scaling B A`` is the best approximation of ``weight`` (out, in) of that rank."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def row_norms(weight: Tensor) -> Tensor:
    """(out, in) -> (out,); never zero, so that a row of zeros stays one when it is brought to its length."""
    return weight.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


def apply_lora(
    model: nn.Module, config: LoRAConfig, adapter: str = DEFAULT_ADAPTER, initialize: bool = True
) -> list[str]:
    """``lora.apply_lora`` for any variant and for quantized bases.

    Args:
        model: any module with linear layers inside.
        config: of the adapter; its ``target_modules`` are looked for in the model.
        adapter: its name.
        initialize: without, the adapter is zero until its state is loaded, which spares PiSSA its SVDs.

    Returns:
        The dotted names of the adapted layers.

    Raises:
        LoRAError: as ``lora.apply_lora``, or the model has no bias to train, or its 4-bit weights cannot be trained
            through any more.
    """
    names = lora.find_targets(model, config.target_modules)
    attach(model, names, config, adapter, initialize)
    return names


def attach(model: nn.Module, names: list[str], config: LoRAConfig, adapter: str, initialize: bool = True) -> None:
    """Put an adapter of any variant on the layers ``names``; as ``apply_lora``."""
    which = getattr(config, "train_bias", "none")
    check_biases(model, which, names)
    prevent_cpu_repacking(model)
    lora.attach(model, names, config, adapter, initialize)
    share_inputs(model, AdapterLayer)
    if which != "none":
        train_biases(model, bias_modules(model, which, names), config, adapter)
