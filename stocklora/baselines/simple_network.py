"""The simple baseline: a small network from the last days' prices to the next close.

A window is written relative to its own last day (log of each price over the last close, log volume
over the window's mean), so one network serves any price level and no window sees its future. Mean and
spread of these features, and the spread of the next return, are fitted on training days. The output
layer starts at zero, which is the last close itself: training has to earn its way from there.

Three days ahead is three times one day: each forecast close becomes the next day of the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from stocklora.baselines.settings import check_model_file
from stocklora.cli.console import UserError
from stocklora.prices.csv_columns import PRICE_COLUMNS
from stocklora.runtime.files import as_json_types, load_plain, replacing
from stocklora.volatility.random_walk import centred, empirical_quantiles
from stocklora.volatility.scales import ewma_volatility

FEATURES = len(PRICE_COLUMNS)
CLOSE, VOLUME = PRICE_COLUMNS.index("Close"), PRICE_COLUMNS.index("Volume")
FORMAT = "stocklora-simple"
FORMAT_VERSION = 1
CHUNK = 4096  # windows scored at once: memory stays small for any number of tickers


class SimpleStockPredictor(nn.Module):
    """``window_size`` days x 5 flattened -> 64 ReLU -> the next day's scaled log return."""

    def __init__(self, window_size: int = 30, features: int = FEATURES, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Linear(window_size * features, hidden)
        self.output = nn.Linear(hidden, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @property
    def trainable_parameters(self) -> int:
        return sum(weights.numel() for weights in self.parameters() if weights.requires_grad)

    def forward(self, windows: Tensor) -> Tensor:
        """(n, window, features) -> (n,)"""
        return self.output(torch.relu(self.hidden(windows.flatten(1)))).squeeze(-1)


@dataclass(frozen=True)
class Scaling:
    """Fitted on training days. ``mean``, ``std``: (features,); ``return_std``: of the next log return."""

    mean: np.ndarray
    std: np.ndarray
    return_std: float

    def inputs(self, windows: np.ndarray) -> Tensor:
        """(n, window, 5) prices and volume -> (n, window, 5) float32 network inputs."""
        return torch.from_numpy(((relative(windows) - self.mean) / self.std).astype(np.float32))


def relative(windows: np.ndarray) -> np.ndarray:
    """Prices as the log of price over the last close, volume as the log over the window's mean log.

    Args:
        windows: (n, window, 5) in the order of ``PRICE_COLUMNS``.
    """
    features = np.empty_like(windows)
    prices = windows[:, :, : CLOSE + 1]
    features[:, :, : CLOSE + 1] = np.log(prices / windows[:, -1:, CLOSE : CLOSE + 1])
    volume = np.log1p(windows[:, :, VOLUME])  # a day without trade has volume 0
    features[:, :, VOLUME] = volume - volume.mean(axis=1, keepdims=True)
    return features


def fit_scaling(windows: np.ndarray, next_returns: np.ndarray) -> Scaling:
    """Mean and spread over training windows; a feature that never moves keeps a spread of one."""
    features = relative(windows).reshape(-1, FEATURES)
    std = features.std(axis=0)
    return_std = float(next_returns.std())
    return Scaling(features.mean(axis=0), np.where(std > 1e-8, std, 1.0), return_std if return_std > 1e-8 else 1.0)


def windows_at(frame: pd.DataFrame, origins: Sequence[int], window_size: int) -> np.ndarray:
    """The ``window_size`` days up to and including each origin: (n, window, 5) float64."""
    if not len(origins):
        return np.empty((0, window_size, FEATURES))
    values = frame[PRICE_COLUMNS].to_numpy(dtype=np.float64)
    view = np.lib.stride_tricks.sliding_window_view(values, window_size, axis=0)  # (rows - window + 1, 5, window)
    return view[np.asarray(origins) - window_size + 1].transpose(0, 2, 1)


@dataclass
class SimpleForecaster:
    """A trained network with what turns its output into closes and error bars.

    Attributes:
        residuals: (horizon, levels) quantiles of forecast errors on validation days in units of the
            EWMA volatility times sqrt(h), symmetric about zero: the forecast is the median.
        training: data, seed, settings and scores of the run that made it; for people to read.
    """

    network: SimpleStockPredictor
    scaling: Scaling
    window_size: int
    levels: np.ndarray
    residuals: np.ndarray
    training: dict[str, Any]

    @property
    def horizon(self) -> int:
        return len(self.residuals)

    def quantiles(self, frame: pd.DataFrame, origins: Sequence[int]) -> np.ndarray:
        """(origins, horizon, levels) quantiles of the h-day log return."""
        ahead = roll_forward(self.network, self.scaling, windows_at(frame, origins, self.window_size), self.horizon)
        return ahead[:, :, None] + error_scale(frame, origins, self.horizon)[:, :, None] * self.residuals[None]


@torch.no_grad()
def roll_forward(network: SimpleStockPredictor, scaling: Scaling, windows: np.ndarray, horizon: int) -> np.ndarray:
    """Forecast day after day, each forecast being the next window's last day.

    Of a day that has not been, only the close is forecast: it opens at the close before, its high and
    low are the two, and its volume is the window's typical one.

    Args:
        windows: (n, window, 5).

    Returns:
        (n, horizon) log returns from the last known close.
    """
    network.eval()
    device = next(network.parameters()).device
    parts = []
    for start in range(0, len(windows), CHUNK):
        known = windows[start : start + CHUNK]
        ahead = np.zeros((len(known), horizon))
        for step in range(horizon):
            move = network(scaling.inputs(known).to(device)).double().cpu().numpy() * scaling.return_std
            ahead[:, step] = move + (ahead[:, step - 1] if step else 0.0)
            before = known[:, -1, CLOSE]
            close = before * np.exp(move)
            volume = np.expm1(np.log1p(known[:, :, VOLUME]).mean(axis=1))
            day = np.stack([before, np.maximum(before, close), np.minimum(before, close), close, volume], axis=1)
            known = np.concatenate([known[:, 1:], day[:, None]], axis=1)
        parts.append(ahead)
    return np.concatenate(parts) if parts else np.empty((0, horizon))


def error_scale(frame: pd.DataFrame, origins: Sequence[int], horizon: int) -> np.ndarray:
    """(origins, horizon): how far prices have moved lately, so that error bars follow calm and storm."""
    steps = np.sqrt(np.arange(1, horizon + 1))
    return ewma_volatility(frame["Close"])[list(origins), None] * steps[None, :]


def residual_quantiles(errors: np.ndarray, scale: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(horizon, levels) of ``errors / scale``, made symmetric about zero.

    Up and down errors are pooled: a year of prices leaves some thirty validation days, and two tails of
    one or two days each would draw that month's luck.

    Args:
        errors: (n, horizon) log return that came minus the forecast.
        scale: (n, horizon).
        levels: (levels,) increasing, in (0, 1).
    """
    scaled = errors / scale
    return centred(empirical_quantiles(np.concatenate([scaled, -scaled]), levels), levels)


@dataclass(frozen=True)
class Epoch:
    """What one pass gave: mean training loss and validation loss, in units of the scaled return."""

    number: int
    train_loss: float
    validation_loss: float


def train_network(
    network: SimpleStockPredictor,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    patience: int,
    seed: int,
) -> Iterator[Epoch]:
    """Train in place; yields after every epoch, epoch 0 being the untrained network.

    The loss is Huber's: daily returns have heavy tails, and one crash must not decide the weights. When
    the iterator ends, by its own or by ``patience``, the network holds the weights of the best epoch on
    validation days. A loss that is not finite ends it too.

    Args:
        network: trained in place.
        train, validation: inputs (n, window, 5) and targets (n,), on the network's device.
        epochs: at most.
        batch_size: windows a step.
        learning_rate: Adam's.
        patience: epochs without a better validation loss after which it ends.
        seed: of the order of the windows.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
    order = torch.Generator().manual_seed(seed)
    inputs, targets = train
    best, best_number, best_loss = deepcopy(network.state_dict()), 0, _loss(network, validation)
    yield Epoch(0, _loss(network, train), best_loss)
    for number in range(1, epochs + 1):
        network.train()
        total = 0.0
        for rows in torch.randperm(len(inputs), generator=order).split(batch_size):
            optimizer.zero_grad()
            loss = nn.functional.huber_loss(network(inputs[rows]), targets[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        validation_loss = _loss(network, validation)
        if not (np.isfinite(total) and np.isfinite(validation_loss)):
            break
        if validation_loss < best_loss:
            best, best_number, best_loss = deepcopy(network.state_dict()), number, validation_loss
        yield Epoch(number, total / len(inputs), validation_loss)
        if number - best_number >= patience:
            break
    network.load_state_dict(best)


@torch.no_grad()
def _loss(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    network.eval()
    return float(nn.functional.huber_loss(network(data[0]), data[1]))


def save_simple(path: Path, forecaster: SimpleForecaster) -> None:
    """Write ``model.pth``, atomically."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "window_size": forecaster.window_size,
        "network": {name: tensor.cpu() for name, tensor in forecaster.network.state_dict().items()},
        "scaling": as_json_types(asdict(forecaster.scaling)),
        "levels": forecaster.levels.tolist(),
        "residuals": forecaster.residuals.tolist(),
        "training": as_json_types(forecaster.training),
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_simple(path: Path, device: torch.device) -> SimpleForecaster:
    """Read ``model.pth``.

    Raises:
        UserError: missing, damaged, not written by ``train.py``, or of a newer version.
    """
    check_model_file(path)
    again = "; train it again: python train.py --data sample_test.csv"
    content = load_plain(path, FORMAT, FORMAT_VERSION, "train.py", again)
    try:
        scaling = content["scaling"]
        network = SimpleStockPredictor(content["window_size"])
        network.load_state_dict(content["network"])
        return SimpleForecaster(
            network.to(device).eval(),
            Scaling(np.array(scaling["mean"]), np.array(scaling["std"]), float(scaling["return_std"])),
            int(content["window_size"]),
            np.array(content["levels"]),
            np.array(content["residuals"]),
            dict(content["training"]),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is incomplete ({str(error)[:200]}){again}") from None
