"""The probe: layers that an adapter would be lost on are found by trying, and the model is as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from lora import LoRAConfig, LoRAError, apply_lora, is_linear, lora_layers
from stocklora.adapters.layer import AdapterConfig
from stocklora.adapters.layer import apply_lora as apply_any
from stocklora.adapters.probe import kind_of, lost_adapters


class Block(nn.Module):
    """A layer of each kind that an adapter is lost on, beside a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.read_directly, self.without_use = (nn.Linear(8, 8) for _ in range(3))
        self.halved_in_use, self.other_path, self.called_and_read = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(x) + x @ self.read_directly.weight.T
        self.without_use(x)
        y = y + self.halved_in_use(x) * (1.0 if self.training else 0.5) * 2
        y = y + (self.other_path(x) if torch.is_grad_enabled() else x @ self.other_path.weight.T)
        return y + self.called_and_read(x) + x @ self.called_and_read.weight.T


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.seldom = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.seldom[0](x)  # an expert to which each token was sent


def probed(model: nn.Module, names: list[str] | None = None) -> dict[str, str]:
    x = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(3))
    return lost_adapters(model, names or lora.find_targets(model, "all-linear"), lambda: model(x))


def test_each_way_to_lose_an_adapter_is_found_and_a_sound_layer_is_not() -> None:
    torch.manual_seed(0)
    lost = probed(Model())
    kinds = {kind_of(name): reason for name, reason in lost.items()}
    # Not halved_in_use: there the base itself is another function in use, which no adapter could mend.
    found = {"read_directly", "without_use", "other_path", "called_and_read"}
    assert kinds.keys() == {f"layers.*.{name}" for name in found}
    assert "never calls it" in kinds["layers.*.read_directly"]
    assert "reaches no forecast" in kinds["layers.*.without_use"]
    assert len(lost) == 2 * len(kinds)


def test_the_fast_path_of_an_encoder_layer_is_found() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    lost = probed(model)
    assert lost.keys() == {"linear1", "linear2"}
    assert all("in training than in a forecast" in reason for reason in lost.values())


def test_a_weight_of_two_layers_takes_no_adapter() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    assert probed(model).keys() == {"0", "2"}


def test_the_model_and_the_random_state_are_as_before() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    model.layers[0].plain.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needs = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.random.get_rng_state()
    probed(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not lora_layers(model)
    assert not model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ------------------------------------------------------------------------------------- what the code around expects


class Router(nn.Linear):
    """As Llama 4's: a linear layer that also chooses."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Noted(nn.Linear):
    """A subclass with a forward of its own that is linear all the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_subclass_is_linear_if_it_computes_so(device) -> None:
    with torch.device(device):
        assert is_linear(Noted(4, 3))
        assert not is_linear(Router(4, 3))
    assert not is_linear(Scaled(4, 3))
    with pytest.raises(LoRAError, match="is a Router, not a linear layer"):
        apply_lora(nn.Sequential(nn.Linear(4, 4), nn.Sequential(Router(4, 3))), LoRAConfig(target_modules=("1.0",)))


@pytest.mark.parametrize("apply", [apply_lora, apply_any])
def test_a_model_may_change_a_layers_output_in_place(apply) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    out_of_place = nn.Sequential(model[0], nn.ReLU(), model[2])
    apply(model, AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in lora.lora_parameters(model):
            parameter.add_(0.1)
    out_of_place[0], out_of_place[2] = model[0], model[2]
    x = torch.randn(2, 5, 4)
    gradients = []
    for each in (model, out_of_place):
        model.zero_grad()
        each(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in lora.lora_parameters(model)])  # type: ignore
    torch.testing.assert_close(*gradients)


def test_an_adapted_layer_has_the_sizes_of_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    apply_lora(model, LoRAConfig(rank=2))
    assert (model[0].in_features, model[0].out_features) == (4, 6)
