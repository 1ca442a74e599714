"""Any linear layer under any options computes, learns and merges as PEFT's does from the same weights."""

from __future__ import annotations

from typing import Any

import peft
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora
from lora import LoRAConfig
from stocklora.adapters import layer as variants
from stocklora.adapters.layer import AdapterConfig

SIZES = st.integers(1, 9)


class Around(nn.Module):
    """A model around one layer, with an output head that takes no adapter."""

    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = {
            "linear": lambda: nn.Linear(inputs, outputs),
            "without bias": lambda: nn.Linear(inputs, outputs, bias=False),
            "Conv1D": lambda: Conv1D(outputs, inputs),
        }
        self.layer = layers[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def filled(parameters: dict[str, nn.Parameter], scale: float) -> None:
    """Weights that depend on their name and shape alone."""
    with torch.no_grad():
        for number, name in enumerate(sorted(parameters)):
            draw = torch.Generator().manual_seed(number)
            parameters[name].copy_(scale * torch.randn(parameters[name].shape, generator=draw))


def results(model: nn.Module, trained: dict[str, nn.Parameter], x: Tensor) -> list[Tensor]:
    """Output and gradients of input and adapters; dropout falls as seed 5 says."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    grads = [trained[name].grad for name in sorted(trained)]
    return [y.detach(), x.grad, *(grad for grad in grads if grad is not None)]


@given(
    kind=st.sampled_from(["linear", "without bias", "Conv1D"]),
    sizes=st.tuples(SIZES, SIZES),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    rank=st.integers(1, 5),
    alpha=st.sampled_from([0.5, 4.0, 16.0]),
    rslora=st.booleans(),
    dora=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    ours=st.sampled_from(["lora.py", "variants"]),
)
def test_one_layer_is_pefts(kind, sizes, shape, rank, alpha, rslora, dora, dropout, ours) -> None:
    inputs, outputs = sizes
    dora = dora and ours == "variants"
    options: dict[str, Any] = {"rank": rank, "alpha": alpha, "rslora": rslora, "dropout": dropout}
    mine, base = Around(kind, inputs, outputs), Around(kind, inputs, outputs)
    for model in (mine, base):
        filled(dict(model.named_parameters()), 0.7)
    if ours == "lora.py":
        lora.apply_lora(mine, LoRAConfig(**options))
    else:
        variants.apply_lora(mine, AdapterConfig(**options, dora=dora))
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, use_dora=dora, lora_dropout=dropout,  # type: ignore[arg-type]
        target_modules=["layer"], fan_in_fan_out=kind == "Conv1D",
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    trained = [{name: p for name, p in model.named_parameters() if p.requires_grad} for model in (mine, theirs)]
    assert [len(parameters) for parameters in trained] == [2 + dora, 2 + dora]
    for parameters in trained:  # lora_A, lora_B, lora_magnitude: in the same order by name
        filled(parameters, 0.5)
    x = torch.randn(*shape, inputs, generator=torch.Generator().manual_seed(9))
    found, expected = (results(model, parameters, x) for model, parameters in zip((mine, theirs), trained, strict=True))
    assert len(found) == len(expected) == 4 + dora
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)

    with torch.no_grad():
        used = mine.eval()(x)
        torch.testing.assert_close(used, theirs.eval()(x), rtol=2e-4, atol=2e-5)
        with lora.adapters_disabled(mine), theirs.disable_adapter():
            torch.testing.assert_close(mine(x), theirs(x))
        lora.merge(mine)
        torch.testing.assert_close(mine(x), used, rtol=2e-4, atol=2e-5)
    lora.remove_lora(mine)
    merged = theirs.merge_and_unload().state_dict()  # type: ignore[operator]
    assert mine.state_dict().keys() == merged.keys()
    for name, weight in mine.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=2e-4, atol=2e-5)
