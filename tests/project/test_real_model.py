"""SmolLM2-135M itself: it loads, starts at the random walk, and learns when there is something to learn."""

from __future__ import annotations

import pytest
from price_tables import planted_trend

from stocklora.finetune.fit import finetune
from stocklora.finetune.settings import TrainLoraSettings

pytestmark = pytest.mark.slow


def test_smollm2_starts_at_the_random_walk_and_finds_a_planted_trend(smollm2, tmp_path):
    settings = TrainLoraSettings(
        model_path=smollm2, backbone_layers=3, epochs=2, batch_size=1, horizon=1, scale="ewma", device="cpu",
        learning_rate=1e-3, head_learning_rate=1e-3, save_dir=tmp_path,
    )  # fmt: skip
    run = finetune({"X": planted_trend(500)}, settings)
    assert run.forecaster.spec.base_model["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert run.outcome.best_ratio < 0.9
    assert run.test_scores["model"].pinball_bp < 0.9 * run.test_scores["ewma"].pinball_bp
