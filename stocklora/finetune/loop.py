"""The training loop: from the random walk as epoch 0, away from it only while validation improves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llm_model import StockForecaster
from lora import LoRAError
from stocklora.cli.console import UserError, progress, say
from stocklora.dataset.prepare import Example
from stocklora.finetune.optimization import (
    HISTORY_COLUMNS,
    INTERRUPTED,
    NotFiniteError,
    Optimization,
    TrainingOutcome,
    standardize_head,
)
from stocklora.finetune.resume import Checkpoints, random_state, set_random_state
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.finetune.warm_start import fit_head
from stocklora.forecaster.batches import KeptStates, predict
from stocklora.forecaster.methods import load_trained_state
from stocklora.metrics.scores import BASIS_POINTS, pinball_loss
from stocklora.runtime.distributed import gathered, summed
from stocklora.runtime.interrupt import Interruption

STOPPING = "\ninterrupted: finishing this step, then saving; once more leaves at once"


class _StoppedError(Exception):
    """Whoever runs the program asked it to stop."""


@dataclass
class Progress:
    """Where the loop stands, and all that it decides by beside ``Optimization``.

    Attributes:
        epoch: the one in progress, from 1. done: its sequences used up so far. losses: of its steps so far.
        history: of finished epochs. start_losses, best_losses: (n,) validation losses of the first and the best.
        start_state, best_state: ``trained_state`` likewise.
        seconds: since the run began, pauses left out. training_s: of all steps. epoch_s: of this epoch's steps.
        targets: learned from in finished epochs.
    """

    history: list[dict[str, float]]
    start_losses: np.ndarray
    start_state: Mapping[str, Any]
    best_losses: np.ndarray
    best_state: Mapping[str, Any]
    best_epoch: int = 0
    epoch: int = 1
    done: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    training_s: float = 0.0
    epoch_s: float = 0.0
    targets: int = 0

    @property
    def best_bp(self) -> float:
        return self.history[self.best_epoch]["validation_pinball_bp"]

    def state_dict(self) -> dict[str, Any]:
        """All of it in plain values and tensors."""
        return {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """The progress that ``state_dict`` gave."""
        content: dict[str, Any] = {
            name: value.numpy() if torch.is_tensor(value) else value for name, value in state.items()
        }
        return cls(**content)


class _Loop:
    """Epochs of steps and validations from wherever ``progress`` stands."""

    def __init__(
        self,
        optimization: Optimization,
        validation: Sequence[Example],
        levels: np.ndarray,
        checkpoints: Checkpoints | None,
        interruption: Interruption,
    ) -> None:
        self.optimization = optimization
        self.accelerator, self.settings = optimization.accelerator, optimization.settings
        self.validation, self.levels = validation, levels
        self.checkpoints, self.interruption = checkpoints, interruption
        self.validation_returns = np.concatenate([example.returns for example in validation])
        self._clock = time.perf_counter()
        self.progress: Progress

    def start(self) -> None:
        """Epoch 0: the untrained model."""
        losses, state = self.validation_losses(), self.optimization.trained()
        bp = float(losses.mean())
        row = _history_row(0, 0, math.nan, bp, bp, 0.0, 0.0, math.nan)
        self.progress = Progress([row], losses, state, losses, state)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where ``_save`` was."""
        self.progress = Progress.from_state(state["progress"])
        self.optimization.load_state_dict(state["optimization"])
        set_random_state(state["random"][self.accelerator.process_index])

    def train(self, display: _TrainingDisplay) -> str | None:
        """Train until the last epoch, or until something stops it; returns what that was."""
        self._clock = time.perf_counter() - self.progress.seconds
        try:
            while not self._patience_is_out() and self.progress.epoch <= self.settings.epochs:
                self._epoch(display)
        except NotFiniteError as error:
            return f"{error}; lower --learning_rate"
        except _StoppedError:
            return INTERRUPTED
        return f"no better validation loss for {self.settings.patience} epochs" if self._patience_is_out() else None

    def _patience_is_out(self) -> bool:
        return self.progress.epoch - 1 - self.progress.best_epoch >= self.settings.patience

    def _epoch(self, display: _TrainingDisplay) -> None:
        now = self.progress
        started = time.perf_counter()
        for loss, targets in self.optimization.epoch(now.epoch, now.done):
            now.losses.append(loss)
            now.done += self.optimization.per_step
            now.epoch_s += time.perf_counter() - started
            display.step(loss, targets)
            due = self.checkpoints is not None and self.checkpoints.due_after_step(self.optimization.steps)
            self._save_or_stop(due)
            started = time.perf_counter()
        try:
            losses = self.validation_losses(self._stop_between_batches)
        except _StoppedError:
            self._save_or_stop(False)  # the epoch's steps are done; its validation will be made again
            raise
        self._judge(losses, display)
        wanted = self.checkpoints is not None and self.checkpoints.due_after_epoch()
        self._save_or_stop(gathered(self.accelerator, wanted)[0])

    def _judge(self, losses: np.ndarray, display: _TrainingDisplay) -> None:
        """End an epoch: its row, and whether its weights are the best so far."""
        now = self.progress
        loss, bp, start_bp = float(np.mean(now.losses)), float(losses.mean()), float(now.start_losses.mean())
        targets = sum(len(example.scale) for example in self.optimization.sequences)
        rate = targets / now.epoch_s
        now.targets += targets
        now.training_s += now.epoch_s
        now.history.append(
            _history_row(
                now.epoch, self.optimization.steps, loss, bp, start_bp, self.optimization.learning_rate,
                time.perf_counter() - self._clock, rate,
            )
        )  # fmt: skip
        display.epoch(f"epoch {now.epoch}/{self.settings.epochs}", loss, bp / start_bp, rate)
        if bp < now.best_bp:
            now.best_epoch, now.best_losses, now.best_state = now.epoch, losses, self.optimization.trained()
        now.epoch, now.done, now.losses, now.epoch_s = now.epoch + 1, 0, [], 0.0

    def validation_losses(self, on_batch: Callable[[], None] = lambda: None) -> np.ndarray:
        """(n,) quantile loss of every validation origin, basis points."""
        quantiles = predict(
            self.optimization.forecaster, self.validation, self.accelerator.device, accelerator=self.accelerator,
            on_batch=on_batch, states=self.optimization.states,
        )  # fmt: skip
        losses = BASIS_POINTS * pinball_loss(self.validation_returns, quantiles, self.levels).mean(axis=1)
        if not np.isfinite(losses).all():
            raise NotFiniteError(f"forecasts were no longer finite after step {self.optimization.steps}")
        return losses

    def _stop_between_batches(self) -> None:
        # Several processes would have to agree before each batch; they finish the validation.
        if self.interruption.requested and self.accelerator.num_processes == 1:
            raise _StoppedError

    def _save_or_stop(self, due: bool) -> None:
        """Between steps: save if it is time to; where any process was asked to stop, save and stop."""
        (stop,) = summed(self.accelerator, float(self.interruption.requested))
        if due or stop:
            self._save()
        if stop:
            raise _StoppedError

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        self.progress.seconds = time.perf_counter() - self._clock
        state = {
            "optimization": self.optimization.state_dict(),
            "progress": self.progress.state_dict(),
            "random": gathered(self.accelerator, random_state()),
        }
        if self.accelerator.is_main_process:
            self.checkpoints.save(state, self.progress.epoch, self.optimization.steps)


def train(
    model: StockForecaster,
    training: Sequence[Example],
    validation: Sequence[Example],
    levels: np.ndarray,
    settings: TrainLoraSettings,
    accelerator: Any,
    validation_dates: np.ndarray,
    checkpoints: Checkpoints | None = None,
    resumed: Mapping[str, Any] | None = None,
    standardize: bool = True,
    states: KeptStates | None = None,
    lessons: Sequence[Example] = (),
) -> TrainingOutcome:
    """Fine-tune adapters and head; on return the model holds the weights of the best epoch.

    Epoch 0 is the untrained model. Training stops after ``patience`` epochs without a better validation
    loss, on a loss that is not finite (the best weights so far are kept), and on Ctrl-C or SIGTERM (likewise, after
    the step in progress and with the state saved; a second one raises KeyboardInterrupt at once). An epoch
    whose gain over epoch 0 is less than ``required_gain`` standard errors has not earned its way: the lowest of
    many noisy losses is lower by chance alone, and costs on days to come.

    Args:
        validation_dates: (n,) dates of the validation origins, in the examples' order.
        checkpoints: where the run's state goes. resumed: a state that ``checkpoints`` loaded, to go on from.
        standardize: fit the head's centre and spread first; a resumed run has them.
        states: of the layers that do not train, so that they read each example once.
        lessons: what the teacher's own epochs read beside the training examples.
    """
    if resumed is not None:
        resume_weights(model, resumed)  # before anything wraps the model or cuts it into shards
    optimization = Optimization(model, training, levels, settings, accelerator, states, lessons)
    interruption = Interruption(STOPPING if accelerator.is_main_process else None)
    loop = _Loop(optimization, validation, levels, checkpoints, interruption)
    if resumed is not None:
        loop.resume(resumed)
    else:
        if standardize:
            standardize_head(model, training, accelerator.device, states)
        loop.start()
        if settings.teacher_epochs:
            fit_head(model, optimization.lessons, accelerator.device, states)
    with interruption, progress(*_TrainingDisplay.COLUMNS, shown=accelerator.is_main_process) as bar:
        stopped = loop.train(_TrainingDisplay(bar, optimization.steps, optimization.total_steps))
    end = loop.progress
    gain = gain_in_errors(end.start_losses - end.best_losses, validation_dates, loop.validation_returns.shape[1])
    unproven = end.best_epoch if end.best_epoch and gain < settings.required_gain else None
    optimization.load_trained(end.start_state if unproven is not None else end.best_state)
    finished = len(end.history) - 1
    return TrainingOutcome(
        history=end.history,
        best_epoch=0 if unproven is not None else end.best_epoch,
        stopped=stopped,
        steps=optimization.steps,
        targets_per_s=end.targets / end.training_s if finished else math.nan,
        unproven_epoch=unproven,
        gain_in_errors=gain,
    )


def resume_weights(model: StockForecaster, state: Mapping[str, Any]) -> None:
    """Fill the model from a run's state.

    Raises:
        UserError: a state that does not fit.
    """
    try:
        load_trained_state(model, state["optimization"]["trained"])
    except (LoRAError, RuntimeError) as error:
        raise UserError(
            f"--resume: the run's state does not fit the model ({error}); leave out --resume to start anew"
        ) from None


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

    COLUMNS = (
        "loss {task.fields[loss]}", "validation {task.fields[ratio]} of the random walk", "{task.fields[rate]} days/s",
    )  # fmt: skip

    def __init__(self, bar: Any, steps: int, total_steps: int) -> None:
        self.bar = bar
        fields = {"loss": "-", "ratio": "1.0000", "rate": "-"}
        self.task = bar.add_task("training", total=max(total_steps, 1), completed=steps, **fields)
        self.targets, self.since = 0, time.perf_counter()

    def step(self, loss: float, targets: int) -> None:
        """Move the bar on by a step."""
        self.targets += targets
        rate = self.targets / (time.perf_counter() - self.since)
        self.bar.update(self.task, advance=1, loss=f"{loss:.4f}", rate=f"{rate:,.1f}")

    def epoch(self, name: str, loss: float, ratio: float, rate: float) -> None:
        """Say how an epoch went.

        Args:
            ratio: validation loss over the random walk's. rate: days a second.
        """
        self.bar.update(self.task, ratio=f"{ratio:.4f}")
        line = f"{name}: loss {loss:.4f}, validation {ratio:.4f} of the random walk, {rate:,.1f} days/s"
        say(line) if self.bar.disable else self.bar.console.print(line, highlight=False)
        self.targets, self.since = 0, time.perf_counter()


def _history_row(
    epoch: int, step: int, loss: float, bp: float, start_bp: float, rate: float, seconds: float, targets_per_s: float
) -> dict[str, float]:
    values = (epoch, step, loss, bp, bp / start_bp, rate, seconds, targets_per_s)
    return dict(zip(HISTORY_COLUMNS, values, strict=True))
