"""The first layers read once and the last trained on what they gave: the whole model to the last bit, or one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_family
from price_tables import random_prices
from tuned_models import built, spec_of

from stocklora.base_models.loading import load_backbone
from stocklora.base_models.split import inside_last_layers, split_form
from stocklora.cli.console import UserError
from stocklora.forecaster.batches import KeptStates, collate

# What they do around their layers: nothing; norms of queries; learned positions; embeddings scaled inside and outside
# the table, and windows of attention in some layers; multiplied embeddings; tuples from layers.
FAMILIES = ("Llama 3", "Qwen 3", "GPT-2", "Gemma", "Gemma 3 (text)", "Granite", "Pythia", "BLOOM")
FOUR_LAYERS = {"GPT-2": {"n_layer": 4}, "BLOOM": {"n_layer": 4}, "Gemma 3 (text)": {
    "num_hidden_layers": 4, "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    changes: dict[str, Any] = {name: FOUR_LAYERS.get(name, {"num_hidden_layers": 4}) for name in FAMILIES}
    return {name: make_family(name, root / str(index), **changes[name]) for index, name in enumerate(FAMILIES)}


def trained_gradients(forecaster: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Quantiles of a training pass, and the gradients of all that trains."""
    model = forecaster.model.train()
    model.zero_grad()
    torch.nn.init.normal_(model.head.linear.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    quantiles = model(batch.input_ids, batch.origin_tokens, batch.scale, batch.states)
    (quantiles * torch.linspace(-1, 1, quantiles.shape[-1])).sum().backward()
    return quantiles.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both_ways(folder: Path, adapt_layers: int, examples: int = 1, **options: Any) -> tuple[Any, Any, Any]:
    """A forecaster, and a training pass over a batch by the whole model and by the last layers alone."""
    changes = {key: options.pop(key) for key in ("backbone_layers",) if key in options}
    dtype = options.pop("dtype", torch.float32)
    spec = dataclasses.replace(
        spec_of(folder, options.pop("method", "lora"), options.pop("quantization", "none"), **options),
        adapt_layers=adapt_layers, **changes,
    )  # fmt: skip
    forecaster = built(spec, folder, dtype, probe=True)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in forecaster.model.backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    rows = forecaster.packed_examples({"AAA": random_prices(60, 1)}, {"AAA": range(40, 47)})[:examples]
    kept = KeptStates(forecaster.model)
    batches = collate(rows), collate(rows, kept)
    assert kept.passes == len(rows)
    return forecaster, *(trained_gradients(forecaster, batch) for batch in batches)


def assert_same_bits(whole: Any, parts: Any) -> None:
    assert torch.equal(whole[0], parts[0])
    assert whole[1].keys() == parts[1].keys()
    for name, gradient in whole[1].items():
        assert torch.equal(gradient, parts[1][name]), name


@pytest.mark.parametrize("adapt_layers", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantiles_and_gradients_are_the_whole_models_bit_for_bit(folders, family, adapt_layers) -> None:
    forecaster, whole, parts = both_ways(folders[family], adapt_layers)
    assert forecaster.model.frozen_layers == 4 - adapt_layers
    blocks = {name.split(".lora_")[0] for name in whole[1] if ".lora_" in name}
    assert blocks  # adapters there, and in no layer before
    assert all(int(next(part for part in name.split(".") if part.isdigit())) >= 4 - adapt_layers for name in blocks)
    assert_same_bits(whole, parts)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "peft"},
        {"method": "peft", "quantization": "4bit"},
        {"quantization": "8bit", "dtype": torch.bfloat16},
        {"quantization": "4bit", "init": "pissa"},
        {"dora": True, "dtype": torch.bfloat16},
        {"backbone_layers": 3},
        {"target_modules": ["q_proj", "layers.3.mlp.down_proj"]},
    ],
    ids=str,
)
def test_whatever_trains_there_and_over_whatever(folders, options) -> None:
    forecaster, whole, parts = both_ways(folders["Qwen 3"], 2, **options)
    assert forecaster.model.frozen_layers == options.get("backbone_layers", 4) - 2
    assert_same_bits(whole, parts)


def test_rows_of_other_lengths_see_nothing_of_their_padding(folders) -> None:
    _, whole, parts = both_ways(folders["Llama 3"], 2, examples=2)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-6)  # products of more rows round otherwise
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_checkpointing_and_other_forwards_stay_as_they_were(folders) -> None:
    forecaster, whole, _ = both_ways(folders["Qwen 3"], 2)
    backbone = forecaster.model.backbone
    before = [vars(block).get("forward") for block in backbone.layers]
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
    example = forecaster.packed_examples({"AAA": random_prices(60, 1)}, {"AAA": range(40, 47)})[:1]
    parts = trained_gradients(forecaster, collate(example, KeptStates(forecaster.model)))
    assert_same_bits(whole, parts)
    assert [vars(block).get("forward") for block in backbone.layers] == before


def test_what_cannot_be_split_is_one_line(folders, tmp_path) -> None:
    backbone = load_backbone(folders["Qwen 3"], torch.float32)
    names = [name for name, _ in backbone.named_modules() if name.endswith("_proj")]
    with pytest.raises(UserError, match="--adapt_layers 5: 4 layers of the base model are used; give at most 4"):
        inside_last_layers(backbone, names, 5)
    with pytest.raises(UserError, match=r"names no layer inside the last 2 \(--adapt_layers\), such as layers.0.mlp"):
        inside_last_layers(backbone, ["layers.0.mlp.up_proj"], 2)
    several = load_backbone(make_family("Gemma 3n (text)", tmp_path / "gemma"), torch.float32)
    with pytest.raises(UserError, match=r"Gemma3nTextModel cannot be read in two parts \(what passes .*leave the flag"):
        split_form(several, 3)
    first: list[torch.Tensor] = []
    backbone.layers[0].register_forward_hook(lambda module, inputs, output: first.append(output))
    backbone.layers[3].register_forward_hook(lambda module, inputs, output: output + first[-1])
    with pytest.raises(UserError, match="need more of the first than their output"):
        split_form(backbone, 2)
