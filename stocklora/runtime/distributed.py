"""The processes that ``accelerate launch`` started, and what they settle together.

All of them make the same calls in the same order; the main one alone prints and writes. Parameters that FSDP2 cut
into shards are made whole here where somebody has to read or write them.

torch is imported where it is used: a backtest of baselines needs none, alone or in several processes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from stocklora.cli.console import EXIT_USER_ERROR, UserError, warn

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")


class Alone:
    """One process by itself, in the shape of ``accelerate.Accelerator``, even where several were launched.

    For work that the main process does while the others wait, and where none were launched.

    Args:
        device: that trains; None where nothing does.
    """

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def prepare(self, *items: Any) -> tuple[Any, ...]:
        return items

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Tensor:
        import torch

        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def join_processes(device: torch.device) -> Any:
    """The ``Accelerator`` of this run; the processes beside the main one fall silent on stdout.

    Raises:
        UserError: an FSDP that cannot be used.
    """
    from accelerate import Accelerator

    environment = os.environ
    if environment.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in environment and not launched():
        warn(
            "accelerate launch --cpu starts one process, whatever --num_processes says; for several on CPUs: "
            "accelerate launch --multi_gpu --num_processes 2 train_lora.py --device cpu ..."
        )
    # accelerate's way to read the weights once for all processes stumbles over buffers, such as the head's.
    environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(cpu=device.type == "cpu")
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    elif environment.get("ACCELERATE_USE_FSDP") == "true" and not shards_models(accelerator):
        warn("accelerate shards a model over graphics cards alone; here each process holds all of it")
    if shards_models(accelerator) and not accelerator.is_fsdp2:
        raise UserError("FSDP's first version is not supported; give accelerate launch --fsdp_version 2")
    return accelerator


def asked_for_cpu() -> bool:
    """Whether ``accelerate launch`` was told to leave graphics cards alone."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_processes() -> Any:
    """The processes that were launched together, for work that shares no gradients; else this one alone."""
    if not launched():
        return Alone()
    from accelerate import PartialState

    return PartialState(cpu=asked_for_cpu())


def wait_for_everyone() -> None:
    """A barrier where several processes were launched; nothing otherwise."""
    if launched():
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def summed(accelerator: Any, *values: float) -> list[float]:
    """Each value's sum over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    import torch

    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total.tolist()]


def gathered(accelerator: Any, item: T) -> list[T]:
    """Every process's item, in the processes' order."""
    if accelerator.num_processes == 1:
        return [item]
    import torch

    found: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(found, item)
    return found


def from_main(accelerator: Any, make: Callable[[], T]) -> T:
    """What the main process made, on all; the others' disks may not even have the file it read.

    Raises:
        UserError: the main process met it; the others then leave without a word.
    """
    if accelerator.num_processes == 1:
        return make()
    import torch

    box: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        if accelerator.is_main_process:
            raise box[1]
        raise SystemExit(EXIT_USER_ERROR)
    return box[0]  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ shards of FSDP2


def shards_models(accelerator: Any) -> bool:
    """Whether ``prepared`` will cut a model into shards (FSDP): it waits on the CPU, since no device may hold it."""
    return str(getattr(accelerator, "distributed_type", "")).endswith("FSDP")


def prepared(accelerator: Any, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """``accelerator.prepare``, with FSDP told to cut the model layer by layer."""
    # Where accelerate looks for the classes of layers; transformers names them nowhere else.
    model._no_split_modules = getattr(model.backbone, "_no_split_modules", None)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if shards_models(accelerator):
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "hidden_at")
    return wrapped, optimizer


def is_sharded(model: nn.Module) -> bool:
    return any(_is_shard(parameter) for parameter in model.parameters())


def _is_shard(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, without importing it


@contextlib.contextmanager
def whole_parameters(model: nn.Module, *, write: bool = False) -> Iterator[None]:
    """Trainable parameters made whole inside, on all processes, so that a state can be read or loaded.

    Frozen shards stay as they are: the base model is what does not fit one device. Nothing inside may call
    ``load_state_dict``, after which FSDP looks for its shards: they are away.

    Args:
        write: put what the block changed back into the shards.
    """
    import torch
    from torch import nn

    for module in model.modules():
        if callable(reshard := getattr(module, "reshard", None)):
            reshard()  # a forward pass may have left a part whole
    shards = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and _is_shard(parameter)
    ]
    try:
        for module, name, parameter in shards:
            setattr(module, name, nn.Parameter(parameter.full_tensor()))  # type: ignore[attr-defined]
        yield
    finally:
        for module, name, parameter in shards:
            whole = getattr(module, name)
            setattr(module, name, parameter)
            if write:
                with torch.no_grad():
                    parameter.copy_(shard_like(whole.detach(), parameter))


def shard_like(whole: Tensor, shard: Any) -> Tensor:
    """This process's part of a tensor that all of them hold, cut as ``shard`` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """``state_dict`` with shards made whole."""
    content = optimizer.state_dict()
    content["state"] = {
        index: {name: value.full_tensor().cpu() if _is_shard(value) else value for name, value in moments.items()}
        for index, moments in content["state"].items()
    }
    return content  # type: ignore[no-any-return]


def load_optimizer_state(optimizer: Any, content: dict[str, Any]) -> None:
    """The inverse of ``whole_optimizer_state``."""
    from torch import Tensor

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: shard_like(value, parameters[index])
            if _is_shard(parameters[index]) and isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in of_one.items()
        }
        for index, of_one in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": moments})
