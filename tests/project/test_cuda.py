"""What only a graphics card can show. The CPU's numbers, in float32, are what the card's are held against."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import user
from lora_models import make_model, randomize
from price_tables import random_prices
from sft_folders import info_of, instruction_rows
from tuned_models import VARIANTS, built, content_of, spec_of, unsettled

from lora import LoRAConfig, apply_lora, lora_parameters
from stocklora.adapters import layer
from stocklora.cli.console import UserError
from stocklora.finetune.fit import finetune
from stocklora.finetune.report import save_run
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.forecaster import load_forecaster
from stocklora.forecaster.weights import save_weights
from stocklora.instruct.chat.load import load_chat_model
from stocklora.instruct.sft.run import run_training
from stocklora.instruct.sft.settings import Resolved, SftSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
CARD, CPU = torch.device("cuda"), torch.device("cpu")
PRICES = {"AAA": random_prices(120, 1), "BBB": random_prices(90, 2)}


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """float32 products in float32, not in the card's shorter format."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def numbers(rows: list[dict[str, Any]]) -> list[float]:
    return [value for row in rows for value in row.values() if isinstance(value, float)]


# ---------------------------------------------------------------------------------------------------- forecasts


@pytest.mark.parametrize("variant", ["plain", "dora", "bias"])
def test_a_lora_layer_gives_the_cpus_outputs_and_gradients(variant: str) -> None:
    flags = {key: value for key, value in VARIANTS[variant].items() if key != "init"}
    results = []
    for device in (CPU, CARD):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8))
        apply_lora(model, LoRAConfig(rank=4, alpha=8.0, **flags))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        x = torch.randn(5, 24)
        model.to(device)
        loss = model(x.to(device)).square().sum()
        loss.backward()
        results.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 4
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_of_a_model_get_the_cpus_gradients(autocast: bool) -> None:
    """Their sums over rows are made in parts on a card, in one there."""
    model = make_model("qwen3", head=False)
    layer.apply_lora(model, layer.AdapterConfig(rank=3))
    randomize(model)
    ids = torch.arange(256).reshape(4, 64) % 61
    results = []
    for device in (CPU, CARD):
        model.to(device).zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            hidden = model(input_ids=ids.to(device), use_cache=False)[0]
        hidden.float().square().mean().backward()
        results.append(torch.cat([parameter.grad.cpu().flatten() for parameter in lora_parameters(model)]))
    assert float((results[1] - results[0]).norm() / results[0].norm()) < (0.05 if autocast else 1e-4)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("method", ["lora", "peft", "head"])
def test_a_file_forecasts_on_the_card_what_it_does_on_the_cpu(
    tiny_model: Path, tmp_path: Path, method: str, quantization: str
) -> None:
    path = tmp_path / "weights.pth"
    save_weights(path, content_of(unsettled(built(spec_of(tiny_model, method, quantization), tiny_model))))
    here, there = (
        numbers(load_forecaster(path, tiny_model, device, torch.float32)[0].forecast(PRICES)) for device in (CPU, CARD)
    )
    assert there == pytest.approx(here, rel=1e-4 if quantization == "none" else 2e-3)


FITS: list[dict[str, Any]] = [
    {}, {"method": "peft"}, {"method": "full", "learning_rate": 1e-3}, {"method": "head"},
    {"gradient_checkpointing": True}, {"use_dora": True}, {"compile": True},
    {"quantization": "8bit"}, {"quantization": "4bit"}, {"method": "peft", "quantization": "4bit"},
]  # fmt: skip


def fit_settings(model: Path, folder: Path, **flags: Any) -> TrainLoraSettings:
    return TrainLoraSettings(**{
        "model_path": model, "window_size": 20, "epochs": 2, "batch_size": 2, "targets_per_sequence": 20,
        "required_gain": 0.0, "scale": "ewma", "dtype": "float32", "learning_rate": 1e-2, "head_learning_rate": 1e-2,
        "save_dir": folder, "lora_dropout": 0.0, **flags,
    })  # fmt: skip


@pytest.mark.parametrize("flags", FITS, ids=str)
def test_training_takes_the_cpus_steps(tiny_model: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    histories = []
    for device in ("cpu", "cuda"):
        changes = {key: value for key, value in flags.items() if key != "compile" or device == "cuda"}
        run = finetune(PRICES, fit_settings(tiny_model, tmp_path / device, device=device, **changes))
        histories.append([row["validation_ratio"] for row in run.outcome.history])
    assert histories[1] == pytest.approx(histories[0], rel=5e-3)
    assert histories[1][0] != histories[1][-1]


@pytest.mark.parametrize("flags", [{}, {"quantization": "4bit"}, {"method": "full"}], ids=str)
def test_bfloat16_trains_and_its_file_is_read_on_the_cpu(
    tiny_model: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    rates = {"learning_rate": 1e-3, "head_learning_rate": 1e-3}
    settings = fit_settings(tiny_model, tmp_path, device="cuda", **rates | flags | {"dtype": "auto"})
    run = finetune(PRICES, settings)
    ratios = [row["validation_ratio"] for row in run.outcome.history]
    assert all(0.9 < ratio < 1.1 for ratio in ratios)
    assert ratios[0] != ratios[-1]
    run.outcome.best_epoch = 1
    save_run(run, settings)
    here, there = (
        numbers(load_forecaster(run.weights_path, tiny_model, device, torch.float32)[0].forecast(PRICES))
        for device in (CPU, CARD)
    )
    assert there == pytest.approx(here, rel=2e-3)


def test_a_run_goes_on_exactly_on_the_card(tiny_model: Path, tmp_path: Path) -> None:
    settings = fit_settings(
        tiny_model, tmp_path, device="cuda", lora_dropout=0.1, checkpoint_every=1, keep_checkpoints=True
    )

    def states() -> list[Path]:
        return sorted((tmp_path / "last").glob("state-*.pt"))

    def trained() -> dict[str, torch.Tensor]:
        parts = torch.load(states()[-1], weights_only=True)["optimization"]["trained"]
        return {**parts["adapters"], **parts["head"]}

    finetune(PRICES, settings)
    whole = trained()
    for path in (states()[1], states()[1].with_suffix(".json")):
        path.unlink()
    finetune(PRICES, dataclasses.replace(settings, resume=True))
    for name, tensor in trained().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- assistant


def tune(model: Path, folder: Path, **changes: Any) -> int:
    data = folder.parent / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in instruction_rows(60)]
    data.write_text("".join(lines), encoding="utf-8")
    settings = SftSettings(**{
        "model_path": model, "data_path": [data], "output_dir": folder, "use_lora": True, "lora_r": 8,
        "lora_dropout": 0.0, "learning_rate": 1e-2, "batch_size": 8, "gradient_accumulation_steps": 1, "num_epochs": 2,
        "dtype": "float32", "logging_steps": 1, **changes,
    })  # fmt: skip
    names = [field.name for field in dataclasses.fields(SftSettings)]
    return run_training(Resolved(settings, dict.fromkeys(names, "default")), "fine_tune_qwen.py")


METHODS: list[dict[str, Any]] = [
    {}, {"packing": True, "max_length": 300}, {"gradient_checkpointing": True}, {"use_lora": False},
    {"use_qlora": True, "quantization_bit": 8}, {"use_qlora": True},
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_tuning_takes_the_cpus_steps(tiny_model: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        assert tune(tiny_model, tmp_path / device, device=device, **method) == 0
        found = info_of(tmp_path / device)["losses"]
        losses.append([found["validation_start"], found["validation_best"]])
    quantized = "use_qlora" in method
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if quantized else 2e-3)
    assert losses[1][1] < losses[1][0] - 0.05


@pytest.mark.parametrize("method", [{}, {"use_qlora": True}, {"use_lora": False}], ids=["lora", "4bit", "full"])
@pytest.mark.parametrize("has_bfloat16", [True, False], ids=["bfloat16", "float16"])
def test_the_cards_own_number_format_learns(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, method: dict[str, Any]
) -> None:
    """float16 with a scaled loss is what a card before Ampere, such as a T4, trains adapters in."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: has_bfloat16)
    assert tune(tiny_model, tmp_path / "out", device="cuda", dtype="auto", num_epochs=3, **method) == 0
    info = info_of(tmp_path / "out")
    shorter = "bfloat16" if has_bfloat16 else ("float32" if method.get("use_lora") is False else "float16")
    assert info["dtype"] == shorter
    assert info["losses"]["validation_best"] < info["losses"]["validation_start"] - 0.1


def test_an_adapter_answers_on_the_cpu_as_on_the_card_it_was_tuned_on(tiny_model: Path, tmp_path: Path) -> None:
    assert tune(tiny_model, tmp_path / "out", device="cuda", num_epochs=6) == 0
    answers = []
    for device in ("cpu", "cuda"):
        chat = load_chat_model(tiny_model, {"tuned": tmp_path / "out"}, device=device, dtype="float32")
        questions = [user(f"判断情绪\n公司{n}增长") for n in range(4)]
        answers.append([chat.reply(question, max_new_tokens=12) for question in questions])
    assert answers[0] == answers[1]


def test_a_full_card_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        with pytest.raises(UserError, match="memory is full; try --batch_size 1"):
            tune(tiny_model, tmp_path / "out", device="cuda")
        with pytest.raises(UserError, match="memory is full; try --batch_size 1"):
            finetune(PRICES, fit_settings(tiny_model, tmp_path / "fit", device="cuda"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
