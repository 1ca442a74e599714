"""The model's promises: starts at the random walk, never looks ahead, quantiles never cross."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_model import QuantileHead, StockForecaster, facts_of, pinball_sum
from stocklora.base_models.loading import backbone_config, is_causal, load_backbone
from stocklora.metrics.scores import QUANTILE_LEVELS, pinball_loss

FAMILIES = ["qwen3", "llama", "gpt2"]
TABLE = torch.tensor(
    [[-1.6, -1.2, -0.6, -0.2, 0.01, 0.2, 0.7, 1.3, 1.8], [-1.5, -1.1, -0.5, -0.1, 0.03, 0.3, 0.7, 1.2, 1.7]],
    dtype=torch.float64,
)


def forecaster(folder, dtype=torch.float32):
    torch.manual_seed(0)
    return StockForecaster(load_backbone(folder, dtype), TABLE).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_it_is_the_scaled_table_whatever_it_reads(tiny_models, family, dtype):
    model = forecaster(tiny_models[family], dtype)
    ids = torch.randint(0, 200, (2, 50))
    scale = torch.rand(2, 3, 2) * 0.02 + 0.001
    quantiles = model(ids, torch.tensor([[5, 20, 49], [1, 2, 3]]), scale)
    assert quantiles.shape == (2, 3, 2, 9)
    assert quantiles.dtype == torch.float32
    torch.testing.assert_close(quantiles, (scale[..., None] * TABLE.float()).expand_as(quantiles), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_and_padding_never_move_a_forecast(tiny_models, family):
    model = forecaster(tiny_models[family])
    torch.nn.init.normal_(model.head.linear.weight)
    ids = torch.randint(0, 200, (1, 60))
    at, scale = torch.tensor([[10, 29]]), torch.full((1, 2, 2), 0.02)
    before = model(ids, at, scale)
    changed = ids.clone()
    changed[0, 30:] = torch.randint(0, 200, (30,))
    assert torch.equal(before, model(changed, at, scale))  # bit for bit
    changed[0, 20] += 1
    assert not torch.equal(before, model(changed, at, scale))  # and the test can fail


@given(st.lists(st.floats(-50, 50), min_size=18, max_size=18))
def test_quantiles_never_cross_whatever_the_head_says(outputs):
    head = QuantileHead(4, TABLE)
    with torch.no_grad():
        head.linear.bias.copy_(torch.tensor(outputs))
    assert bool((head(torch.randn(3, 4)).diff(dim=-1) >= 0).all())


def test_a_table_that_does_not_increase_is_refused():
    with pytest.raises(ValueError, match="strictly increasing"):
        QuantileHead(4, torch.zeros(3, 9))


def test_training_moves_head_and_backbone_but_only_through_the_head(tiny_model):
    model = forecaster(tiny_model).train()
    model.backbone.requires_grad_(True)
    model(torch.randint(0, 200, (1, 20)), torch.tensor([[19]]), torch.ones(1, 1, 2)).sum().backward()
    assert model.head.linear.bias.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.backbone.parameters())  # weight is zero
    torch.nn.init.normal_(model.head.linear.weight)
    model(torch.randint(0, 200, (1, 20)), torch.tensor([[19]]), torch.ones(1, 1, 2)).sum().backward()
    assert sum(p.grad.abs().sum() for p in model.backbone.parameters()) > 0


def test_torch_loss_is_the_reports_pinball_loss_in_units_of_the_scale():
    draw = np.random.default_rng(0)
    levels = np.array(QUANTILE_LEVELS)
    returns = draw.standard_normal((2, 3, 2))
    quantiles = np.sort(draw.standard_normal((2, 3, 2, 9)), axis=-1)
    scale = draw.uniform(0.5, 2.0, (2, 3, 2))
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (quantiles, returns, scale, levels, mask)]
    expected = pinball_loss(returns / scale, quantiles / scale[..., None], levels).mean(-1)[mask == 1].sum()
    assert float(pinball_sum(*tensors)) == pytest.approx(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_alone_are_the_full_models_first_layers(tiny_models, family):
    full, half = load_backbone(tiny_models[family], torch.float32), load_backbone(tiny_models[family], torch.float32, 1)
    ids = torch.randint(0, 200, (1, 20))
    states = full(input_ids=ids, output_hidden_states=True).hidden_states
    halfway = half(input_ids=ids, output_hidden_states=True).hidden_states
    norm = full.ln_f if family == "gpt2" else full.norm
    torch.testing.assert_close(halfway[-1], norm(states[1]))
    assert sum(p.numel() for p in half.parameters()) < sum(p.numel() for p in full.parameters())
    with pytest.raises(ValueError, match="has 2 layers"):
        load_backbone(tiny_models[family], torch.float32, 3)


def test_facts_come_from_the_configuration_alone(tiny_models):
    facts = facts_of(backbone_config(tiny_models["gpt2"]))
    assert (facts.hidden_size, facts.layers, facts.context_tokens) == (32, 2, 1024)


def test_an_encoder_that_sees_the_future_is_told_apart(tiny_models):
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    assert not is_causal(BertModel(BertConfig(**shape, vocab_size=284)))
    for folder in tiny_models.values():
        for dtype in (torch.float32, torch.bfloat16):
            assert is_causal(load_backbone(folder, dtype))


def test_the_frozen_base_has_no_dropout(tiny_models):
    model = forecaster(tiny_models["gpt2"]).train()  # GPT-2's configuration asks for 0.1
    torch.nn.init.normal_(model.head.linear.weight)
    ids, at, scale = torch.randint(0, 200, (1, 20)), torch.tensor([[19]]), torch.ones(1, 1, 2)
    assert torch.equal(model(ids, at, scale), model(ids, at, scale))
    assert not any(p.requires_grad for p in model.backbone.parameters())
