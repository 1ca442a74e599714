"""Settings: one dataclass a script, from which its flags, config-file keys and defaults all come.

A default lives in the dataclass and nowhere else. Precedence: default < config file < flag.
An unknown key in a config file is an error that names the nearest key there is.
Standard library only (YAML is loaded when a YAML file is read).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import importlib.util
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stocklora.cli.console import EXIT_USER_ERROR, UserError, one_line, run_script

# Choices and limits that the settings of several scripts share.
DTYPES = ("auto", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda", "mps")
METHODS = ("lora", "peft", "full", "head")
QUANTIZATIONS = ("none", "8bit", "4bit")
MOST_DAYS_AHEAD = 20
READ_LAST = ("reading prices", "more")  # sections of flags that several scripts inherit
# Packages that one command alone needs: module -> package.
SERVER = {"fastapi": "fastapi", "uvicorn": "uvicorn"}
SCORES = {"sacrebleu": "sacrebleu", "rouge_chinese": "rouge-chinese"}

MOST_BRACKETS = 400  # in a YAML file of settings

S = TypeVar("S")


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    section: str = "options",
    nargs: str | None = None,
    metavar: str | None = None,
    flags: Sequence[str] = (),
    off: str | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field that also describes its flag. A mutable default is copied for each instance.

    Args:
        flags: spellings in place of ``--name``, the first of them being the one that help shows.
        off: a flag without a value that sets the field to None, which its type must allow.
        positional: given by its place, without a flag; it may be left out.
    """
    metadata = {
        "help": help, "choices": choices, "section": section, "nargs": "?" if positional else nargs,
        "metavar": metavar, "flags": tuple(flags), "off": off, "positional": positional,
    }  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class ScriptParser(argparse.ArgumentParser):
    """Flags of a script. A mistake in them is one line on stderr, with the flag that was probably meant; exit code 2.

    argparse prints all flags first, and of fifty flags' usage nobody reads the end. Flags must be written out: an
    abbreviation that works today is ambiguous after the next flag.
    """

    def __init__(self, **options: Any) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options}
        super().__init__(**options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but for what it says of a flag that there is not."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, list(self._option_string_actions), n=1, cutoff=0.6)
            kind = "flag" if flag.startswith("-") else "argument"
            self.error(f"unknown {kind} {flag}" + (f"; did you mean {near[0]}?" if near else ""))
        return found

    def error(self, message: str) -> typing.NoReturn:
        """One line, and the end."""
        self.exit(EXIT_USER_ERROR, f"error: {one_line(message)} (--help lists the flags)\n")


class SettingsParser(ScriptParser):
    """The flags of a script whose settings are one dataclass, and its way from them to an exit code."""

    def __init__(self, prog: str, description: str | None, settings_class: type) -> None:
        super().__init__(prog=prog, description=description)
        self.settings_class = settings_class
        add_settings(self, settings_class)

    def run(self, body: Callable[[Any], int | None], argv: Sequence[str] | None) -> int:
        """Run ``body`` with the settings in force; see ``settings_of`` and ``run_script``."""
        arguments = self.parse_args(argv)
        return run_script(lambda: body(self.settings_of(arguments)))

    def settings_of(self, arguments: argparse.Namespace) -> Any:
        """See ``resolve_settings``."""
        return resolve_settings(arguments, self.settings_class)


def add_settings(parser: argparse.ArgumentParser, settings_class: type) -> None:
    """Add ``--config`` and one flag for every field of ``settings_class`` to ``parser``.

    A flag that is not given leaves nothing in the namespace, so that the config file can speak.
    """
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=None,
        help="JSON or YAML file with any of these settings; flags win over it",
    )
    groups: dict[str, Any] = {}
    # Inherited fields come first in a dataclass; what they are for is read last.
    for field in sorted(dataclasses.fields(settings_class), key=lambda field: field.metadata["section"] in READ_LAST):
        info = field.metadata
        if info["section"] not in groups:
            groups[info["section"]] = parser.add_argument_group(info["section"])
        default = default_of(field)
        words = " ".join(map(str, default)) if isinstance(default, list) else default
        shown = "" if default is None or default == [] else f" (default: {words})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": (info["help"] + shown).replace("%", "%%")}
        kind = element_type(settings_class, field)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = finite_float if kind is float else kind
            options["choices"] = info["choices"]
            options["nargs"] = info["nargs"]
            options["metavar"] = info["metavar"] or (None if info["choices"] else field.name.upper())
        group = groups[info["section"]]
        if info["positional"]:
            group.add_argument(field.name, **options)
            continue
        group.add_argument(*(info["flags"] or (f"--{field.name}",)), dest=field.name, **options)
        if info["off"]:
            off = {"action": "store_const", "const": None, "default": argparse.SUPPRESS}
            group.add_argument(info["off"], dest=field.name, help=f"not this: no --{field.name}", **off)


def resolve_settings(arguments: argparse.Namespace, settings_class: type[S]) -> S:
    """The settings in force: defaults, then the config file, then the flags that were given.

    Raises:
        UserError: an unknown key, a value of the wrong type or outside its choices, an unreadable file.
    """
    values: dict[str, Any] = {}
    if arguments.config is not None:
        values.update(checked_values(read_config(arguments.config), settings_class, arguments.config))
    names = {field.name for field in dataclasses.fields(settings_class)}  # type: ignore[arg-type]
    values.update({name: value for name, value in vars(arguments).items() if name in names})
    return settings_class(**values)


def restored(content: Mapping[str, Any], settings_class: type[S]) -> S:
    """Settings from a file's record of them; keys that this version does not know are passed over."""
    names = {field.name for field in dataclasses.fields(settings_class)}  # type: ignore[arg-type]
    known = {name: value for name, value in content.items() if name in names and value != []}  # [] was the default
    return settings_class(**checked_values(known, settings_class, Path("settings on record")))


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text: {error}") from None
    is_yaml = path.suffix.lower() in {".yaml", ".yml"}
    try:
        content = parse_yaml(text) if is_yaml else parse_json(text)
    except Exception as error:
        raise UserError(f"config file {path} is not valid {'YAML' if is_yaml else 'JSON'}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"config file {path} must hold one mapping of settings, not a {type(content).__name__}")
    return content


def parse_json(text: str) -> Any:
    """Standard JSON: no NaN or Infinity, and a key that stands twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for index, (key, _) in enumerate(pairs):
            if any(key == other for other, _ in pairs[:index]):
                raise ValueError(f"'{key}' stands there twice")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number that a setting can have")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def parse_yaml(text: str) -> Any:
    """YAML in which ``1e-4`` is a number (YAML 1.1 wants ``1.0e-4``) and a key stands once."""
    import yaml

    if text.count("[") + text.count("{") > MOST_BRACKETS:
        raise ValueError("more brackets than settings have")  # which would take the reader minutes

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
            for index, name in enumerate(names):
                if name in names[:index]:
                    raise ValueError(f"'{name}' stands there twice")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    return yaml.load(text, Loader=Loader)  # a SafeLoader: plain data only


def checked_values(content: Mapping[str, Any], settings_class: type, source: Path) -> dict[str, Any]:
    """Check names, types and choices of config-file values against the dataclass."""
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    values = {}
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise UserError(f"{source}: unknown setting '{key}'; {hint}")
        values[key] = coerced(value, settings_class, fields[key], source)
    return values


def coerced(value: Any, settings_class: type, field: dataclasses.Field[Any], source: Path) -> Any:
    """A config file's value as the field's type; of a list each item.

    Raises:
        UserError: a value of another type or outside the choices, or an empty list where the flag wants a value.
    """
    if value is None and (default_of(field) is None or field.metadata["off"]):
        return None
    kind = element_type(settings_class, field)
    if field.metadata["nargs"] not in {"+", "*"}:
        return coerced_item(value, kind, field, source)
    items = value if isinstance(value, list) else [value]
    if field.metadata["nargs"] == "+" and not items:
        raise UserError(f"{source}: setting '{field.name}' needs at least one value")
    return [coerced_item(item, kind, field, source) for item in items]


def coerced_item(item: Any, kind: Any, field: dataclasses.Field[Any], source: Path) -> Any:
    """One value as ``kind``; an int stands for a float and text for a path, nothing else is bent.

    Raises:
        UserError: another type, a number that is not finite, or none of the field's choices.
    """
    if kind is float and isinstance(item, int) and not isinstance(item, bool):
        try:
            item = float(item)
        except OverflowError:
            item = math.inf  # refused below
    if kind is Path and isinstance(item, str):
        item = Path(item)
    if kind is str and isinstance(item, datetime.date):
        item = item.isoformat()  # YAML reads 2016-07-01 as a date
    # bool is a subclass of int: `epochs: true` must not pass for 1
    wrong_bool = isinstance(item, bool) and kind is not bool
    if isinstance(kind, type) and (wrong_bool or not isinstance(item, kind)):
        raise UserError(f"{source}: setting '{field.name}' must be {kind.__name__}, got {shown(item)}")
    if isinstance(item, float) and not math.isfinite(item):
        raise UserError(f"{source}: setting '{field.name}' must be a finite number, got {item}")
    choices = field.metadata["choices"]
    if choices and item not in choices:
        raise UserError(
            f"{source}: setting '{field.name}' must be one of {', '.join(map(str, choices))}, got {shown(item)}"
        )
    return item


def shown(value: Any) -> str:
    """A value in a message, cut where it is long: a few lines of YAML can stand for a list of gigabytes."""
    cut = reprlib.Repr()
    cut.maxlevel, cut.maxstring, cut.maxother = 2, 200, 200
    return cut.repr(value)


def finite_float(text: str) -> float:
    """A flag's number; "nan" and "inf" are not settings."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; None where it has none."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def element_type(settings_class: type, field: dataclasses.Field[Any]) -> Any:
    """The type of one value: ``int`` for ``int``, ``int | None`` and ``list[int]`` alike."""
    kind = typing.get_type_hints(settings_class)[field.name]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
    return kind


def check_run(settings: Any) -> None:
    """The limits that every training script's settings share.

    Raises:
        UserError: naming the flag.
    """
    check_range(settings, window_size=(2, None))
    if settings.epochs < 0:
        raise UserError(f"--epochs must be 0 or more, got {settings.epochs}")
    for name in ("validation_fraction", "test_fraction"):
        if not 0.0 < getattr(settings, name) < 0.5:
            raise UserError(f"--{name} must be between 0 and 0.5, got {getattr(settings, name)}")


def check_horizon(horizon: int) -> None:
    """Raise a UserError beyond what the volatility scales are made for."""
    if horizon > MOST_DAYS_AHEAD:
        raise UserError(f"--horizon must be at most {MOST_DAYS_AHEAD} days, got {horizon}")


def check_positive(settings: object, *names: str) -> None:
    """Raise a UserError that names the first setting that is given and not above zero."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, got {value}")


def check_range(settings: object, **limits: tuple[float, float | None]) -> None:
    """Raise a UserError that names the first setting that is given and not from its least to its most (None: any)."""
    for name, (least, most) in limits.items():
        value = getattr(settings, name)
        if value is not None and not (least <= value and (most is None or value <= most)):
            wanted = f"at least {least}" if most is None else f"from {least} to {most}"
            raise UserError(f"--{name} must be {wanted}, got {value}")


def check_installed(packages: Mapping[str, str], purpose: str) -> None:
    """Raise a UserError that says what to install, if any of ``packages`` (module -> package) is missing."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{purpose} needs {' and '.join(missing)}; install: pip install {' '.join(missing)}")
