"""How the base model is tuned: which weights train, how they are attached, saved and brought back.

The one place that knows the methods apart. The training loop, the files and the forecaster see a model with
trainable parameters, and ask here for its parameter groups and its trained state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lora
from llm_model import StockForecaster, facts_of
from lora import LoRAError
from stocklora.adapters.layer import AdapterConfig, apply_lora, principal_factors
from stocklora.adapters.peft_check import refusal
from stocklora.adapters.probe import kind_of, lost_adapters
from stocklora.base_models.loading import a_few_tokens, hidden_states
from stocklora.base_models.split import inside_last_layers, split_form
from stocklora.cli.console import UserError, listed


class Tuning:
    """What trains in the backbone; this one is ``--method head``: nothing does."""

    def attach(self, model: StockForecaster, fresh: bool) -> None:
        """Freeze the backbone and add what trains.

        Args:
            fresh: whether training is to start from here; else ``load`` follows.
        """
        model.backbone.requires_grad_(False)
        model.frozen_layers = facts_of(model.backbone.config).layers

    def groups(self, model: StockForecaster, rate: float, lora_plus_ratio: float | None) -> list[dict[str, Any]]:
        """The optimizer's groups of the backbone's parameters, the main one first; see ``parameter_groups``."""
        return []

    def state(self, model: StockForecaster) -> dict[str, Tensor]:
        """Copies on the CPU of all that training changed in the backbone."""
        return {}

    def load(self, model: StockForecaster, state: Mapping[str, Tensor]) -> None:
        """Put ``state`` back.

        Raises:
            LoRAError, RuntimeError: a state that does not fit the model.
        """
        if state:
            raise RuntimeError("it holds adapters, and its method is head")

    def merge(self, model: StockForecaster) -> None:
        """Turn the backbone into a plain model with what was trained in its weights."""


class OwnLoRA(Tuning):
    """``--method lora``: the adapters of ``lora.py``."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    def attach(self, model: StockForecaster, fresh: bool) -> None:
        apply_lora(model.backbone, self.config, initialize=fresh)

    def groups(self, model: StockForecaster, rate: float, lora_plus_ratio: float | None) -> list[dict[str, Any]]:
        trained = {name: value for name, value in model.backbone.named_parameters() if value.requires_grad}
        return adapter_groups(trained, rate, lora_plus_ratio)

    def state(self, model: StockForecaster) -> dict[str, Tensor]:
        return lora.lora_state_dict(model.backbone)

    def load(self, model: StockForecaster, state: Mapping[str, Tensor]) -> None:
        lora.load_lora_state_dict(model.backbone, state)

    def merge(self, model: StockForecaster) -> None:
        lora.merge(model.backbone)
        lora.remove_lora(model.backbone)


class PeftLoRA(Tuning):
    """``--method peft``: the same adapters by the PEFT library; their state has the names that ``lora.py`` gives.

    PiSSA trains against a base from which its start was taken away. The start is saved too, as ``lora.py`` does, so
    that no SVD has to come out the same again. It is not left to PEFT, which rounds the factors to a bfloat16 base's
    type after it took them away unrounded.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self._start: dict[str, Tensor] = {}  # PiSSA's factors, by name

    def attach(self, model: StockForecaster, fresh: bool) -> None:
        """As ``Tuning``.

        Raises:
            LoRAError: PEFT does not adapt such layers, or would adapt others in their place.
        """
        import peft

        names = lora.find_targets(model.backbone, self.config.target_modules)
        layers = [model.backbone.get_submodule(name) for name in names]
        options = peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]
            lora_dropout=self.config.dropout,
            target_modules=names,
            use_rslora=self.config.rslora,
            use_dora=self.config.dora,
            bias=self.config.train_bias,  # type: ignore[arg-type]
            fan_in_fan_out=all(type(layer).__name__ == "Conv1D" for layer in layers),
        )
        own = "--method lora adapts them"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on layers of both orientations, which it then gets right
            try:
                model.backbone = peft.get_peft_model(model.backbone, options)  # type: ignore[arg-type]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise LoRAError(f"PEFT cannot adapt these layers ({refusal(error)}); {own}") from None
        there = {name for name, _ in self._layers(model)}
        if others := sorted(there.symmetric_difference(names)):
            raise LoRAError(
                f"PEFT puts adapters on other layers of this base than on those asked for ({listed(others, 3)}); {own}"
            )
        parameters = self._parameters(model)
        if self.config.train_bias != "none" and not any(name.endswith(".bias") for name in parameters):
            raise LoRAError(f"--train_bias {self.config.train_bias} finds no bias in this model; leave it out")
        if self.config.init == "pissa" and fresh:
            self._take_away(model, self._singular_factors(model))
            start = {name.replace(".pissa_", ".lora_"): tensor for name, tensor in self._start.items()}
            copy_into({name: parameters[name] for name in start}, start)

    def groups(self, model: StockForecaster, rate: float, lora_plus_ratio: float | None) -> list[dict[str, Any]]:
        return adapter_groups(self._parameters(model), rate, lora_plus_ratio)

    def state(self, model: StockForecaster) -> dict[str, Tensor]:
        return {**copies_on_cpu(self._parameters(model)), **copies_on_cpu(self._start)}

    def load(self, model: StockForecaster, state: Mapping[str, Tensor]) -> None:
        start = {name: tensor for name, tensor in state.items() if ".pissa_" in name}
        if (self.config.init == "pissa") != bool(start):
            raise RuntimeError("it was trained from another start of the adapters (PiSSA)")
        copy_into(self._parameters(model), {name: tensor for name, tensor in state.items() if name not in start})
        if start and not self._start:
            self._take_away(model, start)
        elif any(name not in self._start or not torch.equal(start[name], self._start[name]) for name in start):
            raise RuntimeError("its PiSSA start is not the one that was taken from the base")

    def merge(self, model: StockForecaster) -> None:
        model.backbone = model.backbone.merge_and_unload(safe_merge=True)  # type: ignore[operator, assignment]

    def _parameters(self, model: StockForecaster) -> dict[str, nn.Parameter]:
        """What trains, by the names of ``lora.py``."""
        named = model.backbone.named_parameters()
        return {name_of_peft(name): parameter for name, parameter in named if parameter.requires_grad}

    def _singular_factors(self, model: StockForecaster) -> dict[str, Tensor]:
        factors: dict[str, Tensor] = {}
        for name, layer in self._layers(model):
            weight = self._weight(layer).float()
            if self.config.rank > (most := min(weight.shape)):
                raise LoRAError(f"PiSSA at rank {self.config.rank} is too much for {name}, which has {most} values")
            A, B = principal_factors(weight, self.config.rank, self.config.scaling)
            factors |= {f"{name}.pissa_A": A, f"{name}.pissa_B": B}
        return factors

    def _take_away(self, model: StockForecaster, start: Mapping[str, Tensor]) -> None:
        """``W <- W - scaling B A`` with the start's factors."""
        for name, layer in self._layers(model):
            weight = self._weight(layer)  # a view
            A, B = (start[f"{name}.pissa_{part}"].to(weight.device) for part in "AB")
            weight.copy_(torch.addmm(weight.float(), B, A, alpha=-self.config.scaling))
        self._start = copies_on_cpu(start)

    @staticmethod
    def _layers(model: StockForecaster) -> list[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        named = model.backbone.named_modules()
        return [(name_of_peft(name), module) for name, module in named if isinstance(module, LoraLayer)]

    @staticmethod
    def _weight(layer: Any) -> Tensor:
        """(out, in) weight under an adapter."""
        weight: Tensor = layer.get_base_layer().weight.data
        return weight.t() if layer.fan_in_fan_out else weight


class FullTuning(Tuning):
    """``--method full``: every weight of the backbone, kept in float32 whatever it computes in."""

    def attach(self, model: StockForecaster, fresh: bool) -> None:
        model.backbone.requires_grad_(True)

    def groups(self, model: StockForecaster, rate: float, lora_plus_ratio: float | None) -> list[dict[str, Any]]:
        matrices = [parameter for parameter in model.backbone.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.backbone.parameters() if parameter.ndim < 2]
        # Norms and biases are not decayed, as is usual: zero is no place for them.
        return [
            {"params": matrices, "lr": rate},
            {"params": vectors, "lr": rate, "weight_decay": 0.0},
        ]

    def state(self, model: StockForecaster) -> dict[str, Tensor]:
        return copies_on_cpu(dict(model.backbone.named_parameters()))

    def load(self, model: StockForecaster, state: Mapping[str, Tensor]) -> None:
        if state:  # none: a run that ended as it began
            copy_into(dict(model.backbone.named_parameters()), state)


def tuning_for(method: str, fields: Mapping[str, Any]) -> Tuning:
    """A method by name.

    Args:
        fields: of ``AdapterConfig``, for the methods with adapters.

    Raises:
        UserError: a method that this version does not know.
        LoRAError: a field that this version does not know, or a value out of range.
    """
    if method in ("lora", "peft"):
        config = AdapterConfig.from_dict(fields)
        return OwnLoRA(config) if method == "lora" else PeftLoRA(config)
    if method in ("full", "head"):
        return FullTuning() if method == "full" else Tuning()
    raise UserError(f"no method {method!r}; there are lora, peft, full and head")


def attach(model: StockForecaster, method: str, fields: Mapping[str, Any], fresh: bool = True) -> None:
    """Freeze the backbone and add what the method trains.

    Args:
        fields: of ``AdapterConfig``.
        fresh: whether training is to start from here; else ``load_trained_state`` follows.

    Raises:
        UserError: a method or a field that this version does not know, a value out of range, or targets that the base
            model doesn't have.
    """
    try:
        tuning = tuning_for(method, fields)
        tuning.attach(model, fresh)
    except LoRAError as error:
        raise UserError(str(error)) from None
    model.tuning = tuning


def sound_targets(
    model: StockForecaster, fields: Mapping[str, Any], adapt_layers: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The adapters' settings with the layers left out that an adapter would be lost on, where all were asked for.

    Args:
        model: with a plain backbone. fields: of ``AdapterConfig``; none for a method without adapters.
        adapt_layers: the last so many layers of the stack are adapted; None for all.

    Returns:
        ``fields``, naming each layer where some are left out, and those with the reason of each.

    Raises:
        UserError: such a layer was asked for by name, or none is left.
    """
    if not fields:
        return {}, {}
    backbone, targets = model.backbone, fields["target_modules"]
    ids = a_few_tokens(backbone, 32)
    try:
        names = lora.find_targets(backbone, targets)
        if adapt_layers is not None:
            names = inside_last_layers(backbone, names, adapt_layers)
        lost = lost_adapters(backbone, names, lambda: hidden_states(backbone, ids))
    except LoRAError as error:
        raise UserError(str(error)) from None
    kept = [name for name in names if name not in lost]
    if lost and (targets != lora.ALL_LINEAR or not kept):
        kinds = list(dict.fromkeys(kind_of(name) for name in lost))
        raise UserError(
            f"--target_modules: {listed(kinds, 4)} cannot be adapted: {next(iter(lost.values()))}; "
            + ("name other layers" if targets != lora.ALL_LINEAR else "use --method head or full, or another base")
        )
    return dict(fields) | ({"target_modules": kept} if lost or adapt_layers is not None else {}), lost


def freeze_first_layers(model: StockForecaster, adapt_layers: int) -> None:
    """Have all layers but the last ``adapt_layers`` taken for ones that never change; before anything is attached.

    Raises:
        UserError: a model whose layers cannot be told apart so.
    """
    model.frozen_layers = facts_of(model.backbone.config).layers - adapt_layers
    if model.frozen_layers:
        model.layer_outputs = split_form(model.backbone, model.frozen_layers)


def parameter_groups(
    model: StockForecaster, rate: float, head_rate: float, lora_plus_ratio: float | None = None
) -> list[dict[str, Any]]:
    """What the optimizer trains, and how fast.

    Args:
        rate: learning rate of what trains in the backbone.
        head_rate: learning rate of the forecast head.
        lora_plus_ratio: how much faster than A the B of an adapter learns; None for the same rate.
    """
    return [
        *model.tuning.groups(model, rate, lora_plus_ratio),
        {"params": [model.head.linear.weight], "lr": head_rate},
        # The bias holds the starting quantiles: decay would pull them toward quantiles of nothing.
        {"params": [model.head.linear.bias], "lr": head_rate, "weight_decay": 0.0},
    ]


def adapter_groups(
    parameters: Mapping[str, nn.Parameter], rate: float, lora_plus_ratio: float | None
) -> list[dict[str, Any]]:
    """The optimizer's groups of adapters, by the names of their parameters.

    With a ratio, B learns that much faster than A (LoRA+, Hayou et al. 2024, arXiv:2402.12354), and so do lengths
    (DoRA) and biases, as in PEFT. The latter two are not decayed: zero is no place for them.
    """
    fast = rate * (lora_plus_ratio or 1.0)
    A: list[nn.Parameter] = []
    B: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        (A if ".lora_A" in name else B if ".lora_B" in name else others).append(parameter)
    if lora_plus_ratio is None:
        groups: list[dict[str, Any]] = [{"params": A + B, "lr": rate}]
    else:
        groups = [{"params": A, "lr": rate}, {"params": B, "lr": fast}]
    return [*groups, {"params": others, "lr": fast, "weight_decay": 0.0}] if others else groups


def trained_state(model: StockForecaster) -> dict[str, dict[str, Tensor]]:
    """``adapters`` and ``head``: copies on the CPU of all that training changed."""
    head = {name: tensor.detach().cpu().clone() for name, tensor in model.head.state_dict().items()}
    return {"adapters": model.tuning.state(model), "head": head}


def load_trained_state(model: StockForecaster, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put ``trained_state`` back.

    Raises:
        LoRAError, RuntimeError: a state that does not fit the model.
    """
    model.tuning.load(model, state["adapters"])
    # Not by load_state_dict, which FSDP would follow up by taking the head for shards again.
    copy_into({**dict(model.head.named_parameters()), **dict(model.head.named_buffers())}, state["head"])


def merge_into_base(model: StockForecaster) -> None:
    """Make the backbone a plain model of its class, with what was trained in its weights.

    Raises:
        LoRAError, ValueError: a quantized base, or weights that would not be finite.
    """
    model.tuning.merge(model)
    model.tuning = Tuning()


def name_of_peft(name: str) -> str:
    """A module's or parameter's name in a PEFT model -> the name that it has in ``lora.py``."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.bias", ".bias")
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        name = name.replace(f".{part}.default.weight", f".{part.removesuffix('_vector')}")
    return name


def copies_on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def copy_into(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into the parameters, all of it or nothing.

    Raises:
        RuntimeError: names are missing or unexpected, or shapes differ.
    """
    faults = [f"missing {name}" for name in parameters if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in parameters]
    for name in parameters.keys() & state.keys():
        if not isinstance(state[name], Tensor) or state[name].shape != parameters[name].shape:
            faults.append(f"{name} has another shape")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise RuntimeError("; ".join(sorted(faults)[:4]) + more)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
