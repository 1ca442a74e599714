"""The training loop: from the random walk as epoch 0, away from it only while validation improves."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_model import StockForecaster, pinball_sum
from lora import load_lora_state_dict, lora_parameters, lora_state_dict
from stocklora.console import progress, say, warn
from stocklora.dataset import Example
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
        stopped: why training ended before ``--epochs``, or None.
    """

    history: list[dict[str, float]]
    best_epoch: int
    stopped: str | None
    steps: int
    targets_per_s: float

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


def train(
    model: StockForecaster,
    training: Sequence[Example],
    validation: Sequence[Example],
    levels: np.ndarray,
    settings: TrainLoraSettings,
    accelerator: Any,
) -> TrainingOutcome:
    """Fine-tune adapters and head; on return the model holds the weights of the best epoch.

    Epoch 0 is the untrained model. Training stops after ``patience`` epochs without a better validation
    loss, on a loss that is not finite (the best weights so far are kept), and on Ctrl-C (likewise).
    """
    from transformers import get_cosine_schedule_with_warmup

    device = accelerator.device
    optimizer = torch.optim.AdamW(
        [
            {"params": list(lora_parameters(model.backbone)), "lr": settings.learning_rate},
            {"params": [model.head.linear.weight], "lr": settings.head_learning_rate},
            # The bias holds the starting quantiles: decay would pull them toward quantiles of nothing.
            {"params": [model.head.linear.bias], "lr": settings.head_learning_rate, "weight_decay": 0.0},
        ],
        weight_decay=settings.weight_decay,
    )
    per_step = settings.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    steps_per_epoch = math.ceil(len(training) / per_step)
    total_steps = steps_per_epoch * settings.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, int(settings.warmup_ratio * total_steps), total_steps)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    level_tensor = torch.tensor(levels, dtype=torch.float32, device=device)
    validation_returns = np.concatenate([example.returns for example in validation])

    def validation_pinball_bp() -> float:
        quantiles = predict(model, validation, device)
        return BASIS_POINTS * float(pinball_loss(validation_returns, quantiles, levels).mean())

    start_bp = validation_pinball_bp()
    history = [_history_row(0, 0, math.nan, start_bp, start_bp, 0.0, 0.0, math.nan)]
    best_epoch, best_bp, best_state = 0, start_bp, _snapshot(model)
    stopped: str | None = None
    step, trained_targets, started, training_s = 0, 0, time.perf_counter(), 0.0
    columns = (
        "loss {task.fields[loss]}",
        "validation {task.fields[ratio]} of the random walk",
        "{task.fields[rate]} days/s",
    )
    try:
        with progress(*columns) as bar:
            task = bar.add_task("training", total=max(total_steps, 1), loss="-", ratio="1.0000", rate="-")
            for epoch in range(1, settings.epochs + 1):
                model.train()
                order = np.random.default_rng([settings.seed, epoch]).permutation(len(training))
                losses = []
                epoch_targets, epoch_started = 0, time.perf_counter()
                for first in range(0, len(order), per_step):
                    group = order[first : first + per_step]
                    mine = group[accelerator.process_index :: accelerator.num_processes]
                    micro = [
                        collate([training[index] for index in mine[at : at + settings.batch_size]])
                        for at in range(0, len(mine), settings.batch_size)
                    ]
                    targets = sum(len(training[index].scale) for index in group)
                    loss = accumulate_gradients(wrapped, micro, level_tensor, accelerator, targets)
                    norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm)
                    if not (math.isfinite(loss) and (norm is None or math.isfinite(float(norm)))):
                        stopped = f"the loss was no longer finite at step {step + 1}; lower --learning_rate"
                        break
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad(set_to_none=True)
                    step += 1
                    losses.append(loss)
                    epoch_targets += targets
                    rate = epoch_targets / (time.perf_counter() - epoch_started)
                    bar.update(task, advance=1, loss=f"{loss:.4f}", rate=f"{rate:,.1f}")
                if stopped:
                    break
                epoch_s = time.perf_counter() - epoch_started
                trained_targets += epoch_targets
                training_s += epoch_s
                bp = validation_pinball_bp()
                if not math.isfinite(bp):
                    stopped = f"forecasts were no longer finite after epoch {epoch}; lower --learning_rate"
                    break
                history.append(
                    _history_row(
                        epoch,
                        step,
                        float(np.mean(losses)),
                        bp,
                        start_bp,
                        schedule.get_last_lr()[0],
                        time.perf_counter() - started,
                        epoch_targets / epoch_s,
                    )
                )
                bar.update(task, ratio=f"{bp / start_bp:.4f}")
                line = (
                    f"epoch {epoch}/{settings.epochs}: loss {np.mean(losses):.4f}, validation {bp / start_bp:.4f} of "
                    f"the random walk, {epoch_targets / epoch_s:,.1f} days/s"
                )
                # A log has no bar; in a terminal the line goes above it.
                say(line) if bar.disable else bar.console.print(line, highlight=False)
                if bp < best_bp:
                    best_epoch, best_bp, best_state = epoch, bp, _snapshot(model)
                elif epoch - best_epoch >= settings.patience:
                    stopped = f"no better validation loss for {settings.patience} epochs"
                    break
    except KeyboardInterrupt:
        stopped = "interrupted"
        warn(f"interrupted: keeping the weights of epoch {best_epoch}; press Ctrl-C again to leave without saving")
    _restore(model, best_state)
    rate = trained_targets / training_s if training_s else math.nan
    return TrainingOutcome(history, best_epoch, stopped, step, rate)


def _history_row(
    epoch: int, step: int, loss: float, bp: float, start_bp: float, rate: float, seconds: float, targets_per_s: float
) -> dict[str, float]:
    values = (epoch, step, loss, bp, bp / start_bp, rate, seconds, targets_per_s)
    return dict(zip(HISTORY_COLUMNS, values, strict=True))


def _snapshot(model: StockForecaster) -> dict[str, dict[str, Tensor]]:
    head = {name: tensor.detach().cpu().clone() for name, tensor in model.head.state_dict().items()}
    return {"adapters": lora_state_dict(model.backbone), "head": head}


def _restore(model: StockForecaster, state: dict[str, dict[str, Tensor]]) -> None:
    load_lora_state_dict(model.backbone, state["adapters"])
    model.head.load_state_dict(state["head"])
