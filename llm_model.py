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

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
            self.linear.bias.copy_(self._outputs_for(table.float()).flatten())

    def _outputs_for(self, table: Tensor) -> Tensor:
        """The linear outputs that give ``table`` back: the inverse of ``_quantiles``."""
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
    """

    def __init__(self, backbone: nn.Module, table: Tensor, location: Tensor | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = QuantileHead(hidden_size_of(backbone.config), table)
        self.register_buffer("location", torch.zeros(len(table)) if location is None else location.float())
        self.location: Tensor

    def forward(self, input_ids: Tensor, origin_tokens: Tensor, scale: Tensor) -> Tensor:
        """Quantiles of the log return at every origin.

        No attention mask: rows are padded on the right only, and what stands to the right of a token is
        invisible to it. (A mask would also cost the fast causal attention kernels.)

        Args:
            input_ids: (batch, tokens) int64, padded on the right with any id.
            origin_tokens: (batch, targets) position of each origin's last token, padded with any position.
            scale: (batch, targets, horizon) size of the return in each row's own units.

        Returns:
            (batch, targets, horizon, levels) float32.
        """
        scaled = self.head(self.hidden_at(input_ids, origin_tokens)) * scale[..., None].float()
        return self.location[:, None] + scaled

    def hidden_at(self, input_ids: Tensor, origin_tokens: Tensor) -> Tensor:
        """(batch, targets, hidden) hidden states at the origins' last tokens."""
        hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state  # (batch, tokens, hidden)
        return hidden.gather(1, origin_tokens[..., None].expand(-1, -1, hidden.shape[-1]))


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


@dataclass(frozen=True)
class BackboneFacts:
    """What the rest of the program needs to know of a base model before any weight is read."""

    hidden_size: int
    layers: int
    context_tokens: int


def backbone_config(model_path: Path, layers: int | None = None, trust_remote_code: bool = False) -> Any:
    """The base model's configuration, cut to its first ``layers`` layers if given.

    Raises:
        ValueError: more layers than there are.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    # The base is frozen: its own dropout would only add noise to what the adapters see.
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"the base model has {config.num_hidden_layers} layers; {layers} cannot be used")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def facts_of(config: Any) -> BackboneFacts:
    return BackboneFacts(
        hidden_size=hidden_size_of(config),
        layers=int(config.num_hidden_layers),
        context_tokens=int(getattr(config, "max_position_embeddings", 0) or 2**20),
    )


def hidden_size_of(config: Any) -> int:
    return int(config.hidden_size)


def load_backbone(
    model_path: Path, dtype: torch.dtype, layers: int | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The base model without its vocabulary head, frozen, without dropout of its own.

    Args:
        layers: use only the first so many layers.
    """
    from transformers import AutoModel

    config = backbone_config(model_path, layers, trust_remote_code)
    backbone = AutoModel.from_pretrained(model_path, config=config, dtype=dtype, trust_remote_code=trust_remote_code)
    return backbone.requires_grad_(False)


def is_causal(backbone: nn.Module, tokens: int = 16) -> bool:
    """Whether earlier hidden states ignore later tokens; an encoder such as BERT would see the future."""
    config: Any = backbone.config
    device = next(backbone.parameters()).device
    ids = torch.arange(1, tokens + 1, device=device)[None] % int(config.vocab_size)
    other = ids.clone()
    other[0, -1] = 0
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        first, second = (backbone(input_ids=row).last_hidden_state[0, :-1].float() for row in (ids, other))
    backbone.train(was_training)
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3)


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        # Without these instructions bfloat16 on a CPU is emulated, and slower than float32.
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.float32
