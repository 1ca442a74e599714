"""The rows of ``python bench/gpu.py --ladder``: levers on a training step of packed LoRA, each with its own row.

A row is what was kept so far and one change; it is kept where it is faster. In each, before anything is timed, the
gradients of one step are compared with those of the plain row, from the same weights: a lever may round otherwise, but
must compute the same. What fails (a kernel that is not there, a full memory) is said in its row.

A lever that users have is switched in the library; one that is only tried here is written here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import llm_model
from lora import lora_layers, lora_parameters
from stocklora.adapters import kernel
from stocklora.adapters.kernel import FrozenLinears, share_inputs
from stocklora.adapters.layer import AdapterLayer
from stocklora.finetune.optimization import Optimization, accumulate_gradients, compiled

KERNELS = 20  # of a profile
FASTER = 0.99  # of the best step so far: what is kept


@dataclasses.dataclass(frozen=True)
class Levers:
    """How a step computes.

    Attributes:
        row_parts: of the sums over all tokens in the adapters' gradients.
        shares: whether queries, keys and values, and gate and up, are one fused step.
        one_product: whether an update is in the same product as the frozen weight, see ``OneProduct``.
        attention: "" as torch chooses; "cudnn", "flash"; "FA3", "FA4" where those packages are installed.
        asks_for_packing: whether each pass asks the card if positions begin anew within a row; here they never do.
        one_length: whether all batches are padded on to the longest sequence, instead of to a multiple of 64.
        fusion: by torch.compile, for any length or for the one length: "" nothing; "blocks": ``--compile``, where each
            layer makes its products by itself, whatever ``shares`` and ``one_product`` say; "around products": that
            with adapted layers left out, so that theirs is the fused step; "pieces": norms, rotary positions, SwiGLU.
    """

    row_parts: int = 1
    shares: bool = False
    one_product: bool = False
    attention: str = ""
    asks_for_packing: bool = True
    one_length: bool = False
    fusion: str = ""


# In the order of their likely worth, those that have to be compiled last.
LADDER: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-again": {},  # what differs here is noise
    "16-row-parts": {"row_parts": 16},
    "32-row-parts": {"row_parts": 32},
    "64-row-parts": {"row_parts": 64},
    "shared-inputs": {"shares": True},
    "one-product": {"one_product": True},
    "attention-cudnn": {"attention": "cudnn"},
    "attention-flash": {"attention": "flash"},
    "attention-FA3": {"attention": "FA3"},
    "attention-FA4": {"attention": "FA4"},
    "not-asking": {"asks_for_packing": False},
    "one-length": {"one_length": True},
    "compiled-around-products": {"fusion": "around products", "one_length": False},
    "compiled-around-products-static": {"fusion": "around products", "one_length": True},
    "compiled-blocks": {"fusion": "blocks", "one_length": False},
    "compiled-blocks-static": {"fusion": "blocks", "one_length": True},
    "compiled-pieces": {"fusion": "pieces"},
}


# ------------------------------------------------------------------------------------------------- the levers


@contextlib.contextmanager
def pulled(levers: Levers, model: Any, longest: int) -> Iterator[None]:
    """Inside, ``model`` computes as ``levers`` say; ``longest``: tokens of the longest sequence."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(kernel.ROW_PARTS, {device.type: levers.row_parts}))
        if not levers.shares:
            for layer in lora_layers(model).values():
                stack.enter_context(patch.object(layer, "shared", None))
        if levers.one_product:
            stack.enter_context(patch.object(kernel, "FrozenLinears", OneProduct))
        if levers.attention.startswith("FA"):
            from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl  # not in 2.10

            activate_flash_attention_impl(levers.attention)
            stack.callback(restore_flash_attention_impl)
        if levers.attention:
            backend = SDPBackend.CUDNN_ATTENTION if levers.attention == "cudnn" else SDPBackend.FLASH_ATTENTION
            stack.enter_context(sdpa_kernel(backend))
        if not levers.asks_for_packing:
            stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None))
        if levers.one_length:  # in steps of 8, which a matrix unit reads at once
            stack.enter_context(patch.object(llm_model, "TOKENS_STEP", -(-longest // 8) * 8))
        if levers.fusion == "pieces":
            stack.enter_context(compiled_pieces(model.backbone, dynamic=not levers.one_length))
        elif levers.fusion:
            if levers.fusion == "around products":
                left_out = torch.compiler.disable(AdapterLayer.forward)
                stack.enter_context(patch.object(AdapterLayer, "forward", left_out))
            stack.enter_context(compiled(model, dynamic=not levers.one_length))
        yield


class OneProduct(FrozenLinears):
    """``y = [x z] [W sB]'`` with ``z = x A'``: an update is never added to a wide output that was written before.

    Backward, ``g [W sB]`` is ``[g W, s g B]``: what x and z get, with g read once. Layers that share x share ``[x z]``,
    in which each has its own columns of z.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], dtype: torch.dtype, *tensors: Any) -> Any:
        weights, biases, As, Bs = kernel._in_four(tensors)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (n, in)
        z = rows @ kernel._stacked(As, dtype).t()  # (n, ranks)
        wide = torch.cat([rows, z], dim=1)  # (n, in + ranks)
        outputs = []
        for weight, bias, wider in zip(weights, biases, _widened(weights, As, Bs, scalings, dtype), strict=True):
            y = rows.new_empty(*x.shape[:-1], weight.shape[0])
            flat = y.view(-1, y.shape[-1])
            if bias is None:
                torch.mm(wide, wider.t(), out=flat)
            else:
                torch.addmm(bias.to(dtype), wide, wider.t(), out=flat)
            outputs.append(y)
        ctx.save_for_backward(x, z, *weights, *As, *Bs)
        ctx.scalings = scalings
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        count = len(ctx.scalings)
        x, z, *saved = ctx.saved_tensors
        weights, As, Bs = saved[:count], saved[count : 2 * count], saved[2 * count :]
        dtype, needs = grads[0].dtype, ctx.needs_input_grad[3:]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        wide = None  # (n, in + ranks)
        for grad, wider in zip(flat, _widened(weights, As, Bs, ctx.scalings, dtype), strict=True):
            wide = grad @ wider if wide is None else wide.addmm_(grad, wider)
        gx, gz = wide.split([rows.shape[1], z.shape[1]], dim=1)
        results: list[Tensor | None] = [None] * (4 * count)
        gA = kernel._split(kernel.sum_over_rows(gz.t(), rows), As)
        for index, own in enumerate(z.split([len(A) for A in As], dim=1)):
            results[2 * count + index] = gA[index].to(As[index].dtype)
            gB = kernel.sum_over_rows(own.t(), flat[index]).t()
            results[3 * count + index] = gB.to(Bs[index].dtype) * ctx.scalings[index]
            if needs[count + index]:
                results[count + index] = flat[index].sum(0, dtype=torch.float32)
        if ctx.needs_input_grad[0]:
            gx = torch.addmm(gx, gz, kernel._stacked(As, dtype)).view(x.shape).to(x.dtype)
        return (gx if ctx.needs_input_grad[0] else None, None, None, *results)


def _widened(weights: Any, As: Any, Bs: Any, scalings: Sequence[float], dtype: torch.dtype) -> list[Tensor]:
    """Each layer's ``[W sB]``, (out, in + ranks), zero where z's columns are another layer's."""
    ranks = [len(A) for A in As]
    found = []
    for index, (weight, B, scaling) in enumerate(zip(weights, Bs, scalings, strict=True)):
        before, after = sum(ranks[:index]), sum(ranks[index + 1 :])
        update = torch.nn.functional.pad(B.to(dtype) * scaling, (before, after))
        found.append(torch.cat([weight.to(dtype), update], dim=1))
    return found


@contextlib.contextmanager
def compiled_pieces(backbone: Any, dynamic: bool) -> Iterator[None]:
    """What stands between the products of a Llama-like model as torch.compile makes it; the products stay our own."""

    gated = torch.compile(lambda act, gate, up: act(gate) * up, dynamic=dynamic)

    def mlp(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))

    kinds = {type(module) for module in backbone.modules()}
    family = sys.modules[type(llm_model.blocks_of(backbone)[0]).__module__]
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if kind.__name__.endswith("RMSNorm"):
                stack.enter_context(patch.object(kind, "forward", torch.compile(kind.forward, dynamic=dynamic)))
            elif kind.__name__.endswith("MLP"):
                stack.enter_context(patch.object(kind, "forward", mlp))
        rotated = torch.compile(family.apply_rotary_pos_emb, dynamic=dynamic)
        stack.enter_context(patch.object(family, "apply_rotary_pos_emb", rotated))
        yield


# ----------------------------------------------------------------------------------------------------- the run


class Steps:
    """Training steps as ``train_lora.py`` takes them, always the same ones from the same weights.

    Args:
        settings: of ``TrainLoraSettings``. prices: ticker -> table of days.
    """

    def __init__(self, settings: Any, prices: Any, device: torch.device) -> None:
        from stocklora.base_models.loading import BaseModel
        from stocklora.finetune.fit import prepare_data, prepare_run
        from stocklora.finetune.prepare import split_prices
        from stocklora.runtime.distributed import Alone

        base = BaseModel(settings.model_path, False)
        run = prepare_run(prepare_data(split_prices(prices, settings), settings, base), settings, base, Alone(device))
        self.device, self.model = device, run.forecaster.model
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():  # where B and the head are zero, so are most gradients
            for parameter in (*lora_parameters(self.model.backbone), self.model.head.linear.weight):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
        data, examples = run.prepared.data, run.prepared.examples["train"]
        self.optimization = Optimization(self.model, examples, data.levels, settings, run.accelerator)
        self.start = self.optimization.trained()
        self.tokens = [len(example.encoded.input_ids) for example in examples]
        self.targets = [len(example.scale) for example in examples]
        size = self.optimization.per_step
        order = torch.randperm(len(examples), generator=draw).numpy()
        self.groups = [order[at : at + size] for at in range(0, len(order) - size + 1, size)]

    def take(self, index: int) -> int:
        """One step; returns the tokens that it learned from, padding left out."""
        group = self.groups[index % len(self.groups)]
        self.optimization.step(group, sum(self.targets[one] for one in group))
        return sum(self.tokens[one] for one in group)

    def gradients(self) -> Tensor:
        """Of the first step from the starting weights, in one vector on the CPU."""
        self.optimization.load_trained(self.start)
        self.optimization.optimizer.zero_grad(set_to_none=True)  # those of a step that broke off
        group, optimization = self.groups[0], self.optimization
        self.model.train()
        accumulate_gradients(
            self.model, optimization.micro_batches(group), optimization.levels, optimization.accelerator,
            sum(self.targets[one] for one in group),
        )  # fmt: skip
        found = [p.grad.detach().float().flatten().cpu() for p in self.model.parameters() if p.grad is not None]
        optimization.optimizer.zero_grad(set_to_none=True)
        return torch.cat(found)

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def climb(
    steps: Steps, names: Sequence[str], count: int, faster: float, out_of_time: Callable[[float], bool],
    finished: Callable[[list[dict[str, Any]]], None],
) -> None:  # fmt: skip
    """Measure row after row.

    Args:
        count: timed steps of a row. faster: a row is kept whose step is below so much of the best one so far.
        out_of_time: whether a row that takes so many seconds comes too late.
        finished: called with all rows so far after each.
    """
    rows: list[dict[str, Any]] = []
    kept, best, plain, longest_s = Levers(), None, None, 0.0
    for name in names:
        began = time.perf_counter()
        levers = dataclasses.replace(kept, **LADDER[name])
        row: dict[str, Any] = {"name": name, "levers": dataclasses.asdict(levers)}
        rows.append(row)
        if out_of_time(longest_s):
            row["error"] = "not measured: no time left"
        else:
            try:
                gradients = measure(steps, levers, count, row)
            except Exception as error:  # a kernel that is not there, a full memory: the others are worth having
                row["error"] = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                share_inputs(steps.model.backbone, AdapterLayer)  # a pass that broke off left outputs behind
            else:
                plain = gradients if plain is None else plain
                row["differs"] = float((gradients - plain).norm() / plain.norm())
                row["of_best_before"] = row["step_s"] / best["step_s"] if best else 1.0
                row["kept"] = row["of_best_before"] < faster or best is None
                # The first row's profile stays, and that of the best.
                if row["kept"]:
                    if best is not None and best is not rows[0]:
                        best.pop("profile")
                    kept, best = levers, row
                else:
                    row.pop("profile")
        if levers.fusion:
            torch.compiler.reset()
        if steps.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        row["row_s"] = time.perf_counter() - began
        longest_s = max(longest_s, row["row_s"])
        finished(rows)


def measure(steps: Steps, levers: Levers, count: int, row: dict[str, Any]) -> Tensor:
    """Fill in a row; returns the gradients of its first step."""
    from stocklora.runtime.machine import peak_memory_mb

    if steps.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with pulled(levers, steps.model, max(steps.tokens)):
        gradients = steps.gradients()
        for index in range(2):
            steps.take(index)
        steps.finish()
        seconds, tokens = [], 0
        for index in range(count):
            began = time.perf_counter()
            tokens += steps.take(index)
            steps.finish()
            seconds.append(time.perf_counter() - began)
        row |= {"step_s": statistics.median(seconds), "seconds": seconds, "tokens_per_s": tokens / sum(seconds)}
        row["peak_mb"] = peak_memory_mb(steps.device.type)
        row["profile"] = slowest_kernels(steps)
    return gradients


def slowest_kernels(steps: Steps) -> list[dict[str, Any]]:
    """Of one step: name, calls, milliseconds, share of all."""
    from torch.profiler import ProfilerActivity, profile

    on_card = steps.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as seen:
        steps.take(0)
        steps.finish()
    own = "self_device_time_total" if on_card else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events) or 1.0
    return [
        {"kernel": event.key[:120], "calls": event.count, "ms": getattr(event, own) / 1e3,
         "share": getattr(event, own) / total}
        for event in events[:KERNELS]
    ]  # fmt: skip


def ladder(
    settings: Mapping[str, Any], device: torch.device, names: Sequence[str], tiny: bool,
    out_of_time: Callable[[float], bool], finished: Callable[[list[dict[str, Any]], int], None],
) -> None:  # fmt: skip
    """Load the model once and measure the rows ``names``, which begin with ``plain``.

    Args:
        settings: of ``train_lora.py``.
        finished: called after each row with all rows so far and the longest sequence's tokens.
    """
    from stocklora.cli.settings import restored
    from stocklora.finetune.settings import TrainLoraSettings
    from stocklora.prices.tables import read_prices

    # So small a rate that a thousand steps leave random weights as good as they were.
    changes = {"learning_rate": 1e-7, "head_learning_rate": 1e-7}
    if tiny:
        changes |= {"batch_size": 2, "targets_per_sequence": 10, "dtype": "float32"}
    chosen = restored(dict(settings) | changes, TrainLoraSettings)
    Path(chosen.save_dir).mkdir(parents=True, exist_ok=True)
    steps = Steps(chosen, read_prices(chosen.data), device)
    longest = max(steps.tokens)
    # The dry run is about the script, and about levers on top of each other: times mean nothing there, and a compiler
    # for two small layers would take longer than all else.
    count, faster = (1, math.inf) if tiny else (8, FASTER)
    with patch.object(torch, "compile", lambda call, **_: call) if tiny else contextlib.nullcontext():
        climb(steps, names, count, faster, out_of_time, lambda rows: finished(rows, longest))
