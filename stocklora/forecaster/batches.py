"""Examples -> padded batches -> predicted quantiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm_model import StockForecaster, padded_tokens
from stocklora.dataset.prepare import Example
from stocklora.runtime.distributed import gathered, is_sharded

STATES_BYTES = 2 * 10**9  # of frozen hidden states, in the machine's memory; those beyond are computed anew each time


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some examples.

    Attributes:
        input_ids: (batch, tokens). origin_tokens: (batch, targets). scale, returns: (batch, targets, horizon).
        mask: (batch, targets), 1 where there is a target.
        teacher: (batch, targets, horizon, levels), as ``Example.teacher``.
        hidden: (batch, targets, size), the backbone's states where ``FrozenStates`` has them.
    """

    input_ids: Tensor
    origin_tokens: Tensor
    scale: Tensor
    returns: Tensor
    mask: Tensor
    teacher: Tensor | None = None
    hidden: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(*[None if part is None else part.to(device) for part in vars(self).values()])  # type: ignore[arg-type]


class FrozenStates:
    """Hidden states of a backbone in which nothing trains: each example is read once, and used in every epoch.

    An example is read by itself, so that its states depend neither on the other rows of a batch nor on which batch
    came first: a run that was stopped and goes on sees the same numbers.

    Args:
        limit_bytes: of the states that are kept.

    Attributes:
        passes: of the backbone so far.
    """

    def __init__(self, model: StockForecaster, limit_bytes: int = STATES_BYTES) -> None:
        self.model, self.free_bytes = model, limit_bytes
        self.passes = 0
        self._known: dict[int, tuple[Example, Tensor]] = {}  # by identity; the example is kept, so that its id stays

    def of(self, example: Example) -> Tensor:
        """(targets, size) states at the example's origins, on the CPU."""
        if id(example) in self._known:
            return self._known[id(example)][1]
        # Not even within a forecast an inference tensor, which training could not use.
        with torch.inference_mode(False), torch.no_grad():
            batch = collate([example]).to(next(self.model.parameters()).device)
            states = self.model.hidden_at(batch.input_ids, batch.origin_tokens)[0].cpu()
        self.passes += 1
        if states.nbytes <= self.free_bytes:
            self.free_bytes -= states.nbytes
            self._known[id(example)] = (example, states)
        return states


def collate(examples: Sequence[Example], states: FrozenStates | None = None) -> Batch:
    """Pad on the right: ids with 0, scale with 1 (it divides), returns with 0 and a mask of 0, states with 0.

    Args:
        states: of a backbone in which nothing trains, where the batch is to bring them along.
    """

    def padded(rows: Sequence[np.ndarray], value: float = 0.0) -> Tensor:
        return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)

    taught = [example.teacher for example in examples if example.teacher is not None]
    return Batch(
        padded([example.encoded.input_ids for example in examples]).long(),
        padded([example.encoded.origin_tokens for example in examples]).long(),
        padded([example.scale for example in examples], 1.0).float(),
        padded([np.nan_to_num(example.returns) for example in examples]).float(),
        pad_sequence([torch.ones(len(example.scale)) for example in examples], batch_first=True),
        padded(taught, math.nan).float() if taught else None,
        None if states is None else pad_sequence([states.of(example) for example in examples], batch_first=True),
    )


def predict(
    model: StockForecaster,
    examples: Sequence[Example],
    device: torch.device,
    tokens_per_batch: int = 8192,
    accelerator: Any = None,
    on_batch: Callable[[], None] = lambda: None,
    states: FrozenStates | None = None,
) -> np.ndarray:
    """Uncalibrated quantiles at every origin of the examples, in their order.

    Args:
        tokens_per_batch: padded tokens of one forward pass, at most (a longer sequence goes alone).
        accelerator: whose processes share the passes, all of them calling this; each gets all quantiles, the same
            to the last bit as one process alone would.
        on_batch: called before each forward pass.
        states: of a backbone in which nothing trains; the model then reads no example twice.

    Returns:
        (origins, horizon, levels) float64.
    """
    groups = list(grouped_by_tokens(examples, tokens_per_batch))
    count, index = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    was_training = model.training
    model.eval()
    mine: dict[int, list[np.ndarray]] = {}
    try:
        # What FSDP gathers must not become an inference tensor: training uses it again.
        with torch.no_grad() if is_sharded(model) else torch.inference_mode():
            for first in range(0, len(groups), count):
                on_batch()
                # A process without a group repeats the last: under FSDP every pass is one of all processes.
                number = min(first + index, len(groups) - 1)
                batch = collate(groups[number], states).to(device)
                quantiles = model(batch.input_ids, batch.origin_tokens, batch.scale, batch.hidden)
                quantiles = quantiles.cpu().double().numpy()
                mine[number] = [quantiles[row, : len(example.scale)] for row, example in enumerate(groups[number])]
    finally:
        model.train(was_training)
    if count > 1:
        mine = {number: rows for part in gathered(accelerator, mine) for number, rows in part.items()}
    return np.concatenate([row for number in range(len(groups)) for row in mine[number]])


def grouped_by_tokens(examples: Sequence[Example], tokens_per_batch: int) -> Iterator[list[Example]]:
    """Consecutive examples in groups whose padded rows have at most so many tokens together."""
    group: list[Example] = []
    longest = 0
    for example in examples:
        tokens = padded_tokens(len(example.encoded.input_ids))
        longer = max(longest, tokens)
        if group and longer * (len(group) + 1) > tokens_per_batch:
            yield group
            group, longer = [], tokens
        group.append(example)
        longest = longer
    if group:
        yield group
