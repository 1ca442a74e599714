"""A causal language model that forecasts: backbone, quantile head, loss.

The backbone reads days as tokens; at the last token of each day to forecast from, the head turns the
hidden state into quantiles of the log return over the next 1..horizon days::

    q = location(h) + scale * z(h),    z(h) = table + (what the head has learned)

``scale`` is the return's usual size, known at the origin; ``location`` is zero or the drift. ``table`` holds
the training set's empirical quantiles of the scaled return. The head's weight starts at zero, so the
untrained model forecasts exactly ``location + scale * table``: the volatility-scaled random walk, from which
training has to earn its way.

Leaf module: it knows torch, transformers and ``lora``; nothing of prices or files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS_STEP = 64  # lengths that a batch is padded on to


class QuantileHead(nn.Module):
    """Hidden states -> quantiles that never cross.

    The middle level is predicted as it is; each other level is the one nearer the middle plus or minus
    softplus of its own output, hence positive gaps by construction.

    Args:
        hidden_size: width of the backbone.
        table: (horizon, levels) starting quantiles, strictly increasing along levels.
    """

    def __init__(self, hidden_size: int, table: Tensor) -> None:
        super().__init__()
        self.horizon, self.levels = table.shape
        self.middle = self.levels // 2
        # The backbone's own scale of hidden states differs by orders of magnitude between models.
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("spread", torch.ones(hidden_size))
        self.mean: Tensor
        self.spread: Tensor
        self.linear = nn.Linear(hidden_size, self.horizon * self.levels)
        nn.init.zeros_(self.linear.weight)
        with torch.no_grad():
            self.linear.bias.copy_(self.outputs_for(table.float()).flatten())

    def outputs_for(self, table: Tensor) -> Tensor:
        """The linear outputs that give ``table``, (..., levels), back: the inverse of ``_quantiles``.

        Raises:
            ValueError: quantiles that do not increase.
        """
        gaps = table.diff(dim=-1)
        if not bool((gaps > 0).all()):
            raise ValueError("starting quantiles must be strictly increasing along levels")
        inverse = gaps + torch.log(-torch.expm1(-gaps))  # softplus^-1
        middle = table[..., self.middle : self.middle + 1]
        return torch.cat([inverse[..., : self.middle], middle, inverse[..., self.middle :]], dim=-1)

    def _quantiles(self, outputs: Tensor) -> Tensor:
        middle = outputs[..., self.middle : self.middle + 1]
        below = F.softplus(outputs[..., : self.middle]).flip(-1).cumsum(-1).flip(-1)
        above = F.softplus(outputs[..., self.middle + 1 :]).cumsum(-1)
        return torch.cat([middle - below, middle, middle + above], dim=-1)

    def standardize(self, hidden: Tensor) -> None:
        """Fix each feature's centre and spread from the training days' hidden states, (n, hidden).

        Every origin's token is the same line end, so its hidden states are nearly alike: a tenth of a
        feature's size is all that tells one day from another. Without this the head learns ten times slower.
        """
        features = self.norm(hidden.float())
        self.mean.copy_(features.mean(dim=0))
        # A floor keeps a feature that never varies from being blown up.
        spread = features.std(dim=0)
        self.spread.copy_(spread.clamp_min(0.1 * spread.median()).clamp_min(1e-4))

    def features(self, hidden: Tensor) -> Tensor:
        return (self.norm(hidden.float()) - self.mean) / self.spread

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., horizon, levels), float32 whatever the backbone computes in."""
        outputs = self.linear(self.features(hidden))
        return self._quantiles(outputs.unflatten(-1, (self.horizon, self.levels)))


class StockForecaster(nn.Module):
    """A causal backbone and a quantile head.

    Args:
        backbone: what ``AutoModel`` gives: ids -> ``last_hidden_state``.
        table: (horizon, levels) starting quantiles of the scaled return.
        location: (horizon,) log return that they stand around; default 0.
        hidden_size: of what the backbone gives; by default what its configuration says.
    """

    def __init__(
        self, backbone: nn.Module, table: Tensor, location: Tensor | None = None, hidden_size: int | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        # What the backbone computes in where its weights are kept in more: float32 weights that all train.
        self.autocast_dtype: torch.dtype | None = None
        self.tuning: Any = None  # what trains in the backbone, for whoever put it there
        self.frozen_layers = 0  # the first so many, which never change: what leaves them need be computed only once
        self.layer_outputs: int | None = None  # the length of the tuple that a layer returns; None for a bare tensor
        self.head = QuantileHead(hidden_size or facts_of(backbone.config).hidden_size, table)
        self.register_buffer("location", torch.zeros(len(table)) if location is None else location.float())
        self.location: Tensor

    def forward(self, input_ids: Tensor, origin_tokens: Tensor, scale: Tensor, states: Tensor | None = None) -> Tensor:
        """Quantiles of the log return at every origin.

        No attention mask: rows are padded on the right only, and what stands to the right of a token is
        invisible to it. (A mask would also cost the fast causal attention kernels.)

        Args:
            input_ids: (batch, tokens) int64, padded on the right with any id.
            origin_tokens: (batch, targets) position of each origin's last token, padded with any position.
            scale: (batch, targets, horizon) size of the return in each row's own units.
            states: what ``states_of`` gives, where it is known; the frozen layers then rest.

        Returns:
            (batch, targets, horizon, levels) float32.
        """
        hidden = self.hidden_at(input_ids, origin_tokens, states)
        scaled = self.head(hidden) * scale[..., None].float()
        return self.location[:, None] + scaled

    def hidden_at(self, input_ids: Tensor, origin_tokens: Tensor, states: Tensor | None = None) -> Tensor:
        """(batch, targets, hidden) hidden states at the origins' last tokens; ``states`` as in ``forward``."""
        if states is not None and self._all_frozen():
            return states
        blocks = blocks_of(self.backbone)[: self.frozen_layers] if states is not None else []
        wide = self._widened(input_ids)
        if states is not None:  # what stands to the right of a row is invisible, whatever it is
            states = F.pad(states, (0, 0, 0, wide.shape[1] - states.shape[1]))
        with skipped(blocks, self.layer_outputs, states), self.autocast(wide.device.type):
            hidden = self.backbone(input_ids=wide, use_cache=False).last_hidden_state  # (batch, tokens, hidden)
        return hidden.gather(1, origin_tokens[..., None].expand(-1, -1, hidden.shape[-1]))

    @torch.no_grad()
    def states_of(self, input_ids: Tensor, origin_tokens: Tensor) -> Tensor:
        """What the frozen layers make of a batch; the same whatever the others learn.

        Returns:
            (batch, tokens, hidden) that enters the first layer that is not frozen; where all are frozen,
            (batch, targets, hidden), as ``hidden_at``.
        """
        if self._all_frozen():
            return self.hidden_at(input_ids, origin_tokens)
        wide = self._widened(input_ids)
        learning = blocks_of(self.backbone)[self.frozen_layers :]
        with skipped(learning, self.layer_outputs) as entered, self.autocast(wide.device.type):
            self.backbone(input_ids=wide, use_cache=False)
        return entered[0][:, : input_ids.shape[1]]

    def _all_frozen(self) -> bool:
        return self.frozen_layers >= facts_of(self.backbone.config).layers

    def _widened(self, input_ids: Tensor) -> Tensor:
        """Padded on to one of a few lengths: freed memory then fits what is asked for next.

        Where every batch had a length of its own, memory in use on a CPU grew by 40 MB with each training step.
        """
        tokens = input_ids.shape[1]
        wider = min(padded_tokens(tokens), max(tokens, facts_of(self.backbone.config).context_tokens))
        if wider > length_that_counts(self.backbone.config):
            wider = tokens  # there, padding would move the states before it
        return F.pad(input_ids, (0, wider - tokens))

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        """Inside, the backbone computes in ``autocast_dtype``, if it is set."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)


def blocks_of(backbone: Any) -> list[nn.Module]:
    """The layers that a transformer is a stack of, in order; none where no such stack is found."""
    count = facts_of(backbone.config).layers
    stacks = (list(module) for module in backbone.modules() if isinstance(module, nn.ModuleList))
    return next((stack for stack in stacks if len(stack) == count), [])


@contextlib.contextmanager
def skipped(
    blocks: Sequence[nn.Module], layer_outputs: int | None = None, states: Tensor | None = None
) -> Iterator[list[Tensor]]:
    """Inside, these layers hand on what they are given; the first of them hands on ``states`` in its place, if given.

    All else that a family does around its layers stays its own: embeddings and their scale, masks, rotary positions.

    Args:
        layer_outputs: the length of the tuple that such a layer returns; None for a bare tensor.

    Yields:
        A list that what entered the first of them is put into, at each pass.
    """
    entered: list[Tensor] = []
    before = [vars(block).get("forward") for block in blocks]  # torch.compile's, or another library's

    def stand_in(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                entered[:] = [given]
                given = given if states is None else states.to(given.dtype)
            return given if layer_outputs is None else (given, *[None] * (layer_outputs - 1))

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)  # type: ignore[method-assign]
        yield entered
    finally:
        for block, own in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)  # the class's is seen again
            if own is not None:
                block.forward = own  # type: ignore[method-assign]


def padded_tokens(tokens: int) -> int:
    """The length that a batch whose longest row has so many tokens is padded on to, at most."""
    return -(-tokens // TOKENS_STEP) * TOKENS_STEP


def pinball_sum(quantiles: Tensor, returns: Tensor, scale: Tensor, levels: Tensor, mask: Tensor) -> Tensor:
    """Quantile loss in units of the scale, averaged over horizon and levels, summed over targets.

    A sum, so that the caller can divide by the number of targets of the whole batch: gradients are then
    the same however the batch is cut into smaller passes.

    Args:
        quantiles: (batch, targets, horizon, levels). returns, scale: (batch, targets, horizon).
        levels: (levels,). mask: (batch, targets), 1 where there is a target.
    """
    error = (returns[..., None] - quantiles) / scale[..., None]
    loss = torch.maximum(levels * error, (levels - 1.0) * error).mean(dim=(-2, -1))  # (batch, targets)
    return (loss * mask).sum()


def distance_sum(quantiles: Tensor, teacher: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    """Distance to another model's quantiles in units of the scale, averaged and summed as ``pinball_sum`` is.

    Where two sets of quantiles have the same levels, the mean distance is the Wasserstein distance of the two
    distributions, as far as the levels tell.

    Args:
        quantiles: (batch, targets, horizon, levels). teacher: likewise, NaN at targets that it does not forecast.
        scale: (batch, targets, horizon). mask: (batch, targets), 1 where there is a target.
    """
    known = mask * torch.isfinite(teacher).all(dim=-1).all(dim=-1)  # (batch, targets)
    distance = ((quantiles - teacher.nan_to_num()) / scale[..., None]).abs().mean(dim=(-2, -1))
    return (distance * known).sum()


@dataclass(frozen=True)
class BackboneFacts:
    """What the rest of the program needs to know of a base model before any weight is read."""

    hidden_size: int
    layers: int
    context_tokens: int


CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")


def facts_of(config: Any) -> BackboneFacts:
    """Of a language model's configuration, or of that inside one for pictures and text."""
    config = text_config_of(config)
    contexts = [getattr(config, name, None) for name in CONTEXT_NAMES]
    return BackboneFacts(
        hidden_size=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        context_tokens=int(next((tokens for tokens in contexts if tokens), 2**20)),
    )


def length_that_counts(config: Any) -> int:
    """The tokens beyond which a sequence's length changes all of its states, padding included.

    Two ways to stretch rotary positions look at the longest position of a batch: Phi's longrope and dynamic NTK.
    """
    config = text_config_of(config)
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]  # one, or one for each kind of layer
    if not any(part.get("rope_type") in ("longrope", "dynamic") for part in parts):
        return 2**62
    known = [part.get("original_max_position_embeddings") for part in parts]
    known += [getattr(config, "original_max_position_embeddings", None), config.max_position_embeddings]
    return int(next(tokens for tokens in known if tokens))


def text_config_of(config: Any) -> Any:
    """The part of a configuration that describes the decoder of text; the whole where there is no other."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
