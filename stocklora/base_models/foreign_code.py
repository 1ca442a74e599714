"""Settings in a model's or an adapter's files that name code to fetch or import: refused before anything reads them.

``auto_map`` and a folder ``custom_generate`` are held back by transformers unless ``--trust_remote_code`` is given.
These are not: they name a repository of compiled kernels on a hub, or any Python module that is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stocklora.cli.console import UserError
from stocklora.runtime.files import json_of

# How a model computes; a name with a slash is a repository on a hub, whose code transformers would run.
IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
# Switches of transformers for kernels from hubs, and of PEFT for a module that it imports by name.
SWITCHES = {"use_kernels", "kernel_config", "megatron_config"}
CONFIGURATIONS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")


def check_names_no_code(folder: Path) -> None:
    """Refuse a model or an adapter of which a file has a setting that would load code; unreadable files pass.

    Raises:
        UserError: naming the file and the setting.
    """
    for name in CONFIGURATIONS:
        path = folder / name
        try:
            content = json_of(path.read_bytes())
        except (OSError, ValueError):  # not there, or damaged, which whoever reads it says
            continue
        for key, value in _named(content):
            raise UserError(
                f"{path} names code that would be loaded with the model ({key}: {str(value)[:80]}), which is never "
                f"done here; remove {key} from it, or use another model"
            )


def _named(content: Any) -> Iterator[tuple[str, Any]]:
    """The settings that name code, at any depth."""
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting.extend(part)
        if not isinstance(part, dict):
            continue
        for key, value in part.items():
            if IMPLEMENTATION.fullmatch(key):
                if any(not re.fullmatch(r"[\w|]+", name) for name in _texts(value)):
                    yield key, value
            elif (key in SWITCHES and value) or (key == "megatron_core" and value not in (None, "megatron.core")):
                yield key, value
            else:
                waiting.append(value)


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, str):
            yield part
