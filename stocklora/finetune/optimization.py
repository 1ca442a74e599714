"""Batches, forward passes and optimizer steps: what ``finetune.loop`` makes epochs of."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from llm_model import TOKENS_STEP, StockForecaster, blocks_of, distance_sum, pinball_sum
from stocklora.cli.console import UserError
from stocklora.dataset.prepare import Example
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.batches import Batch, KeptStates, collate, grouped_by_tokens, training_tokens
from stocklora.forecaster.methods import load_trained_state, parameter_groups, trained_state
from stocklora.runtime.distributed import (
    is_sharded,
    load_optimizer_state,
    prepared,
    summed,
    whole_optimizer_state,
    whole_parameters,
)

HISTORY_COLUMNS = (
    "epoch", "step", "train_loss", "validation_pinball_bp", "validation_ratio", "learning_rate", "seconds",
    "targets_per_s",
)  # fmt: skip
INTERRUPTED = "interrupted"


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
    def interrupted(self) -> bool:
        return self.stopped == INTERRUPTED

    @property
    def best_ratio(self) -> float:
        return self.history[self.best_epoch]["validation_ratio"]


def standardize_head(
    model: StockForecaster,
    examples: Sequence[Example],
    device: torch.device,
    states: KeptStates | None = None,
    targets: int = 2000,
) -> None:
    """Fit the head's centre and spread on training origins, about ``targets`` of them spread over all."""
    every = max(1, sum(len(example.scale) for example in examples) // targets)
    was_training = model.training
    model.eval()
    hidden = []
    with torch.no_grad():
        for example in examples[::every]:
            batch = collate([example], states).to(device)
            hidden.append(model.hidden_at(batch.input_ids, batch.origin_tokens, batch.states)[0])
        model.head.standardize(torch.cat(hidden))
    model.train(was_training)


def accumulate_gradients(
    model: Any,
    micro_batches: Sequence[Batch],
    levels: Tensor,
    accelerator: Any,
    total_targets: int,
    distill_weight: float = 0.0,
    outcome_weight: float = 1.0,
) -> float:
    """Backward over all micro-batches of one step; gradients are those of the mean over all their targets.

    Args:
        total_targets: targets of the step over all micro-batches and processes.
        distill_weight: of the distance to the teacher's quantiles, where batches have some.
        outcome_weight: of the quantile loss of what came.

    Returns:
        The mean loss over this process's share, in units of the scale.
    """
    device = accelerator.device
    losses = []
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            batch = batch.to(device)
            quantiles = model(batch.input_ids, batch.origin_tokens, batch.scale, batch.states)
            loss = outcome_weight * pinball_sum(quantiles, batch.returns, batch.scale, levels, batch.mask)
            if batch.teacher is not None:
                loss = loss + distill_weight * distance_sum(quantiles, batch.teacher, batch.scale, batch.mask)
            # Processes average their gradients, and we want their sum over the step's targets.
            accelerator.backward(loss * accelerator.num_processes / total_targets)
            losses.append(loss.detach())
    # Read once: a graphics card would stand still at each number that is asked for.
    return sum(torch.stack(losses).tolist()) * accelerator.num_processes / total_targets


class NotFiniteError(Exception):
    """A loss, gradient or forecast that is no number any more; the message says when."""


def share_of_learning_rate(step: int, *, warmup: int, total: int) -> float:
    """Half a cosine after a linear warmup (``get_cosine_schedule_with_warmup`` of transformers, to the last bit).

    Written out, since importing that one brings in PEFT, bitsandbytes and torch's compiler: two seconds.
    """
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, total - warmup)))))


class Optimization:
    """Model, optimizer and learning-rate schedule, moved a step at a time.

    Args:
        states: of the layers that do not train, in place of computing them anew in each epoch.
        lessons: read beside the training sequences in the epochs of the teacher alone.

    Attributes:
        steps: optimizer steps taken so far.
        total_steps: steps of the whole run if nothing stops it.
        per_step: sequences of a step, over all processes.
        teacher_alone: whether the epoch in progress learns from the teacher's quantiles and not from outcomes.
    """

    def __init__(
        self,
        model: StockForecaster,
        training: Sequence[Example],
        levels: np.ndarray,
        settings: TrainLoraSettings,
        accelerator: Any,
        states: KeptStates | None = None,
        lessons: Sequence[Example] = (),
    ) -> None:
        groups = parameter_groups(model, settings.learning_rate, settings.head_learning_rate, settings.lora_plus_ratio)
        optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self.settings, self.accelerator = settings, accelerator
        self.training, self.states = training, states
        self.per_step = settings.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
        self.steps = 0
        self.teacher_alone = False
        self.lessons = [*training, *lessons]
        taught = min(settings.teacher_epochs, settings.epochs)
        self.total_steps = math.ceil(len(training) / self.per_step) * (settings.epochs - taught)
        self.total_steps += math.ceil(len(self.lessons) / self.per_step) * taught
        warmup = int(settings.warmup_ratio * self.total_steps)
        self.schedule = LambdaLR(optimizer, partial(share_of_learning_rate, warmup=warmup, total=self.total_steps))
        self.forecaster = model
        self.model, self.optimizer = prepared(accelerator, model, optimizer)
        self.levels = torch.tensor(levels, dtype=torch.float32, device=accelerator.device)

    @property
    def learning_rate(self) -> float:
        """The adapters' learning rate now."""
        return float(self.schedule.get_last_lr()[0])

    @property
    def sequences(self) -> Sequence[Example]:
        """Those of the epoch in progress."""
        return self.lessons if self.teacher_alone else self.training

    def epoch(self, number: int, done: int = 0) -> Iterator[tuple[float, int]]:
        """Steps over the training sequences, in an order of the seed and the epoch's own.

        Args:
            done: sequences at the order's beginning that were used up before.

        Yields:
            After each step its mean loss, in units of the scale, and how many targets it had.

        Raises:
            NotFiniteError: before the step that would have spoiled the weights.
        """
        self.teacher_alone = number <= self.settings.teacher_epochs
        order = np.random.default_rng([self.settings.seed, number]).permutation(len(self.sequences))
        self.model.train()
        for first in range(done, len(order), self.per_step):
            group = order[first : first + self.per_step]
            targets = sum(len(self.sequences[index].scale) for index in group)
            yield self.step(group, targets), targets

    def step(self, group: np.ndarray, targets: int) -> float:
        """One optimizer step over the sequences in ``group``, of which this process takes its share."""
        loss = accumulate_gradients(
            self.model, self.micro_batches(group), self.levels, self.accelerator, targets,
            *(1.0, 0.0) if self.teacher_alone else (self.settings.distill_weight, 1.0),
        )  # fmt: skip
        (loss,) = summed(self.accelerator, loss / self.accelerator.num_processes)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not (math.isfinite(loss) and (norm is None or math.isfinite(norm))):
            raise NotFiniteError(f"the loss was no longer finite at step {self.steps + 1}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss

    def micro_batches(self, group: np.ndarray) -> list[Batch]:
        """This process's share of a step, cut into batches: as many on every process, since each meets the others.

        Where a last step doesn't go round, a process is short of sequences and makes up for them with one that is
        masked and adds nothing.
        """
        count = self.accelerator.num_processes
        shares = [self._cut(group[index::count]) for index in range(count)]
        batches = [collate(part, self.states) for part in shares[self.accelerator.process_index]]
        most = max(map(len, shares))
        if len(batches) < most:
            shortest = min(self.training, key=lambda example: len(example.encoded.input_ids))
            blank = collate([shortest], self.states)
            batches += [replace(blank, mask=torch.zeros_like(blank.mask))] * (most - len(batches))
        return batches

    def _cut(self, group: np.ndarray) -> list[list[Example]]:
        """A process's share of a step in batches of ``batch_size``, cut on where they have too many tokens."""
        size = self.settings.batch_size
        most = training_tokens(self.settings.max_tokens_per_batch, self.accelerator.device.type)
        batches = [[self.sequences[i] for i in group[at : at + size]] for at in range(0, len(group), size)]
        return batches if most is None else [part for batch in batches for part in grouped_by_tokens(batch, most)]

    def trained(self) -> dict[str, Any]:
        """``trained_state``, whole even where the model is in shards; a call of all processes."""
        with whole_parameters(self.forecaster):
            return trained_state(self.forecaster)

    def load_trained(self, state: Mapping[str, Any]) -> None:
        with whole_parameters(self.forecaster, write=True):
            load_trained_state(self.forecaster, state)

    def state_dict(self) -> dict[str, Any]:
        """Weights that train, moments, schedule and step; a call of all processes."""
        return {
            "trained": self.trained(),
            "optimizer": whole_optimizer_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All of ``state_dict`` but the weights, which the model has to hold already."""
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.steps = int(state["steps"])


# ------------------------------------------------------------------------------------------------ torch.compile


@contextlib.contextmanager
def compiled(model: StockForecaster, *, dynamic: bool = True) -> Iterator[None]:
    """Inside the block training passes run as torch.compile makes them; the weights and their names stay.

    The backbone's repeated blocks are compiled, not the whole: they share their code, which is then compiled once and
    not once a layer. Passes without gradient, of which there are few, run as they are: they would be compiled again.

    Args:
        dynamic: one code for all lengths, in place of one for each.

    Raises:
        UserError: it cannot be compiled on this machine.
    """
    backbone = model.backbone
    stack = blocks_of(backbone)
    blocks = stack if len({type(block) for block in stack}) == 1 else [backbone]
    before = [vars(block).get("forward") for block in blocks]  # another library may have put its own there
    for block in blocks:
        _compile_for_training(block, dynamic)
    try:
        _try_compiled(model)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward  # the class's is seen again
            if own is not None:
                block.forward = own


def _try_compiled(model: StockForecaster) -> None:
    """One small pass, since the compiler is only asked at the first; mode and random numbers stay as they were.

    Raises:
        UserError: it cannot be compiled on this machine.
    """
    backbone = model.backbone
    device, was_training = next(backbone.parameters()).device, backbone.training
    tokens = torch.ones(2, TOKENS_STEP, dtype=torch.long, device=device)  # a length that batches have
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.enable_grad(),
            model.autocast(device.type),
        ):
            # In training mode, or it would be compiled again.
            hidden = backbone.train()(input_ids=tokens, use_cache=False).last_hidden_state
            trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
            if trained and not is_sharded(model):  # shards gather their gradients in a backward pass of their own
                torch.autograd.grad(hidden.float().sum(), trained, allow_unused=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--compile does not work here ({reason[:200]}); leave the flag out") from None
    finally:
        backbone.train(was_training)


def _compile_for_training(block: nn.Module, dynamic: bool) -> None:
    """Put a forward pass in front of the class's own; ``nn.Module.compile`` knows no way back, and no exception."""
    as_written = block.forward
    as_compiled = torch.compile(as_written, dynamic=dynamic)
    trains = any(parameter.requires_grad for parameter in block.parameters())

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return as_written(*args, **kwargs)
        # The first block's input has no gradient, all others' have: without this each would be compiled for itself.
        if args and torch.is_tensor(args[0]) and args[0].is_floating_point() and trains and not args[0].requires_grad:
            args = (args[0].detach().requires_grad_(), *args[1:])
        return as_compiled(*args, **kwargs)

    block.forward = forward  # type: ignore[method-assign]
