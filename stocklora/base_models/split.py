"""The last layers of a base model apart from those before them: which layers those are, and whether it can be done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llm_model import blocks_of, facts_of, skipped
from stocklora.base_models.loading import a_few_tokens, hidden_states
from stocklora.cli.console import UserError

FLAG = "--adapt_layers"


def last_layers(backbone: Any, count: int) -> list[nn.Module]:
    """The last ``count`` layers of a transformer's stack.

    Raises:
        UserError: it has fewer, or is no stack of layers that can be told apart.
    """
    blocks, there = blocks_of(backbone), facts_of(backbone.config).layers
    if count > there:
        raise UserError(f"{FLAG} {count}: {there} layers of the base model are used; give at most {there}")
    if len({id(block) for block in blocks}) != there:
        raise UserError(
            f"{FLAG}: {type(backbone).__name__} is no stack of {there} layers of their own; leave the flag out, or "
            f"name layers by --target_modules"
        )
    return blocks[there - count :]


def inside_last_layers(backbone: Any, names: Sequence[str], count: int) -> list[str]:
    """Of these dotted names of modules those inside the last ``count`` layers.

    Raises:
        UserError: none of them is, or as ``last_layers``.
    """
    chosen = {id(block) for block in last_layers(backbone, count)}
    places = tuple(f"{name}." for name, module in backbone.named_modules() if id(module) in chosen)
    kept = [name for name in names if name.startswith(places)]
    if not kept:
        raise UserError(f"--target_modules names no layer inside the last {count} ({FLAG}), such as {names[0]}")
    return kept


@torch.no_grad()
def split_form(backbone: Any, frozen: int) -> int | None:
    """Try a model in two parts, the first ``frozen`` layers and the others, against the whole.

    Returns:
        How many outputs a layer's tuple has; None where it returns a bare tensor.

    Raises:
        UserError: the parts are not the whole: the layers hand on more than one state of (batch, tokens, hidden).
    """
    blocks, ids = last_layers(backbone, facts_of(backbone.config).layers), a_few_tokens(backbone, 32)
    returned: list[Any] = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: returned.append(output)) for block in blocks]
    was_training = backbone.training
    try:
        whole = hidden_states(backbone.eval(), ids)
        forms = {len(output) if isinstance(output, tuple) else None for output in returned}
        if len(forms) != 1:
            raise ValueError("its layers return different things")
        (form,) = forms
        with skipped(blocks[frozen:], form) as entered:
            hidden_states(backbone, ids)
        if entered[0].shape[:2] != ids.shape:
            raise ValueError(f"what passes between its layers is {tuple(entered[0].shape)}")
        with skipped(blocks[:frozen], form, entered[0]):
            parts = hidden_states(backbone, ids)
        if not (parts - whole).norm() <= 1e-5 * whole.norm():
            raise ValueError("its last layers need more of the first than their output")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        kind = type(backbone).__name__
        raise UserError(f"{FLAG}: {kind} cannot be read in two parts ({error}); leave the flag out") from None
    finally:
        for hook in hooks:
            hook.remove()
        backbone.train(was_training)
    return form
