"""Adapters of compiled and wrapped models, and adapters as older versions of PEFT wrote them."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from lora_models import make_model, output, randomize
from safetensors.torch import load_file

from lora import LoRAError
from stocklora.adapters.files import check_peft, export_peft, import_peft, load_lora, read_peft, save_lora
from stocklora.adapters.layer import AdapterConfig, apply_lora


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
