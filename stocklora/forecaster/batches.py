"""Examples -> padded batches -> predicted quantiles; and what frozen layers make of an example, kept for all epochs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm_model import StockForecaster, padded_tokens
from stocklora.cli.console import warn
from stocklora.dataset.prepare import Example
from stocklora.runtime.distributed import gathered, is_sharded

FORECAST_TOKENS = 8192  # padded, of one forward pass without gradient, at most
CPU_TOKENS = 2 * 1408  # of one pass of a training step: two sequences; a processor is no faster with more
MEMORY_BYTES = 2 * 10**9  # of states in the machine's memory; those beyond lie in a file


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some examples.

    Attributes:
        input_ids: (batch, tokens). origin_tokens: (batch, targets). scale, returns: (batch, targets, horizon).
        mask: (batch, targets), 1 where there is a target.
        teacher: (batch, targets, horizon, levels), as ``Example.teacher``.
        states: (batch, tokens or targets, hidden), what ``StockForecaster.states_of`` gives, where it is known.
    """

    input_ids: Tensor
    origin_tokens: Tensor
    scale: Tensor
    returns: Tensor
    mask: Tensor
    teacher: Tensor | None = None
    states: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(*[None if part is None else part.to(device) for part in vars(self).values()])  # type: ignore[arg-type]


class KeptStates:
    """The states that leave the frozen layers: see ``StockForecaster.states_of``.

    An example is read by itself, so that its states depend neither on the other rows of a batch nor on which batch
    came first: a run that was stopped and goes on sees the same numbers. They are kept as they were computed, in
    bfloat16 where the base computes in that, in memory or beyond ``limit_bytes`` in a file without a name, which is
    gone with the process. What finds no room there either is read anew each time.

    Args:
        model: whose ``frozen_layers`` are the same as long as this is used.
        folder: for the file; None for none.
        limit_bytes: of the states in memory.

    Attributes:
        passes: of the frozen layers so far.
    """

    def __init__(self, model: StockForecaster, folder: Path | None = None, limit_bytes: int = MEMORY_BYTES) -> None:
        self.model, self.folder, self.free_bytes = model, folder, limit_bytes
        self.passes = 0
        # By identity; the example is kept, so that its id stays its own. In the file: a place and a shape.
        self._in_memory: dict[int, tuple[Example, Tensor]] = {}
        self._in_file: dict[int, tuple[Example, int, torch.Size, torch.dtype]] = {}
        self._file: IO[bytes] | None = None

    def of(self, example: Example) -> Tensor:
        """(tokens, hidden) that enters the first layer that trains, on the CPU; with none, (targets, hidden)."""
        if id(example) in self._in_memory:
            return self._in_memory[id(example)][1]
        if id(example) in self._in_file:
            return self._read(*self._in_file[id(example)][1:])
        # Not even within a forecast an inference tensor, which training could not use.
        with torch.inference_mode(False):
            batch = collate([example]).to(next(self.model.parameters()).device)
            was_training = self.model.training
            states = self.model.eval().states_of(batch.input_ids, batch.origin_tokens)[0].to("cpu", copy=True)
            self.model.train(was_training)
        self.passes += 1
        if states.nbytes <= self.free_bytes:
            self.free_bytes -= states.nbytes
            self._in_memory[id(example)] = (example, states)
        elif self.folder is not None:
            self._write(example, states)
        return states

    def _write(self, example: Example, states: Tensor) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - as long as this object
            place = self._file.seek(0, 2)
            self._file.write(states.contiguous().view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            warn(
                f"{self.folder} has no room for the states of the layers that do not train ({error.strerror}): those "
                f"of the other sequences are computed anew in each epoch"
            )
            self.folder = None
        else:
            self._in_file[id(example)] = (example, place, states.shape, states.dtype)

    def _read(self, place: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        assert self._file is not None
        states = torch.empty(shape, dtype=dtype)
        self._file.seek(place)
        self._file.readinto(states.view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        return states


def collate(examples: Sequence[Example], states: KeptStates | None = None) -> Batch:
    """Pad on the right: ids with 0, scale with 1 (it divides), returns with 0 and a mask of 0, states with 0.

    Args:
        states: of the layers that do not train, where the batch is to bring them along.
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


def training_tokens(given: int | None, device_type: str) -> int | None:
    """Padded tokens of one pass of a training step, at most; None for the whole batch at once.

    Args:
        given: ``--max_tokens_per_batch``.
    """
    return CPU_TOKENS if given is None and device_type == "cpu" else given


def predict(
    model: StockForecaster,
    examples: Sequence[Example],
    device: torch.device,
    tokens_per_batch: int = FORECAST_TOKENS,
    accelerator: Any = None,
    on_batch: Callable[[], None] = lambda: None,
    states: KeptStates | None = None,
) -> np.ndarray:
    """Uncalibrated quantiles at every origin of the examples, in their order.

    Args:
        tokens_per_batch: padded tokens of one forward pass, at most (a longer sequence goes alone).
        accelerator: whose processes share the passes, all of them calling this; each gets all quantiles, the same
            to the last bit as one process alone would.
        on_batch: called before each forward pass.
        states: of the layers that do not train, which then read no example twice.

    Returns:
        (origins, horizon, levels) float64.
    """
    groups = list(grouped_by_tokens(examples, tokens_per_batch))
    ends = np.cumsum([sum(len(example.scale) for example in group) for group in groups])
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    # One array for all: small ones that outlive their pass would lie where the next pass wants its memory in one piece.
    found = np.empty((0,))
    count, index = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    was_training = model.training
    model.eval()
    mine: set[int] = set()
    try:
        # What FSDP gathers must not become an inference tensor: training uses it again.
        with torch.no_grad() if is_sharded(model) else torch.inference_mode():
            for first in range(0, len(groups), count):
                on_batch()
                # A process without a group repeats the last: under FSDP every pass is one of all processes.
                number = min(first + index, len(groups) - 1)
                batch = collate(groups[number], states).to(device)
                quantiles = model(batch.input_ids, batch.origin_tokens, batch.scale, batch.states)
                if not found.size:
                    found = np.empty((ends[-1], *quantiles.shape[2:]))
                rows = [quantiles[row, : len(example.scale)] for row, example in enumerate(groups[number])]
                found[parts[number]] = torch.cat(rows).cpu().double().numpy()
                mine.add(number)
    finally:
        model.train(was_training)
    if count > 1:
        for theirs in gathered(accelerator, {number: found[parts[number]] for number in mine}):
            for number, values in theirs.items():
                found[parts[number]] = values
    return found


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
