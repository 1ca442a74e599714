"""The page's forms and commands are those of the scripts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from stocklora.cli.console import UserError
from stocklora.cli.settings import SettingsParser, default_of, element_type
from stocklora.instruct.sft.settings import SftParser, SftSettings
from stocklora.web.scripts import SCRIPTS, arguments_of, form_of, plain, settings_of
from stocklora.web.workspace import Workspace

NEEDED = {"merge_lora": {"output": "merged"}, "ledger": {"test_csv": ["a.csv"]}}  # to be a command at all
OTHER = {int: 7, float: 0.25, str: "other text", Path: "folder/other"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "work", tmp_path / "models")


def another_value(settings_class: type, field: dataclasses.Field) -> object:
    """A value that is not the field's default, in JSON types."""
    kind, default = element_type(settings_class, field), default_of(field)
    choices = field.metadata["choices"]
    value = (
        not default if kind is bool else next((c for c in choices if c != default), None) if choices else OTHER[kind]
    )
    return [value] if field.metadata["nargs"] in ("+", "*") else value


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_form_has_every_setting_and_its_commands_parse_to_what_was_typed(name: str, workspace: Workspace) -> None:
    settings_class = SCRIPTS[name].settings
    fields = dataclasses.fields(settings_class)
    shown = [field for section in form_of(name)["sections"] for field in section["fields"]]
    assert sorted(field["name"] for field in shown) == sorted(field.name for field in fields)
    assert {field["name"]: field["default"] for field in shown} == {f.name: plain(default_of(f)) for f in fields}
    parser_class = SftParser if settings_class is SftSettings else SettingsParser
    parser, tried = parser_class(f"{name}.py", None, settings_class), 0
    for field in fields:
        value = another_value(settings_class, field)
        try:
            settings = settings_of(name, NEEDED.get(name, {}) | {field.name: value}, workspace)
        except UserError:
            continue  # goes only with another setting
        read = parser.settings_of(parser.parse_args(arguments_of(name, settings)))
        assert getattr(read, "settings", read) == settings
        tried += 1
    assert tried >= 0.4 * len(fields)


@pytest.mark.parametrize(
    ("script", "values", "says"),
    [
        ("train_lora", {"epochs": "many"}, "'epochs' must be int"),
        ("train_lora", {"epoch": 3}, "did you mean 'epochs'"),
        ("train_lora", {"method": "full", "quantization": "4bit"}, "--method full"),
        ("train_lora", {"data": ["../secret.csv"]}, "outside the workspace"),
        ("train_lora", {"data": ["/etc/passwd"]}, "outside the workspace"),
        ("train_lora", {"save_dir": "~/elsewhere"}, "outside the workspace"),
        ("download", {"ticker": ["/etc/passwd"]}, "outside the workspace"),
        ("download", {"ticker": ["AAPL", "--output", "x.csv"]}, "begins with a dash"),
        ("inference_lora", {"lora_model": ["mine=../outside"]}, "outside the workspace"),
        ("fine_tune_qwen", {"resume_from_checkpoint": "../../run"}, "outside the workspace"),
        ("rm", {}, "no script 'rm'"),
    ],
)
def test_what_a_script_would_refuse_or_lies_outside_is_refused(
    script: str, values: dict, says: str, workspace: Workspace
) -> None:
    with pytest.raises(UserError, match=says):
        arguments_of(script, settings_of(script, values, workspace))


def test_a_value_that_begins_with_a_dash_is_no_flag(workspace: Workspace) -> None:
    settings = settings_of("inference_lora", {"prompt": "--merge ../all", "base_model": "models/a"}, workspace)
    assert "--prompt=--merge ../all" in arguments_of("inference_lora", settings)


def test_a_link_out_of_the_workspace_is_not_followed(workspace: Workspace, tmp_path: Path) -> None:
    workspace.root.mkdir()
    (tmp_path / "secret.csv").write_text("x")
    (workspace.root / "link.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(UserError, match="outside the workspace"):
        settings_of("train", {"data": ["link.csv"]}, workspace)
    assert list(workspace.files()) == []
