"""Parity with PEFT: the same numbers from the same weights, and folders that go both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora
from lora import LoRAError, lora_parameters, lora_state_dict, merge
from stocklora.adapters.files import export_peft, import_peft
from stocklora.adapters.layer import AdapterConfig as LoRAConfig
from stocklora.adapters.layer import apply_lora

peft = pytest.importorskip("peft")

FAMILIES = ("qwen3", "llama", "gpt2")


def make_model(family: str, head: bool = True) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        return (transformers.GPT2LMHeadModel if head else transformers.GPT2Model)(config)
    kinds = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3Model, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaModel, transformers.LlamaForCausalLM),
    }
    make_config, backbone, causal = kinds[family]
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = make_config(**shape, num_key_value_heads=2, intermediate_size=48, head_dim=8)
    return (causal if head else backbone)(config)


def tokens() -> Tensor:
    return torch.arange(24).reshape(2, 12) % 61


def output(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(), use_cache=False)[0]


def ours_and_peft(family: str, head: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The same base with the same adapter weights, ours and PEFT's."""
    ours, base = make_model(family, head).to(dtype), make_model(family, head).to(dtype)
    names = apply_lora(ours, LoRAConfig(rank=4, alpha=6))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, layer in lora.lora_layers(ours).items():
            other = theirs.base_model.model.get_submodule(name)
            for mine, reference in (
                (layer.lora_A["default"], other.lora_A["default"].weight),
                (layer.lora_B["default"], other.lora_B["default"].weight),
            ):
                mine.copy_(torch.randn(mine.shape, generator=generator) * 0.1)
                reference.copy_(mine)
    return ours, theirs


def gradients(model: nn.Module, ours: bool, autocast: bool = False) -> dict[str, Tensor]:
    """A gradient by our names for the adapter matrices."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = output(model)
    out.float().square().mean().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            key = name.removeprefix("base_model.model.").removesuffix(".weight" if not ours else "")
            found[key] = parameter.grad
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [True, False])
def test_forward_gradients_and_merged_weights_equal_pefts(family: str, head: bool) -> None:
    ours, theirs = ours_and_peft(family, head)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-5)
    mine, reference = gradients(ours, ours=True), gradients(theirs, ours=False)
    assert mine.keys() == reference.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], reference[name], rtol=1e-4, atol=1e-6)
    merge(ours)
    lora.remove_lora(ours)
    merged = theirs.merge_and_unload()
    assert ours.state_dict().keys() == merged.state_dict().keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, merged.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
def test_low_precision_is_about_as_exact_as_pefts(dtype: torch.dtype, autocast: bool) -> None:
    """Against float32: our gradients err about as PEFT's do, which computes in float32 over a bf16 base."""
    exact, _ = ours_and_peft("llama")
    ours, theirs = ours_and_peft("llama", dtype=dtype)
    if dtype is not torch.float32:
        for parameter in lora_parameters(ours):
            assert parameter.dtype is torch.float32
        for name, module in exact.named_modules():  # compare rounding in the computation, not in the stored base
            for key, parameter in module._parameters.items():
                if parameter is not None and not parameter.requires_grad:
                    parameter.data.copy_(ours.get_submodule(name)._parameters[key])  # type: ignore[arg-type]
    truth = gradients(exact, ours=True)

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[n] - truth[n]).norm() / truth[n].norm()) for n in truth) / len(truth)

    mine = error(gradients(ours, ours=True, autocast=autocast))
    reference = error(gradients(theirs, ours=False, autocast=autocast))
    assert mine < 0.05
    assert mine < 1.5 * reference


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_layers_equal_pefts(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        layer = (
            bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            if kind == "nf4"
            else bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        )
        model: nn.Module = nn.Sequential(layer).to("cpu")
        if ours:
            apply_lora(model, LoRAConfig(rank=4, alpha=8))
        else:
            # PEFT asks the model, not the layer, how it was loaded.
            setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
        torch.manual_seed(1)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(torch.randn(parameter.shape))
        x = torch.randn(5, 64, requires_grad=True)
        y = model(x)
        y.square().mean().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in trained)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.filterwarnings("error::UserWarning:peft")
def test_peft_loads_our_folder(family: str, head: bool, tmp_path: Path) -> None:
    ours, _ = ours_and_peft(family, head)
    export_peft(ours, tmp_path / "adapter", base_model="somewhere/base")
    theirs = peft.PeftModel.from_pretrained(make_model(family, head), tmp_path / "adapter")
    torch.testing.assert_close(output(theirs), output(ours), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert config["fan_in_fan_out"] is (family == "gpt2")
    assert len(config["target_modules"]) < 10  # by short names where they are enough
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors")
    }


def test_peft_loads_a_folder_whose_layers_have_no_name_in_common(tmp_path: Path) -> None:
    """Only some layers adapted: short names would select too much."""
    ours = make_model("llama")
    names = apply_lora(ours, LoRAConfig(target_modules=("model.layers.1.self_attn.q_proj", "down_proj")))
    with torch.no_grad():
        for parameter in lora_parameters(ours):
            parameter.normal_(std=0.1)
    export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path)
    adapted = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(names)
    torch.testing.assert_close(output(theirs), output(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_pefts_folder(family: str, rslora: bool, tmp_path: Path) -> None:
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    theirs = peft.get_peft_model(
        make_model(family),
        peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM", lora_dropout=0.1
        ),
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = make_model(family).eval()
    assert len(import_peft(ours, tmp_path)) == (6 if family == "gpt2" else 4)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-5)


def test_our_folder_comes_back_to_us(tmp_path: Path) -> None:
    ours, _ = ours_and_peft("gpt2")
    export_peft(ours, tmp_path)
    again = make_model("gpt2")
    import_peft(again, tmp_path, adapter="again")
    before, after = lora_state_dict(ours), lora_state_dict(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"something_new": 3}, "something_new"),
    ],
)
def test_features_we_would_get_wrong_are_refused_by_name(
    settings: dict[str, object], named: str, tmp_path: Path
) -> None:
    ours, _ = ours_and_peft("llama")
    export_peft(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | settings))
    model = make_model("llama")
    with pytest.raises(LoRAError, match=f"not supported here: {named}="):
        import_peft(model, tmp_path)
    assert not lora.lora_layers(model)


def test_a_folder_that_claims_dora_and_has_no_magnitudes_is_refused(tmp_path: Path) -> None:
    export_peft(ours_and_peft("llama")[0], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    model = make_model("llama")
    with pytest.raises(LoRAError, match=r"missing model.layers.0.mlp.down_proj.lora_magnitude"):
        import_peft(model, tmp_path)
    assert not lora.lora_layers(model)


def test_missing_broken_and_foreign_folders(tmp_path: Path) -> None:
    model = make_model("llama")
    with pytest.raises(LoRAError, match="cannot read .*adapter_config.json"):
        import_peft(model, tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(LoRAError, match="cannot read .*adapter_config.json"):
        import_peft(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(LoRAError, match="no LoRA adapter of PEFT's"):
        import_peft(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(LoRAError, match="cannot read .*adapter_model.safetensors"):
        import_peft(model, tmp_path)
    export_peft(ours_and_peft("gpt2")[0], tmp_path)
    with pytest.raises(LoRAError, match="unexpected transformer.h.0"):
        import_peft(model, tmp_path)
    assert not lora.lora_layers(model)
