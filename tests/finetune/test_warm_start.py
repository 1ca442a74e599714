"""Weights of an earlier run as a start at a larger rank, and as a teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from price_tables import random_prices
from tuned_models import CPU, built, content_of, spec_of, unsettled

from llm_model import distance_sum
from stocklora.base_models.loading import BaseModel
from stocklora.cli.console import UserError
from stocklora.dataset.prepare import prepare
from stocklora.dataset.simulated import simulated_stock
from stocklora.dataset.windows import pack
from stocklora.finetune.fit import finetune, prepare_data, specification
from stocklora.finetune.optimization import Optimization, standardize_head
from stocklora.finetune.prepare import split_prices
from stocklora.finetune.report import print_outcome, save_run
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.finetune.warm_start import check_days, fit_head, simulated_lessons, with_teacher
from stocklora.forecaster.batches import collate
from stocklora.forecaster.forecaster import Forecaster, load_forecaster
from stocklora.forecaster.methods import trained_state
from stocklora.forecaster.weights import load_weights
from stocklora.runtime.distributed import Alone

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def prices() -> dict[str, Any]:
    return {"AAA": random_prices(120, 1), "BBB": random_prices(90, 2)}


def settings_for(model: Path, folder: Path, **changes: Any) -> TrainLoraSettings:
    options = {
        "model_path": model, "window_size": 20, "epochs": 0, "device": "cpu", "scale": "ewma", "dtype": "float32",
        "lora_rank": 2, "targets_per_sequence": 20, "batch_size": 2, "save_dir": folder, "prompt": "returns",
    }  # fmt: skip
    return TrainLoraSettings(**{**options, **changes})


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, tiny_model, prices) -> dict[str, Path]:
    """Weights of earlier runs by method."""
    paths = {}
    for method in ("lora", "peft"):
        settings = settings_for(tiny_model, tmp_path_factory.mktemp(method), method=method)
        run = finetune(prices, settings)
        unsettled(run.forecaster)
        save_run(run, settings)
        paths[method] = run.weights_path
    return paths


@pytest.mark.parametrize("method", ["lora", "peft"])
@pytest.mark.parametrize(
    "changes", [{"lora_rank": 4}, {"lora_rank": 8, "lora_alpha": 5.0}, {"lora_rank": 3, "use_rslora": True}]
)
def test_a_larger_rank_starts_as_the_same_function(earlier, tiny_model, prices, tmp_path, method, changes) -> None:
    run = finetune(prices, settings_for(
        tiny_model, tmp_path, method=method, expand_rank_from=earlier[method], **changes
    ))  # fmt: skip
    old, _ = load_forecaster(earlier[method], tiny_model, CPU, torch.float32)
    examples = old.packed_examples(prices, {"AAA": range(60, 119)})
    for each in (old, run.forecaster):
        each.model.backbone.double()  # so that only what the ranks differ in is left of the difference
    before, now = (each.quantiles(examples, calibrated=False) for each in (old, run.forecaster))
    np.testing.assert_allclose(now, before, rtol=2e-5, atol=2e-7)
    assert run.forecaster.spec.lora["rank"] == changes["lora_rank"]
    assert run.outcome.history[0]["validation_ratio"] == 1.0
    # and the added part can learn: A is not zero
    added = [t[2:] for name, t in trained_state(run.forecaster.model)["adapters"].items() if name.endswith("lora_A")]
    assert all(bool(rows.abs().sum(dim=1).gt(0).all()) for rows in added)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 2}, "has rank 2; give a larger --lora_rank than that, not 2"),
        ({"lora_rank": 4, "prompt": "ohlcv"}, "was trained with --prompt returns, and this run has ohlcv"),
        ({"lora_rank": 4, "window_size": 21}, "was trained with --window_size 20, and this run has 21"),
        ({"lora_rank": 4, "method": "peft"}, "was trained with --method lora, and this run has peft"),
        ({"lora_rank": 4, "use_dora": True}, "another --use_dora"),
        ({"lora_rank": 4, "target_modules": ["q_proj"]}, "another --target_modules"),
        ({"lora_rank": 4, "validation_from": "2020-03-02", "test_from": "2020-04-01"}, "knows days up to"),
    ],
)
def test_weights_that_cannot_be_continued_say_why(earlier, tiny_model, prices, tmp_path, changes, words) -> None:
    with pytest.raises(UserError, match=words):
        finetune(prices, settings_for(tiny_model, tmp_path / "out", expand_rank_from=earlier["lora"], **changes))
    assert not (tmp_path / "out").exists()


def test_the_distance_to_a_teacher_is_the_formula() -> None:
    draw = np.random.default_rng(0)
    student, teacher = draw.standard_normal((2, 3, 4, 2, 5))
    scale, mask = draw.uniform(0.5, 2, (3, 4, 2)), np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1.0]])
    expected = sum(
        mask[i, j] * np.mean([abs(student[i, j, h, k] - teacher[i, j, h, k]) / scale[i, j, h]
                              for h in range(2) for k in range(5)])
        for i in range(3) for j in range(4) if (i, j) != (2, 1)
    )  # fmt: skip
    teacher[2, 1] = np.nan
    tensors = [torch.tensor(value) for value in (student, teacher, scale, mask)]
    tensors[0].requires_grad_()
    found = distance_sum(*tensors)
    assert float(found.detach()) == pytest.approx(expected)
    found.backward()
    assert bool(torch.isfinite(tensors[0].grad).all())
    assert not tensors[0].grad[2, 1].any()


def test_a_teacher_of_another_kind_teaches_its_own_forecasts(tiny_models, prices, tmp_path, capsys) -> None:
    gpt2, qwen3 = tiny_models["gpt2"], tiny_models["qwen3"]
    split = {"validation_from": "2020-05-05", "test_from": "2020-05-26"}
    settings = settings_for(gpt2, tmp_path / "teacher", window_size=30, scale="har", **split)
    run = finetune(prices, settings)
    unsettled(run.forecaster)
    save_run(run, settings)
    student = settings_for(
        qwen3, tmp_path / "student", teacher=run.weights_path, teacher_model_path=gpt2, distill_weight=5.0, **split,
    )  # fmt: skip
    data = prepare(prices, 20, 3, **split)
    forecaster = built(spec_of(qwen3, "lora"), qwen3)
    origins = {name: parts["train"] for name, parts in data.origins.items()}
    taught = with_teacher(forecaster.packed_examples(prices, origins), data, student, CPU)
    teacher, _ = load_forecaster(run.weights_path, gpt2, CPU, torch.float32)
    known = alone = 0
    for example in taught:
        sequence = example.encoded.sequence
        assert example.teacher is not None
        assert example.teacher.shape == (len(sequence.origins), 3, 9)
        for row, quantiles in zip(sequence.origins, example.teacher, strict=True):
            if row < 30:
                assert np.isnan(quantiles).all()
                continue
            if (row - max(30, origins[sequence.ticker].start)) % teacher.spec.targets_per_sequence == 0:
                # The first of a packed sequence sees one window and no more, as if it stood alone.
                own = teacher.examples(prices, pack(sequence.ticker, range(row, row + 1), 30, 1))
                np.testing.assert_allclose(quantiles, teacher.quantiles(own)[0], rtol=1e-4, atol=1e-6)
                alone += 1
            known += 1
    assert alone > 5
    assert known == sum(len(range(max(30, rows.start), rows.stop)) for rows in origins.values())

    def distance(of: Forecaster) -> float:
        ours, theirs = of.quantiles(taught, calibrated=False), np.concatenate([e.teacher for e in taught])
        return float(np.nanmean(np.abs(ours - theirs)))

    batch = collate(taught[:2])
    assert batch.teacher is not None
    assert batch.teacher.shape == (*batch.scale.shape, 9)
    apart = []
    for weight in (0.01, 20.0):
        pupil = built(spec_of(qwen3, "lora"), qwen3)
        standardize_head(pupil.model, taught, CPU)
        optimization = Optimization(
            pupil.model, taught, data.levels,
            dataclasses.replace(
                student, epochs=9, learning_rate=4e-3, head_learning_rate=4e-2, distill_weight=weight
            ),
            Alone(CPU),
        )  # fmt: skip
        for epoch in range(1, 10):
            list(optimization.epoch(epoch))
        apart.append(distance(pupil))
    assert apart[1] < 0.8 * apart[0]
    assert apart[1] < 0.8 * distance(built(spec_of(qwen3, "lora"), qwen3))
    finetune(prices, dataclasses.replace(student, epochs=1))  # and as a user runs it
    assert f"for {known} of {sum(map(len, origins.values()))} training days" in capsys.readouterr().out


def test_a_teacher_that_has_seen_later_days_is_refused(tiny_model, prices) -> None:
    data = prepare(prices, 20, 3)
    content = content_of(built(spec_of(tiny_model, "lora"), tiny_model))
    facts = {"validation_from": f"{data.dates.validation:%Y-%m-%d}", "test_from": f"{data.dates.test:%Y-%m-%d}"}

    def check(**changes: str) -> None:
        known = dataclasses.replace(content, training={"data": {**facts, **changes}})
        check_days(known, Path("t.pth"), data.dates, "--teacher")

    check()
    check(validation_from="2019-01-01", test_from="2019-02-01")
    with pytest.raises(UserError, match=r"--teacher t.pth knows days up to 2031-01-01, and this run's --val"):
        check(validation_from="2031-01-01", test_from="2031-02-01")
    with pytest.raises(UserError, match="this run's --test_from"):
        check(test_from="2031-02-01")


def test_a_teacher_of_other_days_is_refused(tiny_model, prices, tmp_path, earlier) -> None:
    with pytest.raises(UserError, match="forecasts 3 days ahead at 9 quantile levels, and this run 2 at 9"):
        finetune(prices, settings_for(tiny_model, tmp_path / "x", horizon=2, teacher=earlier["lora"]))


# ------------------------------------------------------------------------------------- the market prior as a teacher


def lessons(prices: dict[str, Any], settings: TrainLoraSettings) -> tuple[Any, list[Any], Any]:
    """The prior's training examples for ``settings``, with a fresh forecaster from the EWMA start."""
    prepared = prepare_data(split_prices(prices, settings), settings, BaseModel(settings.model_path))
    forecaster = built(specification(prepared, settings, BaseModel(settings.model_path)), settings.model_path)
    taught = with_teacher(prepared.examples["train"], prepared.data, settings, CPU)
    return prepared, taught, forecaster


def test_the_prior_teaches_its_own_quantiles_of_the_training_days(tiny_model, prices, tmp_path, capsys) -> None:
    settings = settings_for(tiny_model, tmp_path, teacher=Path("prior"), scale="auto", teacher_epochs=1)
    prepared, taught, _ = lessons(prices, settings)
    data = prepared.data
    assert prepared.scale_kind == "ewma"  # where the prior teaches, it is not where the run starts
    found = np.concatenate([example.teacher for example in taught])
    np.testing.assert_allclose(found, data.forecasts_of(data.baselines["prior"], "train"), rtol=1e-12)
    changed = {name: frame.copy() for name, frame in prices.items()}
    for frame in changed.values():
        frame.iloc[frame.index.searchsorted(data.dates.validation) :] *= 3.0
    _, again, _ = lessons(changed, dataclasses.replace(
        settings, validation_from=f"{data.dates.validation:%Y-%m-%d}", test_from=f"{data.dates.test:%Y-%m-%d}"
    ))  # fmt: skip
    np.testing.assert_array_equal(found, np.concatenate([example.teacher for example in again]))
    total = sum(len(parts["train"]) for parts in data.origins.values())
    assert f"the market prior, moved by the training days, for {total} of {total} training" in capsys.readouterr().out


def test_the_head_is_fitted_to_what_the_states_hold(tiny_model, prices, tmp_path) -> None:
    settings = settings_for(tiny_model, tmp_path, teacher=Path("prior"), teacher_epochs=1, targets_per_sequence=5)
    _, taught, forecaster = lessons(prices, settings)
    model, draw = forecaster.model, torch.Generator().manual_seed(0)
    standardize_head(model, taught, CPU)
    begun = {name: value.clone() for name, value in model.head.state_dict().items()}
    with torch.no_grad():  # a head that says something else of every day, and its own forecasts as lessons
        model.head.linear.weight.copy_(0.02 * torch.randn(model.head.linear.weight.shape, generator=draw))
    quantiles = iter(forecaster.quantiles(taught, calibrated=False))
    own = [dataclasses.replace(each, teacher=np.stack([next(quantiles) for _ in each.scale])) for each in taught]
    model.head.load_state_dict(begun)

    def distance() -> float:
        found = forecaster.quantiles(own, calibrated=False)
        return float(np.abs(found / np.concatenate([each.teacher for each in own]) - 1.0).mean())

    before = distance()
    fit_head(model, own, CPU)
    assert distance() < 0.15 * before
    model.head.load_state_dict(begun)
    fit_head(model, own[:4], CPU)  # too few to choose a ridge on: the head stays
    assert distance() == before
    fit_head(model, [dataclasses.replace(each, teacher=np.zeros_like(each.teacher)) for each in own], CPU)
    narrow = forecaster.quantiles(own, calibrated=False)  # quantiles that are all one number are no reason to fail
    assert 0.0 < (narrow[..., -1] - narrow[..., 0]).max() < 1e-4


def test_the_first_epochs_learn_from_the_teacher_alone(tiny_model, prices, tmp_path) -> None:
    settings = settings_for(tiny_model, tmp_path, teacher=Path("prior"), teacher_epochs=1, epochs=2)
    prepared, taught, _ = lessons(prices, settings)
    other = [dataclasses.replace(each, returns=each.returns + 0.5) for each in taught]  # what came is another thing

    def after(examples: list[Any], epochs: int) -> Any:
        forecaster = built(specification(prepared, settings, BaseModel(tiny_model)), tiny_model)
        optimization = Optimization(forecaster.model, examples, prepared.data.levels, settings, Alone(CPU))
        for epoch in range(1, epochs + 1):
            list(optimization.epoch(epoch))
        return trained_state(forecaster.model)["head"]["linear.bias"]

    assert torch.equal(after(taught, 1), after(other, 1))
    assert not torch.equal(after(taught, 2), after(other, 2))


def test_what_the_prior_teaches_is_read_from_text(tiny_model, tmp_path) -> None:
    """From the EWMA start a tiny random model comes nearer to the prior on days after those that it learned from."""
    prices = {str(seed): random_prices(400, seed, volatility=0.004 * (seed + 1)) for seed in range(6)}
    settings = settings_for(tiny_model, tmp_path, teacher=Path("prior"), teacher_epochs=1, prompt="words")
    prepared, taught, forecaster = lessons(prices, settings)
    data, later = prepared.data, prepared.examples["test"]
    prior = data.forecasts_of(data.baselines["prior"], "test")
    begun = forecaster.quantiles(later, calibrated=False)
    standardize_head(forecaster.model, taught, CPU)
    fit_head(forecaster.model, taught, CPU)
    read = forecaster.quantiles(later, calibrated=False)
    assert np.abs(read - prior).mean() < 0.97 * np.abs(begun - prior).mean()
    # and not by a better table alone: the days on which it is wider than the start are the prior's
    wider = [np.log((each[..., -1] - each[..., 0]) / (begun[..., -1] - begun[..., 0]))[:, 0] for each in (read, prior)]
    assert np.corrcoef(wider)[0, 1] > 0.2


def test_simulated_series_are_read_in_the_teachers_epochs_alone(tiny_model, prices, tmp_path, capsys) -> None:
    settings = settings_for(
        tiny_model, tmp_path, teacher=Path("prior"), teacher_epochs=1, epochs=2, simulated_series=1,
        targets_per_sequence=60, prompt="words",
    )  # fmt: skip
    run = finetune(prices, settings)
    days = 500 - settings.window_size
    printed = capsys.readouterr().out
    assert f"1 series, {days} days whose quantiles are known" in printed
    read = load_weights(run.weights_path).training["read_r2"]
    print_outcome(run)
    assert f"read from the text: R² {read:.2f} of how much wider than the start" in capsys.readouterr().out
    first, second = (row["step"] for row in run.outcome.history[1:])
    assert first > (second - first) + 3  # as many sequences more as the series has
    (lesson, *_) = simulated_lessons(run.data, "ewma", 60, settings, BaseModel(tiny_model))
    known = simulated_stock(settings.seed, 0).quantiles[list(lesson.encoded.sequence.origins)]
    np.testing.assert_array_equal(lesson.teacher, known)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": Path("prior"), "simulated_series": 3}, "--simulated_series are read in the teacher's epochs"),
        ({"teacher": Path("prior"), "scale": "prior"}, "nothing is left to learn; give --scale ewma"),
        ({"teacher": Path("prior"), "prior": "none"}, "--teacher prior is the market prior and --prior none"),
        ({"teacher": Path("prior"), "teacher_model_path": Path("x")}, "--teacher_model_path is the base model of"),
        ({"teacher_epochs": 1}, "--teacher_epochs are epochs with a --teacher alone"),
    ],
)
def test_flags_that_do_not_go_with_the_teacher(tiny_model, tmp_path, changes, words) -> None:
    with pytest.raises(UserError, match=words):
        settings_for(tiny_model, tmp_path, **changes)
