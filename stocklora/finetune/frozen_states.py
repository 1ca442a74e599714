"""Hidden states of a backbone in which nothing trains: read once, used in every epoch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from llm_model import StockForecaster

LIMIT_BYTES = 2 * 10**9  # on the CPU; states beyond that are computed anew each time


class FrozenStates:
    """``StockForecaster.hidden_at`` with a memory.

    Each row is read by itself, cut after its last origin, so that its states depend neither on the other rows of
    a batch nor on which batch came first: a run that was stopped and goes on sees the same numbers.
    """

    def __init__(self, model: StockForecaster, limit_bytes: int = LIMIT_BYTES) -> None:
        self._read = model.hidden_at
        self._limit_bytes = limit_bytes
        self._held: dict[bytes, Tensor] = {}
        self.bytes = 0
        self.passes = 0  # of the backbone

    def __call__(self, input_ids: Tensor, origin_tokens: Tensor) -> Tensor:
        """(batch, tokens), (batch, targets) -> (batch, targets, hidden), as ``StockForecaster.hidden_at``."""
        return torch.stack([self._row(*row) for row in zip(input_ids, origin_tokens, strict=True)])

    def _row(self, input_ids: Tensor, origin_tokens: Tensor) -> Tensor:
        count = int(origin_tokens.argmax()) + 1  # origins stand in order; what follows the last is padding
        at = origin_tokens[:count]
        ids = input_ids[: int(at[-1]) + 1]
        key = hashlib.blake2b(ids.cpu().numpy().tobytes() + b"|" + at.cpu().numpy().tobytes()).digest()
        held = self._held.get(key)
        if held is None:
            with torch.no_grad():
                held = self._read(ids[None], at[None])[0].cpu()  # (count, hidden)
            self.passes += 1
            if self.bytes + held.nbytes <= self._limit_bytes:
                self._held[key] = held
                self.bytes += held.nbytes
        padding = held[-1:].expand(len(origin_tokens) - count, -1)
        # A copy: what was held by a forecast is an inference tensor, which training could not use.
        return torch.cat([held, padding]).to(input_ids.device)


@contextlib.contextmanager
def remembered(model: StockForecaster) -> Iterator[FrozenStates]:
    """Inside the block ``model`` reads each sequence once. Nothing in its backbone may train."""
    states = FrozenStates(model)
    model.hidden_at = states  # type: ignore[method-assign]
    try:
        yield states
    finally:
        del model.hidden_at
