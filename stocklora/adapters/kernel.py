"""The products of adapted layers over frozen weights, in fewer passes over wide tensors than written one by one.

``FrozenLinears`` is one layer, or several that read the same input: queries, keys and values; gate and up. Those share
the products with A, which are stacked, and have one gradient of their input where each had its own, to be added up.
``SharedInput`` finds out at the first of such layers, since a model calls them one after the other.

Where no such step is possible (quantized bases, torch.compile) ``thin_linear`` makes an adapter's two products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Into how many parts the rows of a gradient's sum are cut, by kind of device. A, B and z are thin, so that tens of
# thousands of rows are summed into few numbers: as one product that is work for few of a graphics card's processors,
# as a batch of products work for all. A power of two, which goes into the lengths that batches are padded on to.
ROW_PARTS = {"cuda": 32}


@dataclass(frozen=True)
class Product:
    """What one layer brings: weight (out, in), bias (out,) or None, A (rank, in), B (out, rank), scaling."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float


def frozen_linears(x: Tensor, products: Sequence[Product], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``y = x W' + bias + scaling (x A') B'`` of each, (..., in) -> (..., out) in ``dtype``; see ``FrozenLinears``."""
    scalings = tuple(product.scaling for product in products)
    tensors = [getattr(product, name) for name in ("weight", "bias", "A", "B") for product in products]
    outputs: tuple[Tensor, ...] = FrozenLinears.apply(x, scalings, dtype, *tensors)
    return outputs


class FrozenLinears(torch.autograd.Function):
    """Layers with frozen weights and adapters that read the same ``x``; no wide temporary, no second copy of ``x``.

    Written as separate operations, an update costs three tensors as wide as ``y`` (``B A x``, its scaled copy,
    the sum) and under autocast keeps low-precision copies of ``W`` and ``x`` until the backward pass. Here the
    update is added in place, the scale goes into the small ``B``, and what is kept is what exists anyway.

    For the gradients g of the y: ``gx = sum of g W + s (g B) A``, ``gA = s (g B)' x``, ``gB = s g' (x A')``, and the
    sum over g's rows for a bias. Thin products are written with the thin side first, ``A x'`` and not ``x A'``: the
    same numbers, up to five times faster in float32 on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scalings: tuple[float, ...], dtype: torch.dtype, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases, As, Bs = _in_four(tensors)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (n, in)
        z = _stacked(As, dtype) @ rows.t()  # (ranks, n)
        outputs = []
        for weight, bias, B, own, scaling in zip(weights, biases, Bs, _split(z, As), scalings, strict=True):
            # Made in its final shape: a view is what autograd would not let the model change in place.
            y = rows.new_empty(*x.shape[:-1], weight.shape[0])
            flat = y.view(-1, y.shape[-1])  # (n, out)
            if bias is None:
                torch.mm(rows, weight.to(dtype).t(), out=flat)
            else:
                torch.addmm(bias.to(dtype), rows, weight.to(dtype).t(), out=flat)
            flat.addmm_(own.t(), B.to(dtype).t(), alpha=scaling)
            outputs.append(y)
        ctx.save_for_backward(x, z, *weights, *As, *Bs)
        ctx.scalings = scalings
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        count = len(ctx.scalings)
        x, z, *saved = ctx.saved_tensors
        weights, As, Bs = saved[:count], saved[count : 2 * count], saved[2 * count :]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        used = [index for index, grad in enumerate(grads) if grad is not None]
        results: list[Tensor | None] = [None] * (4 * count)
        if not used:
            return (None, None, None, *results)
        dtype = next(grad.dtype for grad in grads if grad is not None)
        with torch.autocast(x.device.type, enabled=False):  # the casts below are all there should be
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (n, in)
            A = _stacked([As[index] for index in used], dtype)  # (ranks, in)
            if torch.is_grad_enabled():  # a second derivative is wanted: z must lead back to x and A
                z = _stacked(As, dtype) @ rows.t()
            own = _split(z, As)
            flat = {index: grad.reshape(-1, grad.shape[-1]) for index, grad in enumerate(grads) if grad is not None}
            thin = [(Bs[index].to(dtype) * ctx.scalings[index]).t() @ flat[index].t() for index in used]
            gz = thin[0] if len(thin) == 1 else torch.cat(thin)  # (ranks, n)
            gx = None
            if needs_x:
                gx = flat[used[0]] @ weights[used[0]].to(dtype)
                for index in used[1:]:
                    gx.addmm_(flat[index], weights[index].to(dtype))
                gx = gx.addmm_(gz.t(), A).view(x.shape).to(x.dtype)
            if any(needs[2 * count : 3 * count]):
                parts = _split(sum_over_rows(gz, rows), [As[index] for index in used])
                for index, part in zip(used, parts, strict=True):
                    results[2 * count + index] = part.to(As[index].dtype)
            for index in used:
                if needs[count + index]:
                    results[count + index] = flat[index].sum(0, dtype=torch.float32)
                if needs[3 * count + index]:
                    gB = sum_over_rows(own[index], flat[index]).t()
                    results[3 * count + index] = gB.to(Bs[index].dtype) * ctx.scalings[index]
        return (gx, None, None, *results)


class ThinLinear(torch.autograd.Function):
    """``x W'``, (..., in) (out, in) -> (..., out), for a W that has few rows or few columns and is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        gx = grad @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return gx, None
        flat, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (n, out), (n, in)
        return gx, sum_over_rows(flat.t(), rows).to(weight.dtype)


def thin_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` without bias, for a thin ``weight``."""
    result: Tensor = ThinLinear.apply(x, weight) if x.device.type in ROW_PARTS else F.linear(x, weight)
    return result


def sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left right``, (a, n) (n, b) -> (a, b); in parts as ``ROW_PARTS`` says, which are added in float32 or more."""
    parts = ROW_PARTS.get(left.device.type, 1)
    if parts == 1 or left.shape[1] % parts:
        return left @ right
    by_part = left.unflatten(1, (parts, -1)).transpose(0, 1) @ right.unflatten(0, (parts, -1))  # (parts, a, b)
    return by_part.sum(0, dtype=torch.promote_types(by_part.dtype, torch.float32))


def _in_four(tensors: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    count = len(tensors) // 4
    weights, biases, As, Bs = (tensors[at : at + count] for at in range(0, 4 * count, count))
    return weights, biases, As, Bs


def _stacked(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (As[0] if len(As) == 1 else torch.cat(list(As))).to(dtype)


def _split(stacked: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    """Rows of a stack, by the ranks of its parts."""
    return stacked.split([len(A) for A in As])


# ------------------------------------------------------------------------------------------- layers side by side

# What such layers are called where they stand side by side. Nothing is taken for granted: see ``SharedInput``.
SIDE_BY_SIDE = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"), ("w1", "w3"), ("fc1", "fc3"),
)  # fmt: skip


class SharedInput:
    """Adapted layers that are expected to be called one after the other with the same input.

    The first of them computes the outputs of all, and the others find theirs. Where a model calls one with another
    input, each computes by itself from then on.

    Args:
        layers: with ``product()``, what they bring, or None where they cannot take part; and with ``version()``, which
            tensors that is made of, in which state.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self._x: Tensor | None = None
        self._found: dict[int, tuple[tuple[Any, ...], Tensor]] = {}  # by the layer's identity: made of what, and output

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: outputs in passing are no part of a model."""
        return {"layers": self.layers, "_x": None, "_found": {}}

    def output(self, layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What ``layer`` makes of ``x``, or None where it is to compute by itself."""
        if torch.compiler.is_compiling():  # what is kept between calls is nothing that a graph can hold
            return None
        if not self.layers or not torch.is_grad_enabled() or x.is_inference():
            return None
        if x is self._x and (found := self._found.pop(id(layer), None)) is not None:
            if found[0] == (x._version, dtype, layer.version()):
                self._x = x if self._found else None
                return found[1]
            self._found[id(layer)] = found
        if self._found:  # outputs that nobody asked for: these layers do not read the same
            self.layers, self._found, self._x = [], {}, None
            return None
        products = [other.product() for other in self.layers]
        if any(product is None for product in products) or len({product.weight.dtype for product in products}) > 1:
            return None
        outputs = frozen_linears(x, products, dtype)
        made_of = [(x._version, dtype, other.version()) for other in self.layers]
        self._x = x
        self._found = {id(other): (made, y) for other, made, y in zip(self.layers, made_of, outputs, strict=True)}
        return self._found.pop(id(layer))[1]


def share_inputs(model: nn.Module, kind: type) -> None:
    """Have layers of class ``kind`` that stand side by side share their input; see ``SharedInput``."""
    for parent in model.modules():
        for names in SIDE_BY_SIDE:
            layers = [getattr(parent, name, None) for name in names]
            alike = all(isinstance(layer, kind) for layer in layers)
            if alike and len({layer.in_features for layer in layers}) == 1:  # type: ignore[union-attr]
                shared = SharedInput(layers)
                for layer in layers:
                    layer.shared = shared  # type: ignore[union-attr]
