"""The assistant's adapters on bases of every kind: on sound layers alone, and what is left out is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_family

from stocklora.base_models.loading import load_causal_model
from stocklora.cli.console import UserError
from stocklora.instruct.sft.adapted import with_adapters
from stocklora.instruct.sft.settings import SftSettings


def adapted(base: Path, quantization: str = "none", **changes: Any) -> tuple[set[str], dict[str, str], Any]:
    """The ends of the names of adapted layers, those left out with the reason, and the model."""
    settings = SftSettings(model_path=base, use_lora=True, **changes)
    device = torch.device("cpu")
    loaded = load_causal_model(base, dtype=torch.float32, device=device, quantization=quantization)
    model, survey = with_adapters(loaded, settings)
    there = {name for name, module in model.named_modules() if len(getattr(module, "lora_A", ()))}
    assert len(there) == sum(kind.layers for kind in survey if kind.adapted)
    ends = {name.rpartition(".")[2] for name in there}
    return ends, {kind.name.rpartition("*.")[2]: kind.note for kind in survey if kind.note}, model


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_an_ordinary_base_is_adapted_by_short_names(tiny_model: Path) -> None:
    ends, left_out, model = adapted(tiny_model)
    assert ends == ATTENTION | {"gate_proj", "up_proj", "down_proj"}
    assert left_out.pop("lm_head", "output head") == "output head"
    assert set(left_out.values()) <= {"no linear layer"}
    assert set(model.peft_config["default"].target_modules) == ends


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_layers_that_an_adapter_would_be_lost_on_are_left_out(tmp_path: Path, quantization: str) -> None:
    base = make_family("Mamba", tmp_path / "m")
    ends, left_out, _ = adapted(base, quantization)
    assert ends == {"in_proj", "x_proj"}
    assert "the model never calls it" in left_out["mixer.dt_proj"]
    assert left_out["mixer.out_proj"] == "PEFT refuses it: Module 'out_proj' is incompatible with Mamba-based models"
    for name in ("dt_proj", "out_proj"):
        with pytest.raises(
            UserError, match=rf"--lora_target_modules: .*mixer.{name} cannot be adapted: .*other layers"
        ):
            adapted(base, quantization, lora_target_modules=["in_proj", name])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_peft_takes_for_experts_is_left_out(tmp_path: Path, dropout: float) -> None:
    base = make_family("GLM 4.5", tmp_path / "m")
    ends, left_out, model = adapted(base, lora_dropout=dropout)
    assert ends == ATTENTION
    assert left_out["mlp.shared_experts.up_proj"] == left_out["mlp.gate_proj"] == "PEFT takes it for all experts"
    assert left_out["mlp.experts.down_proj"] == "experts in one tensor"
    assert not model.peft_config["default"].target_parameters
    with pytest.raises(UserError, match="PEFT takes it for all experts; name other layers"):
        adapted(base, lora_dropout=dropout, lora_target_modules=["gate_proj", "up_proj", "down_proj"])
    assert adapted(base, lora_dropout=dropout, lora_target_modules=["q_proj"])[0] == {"q_proj"}


def test_the_eyes_of_a_base_for_pictures_are_left_out(tmp_path: Path) -> None:
    ends, left_out, _ = adapted(make_family("Gemma 3", tmp_path / "m"))
    assert ends == ATTENTION | {"gate_proj", "up_proj", "down_proj"}
    assert "the model never calls it" in left_out["self_attn.out_proj"]


def test_rwkv_is_the_same_in_training_and_in_use(tmp_path: Path) -> None:
    """transformers halves its weights for use from seven layers on, and would not halve the adapters on them."""
    ends, _, model = adapted(make_family("RWKV, rescaled", tmp_path / "m"), lora_dropout=0.0)
    assert {"key", "value", "receptance", "output"} == ends
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        trained = model.train()(input_ids=ids, use_cache=False).logits
        used = model.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(trained, used)
