"""Checkpoints of instruction tuning: whole ones told from half ones, and a run told from another. No heavy imports."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocklora.base_models.foreign_code import check_names_no_code
from stocklora.cli.console import UserError, say, warn
from stocklora.runtime.files import json_of, sha256_of, sync, write_json

MANIFEST = "stocklora_checkpoint.json"  # written last
RUN_NAME = "training_settings.json"
STATE_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
# Settings that change nothing in what is computed.
FREE = {
    "resume_from_checkpoint", "output_dir", "save_total_limit", "logging_steps", "report_to", "preflight_only",
    "device", "data_path", "validation_path", "model_path",
}  # fmt: skip
# Settings without which the checkpoint does not fit the model at all.
SHAPE = ("method", "lora_r", "lora_target_modules", "use_dora")


def seal(folder: Path) -> None:
    """Put a checkpoint's files on the disk and, last, their list: half a checkpoint is seen as half a checkpoint.

    Raises:
        OSError, UserError: they cannot be written.
    """
    settings = folder.parent / RUN_NAME
    if settings.is_file():  # a checkpoint that is copied away still says how it was made
        shutil.copyfile(settings, folder / RUN_NAME)
    sync(folder, files=True)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    sizes, digests = ({path.name: of(path) for path in files} for of in (lambda path: path.stat().st_size, sha256_of))
    write_json(folder / MANIFEST, {"step": _step(folder), "files": sizes, "sha256": digests})
    sync(folder.parent)


def unseal(folder: Path) -> None:
    """Take the list away, before what it vouches for changes."""
    (folder / MANIFEST).unlink(missing_ok=True)


def let_go(output_dir: Path, most: int, best: str | None) -> None:
    """Remove what is more than ``most`` checkpoints, the oldest first; the newest stays, and the ``best``.

    What a killed run left half written or half removed goes as well; not what only cannot be read at the moment.
    """
    whole = checkpoints_in(output_dir)
    spare = [path for path in whole[:-1] if best is None or path.resolve() != Path(best).resolve()]
    halves = [path for path in _all_checkpoints(output_dir) if not (path / MANIFEST).exists()]
    for path in [*halves, *spare[: max(0, len(whole) - most)]]:
        with contextlib.suppress(OSError):  # what cannot be taken away must not end a run
            unseal(path)
            shutil.rmtree(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, in the order of their steps."""
    return [path for path in _all_checkpoints(folder) if fault_of(path) is None]


def _all_checkpoints(folder: Path) -> list[Path]:
    """Whole or not, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _step(path) is not None]
    return sorted(found, key=lambda path: _step(path) or 0)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None where it is whole."""
    missing = [name for name in STATE_FILES if not (folder / name).is_file()]
    if missing:
        return f"it has no {missing[0]}"
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "model.safetensors",
                                                      "model.safetensors.index.json")):  # fmt: skip
        return "it has no weights"
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last: the run was stopped while it wrote the checkpoint"
    try:
        listed = json_of((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, size in listed.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                return f"{name} is missing or has another size than when it was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def damage_of(folder: Path) -> str | None:
    """As ``fault_of``, every byte read."""
    if (fault := fault_of(folder)) is not None:
        return fault
    try:
        # those that were written before checksums were have sizes alone
        digests = json_of((folder / MANIFEST).read_text(encoding="utf-8")).get("sha256", {})
        return next((f"{name} is damaged" for name in digests if sha256_of(folder / name) != digests[name]), None)
    except (OSError, ValueError, TypeError) as error:
        return f"it cannot be read ({error})"


def find_checkpoint(given: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means.

    Raises:
        UserError: there is none, or only half of one; the message names one that can be resumed.
    """
    if given is None:
        return None
    if given in ("last", "auto", "true", "True"):
        for found in reversed(_all_checkpoints(output_dir)):
            if (fault := damage_of(found)) is None:
                check_names_no_code(found)
                return found
            warn(f"{found} is passed over: {fault}")
        raise UserError(
            f"--resume_from_checkpoint {given}: no whole checkpoint in {output_dir}; leave the flag out to begin anew"
        )
    folder = Path(given)
    around = checkpoints_in(folder if folder.is_dir() and not _step(folder) else folder.absolute().parent)
    others = [path for path in around if path.resolve() != folder.resolve()]
    hint = f"; there is {others[-1]}" if others else f"; {folder.parent} holds no other: leave the flag out"
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint: no folder {folder}{hint}")
    fault = damage_of(folder)
    if fault is not None:
        raise UserError(f"--resume_from_checkpoint {folder}: {fault}{hint}")
    check_names_no_code(folder)
    return folder


def check_room(output_dir: Path) -> None:
    """Refuse a folder with whole checkpoints of a run that has not finished: they may be worth hours.

    Raises:
        UserError: it has some.
    """
    if not checkpoints_in(output_dir):
        return
    try:
        finished = json_of((output_dir / RUN_NAME).read_text(encoding="utf-8")).get("finished") is True
    except (OSError, ValueError, AttributeError):
        finished = False
    if not finished:
        raise UserError(
            f"{output_dir} holds checkpoints of a run that has not finished; go on with --resume_from_checkpoint last, "
            f"give another --output_dir, or remove {output_dir}"
        )


def make_room(output_dir: Path, checkpoint: Path | None) -> None:
    """Remove what a new run would take for its own: all checkpoints of a finished one, or those after ``checkpoint``.

    Args:
        checkpoint: from which a run is taken up; what it left behind later is computed anew.
    """
    step = -1 if checkpoint is None else _step(checkpoint)
    for path in _all_checkpoints(output_dir):
        if step is not None and (_step(path) or 0) > step:
            if checkpoint is not None:
                say(f"removing {path}, which is later than {checkpoint}")
            unseal(path)
            shutil.rmtree(path)


def check_steps_left(checkpoint: Path, steps: int) -> None:
    """Refuse to go on from where a run of ``steps`` steps has nothing to do any more.

    The last step's checkpoint of a run that was stopped before it wrote its folder is taken up: that is left to do.

    Raises:
        UserError: the checkpoint lies beyond the run's end, or at the end of a finished run.
    """
    step = _step(checkpoint) or 0
    try:
        finished = json_of((checkpoint.absolute().parent / RUN_NAME).read_text(encoding="utf-8")).get("finished")
    except (OSError, ValueError, AttributeError):
        finished = False
    if step > steps or (step == steps and finished is True):
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} is at step {step}, and a run with these settings ends at {steps}: "
            f"nothing would be trained; raise --num_epochs or --max_steps, or leave the flag out to begin anew"
        )
    if step == steps:
        say(f"{checkpoint} is at the run's last step: nothing is left to train, and the folder is written from it")


def check_same_run(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Compare this run's settings and data with those that ``checkpoint`` was made with.

    What differs without changing the model's shape is allowed, and said: such a run goes on from the checkpoint, but
    does not end where the earlier one would have.

    Args:
        facts: ``method``, the settings by name, ``model`` (the base's configuration hash) and ``data`` (hashes).

    Raises:
        UserError: the checkpoint is of another model or of adapters of another shape.
    """
    places = (checkpoint / RUN_NAME, checkpoint.absolute().parent / RUN_NAME)
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        warn(f"{checkpoint} does not say with which settings it was made; they cannot be compared")
        return
    try:
        earlier = dict(json_of(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        warn(f"{path} is damaged; the settings that {checkpoint} was made with cannot be compared")
        return
    if earlier.get("model") != facts["model"]:
        raise UserError(f"{checkpoint} was made from another model; give its --model_path, or begin anew")
    differing = [name for name in facts if name in earlier and name not in FREE and earlier[name] != facts[name]]
    for name in SHAPE:
        if name in differing:
            raise UserError(
                f"{checkpoint} was made with {name} {_shown(earlier[name])}, not {_shown(facts[name])}; give the same, "
                f"or begin anew without --resume_from_checkpoint"
            )
    if differing:
        changes = ", ".join(f"{name} {_shown(earlier[name])} -> {_shown(facts[name])}" for name in differing)
        warn(f"going on from {checkpoint} with changes ({changes}): this is not the exact continuation of that run")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None
