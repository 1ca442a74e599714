"""Tools over saved adapters: their weighted average, a smaller rank, a larger rank.

An adapter here is ``(state, config)``: what ``lora.lora_state_dict`` gives and the ``AdapterConfig`` it was made with.
Nothing here needs the base model, and no argument is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stocklora.adapters.layer import AdapterConfig
from stocklora.cli.console import UserError

State = Mapping[str, Tensor]
Adapter = tuple[dict[str, Tensor], AdapterConfig]


def average_weights(weights: Sequence[float]) -> list[float]:
    """Shares that sum to 1.

    Raises:
        UserError: a weight is negative or not finite, or all are zero.
    """
    if not weights or not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        shown = ", ".join(f"{weight:g}" for weight in weights) or "none"
        raise UserError(f"weights of an average must be at least 0 and not all 0, not {shown}; give e.g. 0.7 and 0.3")
    return [weight / sum(weights) for weight in weights]


def average_adapters(adapters: Sequence[tuple[State, AdapterConfig, float]], rank: int | None = None) -> Adapter:
    """One adapter whose update is the weighted average of the updates ``(alpha / rank) B A`` of several.

    Averaging the factors would be wrong: a mean of A times a mean of B is no mean of B A. Here the factors stand side
    by side, ``[w1 s1 B1, w2 s2 B2] [A1; A2]``, which is exact and of a rank that is the sum of all ranks; ``rank``
    then cuts it to the nearest adapter of that rank. A layer that some do not adapt counts as unchanged there.

    Args:
        adapters: (state, config, weight) of each; weights are divided by their sum.
        rank: of the result; by default the sum, at which nothing is lost.

    Returns:
        A plain LoRA adapter with a scaling of 1; trained biases are averaged too.

    Raises:
        UserError: a weight is negative, an adapter is DoRA's, or they do not belong to the same base model.
    """
    shares = average_weights([weight for _, _, weight in adapters])
    if any(config.dora for _, config, _ in adapters):
        raise UserError("a DoRA adapter is no sum of low rank and cannot be averaged; merge each into the base instead")
    if len({config.train_bias for _, config, _ in adapters}) > 1:
        raise UserError("adapters that train biases can be averaged only with those that train the same ones")
    parts = [without_pissa(state, config) for state, config, _ in adapters]
    names = list(dict.fromkeys(name for state, _ in parts for name in adapted_names(state)))
    average: dict[str, Tensor] = {}
    for name in names:
        out_features, in_features = _common_shape([state for state, _ in parts], name)
        left, right = [], []
        for (state, config), share in zip(parts, shares, strict=True):
            zeros = torch.zeros(config.rank, in_features), torch.zeros(out_features, config.rank)
            right.append(state.get(f"{name}.lora_A", zeros[0]).float())
            left.append(state.get(f"{name}.lora_B", zeros[1]).float() * (share * config.scaling))
        average[f"{name}.lora_A"], average[f"{name}.lora_B"] = torch.cat(right), torch.cat(left, dim=1)
    biases = [{key for key in state if key.rpartition(".")[2] == "bias"} for state, _ in parts]
    if any(keys != biases[0] for keys in biases):
        raise UserError("the adapters train biases of different layers and cannot be averaged")
    for key in sorted(biases[0]):
        shared = [share * state[key].float() for (state, _), share in zip(parts, shares, strict=True)]
        average[key] = torch.stack(shared).sum(0)
    total = sum(config.rank for _, config in parts)
    first = adapters[0][1]
    same = all(config.target_modules == first.target_modules for _, config, _ in adapters)
    targets = first.target_modules if same else tuple(names)
    config = AdapterConfig(total, float(total), first.dropout, targets, train_bias=first.train_bias)
    return (average, config) if rank is None else truncate_rank(average, config, rank)


def _common_shape(states: Sequence[State], name: str) -> tuple[int, int]:
    """(out, in) of a layer in all states that have it."""
    shapes = {
        (len(state[f"{name}.lora_B"]), state[f"{name}.lora_A"].shape[1])
        for state in states
        if f"{name}.lora_A" in state and f"{name}.lora_B" in state
    }
    if len(shapes) != 1:
        found = " and ".join(f"{out_features} x {in_features}" for out_features, in_features in sorted(shapes))
        raise UserError(f"{name} is {found}: the adapters belong to different base models and cannot be averaged")
    return shapes.pop()


def truncate_rank(state: State, config: AdapterConfig, rank: int) -> Adapter:
    """The nearest adapter of a smaller rank: each update's leading singular vectors (Eckart and Young 1936).

    The product of the factors is never formed: the singular values of ``B A`` are those of the small ``Rb Ra'``, where
    ``B = Qb Rb`` and ``A' = Qa Ra``.

    Raises:
        UserError: the rank is not between 1 and the adapter's.
    """
    state, config = without_pissa(state, config)
    if not 1 <= rank <= config.rank:
        raise UserError(f"the adapter has rank {config.rank}; give a rank between 1 and that, not {rank}")
    smaller = dict(state)
    result = replace(config, rank=rank, alpha=rescaled_alpha(config, rank))
    for name in adapted_names(state):
        A, B = state[f"{name}.lora_A"].double(), state[f"{name}.lora_B"].double()
        Qb, Rb = torch.linalg.qr(B)  # (out, k), (k, old rank)
        Qa, Ra = torch.linalg.qr(A.t())  # (in, l), (l, old rank)
        U, S, V = torch.linalg.svd(Rb @ Ra.t(), full_matrices=False)
        root = S[:rank].sqrt()
        # A layer narrower than the rank has fewer singular values: the rest stays zero.
        new_A, new_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(len(B), rank)
        new_A[: len(root)] = root[:, None] * (V[:rank] @ Qa.t())
        new_B[:, : len(root)] = (Qb @ U[:, :rank]) * root
        smaller[f"{name}.lora_A"], smaller[f"{name}.lora_B"] = new_A.float(), new_B.float()
    return smaller, result


def expand_rank(state: State, config: AdapterConfig, new_rank: int, seed: int = 0) -> Adapter:
    """The same adapter at a larger rank, to go on training with more room: the same function at step 0.

    New columns of B are zero, new rows of A random as in a fresh adapter. Alpha stays, so the scaling ``alpha / rank``
    becomes smaller, and B is multiplied by what it loses: a power of two, hence exact, where the rank is doubled.

    Raises:
        UserError: the new rank is not larger.
    """
    if new_rank <= config.rank:
        raise UserError(f"the adapter has rank {config.rank}; give a larger one to expand it to, not {new_rank}")
    larger, result = dict(state), replace(config, rank=new_rank)
    generator = torch.Generator().manual_seed(seed)
    for name in adapted_names(state):
        width = state[f"{name}.lora_A"].shape[1]
        bound = 1 / math.sqrt(width)  # Kaiming-uniform with a = sqrt(5), as lora.LoRALayer begins
        new_rows = {"lora": torch.empty(new_rank - config.rank, width).uniform_(-bound, bound, generator=generator)}
        if config.init == "pissa":  # its frozen start stays what it is
            new_rows["pissa"] = torch.zeros(new_rank - config.rank, width)
        for kind, rows in new_rows.items():
            A, B = state[f"{name}.{kind}_A"], state[f"{name}.{kind}_B"]
            larger[f"{name}.{kind}_A"] = torch.cat([A, rows.to(A.dtype)])
            larger[f"{name}.{kind}_B"] = torch.cat(
                [B * (config.scaling / result.scaling), B.new_zeros(len(B), len(rows))], dim=1
            )
    return larger, result


def adapted_names(state: Mapping[str, Any]) -> list[str]:
    """The layers that a state holds an adapter for."""
    matches = (re.fullmatch(r"(.+)\.(lora|pissa)_\w+", key) for key in state)
    return list(dict.fromkeys(match[1] for match in matches if match))


def without_pissa(state: Mapping[str, Tensor], config: AdapterConfig) -> tuple[dict[str, Tensor], AdapterConfig]:
    """The same adapter as plain LoRA of twice the rank: ``B A - B0 A0`` is ``[B, -B0]`` times ``A`` above ``A0``."""
    if config.init != "pissa":
        return dict(state), config
    plain = {key: tensor for key, tensor in state.items() if not re.search(r"\.pissa_[AB]$", key)}
    for name in adapted_names(state):
        plain[f"{name}.lora_A"] = torch.cat([state[f"{name}.lora_A"], state[f"{name}.pissa_A"]])
        plain[f"{name}.lora_B"] = torch.cat([state[f"{name}.lora_B"], -state[f"{name}.pissa_B"]], dim=1)
    rank = 2 * config.rank
    return plain, replace(config, rank=rank, alpha=rescaled_alpha(config, rank), init="kaiming")


def rescaled_alpha(config: AdapterConfig, rank: int) -> float:
    """The alpha that keeps ``config``'s scaling at another rank."""
    return config.scaling * (math.sqrt(rank) if config.rslora else rank)
