"""Several trained forecasters whose forecasts become one.

Members may differ in anything but what is forecast: base model, layers, LoRA settings, prompt, window,
scale. Horizon and quantile levels must be the same.

Quantiles are averaged, not probabilities ("Vincentization": Ratcliff, Psychological Bulletin 86, 1979).
Averaging probabilities stretches the interval wherever members disagree about the middle, though each
is calibrated by itself; averaging quantiles leaves it as wide as the members' on average, and a
location-scale family stays what it is (Lichtendahl, Grushka-Cockayne and Winkler, "Is It Better to
Average Probabilities or Quantiles?", Management Science 59, 2013).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from stocklora.cli.console import UserError, warn
from stocklora.forecaster.average import average
from stocklora.forecaster.forecaster import Forecaster, assemble
from stocklora.forecaster.weights import WeightsFile, load_weights
from stocklora.metrics.scores import INTERVAL_COLUMNS

T = TypeVar("T")


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
    only the last one stays for the next forecast. A single member is therefore read once.

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
        self.members = list(members) if shares is None else [(Path(average_name(self.files, shares)), members[0][1])]
        self.how, self.keep = how, keep
        self.device, self.dtype, self.trust_remote_code = device, dtype, trust_remote_code
        self.weights = [self._read(index) for index in range(len(self.members))]
        self._check_agreement()
        self._held: dict[int, Forecaster] = {}

    def each(self, work: Callable[[Forecaster], T]) -> list[T]:
        """``work`` of every member, in order; it must not keep the forecaster, whose memory the next one needs.

        Raises:
            UserError: weights that do not fit their base model, or a base model that cannot be loaded.
        """
        return [work(self._forecaster(index)) for index in range(len(self.members))]

    def forecast(
        self, prices: Mapping[str, pd.DataFrame], beside: Mapping[str, pd.DataFrame] | None = None
    ) -> list[dict[str, Any]]:
        """The next closes of every ticker from its last row; rows of ``predictions.csv``.

        Args:
            beside: tickers that only take part in the market; see ``Forecaster.forecast``.

        Raises:
            UserError: no ticker has as many days as every member needs.
        """
        if len(self.members) > 1:  # so that each ticker is forecast by all, and missed once
            prices = enough_days(prices, max(content.spec.window_size for content in self.weights))
        return combine_rows(self.each(lambda forecaster: forecaster.forecast(prices, beside)), self.how)

    def _forecaster(self, index: int) -> Forecaster:
        if index not in self._held:
            if self._held and not self.keep:
                self._held.clear()  # before the next one loads
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            weights_path, model_path = self.members[index]
            content = self._read(index)  # someone may have trained it again since
            forecaster = assemble(content, weights_path, model_path, self.device, self.dtype, self.trust_remote_code)
            self.weights[index] = content
            self._check_agreement()
            self._held[index] = forecaster
        return self._held[index]

    def _read(self, index: int) -> WeightsFile:
        if self.shares is None:
            return load_weights(self.files[index])
        return average([load_weights(path) for path in self.files], self.shares, self.files)

    def _check_agreement(self) -> None:
        check_agreement([path for path, _ in self.members], self.weights)


def average_name(files: Sequence[Path], shares: Sequence[float]) -> str:
    """How messages name an average."""
    return " + ".join(f"{share:g} {path}" for path, share in zip(files, shares, strict=True))


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


def enough_days(prices: Mapping[str, pd.DataFrame], window_size: int) -> dict[str, pd.DataFrame]:
    """The tickers with a window of days and the close before them; a warning names the others.

    Raises:
        UserError: there is none.
    """
    known = {name: frame for name, frame in prices.items() if len(frame) > window_size}
    short = [f"{name} ({len(frame)})" for name, frame in prices.items() if name not in known]
    if short:
        message = (
            f"a forecast needs {window_size + 1} rows (the {window_size} days of the longest window and the close "
            f"before them); too few for {', '.join(short)}"
        )
        if not known:
            raise UserError(f"{message}; download more days")
        warn(f"{message}; left out")
    return known
