"""The scripts that the page can run: their settings as a form, and a form's values as a command.

Sections, help, defaults and limits come from the settings dataclasses, as the flags do; nothing is listed twice.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stocklora.backtest.settings import BacktestSettings
from stocklora.base_models.download import DownloadModelSettings
from stocklora.baselines.settings import FrameworkSettings, TrainSettings
from stocklora.cli.console import PROJECT, UserError
from stocklora.cli.settings import READ_LAST, checked_values, default_of, element_type
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.forecaster.settings import ForecastSettings, MergeSettings
from stocklora.instruct.chat.settings import InferenceSettings
from stocklora.instruct.sft.settings import SftSettings
from stocklora.ledger.settings import LedgerSettings
from stocklora.prices.sources.request import DownloadSettings
from stocklora.web.workspace import Workspace


class Script(NamedTuple):
    """Attributes:
    settings: its dataclass. resume: the values that make it go on with a run that was stopped, None where it cannot.
    """

    settings: type
    resume: Mapping[str, Any] | None = None


SCRIPTS = {
    "download": Script(DownloadSettings),
    "download_model": Script(DownloadModelSettings, {}),  # goes on by itself
    "framework": Script(FrameworkSettings),
    "framework_llm": Script(ForecastSettings),
    "train": Script(TrainSettings),
    "train_lora": Script(TrainLoraSettings, {"resume": True}),
    "merge_lora": Script(MergeSettings),
    "backtest": Script(BacktestSettings, {"resume": True}),
    "ledger": Script(LedgerSettings),
    "fine_tune_qwen": Script(SftSettings, {"resume_from_checkpoint": "last"}),
    "inference_lora": Script(InferenceSettings),
}
KINDS = {int: "int", float: "float", bool: "bool", Path: "path", str: "text"}
FREE_TEXT = "TEXT"  # metavar of what is no path, whatever it looks like


def script_named(name: str) -> Script:
    """Raises:
    UserError: there is none.
    """
    if name not in SCRIPTS:
        raise UserError(f"no script {name[:40]!r}; there are: {', '.join(SCRIPTS)}")
    return SCRIPTS[name]


def form_of(name: str) -> dict[str, Any]:
    """The form of a script.

    Returns:
        ``sections``: each with its ``name`` and its ``fields``: name, flag, help, kind (int, float, bool, path, text),
        many, optional, choices, default, metavar.
    """
    script = script_named(name)
    fields = sorted(dataclasses.fields(script.settings), key=lambda field: field.metadata["section"] in READ_LAST)
    sections: dict[str, list[dict[str, Any]]] = {}
    for field in fields:
        info, default = field.metadata, default_of(field)
        sections.setdefault(info["section"], []).append({
            "name": field.name, "flag": flag_of(field), "help": info["help"],
            "kind": KINDS[element_type(script.settings, field)], "many": info["nargs"] in {"+", "*"},
            "optional": default is None or info["off"] is not None, "metavar": info["metavar"],
            "choices": list(info["choices"]) if info["choices"] else None, "default": plain(default),
        })  # fmt: skip
    named = [{"name": section, "fields": content} for section, content in sections.items()]
    return {"script": name, "sections": named, "resumes": script.resume is not None}


def plain(value: Any) -> Any:
    """A setting's value in JSON types."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.as_posix() if isinstance(value, Path) else value


def flag_of(field: dataclasses.Field[Any]) -> str:
    """Its name on the command line; empty for a positional argument."""
    if field.metadata["positional"]:
        return ""
    return str((field.metadata["flags"] or (f"--{field.name}",))[0])


def settings_of(name: str, values: Mapping[str, Any], workspace: Workspace) -> Any:
    """The settings that a form's values make, checked as the script checks them.

    Args:
        values: name -> value, of those that differ from their defaults.

    Raises:
        UserError: a value that the script would refuse, or a path outside the workspace.
    """
    settings_class = script_named(name).settings
    settings = settings_class(**checked_values(values, settings_class, Path("form")))
    if hasattr(settings, "check") and callable(settings.check):
        settings.check()
    for field in dataclasses.fields(settings_class):
        value = getattr(settings, field.name)
        if value == default_of(field) or field.metadata["metavar"] == FREE_TEXT:
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str | Path):
                _check_text(field.name, str(item), workspace)
    return settings


def _check_text(name: str, text: str, workspace: Workspace) -> None:
    """Whatever could be read as a path stays inside, also behind the ``NAME=`` of an adapter."""
    if "\0" in text or "\n" in text:
        raise UserError(f"{name}: a line break cannot stand in a command")
    for part in {text, text.partition("=")[2]}:
        workspace.argument(part)


def arguments_of(name: str, settings: Any) -> list[str]:
    """The flags that give a script these settings; defaults are left out.

    Raises:
        UserError: an item of a list that would be taken for a flag.
    """
    flags: list[str] = []
    for field in dataclasses.fields(script_named(name).settings):
        value, flag = getattr(settings, field.name), flag_of(field)
        if value == default_of(field):
            continue
        if not flag:
            flags.insert(0, str(value))
        elif isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is None:
            flags.append(field.metadata["off"])
        elif isinstance(value, list):
            items = [str(item) for item in value]
            if any(item.startswith("-") for item in items):
                raise UserError(f"{flag}: {' '.join(items)[:80]} begins with a dash, as flags do; write ./-name")
            flags += [flag, *items]
        elif str(value).startswith("-"):
            flags.append(f"{flag}={value}")
        else:
            flags += [flag, str(value)]
    return flags


def argv_of(name: str, settings: Any) -> list[str]:
    """The command: by the script's own file, since ``python -m`` would look for modules in the workspace first."""
    return [sys.executable, script_file(name), *arguments_of(name, settings)]


def script_file(name: str) -> str:
    """Where a script stands, in a checkout and installed."""
    return str(PROJECT / f"{name}.py")


def command_text(argv: list[str], folder: Path) -> str:
    """What to paste into a terminal for the same."""
    if os.name == "nt":
        return f"cd /d {subprocess.list2cmdline([str(folder)])}\n{subprocess.list2cmdline(argv)}"
    return f"cd {shlex.quote(str(folder))}\n{shlex.join(argv)}"
