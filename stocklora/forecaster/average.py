"""Several weights files averaged into one model, in contrast to an ensemble, which averages their forecasts.

The average costs no more than one model. It makes sense for runs that began at the same point of the same base model
("model soups": Wortsman et al. 2022, arXiv:2203.05482), such as seeds or learning rates of one experiment; members
that began elsewhere are refused, since between them lies nothing that was ever trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora import LoRAConfig
from stocklora.adapters.arithmetic import average_adapters, average_weights
from stocklora.cli.console import UserError
from stocklora.forecaster.weights import ForecasterSpec, WeightsFile, other_setting

SAME_START = ("levels", "table", "location", "scale")


def average(contents: Sequence[WeightsFile], weights: Sequence[float], paths: Sequence[Path]) -> WeightsFile:
    """One model whose updates, head and calibration are weighted means.

    Updates are averaged as products (``adapters.average_adapters``), the head as the linear map that it is, with each
    member's own centre and spread of the features taken into account. The start of all members is the same.

    Args:
        weights: of each member; divided by their sum.

    Raises:
        UserError: members of different models, methods, inputs or starts, or adapters that have no average.
    """
    shares = average_weights(weights)
    for path, content in zip(paths[1:], contents[1:], strict=True):
        _check_alike(contents[0].spec, content.spec, paths[0], path)
    spec = contents[0].spec
    adapters: dict[str, Tensor] = {}
    if spec.method in ("lora", "peft"):
        members = [
            (content.adapters, LoRAConfig.from_dict(content.spec.lora), share)
            for content, share in zip(contents, shares, strict=True)
        ]
        adapters, config = average_adapters(members)
        spec = replace(spec, lora=asdict(config))
    elif spec.method == "full":
        adapters = _mean_weights(contents, shares, paths)
    calibration = {
        name: sum(share * content.spec.calibration[name] for share, content in zip(shares, contents, strict=True))
        for name in spec.calibration
    }
    averaged = [
        {"path": str(path), "share": share, "test_scores": content.training.get("test_scores", {})}
        for path, share, content in zip(paths, shares, contents, strict=True)
    ]
    training: dict[str, Any] = {"data": contents[0].training.get("data", {}), "averaged": averaged}
    heads = [content.head for content in contents]
    return WeightsFile(replace(spec, calibration=calibration), adapters, mean_head(heads, shares), training)


def mean_head(heads: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The head whose linear outputs are the mean of all heads' outputs, for whatever features they read.

    A head computes ``W (f - mean) / spread + bias``. The result has the first one's mean and spread.
    """
    mean, spread = heads[0]["mean"].double(), heads[0]["spread"].double()
    weight = torch.zeros_like(heads[0]["linear.weight"], dtype=torch.float64)
    bias = torch.zeros_like(heads[0]["linear.bias"], dtype=torch.float64)
    for head, share in zip(heads, shares, strict=True):
        own = head["linear.weight"].double() / head["spread"].double()  # (outputs, hidden), of the features as they are
        weight += share * own * spread
        bias += share * (head["linear.bias"].double() + own @ (mean - head["mean"].double()))
    return {**heads[0], "linear.weight": weight.float(), "linear.bias": bias.float()}


def _mean_weights(contents: Sequence[WeightsFile], shares: Sequence[float], paths: Sequence[Path]) -> dict[str, Tensor]:
    for path, content in zip(paths, contents, strict=True):
        if content.adapters.keys() != contents[0].adapters.keys() or not content.adapters:
            raise UserError(f"{path}: its training kept nothing of the base's weights; leave it out of the average")
    mean = {name: shares[0] * tensor for name, tensor in contents[0].adapters.items()}
    for content, share in zip(contents[1:], shares[1:], strict=True):
        for name, tensor in mean.items():
            tensor.add_(content.adapters[name], alpha=share)
    return mean


def _check_alike(first: ForecasterSpec, other: ForecasterSpec, first_path: Path, path: Path) -> None:
    instead = "combine their forecasts instead: leave the weights after the file names out (see --ensemble)"
    if first.base_model["config_sha256"] != other.base_model["config_sha256"]:
        raise UserError(
            f"{first_path} was trained on {first.base_model['name']} and {path} on {other.base_model['name']}, which "
            f"have no average; {instead}"
        )
    if found := other_setting(first, other):
        flag, ours, theirs = found
        raise UserError(
            f"{first_path} was trained with {flag} {ours} and {path} with {theirs}, which have no average; {instead}"
        )
    if any(getattr(first, name) != getattr(other, name) for name in SAME_START):
        raise UserError(
            f"{first_path} and {path} began at different quantiles or volatility scales (other prices, or another "
            f"--scale), and their heads have no average; {instead}"
        )
