"""The states of a training run on disk, from which a stopped run goes on exactly as it would have.

``SAVE_DIR/last`` holds two generations, ``state-000007.pt`` and its manifest ``state-000007.json``. The manifest is
written last and names the state's size and checksum, so that half a checkpoint is seen as half a checkpoint and the
one before it is used. States load with ``torch.load(weights_only=True)``: no file can run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stocklora.cli.console import UserError, say, warn
from stocklora.finetune.settings import PRIOR_TEACHER, TrainLoraSettings
from stocklora.runtime.files import as_json_types, json_of, load_plain, replacing, sha256_of, write_json
from stocklora.runtime.machine import versions

FORMAT = "stocklora-run-state"
FORMAT_VERSION = 1
FOLDER = "last"
KEPT = 2
LARGEST_SHARE = 0.05  # of the time, that saving after epochs may take
# What a resumed run may be told otherwise: the course of training does not depend on it. Data, base model and teacher
# are known by their content, not by their path.
FREE_SETTINGS = frozenset({
    "checkpoint_every", "compile", "data", "device", "gradient_checkpointing", "keep_checkpoints",
    "max_tokens_per_batch", "model_path", "resume", "save_dir", "teacher", "teacher_model_path", "tickers",
    "trust_remote_code",
})  # fmt: skip
ROUNDING_SETTINGS = ("compile", "gradient_checkpointing", "max_tokens_per_batch")  # free, but not without a word

DATA_DIFFERENCES = {
    "tickers": "other tickers, or in another order", "rows": "more or fewer rows", "first": "another first day",
    "last": "another last day", "validation_from": "another first validation day",
    "test_from": "another first test day", "targets": "other days to learn from", "sha256": "other prices",
}  # fmt: skip


class Checkpoints:
    """The saved states of one run.

    Args:
        identity: what the run depends on, see ``identity_of``.
        every: steps between two states; None leaves it at the ends of epochs, if that costs little time.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], every: int | None = None) -> None:
        self.folder, self.identity, self.every = folder, dict(identity), every
        self._damaged: set[int] = set()
        self._saved_at, self._cost_s = -float("inf"), 0.0

    def due_after_step(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def due_after_epoch(self) -> bool:
        """Always with ``every``; otherwise unless epochs are so short that saving would take a notable share."""
        return self.every is not None or time.monotonic() - self._saved_at >= self._cost_s / LARGEST_SHARE

    @property
    def newest(self) -> Path | None:
        """The last state that was written whole, as far as is known without reading it."""
        good = [number for number in self._manifests() if number not in self._damaged]
        return self._path(good[0]) if good else None

    def save(self, state: Mapping[str, Any], epoch: int, step: int) -> Path | None:
        """Write a generation and let go of the third last; None, with a warning, where that failed.

        Args:
            epoch, step: where the run stands, for people to read.
        """
        started = time.monotonic()
        number = max(self._numbers("*"), default=0) + 1
        path = self.folder / f"state-{number:06d}.pt"
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "identity": as_json_types(self.identity),
            **state,
        }
        try:
            with replacing(path) as temporary:
                torch.save(content, temporary)
            about = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            write_json(path.with_suffix(".json"), {"format": FORMAT, **about, "epoch": epoch, "step": step})
        except (UserError, OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self._remove(number)
            before = f"the state before it, {self.newest.name}, stays" if self.newest else "none was saved before it"
            warn(f"the run's state was not saved: {error}; training goes on, {before}")
            return None
        self._prune()
        self._saved_at, self._cost_s = time.monotonic(), time.monotonic() - started
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole; each one that is not is named and passed over.

        None if none was ever finished: a run that was killed before has nothing that starting anew could lose.

        Raises:
            UserError: all that were finished are damaged, or the run had other data or settings.
        """
        if not self._manifests():
            return None
        reasons = []
        for number in sorted(set(self._numbers("*")), reverse=True):
            path = self._path(number)
            try:
                content = read_state(path)
            except UserError as error:
                self._damaged.add(number)
                reasons.append(str(error))
                continue
            for reason in reasons:
                warn(f"{reason}; using {path.name}, the state before it")
            check_identity(content["identity"], self.identity)
            say(f"{'resuming':<19} from {path}: step {content['optimization']['steps']}")
            return content
        if reasons:
            raise UserError(f"--resume: no usable state: {'; '.join(reasons)}; leave out --resume to start anew")
        return None

    def set_aside(self) -> None:
        """Keep what an unfinished run left here from being replaced by another run."""
        if not self._manifests():
            self.remove()
            return
        aside = self.folder.with_name(f"{self.folder.name}-before")
        Checkpoints(aside, {}).remove()
        try:
            os.replace(self.folder, aside)
        except OSError as error:
            raise UserError(
                f"{self.folder} holds an unfinished run and cannot be renamed to {aside.name}: {error.strerror}; "
                f"--resume goes on with that run, another --save_dir leaves it alone"
            ) from None
        warn(
            f"{self.folder} holds an unfinished run, which --resume would have gone on with; it is kept as {aside}: to "
            f"go on with it, name it {self.folder.name} again"
        )

    def remove(self) -> None:
        """Take the states away, and the folder where nothing else is in it."""
        for number in set(self._numbers("*")):
            self._remove(number)
        self._sweep()
        with contextlib.suppress(OSError):  # gone, or somebody keeps something there
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"state-{number:06d}.pt"

    def _numbers(self, suffix: str) -> Iterator[int]:
        for path in self.folder.glob(f"state-*.{suffix}"):
            if found := re.fullmatch(r"state-(\d{6,})\.(pt|json)", path.name):
                yield int(found[1])

    def _manifests(self) -> list[int]:
        return sorted(self._numbers("json"), reverse=True)

    def _prune(self) -> None:
        good = [number for number in self._manifests() if number not in self._damaged]
        for number in set(self._numbers("*")) - set(good[:KEPT]):
            self._remove(number)
        self._sweep()

    def _remove(self, number: int) -> None:
        with contextlib.suppress(OSError):  # what cannot be taken away must not end a run
            self._path(number).with_suffix(".json").unlink(missing_ok=True)  # first, so that no manifest lies
            self._path(number).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Temporary files of a process that was killed while it wrote."""
        for path in list(self.folder.glob(".state-*")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Any]:
    """A state that is what its manifest says, and holds nothing but tensors and plain values.

    Raises:
        UserError: it is not.
    """
    try:
        manifest = json_of(path.with_suffix(".json").read_text(encoding="utf-8"))
        size, digest = int(manifest["bytes"]), str(manifest["sha256"])
    except FileNotFoundError:
        raise UserError(f"{path} was not finished") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} has a damaged manifest") from None
    try:
        present = path.stat().st_size
        if present != size:
            raise UserError(f"{path} is cut short: {present:,} of {size:,} bytes")
        if sha256_of(path) != digest:
            raise UserError(f"{path} is damaged: its checksum is not the manifest's")
    except FileNotFoundError:
        raise UserError(f"{path} has vanished") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return load_plain(path, FORMAT, FORMAT_VERSION, "train_lora.py")


def identity_of(
    settings: TrainLoraSettings,
    data: Mapping[str, Any],
    base_model: Mapping[str, Any],
    processes: int,
    place: Mapping[str, str],
) -> dict[str, Any]:
    """What the course of a run depends on.

    Args:
        data: ``data_facts``. base_model: ``describe_model``. processes: that train together.
        place: device and number format; other ones change only rounding.
    """
    return {
        "settings": {
            name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE_SETTINGS
        },
        "data": dict(data),
        "base_model": {name: base_model.get(name) for name in ("config_sha256", "revision")},
        "teacher": _teacher_of(settings),
        "processes": processes,
        "place": {
            **place, "torch": versions().get("torch"), **{name: getattr(settings, name) for name in ROUNDING_SETTINGS}
        },
    }  # fmt: skip


def _teacher_of(settings: TrainLoraSettings) -> str | None:
    """What a run's teacher is known by: its file's content, or its name where it is no file."""
    path = settings.teacher
    if path is None or path == PRIOR_TEACHER:
        return None if path is None else str(path)
    return sha256_of(path)


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A run goes on with what it began with.

    Raises:
        UserError: naming the first difference that matters.
    """
    now = as_json_types(now)
    defaults = as_json_types(dataclasses.asdict(TrainLoraSettings()))
    for name in now["settings"]:
        # a state from before a setting was there had what is now its default
        old, new = before["settings"].get(name, defaults[name]), now["settings"][name]
        if old != new:
            why = " (the learning rate's schedule was made for it)" if name in ("epochs", "warmup_ratio") else ""
            raise _another_run(f"--{name} was {_as_typed(old)} and is now {_as_typed(new)}{why}")
    for name, new in now["data"].items():
        if before["data"].get(name) != new:
            raise _another_run(f"--data has {DATA_DIFFERENCES.get(name, name)}")
    if before["base_model"] != now["base_model"]:
        raise _another_run("--model_path is another base model")
    if before["teacher"] != now["teacher"]:
        raise _another_run("--teacher is another one")
    if before["processes"] != now["processes"]:
        raise _another_run(f"it ran in {before['processes']} processes, now there are {now['processes']}")
    if before["place"] != now["place"]:
        changes = [f"{name} {before['place'].get(name)} -> {new}" for name, new in now["place"].items()
                   if before["place"].get(name) != new]  # fmt: skip
        warn(f"--resume: {', '.join(changes)}: the run goes on, but not to the last bit as it would have")


def _another_run(difference: str) -> UserError:
    return UserError(
        f"--resume: the stopped run was another one: {difference}; give the same, or leave out --resume to start anew"
    )


def _as_typed(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value[:8])) or "nothing"
    return "not given" if value is None else str(value)


def resume_command(settings: TrainLoraSettings, processes: int) -> str:
    """What to type to go on with a run of these settings."""
    if processes > 1 or not settings.data:
        return "the same command with --resume"
    words = ["python", "train_lora.py"]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore
        if value == default or value is None or field.name == "resume":
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            words += [f"--{field.name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join([*words, "--resume"])


# ----------------------------------------------------------------------------------------------- random numbers


def random_state() -> dict[str, Any]:
    """Where this process's random generators stand, in plain values and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put ``random_state`` back."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, *rest = state["numpy"]
    np.random.set_state((kind, numbers.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
