"""Variants of LoRA against their formulas and PEFT's, and the tools over several adapters.

rsLoRA, DoRA, PiSSA and trained biases: forward, gradients, merged weights, files and folders, quantized bases.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora
from lora import (
    LoRAError,
    adapters_disabled,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge,
    remove_lora,
    unmerge,
)
from stocklora.adapters.arithmetic import adapted_names, average_adapters, expand_rank, truncate_rank
from stocklora.adapters.files import export_peft, import_peft, load_lora, save_lora
from stocklora.adapters.layer import AdapterConfig as LoRAConfig
from stocklora.adapters.layer import AdapterLayer, apply_lora
from stocklora.cli.console import UserError

# Our settings and PEFT's for the same thing.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "bias_lora_only": ({"train_bias": "lora_only"}, {"bias": "lora_only"}),
    "bias_all": ({"train_bias": "all"}, {"bias": "all"}),
    "together": (
        {"rslora": True, "dora": True, "init": "pissa", "train_bias": "all"},
        {"use_rslora": True, "use_dora": True, "init_lora_weights": "pissa", "bias": "all"},
    ),
}
FAMILIES = ("gpt2", "qwen2")  # Conv1D and nn.Linear, both with biases
TARGETS = {"gpt2": ("c_attn", "c_proj"), "qwen2": ("q_proj", "o_proj", "down_proj")}
SIZE: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def make_model(family: str, head: bool = True) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        model = (transformers.GPT2LMHeadModel if head else transformers.GPT2Model)(config)
    else:
        shape = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 48}
        config = transformers.Qwen2Config(**shape)
        model = (transformers.Qwen2ForCausalLM if head else transformers.Qwen2Model)(config)
    for name, parameter in model.named_parameters():  # transformers starts them at zero
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def output(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(24).reshape(2, 12) % 61, use_cache=False)[0]


def disturb(model: nn.Module, seed: int = 1) -> None:
    """Adapters as if trained: away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def config_of(variant: str, family: str = "gpt2", **more: Any) -> LoRAConfig:
    return LoRAConfig(**{"rank": 4, "alpha": 6.0, "target_modules": TARGETS[family], **VARIANTS[variant][0], **more})


def adapted(variant: str, family: str = "gpt2", **more: Any) -> nn.Module:
    model = make_model(family)
    apply_lora(model, config_of(variant, family, **more))
    disturb(model)
    return model.eval()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, reference: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(found[name], tensor), name


class TestConfig:
    @pytest.mark.parametrize(
        "wrong", [{"rslora": "yes"}, {"dora": None}, {"init": "olora"}, {"train_bias": "some"}, {"train_bias": True}]
    )
    def test_refuses_what_it_does_not_know(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(LoRAError, match=f"{next(iter(wrong))} must be ") as caught:
            LoRAConfig(**wrong)
        assert "\n" not in str(caught.value)

    def test_settings_of_before_mean_what_they_meant(self) -> None:
        before = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all-linear"}
        assert LoRAConfig.from_dict(before) == LoRAConfig()
        assert LoRAConfig().scaling == 2

    def test_unknown_setting_is_an_error(self) -> None:
        with pytest.raises(LoRAError, match="unknown LoRA setting r; known are rank"):
            LoRAConfig.from_dict({"r": 8})

    @every_variant
    def test_survives_json(self, variant: str) -> None:
        config = config_of(variant)
        assert LoRAConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


class TestFormulas:
    @staticmethod
    def layer(bias: bool = True, transposed: bool = False, **more: Any) -> tuple[nn.Module, Tensor, Tensor | None]:
        """A model of one adapted layer in float64, its dense weight (out, in) and its bias."""
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        model = nn.Sequential(Conv1D(7, 5) if transposed else nn.Linear(5, 7, bias=bias)).double()
        base = model[0]
        apply_lora(model, LoRAConfig(**{"rank": 3, "alpha": 6.0, **more}))
        model.double()
        return model, (base.weight.T if transposed else base.weight), base.bias

    def test_rslora_scales_by_the_root_of_the_rank(self) -> None:
        assert LoRAConfig(16, 8.0, rslora=True).scaling == 2
        model, W, bias = self.layer(rslora=True)
        disturb(model)
        A, B = lora_parameters(model)
        x = torch.randn(4, 5, dtype=torch.float64)
        torch.testing.assert_close(model(x), x @ (W + 6 / 3**0.5 * B @ A).T + bias)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("transposed", [True, False])
    def test_dora_is_a_length_times_a_direction(self, bias: bool, transposed: bool) -> None:
        """By hand, with autograd through the formula in which the norm is held constant."""
        model, W, b = self.layer(bias, transposed, dora=True)
        disturb(model)
        A, B, m = trained = list(lora_parameters(model))
        x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        V = W + 2 * B @ A
        dense = (m / V.norm(dim=1).detach())[:, None] * V
        expected = x @ dense.T + (0 if b is None else b)
        # The norm is taken in float32, as the weights of a real model are.
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
        ours = torch.autograd.grad(model(x).square().sum(), [x, *trained])
        theirs = torch.autograd.grad(expected.square().sum(), [x, *trained])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        merge(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    def test_dora_over_a_row_of_zeros_is_finite(self) -> None:
        model = nn.Sequential(nn.Linear(5, 7))
        model[0].weight.data[2] = 0
        expected = model(torch.ones(1, 5)).detach()
        apply_lora(model, LoRAConfig(2, dora=True))
        torch.testing.assert_close(model(torch.ones(1, 5)), expected)
        model(torch.ones(1, 5)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in lora_parameters(model))

    @pytest.mark.parametrize("transposed", [True, False])
    def test_pissa_starts_at_the_leading_singular_vectors(self, transposed: bool) -> None:
        model, W, bias = self.layer(transposed=transposed, init="pissa")
        before = W.detach().clone()
        A, B = lora_parameters(model)
        x = torch.randn(4, 5, dtype=torch.float64)
        torch.testing.assert_close(model(x), x @ W.T + bias)
        U, S, V = torch.linalg.svd(W.detach())
        best = (U[:, :3] * S[:3]) @ V[:3]
        torch.testing.assert_close(2 * B @ A, best, rtol=1e-5, atol=1e-6)  # found in float32
        torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-5, atol=1e-6)  # shared evenly
        residual = W.detach() - 2 * (B @ A).detach()
        disturb(model)
        torch.testing.assert_close(model(x), x @ (residual + 2 * B @ A).T + bias)
        assert torch.equal(W, before)  # for other adapters, and for the way back
        assert [p.requires_grad for p in model.parameters()].count(True) == 2

    def test_pissa_asks_no_more_than_a_weight_has(self) -> None:
        model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 4))
        with pytest.raises(LoRAError, match="PiSSA at rank 5 is too much for 1, which has 4 singular vectors"):
            apply_lora(model, LoRAConfig(5, init="pissa"))
        assert not lora.lora_layers(model)

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_bias_gradient_is_that_of_the_dense_layer(self, dora: bool, transposed: bool) -> None:
        model, W, bias = self.layer(transposed=transposed, dora=dora, train_bias="lora_only")
        disturb(model)
        assert bias is not None
        A, B, *m = [p for p in lora_parameters(model) if p is not bias]
        assert any(p is bias for p in lora_parameters(model))
        V = W + 2 * B @ A
        dense = V if not m else (m[0] / V.norm(dim=1).detach())[:, None] * V
        x = torch.randn(2, 4, 5, dtype=torch.float64)
        expected = torch.autograd.grad((x @ dense.T + bias).square().sum(), [bias, A])
        found = torch.autograd.grad(model(x).square().sum(), [bias, A])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("variant", ["dora", "pissa", "bias_lora_only"])
    def test_autocast_and_bf16_bases(self, variant: str) -> None:
        torch.manual_seed(0)
        exact = nn.Sequential(nn.Linear(32, 24))
        apply_lora(exact, config_of(variant, target_modules="all-linear"))
        disturb(exact)
        x = torch.randn(5, 32)
        truth = torch.autograd.grad(exact(x).square().mean(), list(lora_parameters(exact)))
        low = nn.Sequential(nn.Linear(32, 24)).bfloat16()
        low[0].load_state_dict({"weight": exact[0].weight, "bias": exact[0].bias})
        apply_lora(low, config_of(variant, target_modules="all-linear"))
        load_lora_state_dict(low, lora_state_dict(exact))
        for model, autocast, given_x in ((exact, True, x), (low, False, x.bfloat16())):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                y = model(given_x)
            assert y.dtype is torch.bfloat16
            torch.testing.assert_close(y.float(), exact(x), rtol=0.05, atol=0.05)
            trained = list(lora_parameters(model))
            for mine, reference in zip(torch.autograd.grad(y.float().square().mean(), trained), truth, strict=True):
                assert float((mine.float() - reference).norm() / reference.norm()) < 0.03

    @every_variant
    def test_checkpointing_and_compile_give_the_same_gradients(self, variant: str) -> None:
        from torch.utils.checkpoint import checkpoint

        model = nn.Sequential(nn.Linear(12, 9))
        apply_lora(model, config_of(variant, target_modules="all-linear"))
        disturb(model)
        x = torch.randn(3, 12)
        parameters = list(lora_parameters(model))
        plain = torch.autograd.grad(model(x).square().sum(), parameters)
        again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), parameters)
        torch.testing.assert_close(again, plain)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), parameters), plain)


class TestOneBaseManyWays:
    @every_variant
    @every_family
    def test_starts_equal_to_the_base(self, variant: str, family: str) -> None:
        model = make_model(family).eval()
        before = output(model)
        apply_lora(model, config_of(variant, family))
        torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)

    @every_variant
    @every_family
    def test_only_its_own_parameters_learn_and_the_way_back_is_exact(self, variant: str, family: str) -> None:
        plain = make_model(family).eval()
        base, expected = bits(plain), output(plain)
        model = make_model(family)
        apply_lora(model, config_of(variant, family))
        trained = {id(p) for p in lora_parameters(model)}
        assert trained == {id(p) for p in model.parameters() if p.requires_grad}
        frozen = [(p, p.clone()) for p in model.parameters() if not p.requires_grad]
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0)
        for _ in range(3):
            output(model).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(now, then) for now, then in frozen)
        assert not torch.allclose(output(model), expected, atol=1e-3)
        with adapters_disabled(model), adapters_disabled(model):
            assert torch.equal(output(model), expected)
        assert not torch.allclose(output(model), expected, atol=1e-3)
        remove_lora(model)
        assert_same_bits(model, base)

    @every_variant
    @every_family
    def test_merging_keeps_the_function_and_unmerging_every_bit(self, variant: str, family: str) -> None:
        base = output(make_model(family).eval())
        model = adapted(variant, family)
        before, tuned = bits(model), output(model)
        assert not torch.allclose(tuned, base, atol=1e-3)
        merge(model)
        torch.testing.assert_close(output(model), tuned, rtol=1e-5, atol=1e-5)
        with adapters_disabled(model):
            assert torch.equal(output(model), base)
        unmerge(model)
        assert_same_bits(model, before)
        assert torch.equal(output(model), tuned)
        merge(model)
        remove_lora(model)
        assert model.state_dict().keys() == make_model(family).state_dict().keys()
        assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
        torch.testing.assert_close(output(model), tuned, rtol=1e-5, atol=1e-5)

    @every_variant
    @pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
    def test_files_bring_the_function_back(self, variant: str, name: str, tmp_path: Path) -> None:
        model = adapted(variant)
        save_lora(model, tmp_path / name)
        fresh = make_model("gpt2").eval()
        assert load_lora(fresh, tmp_path / name) == adapted_names(lora_state_dict(model))
        assert torch.equal(output(fresh), output(model))
        assert next(iter(lora.lora_layers(fresh).values())).configs == {"default": config_of(variant)}
        again = adapted(variant, rank=4)  # as training does: the adapter is there, its state is put into it
        disturb(again, seed=7)
        load_lora_state_dict(again, lora_state_dict(model))
        assert torch.equal(output(again), output(model))

    def test_a_file_of_one_variant_does_not_load_as_another(self) -> None:
        dora, plain = adapted("dora"), adapted("rslora")
        with pytest.raises(LoRAError, match="unexpected transformer.h.0.attn.c_attn.lora_magnitude"):
            load_lora_state_dict(plain, lora_state_dict(dora))
        with pytest.raises(LoRAError, match="missing transformer.h.0.attn.c_attn.lora_magnitude"):
            load_lora_state_dict(dora, lora_state_dict(plain))

    def test_variants_share_a_base(self) -> None:
        model = make_model("qwen2").eval()
        base, outputs = output(model), {}
        for name in ("rslora", "dora", "pissa"):
            apply_lora(model, config_of(name, "qwen2"), adapter=name)
            disturb(model)
            outputs[name] = output(model)
        for name, expected in outputs.items():
            lora.set_adapter(model, name)
            assert torch.equal(output(model), expected)
            alone = adapted(name, "qwen2")
            load_lora_state_dict(alone, lora_state_dict(model))
            assert torch.equal(output(alone), expected)
        with adapters_disabled(model):
            assert torch.equal(output(model), base)


class TestBiases:
    def test_which_biases(self) -> None:
        only, every = adapted("bias_lora_only"), adapted("bias_all")
        names = {f"transformer.h.{i}.{name}.bias" for i in range(2) for name in ("attn.c_attn", "attn.c_proj")}
        names |= {f"transformer.h.{i}.mlp.c_proj.bias" for i in range(2)}
        assert {name for name in lora_state_dict(only) if name.endswith("bias")} == names
        plain = {name for name, _ in make_model("gpt2").named_parameters() if name.endswith("bias")}
        assert plain > names
        assert {name for name in lora_state_dict(every) if name.endswith("bias")} == plain

    def test_a_model_without_biases_says_so(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3, bias=False))
        with pytest.raises(LoRAError, match="train_bias='all' finds no bias in this model; leave it at 'none'"):
            apply_lora(model, LoRAConfig(train_bias="all"))
        assert not lora.lora_layers(model)

    def test_such_an_adapter_is_the_only_one(self) -> None:
        model = adapted("bias_all")
        with pytest.raises(LoRAError, match="must be the only one; the model has: default"):
            apply_lora(model, LoRAConfig(), adapter="second")
        model = adapted("rslora")
        with pytest.raises(LoRAError, match="must be the only one; the model has: default"):
            apply_lora(model, LoRAConfig(train_bias="all"), adapter="second")

    def test_the_state_is_not_read_or_filled_while_the_base_shows(self) -> None:
        model = adapted("bias_all")
        state = lora_state_dict(model)
        with adapters_disabled(model):
            with pytest.raises(LoRAError, match="cannot read an adapter inside adapters_disabled"):
                lora_state_dict(model)
            with pytest.raises(LoRAError, match="cannot load an adapter inside adapters_disabled"):
                load_lora_state_dict(model, state)


class TestKernel:
    """What the fused step costs and gives; that it computes LoRA is held by tests/test_lora.py."""

    @staticmethod
    def linear_and_input() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7))
        apply_lora(model, LoRAConfig(rank=2, alpha=3.0))
        disturb(model)
        return model, torch.randn(4, 3, 5)

    def test_backward_inside_autocast_gives_the_same_gradients(self) -> None:
        model, x = self.linear_and_input()
        loss = model(x).square().mean()
        want = torch.autograd.grad(loss, list(lora_parameters(model)), retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = torch.autograd.grad(loss, list(lora_parameters(model)))
        torch.testing.assert_close(got, want)

    def test_the_backward_pass_keeps_no_second_copy_of_a_wide_tensor(self) -> None:
        """What the graph holds is the input it was given and a tensor of ``rank`` columns."""
        model, _ = self.linear_and_input()
        x = torch.randn(100, 5, requires_grad=True)
        saved: list[Tensor] = []
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            model(x)
        wide = [t for t in saved if t.shape[0] == 100 and t.shape[1] > 2]
        assert [t.data_ptr() for t in wide] == [x.data_ptr()]
        assert all(t.dtype is torch.float32 for t in saved if t.shape == (7, 5))


# --------------------------------------------------------------------------------------------------- PEFT


def our_name(name: str) -> str:
    """A parameter's name in PEFT's model or in ours, without what the wrappers add."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".base.", ".")
    name = name.replace("lora_magnitude_vector", "lora_magnitude")
    return name.removesuffix(".weight") if ".lora_" in name else name


def ours_and_peft(variant: str, family: str, **more: Any) -> tuple[nn.Module, nn.Module]:
    """The same base, the same trained adapter: ours and PEFT's."""
    peft = pytest.importorskip("peft")
    ours = make_model(family)
    names = apply_lora(ours, config_of(variant, family, **more))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=more.get("dropout", 0.0),
        target_modules=names,
        fan_in_fan_out=family == "gpt2",
        **VARIANTS[variant][1],
    )
    theirs = peft.get_peft_model(make_model(family), config)
    mine = {our_name(name): p for name, p in ours.named_parameters() if p.requires_grad}
    reference = {our_name(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == reference.keys()
    with torch.no_grad():
        if "init" not in VARIANTS[variant][0]:  # PEFT's PiSSA start must be ours, up to the sign of a pair of vectors
            for name, parameter in mine.items():
                reference[name].copy_(parameter)
        for name, parameter in mine.items():
            if ".lora_" in name and "magnitude" not in name:
                torch.testing.assert_close(parameter, reference[name], rtol=1e-3, atol=1e-4)
                reference[name].copy_(parameter)
            noise = torch.randn(parameter.shape) * 0.1
            parameter.add_(noise)
            reference[name].add_(noise)
    return ours, theirs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    output(model).square().mean().backward()
    return {our_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@every_variant
@every_family
def test_forward_gradients_and_merged_weights_equal_pefts(variant: str, family: str) -> None:
    ours, theirs = ours_and_peft(variant, family)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-4, atol=1e-5)
    mine, reference = gradients(ours), gradients(theirs)
    assert mine.keys() == reference.keys()
    assert len(mine) == len(list(lora_parameters(ours)))
    for name in mine:
        torch.testing.assert_close(mine[name], reference[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    merge(ours)
    remove_lora(ours)
    merged = theirs.merge_and_unload()
    assert ours.state_dict().keys() == merged.state_dict().keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, merged.state_dict()[name], rtol=1e-4, atol=1e-5)


@every_variant
def test_dropout_falls_where_it_does_in_peft(variant: str) -> None:
    """The same seed draws the same masks, so that outputs and gradients must be equal."""
    ours, theirs = ours_and_peft(variant, "qwen2", dropout=0.3)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        drawn = output(model)
        torch.manual_seed(5)
        results.append((drawn, gradients(model)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(results[0][0], output(ours), atol=1e-3)


@every_variant
@every_family
@pytest.mark.filterwarnings("error::UserWarning:peft")
def test_peft_loads_our_folder(variant: str, family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = adapted(variant, family)
    export_peft(ours, tmp_path, base_model="somewhere/base")
    theirs = peft.PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    torch.testing.assert_close(output(theirs), output(ours), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output(theirs.merge_and_unload()), output(ours), rtol=1e-4, atol=1e-5)
    back = make_model(family).eval()
    import_peft(back, tmp_path)
    torch.testing.assert_close(output(back), output(ours), rtol=1e-5, atol=1e-5)


@every_variant
@every_family
def test_we_load_pefts_folder(variant: str, family: str, tmp_path: Path) -> None:
    ours, theirs = ours_and_peft(variant, family, dropout=0.1)
    theirs.save_pretrained(tmp_path)
    fresh = make_model(family).eval()
    assert import_peft(fresh, tmp_path) == adapted_names(lora_state_dict(ours))
    torch.testing.assert_close(output(fresh), output(theirs.eval()), rtol=1e-4, atol=1e-5)
    config = next(iter(lora.lora_layers(fresh).values())).configs["default"]
    for name, value in VARIANTS[variant][0].items():
        assert getattr(config, name) == value


def test_pissa_converted_by_peft_is_plain_lora_of_twice_the_rank(tmp_path: Path) -> None:
    """PEFT's own conversion, which keeps the first adapter to subtract it later, against our export."""
    ours, theirs = ours_and_peft("pissa", "qwen2")
    fresh_start = peft_with_pissa_start()
    fresh_start.save_pretrained(tmp_path / "start")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    converted = make_model("qwen2").eval()
    import_peft(converted, tmp_path / "converted")
    export_peft(ours, tmp_path / "ours")
    exported = make_model("qwen2").eval()
    import_peft(exported, tmp_path / "ours")
    torch.testing.assert_close(output(exported), output(ours.eval()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(exported), output(converted), rtol=1e-4, atol=1e-4)
    written = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "converted")]
    for key in ("r", "lora_alpha"):
        assert written[0][key] == written[1][key]


def peft_with_pissa_start() -> nn.Module:
    peft = pytest.importorskip("peft")
    names = lora.find_targets(make_model("qwen2"), TARGETS["qwen2"])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights="pissa")
    model = peft.get_peft_model(make_model("qwen2"), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation says
    return model


# --------------------------------------------------------------------------------- names of layers elsewhere


class TestNamesElsewhere:
    @pytest.mark.parametrize("variant", ["rslora", "pissa", "bias_lora_only"])
    @every_family
    @pytest.mark.parametrize("whole_first", [True, False])
    def test_a_whole_models_adapter_fits_its_backbone_and_the_other_way_round(
        self, variant: str, family: str, whole_first: bool, tmp_path: Path
    ) -> None:
        peft = pytest.importorskip("peft")
        whole = make_model(family)
        backbone = copy.deepcopy(getattr(whole, whole.base_model_prefix))
        source, target = (whole, backbone) if whole_first else (backbone, whole)
        config = peft.LoraConfig(
            r=3, target_modules=list(TARGETS[family]), fan_in_fan_out=family == "gpt2", **VARIANTS[variant][1]
        )
        theirs = peft.get_peft_model(source, config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs.save_pretrained(tmp_path)
        names = import_peft(target.eval(), tmp_path)
        prefix = "transformer.h.0." if family == "gpt2" else "model.layers.0."
        assert names[0].startswith(prefix if not whole_first else prefix.partition(".")[2])

        def hidden(model: nn.Module) -> Tensor:
            result = model(input_ids=torch.arange(12)[None], use_cache=False, output_hidden_states=True)
            return result.hidden_states[-1]

        torch.testing.assert_close(hidden(target), hidden(theirs), rtol=1e-4, atol=1e-5)

    def test_names_that_fit_twice_are_refused(self, tmp_path: Path) -> None:
        one = nn.Sequential(nn.Linear(4, 4))
        apply_lora(one, LoRAConfig(2))
        export_peft(one, tmp_path)
        towers = nn.ModuleDict({"left": nn.Sequential(nn.Linear(4, 4)), "right": nn.Sequential(nn.Linear(4, 4))})
        with pytest.raises(LoRAError, match=r"the adapter's 0 could be any of left.0, right.0"):
            import_peft(towers, tmp_path)
        assert not lora.lora_layers(towers)
        import_peft(towers["left"], tmp_path)

    def test_names_that_fit_in_part_are_refused(self, tmp_path: Path) -> None:
        model = make_model("qwen2")
        apply_lora(model, LoRAConfig(target_modules=("q_proj", "lm_head")))
        export_peft(model, tmp_path)
        with pytest.raises(LoRAError, match="unexpected lm_head.lora_A"):
            import_peft(make_model("qwen2", head=False), tmp_path)


# ------------------------------------------------------------------------------------------- quantized bases


def quantized_layer(kind: str, bias: bool = True) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if kind == "int8":
        return bnb.nn.Linear8bitLt(64, 96, bias=bias, has_fp16_weights=False)
    nested = kind == "nf4_double"
    return bnb.nn.Linear4bit(64, 96, bias, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4")


def in_model(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer).to("cpu")


every_kind = pytest.mark.parametrize("kind", ["nf4", "nf4_double", "int8"])


class TestQuantized:
    @every_kind
    @pytest.mark.parametrize("variant", ["rslora", "dora", "bias_lora_only"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_forward_and_gradients_equal_pefts(self, kind: str, variant: str, dropout: float) -> None:
        peft = pytest.importorskip("peft")
        our_settings, their_settings = VARIANTS[variant]
        results = []
        for mine in (True, False):
            model = in_model(quantized_layer(kind))
            if mine:
                apply_lora(model, LoRAConfig(4, 8.0, dropout, **our_settings))
            else:
                # PEFT asks the model, not the layer, how it was loaded.
                setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
                config = peft.LoraConfig(
                    r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["0"], **their_settings
                )
                model = peft.get_peft_model(model, config)
            trained = {our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
            torch.manual_seed(1)
            with torch.no_grad():
                for name in sorted(trained):
                    trained[name].copy_(1 + torch.randn(trained[name].shape) * 0.3)
            torch.manual_seed(2)
            x = torch.randn(5, 64, requires_grad=True)
            y = model.train()(x)
            y.square().mean().backward()
            results.append({"y": y, "x": x.grad, **{name: p.grad for name, p in trained.items()}})
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)

    @every_kind
    @pytest.mark.parametrize("variant", ["rslora", "dora", "pissa"])
    def test_starts_equal_to_the_quantized_base_and_is_not_merged_into_it(self, kind: str, variant: str) -> None:
        model = in_model(quantized_layer(kind))
        x = torch.randn(5, 64)
        before = model(x)
        apply_lora(model, LoRAConfig(4, 8.0, **VARIANTS[variant][0]))
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
        disturb(model)
        assert not torch.allclose(model(x), before, atol=0.01)
        with pytest.raises(LoRAError, match="quantized .* load the base model unquantized and merge into that"):
            merge(model)

    @every_kind
    def test_a_pass_in_eval_mode_does_not_end_training(self, kind: str) -> None:
        """On AVX512-BF16 bitsandbytes repacks 4-bit weights then: other numbers, no gradient any more."""
        model = nn.Sequential(quantized_layer(kind, bias=False), nn.ReLU(), nn.Linear(96, 1)).to("cpu")
        apply_lora(model, LoRAConfig(4, target_modules="2"))  # the quantized layer is not even adapted
        disturb(model)
        x = torch.randn(5, 64, requires_grad=True)
        trained = model.train()(x)
        (before,) = torch.autograd.grad(trained.sum(), x)
        with torch.no_grad():
            forecast = model.eval()(x.detach())
        if kind != "int8":  # which computes in integers where no gradient is wanted
            torch.testing.assert_close(forecast, trained, rtol=1e-5, atol=1e-5)
        (after,) = torch.autograd.grad(model.train()(x).sum(), x)
        torch.testing.assert_close(after, before)

    def test_a_repacked_base_is_refused(self) -> None:
        model = in_model(quantized_layer("nf4"))
        with torch.no_grad():
            model.eval()(torch.randn(1, 64))
        if not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False):
            pytest.skip("this processor does not repack")
        with pytest.raises(LoRAError, match="0 was repacked by a pass in eval mode; load the 4-bit base anew"):
            apply_lora(model, LoRAConfig())

    @every_kind
    @pytest.mark.parametrize("variant", ["rslora", "dora"])
    def test_its_adapter_merges_into_the_unquantized_base(self, kind: str, variant: str, tmp_path: Path) -> None:
        layer = quantized_layer(kind)
        plain = nn.Sequential(nn.Linear(64, 96))
        with torch.no_grad():
            plain[0].weight.copy_(layer.weight)
            plain[0].bias.copy_(layer.bias)
        model = in_model(layer)
        apply_lora(model, LoRAConfig(4, 8.0, **VARIANTS[variant][0]))
        disturb(model)
        save_lora(model, tmp_path / "a.pth")
        load_lora(plain, tmp_path / "a.pth")
        merge(plain)
        x = torch.randn(5, 64)
        torch.testing.assert_close(plain(x), model(x), rtol=0.2, atol=0.2)  # but for the error of quantization


# ------------------------------------------------------------------------------------- tools over adapters


def updates(state: dict[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """The dense update of each layer, in float64."""
    result = {}
    for name in adapted_names(state):
        parts = {part: state[f"{name}.{part}"].double() for part in AdapterLayer.PARTS if f"{name}.{part}" in state}
        result[name] = config.scaling * parts["lora_B"] @ parts["lora_A"]
        if "pissa_A" in parts:
            result[name] -= config.scaling * parts["pissa_B"] @ parts["pissa_A"]
    return result


def random_adapter(config: LoRAConfig, names: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    model = nn.ModuleDict({name: nn.Linear(6, 9) for name in ("q", "k", "v")})
    torch.manual_seed(seed)
    apply_lora(model, dataclasses.replace(config, target_modules=names))
    disturb(model, seed)
    return lora_state_dict(model)


class TestAverage:
    @given(
        ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
        weights=st.lists(st.floats(0.01, 5), min_size=3, max_size=3),
        rslora=st.booleans(),
        pissa=st.booleans(),
    )
    @settings(max_examples=25)
    def test_is_the_average_of_the_updates(
        self, ranks: list[int], weights: list[float], rslora: bool, pissa: bool
    ) -> None:
        members = []
        for i, (rank, weight) in enumerate(zip(ranks, weights, strict=False)):
            init = "pissa" if pissa and i == 0 else "kaiming"
            config = LoRAConfig(rank, 3.0 + i, rslora=rslora, init=init)
            members.append((random_adapter(config, ("q", "k") if i else ("q", "v"), i), config, weight))
        state, config = average_adapters(members)
        assert config.rank == sum(ranks) + (ranks[0] if pissa else 0)
        found = updates(state, config)
        total = sum(weight for *_, weight in members)
        expected: dict[str, Tensor] = {}
        for member, its_config, weight in members:
            for name, update in updates(member, its_config).items():
                expected[name] = expected.get(name, 0) + weight / total * update
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_loads_and_computes_what_the_average_of_the_merged_weights_would(self) -> None:
        weights, members = (0.7, 0.3), []
        dense = make_model("qwen2").eval()
        for weight, seed in zip(weights, (1, 2), strict=True):
            model = make_model("qwen2")
            apply_lora(model, config_of("bias_lora_only", "qwen2", rank=seed + 1))
            disturb(model, seed)
            members.append((lora_state_dict(model), config_of("bias_lora_only", "qwen2", rank=seed + 1), weight))
            merge(model)
            remove_lora(model)
            with torch.no_grad():
                for name, parameter in dense.named_parameters():
                    start = make_model("qwen2").get_parameter(name)
                    parameter.add_(weight * (model.get_parameter(name) - start))
        state, config = average_adapters(members)
        model = make_model("qwen2").eval()
        apply_lora(model, config)
        load_lora_state_dict(model, state)
        torch.testing.assert_close(output(model), output(dense), rtol=1e-4, atol=1e-5)

    def test_truncation_is_the_best_of_its_rank(self) -> None:
        members = [(random_adapter(c, ("q", "k"), i), c, 1.0) for i, c in enumerate((LoRAConfig(4), LoRAConfig(4)))]
        exact, exact_config = average_adapters(members)
        state, config = average_adapters(members, rank=3)
        assert config.rank == 3
        assert state["q.lora_A"].shape == (3, 6)
        for name, update in updates(exact, exact_config).items():
            U, S, V = torch.linalg.svd(update, full_matrices=False)
            torch.testing.assert_close(updates(state, config)[name], (U[:, :3] * S[:3]) @ V[:3], rtol=1e-4, atol=1e-5)
        whole, whole_config = truncate_rank(exact, exact_config, 8)  # more than the 6 singular values there are
        assert whole["q.lora_A"].shape == (8, 6)
        torch.testing.assert_close(updates(whole, whole_config), updates(exact, exact_config), rtol=1e-5, atol=1e-6)

    def test_refusals_are_one_line(self) -> None:
        config = LoRAConfig(2)
        state = random_adapter(config, ("q",), 0)
        dora = LoRAConfig(2, dora=True)
        other_base = {"q.lora_A": torch.zeros(2, 7), "q.lora_B": torch.zeros(9, 2)}
        biased = LoRAConfig(2, train_bias="all")
        for members, message in (
            ([(state, config, -1.0)], "at least 0 and not all 0, not -1"),
            ([(state, config, 0.0)], "not all 0"),
            ([(state, config, float("nan"))], "not nan"),
            ([], "not none"),
            ([(random_adapter(dora, ("q",), 0), dora, 1.0)], "DoRA"),
            ([(state, config, 1.0), (other_base, config, 1.0)], "q is 9 x 6 and 9 x 7: .* different base models"),
            ([(state, config, 1.0), (random_adapter(biased, ("q",), 0), biased, 1.0)], "biases"),
        ):
            with pytest.raises(UserError, match=message) as caught:
                average_adapters(members)  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)
        for rank in (0, 3):
            with pytest.raises(UserError, match=f"has rank 2; give a rank between 1 and that, not {rank}"):
                average_adapters([(state, config, 1.0)], rank=rank)


class TestExpandRank:
    @every_variant
    @every_family
    @pytest.mark.parametrize("new_rank", [8, 11])
    def test_the_function_stays_and_the_new_part_learns(self, variant: str, family: str, new_rank: int) -> None:
        model = adapted(variant, family)
        state, config = expand_rank(lora_state_dict(model), config_of(variant, family), new_rank)
        assert config == config_of(variant, family, rank=new_rank)
        larger = make_model(family).eval()
        apply_lora(larger, config)
        load_lora_state_dict(larger, state)
        torch.testing.assert_close(output(larger), output(model), rtol=1e-5, atol=1e-5)
        output(larger).square().mean().backward()
        for layer in [layer for layer in lora.lora_layers(larger).values() if layer.lora_B]:  # not biases alone
            gradient = layer.lora_B["default"].grad
            assert gradient is not None
            assert gradient[:, 4:].abs().sum() > 0
            assert layer.lora_A["default"][4:].abs().sum() > 0

    def test_doubling_the_rank_changes_no_bit_of_the_update(self) -> None:
        config = LoRAConfig(8)
        state = random_adapter(config, ("q", "k"), 0)
        before = {name: tensor.clone() for name, tensor in state.items()}
        larger, new_config = expand_rank(state, config, 16)
        for name in ("q", "k"):
            assert torch.equal(
                config.scaling * state[f"{name}.lora_B"], new_config.scaling * larger[f"{name}.lora_B"][:, :8]
            )
            assert torch.equal(state[f"{name}.lora_A"], larger[f"{name}.lora_A"][:8])
            assert not larger[f"{name}.lora_B"][:, 8:].any()
            assert larger[f"{name}.lora_A"][8:].abs().max() <= 6**-0.5
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())  # arguments are left alone
        again, _ = expand_rank(state, config, 16)
        assert all(torch.equal(again[name], tensor) for name, tensor in larger.items())  # seeded

    @pytest.mark.parametrize("rank", [8, 4])
    def test_a_rank_that_is_not_larger_is_refused(self, rank: int) -> None:
        with pytest.raises(UserError, match=f"has rank 8; give a larger one to expand it to, not {rank}"):
            expand_rank({}, LoRAConfig(8), rank)


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    """PEFT remarks on Conv1D and on models without a name; neither matters here."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield
