"""Forecasters of every method, built and unsettled without training, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from stocklora.base_models import describe_model
from stocklora.checkpoints import ForecasterSpec, WeightsFile
from stocklora.forecasting import Forecaster, build_forecaster, load_encoder
from stocklora.methods import trained_state
from stocklora.metrics import QUANTILE_LEVELS

CPU = torch.device("cpu")
LORA = {"rank": 2, "alpha": 6.0, "dropout": 0.0, "target_modules": "all-linear"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa dora": {"init": "pissa", "dora": True},
    "bias": {"train_bias": "lora_only"},
    "all biases": {"train_bias": "all"},
}


def spec_of(model: Path, method: str, quantization: str = "none", **lora: Any) -> ForecasterSpec:
    table = np.sqrt(np.arange(1, 4))[:, None] * norm.ppf(QUANTILE_LEVELS)
    return ForecasterSpec(
        base_model=describe_model(model), backbone_layers=None, prompt="returns", window_size=20,
        targets_per_sequence=5, horizon=3, levels=list(QUANTILE_LEVELS), table=table.tolist(),
        scale={"kind": "ewma", "horizon": 3, "coefficients": []},
        calibration={"shrinkage": 0.9, "interval_scale": 1.1}, method=method, quantization=quantization,
        lora={} if method in ("full", "head") else {**LORA, **lora},
    )  # fmt: skip


def built(spec: ForecasterSpec, model: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Forecaster:
    torch.manual_seed(0)
    return build_forecaster(spec, model, load_encoder(model, spec.prompt), CPU, dtype, **options)


def unsettled(forecaster: Forecaster, seed: int = 0) -> Forecaster:
    """All that trains far from its start, so that forecasts depend on it and on what they read."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in forecaster.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    forecaster.model.eval()
    return forecaster


def content_of(forecaster: Forecaster) -> WeightsFile:
    state = trained_state(forecaster.model)
    return WeightsFile(forecaster.spec, state["adapters"], state["head"], {"test_scores": {}})


def exact(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Forecasts to the last bit."""
    return [[value.hex() if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
