"""Biases of the base that train beside an adapter, as PEFT's ``bias="lora_only"`` and ``bias="all"``.

They train in place: the base's own parameter is a part of the adapter, and what it was before is laid aside. A module
without adapters whose bias trains gets a ``BiasLayer`` in its place, so that it is found, switched, saved and taken off
like every other adapted layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lora import LoRAConfig, LoRAError, LoRALayer, adapter_names, lora_layers


class TrainsBias(LoRALayer):
    """A layer one of whose parts may be the base's bias; its name in a state dict is that of the base's own bias."""

    trained_bias: nn.ParameterDict

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.trained_bias = nn.ParameterDict()

    def parts(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters, the bias among them where it trains."""
        bias = {"bias": self.trained_bias[name]} if name in self.trained_bias else {}
        return super().parts(name) | bias

    def train_bias(self, name: str, config: LoRAConfig) -> None:
        """Make the base's bias a part of the adapter ``name``."""
        self.configs[name], self.active = config, name
        self.trained_bias[name] = self.base.bias  # type: ignore[assignment]
        self.lay_aside("bias")


class BiasLayer(TrainsBias):
    """A module of any kind of which an adapter trains the bias alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base gives: its bias is the trained one, unless adapters are disabled."""
        return self.base(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Also the base's attributes, which a model may read of its own modules."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def bias_modules(model: nn.Module, which: str, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules whose bias an adapter of the layers ``names`` trains, by the name they have in the base model.

    Args:
        which: ``none``, ``lora_only`` (the layers ``names`` alone) or ``all``.
    """
    layers = lora_layers(model)
    inside = tuple(f"{name}." for name in layers)
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        base = layers[name].base if name in layers else module
        if not name.startswith(inside) and base._parameters.get("bias") is not None:
            chosen[name] = module
    if which == "lora_only":
        chosen = {name: chosen[name] for name in names if name in chosen}
    return chosen if which != "none" else {}


def trained_biases(model: nn.Module) -> dict[str, Tensor]:
    """The biases that an adapter of the model trains, by their names in the base model."""
    layers = {name: layer for name, layer in lora_layers(model).items() if isinstance(layer, TrainsBias)}
    return {f"{name}.bias": layer.base.bias for name, layer in layers.items() if layer.trained_bias}  # type: ignore


def check_biases(model: nn.Module, which: str, names: Iterable[str]) -> None:
    """Refuse what cannot be, before anything changes.

    Raises:
        LoRAError: there is no bias to train, one that has no module to stand in, or another adapter on the model.
    """
    if (others := adapter_names(model)) and (which != "none" or trained_biases(model)):
        raise LoRAError(f"an adapter that trains biases must be the only one; the model has: {', '.join(others)}")
    modules = bias_modules(model, which, names)
    if which != "none" and not modules:
        raise LoRAError(f"train_bias={which!r} finds no bias in this model; leave it at 'none'")
    if "" in modules:
        raise LoRAError(f"train_bias={which!r}: {type(model).__name__} has a bias of its own; put it inside a module")


def train_biases(model: nn.Module, modules: Iterable[str], config: LoRAConfig, adapter: str) -> None:
    """Add the biases of ``modules``, by name, to an adapter that is on the model."""
    for name in list(modules):
        layer = model.get_submodule(name)
        if not isinstance(layer, TrainsBias):
            layer = BiasLayer(layer)
            model.set_submodule(name, layer)
        layer.train_bias(adapter, config)
        layer.set_trainable(adapter, True)
