"""SmolLM2-135M itself: it loads, starts at the random walk, and learns when there is something to learn."""

from __future__ import annotations

import pytest
from price_tables import planted_trend

from stocklora.finetune.fit import finetune
from stocklora.finetune.reading import read_from_text
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.prices.sources.fetch import sample_prices

pytestmark = pytest.mark.slow


def test_smollm2_starts_at_the_random_walk_and_finds_a_planted_trend(smollm2, tmp_path):
    settings = TrainLoraSettings(
        model_path=smollm2, backbone_layers=3, epochs=2, batch_size=1, horizon=1, scale="ewma", device="cpu",
        learning_rate=1e-3, head_learning_rate=1e-3, targets_per_sequence=45, save_dir=tmp_path,
    )  # fmt: skip
    run = finetune({"X": planted_trend(500)}, settings)
    assert run.forecaster.spec.base_model["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert run.outcome.best_ratio < 0.9
    assert run.test_scores["model"].pinball_bp < 0.9 * run.test_scores["ewma"].pinball_bp


def test_smollm2_reads_from_letters_how_wide_the_prior_is(smollm2):
    lessons, _ = sample_prices(["IBM", "MSFT", "GOOG"], start="2009-01-01", end="2011-03-01")
    held_out, _ = sample_prices(["AAPL"], start="2011-03-01", end="2013-03-01")
    found = read_from_text(lessons, held_out, smollm2, device="cpu")
    assert (found.days, found.layers) == (len(held_out["AAPL"]) - 30, 2)
    assert 0.1 < found.r2 < 1.0
    assert 0.1 < found.har_r2 < 1.0
