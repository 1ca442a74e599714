"""Layers that share an input share products: the numbers of each by itself, in whatever order a model calls them."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from lora_models import make_model, output, randomize
from torch import Tensor, nn

from lora import adapters_disabled, lora_layers, lora_parameters, merge, set_adapter, unmerge
from stocklora.adapters import kernel
from stocklora.adapters.layer import AdapterConfig, apply_lora


def adapted(family: str = "llama", seed: int = 0, **options: Any) -> nn.Module:
    model = make_model(family, head=False, seed=seed)
    apply_lora(model, AdapterConfig(**{"rank": 3, "alpha": 6.0, **options}))
    randomize(model)
    return model.train()


def alone(model: nn.Module) -> nn.Module:
    """The same model with every layer by itself."""
    other = copy.deepcopy(model)
    for layer in lora_layers(other).values():
        layer.shared = None
    return other


def gradients(model: nn.Module, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        hidden = output(model)
    hidden.float().square().mean().backward()
    return hidden.detach(), [parameter.grad.clone() for parameter in lora_parameters(model)]


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """How many layers each fused step was made for."""
    counts: list[int] = []
    real = kernel.FrozenLinears.apply

    def counted(x: Tensor, scalings: tuple[float, ...], *rest: Any) -> Any:
        counts.append(len(scalings))
        return real(x, scalings, *rest)

    monkeypatch.setattr(kernel.FrozenLinears, "apply", counted)
    return counts


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"rslora": True, "rank": 5}], ids=str)
@pytest.mark.parametrize(("family", "autocast"), [("llama", False), ("qwen3", False), ("llama", True)])
def test_forward_and_gradients_are_those_of_each_layer_alone(family, autocast, options, products) -> None:
    model = adapted(family, **options)
    want, have = gradients(alone(model), autocast), gradients(model, autocast)
    assert products == [1] * 14 + [3, 1, 2, 1] * 2  # two blocks of seven layers
    close: dict[str, float] = {"rtol": 3e-2, "atol": 3e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(have, want, **close)


def test_checkpointing_recomputes_the_same(products) -> None:
    model = adapted()
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model), want)
    assert products.count(3) == 6  # twice with checkpointing


def test_a_second_derivative_goes_through() -> None:
    model = adapted(rank=1)
    layers = lora_layers(model)
    q, k = layers["layers.0.self_attn.q_proj"], layers["layers.0.self_attn.k_proj"]
    x = torch.randn(4, 32, dtype=torch.double, requires_grad=True)
    model.double()

    def both(x: Tensor, *_: Tensor) -> Tensor:
        return torch.cat([q(x), k(x)], dim=-1)

    inputs = (x, *q.parts("default").values(), *k.parts("default").values())
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_sums_over_rows_in_parts_are_the_same_gradients(family, monkeypatch) -> None:
    """Of the fused step, of each layer's own, and where there is none because somebody listens at the base."""
    model = adapted(family)
    want = gradients(model)
    monkeypatch.setitem(kernel.ROW_PARTS, "cpu", 4)  # of 24 tokens
    hooked = copy.deepcopy(model)
    for layer in lora_layers(hooked).values():
        layer.base.register_forward_hook(lambda *_: None)
    for one in (model, alone(model), hooked):
        torch.testing.assert_close(gradients(one), want, rtol=1e-5, atol=1e-5)
    want = gradients(model.double())
    monkeypatch.undo()
    torch.testing.assert_close(gradients(model), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [8, 6])  # the second does not go into parts
def test_a_thin_product_in_parts_has_first_and_second_derivatives(rows, monkeypatch) -> None:
    monkeypatch.setitem(kernel.ROW_PARTS, "cpu", 4)
    x = torch.randn(2, rows // 2, 5, dtype=torch.double, requires_grad=True)
    A, B = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((2, 5), (3, 2)))

    def update(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return kernel.thin_linear(kernel.thin_linear(x, A), B)

    torch.testing.assert_close(update(x, A, B), x @ A.t() @ B.t())
    assert torch.autograd.gradcheck(update, (x, A, B))
    assert torch.autograd.gradgradcheck(update, (x, A, B))


class Crossed(nn.Module):
    """Queries of one input, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 5) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(y) + self.v_proj(y)


def test_layers_that_read_different_inputs_are_told_apart(products) -> None:
    torch.manual_seed(0)
    model = Crossed()
    apply_lora(model, AdapterConfig(rank=2))
    randomize(model)
    plain = alone(model)
    x, y = torch.randn(2, 4, 6)
    for _ in range(3):
        torch.testing.assert_close(model(x, y), plain(x, y))
    assert products[0] == 3  # tried once
    assert set(products[1:]) == {1}
    assert model.q_proj.shared.layers == []


def test_what_changed_in_between_is_not_an_old_output(products) -> None:
    model = adapted()
    layers = lora_layers(model)
    q, k, v = (layers[f"layers.0.self_attn.{name}_proj"] for name in "qkv")
    x = torch.randn(3, 32)
    q(x)
    with torch.no_grad():
        k.lora_B["default"].mul_(2.0)
    torch.testing.assert_close(k(x), k.base(x) + k.update(x, k.lora_A["default"], k.lora_B["default"]))
    model = adapted()
    layers = lora_layers(model)
    q, k, v = (layers[f"layers.0.self_attn.{name}_proj"] for name in "qkv")
    q(x)
    x.mul_(2.0)
    torch.testing.assert_close(v(x), v.base(x) + v.update(x, v.lora_A["default"], v.lora_B["default"]))


def test_each_state_of_adapters_is_that_of_each_layer_alone() -> None:
    model = adapted()
    apply_lora(model, AdapterConfig(rank=2, target_modules=("q_proj", "up_proj")), adapter="few")
    randomize(model, 2)
    plain = alone(model)
    for name in ("few", "default"):
        for one in (model, plain):
            set_adapter(one, name)
        torch.testing.assert_close(gradients(model), gradients(plain))
    with adapters_disabled(model), adapters_disabled(plain):
        torch.testing.assert_close(output(model), output(plain))
    for one in (model, plain):
        merge(one)
    torch.testing.assert_close(output(model), output(plain))
    for one in (model, plain):
        unmerge(one)
    torch.testing.assert_close(gradients(model), gradients(plain))
    with torch.inference_mode():
        torch.testing.assert_close(output(model), output(plain))
    torch.testing.assert_close(gradients(model), gradients(plain))


def test_an_output_may_be_changed_in_place_or_left_unused() -> None:
    layers = lora_layers(adapted())
    q, k, v = (layers[f"layers.0.self_attn.{name}_proj"] for name in "qkv")
    x = torch.randn(3, 32, requires_grad=True)
    first, unused, last = k(x), q(x), v(x)
    want = (2.0 * first + last).detach()
    first.mul_(2.0)
    torch.testing.assert_close(first + last, want)
    (first + last).sum().backward()
    assert unused.shape == (3, 32)
    assert q.lora_B["default"].grad is None
    assert k.lora_B["default"].grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_copies_and_pickles_share_among_themselves(products) -> None:
    model = adapted()
    want = gradients(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        products.clear()
        torch.testing.assert_close(gradients(other), want)
        assert products == [3, 1, 2, 1] * 2
        attention = other.layers[0].self_attn
        assert attention.q_proj.shared is attention.v_proj.shared
        assert attention.q_proj.shared.layers[2] is attention.v_proj
