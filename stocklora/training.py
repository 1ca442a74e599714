"""The training loop: from the random walk as epoch 0, away from it only while validation improves."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_model import StockForecaster, pinball_sum
from stocklora.console import progress, say, warn
from stocklora.dataset import Example
from stocklora.methods import load_trained_state, parameter_groups, trained_state
from stocklora.metrics import BASIS_POINTS, pinball_loss
from stocklora.options import TrainLoraSettings

HISTORY_COLUMNS = (
    "epoch", "step", "train_loss", "validation_pinball_bp", "validation_ratio", "learning_rate", "seconds",
    "targets_per_s",
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some examples; ``mask`` is 1 where there is a target."""

    input_ids: Tensor
    origin_tokens: Tensor
    scale: Tensor
    returns: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*[getattr(self, name).to(device) for name in self.__dataclass_fields__])


@dataclass
class TrainingOutcome:
    """How a run went.

    Attributes:
        history: one row an epoch, epoch 0 being the untrained model; keys ``HISTORY_COLUMNS``.
        best_epoch: whose weights the model holds now.
        unproven_epoch: the epoch of the lowest validation loss where its gain may be chance; the model then
            holds the weights of epoch 0.
        gain_in_errors: gain of the lowest loss over the start's, in standard errors.
        stopped: why training ended before ``--epochs``, or None.
    """

    history: list[dict[str, float]]
    best_epoch: int
    stopped: str | None
    steps: int
    targets_per_s: float
    unproven_epoch: int | None = None
    gain_in_errors: float = 0.0

    @property
    def best_ratio(self) -> float:
        return self.history[self.best_epoch]["validation_ratio"]


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right: ids with 0, scale with 1 (it divides), returns with 0 and a mask of 0."""
    tokens = max(len(example.encoded.input_ids) for example in examples)
    targets = max(len(example.scale) for example in examples)
    horizon = examples[0].scale.shape[1]
    input_ids = torch.zeros(len(examples), tokens, dtype=torch.long)
    origin_tokens = torch.zeros(len(examples), targets, dtype=torch.long)
    scale = torch.ones(len(examples), targets, horizon)
    returns = torch.zeros(len(examples), targets, horizon)
    mask = torch.zeros(len(examples), targets)
    for row, example in enumerate(examples):
        count = len(example.scale)
        input_ids[row, : len(example.encoded.input_ids)] = torch.from_numpy(example.encoded.input_ids)
        origin_tokens[row, :count] = torch.from_numpy(example.encoded.origin_tokens)
        scale[row, :count] = torch.from_numpy(example.scale)
        returns[row, :count] = torch.from_numpy(np.nan_to_num(example.returns))
        mask[row, :count] = 1.0
    return Batch(input_ids, origin_tokens, scale, returns, mask)


def predict(
    model: StockForecaster, examples: Sequence[Example], device: torch.device, tokens_per_batch: int = 8192
) -> np.ndarray:
    """Uncalibrated quantiles at every origin of the examples, in their order.

    Args:
        tokens_per_batch: padded tokens of one forward pass, at most (a longer sequence goes alone).

    Returns:
        (origins, horizon, levels) float64.
    """
    was_training = model.training
    model.eval()
    results = []
    try:
        with torch.inference_mode():
            for group in _by_tokens(examples, tokens_per_batch):
                batch = collate(group).to(device)
                quantiles = model(batch.input_ids, batch.origin_tokens, batch.scale).cpu().double().numpy()
                results += [quantiles[row, : len(example.scale)] for row, example in enumerate(group)]
    finally:
        model.train(was_training)
    return np.concatenate(results)


def standardize_head(
    model: StockForecaster, examples: Sequence[Example], device: torch.device, targets: int = 2000
) -> None:
    """Fit the head's centre and spread on training origins, about ``targets`` of them spread over all."""
    every = max(1, sum(len(example.scale) for example in examples) // targets)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        states = []
        for example in examples[::every]:
            batch = collate([example]).to(device)
            states.append(model.hidden_at(batch.input_ids, batch.origin_tokens)[0])
        model.head.standardize(torch.cat(states))
    model.train(was_training)


def _by_tokens(examples: Sequence[Example], tokens_per_batch: int) -> Iterator[list[Example]]:
    group: list[Example] = []
    longest = 0
    for example in examples:
        longer = max(longest, len(example.encoded.input_ids))
        if group and longer * (len(group) + 1) > tokens_per_batch:
            yield group
            group, longer = [], len(example.encoded.input_ids)
        group.append(example)
        longest = longer
    if group:
        yield group


def accumulate_gradients(
    model: Any, micro_batches: Sequence[Batch], levels: Tensor, accelerator: Any, total_targets: int
) -> float:
    """Backward over all micro-batches of one step; gradients are those of the mean over all their targets.

    Args:
        total_targets: targets of the step over all micro-batches and processes.

    Returns:
        The mean loss over this process's share, in units of the scale.
    """
    device = accelerator.device
    loss_sum = 0.0
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            batch = batch.to(device)
            quantiles = model(batch.input_ids, batch.origin_tokens, batch.scale)
            loss = pinball_sum(quantiles, batch.returns, batch.scale, levels, batch.mask)
            # Processes average their gradients, and we want their sum over the step's targets.
            accelerator.backward(loss * accelerator.num_processes / total_targets)
            loss_sum += float(loss.detach())
    return loss_sum * accelerator.num_processes / total_targets


class NotFiniteError(Exception):
    """A loss, gradient or forecast that is no number any more; the message says when."""


class Optimization:
    """Model, optimizer and learning-rate schedule, moved an epoch at a time.

    Attributes:
        steps: optimizer steps taken so far.
        total_steps: steps of the whole run if nothing stops it.
    """

    def __init__(
        self,
        model: StockForecaster,
        training: Sequence[Example],
        levels: np.ndarray,
        settings: TrainLoraSettings,
        accelerator: Any,
    ) -> None:
        from transformers import get_cosine_schedule_with_warmup

        optimizer = torch.optim.AdamW(
            parameter_groups(model, settings),
            weight_decay=settings.weight_decay,
        )
        self.settings, self.accelerator, self.training = settings, accelerator, training
        self.per_step = settings.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
        self.steps = 0
        self.total_steps = math.ceil(len(training) / self.per_step) * settings.epochs
        warmup = int(settings.warmup_ratio * self.total_steps)
        self.schedule = get_cosine_schedule_with_warmup(optimizer, warmup, self.total_steps)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.levels = torch.tensor(levels, dtype=torch.float32, device=accelerator.device)

    @property
    def learning_rate(self) -> float:
        """The adapters' learning rate now."""
        return float(self.schedule.get_last_lr()[0])

    def epoch(self, number: int, on_step: Callable[[float, int], None]) -> float:
        """One pass over the training sequences, in an order of the seed and the epoch's own.

        Args:
            on_step: called after each step with its loss and how many targets it had.

        Returns:
            The mean loss of the steps, in units of the scale.

        Raises:
            NotFiniteError: before the step that would have spoiled the weights.
        """
        self.model.train()
        order = np.random.default_rng([self.settings.seed, number]).permutation(len(self.training))
        losses = []
        for first in range(0, len(order), self.per_step):
            group = order[first : first + self.per_step]
            targets = sum(len(self.training[index].scale) for index in group)
            losses.append(self.step(group, targets))
            on_step(losses[-1], targets)
        return float(np.mean(losses))

    def step(self, group: np.ndarray, targets: int) -> float:
        """One optimizer step over the sequences in ``group``, of which this process takes its share."""
        mine = group[self.accelerator.process_index :: self.accelerator.num_processes]
        size = self.settings.batch_size
        micro = [collate([self.training[index] for index in mine[at : at + size]]) for at in range(0, len(mine), size)]
        loss = accumulate_gradients(self.model, micro, self.levels, self.accelerator, targets)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        if not (math.isfinite(loss) and (norm is None or math.isfinite(float(norm)))):
            raise NotFiniteError(f"the loss was no longer finite at step {self.steps + 1}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss


def train(
    model: StockForecaster,
    training: Sequence[Example],
    validation: Sequence[Example],
    levels: np.ndarray,
    settings: TrainLoraSettings,
    accelerator: Any,
    validation_dates: np.ndarray,
) -> TrainingOutcome:
    """Fine-tune adapters and head; on return the model holds the weights of the best epoch.

    Epoch 0 is the untrained model. Training stops after ``patience`` epochs without a better validation
    loss, on a loss that is not finite (the best weights so far are kept), and on Ctrl-C (likewise). An epoch
    whose gain over epoch 0 is less than ``required_gain`` standard errors has not earned its way: the lowest of
    many noisy losses is lower by chance alone, and costs on days to come.

    Args:
        validation_dates: (n,) dates of the validation origins, in the examples' order.
    """
    optimization = Optimization(model, training, levels, settings, accelerator)
    validation_returns = np.concatenate([example.returns for example in validation])
    targets_per_epoch = sum(len(example.scale) for example in training)

    def validation_losses() -> np.ndarray:
        """(n,) quantile loss of every validation origin, basis points."""
        quantiles = predict(model, validation, accelerator.device)
        losses = BASIS_POINTS * pinball_loss(validation_returns, quantiles, levels).mean(axis=1)
        if not np.isfinite(losses).all():
            raise NotFiniteError(f"forecasts were no longer finite after step {optimization.steps}")
        return losses

    start_losses = best_losses = validation_losses()
    start_bp = float(start_losses.mean())
    history = [_history_row(0, 0, math.nan, start_bp, start_bp, 0.0, 0.0, math.nan)]
    start_state = trained_state(model)
    best_epoch, best_bp, best_state = 0, start_bp, start_state
    stopped: str | None = None
    started, training_s = time.perf_counter(), 0.0
    try:
        with _training_progress(optimization.total_steps) as show:
            for epoch in range(1, settings.epochs + 1):
                epoch_started = time.perf_counter()
                loss = optimization.epoch(epoch, show.step)
                epoch_s = time.perf_counter() - epoch_started
                training_s += epoch_s
                losses = validation_losses()
                bp = float(losses.mean())
                rate, elapsed_s = targets_per_epoch / epoch_s, time.perf_counter() - started
                history.append(
                    _history_row(
                        epoch, optimization.steps, loss, bp, start_bp, optimization.learning_rate, elapsed_s, rate
                    )
                )
                show.epoch(f"epoch {epoch}/{settings.epochs}", loss, bp / start_bp, rate)
                if bp < best_bp:
                    best_epoch, best_bp, best_state, best_losses = epoch, bp, trained_state(model), losses
                elif epoch - best_epoch >= settings.patience:
                    stopped = f"no better validation loss for {settings.patience} epochs"
                    break
    except NotFiniteError as error:
        stopped = f"{error}; lower --learning_rate"
    except KeyboardInterrupt:
        stopped = "interrupted"
        warn(f"interrupted: keeping the weights of epoch {best_epoch}; press Ctrl-C again to leave without saving")
    gain = gain_in_errors(start_losses - best_losses, validation_dates, validation_returns.shape[1])
    unproven = best_epoch if best_epoch and gain < settings.required_gain else None
    load_trained_state(model, start_state if unproven is not None else best_state)
    finished = len(history) - 1
    rate = finished * targets_per_epoch / training_s if finished else math.nan
    kept = 0 if unproven is not None else best_epoch
    return TrainingOutcome(history, kept, stopped, optimization.steps, rate, unproven, gain)


def gain_in_errors(gains: np.ndarray, dates: np.ndarray, horizon: int) -> float:
    """Mean gain in units of its standard error.

    Tickers move together, so the days' means are what is counted; neighbouring days share the returns that they
    forecast, so the standard error is that of means over blocks of days (Carlstein, Annals of Statistics 14, 1986).

    Args:
        gains: (n,) a gain for each origin. dates: (n,).
    """
    _, day = np.unique(dates, return_inverse=True)
    by_day = np.bincount(day, weights=gains) / np.bincount(day)
    length = max(horizon, min(10, len(by_day) // 8), 1)
    count = len(by_day) // length
    if count < 2 or not gains.any():
        return 0.0
    blocks = by_day[: count * length].reshape(count, length).mean(axis=1)
    error = float(blocks.std(ddof=1)) / math.sqrt(count)
    return float(gains.mean()) / error if error > 0.0 else math.inf


class _TrainingDisplay:
    """The bar's fields, and a line for each epoch: above the bar in a terminal, alone in a log."""

    def __init__(self, bar: Any, total_steps: int) -> None:
        self.bar = bar
        self.task = bar.add_task("training", total=max(total_steps, 1), loss="-", ratio="1.0000", rate="-")
        self.targets, self.since = 0, time.perf_counter()

    def step(self, loss: float, targets: int) -> None:
        self.targets += targets
        rate = self.targets / (time.perf_counter() - self.since)
        self.bar.update(self.task, advance=1, loss=f"{loss:.4f}", rate=f"{rate:,.1f}")

    def epoch(self, name: str, loss: float, ratio: float, rate: float) -> None:
        self.bar.update(self.task, ratio=f"{ratio:.4f}")
        line = f"{name}: loss {loss:.4f}, validation {ratio:.4f} of the random walk, {rate:,.1f} days/s"
        say(line) if self.bar.disable else self.bar.console.print(line, highlight=False)
        self.targets, self.since = 0, time.perf_counter()


@contextlib.contextmanager
def _training_progress(total_steps: int) -> Iterator[_TrainingDisplay]:
    columns = (
        "loss {task.fields[loss]}",
        "validation {task.fields[ratio]} of the random walk",
        "{task.fields[rate]} days/s",
    )
    with progress(*columns) as bar:
        yield _TrainingDisplay(bar, total_steps)


def _history_row(
    epoch: int, step: int, loss: float, bp: float, start_bp: float, rate: float, seconds: float, targets_per_s: float
) -> dict[str, float]:
    values = (epoch, step, loss, bp, bp / start_bp, rate, seconds, targets_per_s)
    return dict(zip(HISTORY_COLUMNS, values, strict=True))
