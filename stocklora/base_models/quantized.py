"""Quantized linear layers of bitsandbytes: made, kept causal, and read as plain weights."""

from __future__ import annotations

import contextlib
import importlib.util
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lora import LoRAError, is_conv1d
from stocklora.cli.console import UserError


def check_quantization(quantization: str, device: torch.device, flag: str) -> None:
    """Refuse a base that cannot be quantized here.

    Args:
        flag: how messages name what was asked for.

    Raises:
        UserError: bitsandbytes is missing, or does not know the device.
    """
    if quantization == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{flag} needs bitsandbytes; install it: pip install bitsandbytes")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{flag} works on cpu and cuda, not on {device.type}; add --device cpu")


def quantization_config(quantization: str, dtype: torch.dtype, skeleton: Any = None) -> Any:
    """What ``from_pretrained`` takes for ``8bit`` or ``4bit``.

    Args:
        dtype: what 4-bit layers compute in.
        skeleton: the model on the ``meta`` device; its layers whose weight is read without calling them stay whole.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    whole = [] if skeleton is None else weights_read_directly(skeleton)
    # What transformers itself leaves out is left out only where nothing else is named.
    skipped = sorted({*whole, *get_keys_to_not_convert(skeleton)}) if whole else None
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    if quantization != "4bit":
        raise ValueError(f"quantization must be none, 8bit or 4bit, not {quantization!r}")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )  # fmt: skip


def weights_read_directly(skeleton: Any) -> list[str]:
    """Names of linear layers whose weight the model computes with by itself, which a packed weight would break.

    Args:
        skeleton: a model on the ``meta`` device, where a pass costs nothing; where it cannot compute there (it looks at
            numbers), what was seen until then.
    """
    layers = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    owners: dict[int, set[str]] = {}
    for name, layer in layers.items():
        owners.setdefault(id(layer.weight), set()).add(name)
    watch = _WeightWatch(owners)
    hooks = []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: watch.inside.add(name)))
        hooks.append(layer.register_forward_hook(lambda *_, name=name: watch.inside.discard(name)))
    ids = torch.zeros((1, 8), dtype=torch.long, device="meta")
    for training in (True, False):
        skeleton.train(training)
        watch.inside.clear()
        with contextlib.suppress(Exception), torch.no_grad(), watch:  # a model's code may fail on meta in any way
            skeleton(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sorted(watch.seen)


class _WeightWatch(TorchFunctionMode):
    """Notes which of some tensors are computed with, or reached into, while their own layer does not run.

    Args:
        names: of the layers that a weight is of, by its identity.
    """

    FACTS = ("device", "dtype", "shape", "ndim", "requires_grad", "is_meta", "grad", "layout", "is_leaf")

    def __init__(self, names: dict[int, set[str]]) -> None:
        super().__init__()
        self.names = names
        self.inside: set[str] = set()
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fact = getattr(getattr(func, "__self__", None), "__name__", "") in self.FACTS
        if not fact and getattr(func, "__name__", "") not in ("size", "dim", "is_floating_point", "numel"):
            for value in (*args, *(kwargs or {}).values()):
                names = self.names.get(id(value), set())
                if names.isdisjoint(self.inside):
                    self.seen |= names
        if getattr(func, "__name__", "") == "__bool__" and args[0].is_meta:
            return True  # numbers that are not there; a mask of a whole sequence has this answer
        return func(*args, **(kwargs or {}))


def steady_quantized_layers(model: nn.Module) -> None:
    """Make bitsandbytes' layers one causal function, the same in training and in use.

    Its int8 layers quantize what they read as well, unless they train on a CPU: the function that is used is then
    not the one that was trained (5% away on SmolLM2). They also single out columns by their largest value over all
    tokens, later days and other tickers of the batch included. Here weights alone are int8. Its nf4 layers repack
    their weights at the first use without gradient on a CPU with bfloat16, for a kernel that has no gradient.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.forward = types.MethodType(_int8_forward, module)  # type: ignore[method-assign]
    prevent_cpu_repacking(model)


def prevent_cpu_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU, where that would end their training.

    On a processor with AVX512-BF16 a ``Linear4bit`` repacks its weight at its first pass in eval mode. From then on
    its numbers differ (scales rounded to bfloat16) and no gradient goes through it, in train mode either.

    Raises:
        LoRAError: a weight is repacked already, which cannot be undone exactly.
    """
    layers = {name: module for name, module in model.named_modules() if "Linear4bit" in class_names(module)}
    for name, layer in layers.items():
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise LoRAError(f"{name} was repacked by a pass in eval mode; load the 4-bit base anew and adapt it first")
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def class_names(module: nn.Module) -> set[str]:
    """Of a module's class and those that it inherits from: bitsandbytes' need not be there to be told."""
    return {cls.__name__ for cls in type(module).__mro__}


@torch.no_grad()
def dense_weight(base: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in) in float32, dequantized where it is quantized."""
    weight: Any = base.weight
    dense = weight.detach()
    if "Linear4bit" in class_names(base):
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(weight.data, weight.quant_state)
    elif "Linear8bitLt" in class_names(base) and not weight.is_floating_point():
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The first pass moves the scales from the weight into the layer's state.
        dense = int8_vectorwise_dequant(weight.data, weight.SCB if base.state.SCB is None else base.state.SCB)  # type: ignore
    return (dense.t() if is_conv1d(base) else dense).float()


def _int8_forward(layer: Any, x: Tensor) -> Tensor:
    scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # bitsandbytes moves it about
    return _Int8Linear.apply(x, layer.weight.data, scale, layer.bias)


class _Int8Linear(torch.autograd.Function):
    """``y = x W' + bias`` for a frozen ``W = codes * scale / 127``, of which only the codes are kept for backward.

    Shapes: x (..., in), codes (out, in) int8, scale (out,) float32, bias (out,) or None; returns (..., out).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(x, _dequantized(codes, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes, scale = ctx.saved_tensors
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        grad_x = grad @ _dequantized(codes, scale, grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_bias


def _dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes * (scale / 127.0)[:, None]).to(dtype)
