"""The loop's promises: epoch 0 is the random walk, the same gradients however cut, nothing good is lost."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from price_tables import planted_trend, random_prices

import stocklora.finetune.optimization as training
from lora import lora_parameters
from stocklora.dataset.prepare import prepare
from stocklora.finetune.fit import finetune
from stocklora.finetune.loop import gain_in_errors
from stocklora.finetune.report import save_run
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.forecaster import load_forecaster
from stocklora.forecaster.weights import load_weights
from stocklora.metrics.scores import QUANTILE_LEVELS, pinball_loss
from stocklora.runtime.machine import choose_device

pytestmark = pytest.mark.usefixtures("undrawn")

LEVELS = np.array(QUANTILE_LEVELS)


@pytest.fixture(scope="module")
def prices():
    return {"AAA": random_prices(220, 1), "BBB": random_prices(180, 2, "2020-02-03")}


def settings_of(model, folder):
    return TrainLoraSettings(
        model_path=model, epochs=2, batch_size=2, targets_per_sequence=20, dtype="float32", device="cpu",
        learning_rate=1e-3, head_learning_rate=1e-2, save_dir=folder,
    )  # fmt: skip


@pytest.fixture
def settings(tiny_model, tmp_path):
    return settings_of(tiny_model, tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def plain(prices, tiny_model, tmp_path_factory):
    """A run of ``settings``, not to be changed."""
    return finetune(prices, settings_of(tiny_model, tmp_path_factory.mktemp("plain")))


TREND = {
    "epochs": 5, "horizon": 1, "batch_size": 1, "learning_rate": 4e-3, "head_learning_rate": 1e-3,
    "targets_per_sequence": 40, "scale": "ewma", "prompt": "returns",  # random weights find the trend in digits sooner
}  # fmt: skip


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory):
    """A run that found a planted trend, not to be changed."""
    settings = settings_of(tiny_model, tmp_path_factory.mktemp("learned"))
    return finetune({"X": planted_trend(600)}, changed(settings, **TREND))


def unsettled(run):
    """The run with adapters and head far from their start, so that its forecasts depend on what it reads.

    A short run on random walks may rightly end as the start, which reads nothing.
    """
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        torch.nn.init.normal_(run.forecaster.model.head.linear.weight, std=0.1, generator=draw)
        for parameter in lora_parameters(run.forecaster.model.backbone):
            torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    return run


def changed(settings, **changes):
    return dataclasses.replace(settings, **changes)


def test_epoch_0_is_the_volatility_scaled_random_walk(prices, settings):
    run = finetune(prices, changed(settings, epochs=0, scale="ewma"))
    baseline = run.data.forecasts_of("ewma", "validation")
    expected = 1e4 * pinball_loss(run.data.returns_of("validation"), baseline, LEVELS).mean()
    assert run.outcome.history[0]["validation_pinball_bp"] == pytest.approx(expected, rel=1e-5)
    assert run.outcome.best_epoch == 0


def test_a_model_that_only_gets_worse_ends_as_the_random_walk(prices, settings):
    # A learning rate this size destroys the head; what is saved must be the start.
    run = finetune(prices, changed(settings, epochs=3, head_learning_rate=5.0, learning_rate=1.0, max_grad_norm=1e9))
    kept = run.forecaster.quantiles(run.forecaster.examples(prices, run.data.sequences("test", 20)), calibrated=False)
    start = run.data.start(run.forecaster.spec.scale["kind"])  # around the median or the drift
    np.testing.assert_allclose(kept, run.data.forecasts_of(start, "test"), rtol=1e-4, atol=1e-7)
    assert run.outcome.best_epoch == 0


def test_layers_that_do_not_train_are_read_once_and_the_run_is_the_same(settings, tiny_model, monkeypatch):
    """Against a run that adapts the same layers by name, and so reads all layers in each epoch."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    passes, forward = [0, 0], Qwen3DecoderLayer.forward

    def counted(self, *args, **kwargs):
        passes[self.self_attn.layer_idx] += torch.is_grad_enabled() or not torch.is_inference_mode_enabled()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", counted)
    kinds = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    # Sequences alone, so that products have as many rows in both runs and round alike.
    prices = {"X": planted_trend(240)}
    few = {"epochs": 3, "targets_per_sequence": 20, "lora_dropout": 0.2, "required_gain": 0.0}
    settings = changed(settings, **TREND | few)
    runs, counts = [], []
    for index, how in enumerate(({"adapt_layers": 1}, {"target_modules": [f"layers.1.{kind}" for kind in kinds]})):
        passes[:] = [0, 0]
        runs.append(finetune(prices, changed(settings, save_dir=settings.save_dir / str(index), **how)))
        counts.append(list(passes))
    sequences = len(runs[0].data.sequences("train", 20)) + len(runs[0].data.sequences("validation", 20))
    assert counts[0][0] < sequences + 20 < counts[1][0] - 10  # once each, and some at the start
    assert counts[0][1] >= counts[1][1] - 10  # the last layer in each epoch
    first, second = (load_weights(run.weights_path) for run in runs)
    assert first.spec.adapt_layers == 1
    assert set(first.spec.lora["target_modules"]) == set(second.spec.lora["target_modules"])
    assert first.training["best_epoch"] == second.training["best_epoch"] > 0
    for part in ("adapters", "head"):
        one, other = getattr(first, part), getattr(second, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), part
    again, _ = load_forecaster(runs[0].weights_path, tiny_model, choose_device("cpu"), torch.float32)
    assert again.model.frozen_layers == 0  # forecasts are the plain model's
    examples = again.examples(prices, runs[0].data.sequences("test", 20))
    np.testing.assert_array_equal(again.quantiles(examples), runs[0].test_quantiles)


def test_it_learns_when_there_is_something_to_learn(learned):
    assert learned.outcome.best_ratio < 0.92
    assert learned.test_scores["model"].pinball_bp < 0.92 * learned.test_scores["ewma"].pinball_bp
    assert learned.test_scores["model"].mae < 0.98 * learned.test_scores["naive"].mae


def gradients(run, examples, cut):
    from accelerate import Accelerator

    model = run.forecaster.model
    model.zero_grad()
    torch.nn.init.normal_(model.head.linear.weight, generator=torch.Generator().manual_seed(0))
    batches = [training.collate([examples[index] for index in part]) for part in cut]
    targets = sum(len(examples[index].scale) for part in cut for index in part)
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    loss = training.accumulate_gradients(model, batches, levels, Accelerator(cpu=True), targets)
    parameters = [*lora_parameters(model.backbone), *model.head.parameters()]
    return loss, [parameter.grad.clone() for parameter in parameters]


def test_accumulated_gradients_are_the_large_batchs(prices, settings):
    run = finetune(prices, changed(settings, epochs=0))
    examples = run.forecaster.examples(prices, run.data.sequences("train", 20))
    sizes = {len(example.scale) for example in examples}
    assert len(sizes) > 1  # unequal sequences: a mean of means would give other gradients
    whole = list(range(len(examples)))
    loss, large = gradients(run, examples, [whole])
    for cut in ([[index] for index in whole], [whole[:1], whole[1:]]):
        cut_loss, small = gradients(run, examples, cut)
        assert cut_loss == pytest.approx(loss, rel=1e-5)
        for one, other in zip(large, small, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_packed_forecasts_are_those_of_one_window_a_pass_when_they_see_the_same_days(prices, settings):
    run = unsettled(finetune(prices, changed(settings, epochs=0)))
    packed = run.forecaster.examples(prices, run.data.sequences("test", 20))
    single = run.forecaster.examples(prices, run.data.sequences("test", 1))
    first = [0]
    for example in packed[:-1]:
        first.append(first[-1] + len(example.scale))
    # Only a sequence's first origin sees exactly the window; later ones see more of the past.
    many, one = run.forecaster.quantiles(packed), run.forecaster.quantiles(single)
    np.testing.assert_allclose(many[first], one[first], rtol=1e-4, atol=1e-7)
    assert np.ptp(one[:, 0, 4] / one[:, 0, 8]) > 0.01  # and the forecasts do differ from day to day


def test_the_same_seed_gives_the_same_weights(prices, settings, plain, tmp_path):
    runs = [plain, finetune(prices, settings)]
    first, second = (load_weights(run.weights_path) for run in runs)
    assert all(torch.equal(first.adapters[name], second.adapters[name]) for name in first.adapters)
    assert all(torch.equal(first.head[name], second.head[name]) for name in first.head)
    losses = [[row["train_loss"] for row in run.outcome.history[1:]] for run in runs]
    assert losses[0] == losses[1]  # whatever epoch was kept
    other = load_weights(finetune(prices, changed(settings, seed=7, save_dir=tmp_path / "c")).weights_path)
    assert any(not torch.equal(first.adapters[name], other.adapters[name]) for name in first.adapters)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_weights_forecast_the_same_in_a_new_forecaster(prices, settings, checkpointing):
    run = unsettled(finetune(prices, changed(settings, epochs=1, batch_size=1, gradient_checkpointing=checkpointing)))
    save_run(run, settings)
    loaded, content = load_forecaster(run.weights_path, settings.model_path, choose_device("cpu"), torch.float32)
    assert loaded.forecast(prices) == run.forecaster.forecast(prices)
    assert content.training["test_scores"]["model"]["pinball_bp"] == run.test_scores["model"].pinball_bp


def test_gradient_checkpointing_changes_nothing_but_memory(prices, settings, plain):
    checkpointed = finetune(prices, changed(settings, gradient_checkpointing=True))
    assert checkpointed.forecaster.model.backbone.is_gradient_checkpointing
    assert not plain.forecaster.model.backbone.is_gradient_checkpointing
    for one, other in zip(plain.outcome.history[1:], checkpointed.outcome.history[1:], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["validation_pinball_bp"] == pytest.approx(other["validation_pinball_bp"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(prices, settings, monkeypatch):
    real, calls = training.pinball_sum, []

    def breaks_in_the_second_epoch(*arguments):
        calls.append(None)
        return real(*arguments) * (float("nan") if len(calls) > 8 else 1.0)

    monkeypatch.setattr(training, "pinball_sum", breaks_in_the_second_epoch)
    run = finetune(prices, changed(settings, epochs=5, head_learning_rate=1e-4))
    assert "no longer finite" in run.outcome.stopped
    assert run.outcome.history[-1]["epoch"] >= 1
    assert np.isfinite(run.test_quantiles).all()
    assert_holds_the_best_epoch(run, prices)


def test_ctrl_c_keeps_the_best_weights_so_far(prices, settings, monkeypatch):
    real, calls = training.pinball_sum, []

    def interrupted_in_the_second_epoch(*arguments):
        calls.append(None)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(training, "pinball_sum", interrupted_in_the_second_epoch)
    run = finetune(prices, changed(settings, epochs=5))
    assert run.outcome.stopped == "interrupted"
    assert run.outcome.steps == 9
    assert_holds_the_best_epoch(run, prices)


def assert_holds_the_best_epoch(run, prices):
    """The saved weights have the validation loss that the history gives the best epoch."""
    settings = load_weights(run.weights_path).training["settings"]
    loaded, _ = load_forecaster(run.weights_path, Path(settings["model_path"]), choose_device("cpu"), torch.float32)
    examples = loaded.examples(prices, run.data.sequences("validation", loaded.spec.targets_per_sequence))
    loss = (
        1e4
        * pinball_loss(run.data.returns_of("validation"), loaded.quantiles(examples, calibrated=False), LEVELS).mean()
    )
    assert loss == pytest.approx(run.outcome.history[run.outcome.best_epoch]["validation_pinball_bp"], rel=1e-5)


def test_a_run_that_fails_at_the_end_leaves_the_previous_artefacts(prices, settings, monkeypatch):
    finetune(prices, changed(settings, epochs=1))
    before = {path.name: path.read_bytes() for path in settings.save_dir.iterdir() if path.is_file()}

    def fails(*arguments):
        raise RuntimeError("no ink")

    monkeypatch.setattr("stocklora.plots.curves.plot_training_curve", fails)
    with pytest.raises(RuntimeError, match="no ink"):
        finetune(prices, changed(settings, epochs=2, seed=7))
    assert {path.name: path.read_bytes() for path in settings.save_dir.iterdir() if path.is_file()} == before


def test_a_model_that_learned_nothing_scores_exactly_as_its_start(prices, settings):
    run = finetune(prices, changed(settings, epochs=0, scale="har"))
    start, model = run.test_scores["har"], run.test_scores["model"]
    assert model.pinball_bp == pytest.approx(start.pinball_bp, rel=1e-4)
    assert model.mae == pytest.approx(start.mae, rel=1e-4)


def test_a_gain_that_may_be_chance_is_not_kept(settings, learned):
    prices = {"X": planted_trend(600)}
    left = finetune(prices, changed(settings, required_gain=50.0, **TREND))
    assert learned.outcome.best_epoch > 0
    assert_holds_the_best_epoch(learned, prices)
    assert learned.outcome.unproven_epoch is None
    assert left.outcome.best_epoch == 0
    assert left.outcome.unproven_epoch == learned.outcome.best_epoch
    assert 0.0 < left.outcome.gain_in_errors == learned.outcome.gain_in_errors < 50.0
    assert_holds_the_best_epoch(left, prices)
    assert "unproven_epoch" in load_weights(left.weights_path).training


def test_standard_errors_of_a_gain():
    draw = np.random.default_rng(0)
    dates = np.repeat(np.arange(400), 5)  # five tickers a day
    found = []
    for _ in range(300):
        # All tickers of a day share one number, which lasts three days: what counts is days, not rows.
        shared = np.convolve(draw.standard_normal(402), np.ones(3) / 3, mode="valid")
        found.append(gain_in_errors(np.repeat(shared, 5), dates, 3))
    assert 0.85 < np.std(found) < 1.2
    assert np.mean(np.array(found) > 1.64) == pytest.approx(0.05, abs=0.04)
    shuffled = draw.permutation(len(dates))
    gains = np.repeat(draw.standard_normal(400), 5)
    assert gain_in_errors(gains[shuffled], dates[shuffled], 3) == pytest.approx(gain_in_errors(gains, dates, 3))
    assert gain_in_errors(np.zeros(50), np.arange(50), 3) == 0.0
    assert gain_in_errors(np.ones(50), np.arange(50), 3) == np.inf


def test_early_stopping_waits_for_its_patience(prices, settings):
    run = finetune(prices, changed(settings, epochs=10, patience=2, learning_rate=1.0, head_learning_rate=5.0))
    assert run.outcome.history[-1]["epoch"] == run.outcome.best_epoch + 2


def test_history_and_curve_are_written(plain):
    folder = plain.weights_path.parent
    history = pd.read_csv(folder / "training_history.csv")
    assert history["epoch"].tolist() == [0, 1, 2]
    assert history["validation_ratio"][0] == 1.0
    assert history["train_loss"][1:].notna().all()
    assert (folder / "training_curve.png").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert plain.outcome.steps == 2 * -(-len(plain.data.sequences("train", 20)) // 2)


def test_changing_future_prices_moves_no_earlier_forecast_bit_for_bit(prices, settings):
    run = unsettled(finetune(prices, changed(settings, epochs=0)))
    frame, cut = prices["AAA"], 190
    altered = frame.copy()
    draw = np.random.default_rng(0)
    altered.iloc[cut:] *= draw.uniform(0.9, 1.1, (len(frame) - cut, 1))
    origins = range(150, 210)
    from stocklora.dataset.windows import pack

    sequences = pack("AAA", origins, 30, 60)
    known = run.forecaster.examples({"AAA": frame}, sequences)
    future = run.forecaster.examples({"AAA": altered}, sequences)
    # Equal lengths, so that the same kernels run: shorter lines are made up for by padding on the right.
    longest = max(len(known[0].encoded.input_ids), len(future[0].encoded.input_ids))
    padded = [
        [dataclasses.replace(example, encoded=dataclasses.replace(
            example.encoded,
            input_ids=np.pad(example.encoded.input_ids, (0, longest - len(example.encoded.input_ids)))))
         for example in part]
        for part in (known, future)
    ]  # fmt: skip
    before, after = (run.forecaster.quantiles(part) for part in padded)
    seen = cut - origins.start
    assert (before[:seen] == after[:seen]).all()
    assert (before[seen:] != after[seen:]).any()


def test_baselines_and_scale_are_fitted_on_training_days_alone(prices):
    data = prepare(prices, 30, 3)
    altered = {name: frame.copy() for name, frame in prices.items()}
    for frame in altered.values():
        frame.loc[frame.index >= data.dates.validation] *= 1.7
    again = prepare(altered, 30, 3)
    for name, baseline in data.baselines.items():
        np.testing.assert_array_equal(baseline.table, again.baselines[name].table)
        assert baseline.scale == again.baselines[name].scale
