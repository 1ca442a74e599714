"""Whether PEFT makes of an exported adapter what it is, and another way to write it where PEFT would not.

PEFT turns adapters on layers called ``gate_proj``, ``up_proj`` or ``down_proj`` of some mixtures of experts
(DeepSeek, GLM 4.5, Qwen3-Next) into adapters on all experts at once, those on dense and shared layers by the same name
included. The weight of such a layer, named as a parameter, stays where it is.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from lora import LoRAError
from stocklora.adapters.arithmetic import adapted_names
from stocklora.adapters.files import first_line, our_name, read_safetensors
from stocklora.cli.console import listed
from stocklora.runtime.files import write_json

EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")  # by which PEFT tells them
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def check_peft(folder: Path, base: nn.Module) -> nn.Module:
    """``base`` with the adapter in ``folder`` as PEFT loads it, once it is known to be on the layers it was made for.

    PEFT renames layers of some families on the way in, refuses others, and passes over weights whose names it does
    not find; it warns at best.

    Raises:
        LoRAError: PEFT refuses the adapter, or loads it in another form than it has in the folder.
    """
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = peft.PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # PEFT and transformers refuse in many ways
        raise LoRAError(f"PEFT refuses it ({refusal(error)})") from None
    stored, _ = read_safetensors(folder / WEIGHTS)
    weights = {our_name(name): value for name, value in stored.items()}
    named = loaded.named_parameters()
    there = {our_name(re.sub(r"\.default(?=\.|$)", "", name)): value.detach().cpu() for name, value in named}
    there = {name: value for name, value in there.items() if ".lora_" in name or name in weights}
    others = sorted(weights.keys() ^ there.keys())
    others += [name for name in sorted(weights.keys() & there.keys()) if not torch.equal(weights[name], there[name])]
    if others:
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in others))
        raise LoRAError(f"PEFT would put adapters elsewhere than on {listed(layers, 3)}")
    return loaded


def refusal(error: Exception) -> str:
    """What PEFT says when it refuses: its first sentence, without the tag before it and what stands in brackets."""
    return re.sub(r"^\[PEFT:\S+\] | \(.*", "", first_line(error)).partition(". ")[0].rstrip(".")[:160]


def name_by_weight(folder: Path) -> bool:
    """Rewrite ``adapter_config.json`` to name layers that PEFT may take for experts by their weights instead.

    Dropout, which PEFT has not there, goes; it matters for training alone.

    Returns:
        Whether there are such layers.
    """
    stored, _ = read_safetensors(folder / WEIGHTS)
    names = adapted_names({our_name(name): value for name, value in stored.items()})
    moved = [name for name in names if name.rpartition(".")[2] in EXPERT_NAMES]
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["target_modules"] = [name for name in names if name not in moved]
    config["target_parameters"] = [f"{name}.weight" for name in moved]
    write_json(folder / CONFIG, config | {"lora_dropout": 0.0})
    return bool(moved)
