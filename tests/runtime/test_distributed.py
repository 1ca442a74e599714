"""Two processes train the same model as one with the same batches; only the main one prints and writes."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from price_tables import random_prices
from script_calls import ACCELERATE_LAUNCH, ForkedScript

from stocklora.finetune.fit import finetune
from stocklora.finetune.report import FinetunedRun
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.weights import load_weights
from stocklora.plots import curves

pytestmark = pytest.mark.usefixtures("undrawn")
LIMIT_S = 240


@pytest.fixture(scope="module")
def prices() -> dict[str, pd.DataFrame]:
    return {"AAA": random_prices(154, 3), "BBB": random_prices(120, 53, "2020-02-03")}


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> TrainLoraSettings:
    return TrainLoraSettings(
        model_path=tiny_model, epochs=2, batch_size=1, targets_per_sequence=12, dtype="float32", device="cpu",
        learning_rate=1e-3, head_learning_rate=3e-4, required_gain=0.0, checkpoint_every=1000, keep_checkpoints=True,
        save_dir=tmp_path / "run",
    )  # fmt: skip


def changed(settings: TrainLoraSettings, **changes: Any) -> TrainLoraSettings:
    return dataclasses.replace(settings, **changes)


# ------------------------------------------------------------------------------------------ two processes, here


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _member(index: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...], answer: Path) -> None:
    """What accelerate's launcher sets for each process, then the work; its pictures are not drawn either."""
    curves.plot_training_curve = lambda history, best, path: path.touch()  # type: ignore[assignment]
    os.environ.update(
        RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    try:
        result: Any = work(*arguments)
    except BaseException:
        result = traceback.format_exc()
        os.write(2, result.encode())
        raise
    finally:
        answer.write_bytes(pickle.dumps(result))


def in_two(nursery: Any, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work`` returns in each of two processes that were launched together."""
    port = free_port()
    answers = [folder / f"answer-{index}" for index in range(2)]
    members = [
        nursery.Process(target=_member, args=(index, port, work, arguments, answers[index])) for index in range(2)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(LIMIT_S)
    hanging = [member.is_alive() for member in members]
    for member in members:
        member.kill()
    assert not any(hanging), "a process waits for the other"
    assert [member.exitcode for member in members] == [0, 0]
    return [pickle.loads(answer.read_bytes()) for answer in answers]


def last_state(settings: TrainLoraSettings) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(max((settings.save_dir / "last").glob("state-*.pt")), weights_only=True)
    return content


def close(one: Any, other: Any, where: str = "", atol: float = 1e-5) -> None:
    """Equal but for the order in which numbers were added up."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            close(one[key], other[key], f"{where}/{key}", atol)
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            close(left, right, f"{where}/{index}", atol)
    elif isinstance(one, torch.Tensor):
        # Gradients of a median's bias are sums of +-1/2: where they cancel, one order leaves 0 and the other 1e-9, and
        # Adam makes a part of a step of that.
        atol = 10 * atol if where.endswith("linear.bias") else atol
        torch.testing.assert_close(one, other, rtol=1e-3, atol=atol, msg=lambda text: f"{where}: {text}")
    else:
        assert one == pytest.approx(other, rel=1e-4, nan_ok=True), where


def assert_same_training(one: TrainLoraSettings, other: TrainLoraSettings) -> None:
    first, second = last_state(one), last_state(other)
    close(first["optimization"]["trained"], second["optimization"]["trained"])
    # Gradients themselves, averaged over the run: their first and second moments.
    close(first["optimization"]["optimizer"]["state"], second["optimization"]["optimizer"]["state"], atol=1e-7)
    assert first["optimization"]["steps"] == second["optimization"]["steps"]
    weights = [load_weights(settings.save_dir / "best_lora_weights.pth") for settings in (one, other)]
    close(weights[0].adapters, weights[1].adapters)
    close(weights[0].head, weights[1].head)
    close(weights[0].training["test_scores"]["model"], weights[1].training["test_scores"]["model"])
    histories = [pd.read_csv(settings.save_dir / "training_history.csv") for settings in (one, other)]
    columns = ["epoch", "step", "train_loss", "validation_pinball_bp", "learning_rate"]
    pd.testing.assert_frame_equal(histories[0][columns], histories[1][columns], rtol=1e-4)


def sequences_of(run: FinetunedRun) -> int:
    return len(run.data.sequences("train", run.forecaster.spec.targets_per_sequence))


def fit_each(prices: dict[str, pd.DataFrame], runs: list[TrainLoraSettings]) -> list[tuple[Any, ...]]:
    """Fit, one after the other; what this process knows of each run."""
    from accelerate import Accelerator

    from stocklora.forecaster.batches import predict

    found = []
    for settings in runs:
        run = finetune(prices, settings)
        examples = run.forecaster.examples(prices, run.data.sequences("test", 12))
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        shared, alone = (
            predict(run.forecaster.model, examples, torch.device("cpu"), 1000, accelerator=who)
            for who in (accelerator, None)
        )
        weights = run.forecaster.model.head.linear.weight
        found.append((
            run.outcome.best_epoch, run.outcome.steps, run.outcome.stopped, run.test_quantiles, shared, alone,
            weights.detach().numpy(),
        ))  # fmt: skip
    return found


def test_two_processes_train_what_one_trains(
    prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, tmp_path: Path, nursery: Any
) -> None:
    # Batches a process, batches summed, and what one process needs for the same steps.
    shapes = {"plain": (1, 1), "accumulated": (1, 2), "both": (3, 2)}
    alone, together = {}, {}
    for name, (size, summed) in shapes.items():
        alone[name] = changed(settings, save_dir=tmp_path / name / "one", batch_size=2 * size * summed)
        together[name] = changed(
            settings, save_dir=tmp_path / name / "two", batch_size=size, gradient_accumulation_steps=summed
        )
    runs = [finetune(prices, one) for one in alone.values()]
    # The last step of an epoch doesn't go round: one sequence is left, and the second process has none.
    left = [sequences_of(run) % one.batch_size for run, one in zip(runs, alone.values(), strict=True)]
    assert left == [1, 1, 1], left
    first, second = in_two(nursery, tmp_path, fit_each, prices, list(together.values()))
    for name in shapes:
        assert_same_training(alone[name], together[name])
    for mine, other, run in zip(first, second, runs, strict=True):
        for value, again in zip(mine, other, strict=True):  # both processes end with the very same model and forecasts
            np.testing.assert_array_equal(value, again)
        *_, shared, by_itself, _ = mine
        np.testing.assert_array_equal(shared, by_itself)
        np.testing.assert_allclose(mine[3], run.test_quantiles, rtol=1e-3, atol=1e-6)


def fit_stop_and_resume(prices: dict[str, pd.DataFrame], whole: TrainLoraSettings, stopped: TrainLoraSettings) -> Any:
    """A whole run; one of which SIGTERM stops the second process alone, at its ninth step; and how that goes on.

    Returns:
        The steps taken until the stop, and the seed of this process.
    """
    import stocklora.finetune.optimization as training

    finetune(prices, whole)
    real, calls = training.pinball_sum, []

    def asked(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 9 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    training.pinball_sum = asked
    outcome, seed = finetune(prices, stopped).outcome, torch.initial_seed()
    assert outcome.interrupted
    finetune(prices, changed(stopped, resume=True))
    return outcome.steps, seed


def assert_same_last_state(one: TrainLoraSettings, other: TrainLoraSettings) -> None:
    """To the last bit."""
    states = [last_state(settings)["optimization"]["trained"] for settings in (one, other)]
    for part in ("adapters", "head"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), name


def test_all_stop_at_the_same_step_and_go_on_together(
    prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, tmp_path: Path, nursery: Any
) -> None:
    settings = changed(settings, lora_dropout=0.2)
    whole = changed(settings, save_dir=tmp_path / "whole")
    (first, seed), (second, other_seed) = in_two(nursery, tmp_path, fit_stop_and_resume, prices, whole, settings)
    state = last_state(settings)
    assert first == second
    assert 9 <= first <= 10 < state["optimization"]["steps"]
    assert_same_last_state(whole, settings)
    assert (seed, other_seed) == (settings.seed, settings.seed + 1)  # each drops out in its own way
    assert not torch.equal(state["random"][0]["torch"], state["random"][1]["torch"])
    # In other company it would be another run.
    from stocklora.cli.console import UserError

    with pytest.raises(UserError, match="ran in 2 processes, now there are 1"):
        finetune(prices, changed(settings, resume=True))


# ------------------------------------------------------------------------------------------------------- FSDP


def fit_in_shards(prices: dict[str, pd.DataFrame], whole: TrainLoraSettings, stopped: TrainLoraSettings) -> Any:
    """As with ``accelerate launch --use_fsdp --fsdp_version 2``, which accelerate heeds on graphics cards alone."""
    import accelerate
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_RESHARD_AFTER_FORWARD="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true",
    )  # fmt: skip

    class Sharding(accelerate.Accelerator):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.state.distributed_type = DistributedType.FSDP
            accelerate.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin()

    accelerate.Accelerator = Sharding
    fit_stop_and_resume(prices, whole, stopped)
    model = finetune(prices, changed(whole, method="full", save_dir=whole.save_dir.with_name("full"))).forecaster.model
    sharded = [name for name, module in model.named_modules() if hasattr(module, "reshard")]
    everything = sum(parameter.numel() for parameter in model.parameters())
    return sharded, sum(parameter.to_local().numel() for parameter in model.parameters()) / everything


def test_a_model_in_shards_trains_as_a_whole_one(
    prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, tmp_path: Path, nursery: Any
) -> None:
    shards, stopped = changed(settings, save_dir=tmp_path / "shards"), changed(settings, save_dir=tmp_path / "stopped")
    for sharded, share in in_two(nursery, tmp_path, fit_in_shards, prices, shards, stopped):
        assert sharded == ["", "backbone.layers.0", "backbone.layers.1"]
        assert share < 0.52
    assert_same_last_state(shards, stopped)
    for method, two in (("lora", shards), ("full", changed(settings, save_dir=tmp_path / "full"))):
        alone = changed(settings, save_dir=tmp_path / "one" / method, batch_size=2, method=method)
        finetune(prices, alone)
        assert_same_training(alone, two)


def resume_a_stranger(prices: dict[str, pd.DataFrame], settings: TrainLoraSettings) -> str:
    try:
        finetune(prices, settings)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_what_the_main_process_refuses_ends_all(
    prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, tmp_path: Path, nursery: Any
) -> None:
    finetune(prices, changed(settings, epochs=1))
    first, second = in_two(nursery, tmp_path, resume_a_stranger, prices, changed(settings, epochs=1, resume=True))
    assert "ran in 1 processes, now there are 2" in first
    assert second == "SystemExit: 2"  # without a word: the main process has said it


def fit_alone(prices: dict[str, pd.DataFrame], settings: TrainLoraSettings) -> int:
    """The main process trains by itself while the other one waits."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    steps = finetune(prices, settings, alone=True).outcome.steps if state.is_main_process else 0
    state.wait_for_everyone()
    return steps


def test_one_of_two_may_train_by_itself(
    prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, tmp_path: Path, nursery: Any
) -> None:
    one = changed(settings, save_dir=tmp_path / "one", epochs=1)
    expected = finetune(prices, one).outcome.steps
    other = changed(settings, save_dir=tmp_path / "two", epochs=1)
    assert in_two(nursery, tmp_path, fit_alone, prices, other) == [expected, 0]
    states = [last_state(settings)["optimization"]["trained"]["adapters"] for settings in (one, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ---------------------------------------------------------------------------------------------- accelerate launch


def test_the_documented_command(
    sample_csv: Path, tiny_model: Path, repo_root: Path, tmp_path: Path, nursery: Any
) -> None:
    options = [
        "--data", sample_csv, "--model_path", tiny_model, "--device", "cpu", "--epochs", 1, "--batch_size", 1,
        "--targets_per_sequence", 40, "--save_dir", "out",
    ]  # fmt: skip
    launch = [ACCELERATE_LAUNCH, "--multi_gpu", "--num_processes", "2"]
    launcher = ForkedScript(
        nursery, *launch, "--main_process_port", free_port(), repo_root / "train_lora.py", *options,
        cwd=tmp_path, printed=tmp_path / "printed", env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    printed = launcher.stdout.read()
    assert launcher.stderr is not None
    assert launcher.wait(LIMIT_S) == 0, launcher.stderr.read_text()
    for once in ("base model", "epoch 1/1", "weights: ", "next: ", "processes"):
        assert len(re.findall(f"^{once}", printed, re.MULTILINE)) == 1, printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "best_lora_weights.pth", "training_curve.png", "training_history.csv",
    ]  # fmt: skip
    history = pd.read_csv(tmp_path / "out" / "training_history.csv")
    assert history["step"].tolist() == [0, 2]  # four sequences, two a step


def test_a_launcher_that_starts_one_process_only_is_named(
    prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # What accelerate launch --cpu --num_processes 2 leaves in the environment of its one process.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    finetune(prices, changed(settings, epochs=0))
    assert "--multi_gpu" in capsys.readouterr().err
