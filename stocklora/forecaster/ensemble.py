"""Several trained forecasters as one: their forecasts combined, or their weights averaged into one model.

Members may differ in anything but what is forecast: base model, layers, LoRA settings, prompt, window,
scale. Horizon and quantile levels must be the same.

Quantiles are averaged, not probabilities ("Vincentization": Ratcliff, Psychological Bulletin 86, 1979).
Averaging probabilities stretches the interval wherever members disagree about the middle, though each
is calibrated by itself; averaging quantiles leaves it as wide as the members' on average, and a
location-scale family stays what it is (Lichtendahl, Grushka-Cockayne and Winkler, "Is It Better to
Average Probabilities or Quantiles?", Management Science 59, 2013).

An average of weights costs no more than one model. It makes sense for runs that began at the same point of the same
base model ("model soups": Wortsman et al. 2022, arXiv:2203.05482), such as seeds or learning rates of one experiment;
members that began elsewhere are refused, since between them lies nothing that was ever trained.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stocklora.adapters.arithmetic import average_adapters, average_weights
from stocklora.adapters.layer import AdapterConfig
from stocklora.cli.console import UserError
from stocklora.forecaster.forecaster import Forecaster, assemble, with_enough_days
from stocklora.forecaster.weights import ForecasterSpec, WeightsFile, load_weights, other_setting
from stocklora.metrics.scores import INTERVAL_COLUMNS
from stocklora.runtime.files import sha256_of_all
from stocklora.runtime.machine import keep_freed_memory

T = TypeVar("T")
SAME_START = ("levels", "table", "location", "scale")


def combine(quantiles: Sequence[np.ndarray], how: str = "mean") -> np.ndarray:
    """One forecast from several, level by level.

    ``mean`` is the default: members are few and alike (the same network from other seeds, windows or base
    models), and with nobody astray it uses all of them, where the median of three throws two away.
    ``median`` is for the case that one may be astray. Of two members both are the same.

    Args:
        quantiles: one array a member, (..., levels), all of one shape; levels increase along the last axis.
        how: ``mean`` or ``median``.

    Returns:
        (..., levels) float64. Where every member's levels are sorted, so are the result's: a sum of
        increasing rows increases, and so does every order statistic of them. NaN where a member has NaN.

    Raises:
        ValueError: no member, shapes that differ, an unknown ``how``.
    """
    if how not in {"mean", "median"}:
        raise ValueError(f"how must be mean or median, got {how!r}")
    if not len(quantiles):
        raise ValueError("nothing to combine: no member was given")
    shapes = {np.shape(member) for member in quantiles}
    if len(shapes) > 1:
        raise ValueError(f"members differ in shape: {', '.join(map(str, sorted(shapes)))}")
    stacked = np.stack([np.asarray(member, dtype=np.float64) for member in quantiles])  # (members, ..., levels)
    return np.asarray(stacked.mean(axis=0) if how == "mean" else np.median(stacked, axis=0))


class Ensemble:
    """Weights files that forecast together; one file is the plain case.

    Unless ``keep`` is set, no more than one model is in memory: each member is loaded, asked and freed, and
    only the last one stays for the next forecast. Each weights file is read once for one forecast.

    Args:
        members: each weights file with its base model's folder.
        how: see :func:`combine`.
        keep: hold all members in memory; whoever asks many times would else load them every time.
        shares: average the members' weights, in these proportions, into the one model that forecasts.

    Raises:
        UserError: a damaged weights file, or two that forecast other days or levels, or have no average.
    """

    def __init__(
        self,
        members: Sequence[tuple[Path, Path]],
        how: str,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        *,
        keep: bool = False,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.files, self.shares = [path for path, _ in members], shares
        self.members = list(members)
        if shares is not None:  # one model, which messages name so
            parts = [f"{share:g} {path}" for path, share in zip(self.files, shares, strict=True)]
            self.members = [(Path(" + ".join(parts)), members[0][1])]
        self.how, self.keep = how, keep
        if device.type == "cpu":
            keep_freed_memory()
        self.digests: dict[Path, str] = {}
        self.device, self.dtype, self.trust_remote_code = device, dtype, trust_remote_code
        self.weights = [self._read(index) for index in range(len(self.members))]
        check_agreement([path for path, _ in self.members], self.weights)
        self._loaded: dict[int, Forecaster] = {}
        self._unasked = set(range(len(self.members)))  # read, and not asked for a forecast yet

    def each(self, work: Callable[[Forecaster], T]) -> list[T]:
        """``work`` of every member, in order; it must not keep the forecaster, whose memory the next one needs.

        Raises:
            UserError: weights that do not fit their base model, or a base model that cannot be loaded.
        """
        return [work(self._forecaster(index)) for index in range(len(self.members))]

    def forecast(
        self, prices: Mapping[str, pd.DataFrame], market_only: Mapping[str, pd.DataFrame] | None = None
    ) -> list[dict[str, Any]]:
        """The next closes of every ticker from its last row; rows of ``predictions.csv``.

        Args:
            market_only: tickers that only take part in the market; see ``Forecaster.forecast``.

        Raises:
            UserError: no ticker has as many days as every member needs.
        """
        if len(self.members) > 1:  # so that each ticker is forecast by all, and missed once
            longest = max(content.spec.window_size for content in self.weights)
            prices = with_enough_days(prices, longest, "the longest window")
        return combine_rows(self.each(lambda forecaster: forecaster.forecast(prices, market_only)), self.how)

    def _forecaster(self, index: int) -> Forecaster:
        if index not in self._loaded:
            if self._loaded and not self.keep:
                self._loaded.clear()  # before the next one loads
                gc.collect()
                torch.cuda.empty_cache()  # nothing without a graphics card
            weights_path, model_path = self.members[index]
            if index not in self._unasked:  # someone may have trained it again since it was asked
                self.weights[index] = self._read(index)
                check_agreement([path for path, _ in self.members], self.weights)
            self._unasked.discard(index)
            self._loaded[index] = assemble(
                self.weights[index], weights_path, model_path, self.device, self.dtype, self.trust_remote_code
            )
        return self._loaded[index]

    @property
    def sha256(self) -> str:
        """Of the weights that forecast, as they were when they were read; of several also of how they are combined."""
        digests = [self.digests[path] for path in self.files]
        if len(digests) == 1:
            return digests[0]
        combined = [self.how] if self.shares is None else [repr(share) for share in self.shares]
        return hashlib.sha256(" ".join([*digests, *combined]).encode()).hexdigest()

    def _read(self, index: int) -> WeightsFile:
        if self.shares is None:
            return self._read_file(self.files[index])
        return average([self._read_file(path) for path in self.files], self.shares, self.files)

    def _read_file(self, path: Path) -> WeightsFile:
        content = load_weights(path)
        self.digests[path] = sha256_of_all(path)
        return content


def combine_rows(members: Sequence[list[dict[str, Any]]], how: str) -> list[dict[str, Any]]:
    """Rows of ``predictions.csv`` from those of each member, which are of the same tickers and days in one order.

    What is combined is the log return from the last close. A single member's rows are unchanged.
    """
    rows, columns = members[0], list(INTERVAL_COLUMNS.values())
    if len(members) == 1:
        return rows
    last = np.array([row["Last_Close"] for row in rows])[:, None]
    closes = [np.array([[row[name] for name in columns] for row in own]) for own in members]  # (rows, levels) each
    combined = last * np.exp(combine([np.log(own / last) for own in closes], how))
    cells = [dict(zip(columns, map(float, row), strict=True)) for row in combined]
    return [{**row, **own, "Predicted_Close": own["P50"]} for row, own in zip(rows, cells, strict=True)]


def trainable_parameters(content: WeightsFile) -> int:
    """Numbers that training could change: the adapters' and the head's, without the head's fixed statistics."""
    head = [tensor for name, tensor in content.head.items() if name.startswith("linear.")]
    # PiSSA's start stays as it is.
    adapters = [tensor for name, tensor in content.adapters.items() if ".pissa_" not in name]
    return sum(int(tensor.numel()) for tensor in [*adapters, *head])


def check_agreement(paths: Sequence[Path], weights: Sequence[WeightsFile]) -> None:
    """All members forecast the same days and levels as the first.

    Raises:
        UserError: naming two files that do not.
    """
    first, rest = weights[0].spec, [content.spec for content in weights[1:]]
    for path, spec in zip(paths[1:], rest, strict=True):
        if spec.horizon != first.horizon:
            raise UserError(
                f"{paths[0]} forecasts {first.horizon} days ahead and {path} {spec.horizon}; an ensemble needs one "
                f"horizon: leave one of them out, or train it again with the other's --horizon"
            )
        if list(spec.levels) != list(first.levels):
            raise UserError(
                f"{paths[0]} forecasts the quantile levels {written(first.levels)} and {path} {written(spec.levels)}; "
                f"an ensemble needs the same levels: leave one of them out, or train it again"
            )


def written(levels: Sequence[float]) -> str:
    return " ".join(f"{level:g}" for level in levels)


# ------------------------------------------------------------------- one model of several models' weights


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
            (content.adapters, AdapterConfig.from_dict(content.spec.lora), share)
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
