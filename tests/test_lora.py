"""What lora.py promises: the formula, a base that never changes unasked, exact round trips, errors that name names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_models import FAMILIES, make_model, output, randomize, tokens
from torch import Tensor, nn

import lora
import stocklora.adapters.layer as adapters
from lora import (
    LoRAConfig,
    LoRAError,
    adapters_disabled,
    apply_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge,
    unmerge,
)
from stocklora.adapters.files import load_lora, save_lora


@pytest.fixture(scope="module", autouse=True, params=["lora.py", "stocklora.adapters"])
def _both_layers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every promise is kept by the layer that one reads and by the one that computes every variant, with its kernel."""
    here, plain = globals(), (LoRAConfig, apply_lora)
    if request.param == "stocklora.adapters":
        here["LoRAConfig"], here["apply_lora"] = adapters.AdapterConfig, adapters.apply_lora
    yield
    here["LoRAConfig"], here["apply_lora"] = plain


def adapted(family: str = "llama", config: LoRAConfig | None = None, seed: int = 1) -> nn.Module:
    model = make_model(family)
    apply_lora(model, config or LoRAConfig(rank=3, alpha=6))
    randomize(model, seed)
    return model.eval()


def linear_and_input(dtype: torch.dtype = torch.float32, **settings: object) -> tuple[nn.Module, Tensor]:
    """One adapted layer inside a container, and an input for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7)).to(dtype)
    apply_lora(model, LoRAConfig(**{"rank": 2, "alpha": 3.0, **settings}))  # type: ignore[arg-type]
    randomize(model)
    return model, torch.randn(4, 3, 5, dtype=dtype)


class TestConfig:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"rank": 0},
            {"rank": 2.0},
            {"rank": True},
            {"alpha": 0},
            {"alpha": float("nan")},
            {"alpha": "16"},
            {"dropout": 1.0},
            {"dropout": -0.1},
            {"target_modules": []},
            {"target_modules": ""},
            {"target_modules": [3]},
            {"target_modules": 3},
        ],
    )
    def test_refuses_values_out_of_range_and_names_them(self, wrong: dict[str, object]) -> None:
        with pytest.raises(LoRAError, match=next(iter(wrong))):
            LoRAConfig(**wrong)  # type: ignore[arg-type]


class TestFormula:
    def test_by_hand(self) -> None:
        model, x = linear_and_input()
        layer = model[0]
        A, B = lora_state_dict(model)["0.lora_A"], lora_state_dict(model)["0.lora_B"]
        W, bias = layer.weight, layer.bias
        torch.testing.assert_close(model(x), x @ W.T + bias + (3.0 / 2) * (x @ A.T) @ B.T)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("head", [True, False])
    def test_adapted_model_starts_equal_to_the_base(self, family: str, head: bool) -> None:
        model = make_model(family, head=head).eval()
        before = output(model)
        names = apply_lora(model, LoRAConfig())
        assert len(names) == {"qwen3": 14, "llama": 14, "gpt2": 8}[family]
        torch.testing.assert_close(output(model), before, rtol=0, atol=1e-6)
        randomize(model)
        assert not torch.allclose(output(model), before, atol=1e-3)

    @given(
        rank=st.integers(1, 9),
        alpha=st.floats(0.1, 64),
        shape=st.lists(st.integers(1, 3), max_size=3),
        bias=st.booleans(),
        transposed=st.booleans(),
        contiguous=st.booleans(),
    )
    def test_value_and_gradients_equal_those_of_the_merged_weight(
        self, rank: int, alpha: float, shape: list[int], bias: bool, transposed: bool, contiguous: bool
    ) -> None:
        """For any shape of input: dense autograd through ``W + (alpha / rank) B A`` is the reference."""
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        base = Conv1D(7, 5) if transposed else nn.Linear(5, 7, bias=bias)
        model = nn.Sequential(base).double()
        apply_lora(model, LoRAConfig(rank, alpha))
        model.double()
        randomize(model)
        weight, offset = (base.weight.T if transposed else base.weight), base.bias
        x = torch.randn(*shape, 5, dtype=torch.float64)
        if not contiguous:
            x = torch.randn(*shape, 5, 2, dtype=torch.float64)[..., 0]
        x.requires_grad_()
        A, B = list(lora_parameters(model))
        ours = model(x)
        expected = nn.functional.linear(x, weight + (alpha / rank) * B @ A, offset)
        torch.testing.assert_close(ours, expected)
        pull = torch.randn_like(expected)
        for mine, reference in zip(
            torch.autograd.grad(ours, (x, A, B), pull), torch.autograd.grad(expected, (x, A, B), pull), strict=True
        ):
            torch.testing.assert_close(mine, reference)

    def test_first_and_second_derivatives(self) -> None:
        model, x = linear_and_input()
        model.double()
        x = x.double()[0].requires_grad_()
        A, B = list(lora_parameters(model))

        def value(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return torch.func.functional_call(model, {"0.lora_A.default": A, "0.lora_B.default": B}, x).tanh()

        torch.autograd.gradcheck(value, (x, A, B))
        torch.autograd.gradgradcheck(value, (x, A, B))

    def test_dropout_acts_on_the_adapter_alone_and_only_while_training(self) -> None:
        model, x = linear_and_input(dropout=0.5)
        model.eval()
        assert torch.equal(model(x), model(x))
        torch.manual_seed(0)
        with adapters_disabled(model):
            base = model(x)
        model.train()
        draws = torch.stack([model(x) for _ in range(3000)])
        assert not torch.equal(draws[0], draws[1])
        model.eval()
        torch.testing.assert_close(draws.mean(0), model(x), rtol=0.1, atol=0.1)
        model.train()
        with adapters_disabled(model):
            assert torch.equal(model(x), base)

    def test_checkpointing_and_compile_give_the_same_gradients(self) -> None:
        from torch.utils.checkpoint import checkpoint

        model, x = linear_and_input()
        x.requires_grad_()
        parameters = list(lora_parameters(model))

        def gradients(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(call(x).square().sum(), [x, *parameters])

        plain = gradients(model)
        for reentrant in (False, True):

            def checkpointed(x: Tensor, reentrant: bool = reentrant) -> Tensor:
                return checkpoint(model, x, use_reentrant=reentrant)

            if reentrant:  # this kind only supports .backward()
                checkpointed(x).square().sum().backward()
                again = (x.grad, *(parameter.grad for parameter in parameters))
            else:
                again = gradients(checkpointed)
            torch.testing.assert_close(again, plain)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradients(compiled), plain)

    def test_hooks_on_the_base_are_called(self) -> None:
        model, x = linear_and_input()
        before, seen = model(x), []
        model[0].base.register_forward_hook(lambda *_: seen.append(True))
        torch.testing.assert_close(model(x), before)
        assert seen

    def test_a_base_that_is_unfrozen_again_gets_its_gradient(self) -> None:
        model, x = linear_and_input()
        model[0].base.weight.requires_grad_()
        model(x).sum().backward()
        assert model[0].base.weight.grad is not None


class TestTraining:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_only_the_adapters_learn(self, family: str) -> None:
        model = make_model(family)
        apply_lora(model, LoRAConfig(rank=4, alpha=8))
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        trained = list(lora_parameters(model))
        assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, parameter in model.named_parameters():
            if name in frozen:
                assert torch.equal(parameter, frozen[name]), name

    def test_bf16_base_keeps_fp32_adapters(self) -> None:
        model, x = linear_and_input(torch.bfloat16)
        y = model(x)
        assert y.dtype is torch.bfloat16
        y.float().sum().backward()
        for parameter in lora_parameters(model):
            assert parameter.dtype is torch.float32
            assert parameter.grad is not None
            assert parameter.grad.dtype is torch.float32
        exact, _ = linear_and_input()
        exact[0].base.weight.data.copy_(model[0].base.weight)
        exact[0].base.bias.data.copy_(model[0].base.bias)
        torch.testing.assert_close(y.float(), exact(x.float()), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_autocast_gives_its_own_dtype_and_close_gradients(self, base_dtype: torch.dtype, dropout: float) -> None:
        model, x = linear_and_input(base_dtype, dropout=dropout)
        model.eval()
        x = x.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype is torch.bfloat16
        got = torch.autograd.grad(y.float().square().sum(), [x, *lora_parameters(model)])
        model.float()
        want = torch.autograd.grad(model(x).square().sum(), [x, *lora_parameters(model)])
        for mine, reference in zip(got, want, strict=True):
            assert mine.dtype is torch.float32
            torch.testing.assert_close(mine, reference, rtol=5e-2, atol=5e-2 * float(reference.abs().max()))

    def test_input_of_another_type_than_the_base_fails_as_a_plain_layer_does(self) -> None:
        model, x = linear_and_input(torch.bfloat16)
        with pytest.raises(RuntimeError, match="dtype"):
            model(x.float())


class TestQuantized:
    @staticmethod
    def quantized(kind: str) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        if LoRAConfig is not adapters.AdapterConfig:
            pytest.skip("quantized bases are for stocklora.adapters, which keeps them from repacking their weights")
        torch.manual_seed(0)
        if kind == "nf4":
            layer = bnb.nn.Linear4bit(64, 128, bias=True, quant_type="nf4", compute_dtype=torch.float32)
        else:
            layer = bnb.nn.Linear8bitLt(64, 128, bias=True, has_fp16_weights=False)
        return nn.Sequential(layer).to("cpu")

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_trains_and_leaves_the_base_alone(self, kind: str, autocast: bool) -> None:
        model = self.quantized(kind)
        x = torch.randn(3, 6, 64)
        reference = model(x).detach()
        stored = model[0].weight.data.clone()
        assert apply_lora(model, LoRAConfig(rank=4, alpha=8)) == ["0"]
        torch.testing.assert_close(model(x), reference)
        randomize(model)
        x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(x).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora_parameters(model))
        assert x.grad is not None
        torch.optim.SGD(lora_parameters(model), lr=0.1).step()
        assert torch.equal(model[0].weight.data, stored)
        with adapters_disabled(model):
            torch.testing.assert_close(model(x).detach(), reference)

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_merging_is_refused_and_says_what_to_do(self, kind: str) -> None:
        model = self.quantized(kind)
        apply_lora(model, LoRAConfig())
        with pytest.raises(LoRAError, match="quantized .* load the base model unquantized and merge into that"):
            merge(model)
        assert not model[0].merged

    def test_adapter_trained_on_nf4_loads_onto_the_unquantized_base(self, tmp_path: Path) -> None:
        model = self.quantized("nf4")
        apply_lora(model, LoRAConfig())
        randomize(model)
        save_lora(model, tmp_path / "a.pth")
        plain = nn.Sequential(nn.Linear(64, 128))
        load_lora(plain, tmp_path / "a.pth")
        merge(plain)


class TestTargets:
    def test_all_linear_leaves_the_output_head_out(self) -> None:
        names = apply_lora(make_model("qwen3"), LoRAConfig())
        assert "lm_head" not in names
        assert {name.rpartition(".")[2] for name in names} == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        }

    @pytest.mark.parametrize(
        ("target", "count"),
        [("q_proj", 2), ("self_attn.q_proj", 2), ("model.layers.1.self_attn.q_proj", 1), ("lm_head", 1)],
    )
    def test_names_match_whole_or_from_a_dot_on(self, target: str, count: int) -> None:
        assert len(apply_lora(make_model(), LoRAConfig(target_modules=target))) == count

    @pytest.mark.parametrize("target", ["proj", "_proj", "attn.q_proj", "q_porj", "layers", "0"])
    def test_one_wrong_name_among_right_ones_is_an_error_that_lists_what_exists(self, target: str) -> None:
        model = make_model()
        with pytest.raises(LoRAError, match=f"{target!r} .*end in: down_proj, gate_proj, k_proj"):
            apply_lora(model, LoRAConfig(target_modules=("q_proj", target)))
        assert not lora.lora_layers(model)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_the_nearest_name_is_offered(self) -> None:
        with pytest.raises(LoRAError, match="did you mean 'q_proj'"):
            apply_lora(make_model(), LoRAConfig(target_modules="q_porj"))

    def test_something_that_is_no_linear_layer_is_called_what_it_is(self) -> None:
        with pytest.raises(LoRAError, match="is a LlamaRMSNorm, not a linear layer"):
            apply_lora(make_model(), LoRAConfig(target_modules="input_layernorm"))

    def test_a_full_name_means_one_layer(self) -> None:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
        assert apply_lora(model, LoRAConfig(target_modules="a")) == ["a"]

    def test_a_model_without_linear_layers_is_an_error(self) -> None:
        with pytest.raises(LoRAError, match="no linear layer"):
            apply_lora(nn.Sequential(nn.ReLU()), LoRAConfig())

    def test_applying_twice_is_an_error(self) -> None:
        model = make_model()
        apply_lora(model, LoRAConfig(target_modules="q_proj"))
        with pytest.raises(LoRAError, match="'default' is already on 2 layers"):
            apply_lora(model, LoRAConfig(target_modules="v_proj"))

    @pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "with space"])
    def test_names_that_cannot_be_stored_are_refused(self, name: str) -> None:
        with pytest.raises(LoRAError, match="cannot name an adapter"):
            apply_lora(make_model(), LoRAConfig(), adapter=name)


class TestAdapters:
    def test_several_on_one_base_switch_and_train_apart(self) -> None:
        model = make_model().eval()
        base = output(model)
        outputs = {}
        for seed, (name, target) in enumerate({"first": "q_proj", "second": ("q_proj", "down_proj")}.items()):
            apply_lora(model, LoRAConfig(rank=2 + seed, target_modules=target), adapter=name)
            randomize(model, seed)
            outputs[name] = output(model)
        assert lora.adapter_names(model) == ["first", "second"]
        assert not torch.equal(outputs["first"], outputs["second"])
        lora.set_adapter(model, "first")
        assert torch.equal(output(model), outputs["first"])
        assert [tuple(p.shape) for p in lora_parameters(model)] == [(2, 32), (32, 2)] * 2
        assert sum(p.requires_grad for p in model.parameters()) == 4
        assert set(lora_state_dict(model)) < set(lora_state_dict(model, "second"))
        with adapters_disabled(model):
            assert torch.equal(output(model), base)
        with pytest.raises(LoRAError, match="no adapter named 'third'; the model has: first, second"):
            lora.set_adapter(model, "third")

    @pytest.mark.parametrize("merged", [False, True])
    def test_disabled_is_the_base_and_survives_nesting_and_exceptions(self, merged: bool) -> None:
        model = make_model().eval()
        base = output(model)
        apply_lora(model, LoRAConfig(rank=3))
        randomize(model)
        if merged:
            merge(model)
        tuned = output(model)

        def fail() -> None:
            with adapters_disabled(model), adapters_disabled(model):
                assert torch.equal(output(model), base)
                raise KeyError("inside")

        with adapters_disabled(model):
            with pytest.raises(KeyError):
                fail()
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), tuned)
        with pytest.raises(KeyError):
            fail()
        assert torch.equal(output(model), tuned)

    def test_a_model_without_adapters_says_so(self) -> None:
        for call in (merge, lora_state_dict, lambda model: list(lora_parameters(model))):
            with pytest.raises(LoRAError, match="call apply_lora first"):
                call(make_model())  # type: ignore[operator]


class TestMerge:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_keeps_the_function_and_unmerge_restores_every_bit(self, family: str, dtype: torch.dtype) -> None:
        model = make_model(family).to(dtype)
        apply_lora(model, LoRAConfig(rank=3, alpha=6))
        randomize(model)
        model.eval()
        before = {name: p.clone() for name, p in model.named_parameters()}
        tuned = output(model)
        merge(model)
        once = {name: p.clone() for name, p in model.named_parameters()}
        merge(model)  # a second time changes nothing more
        assert all(torch.equal(p, once[name]) for name, p in model.named_parameters())
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        tolerance = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(output(model), tuned, rtol=tolerance, atol=tolerance)
        unmerge(model)
        unmerge(model)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert torch.equal(output(model), tuned)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
    def test_a_result_that_is_not_finite_touches_no_layer(self, value: float) -> None:
        model = adapted()
        last = list(lora.lora_layers(model).values())[-1]
        with torch.no_grad():
            last.lora_B["default"].fill_(value)
            last.lora_A["default"].fill_(100)
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(LoRAError, match=r"not finite into model.layers.1.mlp.down_proj"):
            merge(model)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name
        assert not any(layer.merged for layer in lora.lora_layers(model).values())

    def test_what_a_merged_model_refuses(self) -> None:
        model = adapted()
        apply_lora(model, LoRAConfig(), adapter="other")
        merge(model)
        for call in (
            lambda: lora.set_adapter(model, "default"),
            lambda: load_lora_state_dict(model, lora_state_dict(model)),
            lambda: apply_lora(model, LoRAConfig(), adapter="third"),
        ):
            with pytest.raises(LoRAError, match="call unmerge first"):
                call()
        with adapters_disabled(model), pytest.raises(LoRAError, match="inside adapters_disabled"):
            unmerge(model)
        unmerge(model)
        with adapters_disabled(model), pytest.raises(LoRAError, match="inside adapters_disabled"):
            merge(model)

    def test_a_weight_that_others_share_is_not_merged(self) -> None:
        model = make_model("qwen3")  # ties its head to its embeddings
        apply_lora(model, LoRAConfig(target_modules="lm_head"))
        with pytest.raises(LoRAError, match="lm_head is shared with another module"):
            merge(model)

    @pytest.mark.parametrize("merged", [True, False])
    def test_removal_gives_the_plain_model_back(self, merged: bool) -> None:
        plain = make_model().eval()
        model = adapted()
        expected = output(model) if merged else output(plain)
        if merged:
            merge(model)
        lora.remove_lora(model)
        assert list(model.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)


class TestState:
    def test_is_a_copy_on_the_cpu(self) -> None:
        model = adapted()
        state = lora_state_dict(model)
        assert set(state) == {f"{name}.lora_{part}" for name in lora.lora_layers(model) for part in "AB"}
        before = {name: tensor.clone() for name, tensor in state.items()}
        randomize(model, seed=5)
        assert all(torch.equal(state[name], before[name]) and not state[name].requires_grad for name in state)

    def test_loading_brings_the_function_back(self) -> None:
        trained, fresh = adapted(), adapted(seed=2)
        assert not torch.equal(output(fresh), output(trained))
        load_lora_state_dict(fresh, lora_state_dict(trained))
        assert torch.equal(output(fresh), output(trained))

    def test_every_fault_is_named_at_once_and_nothing_is_loaded(self) -> None:
        model = adapted()
        state = lora_state_dict(adapted(seed=9))
        key = "model.layers.0.self_attn.q_proj.lora_A"
        state["bogus"] = state.pop(key)
        state["model.layers.0.self_attn.k_proj.lora_A"] = torch.zeros(5, 32)
        before = lora_state_dict(model)
        with pytest.raises(LoRAError) as caught:
            load_lora_state_dict(model, state)
        message = str(caught.value)
        assert "missing " + key in message
        assert "unexpected bogus" in message
        assert "k_proj.lora_A is (5, 32), the model needs (3, 32)" in message
        assert "\n" not in message
        assert all(torch.equal(before[name], tensor) for name, tensor in lora_state_dict(model).items())
