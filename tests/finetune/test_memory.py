"""The memory that a run is told to take: exact where it counts, near what is measured where it estimates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from price_tables import random_prices
from tuned_models import CPU, LORA, built, spec_of

from stocklora.base_models.loading import BaseModel, load_backbone
from stocklora.base_models.memory import free_memory_mb
from stocklora.cli.console import UserError
from stocklora.dataset.prepare import prepare
from stocklora.finetune.fit import finetune
from stocklora.finetune.memory import cost_of, setup_of, shape_of, warn_if_too_large
from stocklora.finetune.optimization import Optimization, standardize_head
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.batches import KeptStates, predict
from stocklora.forecaster.forecaster import build_forecaster
from stocklora.runtime.distributed import Alone


@pytest.fixture(scope="module")
def prices() -> dict[str, Any]:
    return {"AAA": random_prices(120, 1), "BBB": random_prices(90, 2)}


@pytest.mark.parametrize("method", ["lora", "peft", "full", "head"])
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_plan_counts_what_is_there(tiny_models, prices, method, quantization, family) -> None:
    if method == "full" and quantization != "none":
        pytest.skip("no such run")
    model = tiny_models[family]
    settings = TrainLoraSettings(model_path=model, method=method, quantization=quantization, lora_rank=2)
    forecaster = built(spec_of(model, method, quantization), model, torch.bfloat16)
    examples = forecaster.packed_examples(prices, {"AAA": range(40, 80)})
    shape = shape_of(settings)
    cost = cost_of(shape, setup_of(settings, shape, examples, torch.bfloat16, CPU))
    assert cost.trainable == sum(p.numel() for p in forecaster.model.parameters() if p.requires_grad)
    base = load_backbone(model, torch.float32)
    assert shape.parameters == sum(parameter.numel() for parameter in base.parameters())
    stored = 0.0
    for module in forecaster.model.backbone.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            stored += parameter.numel() * parameter.element_size()
            if (state := getattr(parameter, "quant_state", None)) is not None:
                stored += state.absmax.numel() * state.absmax.element_size()
    assert cost.weights_mb == pytest.approx(stored / 1e6, rel=0.03)


def test_the_plan_knows_that_some_layers_alone_train(tiny_model, prices) -> None:
    settings = TrainLoraSettings(model_path=tiny_model, lora_rank=2, adapt_layers=1)
    spec = dataclasses.replace(spec_of(tiny_model, "lora"), adapt_layers=1)
    forecaster = built(spec, tiny_model, torch.bfloat16, probe=True)
    examples = forecaster.packed_examples(prices, {"AAA": range(40, 80)})
    shape = shape_of(settings)
    setup = setup_of(settings, shape, examples, torch.bfloat16, CPU)
    cost = cost_of(shape, setup)
    assert cost.trainable == sum(p.numel() for p in forecaster.model.parameters() if p.requires_grad)
    deep = dataclasses.replace(shape, layers=30)
    few, all_layers = (cost_of(deep, dataclasses.replace(setup, adapt_layers=count)) for count in (8, None))
    kept_mb = 2 * shape.hidden * sum(len(example.encoded.input_ids) for example in examples) / 1e6
    assert few.activations_mb - kept_mb == pytest.approx(9.5 / 31.5 * all_layers.activations_mb, rel=0.3)
    with pytest.raises(UserError, match="--adapt_layers 3: 2 layers of the base model are used"):
        shape_of(dataclasses.replace(settings, adapt_layers=3))


def test_the_plan_tells_wrong_targets_before_any_weight_is_read(tiny_model) -> None:
    with pytest.raises(UserError, match="nonsense"):
        shape_of(TrainLoraSettings(model_path=tiny_model, target_modules=["nonsense"]))


def test_a_run_that_will_not_fit_is_warned_of_with_one_that_does(tiny_model, prices, monkeypatch, capsys) -> None:
    settings = TrainLoraSettings(model_path=tiny_model, batch_size=8)
    examples = built(spec_of(tiny_model, "lora"), tiny_model).packed_examples(prices, {"AAA": range(40, 80)})
    shape = shape_of(settings)
    shape = dataclasses.replace(shape, hidden=4096, inner=11008, layers=32)  # a 7B's activations
    setup = setup_of(settings, shape, examples, torch.bfloat16, CPU)
    needed = cost_of(shape, setup).total_mb
    monkeypatch.setattr("stocklora.base_models.memory.free_memory_mb", lambda device: 2 * needed)
    warn_if_too_large(shape, setup, CPU)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("stocklora.base_models.memory.free_memory_mb", lambda device: 0.6 * needed)
    warn_if_too_large(shape, setup, CPU)
    words = capsys.readouterr().err
    assert f"is expected to take {needed:,.0f} MB, and about {0.6 * needed:,.0f} MB are free" in words
    assert "Expected to fit, with" in words
    assert "--max_tokens_per_batch 1" in words
    monkeypatch.setattr("stocklora.base_models.memory.free_memory_mb", lambda device: 10.0)
    warn_if_too_large(shape, setup, CPU)
    assert "Use a smaller base model" in capsys.readouterr().err


def test_training_shows_the_plan_and_warns(tiny_model, prices, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("stocklora.base_models.memory.free_memory_mb", lambda device: 500.0)
    settings = TrainLoraSettings(
        model_path=tiny_model, window_size=20, epochs=0, device="cpu", scale="ewma", save_dir=tmp_path, method="peft",
        quantization="4bit",
    )  # fmt: skip
    run = finetune(prices, settings)
    printed = capsys.readouterr()
    assert "warning: this run is expected to take" in printed.err
    rows = {line.split("  ")[0].strip(): line.split() for line in printed.out.splitlines() if "--method" in line}
    assert rows.keys() == {
        "this run: --method peft --quantization 4bit", "--method head", "--method peft",
        "--method peft --gradient_checkpointing", "--method peft --quantization 8bit", "--method full",
    }  # fmt: skip
    trainable = sum(p.numel() for p in run.forecaster.model.parameters() if p.requires_grad)
    own = rows["this run: --method peft --quantization 4bit"]
    own = own[own.index("4bit") + 1 :]
    assert own[0] == f"{trainable:,}"  # at the default rank
    assert float(own[-1].replace(",", "")) == pytest.approx(sum(float(x.replace(",", "")) for x in own[1:-1]), abs=3)
    assert f"memory expected     about {own[-1]} MB" in printed.out


def test_free_memory_is_at_most_what_the_machine_has() -> None:
    import psutil

    free = free_memory_mb(CPU)
    assert free is not None
    assert 100 < free <= psutil.virtual_memory().total / 1e6


def _peak_mb(settings: TrainLoraSettings, dtype: torch.dtype, queue: Any) -> None:
    """A training epoch and a forecast in this process: how far its memory grew, and the plan's figures."""

    def status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6

    torch.set_num_threads(1)
    table = {"A": random_prices(160, 1)}  # two training sequences
    data = prepare(table, 30, 3)
    fields = {} if settings.method in ("full", "head") else {**LORA, "rank": 8, "dora": settings.use_dora}
    spec = dataclasses.replace(
        spec_of(settings.model_path, settings.method, settings.quantization), window_size=30, lora=fields,
        targets_per_sequence=50,
    )  # fmt: skip
    base = BaseModel(settings.model_path)
    assert base.tokenizer  # read before memory is measured
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")
    forecaster = build_forecaster(spec, base, CPU, dtype)
    examples = forecaster.packed_examples(table, {"A": data.origins["A"]["train"]})
    if settings.gradient_checkpointing:
        forecaster.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    frozen = KeptStates(forecaster.model) if settings.method == "head" else None
    standardize_head(forecaster.model, examples, CPU, frozen)
    optimization = Optimization(forecaster.model, examples, data.levels, settings, Alone(CPU), frozen)
    copies = [optimization.trained()]
    assert len(list(optimization.epoch(1))) == 2  # the second finds the optimizer's moments there
    copies.append(optimization.trained())
    predict(forecaster.model, examples, CPU, states=frozen)
    shape = shape_of(settings)
    cost = cost_of(shape, setup_of(settings, shape, examples, dtype, CPU))
    queue.put((status("VmHWM:") - before, cost.total_mb - cost.program_mb))


@pytest.fixture(scope="module")
def middling_model(tmp_path_factory) -> Path:
    """Large enough for its activations and weights to stand out from the program, small enough to train here."""
    from tiny_models import make_tokenizer
    from transformers import Qwen3Config, Qwen3Model

    folder = tmp_path_factory.mktemp("middling")
    make_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=40000, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=48, max_position_embeddings=4096,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be reset on Linux alone")
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({}, torch.float32),
        ({"method": "full"}, torch.bfloat16),
        ({"gradient_checkpointing": True}, torch.float32),  # bfloat16 takes half a minute on many processors
        ({"quantization": "4bit"}, torch.float32),
        ({"method": "peft", "use_dora": True}, torch.float32),
    ],
    ids=str,
)
def test_the_plan_is_within_a_factor_of_what_is_measured(tiny_model, middling_model, nursery, flags, dtype) -> None:
    measured = []
    for model in (tiny_model, middling_model):
        settings = TrainLoraSettings(model_path=model, batch_size=1, epochs=1, **flags)
        queue = nursery.Queue()
        process = nursery.Process(target=_peak_mb, args=(settings, dtype, queue))
        process.start()
        measured.append(queue.get(timeout=60))
        process.join()
    (program_mb, _), (peak_mb, planned_mb) = measured
    grown_mb = peak_mb - program_mb  # what the larger model took more
    assert 0.5 < planned_mb / grown_mb < 2.0
