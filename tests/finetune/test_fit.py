"""A training run reads, encodes and hashes each thing once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from price_tables import random_prices

import stocklora.base_models.loading as loading
import stocklora.dataset.prepare
from stocklora.finetune.fit import finetune
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.weights import load_weights


@pytest.fixture
def calls() -> Counter[str]:
    return Counter()


@pytest.fixture
def counted(calls: Counter[str]) -> Callable[[str, Any], Any]:
    def wrap(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **options)

        return call

    return wrap


def test_prices_are_hashed_and_the_base_models_folder_is_read_once_in_a_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str], counted: Callable[..., Any]
) -> None:
    for name in ("check_model_folder", "describe_model", "backbone_config"):
        monkeypatch.setattr(loading, name, counted(name, getattr(loading, name)))
    tokenizer = transformers.AutoTokenizer
    monkeypatch.setattr(tokenizer, "from_pretrained", counted("tokenizer", tokenizer.from_pretrained))
    prepare = stocklora.dataset.prepare
    monkeypatch.setattr(prepare, "prices_sha256", counted("prices hashed", prepare.prices_sha256))
    settings = TrainLoraSettings(
        model_path=tiny_model, window_size=20, epochs=1, device="cpu", scale="ewma", dtype="float32", lora_rank=2,
        save_dir=tmp_path, keep_checkpoints=True,
    )  # fmt: skip
    run = finetune({"AAA": random_prices(120, 1), "BBB": random_prices(90, 2)}, settings)
    assert calls == {
        "check_model_folder": 1, "describe_model": 1, "backbone_config": 1, "tokenizer": 1, "prices hashed": 1,
    }  # fmt: skip
    assert load_weights(run.weights_path).training["data"] == run.data_facts
    assert len(run.data_facts["sha256"]) == 64
