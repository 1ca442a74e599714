"""Adapters of compiled and wrapped models, and adapters as older versions of PEFT wrote them."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from families import make_family
from lora_models import make_model, output, randomize
from safetensors.torch import load_file
from transformers import AutoModel

from lora import LoRAError
from stocklora.adapters.files import export_peft, import_peft, load_lora, read_peft, save_lora
from stocklora.adapters.layer import AdapterConfig, apply_lora
from stocklora.adapters.peft_check import check_peft, name_by_weight


@pytest.fixture
def adapted() -> torch.nn.Module:
    model = make_model()
    apply_lora(model, AdapterConfig(rank=2))
    randomize(model)
    return model


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_saved_under_the_names_of_the_plain_one(adapted, tmp_path, wrap) -> None:
    wrapped = wrap(adapted)
    export_peft(wrapped, tmp_path / "adapter", base_model="base")
    save_lora(wrapped, tmp_path / "a.pth")
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    torch.testing.assert_close(output(theirs), output(adapted))
    ours = make_model()
    load_lora(ours, tmp_path / "a.pth")
    torch.testing.assert_close(output(ours), output(adapted))


def test_the_pickle_of_older_versions_is_read_as_plain_data(adapted, tmp_path: Path) -> None:
    export_peft(adapted, tmp_path, base_model="base")
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    ours = make_model()
    import_peft(ours, tmp_path)
    torch.testing.assert_close(output(ours), output(adapted))
    torch.save({"code": print}, tmp_path / "adapter_model.bin")
    with pytest.raises(LoRAError, match="more than plain tensors"):
        read_peft(tmp_path)


def test_an_export_that_peft_passes_over_is_found(tmp_path: Path) -> None:
    backbone = make_model(head=False)
    apply_lora(backbone, AdapterConfig(rank=2))
    export_peft(backbone, tmp_path, base_model="base")
    check_peft(tmp_path, make_model(head=False))
    with pytest.raises(LoRAError, match="PEFT would put adapters elsewhere than on layers.0"):
        check_peft(tmp_path, make_model())


@pytest.mark.parametrize("targets", ["all-linear", ("shared_experts.up_proj",)])
def test_layers_that_peft_takes_for_experts_stay_where_they_are(tmp_path: Path, targets) -> None:
    """Named by their weights: of one such layer alone, or with dropout, PEFT would not even load the adapter."""
    base = make_family("GLM 4.5", tmp_path / "base")

    def plain() -> torch.nn.Module:
        return AutoModel.from_pretrained(base).eval()

    ours = plain()
    names = apply_lora(ours, AdapterConfig(rank=2, dropout=0.1, target_modules=targets))
    randomize(ours)
    export_peft(ours.eval(), tmp_path, base_model="base")
    with pytest.raises(LoRAError, match="PEFT"):
        check_peft(tmp_path, plain())
    assert name_by_weight(tmp_path)
    torch.testing.assert_close(output(check_peft(tmp_path, plain()).eval()), output(ours))
    again = plain()
    assert sorted(import_peft(again, tmp_path)) == sorted(names)
    torch.testing.assert_close(output(again), output(ours))
