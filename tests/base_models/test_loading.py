"""Bases that are quantized on disk, saved again, cut short, or have a tokenizer of another model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_family
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from tuned_models import built, content_of, spec_of, unsettled

from llm_model import length_that_counts
from stocklora.base_models.loading import (
    BaseModel,
    hidden_states,
    load_backbone,
    load_causal_model,
    stored_quantization,
)
from stocklora.cli.console import UserError
from stocklora.finetune.memory import shape_of
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.forecaster import build_forecaster, check_base
from stocklora.forecaster.merge import merge
from stocklora.forecaster.settings import MergeSettings
from stocklora.forecaster.weights import save_weights


@pytest.fixture
def base(tiny_models, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "base"))


def changed(base: Path, **settings: object) -> Path:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings), encoding="utf-8")
    return base


def test_a_base_in_8_bit_on_disk_trains_so_and_merging_names_the_whole_one(base, tmp_path) -> None:
    stored = tmp_path / "base-bnb-8bit"
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(stored)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, stored)
    assert BaseModel(stored).quantization == "8bit"
    forecaster = unsettled(built(spec_of(stored, "lora"), stored))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        used = forecaster.model.backbone(input_ids=ids).last_hidden_state
        trained = forecaster.model.train().backbone(input_ids=ids).last_hidden_state
    assert torch.equal(used, trained)
    save_weights(tmp_path / "w.pth", content_of(forecaster))
    settings = MergeSettings(lora_weights=tmp_path / "w.pth", model_path=stored, output=tmp_path / "m", device="cpu")
    with pytest.raises(UserError, match="give --model_path the unquantized base"):
        merge(settings)
    merge(replace(settings, model_path=base))
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_a_base_quantized_by_a_method_that_cannot_be_trained_over_is_a_line(base) -> None:
    changed(base, quantization_config={"quant_method": "gptq", "bits": 4})
    assert stored_quantization(BaseModel(base).config) == "gptq"
    with pytest.raises(UserError, match="stored quantized by gptq"):
        built(spec_of(base, "lora"), base)


def test_the_same_model_saved_by_another_version_is_no_other_and_a_resized_vocabulary_is_named(base) -> None:
    spec = replace(spec_of(base, "lora"), base_model=BaseModel(base).identity)
    content = json.loads((base / "config.json").read_text())
    rope = content.pop("rope_parameters")
    (base / "config.json").write_text(json.dumps(content | {"rope_theta": rope["rope_theta"]}), encoding="utf-8")
    check_base(spec, Path("w.pth"), BaseModel(base))
    vocabulary = content["vocab_size"]
    changed(base, vocab_size=vocabulary + 7)
    with pytest.raises(UserError, match=f"vocab_size {vocabulary} -> {vocabulary + 7}"):
        check_base(spec, Path("w.pth"), BaseModel(base))


def test_a_tokenizer_that_writes_tokens_beyond_the_embeddings_is_a_line(tmp_path) -> None:
    small = make_family("Llama 3", tmp_path / "small", vocab_size=20)
    with pytest.raises(UserError, match="embeddings for 20"):
        built(spec_of(small, "lora"), small)


def test_where_length_counts() -> None:
    assert length_that_counts(LlamaConfig()) > 10**9
    stretched = LlamaConfig(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=512)
    assert length_that_counts(stretched) == 512


def test_code_in_a_base_of_ones_own_is_never_run(base, tmp_path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (base / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Code()}, base / "pytorch_model.bin")
    for load in (
        lambda: load_causal_model(base, dtype=torch.float32, device=torch.device("cpu")),
        lambda: built(spec_of(base, "lora"), base),
    ):
        with pytest.raises(UserError, match="such as code, which is never run; use safetensors") as caught:
            load()
        assert "weights_only" not in str(caught.value)  # torch's advice is to run it
    assert not (tmp_path / "ran").exists()


NO_PLAIN_TRANSFORMERS = (
    "Mamba", "Mamba 2", "Falcon H1", "Jamba", "Zamba 2", "RecurrentGemma", "LFM 2", "Qwen 3 Next", "Qwen 2 VL",
)  # fmt: skip


@pytest.mark.parametrize("family", NO_PLAIN_TRANSFORMERS)
def test_the_first_layer_of_a_base_is_the_same_when_it_is_cut(family, tmp_path) -> None:
    base = make_family(family, tmp_path / "m")
    outputs: dict[int | None, Any] = {}
    for layers in (None, 1):
        backbone: Any = load_backbone(base, torch.float32, layers).eval()
        stack = backbone.layers
        assert len(stack) == (layers or len(stack))
        stack[0].register_forward_hook(lambda *call, layers=layers: outputs.update({layers: call[2]}))
        with torch.no_grad():
            hidden_states(backbone, torch.arange(5, 25)[None])
    torch.testing.assert_close(outputs[1], outputs[None])


@pytest.mark.parametrize(
    ("family", "words"),
    [("RWKV", "division by zero"), ("Gemma 3n (text)", "its weights have other shapes than its configuration says")],
)
def test_a_base_that_cannot_be_cut_says_what_to_change(family, words, tmp_path) -> None:
    base = make_family(family, tmp_path / "m")
    with pytest.raises(UserError, match=rf"{words} \(it may not go with --backbone_layers 1: give another number, or"):
        built(replace(spec_of(base, "lora"), backbone_layers=1), base)


# --------------------------------------------------------------------------------------------- code of a model's own

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN_CONFIG, OWN_MODEL = {"AutoConfig": "modeling_own.OwnConfig"}, "modeling_own.OwnForCausalLM"


@pytest.fixture
def own(base, tmp_path, monkeypatch) -> Path:
    """A base whose classes come in a Python file beside it, among them none for ``AutoModel``."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (base / "modeling_own.py").write_text(OWN_CODE)
    classes = OWN_CONFIG | {"AutoModelForCausalLM": OWN_MODEL}
    return changed(base, model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)


def test_code_without_automodel_trains_merges_and_is_exported(own, tmp_path) -> None:
    spec = spec_of(own, "lora")
    with pytest.raises(UserError, match="add --trust_remote_code if you trust"):
        built(spec, own)
    trusted = BaseModel(own, trust_remote_code=True)
    forecaster = unsettled(build_forecaster(spec, trusted, torch.device("cpu"), torch.float32, fresh=False))
    assert type(forecaster.model.backbone).__name__ == "LlamaModel"
    assert shape_of(TrainLoraSettings(model_path=own, trust_remote_code=True)).layers == 2
    save_weights(tmp_path / "w.pth", content_of(forecaster))
    settings = MergeSettings(
        lora_weights=tmp_path / "w.pth", model_path=own, output=tmp_path / "m", export_peft=tmp_path / "a",
        device="cpu", trust_remote_code=True,
    )  # fmt: skip
    merge(settings)
    ids = torch.arange(5, 25)[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    with torch.no_grad():
        beside, merged = (hidden_states(model, ids) for model in (forecaster.model.backbone, whole.model))
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "a" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("classes", "code", "words"),
    [
        (
            {},
            "",
            "no language model for its OwnConfig, in transformers or in its own auto_map; choose",
        ),
        ({"AutoModelForSeq2SeqLM": OWN_MODEL}, "", "there is no language model for its OwnConfig"),
        (
            {"AutoModelForCausalLM": OWN_MODEL},
            "    base_model_prefix = 'nothing'",
            "has no AutoModel in its auto_map",
        ),
        ({"AutoModelForCausalLM": "other.Own"}, "", "other.py"),
        ({"AutoModelForCausalLM": OWN_MODEL}, "1 +", "SyntaxError"),
    ],
)
def test_code_that_gives_no_decoder_is_one_line(own, classes, code, words) -> None:
    changed(own, auto_map=OWN_CONFIG | classes)
    (own / "modeling_own.py").write_text(OWN_CODE + code + "\n")
    with pytest.raises(UserError, match=words) as caught:
        shape_of(TrainLoraSettings(model_path=own, trust_remote_code=True))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
