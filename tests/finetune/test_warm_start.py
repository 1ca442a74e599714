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
from stocklora.cli.console import UserError
from stocklora.dataset.prepare import prepare
from stocklora.dataset.windows import pack
from stocklora.finetune.fit import finetune
from stocklora.finetune.optimization import Optimization, standardize_head
from stocklora.finetune.report import save_run
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.finetune.warm_start import check_days, with_teacher
from stocklora.forecaster.batches import collate
from stocklora.forecaster.forecaster import Forecaster, load_forecaster
from stocklora.forecaster.methods import trained_state
from stocklora.runtime.distributed import Alone


@pytest.fixture(scope="module")
def prices() -> dict[str, Any]:
    return {"AAA": random_prices(120, 1), "BBB": random_prices(90, 2)}


def settings_for(model: Path, folder: Path, **changes: Any) -> TrainLoraSettings:
    options = {
        "model_path": model, "window_size": 20, "epochs": 0, "device": "cpu", "scale": "ewma", "dtype": "float32",
        "lora_rank": 2, "targets_per_sequence": 20, "batch_size": 2, "save_dir": folder,
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
                student, epochs=15, learning_rate=2e-3, head_learning_rate=2e-2, distill_weight=weight
            ),
            Alone(CPU),
        )  # fmt: skip
        for epoch in range(1, 16):
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
