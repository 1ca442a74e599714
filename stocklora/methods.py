"""How the base model is tuned: which weights train, how they are put on, saved and brought back.

The one place that knows the methods apart. The training loop, the files and the forecaster see a model with
trainable parameters, and ask here for its parameter groups and its trained state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llm_model import StockForecaster
from lora import LoRAConfig, LoRAError, apply_lora, load_lora_state_dict, lora_parameters, lora_state_dict
from stocklora.console import UserError
from stocklora.options import TrainLoraSettings


def put_on(model: StockForecaster, lora: Mapping[str, Any]) -> None:
    """Freeze the backbone and add what the method trains.

    Args:
        lora: fields of ``LoRAConfig``.

    Raises:
        UserError: targets that the base model doesn't have.
    """
    try:
        apply_lora(model.backbone, LoRAConfig(**lora))
    except LoRAError as error:
        raise UserError(str(error)) from None


def parameter_groups(model: StockForecaster, settings: TrainLoraSettings) -> list[dict[str, Any]]:
    """What the optimizer trains, and how fast."""
    return [
        {"params": list(lora_parameters(model.backbone)), "lr": settings.learning_rate},
        {"params": [model.head.linear.weight], "lr": settings.head_learning_rate},
        # The bias holds the starting quantiles: decay would pull them toward quantiles of nothing.
        {"params": [model.head.linear.bias], "lr": settings.head_learning_rate, "weight_decay": 0.0},
    ]


def trained_state(model: StockForecaster) -> dict[str, dict[str, Tensor]]:
    """``adapters`` and ``head``: copies on the CPU of all that training changed."""
    head = {name: tensor.detach().cpu().clone() for name, tensor in model.head.state_dict().items()}
    return {"adapters": lora_state_dict(model.backbone), "head": head}


def load_trained_state(model: StockForecaster, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put ``trained_state`` back.

    Raises:
        LoRAError, RuntimeError: a state that does not fit the model.
    """
    load_lora_state_dict(model.backbone, state["adapters"])
    model.head.load_state_dict(dict(state["head"]))
