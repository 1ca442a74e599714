"""What makes training passes faster without changing them: ``--compile``, and hidden states that are read once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llm_model import StockForecaster
from stocklora.cli.console import UserError
from stocklora.finetune.frozen_states import remembered
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.runtime.distributed import is_sharded


@contextlib.contextmanager
def speedups(model: StockForecaster, settings: TrainLoraSettings) -> Iterator[None]:
    """For training only: ``--compile``, and with ``--method head`` hidden states that are read once.

    Raises:
        UserError: a model that torch.compile cannot compile here.
    """
    with contextlib.ExitStack() as stack:
        if settings.compile:
            stack.enter_context(compiled(model))
        if settings.method == "head":
            stack.enter_context(remembered(model))
        yield


@contextlib.contextmanager
def compiled(model: StockForecaster) -> Iterator[None]:
    """Inside the block training passes run as torch.compile makes them; the weights and their names stay.

    The backbone's repeated blocks are compiled, not the whole: they share their code, which is then compiled once and
    not once a layer. Passes without gradient, of which there are few, run as they are: they would be compiled again.

    Raises:
        UserError: it cannot be compiled on this machine.
    """
    backbone = model.backbone
    blocks = repeated_blocks(backbone) or [backbone]
    for block in blocks:
        _compile_for_training(block)
    try:
        _try_compiled(model)
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _try_compiled(model: StockForecaster) -> None:
    """One small pass, since the compiler is only asked at the first; mode and random numbers stay as they were.

    Raises:
        UserError: it cannot be compiled on this machine.
    """
    backbone = model.backbone
    device, was_training = next(backbone.parameters()).device, backbone.training
    tokens = torch.ones(2, 24, dtype=torch.long, device=device)
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.enable_grad(),
            model._autocast(device.type),
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


def repeated_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks that a transformer is a stack of, if they are all of one class."""
    stack = next((module for module in backbone.modules() if isinstance(module, nn.ModuleList)), nn.ModuleList())
    return list(stack) if len({type(block) for block in stack}) == 1 else []


def _compile_for_training(block: nn.Module) -> None:
    plain = block._call_impl
    trains = any(parameter.requires_grad for parameter in block.parameters())
    compiled_call = torch.compile(plain, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        # The first block's input has no gradient, all others' have: without this each would be compiled for itself.
        if args and torch.is_tensor(args[0]) and args[0].is_floating_point() and trains and not args[0].requires_grad:
            args = (args[0].detach().requires_grad_(), *args[1:])
        return compiled_call(*args, **kwargs)

    block._compiled_call_impl = call  # type: ignore[assignment]
