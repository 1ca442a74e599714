"""Libraries that one command alone needs: asked for before minutes of work. Standard library only."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from stocklora.cli.console import UserError

SERVER = {"fastapi": "fastapi", "uvicorn": "uvicorn"}
SCORES = {"sacrebleu": "sacrebleu", "rouge_chinese": "rouge-chinese"}


def check_installed(packages: Mapping[str, str], purpose: str) -> None:
    """Raise a UserError that says what to install, if any of ``packages`` (module -> package) is missing."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{purpose} needs {' and '.join(missing)}; install: pip install {' '.join(missing)}")
