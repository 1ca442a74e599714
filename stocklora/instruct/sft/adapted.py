"""The adapters of a run: which layers get one from PEFT, and which had better not, found by trying."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from lora import ALL_LINEAR, LoRAError, find_targets
from stocklora.adapters.files import short_names
from stocklora.adapters.peft_check import EXPERT_NAMES, refusal
from stocklora.adapters.probe import kind_of, lost_adapters
from stocklora.adapters.survey import LayerKind, survey_of
from stocklora.base_models.loading import a_few_tokens
from stocklora.cli.console import UserError, listed
from stocklora.instruct.sft.settings import SftSettings

FLAG = "--lora_target_modules"


def with_adapters(model: Any, settings: SftSettings) -> tuple[Any, list[LayerKind]]:
    """``model`` with PEFT's LoRA on the layers that ``settings`` names, and what of the model is adapted.

    Where all linear layers are asked for, those are left out that an adapter would be lost on
    (``stocklora/adapters/probe.py``), and those that PEFT does not adapt in this family.

    Raises:
        UserError: a name that matches no linear layer (PEFT passes over it while another one matches), the head, or a
            layer that cannot be adapted.
    """
    import peft

    targets = settings.targets or ALL_LINEAR
    if targets != ALL_LINEAR and "lm_head" in targets:
        raise UserError(f"{FLAG}: lm_head, the output head, cannot be adapted; leave it out")
    try:
        names = find_targets(model, targets)
    except LoRAError as error:
        raise UserError(f"{FLAG}: {error}") from None
    ids = a_few_tokens(model, 32)
    advice = "train every weight (without --use_lora), or choose another base"
    lost = lost_adapters(model, names, lambda: model(input_ids=ids, use_cache=False).logits)
    lost |= unfit_for_peft(model, [name for name in names if name not in lost], settings)
    kept = [name for name in names if name not in lost]
    if lost and (targets != ALL_LINEAR or not kept):
        kinds = list(dict.fromkeys(kind_of(name) for name in lost))
        raise UserError(
            f"{FLAG}: {listed(kinds, 4)} cannot be adapted: {next(iter(lost.values()))}; "
            + ("name other layers" if targets != ALL_LINEAR else advice)
        )
    survey = survey_of(model, {"target_modules": kept}, lost)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on layers of both orientations, which PEFT then gets right
        return peft.get_peft_model(model, peft_config(settings, short_names(model, kept))), survey


def peft_config(settings: SftSettings, targets: Sequence[str]) -> Any:
    """PEFT's settings for adapters on ``targets``."""
    from peft import LoraConfig, TaskType

    alpha: Any = int(settings.lora_alpha) if settings.lora_alpha.is_integer() else settings.lora_alpha
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora_r,
        lora_alpha=alpha,  # some readers of adapter_config.json want a whole number
        lora_dropout=settings.lora_dropout,
        target_modules=list(targets),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias="none",
    )


def unfit_for_peft(model: Any, names: Sequence[str], settings: SftSettings) -> dict[str, str]:
    """Those of the layers ``names`` that PEFT refuses, or takes for others, each with the reason.

    PEFT turns adapters on ``gate_proj`` and its like of some mixtures of experts into adapters on all experts at once,
    and refuses some layers of Mamba's kind, which fused kernels read without calling them. It is tried on a model
    without weights, all layers at once and, where that fails, those of one name after the other.
    """
    if not names or fault_of_peft(skeleton_of(model, settings), names, settings) is None:
        return {}
    by_end: dict[str, list[str]] = {}
    for name in names:
        by_end.setdefault(name.rpartition(".")[2], []).append(name)
    unfit: dict[str, str] = {}
    for end, some in by_end.items():
        if (reason := fault_of_peft(skeleton_of(model, settings), some, settings)) is not None:
            unfit |= dict.fromkeys(some, "PEFT takes it for all experts" if end in EXPERT_NAMES else reason)
    return unfit


def skeleton_of(model: Any, settings: SftSettings) -> Any:
    """The same layers on the ``meta`` device, unquantized."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config, trust_remote_code=settings.trust_remote_code)
    return skeleton


def fault_of_peft(base: Any, names: Sequence[str], settings: SftSettings) -> str | None:
    """Why PEFT does not put adapters on the layers ``names`` of ``base`` and on no other; None where it does."""
    import peft
    from peft.tuners.lora import LoraLayer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(base, peft_config(settings, short_names(base, names)))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        return f"PEFT refuses it: {refusal(error)}"
    there = {name for name, part in adapted.named_modules() if isinstance(part, LoraLayer)}
    return None if there == {f"base_model.model.{name}" for name in names} else "PEFT would adapt another layer"
