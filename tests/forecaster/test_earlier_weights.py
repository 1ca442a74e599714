"""Weights files and adapter folders that earlier versions wrote load, and forecast what they forecast then.

``tests/fixtures/earlier_weights`` holds what version 0.1's ``train_lora.py`` and ``merge_lora.py --export_peft`` wrote
over two tiny bases, the prices they read, and the ``predictions.csv`` of that version's ``framework_llm.py``.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from source_tree import REPO_ROOT

import framework_llm

EARLIER = REPO_ROOT / "tests" / "fixtures" / "earlier_weights"


@pytest.mark.parametrize(
    ("weights", "base"),
    [
        ("plain.pth", "base_qwen3"),
        ("adapter", "base_qwen3"),  # the same weights in PEFT's format
        ("variants.pth", "base_qwen3"),  # DoRA, PiSSA and rsLoRA at once
        ("bias.pth", "base_gpt2"),  # every bias trained as well
    ],
)
def test_forecasts_of_earlier_weights_have_not_moved(weights: str, base: str, in_folder: Path) -> None:
    options = ["--test_csv", EARLIER / "AAPL.csv", "--model_path", EARLIER / base, "--lora_weights", EARLIER / weights]
    options += ["--device", "cpu", "--dtype", "float32", "--output", "predictions.csv"]
    assert framework_llm.main([str(option) for option in options]) == 0
    expected = pd.read_csv(EARLIER / f"{Path(weights).stem}_forecast.csv")
    assert len(expected) == 3
    # Processors round differently; the files hold seven digits.
    pd.testing.assert_frame_equal(pd.read_csv("predictions.csv"), expected, check_exact=False, rtol=1e-5)
