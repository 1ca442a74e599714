"""Which folders make a chat model: a base and the adapters on it, or a fully tuned model. Nothing heavy is loaded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocklora.base_models.folders import check_model_folder, check_weight_file, command_for, describe_model, read_json
from stocklora.base_models.foreign_code import check_names_no_code
from stocklora.cli.console import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TRAINING_INFO = "training_info.json"
BASE = "none"  # the name under which the chat and the server know the base without an adapter
BASE_NAMES = (BASE, "base")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TRAIN_COMMAND = "python fine_tune_qwen.py --config_file configs/train_config_lora.json"


@dataclass(frozen=True)
class Sources:
    """Folders to load.

    Attributes:
        base: a whole model. adapters: folders by name, in the order given; empty for a model without any.
        base_name: what to call it.
    """

    base: Path
    adapters: dict[str, Path]
    base_name: str


def find_sources(base_model: Path | None, tuned: Sequence[str], any_base: bool = False) -> Sources:
    """What ``--base_model`` and ``--lora_model`` mean.

    Args:
        tuned: ``FOLDER`` or ``NAME=FOLDER`` each: adapters, or one folder of a fully tuned model.
        any_base: do not insist on the base's name, only on its shape.

    Raises:
        UserError: a folder that is not there or not a model, a name given twice, adapters over different bases,
            a base that the adapter was not trained over.
    """
    folders = named_folders(tuned)
    whole = {name: folder for name, folder in folders.items() if not is_adapter(folder)}
    if whole:
        name, folder = next(iter(whole.items()))
        check_model_folder(folder)
        if len(folders) > 1:
            raise UserError(f"{folder} is a whole model, not an adapter, and goes with no other: give it alone")
        if base_model is not None and base_model.resolve() != folder.resolve():
            raise UserError(
                f"{folder} is a fully tuned model, not an adapter, and needs no base: leave out --base_model "
                f"(or give that folder alone, to talk to the base)"
            )
        return Sources(folder, {}, name)
    if base_model is None:
        if not folders:
            raise UserError("no model: give --lora_model FOLDER, --base_model FOLDER, or both")
        bases = {folder: base_of(folder) for folder in folders.values()}
        base_model = next(iter(bases.values()))
        for folder, other in bases.items():
            if other.resolve() != base_model.resolve():
                raise UserError(
                    f"{next(iter(bases))} was trained over {base_model}, and {folder} over {other}: give adapters of "
                    f"one base"
                )
    elif not folders and (base_model / ADAPTER_CONFIG).is_file():
        raise UserError(f"{base_model} is an adapter, not a base model; give it with --lora_model")
    check_model_folder(base_model)
    for folder in folders.values():
        check_trained_over(folder, base_model, any_base)
    return Sources(base_model, folders, str(describe_model(base_model)["name"]))


def named_folders(tuned: Sequence[str]) -> dict[str, Path]:
    """``FOLDER`` or ``NAME=FOLDER`` each -> folders by name, all of them there."""
    folders: dict[str, Path] = {}
    for text in tuned:
        name, equals, rest = text.partition("=")
        if not equals or Path(text).exists():
            name, rest = "", text
        folder = Path(rest)
        name = name or folder.absolute().name
        if not folder.is_dir():
            raise UserError(f"no adapter folder {folder}; train one with: {TRAIN_COMMAND}")
        if name.lower() in BASE_NAMES:
            raise UserError(f"'{name}' is what the base model is called; give {folder} another name: NAME={folder}")
        if any(character.isspace() for character in name):
            raise UserError(f"an adapter's name has no blanks, and '{name}' has; give one: NAME={folder}")
        if name in folders:
            raise UserError(f"two adapters are called '{name}'; name one of them: NAME={folder}")
        folders[name] = folder
    return folders


def is_adapter(folder: Path) -> bool:
    """Whether an adapter lies there; a folder of neither kind is left to the check of whole models.

    Raises:
        UserError: a checkpoint's parent, or an adapter folder that was not written to its end.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        check_names_no_code(folder)
        weights = first_file(folder, *ADAPTER_WEIGHTS)
        if weights is None:
            raise UserError(
                f"{folder} has {ADAPTER_CONFIG} and no adapter_model.safetensors: it was not copied or written to its "
                f"end; copy it again, or train again"
            )
        try:
            check_weight_file(weights)
        except (OSError, ValueError) as error:
            raise UserError(f"the adapter in {folder} is not whole: {error}; copy it again, or train again") from None
        return True
    if not (folder / "config.json").is_file():
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
        hint = f"; there is a checkpoint in it: {checkpoints[-1]}" if checkpoints else f"; train: {TRAIN_COMMAND}"
        raise UserError(f"{folder} holds neither an adapter ({ADAPTER_CONFIG}) nor a model (config.json){hint}")
    return False


def first_file(folder: Path, *names: str) -> Path | None:
    """The first of ``names`` that is a file in ``folder``."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def training_info(folder: Path) -> dict[str, Any]:
    """What training wrote about itself, in the folder or (for a checkpoint) beside it; empty where there is none.

    Raises:
        UserError: it is not a mapping in JSON.
    """
    path = next((at for at in (folder / TRAINING_INFO, folder.absolute().parent / TRAINING_INFO) if at.is_file()), None)
    if path is None or (path.parent != folder and not folder.name.startswith("checkpoint-")):
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it, or train again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping; remove it, or train again")
    return content


def trained_base(folder: Path) -> dict[str, Any]:
    """What is known of the base that ``folder`` was trained over: ``path``, ``name``, ``config_sha256`` or fewer."""
    recorded = training_info(folder).get("base_model")
    facts = dict(recorded) if isinstance(recorded, dict) else {"path": recorded} if recorded else {}
    if (folder / ADAPTER_CONFIG).is_file():
        try:
            config = read_json(folder / ADAPTER_CONFIG)
            named = config.get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"cannot read {folder / ADAPTER_CONFIG}: {error}; copy the folder again") from None
        if named:
            facts.setdefault("path", named)
    return {key: value for key, value in facts.items() if value}


def base_of(folder: Path) -> Path:
    """The folder of the base that an adapter was trained over.

    Raises:
        UserError: nothing names it, or it is not on this machine.
    """
    facts = trained_base(folder)
    named = [str(facts[key]) for key in ("path", "name") if key in facts]
    if not named:
        raise UserError(f"{folder} does not say which base model it was trained over; give --base_model FOLDER")
    tries = [*map(Path, named), *(Path("models") / last_part(text) for text in named)]
    for path in tries:
        if (path / "config.json").is_file():
            return path
    save_dir = Path("models") / last_part(named[0])
    hub_name = next((text for text in named if HUB_NAME.fullmatch(text)), None)
    command = (
        f"python download_model.py --model {hub_name} --save_dir {save_dir}" if hub_name else command_for(save_dir)
    )
    raise UserError(
        f"the base model of {folder}, {named[0]}, is not here; give --base_model FOLDER, or fetch it: {command}"
    )


def last_part(name: str) -> str:
    """The folder's own name in a path of any system, or the model's in a hub's ``owner/model``."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]


def check_trained_over(folder: Path, base: Path, any_base: bool = False) -> None:
    """Refuse a base that the adapter's records say is another model.

    Two models of one shape, a base and its instruct version say, are told apart by their names alone.

    Raises:
        UserError: naming both.
    """
    facts = trained_base(folder)
    given: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        given = describe_model(base)
    was = facts.get("name") or facts.get("path")
    if was is None:
        return
    short = last_part(str(was))
    digest = facts.get("config_sha256")
    other_shape = digest is not None and digest != given.get("config_sha256")
    names = {str(given.get("name", "")), base.absolute().name}
    same_folder = "path" in facts and Path(str(facts["path"])).absolute() == base.absolute()
    other_name = not same_folder and str(was) not in names and short not in names
    if other_shape or (other_name and not any_base):
        hint = "" if other_shape else "; if it is the same model under another name, add --any_base"
        raise UserError(
            f"{folder} was trained over {facts.get('name', short)}, and {base} is another model; give --base_model the "
            f"folder of {short}{hint}"
        )
