"""Never lose a run: killed anywhere, a run goes on to the same last bit; damage is named; strangers are refused."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from price_tables import random_prices

import stocklora.finetune.loop as training_loop
import stocklora.finetune.optimization as training
import stocklora.finetune.resume as run_state
from stocklora.cli.console import UserError
from stocklora.cli.settings import resolve_settings
from stocklora.finetune.fit import finetune
from stocklora.finetune.resume import (
    Checkpoints,
    check_identity,
    identity_of,
    random_state,
    resume_command,
    set_random_state,
)
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.weights import load_weights
from stocklora.runtime.files import as_json_types
from stocklora.runtime.interrupt import Interruption

pytestmark = pytest.mark.usefixtures("undrawn")
TIMES = ["seconds", "targets_per_s"]


@pytest.fixture(scope="module")
def prices() -> dict[str, pd.DataFrame]:
    # Draws on which the first of three epochs is the best.
    return {"AAA": random_prices(140, 8), "BBB": random_prices(120, 58, "2020-02-03")}


def settings_of(model: Path, folder: Path) -> TrainLoraSettings:
    # Dropout, so that the random state matters; no gain required, so that trained weights are what is saved.
    return TrainLoraSettings(
        model_path=model, epochs=3, batch_size=1, targets_per_sequence=15, dtype="float32", device="cpu",
        learning_rate=1e-3, head_learning_rate=3e-4, lora_dropout=0.2, required_gain=0.0, checkpoint_every=3,
        keep_checkpoints=True, save_dir=folder,
    )  # fmt: skip


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> TrainLoraSettings:
    return settings_of(tiny_model, tmp_path / "run")


def changed(settings: TrainLoraSettings, **changes: Any) -> TrainLoraSettings:
    return dataclasses.replace(settings, **changes)


@pytest.fixture(scope="module")
def whole(
    prices: dict[str, pd.DataFrame], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainLoraSettings:
    """Of a run of ``settings`` that was left alone; its files are not to be changed."""
    settings = settings_of(tiny_model, tmp_path_factory.mktemp("left_alone") / "run")
    assert finetune(prices, settings).outcome.best_epoch > 0  # what is compared was trained
    return settings


def copy_of(whole: TrainLoraSettings, settings: TrainLoraSettings) -> None:
    """As if ``settings`` had been run."""
    shutil.copytree(whole.save_dir, settings.save_dir)


def last_state(settings: TrainLoraSettings) -> dict[str, Any]:
    path = max((settings.save_dir / "last").glob("state-*.pt"))
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other or (one != one and other != other), where


def assert_same_run(one: TrainLoraSettings, other: TrainLoraSettings) -> None:
    """Weights file, history and everything a run would go on from, to the last bit; clocks aside."""
    first, second = (load_weights(settings.save_dir / "best_lora_weights.pth") for settings in (one, other))
    assert_same(first.adapters, second.adapters)
    assert_same(first.head, second.head)
    assert_same(dataclasses.asdict(first.spec), dataclasses.asdict(second.spec))
    assert_same(first.training["test_scores"], second.training["test_scores"])
    histories = [
        pd.read_csv(settings.save_dir / "training_history.csv").drop(columns=TIMES) for settings in (one, other)
    ]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    states = [last_state(settings) for settings in (one, other)]
    for state in states:
        assert all(state["progress"].pop(name) >= 0.0 for name in ("seconds", "training_s", "epoch_s"))
        for row in state["progress"]["history"]:
            for name in TIMES:
                row.pop(name)
    assert_same(*states)


# ------------------------------------------------------------------------------------------------- killed runs


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, where: str, count: int) -> None:
    """In a process of its own: train, and be killed at the ``count``-th time that ``where`` comes by."""
    calls = 0

    def counted(real: Any, at_once: bool) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count and at_once:
                die()
            result = real(*arguments, **options)
            if calls == count:
                die()
            return result

        return call

    if where == "step":
        training.pinball_sum = counted(training.pinball_sum, True)
    elif where == "half a state":

        def half(content: Any, path: Path) -> None:
            nonlocal calls
            calls += 1
            real_save(content, path)
            if calls == count:
                os.truncate(path, path.stat().st_size // 2)
                die()

        real_save, run_state.torch.save = torch.save, half
    elif where == "state without manifest":
        run_state.write_json = counted(run_state.write_json, True)
    elif where == "manifest":
        run_state.write_json = counted(run_state.write_json, False)
    elif where == "validation":
        training_loop.pinball_loss = counted(training_loop.pinball_loss, True)
    finetune(prices, settings)


PLACES = ("step", "half a state", "state without manifest", "manifest", "validation")


def test_a_run_killed_anywhere_goes_on_to_the_same_last_bit(
    prices: dict[str, pd.DataFrame], whole: TrainLoraSettings, settings: TrainLoraSettings, tmp_path: Path, nursery: Any
) -> None:
    steps = last_state(whole)["optimization"]["steps"]
    draw = np.random.default_rng(20240607)
    for chain in range(2):
        killed = changed(settings, save_dir=tmp_path / f"killed-{chain}")
        kills = []
        # Killed again and again: three times at a step chosen at random, once in each other place.
        for where in draw.permutation([*PLACES[chain + 1 :: 2], "step", "step"]).tolist():
            at = int(draw.integers(2, 7 if where == "step" else 4))
            process = nursery.Process(target=run_and_die, args=(prices, killed, where, at))
            process.start()
            process.join(120)
            kills.append((where, at, process.exitcode))
            killed = changed(killed, resume=True)
        assert {code for *_, code in kills} <= {-signal.SIGKILL, 0}, kills
        assert kills[0][2] == kills[1][2] == -signal.SIGKILL, kills
        resumed = finetune(prices, killed)
        assert resumed.outcome.steps == steps
        assert_same_run(whole, killed)


@pytest.mark.parametrize(("number", "where"), [(signal.SIGINT, "a step"), (signal.SIGTERM, "validation")])
def test_asked_to_stop_it_saves_says_how_to_go_on_and_does(
    prices: dict[str, pd.DataFrame], whole: TrainLoraSettings, settings: TrainLoraSettings,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: signal.Signals, where: str,
) -> None:  # fmt: skip
    steps = last_state(whole)["optimization"]["steps"]
    if where == "a step":
        module, name, at = training, "pinball_sum", steps // 3 + 2
    else:
        module, name, at = training_loop, "predict", 2
    real, calls = getattr(module, name), []

    def asked(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, asked)
    stopped = changed(settings, checkpoint_every=1000, keep_checkpoints=False)
    capfd.readouterr()
    before = signal.getsignal(number)
    run = finetune(prices, stopped)
    assert signal.getsignal(number) is before
    assert run.outcome.stopped == "interrupted"
    assert run.outcome.steps == (at if where == "a step" else steps // 3)  # the step in progress was finished
    said = capfd.readouterr()
    assert "--resume" in said.out
    assert "finishing this step" in said.err
    assert load_weights(run.weights_path).training["stopped"] == "interrupted"  # the best so far, to use meanwhile
    again = finetune(prices, changed(stopped, resume=True, keep_checkpoints=True))
    assert again.outcome.stopped is None
    assert_same_run(whole, stopped)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "peft", "quantization": "4bit"},
        {"method": "peft", "init_lora": "pissa", "dtype": "bfloat16"},
        {"method": "lora", "init_lora": "pissa", "use_dora": True},
        {"method": "full", "dtype": "bfloat16"},
        {"method": "head"},
        {"adapt_layers": 1},
        {"method": "peft", "adapt_layers": 1, "quantization": "4bit", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_method_goes_on_to_the_same_last_bit(
    prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    settings = changed(settings, epochs=2, **changes)
    whole = changed(settings, save_dir=tmp_path / "whole")
    finetune(prices, whole)
    real, calls = training.pinball_sum, []

    def asked(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(training, "pinball_sum", asked)
    assert finetune(prices, settings).outcome.interrupted
    finetune(prices, changed(settings, resume=True))
    assert_same_run(whole, settings)


def test_asked_twice_it_leaves_at_once(
    prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = training.pinball_sum, []

    def impatient(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) in (5, 6):  # the same key press, reported twice
            os.kill(os.getpid(), signal.SIGINT)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(training, "pinball_sum", impatient)
    assert finetune(prices, settings).outcome.steps == 5
    calls.clear()
    monkeypatch.setattr(training_loop, "Interruption", functools.partial(Interruption, together_s=-1.0))
    with pytest.raises(KeyboardInterrupt):
        finetune(prices, changed(settings, resume=True))
    assert len(calls) == 5
    # What was saved before is still there, and whole.
    assert last_state(settings)["optimization"]["steps"] == 9


def test_a_finished_run_takes_its_states_away(prices: dict[str, pd.DataFrame], settings: TrainLoraSettings) -> None:
    finetune(prices, changed(settings, epochs=1, keep_checkpoints=False))
    assert {path.name for path in settings.save_dir.iterdir()} == {
        "best_lora_weights.pth", "training_history.csv", "training_curve.png",
    }  # fmt: skip


def test_a_run_that_failed_at_its_end_is_only_scored_again(
    prices: dict[str, pd.DataFrame], settings: TrainLoraSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(settings, epochs=1)

    def fails(*_: Any) -> None:
        raise RuntimeError("no ink")

    with monkeypatch.context() as patch:
        patch.setattr("stocklora.plots.curves.plot_training_curve", fails)
        with pytest.raises(RuntimeError, match="no ink"):
            finetune(prices, settings)
    monkeypatch.setattr(training, "pinball_sum", die)  # not one step more
    run = finetune(prices, changed(settings, resume=True))
    assert run.outcome.steps == last_state(settings)["optimization"]["steps"]
    assert run.weights_path.is_file()


def test_another_run_in_the_same_folder_keeps_the_unfinished_one(
    prices: dict[str, pd.DataFrame], whole: TrainLoraSettings, settings: TrainLoraSettings,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copy_of(whole, settings)  # its states are kept
    states = {path.name: path.read_bytes() for path in (settings.save_dir / "last").iterdir()}
    finetune(prices, changed(settings, epochs=1, keep_checkpoints=False))
    assert "last-before" in capsys.readouterr().err
    aside = settings.save_dir / "last-before"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == states
    assert not (settings.save_dir / "last").exists()
    finetune(prices, changed(settings, resume=True, epochs=1))
    assert "nothing to resume" in capsys.readouterr().err


def test_states_load_as_plain_tensors_alone(prices: dict[str, pd.DataFrame], settings: TrainLoraSettings) -> None:
    finetune(prices, changed(settings, epochs=1))
    folder = settings.save_dir / "last"
    assert len(list(folder.glob("state-*.pt"))) == len(list(folder.glob("state-*.json"))) == 2
    state = last_state(settings)  # weights_only
    assert set(state["optimization"]) == {"trained", "optimizer", "schedule", "steps"}
    assert state["progress"]["epoch"] == 2
    assert len(state["progress"]["history"]) == 2
    (process,) = state["random"]
    assert {"python", "numpy", "torch"} <= set(process)


# -------------------------------------------------------------------------------------------- damaged checkpoints


@pytest.fixture
def three(tmp_path: Path) -> Checkpoints:
    """A folder in which three states were saved: two are left."""
    checkpoints = Checkpoints(tmp_path / "last", IDENTITY)
    for step in (10, 20, 30):
        checkpoints.save(made_up(step), 1, step)
    return Checkpoints(tmp_path / "last", IDENTITY)


IDENTITY = identity_of(
    TrainLoraSettings(), {"tickers": ["A"], "sha256": "1"}, {"config_sha256": "2", "revision": None}, 1,
    {"device": "cpu", "dtype": "float32"},
)  # fmt: skip


def made_up(step: int) -> dict[str, Any]:
    return {"optimization": {"steps": step, "trained": torch.full((1000,), float(step))}}


def step_of(state: dict[str, Any] | None) -> int:
    assert state is not None
    return int(state["optimization"]["steps"])


class Malice:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def replace_content(path: Path, content: bytes) -> None:
    """With a manifest that fits."""
    path.write_bytes(content)
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest |= {"bytes": len(content), "sha256": run_state.sha256_of(path)}
    path.with_suffix(".json").write_text(json.dumps(manifest))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "its checksum": flip_a_byte,
    "vanished": lambda path: path.unlink(),
    "not finished": lambda path: path.with_suffix(".json").unlink(),
    "damaged manifest": lambda path: path.with_suffix(".json").write_text('{"bytes": 1'),
    "cannot be read|holds code": lambda path: replace_content(path, b"no archive"),
    "holds code": lambda path: replace_content(path, pickle.dumps(Malice(path.with_name("ran")), protocol=2)),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    three: Checkpoints, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    old, new = sorted(three.folder.glob("*.pt"))
    DAMAGE[reason](new)
    assert step_of(three.load()) == 20
    said = capsys.readouterr()
    assert any(part in said.err for part in reason.split("|")), said.err
    assert new.name in said.err
    assert old.name in said.err
    assert old.name in said.out
    # The good one is not what gives way to the next.
    three.save(made_up(40), 1, 40)
    assert old.exists()
    assert not new.exists()
    DAMAGE["vanished"](max(three.folder.glob("*.pt")))
    assert step_of(Checkpoints(three.folder, IDENTITY).load()) == 20


def test_a_run_killed_before_its_first_state_was_finished_begins_anew(three: Checkpoints) -> None:
    for manifest in three.folder.glob("*.json"):
        manifest.unlink()
    assert three.load() is None


@pytest.mark.parametrize("reason", [reason for reason in DAMAGE if reason != "not finished"])
def test_where_every_state_is_damaged_nothing_is_pretended(three: Checkpoints, reason: str) -> None:
    for path in list(three.folder.glob("*.pt")):
        DAMAGE[reason](path)
    with pytest.raises(UserError, match=reason) as error:
        three.load()
    assert "leave out --resume" in str(error.value)
    assert not (three.folder / "ran").exists()


def test_a_state_inside_an_archive_runs_no_code_either(three: Checkpoints) -> None:
    for path in three.folder.glob("*.pt"):
        other = path.with_name("other")
        torch.save({"format": run_state.FORMAT, "x": Malice(path.with_name("ran"))}, other)
        replace_content(path, other.read_bytes())
    with pytest.raises(UserError, match="holds code, which is never run"):
        three.load()
    assert not (three.folder / "ran").exists()


def test_a_foreign_or_newer_state_is_refused(three: Checkpoints) -> None:
    for path, content in zip(
        sorted(three.folder.glob("*.pt")), ({"weights": 1}, {"format": run_state.FORMAT, "format_version": 99}),
        strict=True,
    ):  # fmt: skip
        torch.save(content, path.with_name("other"))
        replace_content(path, path.with_name("other").read_bytes())
    with pytest.raises(UserError, match=r"newer version.*not written by train_lora"):
        three.load()


def test_a_full_disk_costs_a_state_and_nothing_else(three: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    # Files of this process may not grow beyond 3000 bytes, and torch's own writer meets that limit.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        assert three.save(made_up(40), 1, 40) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    newest = sorted(three.folder.glob("*.pt"))[-1]
    said = capsys.readouterr().err
    assert "not saved" in said
    assert newest.name in said
    assert len(list(three.folder.iterdir())) == 4  # no remains
    assert step_of(three.load()) == 30


def test_training_goes_on_where_states_cannot_be_saved(
    prices: dict[str, pd.DataFrame], whole: TrainLoraSettings, settings: TrainLoraSettings,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"as far as it went")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_state.torch, "save", full)
        patch.setattr("stocklora.finetune.fit.save_run", lambda *_: None)  # it uses the same torch
        run = finetune(prices, settings)
    said = capsys.readouterr().err
    assert "disk is full" in said
    assert "training goes on, none was saved before it" in said
    assert not list(settings.save_dir.rglob("*.pt"))
    plain = load_weights(whole.save_dir / "best_lora_weights.pth").training["test_scores"]
    assert_same(as_json_types({name: dataclasses.asdict(score) for name, score in run.test_scores.items()}), plain)


def test_states_that_cost_much_time_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(run_state.time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.due_after_epoch()  # the first tells what one costs
    real = torch.save

    def slow(*arguments: Any) -> None:
        now[0] += 2.0
        real(*arguments)

    monkeypatch.setattr(run_state.torch, "save", slow)
    checkpoints.save(made_up(1), 1, 1)
    now[0] += 39.0
    assert not checkpoints.due_after_epoch()
    now[0] += 1.5
    assert checkpoints.due_after_epoch()
    asked = Checkpoints(tmp_path, IDENTITY, every=4)
    asked.save(made_up(1), 1, 1)
    assert asked.due_after_epoch()
    assert [step for step in range(1, 13) if asked.due_after_step(step)] == [4, 8, 12]


# ------------------------------------------------------------------------------------------------ the same run?


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 3}, "--batch_size was 1 and is now 3"),
        ({"epochs": 9}, "--epochs was 3 and is now 9 (the learning rate's schedule was made for it)"),
        ({"patience": 1, "learning_rate": 0.5}, "--learning_rate was 0.001 and is now 0.5"),
        ({"targets_per_sequence": None}, "--targets_per_sequence was 15 and is now not given"),
    ],
)
def test_other_settings_are_refused_by_name(
    prices: dict[str, pd.DataFrame], whole: TrainLoraSettings, changes: dict[str, Any], named: str
) -> None:
    home = whole.save_dir
    before = sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*"))
    with pytest.raises(UserError) as error:
        finetune(prices, changed(whole, resume=True, **changes))
    assert named in str(error.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*")) == before


def test_other_prices_are_refused_by_name(prices: dict[str, pd.DataFrame], settings: TrainLoraSettings) -> None:
    settings = changed(settings, epochs=1)
    finetune(prices, settings)
    nudged = {name: frame.copy() for name, frame in prices.items()}
    nudged["AAA"].iloc[5, 3] *= 1.0001
    for other, named in (
        (nudged, "other prices"),
        ({"AAA": prices["AAA"]}, "other tickers"),
        ({name: prices[name] for name in ("BBB", "AAA")}, "other tickers, or in another order"),
        ({name: frame.iloc[1:] for name, frame in prices.items()}, "more or fewer rows"),
    ):
        with pytest.raises(UserError, match=named):
            finetune(other, changed(settings, resume=True))
    # Where they lie does not matter.
    finetune(prices, changed(settings, resume=True, data=[Path("elsewhere.csv")], tickers=["AAA", "BBB"]))


def test_what_else_makes_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(json.dumps(IDENTITY))
    check_identity(before, IDENTITY)
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="ran in 1 processes, now there are 2"):
        check_identity(before, {**IDENTITY, "processes": 2})
    with pytest.raises(UserError, match="another base model"):
        check_identity(before, {**IDENTITY, "base_model": {"config_sha256": "3", "revision": None}})
    with pytest.raises(UserError, match="--teacher is another one"):
        check_identity(before, {**IDENTITY, "teacher": "4"})
    check_identity(before, {**IDENTITY, "place": {**IDENTITY["place"], "device": "cuda", "compile": True}})
    assert "device cpu -> cuda, compile False -> True: the run goes on, but not to the last" in capsys.readouterr().err
    # A state from before a setting existed: that run had its default.
    del before["settings"]["patience"]
    check_identity(before, IDENTITY)
    now = {**IDENTITY, "settings": {**IDENTITY["settings"], "patience": 2}}
    with pytest.raises(UserError, match="--patience was 5 and is now 2"):
        check_identity(before, now)


def test_every_setting_is_free_or_checked() -> None:
    names = {field.name for field in dataclasses.fields(TrainLoraSettings)}
    assert names >= run_state.FREE_SETTINGS
    assert set(IDENTITY["settings"]) == names - run_state.FREE_SETTINGS


def test_the_command_to_go_on_is_the_command_that_was_given(tmp_path: Path) -> None:
    from train_lora import build_parser

    given = TrainLoraSettings(
        data=[tmp_path / "my prices.csv", Path("b.csv")], epochs=7, anonymize=False, indicators=["rsi", "macd"],
        learning_rate=3e-5, gradient_checkpointing=True, test_from="2020-01-02", checkpoint_every=5,
    )  # fmt: skip
    import shlex

    program, script, *flags = shlex.split(resume_command(given, 1))
    assert (program, script) == ("python", "train_lora.py")
    parsed = resolve_settings(build_parser().parse_args(flags), TrainLoraSettings)
    assert parsed == changed(given, resume=True)
    assert resume_command(changed(given, resume=True), 1) == resume_command(given, 1)
    assert "same command" in resume_command(given, 2)


def test_random_states_come_back() -> None:
    import random

    def draws() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    draws()
    state = random_state()
    first = draws()
    draws()
    set_random_state(state)
    assert draws() == first
