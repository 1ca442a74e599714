"""Checkpoints of the assistant and its last folder, as TRL writes them, under faults; and which of them is believed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import (
    ERRORS,
    MOST_CALLS,
    content_of,
    copied_at_each_call,
    failing,
    in_a_child,
    is_written,
    killed,
    most_bytes,
)
from sft_folders import instruction_rows

from stocklora.cli.console import UserError
from stocklora.instruct.sft import run as sft_run
from stocklora.instruct.sft.checkpoints import (
    check_room,
    checkpoints_in,
    damage_of,
    fault_of,
    find_checkpoint,
    make_room,
)
from stocklora.instruct.sft.settings import Resolved, SftSettings

forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@dataclasses.dataclass
class Run:
    """A finished run of two steps, a checkpoint each, and what can write again as it did."""

    settings: SftSettings
    prepared: Any
    trainer: Any

    @property
    def folder(self) -> Path:
        return self.settings.output_dir

    def again(self, **changes: Any) -> int:
        return start(dataclasses.replace(self.settings, **changes))

    def write_checkpoint(self, folder: Path, step: int, best: int | None = None) -> None:
        """Into ``folder``, as the run that has reached ``step`` does; its weights are that number."""
        self.trainer.args.output_dir = str(folder)
        self.trainer.state.global_step, self.trainer.state.best_global_step = step, best
        self.trainer.state.best_model_checkpoint = None
        fill(self.trainer.model, step)
        with sft_run.advice_on_failures(folder):
            self.trainer._save_checkpoint(self.trainer.model, None)

    def write_model(self, folder: Path, version: int) -> None:
        fill(self.trainer.model, version)
        with sft_run.advice_on_failures(folder):
            sft_run.save_model(self.prepared, self.trainer.model, folder)


def start(settings: SftSettings) -> int:
    names = [field.name for field in dataclasses.fields(SftSettings)]
    return sft_run.run_training(Resolved(settings, dict.fromkeys(names, "default")), "fine_tune_qwen.py")


def fill(model: Any, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def number_in(folder: Path) -> int:
    """What all weights of an adapter are."""
    (value,) = {float(value) for tensor in weights_in(folder).values() for value in tensor.flatten()}
    return int(value)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, caught = tmp_path_factory.mktemp("sft"), []
    rows = folder / "rows.json"
    rows.write_text(json.dumps(instruction_rows(12), ensure_ascii=False), encoding="utf-8")
    settings = SftSettings(
        model_path=tiny_model, data_path=[rows], output_dir=folder / "out", use_lora=True, lora_r=2, max_steps=2,
        batch_size=4, dtype="float32", eval_steps=1, device="cpu",
    )  # fmt: skip
    finish = sft_run._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_run, "_finish", lambda *arguments: caught.append(arguments) or finish(*arguments))
        assert start(settings) == 0
    return Run(settings, *caught[0][:2])


def resumed_step(folder: Path) -> int:
    """Of the checkpoint that a resumed run goes on from; what is later or half goes, as it begins."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        found = find_checkpoint("last", folder)
        make_room(folder, found)
    assert found is not None
    assert json.loads((found / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == number_in(found)
    return number_in(found)


@forked
def test_a_call_that_fails_leaves_the_checkpoint_before_it(finished: Run, tmp_path: Path) -> None:
    def every_call() -> None:
        finished.write_checkpoint(tmp_path, 1)
        before, steps = content_of(tmp_path), []
        for at in range(1, MOST_CALLS):
            with failing(tmp_path, at, ERRORS[at % len(ERRORS)]) as calls:
                written = is_written(lambda: finished.write_checkpoint(tmp_path, 2))
            if calls.number < at:
                break
            steps.append(resumed_step(tmp_path))
            assert steps[-1] == 2 or not written, f"call {at}"
            assert tmp_path / "checkpoint-1" in checkpoints_in(tmp_path), f"call {at}"
            shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)
            assert content_of(tmp_path) == before, f"call {at}"
        assert 30 < at < MOST_CALLS - 1
        assert steps.count(1) > 20
        for limit in (0, 100, 8_000, 20_000):  # amid the bytes of one library or another
            with most_bytes(limit):
                assert not is_written(lambda: finished.write_checkpoint(tmp_path, 2))
            assert resumed_step(tmp_path) == 1
        finished.write_checkpoint(tmp_path, 2)
        assert resumed_step(tmp_path) == 2

    assert in_a_child(every_call) == 0


@forked
def test_a_process_killed_at_any_call_leaves_a_whole_checkpoint(finished: Run, tmp_path: Path) -> None:
    """While the third is written, and the second is let go of after it, since the first is the best."""
    folder, states, steps = tmp_path / "folder", tmp_path / "states", []

    def once() -> None:
        for step in (1, 2):
            finished.write_checkpoint(folder, step)
        with copied_at_each_call(folder, states):
            finished.write_checkpoint(folder, 3, best=1)

    assert in_a_child(once) == 0
    for state in sorted(states.iterdir()):
        steps.append(resumed_step(state))
        whole = {path.name for path in checkpoints_in(state)}
        assert {"checkpoint-1", f"checkpoint-{steps[-1]}"} <= whole, state.name
        assert {path.name for path in state.iterdir()} - {"checkpoint-2"} == whole - {"checkpoint-2"}, state.name
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}
    assert {path.name for path in folder.iterdir()} == {"checkpoint-1", "checkpoint-3"}


@forked
def test_a_checkpoint_that_is_written_again_is_not_believed_meanwhile(finished: Run, tmp_path: Path) -> None:
    """After the last step of an epoch, and once more at its end, with what was judged there."""
    folder, states = tmp_path / "folder", tmp_path / "states"

    def twice() -> None:
        finished.write_checkpoint(folder, 1)
        finished.trainer.state.log_history.append({"eval_loss": 0.5})
        with copied_at_each_call(folder, states):
            finished.write_checkpoint(folder, 1)

    assert in_a_child(twice) == 0
    whole = [fault_of(state / "checkpoint-1") is None for state in sorted(states.iterdir())]
    assert whole[0]
    assert whole[-1]
    assert whole.count(False) > 20
    assert all(damage_of(path) is None for state in states.iterdir() for path in checkpoints_in(state))


def test_bytes_reach_the_disk_before_what_vouches_for_them(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    vouched: list[str] = []
    replace = os.replace

    def replaced(source: Path, target: Path) -> None:
        if Path(target).name in ("stocklora_checkpoint.json", "adapter_config.json"):
            beside = [*Path(source).parent.iterdir(), *Path(target).parent.iterdir()]
            unsynced = {path.name for path in beside if path.is_file() and path.stat().st_ino not in synced}
            assert unsynced == set()
            vouched.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", replaced)
    finished.write_checkpoint(tmp_path, 1)
    (tmp_path / "last").mkdir()
    finished.write_model(tmp_path / "last", 1)
    assert vouched == ["stocklora_checkpoint.json", "adapter_config.json"]
    assert {tmp_path.stat().st_ino, (tmp_path / "last").stat().st_ino} <= synced


@forked
def test_the_last_folder_is_the_old_one_or_the_new_one_or_none(finished: Run, tmp_path: Path) -> None:
    """None only where it is told so: the configuration is not there either, and the run that goes on writes it."""
    folder, states = tmp_path / "folder", tmp_path / "states"
    folder.mkdir()

    def version(place: Path) -> int:
        assert (place / "adapter_config.json").exists() <= (place / "adapter_model.safetensors").exists()
        return number_in(place) if (place / "adapter_config.json").exists() else 0

    def every_call() -> None:
        finished.write_model(folder, 1)
        before = content_of(folder)
        for at in range(1, MOST_CALLS):
            with failing(folder, at, ERRORS[at % len(ERRORS)]) as calls:
                written = is_written(lambda: finished.write_model(folder, 2))
            if calls.number < at:
                break
            assert version(folder) in ({2} if written else {0, 1}), f"call {at}"
            assert written or not list(folder.glob(".saving-*")), f"call {at}"
            finished.write_model(folder, 1)
            assert content_of(folder) == before
        assert 10 < at < MOST_CALLS - 1
        finished.write_model(folder, 1)
        for limit in (0, 100, 8_000):
            with most_bytes(limit):
                assert not is_written(lambda: finished.write_model(folder, 2))
            assert version(folder) == 1
        with copied_at_each_call(folder, states):
            finished.write_model(folder, 2)

    assert in_a_child(every_call) == 0
    found = [version(state) for state in sorted(states.iterdir())]
    assert set(found) == {0, 1, 2}
    half = next(state for state in sorted(states.iterdir()) if list(state.glob(".saving-*")))
    finished.write_model(half, 2)
    assert content_of(half) == content_of(folder)


@forked
def test_a_run_that_is_killed_twice_goes_on_and_ends_where_it_would_have(finished: Run, tmp_path: Path) -> None:
    """Amid its second checkpoint, and amid the move of its last folder; by the same command each time."""
    out = tmp_path / "out"

    def run(killer: contextlib.AbstractContextManager[Any], **more: Any) -> int:
        def body() -> None:
            with killer:
                finished.again(output_dir=out, **more)

        return in_a_child(body)

    assert run(killed(out / "checkpoint-2", 20)) == -signal.SIGKILL
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-1"]
    with pytest.raises(UserError, match="--resume_from_checkpoint last"):
        check_room(out)
    moved = killed(out / ".saving-", 3, {"os.rename"})
    assert run(moved, resume_from_checkpoint="last") == -signal.SIGKILL
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-1", "checkpoint-2"]
    assert finished.again(output_dir=out, resume_from_checkpoint="last") == 0
    expected, got = weights_in(finished.folder), weights_in(out)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert content_of(out) == content_of(finished.folder)


@pytest.mark.parametrize("damage", ["cut", "turned", "gone"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(path.name for path in (finished.folder / "checkpoint-2").iterdir())
    folder = tmp_path / "out"
    for name in files:
        shutil.copytree(finished.folder, folder)
        path = folder / "checkpoint-2" / name
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + (b"" if damage == "cut" else bytes([content[middle] ^ 1]) + content[middle + 1 :])
        )
        if damage == "gone":
            path.unlink()
        found = find_checkpoint("last", folder)
        said = capsys.readouterr().err
        assert found == folder / "checkpoint-1", name
        assert "checkpoint-2 is passed over" in said
        assert len(said.splitlines()) == 1
        with pytest.raises(UserError, match="there is .*checkpoint-1"):
            find_checkpoint(str(folder / "checkpoint-2"), folder)
        shutil.rmtree(folder)


def test_half_a_checkpoint_alone_stops_no_new_run(finished: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(finished.folder / "checkpoint-1", folder / "checkpoint-1")
    with pytest.raises(UserError, match="holds checkpoints"):
        check_room(folder)
    (folder / "checkpoint-1" / "stocklora_checkpoint.json").unlink()
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_checkpoint("last", folder)
    check_room(folder)
    make_room(folder, None)
    assert list(folder.iterdir()) == []
